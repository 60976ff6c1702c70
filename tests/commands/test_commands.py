"""The command line, end to end on a tiny random model."""

import json
import re
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pytest

from inward.__main__ import main
from inward.errors import HeadError
from inward.heads import store
from inward.offline.bench import measure as bench
from inward.offline.bench import ways
from support.serving import write_model

WORDS = ("harbour quiet morning boats lock canal step help safer seven birds wire crows "
         "starlings tallest tree coast redwood").split()  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    write_model(folder)
    rng = np.random.default_rng(0)

    def text(n):
        return " ".join(rng.choice(WORDS, n))

    rows = [{"prompt": text(5), "chosen": "no " + text(4), "rejected": "yes " + text(4)} for _ in range(40)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    calibration = [{"prompt": r["prompt"], "harmful": r["rejected"], "refusal": "I would rather not."} for r in rows]
    (folder / "calibration.jsonl").write_text("".join(json.dumps(row) + "\n" for row in calibration))
    lists = [
        {
            "prompt": text(5),
            "responses": [{"text": ("no " if safe else "yes ") + text(3), "safe": bool(safe)} for safe in (1, 0, 1, 0)],
        }
        for _ in range(24)
    ]
    (folder / "lists.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lists))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def inward(*arguments):
    return main([str(a) for a in arguments])


@pytest.mark.parametrize("rows", ["pairs", "calibration"])
def test_fit_legend_makes_a_head_that_the_server_would_load(folder, tmp_path, capsys, rows):
    out = tmp_path / "heads" / "safety"
    assert (
        inward(
            "fit",
            "legend",
            "--model",
            folder / "model",
            "--pairs",
            folder / f"{rows}.jsonl",
            "--layer",
            "sweep",
            "--out",
            out,
        )
        == 0
    )
    printed = capsys.readouterr().out
    for finding in ("agreement, held out", "Spearman", "bootstrap"):
        assert finding in printed
    assert ("same sentence" in printed) == (rows == "calibration")
    assert inward("heads", "verify", "--model", folder / "model", "--heads", tmp_path / "heads") == 0


def test_fit_from_saved_states_gives_the_same_head_as_from_text(folder, tmp_path):
    model = ["--model", folder / "model"]
    states = tmp_path / "states.safetensors"
    inward(
        "fit",
        "legend",
        *model,
        "--pairs",
        folder / "pairs.jsonl",
        "--layer",
        2,
        "--layers",
        "1,2",
        "--save-states",
        states,
        "--out",
        tmp_path / "a",
    )
    inward("fit", "legend", "--states", states, "--layer", 2, "--out", tmp_path / "b")
    first, second = (store.load(tmp_path / name) for name in "ab")
    assert np.array_equal(first.tensors()["direction"], second.tensors()["direction"])
    assert first.manifest.backbone == second.manifest.backbone


@pytest.mark.parametrize(("kind", "rows"), [("hybrid", "--pairs"), ("srr", "--lists")])
def test_fit_hybrid_and_srr(folder, tmp_path, kind, rows):
    file = folder / ("lists.jsonl" if kind == "srr" else "pairs.jsonl")
    out = tmp_path / kind
    assert inward("fit", kind, "--model", folder / "model", rows, file, "--out", out) == 0
    assert store.load(out).ref.kind == kind


def test_a_head_that_is_there_already_is_not_overwritten_unasked(folder, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    assert (
        inward(
            "fit", "legend", "--model", folder / "model", "--pairs", folder / "pairs.jsonl", "--out", tmp_path / "taken"
        )
        == 2
    )
    assert "--replace" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "more", "said"),
    [
        ("my head", (), "'my head' can't be a head's name"),
        ("head", ("--name", "my head"), "'my head' can't be a head's name"),
        ("pairs.jsonl", ("--replace",), "holds no head"),
        ("head", ("--save-states", "."), "is a folder"),
        ("head", ("--save-states", "pairs.jsonl"), "is there already and is no file of states"),
        ("head", ("--save-states", "s", "--covariance", "s"), "an input is never written to"),
    ],
)
def test_where_nothing_can_be_written_is_said_before_the_model_is_loaded(
    folder, tmp_path, capsys, monkeypatch, out, more, said
):
    monkeypatch.setattr("inward.processes.wiring.open_backbone", None)  # would raise
    monkeypatch.chdir(tmp_path)
    before = (folder / "pairs.jsonl").read_bytes()
    (tmp_path / "pairs.jsonl").write_bytes(before)
    assert inward("fit", "legend", "--model", folder / "model", "--pairs", "pairs.jsonl", "--out", out, *more) == 2
    assert said in capsys.readouterr().err
    assert (tmp_path / "pairs.jsonl").read_bytes() == before


def test_a_head_that_can_not_be_saved_in_the_end_is_reported_and_kept_elsewhere(folder, tmp_path, capsys, monkeypatch):
    save = store.save

    def full(head, path, **options):
        if path == tmp_path / "head":
            raise HeadError("no space left")
        return save(head, path, **options)

    monkeypatch.setattr(store, "save", full)
    rows = ("--model", folder / "model", "--pairs", folder / "pairs.jsonl")
    assert inward("fit", "legend", *rows, "--out", tmp_path / "head") == 2
    said = capsys.readouterr()
    assert "agreement, held out" in said.out
    kept = re.search("no space left; the head is in (.*) instead: move it", said.err)
    assert kept and store.load(kept[1]).ref.name == "head"


def test_bad_rows_are_named_by_file_line_and_field(folder, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": 3, "rejected": "c"}\n')
    assert inward("fit", "legend", "--model", folder / "model", "--pairs", bad, "--out", tmp_path / "x") == 2
    said = capsys.readouterr().err
    assert "1 of 2 rows are left out: 1 × 'chosen' must be text" in said
    assert "bad.jsonl, line 2" in said
    assert "Traceback" not in said


def test_heads_are_listed_with_kind_version_and_path(folder, capsys):
    assert inward("heads", "list", "--json", "--model", folder / "model", "--heads", folder / "heads") == 0
    [head] = json.loads(capsys.readouterr().out)
    assert head == {"name": "bench-0", "kind": "legend", "version": 1, "path": str(folder / "heads" / "bench-0")}
    options = ("--model", folder / "model", "--heads", folder / "heads")
    assert inward("heads", "show", "bench-0", "--json", *options) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "legend"
    assert inward("heads", "show", "bench-0", *options) == 0
    assert capsys.readouterr().out.startswith("# bench-0\n\nA head of kind `legend`")
    assert inward("heads", "list", *options) == 0
    said = capsys.readouterr().out
    assert "base model" in said and "fitted" in said


def test_a_folder_of_heads_that_is_not_there_is_refused_before_the_model_is_loaded(
    folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("inward.processes.wiring.open_backbone", None)  # would raise
    assert inward("serve", "--model", folder / "model", "--heads", tmp_path / "none", "--port", 0) == 2
    assert f"there is no folder of heads at {tmp_path / 'none'}" in capsys.readouterr().err


def test_verify_says_which_heads_would_be_refused_and_why(folder, tmp_path, capsys):
    import shutil

    shutil.copytree(folder / "heads", tmp_path / "heads")
    (tmp_path / "heads" / "bench-0" / "head.safetensors").write_bytes(b"cut off")
    assert inward("heads", "verify", "--json", "--model", folder / "model", "--heads", tmp_path / "heads") == 1
    [row] = json.loads(capsys.readouterr().out)
    assert not row["ok"]
    assert "head.safetensors" in row["problem"]


def test_info_prints_where_the_model_and_the_heads_are(folder, capsys):
    assert inward("info", "--json", "--model", folder / "model", "--heads", folder / "heads", "--max-items", 7) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["backbone"]["path"] == str(folder / "model")
    assert info["heads"] == str(folder / "heads")
    assert info["limits"]["max_items"] == 7


def test_bench_measures_every_way_in_one_run(folder, capsys, monkeypatch):
    """The first way in a process of its own, as all are; the others here, where torch is there already."""
    apart = bench._in_own_process

    def here(arguments):
        if arguments[0] == "published":
            return apart(arguments)
        with redirect_stdout(StringIO()) as printed:
            ways.main(arguments)
        return json.loads(printed.getvalue())

    monkeypatch.setattr(bench, "_in_own_process", here)
    assert inward("bench", "--model", folder / "model", "--n", 6, "--callers", 3, "--heads", 1, 4, "--json") == 0
    results = json.loads(capsys.readouterr().out)
    assert [row["way"] for row in results["ways"]] == ["published", "padded", "ours", "ours", "http"]
    assert all(row["tokens_per_second"] > 0 and row["peak_bytes"] > 2**20 for row in results["ways"])
    assert 0 < results["prompt_tokens_saved"] < 1


def test_bench_takes_the_median_of_rounds(folder, capsys, monkeypatch):
    """In each round every way has its turn."""
    turns = iter([300.0, 900.0, 500.0, 700.0, 400.0, 800.0])
    asked = []

    def run(arguments):
        asked.append(arguments[0])
        rate = next(turns)
        tokens = {"text_tokens": 900, "needed_tokens": 600, "peak_bytes": 2**21, "heads": 1}
        return {"way": arguments[0], "seconds": 900 / rate, "tokens_per_second": rate, **tokens}

    monkeypatch.setattr(bench, "_in_own_process", run)
    assert inward("bench", "--model", folder / "model", "--n", 2, "--ways", "published,ours", "--rounds", 3) == 0
    assert asked == ["published", "ours"] * 3
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("(")]
    assert re.split(r"\s{2,}", rows[0])[1:4] == ["400", "300 to 500", "1.00"]
    assert re.split(r"\s{2,}", rows[1])[1:4] == ["800", "700 to 900", "2.00"]


def test_a_whitened_direction_is_fitted_in_one_pass_or_from_states_alike(folder, tmp_path, capsys):
    """Without --save-states only sums are kept; the head is the same, but for float16."""
    rows = ["--model", folder / "model", "--pairs", folder / "pairs.jsonl", "--direction", "whitened"]
    assert inward("fit", "legend", *rows, "--out", tmp_path / "a") == 0
    assert "cosine with the mean difference" in capsys.readouterr().out
    states = tmp_path / "states.safetensors"
    assert inward("fit", "legend", *rows, "--save-states", states, "--out", tmp_path / "b") == 0
    assert inward("fit", "legend", "--direction", "whitened", "--states", states, "--out", tmp_path / "c") == 0
    a, b, c = (store.load(tmp_path / name).tensors()["direction"] for name in "abc")
    np.testing.assert_array_equal(b, c)
    np.testing.assert_allclose(a, b, atol=0.02 * np.abs(b).max())
    assert inward("heads", "verify", "--model", folder / "model", "--heads", tmp_path / "a") == 0


def test_a_covariance_of_other_responses_is_named_in_the_manifest(folder, tmp_path, capsys):
    responses = tmp_path / "responses.jsonl"
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    responses.write_text("".join(json.dumps({"prompt": p["prompt"], "response": p["chosen"]}) + "\n" for p in pairs))
    rows = ["--model", folder / "model", "--pairs", folder / "calibration.jsonl", "--direction", "whitened"]
    assert inward("fit", "legend", *rows, "--layer", 2, "--out", tmp_path / "plain") == 0
    assert "--covariance" in capsys.readouterr().out, "constant refusals hardly vary: S should come from elsewhere"
    assert inward("fit", "legend", *rows, "--layer", 2, "--covariance", responses, "--out", tmp_path / "other") == 0
    assert store.load(tmp_path / "other").manifest.options["covariance"] == "responses.jsonl"
    assert inward("fit", "legend", "--pairs", responses, "--covariance", responses, "--out", tmp_path / "x") == 2
    assert "whitened" in capsys.readouterr().err


def test_fitted_heads_become_an_ensemble_by_texts_or_by_states(folder, tmp_path, capsys):
    model = ["--model", folder / "model"]
    states = tmp_path / "states.safetensors"
    rows = ["--pairs", folder / "pairs.jsonl", "--position", "eos"]
    assert inward("fit", "hybrid", *model, *rows, "--save-states", states, "--out", tmp_path / "heads" / "gated") == 0
    whitened = ["--direction", "whitened", "--layer", 2, "--out", tmp_path / "heads" / "white"]
    assert inward("fit", "legend", "--states", states, *whitened) == 0
    parts = ["--heads", tmp_path / "heads" / "gated", tmp_path / "heads" / "white"]
    capsys.readouterr()
    assert inward("fit", "ensemble", *parts, "--states", states, "--out", tmp_path / "heads" / "both") == 0
    assert "flatters" in capsys.readouterr().out
    texts = ["--pairs", folder / "pairs.jsonl", "--out", tmp_path / "other"]
    assert inward("fit", "ensemble", *model, *parts, *texts) == 0
    a, b = (store.load(path).manifest.options["parts"] for path in (tmp_path / "heads" / "both", tmp_path / "other"))
    assert [p["weight"] for p in a] == pytest.approx([p["weight"] for p in b], abs=0.05)
    assert inward("heads", "verify", *model, "--heads", tmp_path / "heads") == 0


def test_a_pool_is_fitted_from_texts_and_named_in_the_manifest(folder, tmp_path, capsys):
    rows = ["--model", folder / "model", "--pairs", folder / "pairs.jsonl", "--direction", "whitened"]
    assert inward("fit", "legend", *rows, "--pool", "max_rolling:window=2", "--out", tmp_path / "heads" / "a") == 0
    assert "pool max_rolling" in capsys.readouterr().out
    manifest = store.load_manifest(tmp_path / "heads" / "a")
    assert (manifest.pool.name, manifest.pool.window, manifest.position) == ("max_rolling", 2, "mean")
    assert inward("heads", "verify", "--model", folder / "model", "--heads", tmp_path / "heads") == 0
    assert inward("fit", "legend", *rows, "--pool", "maximum", "--out", tmp_path / "x") == 2
    assert "--pool maximum" in capsys.readouterr().err


def test_verify_says_how_well_heads_still_fit_recent_pairs(folder, tmp_path, capsys):
    model = ["--model", folder / "model"]
    out = ["--direction", "whitened", "--layer", 2, "--out", tmp_path / "heads" / "white"]
    assert inward("fit", "legend", *model, "--pairs", folder / "pairs.jsonl", *out) == 0
    capsys.readouterr()
    recent = ["--heads", tmp_path / "heads", "--pairs", folder / "pairs.jsonl", "--json"]
    assert inward("heads", "verify", *model, *recent) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert row["ok"] and row["drift"]["cosine"] > 0.9 and row["drift"]["pairs"] == 40
