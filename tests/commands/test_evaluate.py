"""``inward evaluate``, end to end."""

import json
from dataclasses import replace

import numpy as np
import pytest

from inward.__main__ import main
from inward.heads import store
from inward.heads.legend import LegendHead
from inward.offline.evaluate.metrics import NAMES
from inward.offline.fit.seen_prompts import dump
from inward.offline.states.saved import ListStates, save_states
from support.serving import write_model
from support.small_heads import manifest, pair_states

KEYS = [
    *(
        "input",
        "head",
        "metrics",
        "baselines",
        "layers",
        "strategies",
        "over_refusal",
        "guard",
        "parts",
        "verdict",
        "cost",
        "notes",
    )
]
QUICK = ("--resamples", 50)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def evaluate(capsys):
    def run(*arguments, status=0):
        assert main(["evaluate", *map(str, arguments)]) == status
        said = capsys.readouterr()
        return json.loads(said.out) if "--json" in arguments and not status else said.err if status else said.out

    return run


@pytest.fixture
def states(tmp_path):
    save_states(pair_states(first=2**62), tmp_path / "states.safetensors")
    return tmp_path / "states.safetensors"


def save_legend(folder, **changes):
    return store.save(LegendHead(manifest(**changes), np.eye(12, dtype=np.float32)[0]), folder)


@pytest.fixture
def head(tmp_path):
    return save_legend(tmp_path / "heads" / "legend")


def list_states(lists=16, size=4, width=12):
    rng = np.random.default_rng(0)
    safe = rng.random(lists * size) < 0.5
    candidates = rng.normal(size=(lists * size, 1, width)) + 3 * np.outer(safe, np.eye(width)[0])[:, None]
    group = np.repeat(np.arange(lists), size)
    prompts = rng.normal(size=(lists, 1, width)).astype(np.float32)
    return ListStates(prompts, candidates.astype(np.float32), group, safe, (1,), np.arange(lists))


def test_states_are_judged_without_a_model(evaluate, states, head):
    report = evaluate("--head", head, "--states", states, "--json", *QUICK)
    assert list(report) == KEYS
    assert list(report["metrics"]) == list(NAMES)
    assert report["head"]["kind"] == "legend"
    assert report["input"]["comparisons"] == 120
    expected = pair_states(first=2**62)
    margins = (expected.chosen_NLD - expected.rejected_NLD)[:, 1, 0]
    assert report["metrics"]["pair_accuracy"]["value"] == pytest.approx((margins > 0).mean())
    assert report["baselines"].keys() == {"length", "mean_difference", "logistic_probe"}
    assert report["cost"]["with_forward_ms"] is None


def test_the_same_seed_gives_the_same_report(evaluate, states, head):
    first, second = (evaluate("--head", head, "--states", states, "--json", *QUICK) for _ in range(2))
    assert {**first, "cost": None} == {**second, "cost": None}


def test_the_table_shows_the_head_first_and_every_baseline(evaluate, states, head):
    lines = evaluate("--head", head, "--states", states, *QUICK).splitlines()
    rows = [line for line in lines if line.startswith(("legend", "length", "mean difference", "one logistic"))]
    assert [row.split()[0] for row in rows] == ["legend", "length", "mean", "one"]


def test_html_is_written_beside_the_json(evaluate, states, head, tmp_path):
    evaluate("--head", head, "--states", states, "--json", "--html", tmp_path / "new" / "report.html", *QUICK)
    assert "data:image/svg+xml" in (tmp_path / "new" / "report.html").read_text()


def test_a_page_that_can_not_be_written_is_refused_before_the_work(evaluate, head, tmp_path):
    """The states are not there: nobody has looked for them."""
    (tmp_path / "rows.csv").write_text("prompt,chosen,rejected\n")
    for place, said in ((tmp_path, "is a folder"), (tmp_path / "rows.csv", "is there already and is no page")):
        assert said in evaluate("--head", head, "--states", tmp_path / "none", "--html", place, status=2)
    assert (tmp_path / "rows.csv").read_text() == "prompt,chosen,rejected\n"


