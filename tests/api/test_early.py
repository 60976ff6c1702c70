"""``/rerank`` with ``early_rejection`` and ``stop_when``, through the whole corridor on the fake backbone."""

from __future__ import annotations

import math

import numpy as np
import pytest

from api.test_drawn import ASK, ask, serving
from api.test_stream import STREAM, ListHead, events
from inward import metrics
from inward.queues.memory import MemoryQueue
from support.corridor import FakeHead
from support.fake_services import LEGEND, SRR, error

REJECT = {"early_rejection": {"keep": 0.5, "at": [4, 8]}}
GUARD = {"stop_when": {"below": -1.0, "pool": "last"}}


def value(text):
    return [int(word) for word in text.split()]


async def test_rejected_answers_stand_last_with_what_was_drawn_of_them_and_their_score():
    whole = await ask(ASK)
    lengths = {r["index"]: r["completion_tokens"] for r in whole["results"]}
    body = await ask({**ASK, **REJECT})
    rejected = [r for r in body["results"] if r["finish_reason"] == "rejected"]
    finished = body["results"][: -len(rejected)]
    assert rejected == body["results"][-len(rejected) :]
    assert {r["completion_tokens"] for r in rejected} <= {4, 8}
    assert all(lengths[r["index"]] >= r["completion_tokens"] and r["error"] is None for r in rejected)
    assert all(isinstance(r["score"], float) for r in rejected)
    same = {r["index"]: (r["text"], r["score"]) for r in whole["results"]}
    assert all(same[r["index"]] == (r["text"], pytest.approx(r["score"])) for r in finished)
    running = [i for i, n in lengths.items() if n >= 4]
    assert sum(r["completion_tokens"] == 4 for r in rejected) == len(running) // 2
    assert body["pair"]["rejected"] == finished[-1]["text"]


async def test_usage_says_what_was_drawn_and_what_was_not():
    drawn, saved = metrics.DRAWN_TOKENS_TOTAL._value.get(), metrics.NOT_DRAWN_TOKENS_TOTAL._value.get()
    whole, body = await ask(ASK), await ask({**ASK, **REJECT})
    assert whole["usage"]["drawn_tokens"] == whole["usage"]["completion_tokens"]
    assert whole["usage"]["not_drawn_tokens"] == 0
    assert body["usage"]["drawn_tokens"] == body["usage"]["completion_tokens"] < whole["usage"]["drawn_tokens"]
    left = [20 - r["completion_tokens"] for r in body["results"] if r["finish_reason"] == "rejected"]
    assert body["usage"]["not_drawn_tokens"] == sum(left)
    assert metrics.DRAWN_TOKENS_TOTAL._value.get() - drawn == sum(b["usage"]["drawn_tokens"] for b in (whole, body))
    assert metrics.NOT_DRAWN_TOKENS_TOTAL._value.get() - saved == sum(left)


async def test_a_rejected_answer_is_in_the_pair_only_if_asked_for():
    body = await ask({**ASK, "early_rejection": {**REJECT["early_rejection"], "in_pair": True}})
    assert body["pair"]["rejected"] == body["results"][-1]["text"]
    assert body["pair"]["rejected_finish_reason"] == "rejected"


async def test_another_head_may_decide_and_one_fitted_for_the_ranking_head_does_by_itself():
    async with serving() as (api, c):
        c.registry.heads["value"] = FakeHead("value", seed=7)
        c.registry.heads["value"].manifest.options["of"] = LEGEND.name
        api.refs["value"] = c.registry.heads["value"].ref
        by_value = (await api.post("/rerank", {**ASK, **REJECT})).json()
        named = {**REJECT["early_rejection"], "head": "value"}
        assert (await api.post("/rerank", {**ASK, "early_rejection": named})).json() == by_value
        own = {**REJECT["early_rejection"], "head": LEGEND.name}
        assert (await api.post("/rerank", {**ASK, "early_rejection": own})).json() != by_value


async def tokens(c, text):
    """The head's score at every token of an answer."""
    head = c.registry.heads[LEGEND.name]
    from inward.types import Group

    prompt = tuple(map(ord, ASK["prompt"] + "\n\n"))
    (reading,) = await c.backbone.read([Group(prompt, (tuple(value(text)),))], [head.readout], tokens=True)
    return reading.readings[0].tokens_TK[0][:, 0]


