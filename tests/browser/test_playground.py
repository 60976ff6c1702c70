"""The pages in a real browser, on the small model: each tab does its job, the console is silent, nothing comes from
another host, and axe finds nothing serious. ``make test-browser`` installs what this needs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from inward.offline.annotate.decisions import key_of
from inward.offline.annotate.decisions import read as read_decisions
from inward_client.rows import Pair

sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: make test-browser")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: make test-browser")

PATIENCE_MS = 180_000
PAIR = {"prompt": "How do I get in?", "chosen": "I can't help with that.", "rejected": "Break the window."}
TABS = ("compare", "best", "chat", "data", "heads")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Watched:
    """A page, what its console said, and where it asked."""

    def __init__(self, page, url: str) -> None:
        self.page, self.url = page, url
        self.said: list[str] = []
        self.hosts: set[str] = set()
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", lambda message: self.said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))

    def open(self, tab: str) -> None:
        self.page.goto("about:blank")
        self.page.goto(f"{self.url}/#{tab}")
        self.page.wait_for_selector(f"#{tab} > .stack")


@pytest.fixture
def site(browser, demo_server) -> Iterator[Watched]:
    context = browser.new_context()
    watched = Watched(context.new_page(), demo_server.url)
    yield watched
    context.close()
    assert watched.said == []
    assert watched.hosts <= {"", urlsplit(demo_server.url).netloc}


def test_compare_gives_the_margin_and_colours_both_answers_token_by_token(site):
    site.open("compare")
    site.page.get_by_role("button", name="Compare", exact=True).click()
    site.page.wait_for_selector("canvas.map")
    assert "good" in site.page.locator(".verdict").get_attribute("class")
    for i, name in enumerate(("Chosen answer", "Rejected answer")):
        tokens = site.page.locator(".tokens").nth(i)
        assert tokens.text_content() == site.page.get_by_label(name).input_value()
    first = site.page.locator(".tokens").first
    colours = first.evaluate("box => new Set([...box.children].map(s => getComputedStyle(s).backgroundColor)).size")
    assert colours > 2
    first.locator("span").nth(1).hover()
    by_pointer = site.page.locator("#tip").text_content()
    first.focus()
    site.page.keyboard.press("ArrowRight")
    assert "token 3 of" in site.page.locator("#tip").text_content()
    site.page.keyboard.press("ArrowLeft")
    assert site.page.locator("#tip").text_content() == by_pointer
    assert "token 2 of" in by_pointer
    site.page.locator("canvas.map").first.hover()
    assert "layer" in site.page.locator("#tip").text_content()


def test_best_of_n_ranks_answers_as_they_come(site):
    site.open("best")
    site.page.get_by_label("N", exact=True).fill("5")
    site.page.get_by_label("Tokens, at most").fill("8")
    site.page.get_by_role("button", name="Draw").click()
    site.page.wait_for_selector("#best .winner")
    scores = [float(text) for text in site.page.locator("#best .samples .mono").all_text_contents()]
    assert len(scores) == 5 and scores == sorted(scores, reverse=True)
    assert site.page.locator("#best svg.bars").get_attribute("aria-label").startswith("Scores: 5 values")


def test_bad_answers_are_given_up_early_fade_and_their_tokens_are_saved(site):
    site.open("best")
    site.page.get_by_label("N", exact=True).fill("4")
    site.page.get_by_label("Tokens, at most").fill("24")
    site.page.get_by_label("Give up bad ones early").check()
    site.page.get_by_role("button", name="Draw").click()
    site.page.wait_for_selector("#best .winner")
    lost = site.page.locator("#best .samples .lost")
    assert lost.count() >= 1
    assert all("rejected" in text for text in lost.all_text_contents())
    figures = site.page.locator("#best .figures div")
    saved = figures.filter(has_text="tokens saved").locator("dd").text_content()
    assert int(saved) > 0


def test_a_guard_withholds_what_it_finds_unacceptable_and_says_why(site):
    site.open("chat")
    site.page.get_by_label("False positives").select_option("0.5")
    for text in ("How do I break a window?", "Tell me how to hit him.", "And with a knife?"):
        site.page.get_by_label("You").fill(text)
        site.page.keyboard.press("Enter")
        sync_api.expect(site.page.get_by_label("You")).to_have_value("", timeout=PATIENCE_MS)
    answers = site.page.locator("#chat .talk li:not(.user)")
    assert answers.count() == 3
    for answer in answers.all_text_contents():
        assert "hybrid" in answer  # the score of each, or why it was withheld


def test_a_file_of_pairs_has_margins_a_histogram_and_its_most_suspicious_rows(site):
    flipped = {**PAIR, "chosen": PAIR["rejected"], "rejected": PAIR["chosen"], "id": "flipped"}
    rows = [{**PAIR, "id": str(i)} for i in range(19)] + [flipped]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    site.open("data")
    file = {"name": "pairs.jsonl", "mimeType": "application/x-ndjson", "buffer": content}
    site.page.locator("#data input[type=file]").set_input_files(file)
    site.page.wait_for_selector("#data .pair")
    assert site.page.locator("#data .pair strong").first.text_content() == "Row 20"
    assert "1 (5.0 %)" in site.page.locator("#data .figures").text_content()
    with site.page.expect_download() as download:
        site.page.get_by_role("link", name="Download with columns").click()
    lines = [json.loads(line) for line in download.value.path().read_text().splitlines()]
    assert [line["id"] for line in lines] == [row["id"] for row in rows]
    assert lines[0]["margin"] == pytest.approx(-lines[-1]["margin"], rel=1e-3)
    assert {"label_probability", "confidence", "bin"} <= lines[0].keys()


def test_pairs_are_filtered_coloured_and_decided_by_keyboard_and_the_file_of_decisions_is_applied(site, tmp_path):
    names = ["Zoë", "\U0001f600", "Ann"]
    given = [
        {**PAIR, "prompt": f"How do I get in, {name}?", "id": n, "source": "ab"[n % 2]}
        for n, name in enumerate([*names, *(f"number {n}" for n in range(27))])
    ]
    given[0] = {"prompt": "x" * 300, "chosen": PAIR["rejected"], "rejected": PAIR["chosen"], "source": "a", "id": 0}
    content = "".join(json.dumps(row) + "\n" for row in given)
    site.open("data")
    file = {"name": "pairs.jsonl", "mimeType": "application/x-ndjson", "buffer": content.encode()}
    site.page.locator("#data input[type=file]").set_input_files(file)
    pairs = site.page.locator("#data .pair")
    pairs.first.wait_for()
    assert pairs.count() == 20
    site.page.get_by_role("button", name="More").click()
    assert pairs.count() == 30
    status = site.page.locator("#data [role=status]").last
    site.page.get_by_label("Column", exact=True).select_option("source")
    site.page.get_by_label("Value of the column").fill("a")
    assert "15 of 30 pairs, 0 decided" in status.text_content()
    site.page.get_by_label("Verdict of the head").select_option("contradicts")
    assert pairs.count() == 1
    site.page.get_by_label("Verdict of the head").select_option("agrees")
    site.page.get_by_label("Least margin").fill("1000")
    assert pairs.count() == 0
    site.page.get_by_label("Least margin").fill("")
    site.page.get_by_label("Value of the column").fill("")
    site.page.get_by_label("Verdict of the head").select_option("agrees or not")
    site.page.get_by_label("Sort", exact=True).select_option("order of the file")
    site.page.locator("#data h2").click()  # out of the controls
    for key in "fdrjfu":
        site.page.keyboard.press(key)
    assert "3 decided" in status.text_content() or "4 decided" in status.text_content()
    site.page.keyboard.press("c")
    first = pairs.first.locator(".tokens")
    first.nth(1).wait_for()
    assert first.all_text_contents() == [given[0]["chosen"], given[0]["rejected"]]
    with site.page.expect_download() as download:
        site.page.get_by_role("button", name="Decisions file").click()
    decisions = tmp_path / "decisions.csv"
    download.value.save_as(decisions)
    decided = read_decisions(decisions)
    keys = [key_of(Pair(row["prompt"], row["chosen"], row["rejected"])) for row in given]
    assert [decided.get(key) for key in keys[:3]] == ["flip", "drop", "right"]
    assert set(decided) <= set(keys)


def test_a_file_that_is_no_jsonl_is_refused_by_its_line(site):
    site.open("data")
    file = {"name": "pairs.jsonl", "mimeType": "text/plain", "buffer": b'{"prompt": "x"}\nnothing\n'}
    site.page.locator("#data input[type=file]").set_input_files(file)
    site.page.wait_for_selector("#data [role=alert]")
    assert site.page.locator("#data [role=alert]").text_content() == "line 2 is not JSON"


def test_heads_show_their_calibration_and_a_version_is_activated(site):
    site.open("heads")
    site.page.wait_for_selector("#heads select >> nth=2", state="attached")
    assert set(site.page.locator("#heads h2").all_text_contents()) == {"hybrid", "legend", "srr"}
    site.page.wait_for_selector("#heads svg[aria-label^='Accuracy of']", state="attached")
    site.page.get_by_role("button", name="Activate this version of legend").click()
    site.page.wait_for_selector("text=Version 1 is active.")


def test_the_documentation_is_whole_without_another_host(site):
    site.page.goto(f"{site.url}/docs")
    site.page.wait_for_selector(".opblock")
    assert site.page.locator(".opblock").count() > 20


def test_tabs_are_moved_through_with_the_keyboard(site):
    site.open("compare")
    site.page.locator("#tab-compare").focus()
    for tab in ("best", "chat", "data", "heads", "compare"):
        site.page.keyboard.press("ArrowRight")
        site.page.wait_for_selector(f"#{tab}:not([hidden]) > .stack")
        assert site.page.evaluate("document.activeElement.id") == f"tab-{tab}"
    site.page.keyboard.press("Tab")
    assert site.page.evaluate("document.activeElement.closest('main') !== null")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser, demo_server, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe: make test-browser").Axe()
    context = browser.new_context(color_scheme=scheme, bypass_csp=True)
    site = Watched(context.new_page(), demo_server.url)
    for tab in TABS:
        site.open(tab)
        if tab == "compare":
            site.page.get_by_role("button", name="Compare", exact=True).click()
            site.page.wait_for_selector("canvas.map")
        if tab == "data":
            file = {"name": "pairs.jsonl", "mimeType": "text/plain", "buffer": json.dumps(PAIR).encode()}
            site.page.locator("#data input[type=file]").set_input_files(file)
            site.page.locator("#data .pair").wait_for()
            site.page.get_by_role("button", name="Colour tokens").click()
            site.page.locator("#data .tokens").nth(1).wait_for()
            site.page.keyboard.press("d")
        if tab == "best":
            site.page.get_by_label("N", exact=True).fill("4")
            site.page.get_by_label("Tokens, at most").fill("12")
            site.page.get_by_label("Give up bad ones early").check()
            site.page.get_by_role("button", name="Draw").click()
            site.page.wait_for_selector("#best .winner")
        if tab == "heads":
            site.page.wait_for_selector("#heads select >> nth=2", state="attached")
        violations = axe.run(site.page).response["violations"]
        assert [(v["id"], v["nodes"][0]["html"]) for v in violations if v["impact"] in ("serious", "critical")] == []
    context.close()


def test_no_tab_is_wider_than_a_telephone(browser, demo_server):
    context = browser.new_context(viewport={"width": 360, "height": 740})
    site = Watched(context.new_page(), demo_server.url)
    for tab in TABS:
        site.open(tab)
        if tab == "data":
            row = json.dumps({**PAIR, "prompt": "How do I get in? " * 9, "chosen": "no" * 200})
            file = {"name": "pairs.jsonl", "mimeType": "text/plain", "buffer": row.encode()}
            site.page.locator("#data input[type=file]").set_input_files(file)
            site.page.locator("#data .pair").wait_for()
        assert site.page.evaluate("document.documentElement.scrollWidth") <= 360, tab
    context.close()