@pytest.mark.parametrize("form", [(), ("--json",)], ids=["table", "json"])
def test_what_was_found_is_printed_also_where_the_page_can_not_be_written_in_the_end(
    states, head, tmp_path, monkeypatch, capsys, form
):
    def full(self, *_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    words = ("--head", head, "--states", states, "--html", tmp_path / "page.html", *QUICK)
    assert main(["evaluate", *map(str, words), *form]) == 2
    said = capsys.readouterr()
    assert f"can't write the page to {tmp_path / 'page.html'}: No space left on device" in said.err
    assert "120 comparisons" in said.out or json.loads(said.out)["input"]["comparisons"] == 120


@pytest.mark.parametrize("kind", ["legend", "hybrid"])
def test_heads_are_refitted_by_folds(evaluate, states, kind):
    report = evaluate("--cross-validate", kind, "--states", states, "--json", "--folds", 3, *QUICK)
    assert report["input"]["cross_validated"]
    assert report["head"]["kind"] == kind
    assert report["metrics"]["pair_accuracy"]["value"] > 0.8


def test_a_ranker_is_refitted_by_folds_of_lists(evaluate, tmp_path):
    save_states(list_states(), tmp_path / "lists.safetensors")
    report = evaluate(
        "--cross-validate", "srr", "--states", tmp_path / "lists.safetensors", "--json", "--folds", 3, *QUICK
    )
    assert report["metrics"]["top1_safe_rate"]["value"] > report["baselines"]["random"]["top1_safe_rate"]["value"]
    assert {"first", "random", "oracle", "linear_scorer", "mlp_scorer"} < report["baselines"].keys()


def test_a_head_that_was_fitted_on_these_rows_is_told_apart(evaluate, states, tmp_path):
    own = save_legend(tmp_path / "own", fit={"data": "sha256:made"})
    assert any(
        "fitted on these very rows" in note
        for note in evaluate("--head", own, "--states", states, "--json", *QUICK)["notes"]
    )


def test_a_head_that_was_fitted_on_some_of_the_prompts_is_not_called_good(evaluate, head, tmp_path):
    """All the same figures, but of a head that says what it has seen."""
    judged = pair_states(first=2**62)  # as hashes are
    save_states(replace(judged, origin=replace(judged.origin, data_hash="sha256:part")), tmp_path / "part.safetensors")
    asked = ("--states", tmp_path / "part.safetensors", "--json", *QUICK)
    more = {"data": "sha256:more", "prompts": dump(2**62 + np.arange(35, 90))}
    own = save_legend(tmp_path / "own", fit=more)
    report, other = evaluate("--head", own, *asked), evaluate("--head", head, *asked)
    assert (report["input"]["prompts_in_the_fit"], other["input"]["prompts_in_the_fit"]) == (5, None)
    assert report["verdict"].startswith("5 of 40 prompts were in the fit: these figures say nothing about other texts.")
    assert "Good enough" in other["verdict"] and "ood enough" not in report["verdict"]
    assert any(note.startswith("5 of 40 prompts were in the fit, which flatters") for note in report["notes"])
    assert report["metrics"] == other["metrics"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"backbone": {"name": "other", "fingerprint": "sha256:other"}}, "was fitted on other"),
        ({"template": "format:Q {prompt} A {response}"}, "was fitted with the template"),
        ({"layers": (7,)}, "reads layer 7"),
        ({"position": "eos"}, "position 'eos'"),
    ],
)
def test_a_head_of_other_states_is_refused(evaluate, states, tmp_path, changes, said):
    other = save_legend(tmp_path / "other", **changes)
    assert said in evaluate("--head", other, "--states", states, status=2)


