"""``inward annotate`` from end to end: the bundled heads on the fake backbone, and a real server with a real model."""

import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from pyarrow import parquet

from inward import logs
from inward.__main__ import main
from inward.offline.annotate import work
from inward.offline.annotate.decisions import key_of
from inward.offline.annotate.scorer import COLUMNS
from inward_client.rows import Pair
from support import real_data as real
from support.serving import serve, write_model

FAKE = ("--model", "toy", "--backbone", "fake")


@pytest.fixture(autouse=True)
def _state(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    loggers = [logging.getLogger(name) for name in (None, "inward", "uvicorn", *logs.QUIET)]
    before = [(logger.handlers[:], logger.level) for logger in loggers]
    yield
    for logger, (handlers, level) in zip(loggers, before, strict=True):
        logger.handlers[:] = handlers
        logger.setLevel(level)


def row(n):
    return {"prompt": f"question {n}", "chosen": f"an answer {n} " * (n % 7 + 1), "rejected": f"another {n}", "id": n}


def write(path, rows):
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def annotate(*args):
    return main(["annotate", *map(str, args)])


def test_rows_come_back_with_columns_and_bad_ones_go_aside(tmp_path, capsys):
    rows = [row(n) for n in range(600)]
    rows[3] = {"prompt": "no answers"}
    rows[500] = {**row(500), "chosen": "word " * 5000}
    out = tmp_path / "out.jsonl"
    assert (
        annotate(write(tmp_path / "in.jsonl", rows), out, *FAKE, "--suspicious", 2, "--html", tmp_path / "look.html")
        == 0
    )
    got = read(out)
    assert [one["id"] for one in got] == [n for n in range(600) if n not in (3, 500)]
    assert all(
        set(COLUMNS) < set(one) and isinstance(one["margin"], float) and 0 <= one["confidence"] <= 1 for one in got
    )
    assert all(one["margin"] == pytest.approx(one["chosen_score"] - one["rejected_score"], abs=1e-4) for one in got)
    left_out = read(tmp_path / "out.jsonl.rejected.jsonl")
    assert [one["row"] for one in left_out] == [4, 501]
    assert "'chosen' is missing" in left_out[0]["reason"] and "token" in left_out[1]["reason"]
    about = json.loads((tmp_path / "out.jsonl.annotation.json").read_text())
    assert about["head"]["kind"] == "legend" and about["confidence_head"]["kind"] == "hybrid" and about["template"]
    assert about["summary"]["annotated"] == 598
    said = capsys.readouterr()
    assert "598 of 600 pairs annotated" in said.out and said.out.count("── in, row") == 2
    assert "annotate" in said.err  # the progress bar
    flipped = about["summary"]["flipped"]
    assert (tmp_path / "look.html").read_text().count('"place"') == min(200, flipped)
    assert not (tmp_path / "out.jsonl.progress").exists()


def test_text_that_is_too_long_is_cut_on_request(tmp_path, capsys):
    rows = [{**row(0), "chosen": "word " * 5000}]
    assert annotate(write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", *FAKE, "--truncate", "--json") == 0
    assert json.loads(capsys.readouterr().out)["truncated"] == 1


def test_an_interrupted_job_goes_on_where_it_was_and_gives_the_same_bytes(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "in.jsonl", [row(n) for n in range(1100)])
    assert annotate(path, tmp_path / "whole.jsonl", *FAKE) == 0

    keep, kept = work.Progress.keep, []

    def keep_two(self, chunk, done):
        if len(kept) == 2:
            raise KeyboardInterrupt
        kept.append(chunk.number)
        keep(self, chunk, done)

    with monkeypatch.context() as patched:
        patched.setattr(work.Progress, "keep", keep_two)
        assert annotate(path, tmp_path / "out.jsonl", *FAKE) == 130
    assert not (tmp_path / "out.jsonl").exists()
    assert "stopped: 512 rows kept; the same command goes on" in capsys.readouterr().err
    again = []
    monkeypatch.setattr(
        work.Progress, "keep", lambda self, chunk, done: (again.append(chunk.number), keep(self, chunk, done))
    )
    assert annotate(path, tmp_path / "out.jsonl", *FAKE) == 0
    assert sorted(kept + again) == [0, 1, 2, 3, 4]
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_kill_9_in_the_middle_loses_and_doubles_nothing(tmp_path):
    path = write(tmp_path / "in.jsonl", [row(n) for n in range(256 * 6)])
    assert annotate(path, tmp_path / "whole.jsonl", *FAKE) == 0
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "inward", "annotate", str(path), str(out), *FAKE]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    done = tmp_path / "out.jsonl.progress/done.jsonl"
    while process.poll() is None and not (done.exists() and done.stat().st_size):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not out.exists():  # on a machine that stalled just now it may have ended before the signal
        assert annotate(path, out, *FAKE) == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not (tmp_path / "out.jsonl.progress").exists()


def test_another_head_or_input_is_not_mixed_with_what_is_done(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "in.jsonl", [row(n) for n in range(600)])

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("inward.offline.annotate.run.Annotation._finish", stop)
        assert annotate(path, tmp_path / "out.jsonl", *FAKE) == 130
    assert annotate(path, tmp_path / "out.jsonl", *FAKE, "--head", "hybrid") == 2
    assert "--restart" in capsys.readouterr().err
    assert annotate(path, tmp_path / "out.jsonl", *FAKE, "--head", "hybrid", "--restart") == 0


def test_what_can_not_be_done_is_one_line_that_says_what_to_do(tmp_path, capsys):
    path = write(tmp_path / "in.jsonl", [{**row(0), "margin": 1}])
    for options, said in (
        ((path, tmp_path / "out.jsonl"), "--replace-columns"),
        ((path, tmp_path / "out.xlsx", "--replace-columns"), "must end with one of"),
        ((path, tmp_path / "out.jsonl", "--columns", "prompt"), "OURS=THEIRS"),
        ((path, tmp_path / "out.jsonl", "--layout", "other"), "sharegpt"),
        ((path, tmp_path / "out.jsonl", "--columns", "chosen="), "Name one with --layout, or say which columns"),
        ((tmp_path / "gone.jsonl", tmp_path / "out.jsonl"), "does not exist"),
        ((path, tmp_path / "out.jsonl", "--replace-columns", "--url", "http://127.0.0.1:1"), "did not answer"),
        ((path, tmp_path / "out.jsonl", "--replace-columns", *FAKE, "--head", "nobody"), "nobody"),
    ):
        assert annotate(*options) == 2
        error = capsys.readouterr().err
        assert said in error and "Traceback" not in error
    assert annotate(path, tmp_path / "out.jsonl", "--replace-columns", *FAKE) == 0
    assert annotate(path, tmp_path / "out.jsonl", "--replace-columns", *FAKE) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_folder_gives_a_parquet_file_for_each_table(tmp_path):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in/train.jsonl", [row(n) for n in range(30)])
    write(tmp_path / "in/test.jsonl", [row(n) for n in range(30, 40)])
    assert annotate(tmp_path / "in", tmp_path / "out", *FAKE, "--limit", 20) == 0
    assert parquet.read_table(tmp_path / "out/train.parquet").column("id").to_pylist() == list(range(20))
    assert parquet.read_table(tmp_path / "out/test.parquet").column("id").to_pylist() == list(range(30, 40))
    assert (
        json.loads(parquet.read_schema(tmp_path / "out/test.parquet").metadata[b"inward"])["head"]["name"] == "legend"
    )


def test_a_running_service_gives_the_same_numbers(tmp_path, monkeypatch):
    model = write_model(tmp_path)
    path = write(tmp_path / "in.jsonl", [row(n) for n in range(300)])

    def on_page(name):
        return ("--html", tmp_path / f"{name}.html", "--page-of", "sample", "--page-rows", 40, "--token-scores")

    here = ("--model", str(model), "--heads", str(tmp_path / "heads"), "--dtype", "float32")
    assert annotate(path, tmp_path / "here.jsonl", *here, *on_page("here")) == 0
    with serve(tmp_path, "--dtype", "float32", env={"INWARD_API_KEYS": "secret"}) as served:
        assert annotate(path, tmp_path / "there.jsonl", "--url", served.url) == 2
        monkeypatch.setenv("INWARD_API_KEY", "secret")
        assert annotate(path, tmp_path / "there.jsonl", "--url", served.url, *on_page("there")) == 0
    pages = [(tmp_path / f"{name}.html").read_text() for name in ("here", "there")]
    ours, theirs = (
        {one["key"]: one for one in json.loads(page.split('id="data">')[1].split("</script>")[0])["rows"]}
        for page in pages
    )
    assert len(ours) == len(theirs) == 40
    for key, one in ours.items():
        for side in ("chosen", "rejected"):
            _, scores = zip(*one[f"{side}_tokens"], strict=True)
            assert "".join(text for text, _ in theirs[key][f"{side}_tokens"]) == one[side]
            assert [score for _, score in theirs[key][f"{side}_tokens"]] == pytest.approx(scores, abs=1e-3)
    ours, theirs = read(tmp_path / "here.jsonl"), read(tmp_path / "there.jsonl")
    assert [one["id"] for one in ours] == [one["id"] for one in theirs] == list(range(300))
    assert [one["margin"] for one in theirs] == pytest.approx([one["margin"] for one in ours], abs=1e-4)


def test_real_pairs_of_both_published_kinds(tmp_path, capsys):
    for name, layout in (("hh_harmless_pairs.jsonl", "hh"), ("pku_saferlhf_pairs.jsonl", "trl")):
        rows = real.rows(name, 40)
        out = tmp_path / f"{layout}.parquet"
        assert annotate(write(tmp_path / name, rows), out, "--model", "toy") == 0
        assert parquet.read_table(out).num_rows == 40
        assert json.loads(parquet.read_schema(out).metadata[b"inward"])["layout"] == layout


WHOLE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "And now?"},
]
YES, NO = {"role": "assistant", "content": "Yes."}, {"role": "assistant", "content": "No."}


