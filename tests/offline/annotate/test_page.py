import json
import re

import pytest

from inward.offline.annotate.decisions import key_of
from inward.offline.annotate.page import page, ticks
from inward.offline.annotate.scorer import Annotated, Annotator, TokenScores
from inward.offline.annotate.summary import Picked, summarise
from inward_client.rows import Pair

HEAD = {"name": "legend", "kind": "legend", "version": 1}
ANNOTATOR = Annotator("model<script>", "", "", "float32", "base", "t", HEAD, None, "0")


def columns(margin):
    values = {"margin": margin, "label_probability": 0.25, "confidence": 0.5, "chosen_score": margin}
    return {**values, "rejected_score": 0.0, "label_agrees": margin > 0}


def picked(n, margin=-1.0, **rest):
    pair = Pair(f"<b>question {n}</b>", f"</script><script>alert({n})</script>", "\ud83d")
    return Picked("in", n + 1, pair, columns(margin), rest)


def data(html):
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    return json.loads(found)


def made(pairs, tokens=()):
    summary = summarise([Annotated(columns(margin)) for margin in (-4.0, -1.0, 0.5, 2.0, 3.0)])
    return page("in.jsonl", ANNOTATOR, summary, pairs, None, tokens)


def test_the_page_holds_the_pairs_that_are_asked_for_and_runs_nothing_that_stands_in_them():
    html = made([picked(0, source="a"), picked(1, source="b", long="x" * 500, nested={"a": [1]})])
    found = data(html)
    assert [row["row"] for row in found["rows"]] == [1, 2]
    assert found["rows"][0]["key"] == key_of(picked(0).pair)
    assert found["rows"][1]["rest"]["nested"] == '{"a": [1]}' and len(found["rows"][1]["rest"]["long"]) == 120
    assert found["columns"] == ["long", "nested", "source"]
    assert html.count("<script") == 2 and "model<script>" not in html and "<b>question" not in html


def test_token_scores_stand_beside_the_texts_where_they_were_asked_for():
    found = data(made([picked(0), picked(1)], [TokenScores([("a", 1.0)], [("b", -1.0)]), None]))
    assert found["rows"][0]["chosen_tokens"] == [["a", 1.0]] and "chosen_tokens" not in found["rows"][1]


def test_the_histogram_has_an_axis_and_a_zero():
    html = made([])
    assert 'class="zero"' in html and ">0</text>" in html
    assert len(re.findall("<text ", html)) >= 4


@pytest.mark.parametrize("low, high", [(-3.2, 5.1), (-0.001, 0.004), (10.0, 2000.0), (-9e4, -1e4)])
def test_ticks_are_round_and_few_and_hold_zero_where_it_lies_between(low, high):
    found = ticks(low, high)
    assert 3 <= len(found) <= 7 and low <= found[0] and found[-1] <= high
    assert (0.0 in found) == (low <= 0 <= high)
