"""OpenAI's own client against a server of its own, on the small model."""

from __future__ import annotations

import openai
import pytest

ASK = [{"role": "user", "content": "How do I sharpen a knife?"}]


@pytest.fixture
def client(demo_server):
    with openai.OpenAI(base_url=f"{demo_server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_chat_gives_the_best_of_those_drawn(client):
    answer = client.chat.completions.create(
        model="toy", messages=ASK, max_tokens=12, seed=1, n=2, extra_body={"best_of": 6, "head": "hybrid"}
    )
    first, second = answer.choices
    assert first.message.content
    assert first.inward["score"] >= second.inward["score"]
    assert 0 <= first.inward["probability"] <= 1
    assert first.inward["head"]["name"] == "hybrid"
    assert answer.usage.completion_tokens > 2 * 12  # more than was given


def test_a_stream_is_read_by_the_client_and_says_the_same(client):
    asked = {"model": "hybrid", "messages": ASK, "max_tokens": 12, "seed": 1, "extra_body": {"best_of": 4}}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.inward["drawn"] for chunk in chunks if getattr(chunk, "inward", None)] == [1, 2, 3, 4]
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_a_single_answer_comes_while_it_is_drawn(client):
    asked = {"model": "toy", "messages": ASK, "max_tokens": 400, "seed": 1}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    *texts, end, usage = chunks
    assert len(texts) > 1
    assert "".join(chunk.choices[0].delta.content for chunk in texts) == whole.choices[0].message.content
    assert [chunk.choices[0].delta.role for chunk in texts] == ["assistant", *[None] * (len(texts) - 1)]
    assert end.choices[0].finish_reason == whole.choices[0].finish_reason
    assert end.choices[0].inward["score"] == pytest.approx(whole.choices[0].inward["score"], rel=1e-4)
    assert usage.usage.completion_tokens == whole.usage.completion_tokens


def test_the_stream_helper_of_the_client_accumulates_it(client):
    with client.chat.completions.stream(model="toy", messages=ASK, max_tokens=8, seed=1) as stream:
        texts = [event.content for event in stream if event.type == "content.done"]
    whole = client.chat.completions.create(model="toy", messages=ASK, max_tokens=8, seed=1)
    assert texts == [whole.choices[0].message.content]


def test_completions_go_on_with_texts(client):
    answer = client.completions.create(model="toy", prompt=["Once upon", "There is"], max_tokens=6, best_of=3, n=1)
    assert [choice.index for choice in answer.choices] == [0, 1]
    streamed = client.completions.create(model="toy", prompt="Once upon", max_tokens=6, seed=2, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed)


async def test_the_asynchronous_client_does_the_same(demo_server):
    async with openai.AsyncOpenAI(base_url=f"{demo_server.url}/v1", api_key="any") as client:
        answer = await client.chat.completions.create(model="toy", messages=ASK, max_tokens=6, temperature=0)
    assert answer.choices[0].message.role == "assistant"


def test_models_are_listed_and_found(client):
    assert {"toy", "base", "hybrid", "legend", "srr"} <= {model.id for model in client.models.list()}
    assert client.models.retrieve("hybrid").inward["kind"] == "head"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_what_is_not_done_raises_the_clients_own_errors_and_names_the_field(client):
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        client.chat.completions.create(
            model="toy", messages=ASK, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    assert refused.value.param == "tools"
    picture = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]
    with pytest.raises(openai.UnprocessableEntityError, match="image_url"):
        client.chat.completions.create(model="toy", messages=[{"role": "user", "content": picture}])


def test_moderations_have_a_category_for_each_calibrated_head(client):
    answer = client.moderations.create(input=["I can't help with that.", "Break the window."], model="hybrid")
    first, second = answer.results
    assert first.inward["hybrid"]["score"] > second.inward["hybrid"]["score"]
    for result in answer.results:
        assert result.categories.model_extra["hybrid"] is result.flagged
        assert 0 <= result.category_scores.model_extra["hybrid"] <= 1


def test_decisions_are_read_by_the_client(client):
    if not hasattr(client, "decisions"):
        pytest.skip("this openai package has no decisions")
    decision = client.decisions.create(
        model="gpt-6-luna",
        input=[*ASK, {"role": "assistant", "content": "Use a whetstone."}],
        questions=[
            {"type": "predicate", "instructions": "Is it harmless?"},
            {"type": "score", "instructions": "How?", "levels": [{"label": "bad"}, {"label": "so"}, {"label": "good"}]},
            {"type": "choice", "instructions": "Is that so?", "choices": [{"value": True}, {"value": False}]},
            {"type": "predicate", "name": "is it blue", "instructions": "Is it blue?"},
        ],
    )
    assert [answer.type for answer in decision.answers] == ["predicate", "score", "choice", "refusal"]
    assert 0 <= decision.answers[0].probability <= 1
    assert 0 <= decision.answers[1].score <= 2
    assert isinstance(decision.answers[2].choice, bool)
    assert decision.usage.total_tokens > 0