@pytest.mark.parametrize("stream", [False, True])
async def test_nothing_after_the_last_safe_token_is_given(stream):
    async with serving() as (api, c):
        response = await api.post("/rerank", {**ASK, **GUARD, "stream": stream})
        results = [ranked for name, ranked in events(response.text) if name == "sample"] if stream else (
            response.json()["results"]
        )  # fmt: skip
        stopped = [r for r in results if r["finish_reason"] == "guard"]
        assert stopped
        for ranked in results:
            scores = await tokens(c, ranked["text"])
            assert (scores >= -1.0).all()
            if ranked["finish_reason"] == "guard":
                assert ranked["score"] < -1.0
    if not stream:
        assert [r["finish_reason"] == "guard" for r in results] == sorted(
            r["finish_reason"] == "guard" for r in results
        )


async def test_a_guard_stops_where_the_whole_answer_would_have_become_unsafe():
    async with serving() as (api, c):
        whole = {r["index"]: r["text"] for r in (await api.post("/rerank", ASK)).json()["results"]}
        guarded = (await api.post("/rerank", {**ASK, **GUARD})).json()
        for ranked in guarded["results"]:
            scores = await tokens(c, whole[ranked["index"]])
            unsafe = np.flatnonzero(scores < -1.0)
            expected = int(unsafe[0]) if len(unsafe) else len(scores)
            assert ranked["completion_tokens"] == expected
        usage = guarded["usage"]
        assert usage["drawn_tokens"] - usage["completion_tokens"] == sum(
            r["finish_reason"] == "guard" for r in guarded["results"]
        )


async def test_where_a_guard_ends_all_answers_there_is_no_pair_and_no_error():
    body = await ask({**ASK, "stop_when": {"below": 1e6}})
    assert {(r["finish_reason"], r["text"], r["error"]) for r in body["results"]} == {("guard", "", None)}
    assert body["pair"] is None
    assert all(math.isfinite(r["score"]) for r in body["results"])


async def test_both_at_once():
    body = await ask({**ASK, **REJECT, **GUARD})
    reasons = [r["finish_reason"] for r in body["results"]]
    order = {"stop": 0, "length": 0, "guard": 1, "rejected": 2}
    assert [order[reason] for reason in reasons] == sorted(order[reason] for reason in reasons)


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"early_rejection": {"keep": 0.5}}, 422, "early_rejection.at"),
        ({"early_rejection": {"at": [4]}}, 422, "early_rejection.keep"),
        ({"early_rejection": {"keep": 1.5, "at": [4]}}, 422, "early_rejection.keep"),
        ({"early_rejection": {"keep": 0.5, "at": [8, 4]}}, 422, "early_rejection.at"),
        ({"early_rejection": {"keep": 0.5, "at": [4], "max_loss": 0.1}}, 422, "early_rejection.max_loss"),
        ({"early_rejection": {"keep": 0.5, "at": [4], "head": "nobody"}}, 404, "early_rejection.head"),
        ({"early_rejection": {"max_loss": 0.1}}, 422, "early_rejection.max_loss"),
        ({"early_rejection": {"keep": 0.5, "at": [24, 32]}, "sampling": {"max_tokens": 24}}, 422, "early_rejection.at"),
        ({"stop_when": {}}, 422, "stop_when.below"),
        ({"stop_when": {"below": 0.0, "fpr": 0.01}}, 422, "stop_when.fpr"),
        ({"stop_when": {"below": 0.0, "head": "nobody"}}, 404, "stop_when.head"),
        ({"stop_when": {"below": 0.0, "pool": "median"}}, 422, "stop_when.pool"),
        ({"stop_when": {"fpr": 0.01}}, 422, "stop_when.fpr"),
        ({**GUARD, "n": None, "sampling": None, "candidates": ["a"]}, 422, "stop_when"),
        ({**REJECT, "n": None, "sampling": None, "candidates": ["a"]}, 422, "early_rejection"),
    ],
    ids=str,
)
async def test_what_can_not_be_done_is_refused(change, status, param):
    body = {name: given for name, given in {**ASK, **change}.items() if given is not None}
    async with serving() as (api, _):
        response = await api.post("/rerank", body)
    assert response.status_code == status, response.text
    assert error(response)["param"] == param