def test_the_same_conversation_has_the_same_margin_in_every_layout(tmp_path):
    rows = [
        {"chosen": [*WHOLE, YES], "rejected": [*WHOLE, NO]},
        {"prompt": "Hi", "chosen": [*WHOLE, YES], "rejected": [*WHOLE, NO]},
        {"prompt": WHOLE[:2], "chosen": [*WHOLE[2:], YES], "rejected": [*WHOLE[2:], NO]},
        {"system": "Be brief.", "prompt": WHOLE[1:], "chosen": "Yes.", "rejected": "No."},
        {"system": "Be brief.", "instruction": "And now?", "history": [["Hi", "Hello."]], "chosen": "Yes.",
         "rejected": "No."},
    ]  # fmt: skip
    margins = set()
    for n, one in enumerate(rows):
        out = tmp_path / f"{n}.jsonl"
        assert annotate(write(tmp_path / f"in{n}.jsonl", [one]), out, *FAKE) == 0
        margins.add(read(out)[0]["margin"])
    assert len(margins) == 1


def test_ties_nan_and_hidden_characters(tmp_path, capsys):
    path = tmp_path / "in.jsonl"
    path.write_text(
        '{"prompt": "a", "chosen": "b", "rejected": "b", "x": NaN}\n{"prompt": "\u202ea", "chosen": "\\u001b[31m", '
        '"rejected": "c"}\n{"prompt": "\u202ea", "chosen": "c", "rejected": "\\u001b[31m"}\n'
    )
    assert annotate(path, tmp_path / "out.jsonl", *FAKE, "--suspicious") == 0
    tie = read(tmp_path / "out.jsonl")[0]
    assert (tie["margin"], tie["label_agrees"], tie["x"]) == (0.0, None, None)
    said = capsys.readouterr().out
    assert "1 pairs are ties" in said
    assert "\\u202ea" in said
    assert "\\x1b[31m" in said
    assert not {"\x1b", "\u202e"} & set(said)


