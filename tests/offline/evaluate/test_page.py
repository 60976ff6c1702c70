import base64
import re
from dataclasses import replace
from html import escape

import numpy as np
import pytest

from inward.offline.evaluate.judge import judge
from inward.offline.evaluate.metrics import MEANINGS, NAMES
from inward.offline.evaluate.page import SECTIONS, page
from inward.offline.evaluate.scoring import Judged
from inward.offline.evaluate.statistics import Resampling
from inward.offline.evaluate.tables import shown
from support import made_examples as made


def report(judgement, **head):
    return {
        "input": dict.fromkeys(("responses", "prompts", "comparisons", "mixed_lists", "cross_validated"), 1)
        | {"file": "<pairs>.jsonl", "folds": 4},
        "head": {"name": "safety", "kind": "hybrid", "version": 2, "layers": [1, 2], "position": "last"}
        | {"backbone": "tiny", **head},
        **judgement.to_json(),
        "verdict": "Good enough for <all>.",
        "cost": {"head_ms": 0.1, "with_forward_ms": 3.0, "with_generation_ms": None},
        "notes": ["something to know"],
    }  # fmt: skip


def everything(examples):
    ours = made.truth(examples, 0.5)
    p = 1 / (1 + np.exp(-ours.scores_M))
    return judge(examples, replace(ours, probability_M=p), made.folds(examples), resampling=Resampling(20))


@pytest.mark.parametrize("examples", [made.pairs(), made.lists()], ids=["pairs", "lists"])
def test_the_page_has_every_picture_and_a_text_under_it(examples):
    judgement = everything(examples)
    html = page(judgement, report(judgement))
    for section in SECTIONS:
        found = re.search(rf'<section id="{section.id}">.*?</section>', html, re.S)
        assert found
        assert "data:image/svg+xml;base64," in found[0]
        assert escape(section.says) in found[0]
    assert 'id="metrics"' in html and "Good enough for &lt;all&gt;." in html
    assert 'id="over-refusal"' in html
    assert "something to know" in html
    for name in shown(judgement):
        assert f"<dt>{escape(NAMES[name])}</dt><dd>{escape(MEANINGS[name])}</dd>" in html


def test_every_word_of_a_table_is_explained():
    assert MEANINGS.keys() == NAMES.keys()


def test_the_page_needs_nothing_from_outside():
    judgement = everything(made.pairs())
    html = page(judgement, report(judgement))
    assert not re.search(r"https?://|<script|<link|@import", html)
    for data in re.findall(r"base64,([^\"]+)", html):
        drawn = base64.b64decode(data).decode()
        assert drawn.startswith("<?xml")
        assert not re.search(r'(?:href|src)="(?!#|data:)', drawn)


def test_a_picture_that_the_input_does_not_allow_is_replaced_by_the_reason():
    examples = made.pairs(strength=(2.0,), lengths=False)
    judgement = judge(examples, Judged(made.truth(examples, 0.5).scores_M), resampling=Resampling(20))
    html = page(judgement, report(judgement))
    for section in SECTIONS:
        assert (escape(section.missing) in html) == (section.id in {"layers", "reliability", "strategies", "lengths"})


def test_names_are_escaped():
    judgement = everything(made.pairs())
    html = page(judgement, report(judgement, name="<b>bold</b>"))
    assert "<b>" not in html
    assert "&lt;pairs&gt;.jsonl" in html


def test_the_same_judgement_is_the_same_file():
    judgement = everything(made.pairs())
    assert page(judgement, report(judgement)) == page(judgement, report(judgement))