async def test_a_stream_tells_of_each_when_it_ends_and_then_gives_the_ranking_that_comes_without_it():
    whole = await ask({**ASK, **REJECT})
    async with serving() as (api, _):
        *samples, (last, result) = events((await api.post("/rerank", {**STREAM, **REJECT})).text)
    assert last == "result"
    assert result == whole
    final = {one["index"]: one for one in result["results"]}
    assert sorted(one["index"] for _, one in samples) == sorted(final)
    for name, one in samples:
        assert name == "sample"
        assert one == {**final[one["index"]], "score": pytest.approx(one["score"])}
    rejected = [one for _, one in samples if one["finish_reason"] == "rejected"]
    assert rejected and all(one["drawn_tokens"] + one["not_drawn_tokens"] == 20 for one in rejected)
    assert sum(one["not_drawn_tokens"] for one in final.values()) == result["usage"]["not_drawn_tokens"]
    assert sum(one["drawn_tokens"] for one in final.values()) == result["usage"]["drawn_tokens"]
    order = [one["drawn_tokens"] for _, one in samples]
    assert order.index(4) < order.index(max(order))  # told while the others are drawn


async def test_a_stream_gives_nothing_that_a_guard_holds_back():
    async with serving() as (api, c):
        *samples, (_, result) = events((await api.post("/rerank", {**STREAM, **REJECT, **GUARD})).text)
        final = {one["index"]: one for one in result["results"]}
        assert {one["index"] for _, one in samples} == set(final)
        assert {one["finish_reason"] for _, one in samples} >= {"guard"}
        for _, one in samples:
            assert one["text"] == final[one["index"]]["text"]
            assert (await tokens(c, one["text"]) >= -1.0).all()


async def test_a_listwise_head_ranks_at_the_end_of_such_a_stream():
    async with serving() as (api, c):
        api.refs[SRR.name] = SRR
        c.registry.heads[SRR.name] = ListHead(SRR.name, SRR.version)
        body = {**STREAM, "head": SRR.name, "early_rejection": {**REJECT["early_rejection"], "head": LEGEND.name}}
        *samples, (_, result) = events((await api.post("/rerank", body)).text)
    assert {one["score"] for _, one in samples if one["finish_reason"] != "rejected"} == {None}
    assert any(one["score"] is not None for one in result["results"] if one["finish_reason"] != "rejected")


@pytest.mark.parametrize(("below", "some"), [(-6.0, True), (1e6, False)])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_listwise_head_ranks_only_what_was_drawn_to_its_end(stream, below, some):
    guard = {"stop_when": {"head": LEGEND.name, "below": below, "pool": "last"}}
    async with serving() as (api, c):
        api.refs[SRR.name] = SRR
        c.registry.heads[SRR.name] = ListHead(SRR.name, SRR.version)
        response = await api.post("/rerank", {**ASK, **guard, "n": 9, "head": SRR.name, "stream": stream})
    result = events(response.text)[-1][1] if stream else response.json()
    finished = [one for one in result["results"] if one["finish_reason"] != "guard"]
    n = len(finished)
    assert (1 < n < 9) if some else n == 0
    assert [one["score"] for one in finished] == [float(place) for place in reversed(range(n))]
    assert [one["share"] for one in finished] == [(place + 1) / n for place in reversed(range(n))]
    assert all(one["score"] < below and one["share"] is None for one in result["results"][n:])
    assert all(one["probability"] is None for one in result["results"])
    assert (result["pair"] and result["pair"]["margin"]) == (n - 1 if some else None)


async def test_what_goes_wrong_in_such_a_stream_is_an_event():
    async with serving() as (api, c):
        c.backbone.fail_on(lambda group: True)
        *_, (name, body) = events((await api.post("/rerank", {**STREAM, **REJECT})).text)
    assert (name, body["error"]["code"]) == ("error", "internal_error")


async def test_where_nothing_could_be_told_all_come_at_the_end(monkeypatch):
    async def tell(self, news):
        return False

    monkeypatch.setattr(MemoryQueue, "tell", tell)
    whole = await ask({**ASK, **REJECT})
    async with serving() as (api, _):
        *samples, (_, result) = events((await api.post("/rerank", {**STREAM, **REJECT})).text)
    assert result == whole
    assert [one for _, one in samples] == sorted(whole["results"], key=lambda one: one["index"])


async def test_the_streams_last_event_ranks_what_was_stopped_last():
    async with serving() as (api, _):
        *_, (_, result) = events((await api.post("/rerank", {**STREAM, **GUARD})).text)
    stopped = [r["finish_reason"] == "guard" for r in result["results"]]
    assert any(stopped) and stopped == sorted(stopped)
    assert result["usage"]["not_drawn_tokens"] > 0