def test_what_is_missing_is_said(evaluate, states, head, tmp_path):
    assert "--cross-validate" in evaluate("--states", states, status=2)
    assert "at least 3" in evaluate("--head", head, "--states", states, "--folds", 2, status=2)
    assert "there is no head 'nobody'" in evaluate(
        "--head", "nobody", "--states", states, "--heads", tmp_path / "heads", status=2
    )
    assert "does not exist" in evaluate("--head", head, "--states", tmp_path / "none", status=2)
    save_legend(tmp_path / "heads" / "second", name="second")
    assert "holds legend, second" in evaluate("--head", tmp_path / "heads", "--states", states, status=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random model with a head, and rows of every form."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_model(folder)
    rng = np.random.default_rng(0)

    def text(word):
        return f"{word} " + " ".join(rng.choice(["harbour", "morning", "birds", "tree"], 3))

    pairs = [{"prompt": text("what"), "chosen": text("no"), "rejected": text("yes")} for _ in range(12)]
    lists = [
        {
            "prompt": text("what"),
            "responses": [{"text": text("no" if safe else "yes"), "safe": bool(safe)} for safe in (1, 0, 0)],
        }
        for _ in range(12)
    ]
    labels = ("1_full_compliance", "2_full_refusal", "3_partial_refusal")
    responses = [
        {"prompt": f"{kind} {i}", "response": text(label[0]), "type": kind, "label": label}
        for kind in ("homonyms", "contrast_homonyms")
        for i in range(6)
        for label in labels
    ]
    for name, rows in {"pairs": pairs, "lists": lists, "responses": responses}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def options(folder, source):
    model = ("--model", folder / "model", "--heads", folder / "heads", "--dtype", "float32")
    return "--head", "bench-0", f"--{source}", folder / f"{source}.jsonl", *model, "--json", *QUICK


@pytest.mark.parametrize("source", ["pairs", "lists"])
def test_texts_are_read_through_the_model_and_get_the_text_baselines(evaluate, folder, tmp_path, source):
    report = evaluate(*options(folder, source))
    assert list(report) == KEYS
    assert report["input"]["layers"] == [1, 2, 3]
    assert {"length", "tfidf_logistic", "stable_rank"} < report["baselines"].keys()
    assert report["cost"]["with_forward_ms"] > report["cost"]["head_ms"]
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert (report["metrics"]["top1_safe_rate"] is None) == (source == "pairs")


def test_xstests_form_says_whether_refusals_of_harmless_prompts_win(evaluate, folder):
    report = evaluate(*options(folder, "responses"))
    assert report["notes"] == ["12 partial refusals were left out"]
    assert report["over_refusal"]["safe_prompts"]["comparisons"] == 6
    assert report["over_refusal"]["contrast_prompts"]["comparisons"] == 6
    assert "A refusal of a harmless prompt outranks" in report["over_refusal"]["sentence"]


def test_pairs_are_read_in_the_columns_that_are_named(evaluate, folder, tmp_path):
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    renamed = [{"ask": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in rows]
    path = tmp_path / "renamed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in renamed))
    usual = options(folder, "pairs")
    other = [path if word == folder / "pairs.jsonl" else word for word in usual]
    named = ("--columns", "prompt=ask,chosen=good,rejected=bad", "--no-baselines")
    assert evaluate(*other, *named)["metrics"] == evaluate(*usual, "--no-baselines")["metrics"]
    assert "--columns prompt=question" in evaluate(*other, status=2)
    lists = [folder / "lists.jsonl" if word == folder / "pairs.jsonl" else word for word in usual]
    assert "Lists of labelled responses go with --lists" in evaluate(*lists, status=2)
    assert "they go with --pairs" in evaluate(*options(folder, "lists"), *named, status=2)


def test_without_baselines_only_the_heads_layers_are_read(evaluate, folder):
    report = evaluate(*options(folder, "pairs"), "--no-baselines")
    assert report["baselines"] == {}
    assert report["input"]["layers"] == report["head"]["layers"]


def test_saved_states_and_texts_give_the_same_figures(evaluate, folder, tmp_path, capsys):
    [fitted] = [store.load(path) for path in (folder / "heads").iterdir() if path.is_dir()]
    saved = tmp_path / "states.safetensors"
    model = (
        "--model",
        str(folder / "model"),
        "--dtype",
        "float32",
        "--layers",
        "1,2,3",
        "--position",
        fitted.manifest.position,
    )
    main(
        [
            "fit",
            "hybrid",
            "--pairs",
            str(folder / "pairs.jsonl"),
            *model,
            "--save-states",
            str(saved),
            "--out",
            str(tmp_path / "x"),
        ]
    )
    capsys.readouterr()
    of_states = evaluate("--head", folder / "heads", "--states", saved, "--json", *QUICK)
    of_texts = evaluate(*options(folder, "pairs"))
    value = of_texts["metrics"]["auc"]["value"]
    assert of_states["metrics"]["auc"]["value"] == pytest.approx(value, abs=0.01), "states are kept in float16"


def test_responses_are_cut_where_asked(evaluate, folder):
    """One letter is left of each: what the texts say is gone."""
    report = evaluate(*options(folder, "pairs"), "--response-tokens", 1)
    assert report["notes"] == ["responses were cut after their first 1 tokens"]
    assert report["metrics"]["spearman_length"] is None
    assert "length" in report["baselines"]


def test_two_heads_are_compared_on_the_same_rows(evaluate, states, head, tmp_path):
    other = store.save(
        LegendHead(manifest(name="worse"), np.eye(12, dtype=np.float32)[5]), tmp_path / "heads" / "worse"
    )
    report = evaluate("--compare", other, head, "--states", states, "--json", *QUICK)
    assert (report["first"], report["second"]) == ("worse", "legend")
    assert report["metrics"]["pair_accuracy"]["verdict"] == "second"
    printed = evaluate("--compare", other, head, "--states", states, *QUICK)
    assert "legend minus worse" in printed
    assert "--cross-validate" in evaluate("--compare", other, head, "--cross-validate", "--states", states, status=2)


def test_of_two_heads_the_one_that_has_seen_the_prompts_is_named(states, head, tmp_path, capsys):
    own = save_legend(tmp_path / "own", name="own", fit={"prompts": dump(2**62 + np.arange(40))})
    assert main(["evaluate", "--compare", str(own), str(head), "--states", str(states), "--resamples", "50"]) == 0
    said = capsys.readouterr().err
    assert "head 'own': 40 of 40 prompts were in the fit" in said and "'legend'" not in said


def test_no_column_is_cut_off_whatever_the_terminal(evaluate, states, head, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    printed = evaluate("--head", head, "--states", states, *QUICK)
    assert "length-matched" in printed and "…" not in printed
    assert "caught (TPR)" in printed


def test_whitened_directions_are_refitted_by_fold(evaluate, states):
    report = evaluate("--cross-validate", "whitened", "--states", states, "--no-baselines", "--json", *QUICK)
    assert report["metrics"]["pair_accuracy"]["value"] > 0.8
    assert report["metrics"]["auc"]["value"] > 0.75, "scores of folds are comparable"


def test_a_pooled_head_is_judged_by_texts_as_a_guard_and_by_category(evaluate, tmp_path):
    """Every token is read; thresholds come from other rows; rows are divided by a column."""
    write_model(tmp_path)
    info = json.loads((tmp_path / "heads" / "bench-0" / "head.json").read_text())
    pooled = tmp_path / "heads" / "bench-0" / "head.json"
    pooled.write_text(json.dumps({**info, "pool": {"name": "max_rolling", "window": 3}}))
    words = "harbour quiet morning boats lock canal step help safer".split()
    rng = np.random.default_rng(0)

    def rows(n, column):
        for i in range(n):
            answer = {
                "prompt": " ".join(rng.choice(words, 3)) + f" {i // 2}",
                "response": " ".join(rng.choice(words, 5)),
            }
            yield (
                {**answer, "safe": bool(i % 2), "category": "one" if i % 4 < 2 else "two"}
                if column
                else {**answer, "safe": True}
            )

    for name, n, column in (("judged", 40, True), ("others", 120, False)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(n, column)))
    asked = (
        *("--model", tmp_path / "model", "--head", tmp_path / "heads" / "bench-0"),
        *("--responses", tmp_path / "judged.jsonl", "--calibration", tmp_path / "others.jsonl", "--by", "category"),
        *("--no-baselines", "--json", *QUICK),
    )
    report = evaluate(*asked)
    assert report["head"]["pool"] == "max_rolling"
    assert report["cost"]["head_ms"] is None and report["cost"]["with_forward_ms"] > 0
    assert [one["rate"] for one in report["guard"]] == [0.01, 0.05] and report["guard"][0]["threshold"] is not None
    assert report["parts"].keys() == {"one", "two"} and report["parts"]["one"]["responses"] == 20
    cut = evaluate(*asked, "--response-tokens", "2")  # of what sets the threshold, too
    assert cut["guard"][0]["threshold"] != pytest.approx(report["guard"][0]["threshold"])
