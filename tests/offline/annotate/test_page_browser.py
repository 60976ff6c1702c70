"""The page in a real browser: filter, decide by keyboard, export, apply."""

import csv
import json

from inward.__main__ import main
from support.browser import open_page

FAKE = ("--model", "toy", "--backbone", "fake")


def rows(n):
    return [
        {"prompt": f"question {i}", "chosen": f"an answer {i} " * (i % 7 + 1), "rejected": f"another {i}",
         "source": "ab"[i % 2]}
        for i in range(n)
    ]  # fmt: skip


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_ten_pairs_are_decided_by_keyboard_and_exactly_those_are_applied(tmp_path, capsys):
    given = rows(120)
    source, look = tmp_path / "in.jsonl", tmp_path / "look.html"
    source.write_text("".join(json.dumps(row) + "\n" for row in given))
    options = ("--html", look, "--page-of", "sample", "--page-rows", 100, "--token-scores")
    assert main(["annotate", *map(str, (source, tmp_path / "annotated.jsonl", *FAKE, *options))]) == 0

    with open_page() as page:
        page.goto(look.as_uri())
        assert page.locator("#count").inner_text().startswith("100 of 100 pairs, 0 decided")
        assert page.locator("article").count() == 50  # the others are drawn when they are wanted
        page.get_by_label("value of the column").fill("b")
        page.locator("#column").select_option("source")
        page.get_by_label("most margin").fill("1000")
        shown = int(page.locator("#count").inner_text().split()[0])
        assert 20 < shown < 80
        facts = page.locator("article .facts").all_inner_texts()
        assert all("source: b" in one for one in facts)
        margins = [float(one.split("margin ")[1].split()[0]) for one in facts]
        assert margins == sorted(margins)
        page.locator("#sort").select_option("margin down")
        page.locator("h1").click()  # out of the controls
        for key in "frdffjrdfrf":  # ten decisions; j passes one over
            page.keyboard.press(key)
        page.keyboard.press("k")
        page.keyboard.press("u")  # the last is the eleventh shown: undecided again, and decided once more
        page.keyboard.press("f")
        assert ", 10 decided" in page.locator("#count").inner_text()
        page.keyboard.press("c")
        assert page.locator("article.at pre span").count() > 2
        page.get_by_label("decided", exact=True).select_option("decided")
        assert page.locator("article").count() == 10
        with page.expect_download() as download:
            page.locator("#export").click()
        download.value.save_as(tmp_path / "decisions.csv")
        page.reload()
        assert ", 10 decided" in page.locator("#count").inner_text()

    with (tmp_path / "decisions.csv").open(newline="") as file:
        decided = {int(one["row"]) - 1: one["decision"] for one in csv.DictReader(file)}
    assert len(decided) == 10 and {given[n]["source"] for n in decided} == {"b"}
    assert sorted(decided.values()) == ["drop"] * 2 + ["flip"] * 5 + ["right"] * 3

    out = tmp_path / "corrected.jsonl"
    assert main(["annotate", str(source), str(out), "--apply", str(tmp_path / "decisions.csv")]) == 0
    expected = []
    for n, row in enumerate(given):
        if decided.get(n) == "flip":
            expected.append({**row, "chosen": row["rejected"], "rejected": row["chosen"]})
        elif decided.get(n) != "drop":
            expected.append(row)
    assert read(out) == expected
    assert "10 decisions: 5 rows flipped, 2 dropped, 3 right as they are" in capsys.readouterr().err


def test_rows_that_repeat_a_pair_are_decided_together(tmp_path):
    source, look = tmp_path / "in.jsonl", tmp_path / "look.html"
    source.write_text("".join(json.dumps(row) + "\n" for row in [*rows(2), rows(1)[0]]))
    options = ("--html", look, "--page-of", "sample")
    assert main(["annotate", *map(str, (source, tmp_path / "out.jsonl", *FAKE, *options))]) == 0
    with open_page() as page:
        page.goto(look.as_uri())
        page.get_by_label("text").fill("question 0")
        page.locator("h1").click()
        page.keyboard.press("f")
        assert ", 2 decided" in page.locator("#count").inner_text()
        assert all(one.endswith("flip") for one in page.locator("article .facts").all_inner_texts())


def test_what_stands_in_the_data_is_shown_and_not_run(tmp_path):
    row = {"prompt": "<img src=x onerror=alert(1)>", "chosen": "</script><script>alert(2)</script>", "rejected": "no"}
    source, look = tmp_path / "in.jsonl", tmp_path / "look.html"
    source.write_text(json.dumps(row) + "\n")
    options = ("--html", look, "--page-of", "sample")
    assert main(["annotate", *map(str, (source, tmp_path / "out.jsonl", *FAKE, *options))]) == 0
    with open_page() as page:
        alerts = []
        page.on("dialog", lambda dialog: (alerts.append(dialog.message), dialog.dismiss()))
        page.goto(look.as_uri())
        assert page.locator("article .prompt pre").inner_text() == row["prompt"]
        assert page.locator("article .both pre").first.inner_text() == row["chosen"]
        assert page.locator("article img").count() == 0 and not alerts
