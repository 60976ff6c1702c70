"""``/rerank`` with ``stream``: events as answers are drawn, through the whole corridor on the fake backbone, and
over a real socket."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from api.test_drawn import ASK, serving
from inward import metrics
from inward.api.streamed_ranking import stream_ranking
from inward.errors import InternalError
from inward.heads.hybrid import confidence
from inward.types import Gamma, Group, Scores
from inward.wire import RerankAnswer, RerankRequest
from support.corridor import FakeHead
from support.fake_services import HYBRID, LEGEND, SRR, error
from support.waiting import PATIENCE, until

STREAM = {**ASK, "stream": True}
Event = tuple[str, Any]


def events(text: str) -> list[Event]:
    """Names and JSON; comments are left out. The end must be there."""
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    assert blocks.pop() == "data: [DONE]"
    fields = [dict(line.split(": ", 1) for line in block.splitlines()) for block in blocks]
    return [(field["event"], json.loads(field["data"])) for field in fields]


class ListHead(FakeHead):
    """Scores a response by its place among those that end with larger numbers."""

    def score(self, reading, *, details=frozenset(), pair=False):
        scores = super().score(reading).scores_N
        given = [one for one in scores if one is not None]
        places = [None if one is None else float(sum(other < one for other in given)) for one in scores]
        shares = [None if place is None else (place + 1) / len(given) for place in places]
        return Scores(tuple(places), listwise=True, share_N=tuple(shares) if len(given) > 1 else None)


async def test_each_answer_comes_as_an_event_and_the_end_is_the_answer_that_is_given_without_streaming():
    async with serving() as (api, _):
        response = await api.post("/rerank", STREAM)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    *samples, (last, result) = events(response.text)
    assert [name for name, _ in samples] == ["sample"] * 6
    assert last == "result"
    RerankAnswer.model_validate(result)
    assert sorted((sample["index"] for _, sample in samples)) == list(range(6))
    assert sorted(result["results"], key=lambda r: r["index"]) == sorted(
        (sample for _, sample in samples), key=lambda s: s["index"]
    )
    scores = [ranked["score"] for ranked in result["results"]]
    assert scores == sorted(scores, reverse=True)
    assert result["pair"]["margin"] == pytest.approx(scores[0] - scores[-1])
    assert result["usage"]["completion_tokens"] == sum(ranked["completion_tokens"] for ranked in result["results"])


async def test_a_seed_repeats_the_stream():
    async with serving() as (api, _):
        first, second = [events((await api.post("/rerank", STREAM)).text) for _ in range(2)]
    assert first[-1] == second[-1]


async def test_a_listwise_head_scores_in_the_end_only():
    async with serving() as (api, c):
        api.refs[SRR.name] = SRR
        c.registry.heads[SRR.name] = ListHead(SRR.name, SRR.version)
        *samples, (_, result) = events((await api.post("/rerank", {**STREAM, "head": SRR.name})).text)
    assert {sample["score"] for _, sample in samples} == {None}
    assert {sample["error"] for _, sample in samples} == {None}
    assert {sample["share"] for _, sample in samples} == {None}
    assert {one["probability"] for one in [*result["results"], *(sample for _, sample in samples)]} == {None}
    assert [one["share"] for one in result["results"]] == [(place + 1) / 6 for place in reversed(range(6))]
    assert len({ranked["score"] for ranked in result["results"]}) == 6
    assert result["listwise"] is True


async def test_a_list_is_observed_once_streamed_or_not():
    def observed() -> float:
        labels = {"head": SRR.name, "version": str(SRR.version)}
        return metrics.REGISTRY.get_sample_value("inward_reward_count", labels) or 0.0

    async with serving() as (api, c):
        api.refs[SRR.name] = SRR
        c.registry.heads[SRR.name] = ListHead(SRR.name, SRR.version)
        for body in (STREAM, ASK):
            before = observed()
            await api.post("/rerank", {**body, "head": SRR.name})
            assert observed() - before == ASK["n"]


@pytest.mark.parametrize("stream", [True, False])
async def test_the_confidence_of_the_pair_comes_from_the_pass_that_draws(stream):
    async with serving() as (api, c):
        api.refs[HYBRID.name] = HYBRID
        c.registry.heads[HYBRID.name] = FakeHead(HYBRID.name, HYBRID.version, seed=1, gamma=Gamma(7.5, True, None))
        response = await api.post("/rerank", {**ASK, "stream": stream, "head": LEGEND.name, "return_token_ids": True})
        result = events(response.text)[-1][1] if stream else response.json()
        assert c.backbone.calls == (ASK["n"] if stream else 1)
        prompt_ids = tuple(map(ord, ASK["prompt"] + "\n\n"))
        best, *_, worst = (tuple(ranked["token_ids"]) for ranked in result["results"])
        (again,) = await c.score([Group(prompt_ids, (best, worst))], heads=(HYBRID.name,))
    assert result["head"]["name"] == LEGEND.name
    assert result["pair"]["confidence"] == pytest.approx(float(confidence(*again.scores[0].scores_N, floor=None)))


async def test_what_can_be_refused_before_the_beginning_is_an_ordinary_error():
    async with serving() as (api, _):
        for body, status, param in (
            ({**STREAM, "n": 99}, 413, "n"),
            ({**STREAM, "sampling": {"max_tokens": 10_000}}, 413, "sampling.max_tokens"),
            ({"prompt": "p", "candidates": ["a"], "stream": True}, 422, "stream"),
            ({**STREAM, "head": "nobody"}, 404, "head"),
        ):
            refused = await api.post("/rerank", body)
            assert (refused.status_code, error(refused)["param"]) == (status, param)


async def test_what_goes_wrong_later_is_an_event_in_the_error_shape_and_the_stream_ends():
    async with serving() as (api, c):
        c.backbone.fail_on(lambda group: True)
        ((name, body),) = events((await api.post("/rerank", STREAM)).text)
    assert name == "error"
    assert body["error"] == InternalError("the fake backbone was told to fail on this group").body()["error"]


async def test_a_deadline_holds_while_streaming():
    async with serving() as (api, c):
        c.backbone.delay_per_token = 1.0
        *_, (name, body) = events((await api.post("/rerank", {**STREAM, "timeout": 1.5})).text)
        assert (name, body["error"]["code"]) == ("error", "deadline_exceeded")


async def test_a_head_that_is_switched_meanwhile_ends_the_stream_with_an_error():
    async with serving() as (api, c):
        c.backbone.delay_per_token = 0.001
        asking = asyncio.create_task(api.post("/rerank", STREAM))
        async with asyncio.timeout(PATIENCE):
            while not c.backbone.calls:
                await asyncio.sleep(0.001)
        c.registry.heads = {LEGEND.name: FakeHead(LEGEND.name, LEGEND.version + 1)}
        *_, (name, body) = events((await asking).text)
    assert (name, body["error"]["code"]) == ("error", "unavailable")


async def hang_up_after(api: Any, body: dict[str, Any], wanted: int) -> None:
    """Reads ``wanted`` events as an ASGI server would, and is gone."""
    seen, gone = 0, asyncio.Event()
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        nonlocal seen
        seen += 1
        if seen > wanted:
            gone.set()

    headers = [(b"content-type", b"application/json")]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/rerank",
        "raw_path": b"/rerank",
        "query_string": b"",
        "headers": headers,
    }
    await api.app(
        {**scope, "http_version": "1.1", "scheme": "http", "server": ("inward", 80), "client": None}, receive, send
    )


async def test_who_hangs_up_is_not_drawn_for_any_more():
    async with serving() as (api, c):
        c.backbone.delay_per_token = 0.002
        await hang_up_after(api, {**STREAM, "n": 40}, wanted=2)
        async with asyncio.timeout(PATIENCE):
            while c.queue.tokens:
                await asyncio.sleep(0.01)
        assert c.backbone.calls < 40


@pytest.mark.parametrize("ends", ["before its first event", "before anybody asks for it"])
async def test_a_stream_that_ends_before_it_has_begun_leaves_no_drawings_running(ends):
    async def blocked(message: dict[str, Any]) -> None:
        await asyncio.Event().wait()

    async def finish(answer: RerankAnswer) -> None:
        raise AssertionError("there is no answer")

    async with serving() as (api, c):
        c.backbone.delay_per_token = 0.002
        stream = await stream_ranking(api.services, RerankRequest.model_validate(STREAM), LEGEND, finish)
        assert c.queue.tokens
        if ends == "before its first event":
            sending = asyncio.create_task(stream({"type": "http"}, lambda: asyncio.sleep(0), blocked))
            await asyncio.sleep(0)
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        del stream
        await until(lambda: not c.queue.tokens)
        assert c.backbone.calls < 3


async def test_silence_is_broken_by_comments(monkeypatch):
    monkeypatch.setattr("inward.api.events.HEARTBEAT_S", 0.01)
    async with serving() as (api, c):
        c.backbone.delay_per_token = 0.002
        text = (await api.post("/rerank", {**STREAM, "n": 2})).text
    assert ": still there\n\n" in text
    assert [name for name, _ in events(text)] == ["sample", "sample", "result"]


async def test_a_stream_is_not_kept_for_its_idempotency_key():
    async with serving() as (api, _):
        for _ in range(2):
            response = await api.post("/rerank", STREAM, headers={"idempotency-key": "k"})
            assert "idempotency-replayed" not in response.headers
            assert events(response.text)[-1][0] == "result"
