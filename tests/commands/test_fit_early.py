"""``inward fit value`` and ``inward fit guard``: files in, heads out that ``/rerank`` can use."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from inward.__main__ import main
from inward.heads import store
from inward.heads.guard import guard_threshold
from inward.heads.pooling import Pool
from inward.heads.value import RejectionCurve

MODEL = ["--model", "toy", "--backbone", "fake"]


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_value_head_is_fitted_from_prompts_alone(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": f"Question {i}?"} for i in [*range(12), 3, 4]])
    out = tmp_path / "hybrid-value"
    options = ["--samples", "4", "--sampling", '{"max_tokens": 24}', "--at", "4,8,64"]
    main(["fit", "value", "--head", "hybrid", "--prompts", prompts, "--out", str(out), *options, *MODEL])
    head = store.load(out)
    assert (head.ref.kind, head.manifest.options["of"]) == ("value", "hybrid")
    assert head.manifest.fit["metrics"]["prompts"] == 12
    curve = RejectionCurve.load(head.manifest.calibration)
    assert curve is not None and curve.at == (4, 8)
    assert "within a prompt" in capsys.readouterr().out


def test_a_guards_thresholds_are_those_of_the_safe_answers(tmp_path: Path, capsys) -> None:
    rng = np.random.default_rng(0)
    safe = [{"prompt": f"p {i}", "response": " ".join(map(str, rng.integers(0, 99, 12)))} for i in range(120)]
    out = tmp_path / "hybrid"
    rows = write(tmp_path / "safe.jsonl", safe)
    main(["fit", "guard", "--head", "hybrid", "--safe", rows, "--out", str(out), "--pool", "mean", *MODEL])
    calibration = store.load(out).manifest.calibration
    pool = Pool(name="mean")
    strict, loose = (guard_threshold(calibration, pool, rate, head="hybrid") for rate in (0.01, 0.2))
    assert strict < loose
    assert "120 acceptable responses" in capsys.readouterr().out


def test_what_is_labelled_as_unsafe_sets_no_threshold(tmp_path: Path, capsys) -> None:
    rows = [{"prompt": f"p {i}", "response": f"words {i} " * 6, "safe": i % 2 == 0} for i in range(240)]
    safe, out = write(tmp_path / "safe.jsonl", rows), str(tmp_path / "hybrid")
    main(["fit", "guard", "--head", "hybrid", "--safe", safe, "--out", out, "--pool", "mean", *MODEL])
    said = capsys.readouterr()
    assert "120 acceptable responses" in said.out
    assert "120 of 240 responses are labelled as not acceptable" in said.err


def test_a_value_head_needs_two_answers_to_each_prompt(tmp_path: Path, capsys) -> None:
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
    for n in ("0", "1"):
        options = ["--prompts", prompts, "--out", str(tmp_path / "v"), "--samples", n]
        assert main(["fit", "value", "--head", "hybrid", *options, *MODEL]) == 2
        assert "two answers to each prompt" in capsys.readouterr().err


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inward.processes.wiring.open_backbone", None)  # would raise


def fit(*words: object) -> int:
    return main(["fit", *map(str, words), *MODEL])


@pytest.mark.parametrize(
    ("sampling", "said"),
    [
        ('{"temperature": 99}', "temperature: Input should be less than or equal to 10"),
        ('{"top": 1}', "top: Extra inputs are not permitted"),
        ("[1]", "Input should be an object"),
        ("{", "Invalid JSON"),
    ],
)
def test_how_answers_are_drawn_is_checked_as_rerank_does(sampling, said, no_model, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        fit("value", "--head", "hybrid", "--prompts", "gone", "--out", tmp_path / "v", "--sampling", sampling)
    assert stopped.value.code == 2
    assert f"argument --sampling: {said}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--limit", "9"], "9 different prompts, and 10 at least are needed"),
        (["--limit", "0"], "--limit 0: at least 1"),
        (["--seed", "-1"], "--seed -1: at least 0"),
        (["--sampling", '{"max_tokens": 8}'], "--at 8: answers have 8 tokens at most"),
        (["--head", "srr"], "--head srr: a srr head gives no answer a reward of its own"),
    ],
)
def test_what_no_value_head_can_be_fitted_with_is_said_before_anything_is_drawn(
    words, said, no_model, tmp_path: Path, capsys
) -> None:
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": f"Question {i}?"} for i in range(12)])
    assert fit("value", "--head", "hybrid", "--prompts", prompts, "--out", tmp_path / "v", *words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("at", ["0", "8,-1", "a"])
def test_decision_points_are_numbers_of_tokens(at, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        fit("value", "--head", "hybrid", "--prompts", "gone", "--out", tmp_path / "v", f"--at={at}")
    assert "numbers of tokens from 1" in capsys.readouterr().err


def lists(*safe: list[bool]) -> list[dict[str, object]]:
    return [
        {"prompt": f"p {i}", "responses": [{"text": f"r {j}", "safe": one} for j, one in enumerate(of)]}
        for i, of in enumerate(safe)
    ]


PAIRS = [{"prompt": f"p {i // 2}", "chosen": "yes", "rejected": "no"} for i in range(4)]


def test_pairs_are_read_in_the_columns_that_are_named_and_few_are_warned_of(
    tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = [{"ask": f"p {i}", "good": f"yes {i}", "bad": "no"} for i in range(4)]
    rows, named = write(tmp_path / "rows.jsonl", asked), "prompt=ask,chosen=good,rejected=bad"
    out = ("--out", tmp_path / "hybrid", "--layers", "1")
    assert fit("hybrid", "--pairs", rows, *out) == 2
    assert capsys.readouterr().err.rstrip().endswith("--columns prompt=question,chosen=answer_a,rejected=answer_b")
    assert fit("hybrid", "--pairs", rows, *out, "--columns", named) == 0
    said = capsys.readouterr()
    assert "warning: 4 prompts are too few to trust: thousands of pairs are usual" in said.err
    assert "the 95 % interval of the head's accuracy is" in said.out.replace("\n", " ")
    assert store.load(tmp_path / "hybrid").manifest.fit["prompts"]["count"] == 4
    assert fit("hybrid", "--pairs", rows, *out, "--layout", "other") == 2
    monkeypatch.setattr("inward.processes.wiring.open_backbone", None)  # would raise: one prompt only
    for kind in (["legend"], ["ensemble", "--heads", "hybrid", "legend"]):
        words = ("--pairs", rows, "--out", tmp_path / "x", "--columns", named, "--limit", 1)
        assert fit(*kind, *words) == 2
        assert "1 different prompts" in capsys.readouterr().err


def test_what_a_guard_is_fitted_on_is_said_where_it_is_not_there(no_model, tmp_path: Path, capsys) -> None:
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
    assert fit("guard", "--head", "hybrid", "--safe", prompts, "--out", tmp_path / "v") == 2
    said = capsys.readouterr().err
    assert "the columns prompt and response" in said and "--layout" not in said


@pytest.mark.parametrize(
    ("kind", "option", "rows", "said"),
    [
        ("guard --head hybrid", "--safe", PAIRS, "needs 100 acceptable responses, not 4"),
        ("ensemble --heads hybrid legend", "--pairs", PAIRS[:2], "1 different prompts, and 2 at least"),
        ("hybrid", "--pairs", PAIRS[:2], "1 different prompts, and 2 at least"),
        ("legend", "--pairs", PAIRS, "2 different prompts, and 3 at least"),
        ("legend --direction whitened", "--pairs", PAIRS[:2], "1 different prompts, and 2 at least"),
        ("srr", "--lists", lists([True, False], [True]), "1 different prompts with a safe and an unsafe response"),
    ],
)
def test_too_few_rows_are_told_before_they_are_read(kind, option, rows, said, no_model, tmp_path: Path, capsys) -> None:
    assert fit(*kind.split(), option, write(tmp_path / "rows.jsonl", rows), "--out", tmp_path / "head") == 2
    assert said in capsys.readouterr().err
