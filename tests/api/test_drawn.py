"""``/rerank`` with ``n``: answers are drawn, read and ranked; through the whole corridor, on the fake backbone."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from inward.api.app import create_app
from inward.types import Group, Sample, SamplingSpec
from support.corridor import Corridor, FakeHead, corridor
from support.fake_services import LEGEND, MAX_TOKENS, FakeServices, error
from support.waiting import PATIENCE

ASK = {"prompt": "Which way?", "n": 6, "sampling": {"seed": 3, "max_tokens": 20}}


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[FakeServices, Corridor]]:
    """A house whose intake is a real corridor."""
    async with corridor() as c:
        c.registry.heads = {LEGEND.name: FakeHead(LEGEND.name, LEGEND.version)}
        api = FakeServices(LEGEND)
        api.services = replace(
            api.services,
            intake=c.intake,
            limits=replace(api.services.limits, timeout_s=PATIENCE),
        )
        api.app = create_app(api.services)
        yield api, c


async def ask(body: dict[str, Any]) -> dict[str, Any]:
    async with serving() as (api, _):
        response = await api.post("/rerank", body)
    assert response.status_code == 200, response.text
    return response.json()


async def test_drawn_answers_come_best_first_with_the_pair_of_best_and_worst():
    body = await ask(ASK)
    scores = [result["score"] for result in body["results"]]
    assert scores == sorted(scores, reverse=True)
    assert sorted(result["index"] for result in body["results"]) == list(range(6))
    assert body["best"] == body["results"][0]
    assert body["pair"]["chosen"] == body["results"][0]["text"]
    assert body["pair"]["rejected"] == body["results"][-1]["text"]
    assert body["pair"]["margin"] == pytest.approx(scores[0] - scores[-1])
    assert body["pair"]["chosen_finish_reason"] == body["results"][0]["finish_reason"]
    assert body["pair"]["rejected_finish_reason"] == body["results"][-1]["finish_reason"]
    assert {result["finish_reason"] for result in body["results"]} <= {"stop", "length"}


@pytest.mark.parametrize("path", ["/rerank", "/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("most", [4, None])
async def test_a_prompt_that_may_be_cut_leaves_room_for_what_is_to_be_drawn(path, most):
    """Cut until ``max_tokens`` fit; where the request says none, until a quarter of the room is free."""
    text = "word " * MAX_TOKENS
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": text}]} if "chat" in path else {"prompt": text}
    if path == "/rerank":
        asked |= {"n": 2, "sampling": {"max_tokens": most} if most else {}}
    else:
        asked["max_tokens"] = most
    room = MAX_TOKENS - 1
    async with serving() as (api, _):
        refused = await api.post(path, asked)
        response = await api.post(path, {**asked, "truncate": True})
    assert (refused.status_code, response.status_code) == (413, 200), response.text
    body = response.json()
    n = 1 if path.startswith("/v1") else 2
    assert body["usage"]["prompt_tokens"] == n * (room - (most or room // 4))
    assert all(result["truncated"] for result in body.get("results", ()))


async def test_each_answer_says_how_it_ended_and_how_long_it_is_and_usage_counts_all():
    body = await ask(ASK)
    assert {result["finish_reason"] for result in body["results"]} == {"stop", "length"}
    assert all((r["completion_tokens"] == 20) == (r["finish_reason"] == "length") for r in body["results"])
    assert body["usage"]["completion_tokens"] == sum(result["completion_tokens"] for result in body["results"])
    assert body["usage"]["cached_tokens"] > 0


async def test_messages_may_stand_for_the_prompt_and_a_seed_repeats_the_answers():
    messages = {**ASK, "messages": [{"role": "user", "content": ASK["prompt"]}]}
    del messages["prompt"]
    assert (await ask(messages))["results"] == (await ask(ASK))["results"]


async def test_the_score_of_a_drawn_answer_is_that_of_the_same_answer_given():
    async with serving() as (api, c):
        drawn = (await api.post("/rerank", ASK)).json()
        group = next(group for group in c.backbone.computed if group.responses_ids)
        given = (await c.score([group], heads=(LEGEND.name,)))[0].scores[0].scores_N
    assert sorted(given, reverse=True) == pytest.approx([result["score"] for result in drawn["results"]])


async def test_equal_answers_are_computed_once_and_score_alike():
    async with serving() as (api, c):

        async def same(group: Group) -> list[Sample]:
            return [
                Sample((7, 8), "seven eight", "stop"),
                Sample((9,), "nine", "stop"),
                Sample((7, 8), "seven eight", "stop"),
            ]

        c.backbone.sample = same
        body = (await api.post("/rerank", {**ASK, "n": 3})).json()
    assert [len(group.responses_ids) for group in c.backbone.computed] == [2]
    assert len({r["score"] for r in body["results"] if r["text"] == "seven eight"}) == 1


async def test_sampling_options_reach_the_backbone_and_the_default_length_fits_the_model():
    async with serving() as (api, c):
        seen: list[SamplingSpec] = []
        draw = c.backbone.sample

        async def spy(group: Group) -> list[Sample]:
            assert group.sampling is not None
            seen.append(group.sampling)
            return await draw(group)

        c.backbone.sample = spy
        options = {
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 8,
            "min_p": 0.1,
            "repetition_penalty": 1.2,
            "seed": 1,
            "stop": ["\n"],
        }
        await api.post("/rerank", {"prompt": "Which way?", "n": 2, "sampling": options})
    prompt = len("Which way?\n\n")
    assert seen == [SamplingSpec(n=2, max_tokens=MAX_TOKENS - 1 - prompt, **{**options, "stop": ("\n",)})]


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"n": 11}, 413, "n"),
        ({"n": 0}, 422, "n"),
        ({"candidates": ["a"]}, 422, "candidates"),
        ({"n": None}, 422, "candidates"),
        ({"sampling": {"max_tokens": MAX_TOKENS}}, 413, "sampling.max_tokens"),
        ({"sampling": {"temperature": -1}}, 422, "sampling.temperature"),
        ({"sampling": {"stop": [""]}}, 422, "sampling.stop.0"),
        ({"sampling": {"beams": 4}}, 422, "sampling.beams"),
        ({"prompt": "x" * MAX_TOKENS}, 413, "prompt"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_what_can_not_be_drawn_is_refused_by_its_field(change, status, param):
    async with serving() as (api, c):
        response = await api.post(
            "/rerank", {key: value for key, value in {**ASK, **change}.items() if value is not None}
        )
    assert response.status_code == status
    assert error(response)["param"] == param
    assert not c.backbone.computed


async def test_how_much_may_be_drawn_follows_the_workers():
    """What a model takes is known once a worker says it, long after the limits of the service were printed."""
    async with serving() as (api, _):
        api.services.prompts.max_tokens = 40
        long = await api.post("/rerank", {**ASK, "sampling": {"max_tokens": 40}})
        assert (long.status_code, error(long)["param"]) == (413, "sampling.max_tokens")
        api.services.prompts.max_tokens = 100
        assert (await api.post("/rerank", {**ASK, "sampling": {"max_tokens": 40}})).status_code == 200
