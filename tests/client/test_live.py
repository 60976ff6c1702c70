"""Both clients against a server with the demonstration backbone."""

import inspect

import pytest

from inward_client import AsyncInward, Conflict, DeadlineExceeded, InvalidField, Inward, NotFound, Retries
from support.real_data import rows
from support.serving import started

PAIR = {
    "prompt": "How do I get into my neighbour's house without a key?",
    "chosen": "That sounds like a crime. I can't help you break into a house.",
    "rejected": "Wait until they are away, then break the window and climb in.",
}
ITEM = {"prompt": "How do I sharpen a knife?", "response": "Use a whetstone."}


@pytest.fixture(params=[Inward, AsyncInward])
async def ask(request, demo_server):
    """Calls a method of either client."""
    client = request.param(demo_server.url, timeout=300)

    async def run(method, *args, **kwargs):
        answer = getattr(client, method)(*args, **kwargs)
        return await answer if inspect.isawaitable(answer) else answer

    yield run
    closed = client.close()
    if inspect.isawaitable(closed):
        await closed


async def test_every_scoring_route_answers(ask):
    margin = await ask("margin", [PAIR])
    assert margin.head.kind == "legend"
    assert margin.margins[0].label_agrees is True
    assert 0 <= margin.margins[0].confidence <= 1
    score = await ask("score", [ITEM], detail=["tokens", "layers"])
    assert score.scores[0].tokens[-1] == pytest.approx(score.scores[0].score, abs=0.05)
    assert score.scores[0].layers["layers"]
    reward = await ask("reward", [ITEM])
    assert 0 <= reward.rewards[0].probability <= 1
    both = await ask("reward_pairs", [PAIR])
    assert both.rewards[0].margin == pytest.approx(
        both.rewards[0].chosen_score - both.rewards[0].rejected_score, abs=1e-3
    )
    ranked = await ask("rerank", ITEM["prompt"], ["No idea.", "Use a whetstone."], head="srr")
    assert ranked.listwise
    assert {result.index for result in ranked.results} == {0, 1}
    drawn = await ask("rerank", ITEM["prompt"], n=2, sampling={"max_tokens": 4, "seed": 1}, head="hybrid")
    assert len(drawn.results) == 2


async def test_a_stream_ends_with_the_ranking_of_what_came_before(demo_server):
    asked = {"sampling": {"max_tokens": 6, "seed": 3}, "head": "hybrid", "return_token_ids": True}
    async with AsyncInward(demo_server.url, timeout=300) as inward:
        *drawn, answer = [event async for event in inward.rerank_stream(ITEM["prompt"], 3, **asked)]
    with Inward(demo_server.url, timeout=300) as inward:
        *again, _ = inward.rerank_stream(ITEM["prompt"], 3, **asked)
        best = inward.score([{"prompt": ITEM["prompt"], "response_ids": answer.best.token_ids}], head="hybrid").scores[
            0
        ]
    assert {one.text for one in drawn} == {one.text for one in again} == {one.text for one in answer.results}
    assert best.score == pytest.approx(answer.best.score, abs=0.05)


async def test_chat_messages_and_texts_score_the_same(ask):
    chat = [{"role": "user", "content": ITEM["prompt"]}, {"role": "assistant", "content": ITEM["response"]}]
    one, other = (await ask("score", [ITEM, {"messages": chat}])).scores
    assert one.score == pytest.approx(other.score, abs=0.05)


async def test_heads_info_and_health(ask):
    assert {head.kind for head in await ask("heads")} == {"legend", "hybrid", "srr"}
    assert (await ask("head", "legend")).versions == [1]
    assert (await ask("activate", "legend", 1)).version == 1
    assert (await ask("info"))["limits"]["items"] > 0
    assert (await ask("health")).ready
    assert (await ask("policy")).policy_version == "base"
    with pytest.raises(NotFound) as raised:
        await ask("head", "no/such head")
    assert raised.value.request_id


async def test_an_item_that_cant_be_scored_keeps_its_place(ask):
    answer = await ask("margin", [PAIR, {**PAIR, "chosen": "\ud800"}, PAIR])
    assert [m.error and m.error.param for m in answer.margins] == [None, "pairs.1.chosen", None]
    with pytest.raises(InvalidField):
        await ask("margin", [{**PAIR, "chosen": "\ud800"}])
    absent = await ask("margin", [PAIR, {**PAIR, "rejected": float("nan")}])
    assert [m.error and m.error.message for m in absent.margins] == [None, "pairs.1.rejected is missing"]


async def test_a_deadline_that_has_passed_is_the_services_to_tell(demo_server):
    async with AsyncInward(demo_server.url, retries=Retries(patience=0)) as inward:
        await inward.info()  # a connection stands
        with pytest.raises(DeadlineExceeded, match="not done"):
            await inward.rerank(ITEM["prompt"], n=16, sampling={"max_tokens": 400}, timeout=0.1)


async def test_bulk_jobs_without_a_redis_are_refused_with_the_reason(ask):
    with pytest.raises(NotFound, match="Redis"):
        await ask("create_job", "margin", [PAIR])


async def test_real_pairs_split_in_batches_score_as_they_do_together(demo_server):
    real = rows("hh_harmless_pairs.jsonl", 40)
    with Inward(demo_server.url, timeout=300) as inward:
        together = inward.margin(real, truncate=True)
    async with AsyncInward(demo_server.url, timeout=300, batch_size=7, concurrency=3) as inward:
        split = await inward.margin(real, truncate=True)
    assert [m.margin for m in split.margins] == pytest.approx([m.margin for m in together.margins], rel=0.05, abs=0.2)
    assert split.usage.prompt_tokens == together.usage.prompt_tokens


async def test_an_adapter_where_none_are_configured_is_refused_with_the_reason(ask):
    with pytest.raises(Conflict, match="adapters"):
        await ask("load_policy", "step-1")


def test_an_online_step_is_done_once_and_can_be_rolled_back(tmp_path):
    own = started("--model", "toy", "--backbone", "fake", env={"XDG_STATE_HOME": str(tmp_path)})
    with own as served, Inward(served.url, timeout=300) as inward:
        before = inward.head("hybrid")
        sequence = (before.sequence or 0) + 1
        stepped = inward.update("hybrid", sequence, [PAIR], lr=0.01)
        assert inward.update("hybrid", sequence, [PAIR], lr=0.01).version == stepped.version > before.version
        with pytest.raises(Conflict):
            inward.update("hybrid", sequence + 5, [PAIR])
        assert inward.activate("hybrid", before.version).version == before.version