def test_only_what_is_asked_for_is_written_and_the_summary_is_of_all(tmp_path, capsys):
    path = write(tmp_path / "in.jsonl", [row(n) for n in range(60)])
    assert annotate(path, tmp_path / "all.parquet", *FAKE, "--head", "hybrid") == 0
    every = parquet.read_table(tmp_path / "all.parquet").to_pylist()
    for option, wanted in (
        (("--only-flipped",), [one["id"] for one in every if one["label_agrees"] is False]),
        (("--drop-below", 0.5), [one["id"] for one in every if one["label_probability"] >= 0.5]),
    ):
        assert 0 < len(wanted) < 60
        for ending in ("parquet", "jsonl"):
            out = tmp_path / f"some.{ending}"
            assert annotate(path, out, *FAKE, "--head", "hybrid", "--restart", *option) == 0
            got = parquet.read_table(out).to_pylist() if ending == "parquet" else read(out)
            assert [one["id"] for one in got] == wanted
        assert "60 of 60 pairs annotated" in capsys.readouterr().out
    assert not (tmp_path / "some.jsonl.rejected.jsonl").exists()
    assert annotate(path, out, *FAKE, "--drop-below", 2) == 2


def test_standard_input_is_annotated_and_records_for_argilla_come_out(tmp_path, monkeypatch):
    content = "".join(json.dumps(row(n)) + "\n" for n in range(9)).encode()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    assert annotate("-", tmp_path / "out.jsonl", *FAKE, "--argilla", tmp_path / "records.json") == 0
    assert [one["id"] for one in read(tmp_path / "out.jsonl")] == list(range(9))
    records = json.loads((tmp_path / "records.json").read_text())
    assert [one["metadata"]["row"] for one in records] == list(range(1, 10))
    assert not list(tmp_path.glob("*.stdin*"))


