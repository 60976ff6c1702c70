"""Responses token by token on the page of a report."""

import numpy as np

from inward.backbones.fake import FakeBackbone
from inward.heads.base import BackboneRef, Manifest
from inward.heads.legend import LegendHead
from inward.offline.data.pairs import Response, ResponseList
from inward.offline.evaluate.heatmap import TokenScores, read_examples, section
from inward.prompts import Prompts
from support.tiny_tokenizer import tokenizer

LAYERS, WIDTH = 2, 8
PROMPTS = Prompts(tokenizer(), max_tokens=512)


def head():
    manifest = Manifest(
        name="safety", kind="legend", version=1, created="2025-01-01T00:00:00Z", template=PROMPTS.template,
        layers=(2,), backbone=BackboneRef(name="fake", fingerprint=FakeBackbone(LAYERS, WIDTH).info.fingerprint),
    )  # fmt: skip
    return LegendHead.from_tensors(manifest, {"direction": np.eye(WIDTH, dtype=np.float32)[0]})


async def test_ten_responses_of_both_kinds_are_read_at_every_token():
    lists = [
        ResponseList(f"question {i}", (Response(f"a good answer {i}", True), Response(f"a bad one {i}", False)))
        for i in range(20)
    ]
    found = await read_examples(FakeBackbone(LAYERS, WIDTH), PROMPTS, lists, head())
    assert [one.safe for one in found] == [True, False] * 5
    assert "".join(found[0].pieces) == "a good answer 0"
    assert all(len(one.pieces) == len(one.scores_T) for one in found)
    assert found[0].scores_T[-1] == found[0].score  # the head reads the last token


def test_low_scores_are_one_colour_high_ones_another_and_texts_are_escaped():
    html = section([TokenScores(True, 0.5, ("fine", "<b>"), np.array([1.0, -1.0]))])
    assert '<span style="background:rgba(47,111,167,0.70)">fine</span>' in html
    assert '<span style="background:rgba(209,116,42,0.70)">&lt;b&gt;</span>' in html
    assert "<b>safe, 0.500</b>" in html


def test_without_token_scores_it_says_what_they_need():
    assert "need texts" in section([])
