"""The whole command over a scorer that counts."""

import csv
import json
from contextlib import asynccontextmanager

import numpy as np
import pytest

from inward.errors import SetupError
from inward.offline.annotate.decisions import key_of
from inward.offline.annotate.options import AnnotateOptions
from inward.offline.annotate.run import annotate
from inward.offline.annotate.scorer import COLUMNS, Annotated, Annotator
from inward_client.rows import Pair

HEAD = {"name": "h", "kind": "legend", "version": 1}
BY = {"head": HEAD, "policy_version": "base", "confidence_head": None}


class CountingScorer:
    """A margin is the difference of the answers' words; a further pass, for clusters or tokens, may be stopped, and the
    pairs of some prompts have no probability.
    """

    tokens = None

    def __init__(self):
        self.scored, self.opened, self.stopped = 0, 0, False
        self.unrated = set()

    @asynccontextmanager
    async def open(self):
        self.opened += 1
        yield self

    async def annotator(self):
        return Annotator("m", "r", "f", "float32", "base", "t", HEAD, None, "1")

    async def annotate(self, pairs):
        self.scored += len(pairs)
        return [Annotated(self.columns(pair)) for pair in pairs], BY

    def columns(self, pair):
        margin = float(len(pair.chosen.split()) - len(pair.rejected.split()))
        scores = {"chosen_score": margin, "rejected_score": 0.0}
        known = {"margin": margin, "margin_scaled": margin, "margin_bin": 0.5, "label_agrees": margin > 0}
        known |= {"label_probability": None if pair.prompt in self.unrated else 0.25 if margin < 0 else 0.75}
        return dict.fromkeys(COLUMNS) | scores | known

    async def token_scores(self, pairs):
        if self.stopped:
            raise KeyboardInterrupt
        return [None] * len(pairs)

    async def states(self, pairs):
        if self.stopped:
            raise KeyboardInterrupt
        return np.random.default_rng(0).normal(size=(len(pairs), 8)).astype(np.float32)


@pytest.fixture
def scorer():
    return CountingScorer()


@pytest.fixture
def path(tmp_path):
    rows = [{"prompt": f"p{n}", "chosen": "two words" if n % 3 else "one", "rejected": "c d"} for n in range(30)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "in.jsonl"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("asked", ["clusters", "token_scores"])
def test_a_job_that_is_stopped_after_its_last_pair_goes_on_without_scoring_any_again(
    tmp_path, path, scorer, asked, capsys
):
    further = {"clusters": {"clusters": 2}, "token_scores": {"html": tmp_path / "x.html", "token_scores": True}}[asked]
    options = AnnotateOptions(path, tmp_path / "out.jsonl", **further)
    scorer.stopped = True
    assert annotate(options, scorer.open) == 130
    assert "30 rows kept; the same command goes on" in capsys.readouterr().err
    assert names(tmp_path) == ["in.jsonl", "out.jsonl.progress"]
    scorer.stopped, scorer.scored = False, 0
    assert annotate(options, scorer.open) == 0
    assert scorer.scored == 0 and len((tmp_path / "out.jsonl").read_text().splitlines()) == 30
    assert "out.jsonl.progress" not in names(tmp_path)


@pytest.mark.parametrize("option", ["html", "argilla"])
@pytest.mark.parametrize(("name", "said"), [("nodir/x", "nodir is not a folder"), ("folder", "folder is a folder")])
def test_a_place_that_can_not_be_written_to_is_refused_before_anything_is_scored(
    tmp_path, path, scorer, option, name, said
):
    (tmp_path / "folder").mkdir()
    with pytest.raises(SetupError, match=said):
        annotate(AnnotateOptions(path, tmp_path / "out.jsonl", **{option: tmp_path / name}), scorer.open)
    assert not scorer.opened and names(tmp_path) == ["folder", "in.jsonl"]


def test_rows_that_have_no_probability_to_be_dropped_by_are_told_of(tmp_path, path, scorer, capsys):
    scorer.unrated = {"p0", "p1", "p3"}
    assert annotate(AnnotateOptions(path, tmp_path / "out.jsonl", drop_below=0.5), scorer.open) == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 22  # of ten that are improbable two are not known
    assert "3 of 30 rows have no label_probability: --drop-below drops none of them" in capsys.readouterr().err
    scorer.unrated = set()
    assert annotate(AnnotateOptions(path, tmp_path / "all.jsonl", drop_below=0.5), scorer.open) == 0
    assert "label_probability" not in capsys.readouterr().err


def test_a_label_is_turned_in_an_annotated_csv_file(tmp_path, path, scorer):
    annotated, decisions, out = (tmp_path / name for name in ("annotated.csv", "decisions.csv", "out.csv"))
    assert annotate(AnnotateOptions(path, annotated), scorer.open) == 0
    decisions.write_text(f"key,decision\n{key_of(Pair('p0', 'one', 'c d'))},flip\n")
    assert annotate(AnnotateOptions(annotated, out, apply=decisions), scorer.open) == 0
    with annotated.open(newline="") as before, out.open(newline="") as after:
        given, got = list(csv.DictReader(before)), list(csv.DictReader(after))
    changed = {name: got[0][name] for name in given[0] if got[0][name] != given[0][name]}
    assert changed == {
        "chosen": "c d", "rejected": "one", "margin": "1.0", "margin_scaled": "1.0", "margin_bin": "",
        "label_probability": "0.75", "chosen_score": "0.0", "rejected_score": "-1.0", "label_agrees": "True",
    }  # fmt: skip
    assert got[1:] == given[1:]


def test_a_csv_file_of_which_every_row_is_dropped_keeps_its_heading(tmp_path, scorer):
    given, decisions, out = (tmp_path / name for name in ("in.csv", "decisions.csv", "out.csv"))
    given.write_text("prompt,chosen,rejected,id\nq,a,b,1\n")
    decisions.write_text(f"key,decision\n{key_of(Pair('q', 'a', 'b'))},drop\n")
    assert annotate(AnnotateOptions(given, out, apply=decisions), scorer.open) == 0
    assert out.read_text().split() == ["prompt,chosen,rejected,id"]