def test_clusters_of_the_states_are_told_and_kept(tmp_path, capsys):
    path = write(tmp_path / "in.jsonl", [row(n) for n in range(40)])
    assert annotate(path, tmp_path / "out.jsonl", *FAKE, "--clusters", 2) == 0
    about = json.loads((tmp_path / "out.jsonl.annotation.json").read_text())["summary"]
    assert sum(one["pairs"] for one in about["clusters"]) == 40 - about["ties"]
    assert "clusters" in capsys.readouterr().out
    assert annotate(path, tmp_path / "no.jsonl", "--clusters", "--url", "http://127.0.0.1:1") == 2


def decide(path, *decided):
    lines = [f"in,1,{key_of(Pair(one['prompt'], one['chosen'], one['rejected']))},{said}" for one, said in decided]
    path.write_text("\n".join(["source,row,key,decision", *lines]) + "\n")
    return path


@pytest.mark.parametrize("ending", ["jsonl", "csv", "jsonl.gz", "parquet"])
def test_decisions_are_applied_to_any_format_without_a_model(tmp_path, ending):
    path = write(tmp_path / "in.jsonl", [row(n) for n in range(5)])
    decisions = decide(tmp_path / "decisions.csv", (row(1), "flip"), (row(2), "drop"), (row(3), "right"))
    out, again = tmp_path / f"out.{ending}", tmp_path / "again.parquet"
    assert annotate(path, out, "--apply", decisions) == 0
    assert annotate(out, again, "--apply", decide(tmp_path / "none.csv")) == 0  # reads it back
    got = parquet.read_table(again).to_pylist()
    assert [int(one["id"]) for one in got] == [0, 1, 3, 4]
    assert (got[1]["chosen"], got[1]["rejected"]) == (row(1)["rejected"], row(1)["chosen"])


def test_decisions_of_other_pairs_are_refused_and_nothing_is_written(tmp_path, capsys):
    path = write(tmp_path / "in.jsonl", [row(n) for n in range(5)])
    decisions = decide(tmp_path / "decisions.csv", (row(1), "flip"), (row(77), "drop"))
    assert annotate(path, tmp_path / "out.jsonl", "--apply", decisions) == 2
    assert "1 of 2 decisions are of pairs" in capsys.readouterr().err
    assert sorted(one.name for one in tmp_path.iterdir() if one.is_file()) == ["decisions.csv", "in.jsonl"]
    assert annotate(path, path, "--apply", decisions, "--restart") == 2
    assert annotate(path, decisions, "--apply", decisions, "--restart") == 2
    assert "an input is never written to" in capsys.readouterr().err


def test_an_input_is_not_replaced_by_its_own_annotation(tmp_path, capsys):
    path = write(tmp_path / "same.jsonl", [row(n) for n in range(30)])
    before = path.read_bytes()
    assert annotate(path, path, *FAKE, "--limit", 3, "--restart") == 2
    assert "an input is never written to" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_ray_gives_the_same_bytes(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'inward[ray]'")
    path = write(tmp_path / "in.jsonl", [row(n) for n in range(600)])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    for engine, out in (("local", "a.jsonl"), ("ray", "b.jsonl")):
        command = [
            sys.executable,
            "-m",
            "inward",
            "annotate",
            str(path),
            str(tmp_path / out),
            *FAKE,
            "--engine",
            engine,
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
