"""OpenAI's routes through the whole corridor, on the fake backbone; ``test_openai_client`` has its own client."""

from __future__ import annotations

import json
from typing import Any

import pytest

from api.test_drawn import serving
from api.test_stream import ListHead
from inward.types import SamplingSpec
from support.corridor import FakeHead
from support.fake_services import LEGEND, MAX_TOKENS, SRR, FakeServices, error

CHAT = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Which way?"}], "max_tokens": 20, "seed": 3}
TEXT = {"model": "gpt-4o", "prompt": "Once upon", "max_tokens": 20, "seed": 3}

OTHERS = """
    audio best_of echo frequency_penalty function_call functions logit_bias logprobs max_completion_tokens
    max_tokens messages metadata modalities model moderation n parallel_tool_calls prediction presence_penalty
    prompt prompt_cache_key prompt_cache_options prompt_cache_retention reasoning_effort response_format
    safety_identifier seed service_tier stop store stream stream_options suffix temperature tool_choice tools
    repetition_penalty_range repetition_penalty_slope repetition_penalty_decay
    top_logprobs top_p user verbosity web_search_options add_generation_prompt add_special_tokens allowed_token_ids
    bad_words cache_salt chat_template chat_template_kwargs continue_final_message detokenize documents
    early_stopping guided_choice guided_decoding_backend guided_grammar guided_json guided_regex
    guided_whitespace_pattern ignore_eos include_reasoning include_stop_str_in_output kv_transfer_params
    length_penalty logits_processors media_io_kwargs min_p min_tokens mm_processor_kwargs priority prompt_embeds
    prompt_logprobs repetition_detection repetition_penalty request_id return_prompt_text return_token_ids
    return_tokens_as_token_ids skip_special_tokens spaces_between_special_tokens stop_token_ids structural_tag
    structured_outputs thinking_token_budget tokenization_kwargs top_k truncate_prompt_tokens truncation
    truncation_side use_beam_search vllm_xargs extra_body extra_headers extra_query drop_params num_retries api_key
    base_url min_k mirostat n_predict num_beams num_predict think thinking tfs_z top_a top_n_sigma typical_p
""".split()
"""What OpenAI's clients, vLLM's and gateways before and beside it send."""


async def ask(path: str, body: dict[str, Any]) -> dict[str, Any]:
    async with serving() as (api, _):
        response = await api.post(path, body)
    assert response.status_code == 200, response.text
    return response.json()


async def refused(path: str, body: dict[str, Any]) -> tuple[int, str | None]:
    async with serving() as (api, c):
        response = await api.post(path, body)
        assert not c.backbone.computed
    return response.status_code, error(response)["param"]


def chunks(text: str) -> list[dict[str, Any]]:
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    assert blocks.pop() == "data: [DONE]"
    assert all(block.startswith("data: ") for block in blocks)
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


async def test_the_best_of_those_drawn_are_given_best_first_and_usage_counts_all():
    ranked = await ask("/rerank", {"messages": CHAT["messages"], "n": 6, "sampling": {"seed": 3, "max_tokens": 20}})
    body = await ask("/v1/chat/completions", {**CHAT, "best_of": 6, "n": 2})
    texts = [choice["message"]["content"] for choice in body["choices"]]
    assert texts == [result["text"] for result in ranked["results"][:2]]
    assert [choice["inward"]["score"] for choice in body["choices"]] == [r["score"] for r in ranked["results"][:2]]
    assert [choice["inward"]["drawn"] for choice in body["choices"]] == [r["index"] for r in ranked["results"][:2]]
    assert {choice["inward"]["of"] for choice in body["choices"]} == {6}
    assert body["choices"][0]["inward"]["head"] == {"name": LEGEND.name, "kind": "legend", "version": LEGEND.version}
    assert body["usage"]["completion_tokens"] == ranked["usage"]["completion_tokens"]
    assert body["usage"]["prompt_tokens"] == len("Which way?\n\n")
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"]
    assert body["object"] == "chat.completion"
    assert body["model"] == "tiny"


async def test_a_text_is_gone_on_with_as_it_is_and_several_have_their_own_choices():
    async with serving() as (api, c):
        body = (await api.post("/v1/completions", {**TEXT, "prompt": ["Once", "Twice up"], "n": 2})).json()
        prompts = {"".join(map(chr, group.prompt_ids)) for group in c.backbone.computed}
    assert prompts == {"Once", "Twice up"}  # no template
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["prompt_tokens"] == len("Once") + len("Twice up")
    for first, second in (body["choices"][:2], body["choices"][2:]):
        assert first["inward"]["score"] >= second["inward"]["score"]


async def test_sampling_fields_reach_the_backbone_and_null_is_as_if_a_field_were_not_there():
    seen = []
    options = {"temperature": 0.5, "top_p": 0.9, "top_k": 8, "min_p": 0.1, "repetition_penalty": 1.2}
    async with serving() as (api, c):
        draw = c.backbone.sample

        async def spy(group):
            seen.append(group.sampling)
            return await draw(group)

        c.backbone.sample = spy
        await api.post("/v1/chat/completions", {**CHAT, **options, "seed": -1, "stop": "\n"})
        await api.post("/v1/completions", {"prompt": "p", "stop": ["a", "b"], **dict.fromkeys([*options, "n", "seed"])})
    first, second = seen
    assert first == SamplingSpec(n=1, max_tokens=20, seed=2**32 - 1, stop=("\n",), **options)
    assert second == SamplingSpec(n=1, max_tokens=MAX_TOKENS - 2, stop=("a", "b"))


async def test_all_tokens_are_asked_for_as_vllms_clients_do():
    assert (await ask("/v1/completions", {**TEXT, "top_k": -1}))["choices"] == (await ask("/v1/completions", TEXT))[
        "choices"
    ]


async def test_a_completion_may_say_no_too():
    assert await ask("/v1/completions", {**TEXT, "logprobs": None, "echo": False, "suffix": None})


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"tools": [{"type": "function"}]}, 422, "tools"),
        ({"tool_choice": "required"}, 422, "tool_choice"),
        ({"logprobs": True}, 422, "logprobs"),
        ({"response_format": {"type": "json_object"}}, 422, "response_format"),
        ({"frequency_penalty": 0.5}, 422, "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, 422, "logit_bias"),
        ({"n": 3, "best_of": 2}, 422, "best_of"),
        ({"early_rejection": {"keep": 0.5}}, 422, "early_rejection.at"),
        ({"early_rejection": {"keep": 0.5, "at": [20]}}, 422, "early_rejection.at"),
        ({"stopwhen": {"below": 0}}, 422, "stopwhen"),
        ({"stop_wen": {"below": 0}}, 422, "stop_wen"),
        ({"stopWhen": {"below": 0}}, 422, "stopWhen"),
        ({"earlyrejection": {"keep": 0.5, "at": [4]}}, 422, "earlyrejection"),
        ({"bestof": 4}, 422, "bestof"),
        ({"heads": "hybrid"}, 422, "heads"),
        ({"time_out": 5}, 422, "time_out"),
        ({"stop_when": {"below": 0, "fpr": 0.1}}, 422, "stop_when.fpr"),
        ({"stop_when": {"below": 0, "head": "nobody"}}, 404, "stop_when.head"),
        ({"best_of": 11}, 413, "best_of"),
        ({"n": 11}, 413, "n"),
        ({"max_tokens": MAX_TOKENS}, 413, "max_tokens"),
        ({"max_tokens": None, "max_completion_tokens": MAX_TOKENS}, 413, "max_completion_tokens"),
        ({"temperature": 11}, 422, "temperature"),
        ({"stop": [""]}, 422, "stop.0"),
        ({"head": "nobody"}, 404, "head"),
        ({"model": "v1"}, 404, "model"),
        ({"messages": []}, 422, "messages"),
        ({"messages": [{"role": "user", "content": "x" * MAX_TOKENS}]}, 413, "messages"),
        ({"messages": [{"role": "oracle", "content": "x"}]}, 422, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 422, "messages.0.content.0"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, 422, "messages.0.tool_calls"),
    ],
    ids=lambda value: str(value)[:50],
)
async def test_what_can_not_be_done_is_refused_by_its_field(change, status, param):
    assert await refused("/v1/chat/completions", {**CHAT, **change}) == (status, param)


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"echo": True}, 422, "echo"),
        ({"suffix": "end"}, 422, "suffix"),
        ({"logprobs": 3}, 422, "logprobs"),
        ({"logprobs": 0}, 422, "logprobs"),
        ({"prompt": [1, 2]}, 422, "prompt"),
        ({"prompt": ["a", "b"], "stream": True}, 422, "stream"),
        ({"prompt": ["a"] * 6, "n": 2}, 413, "n"),
        ({"prompt": ""}, 422, "prompt"),
    ],
    ids=lambda value: str(value)[:50],
)
async def test_what_can_not_be_completed_is_refused_by_its_field(change, status, param):
    assert await refused("/v1/completions", {**TEXT, **change}) == (status, param)


async def test_fields_that_say_no_are_let_pass():
    no = {"tools": [], "tool_choice": "auto", "logprobs": False, "frequency_penalty": 0, "logit_bias": None}
    assert await ask("/v1/chat/completions", {**CHAT, **no, "response_format": {"type": "text"}, "user": "me"})


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)])
async def test_parameters_of_openai_and_vllm_are_no_misspelt_ones_of_ours(path, body):
    assert await ask(path, {**dict.fromkeys(OTHERS), "stop_when\u20ac": 1, **body})
    async with serving() as (api, _):
        half = await api.post(path, json.dumps({**body, "stop_whe\ud800": 1}).encode())
    assert half.status_code == 200  # half a character can't be told


async def test_a_misspelt_field_is_told_with_the_one_that_was_meant():
    async with serving() as (api, _):
        response = await api.post("/v1/chat/completions", {**CHAT, "stop_wen": {"below": 0}})
    assert error(response)["message"] == "stop_wen is not a field of this request; did you mean `stop_when`?"


async def test_a_stream_tells_the_progress_and_then_gives_the_best():
    body = {**CHAT, "best_of": 5, "n": 2, "stream": True, "stream_options": {"include_usage": True}}
    async with serving() as (api, c):
        response = await api.post("/v1/chat/completions", body)
        drawn = sum(len(group.responses_ids[0]) for group in c.backbone.computed)
    assert response.headers["content-type"].startswith("text/event-stream")
    *pieces, last = chunks(response.text)
    assert {piece["object"] for piece in pieces} == {"chat.completion.chunk"}
    assert len({piece["id"] for piece in [*pieces, last]}) == 1
    progress = [piece["inward"] for piece in pieces if "inward" in piece]
    assert [(p["drawn"], p["of"]) for p in progress] == [(i, 5) for i in range(1, 6)]
    said = [piece["choices"][0] for piece in pieces if "inward" not in piece]
    assert [one["index"] for one in said] == [0, 0, 1, 1]
    ends = said[1::2]
    assert [end["delta"] for end in ends] == [{}, {}]
    assert ends[0]["inward"]["score"] == progress[-1]["best"]
    assert ends[0]["inward"]["score"] >= ends[1]["inward"]["score"]
    assert all(one["delta"]["content"] and one["finish_reason"] is None for one in said[::2])
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == drawn


async def test_a_stream_with_early_rejection_tells_who_was_rejected_and_gives_what_is_given_without_it():
    body = {**CHAT, "best_of": 6, "early_rejection": {"keep": 0.5, "at": [4, 8]}}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    async with serving() as (api, c):
        response = await api.post("/v1/chat/completions", {**body, **options})
        groups = len(c.backbone.computed)
    whole = await ask("/v1/chat/completions", body)
    *pieces, last = chunks(response.text)
    progress = [piece["inward"] for piece in pieces if "inward" in piece]
    assert [(p["drawn"], p["of"]) for p in progress] == [(i, 6) for i in range(1, 7)]
    counts = [p["rejected"] for p in progress]
    assert counts == sorted(counts) and counts[-1] > 0
    assert progress[-1]["not_drawn_tokens"] == last["usage"]["not_drawn_tokens"] > 0
    text, end = [piece["choices"][0] for piece in pieces if "inward" not in piece]
    assert text["delta"]["content"] == whole["choices"][0]["message"]["content"]
    assert end["inward"] == whole["choices"][0]["inward"]
    assert end["inward"]["score"] == pytest.approx(progress[-1]["best"])
    assert last["usage"] == whole["usage"]
    assert groups > 1  # each that was drawn to its end was read by itself, and all together in the end


async def test_one_answer_is_streamed_while_it_is_drawn(monkeypatch):
    monkeypatch.setattr("inward.queues.telling.TELL_INTERVAL_S", 0.0)
    whole = (await ask("/v1/completions", TEXT))["choices"][0]
    body = {**TEXT, "stream": True, "stream_options": {"include_usage": True}}
    async with serving() as (api, _):
        *texts, end, last = chunks((await api.post("/v1/completions", body)).text)
    assert len(texts) > 3
    assert "".join(chunk["choices"][0]["text"] for chunk in texts) == whole["text"]
    assert {chunk["choices"][0]["finish_reason"] for chunk in texts} == {None}
    assert end["choices"][0] == {**whole, "text": ""}
    assert (last["choices"], end["usage"]) == ([], None)


async def test_a_chat_says_its_role_once(monkeypatch):
    monkeypatch.setattr("inward.queues.telling.TELL_INTERVAL_S", 0.0)
    async with serving() as (api, _):
        first, *texts, end = chunks((await api.post("/v1/chat/completions", {**CHAT, "stream": True})).text)
    assert first["choices"][0]["delta"].keys() == {"role", "content"}
    assert {frozenset(chunk["choices"][0]["delta"]) for chunk in texts} == {frozenset({"content"})}
    assert end["choices"][0]["delta"] == {}


async def test_a_guard_ends_a_stream_before_what_is_not_safe(monkeypatch):
    monkeypatch.setattr("inward.queues.telling.TELL_INTERVAL_S", 0.0)
    guarded = {**TEXT, "stop_when": {"below": 0.0, "pool": "last"}}
    whole = (await ask("/v1/completions", guarded))["choices"][0]
    assert whole["finish_reason"] == "content_filter"
    async with serving() as (api, _):
        *texts, end = chunks((await api.post("/v1/completions", {**guarded, "stream": True})).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in texts) == whole["text"]
    assert end["choices"][0] == {**whole, "text": ""}


async def test_what_goes_wrong_in_a_stream_comes_in_the_error_shape():
    async with serving() as (api, c):
        c.backbone.fail_on(lambda group: True)
        response = await api.post("/v1/chat/completions", {**CHAT, "stream": True})
    assert '"error": {"message": "the fake backbone was told to fail' in response.text


async def test_a_head_as_model_ranks_and_a_list_is_ranked_as_a_whole():
    async with serving() as (api, c):
        api.refs[SRR.name] = SRR
        c.registry.heads[SRR.name] = ListHead(SRR.name, SRR.version)
        for options in ({}, {"stream": True}):
            response = await api.post("/v1/chat/completions", {**CHAT, "model": SRR.name, "best_of": 4, **options})
            rating = (chunks(response.text)[-1]["choices"][0] if options else response.json()["choices"][0])["inward"]
            assert rating["head"]["name"] == SRR.name
            assert rating["score"] == 3.0  # above the three others
            assert (rating["probability"], rating["share"]) == (None, 1.0)
            alone = await api.post("/v1/chat/completions", {**CHAT, "model": SRR.name, **options})
            rating = (chunks(alone.text)[-1]["choices"][0] if options else alone.json()["choices"][0])["inward"]
            assert (rating["probability"], rating["share"]) == (None, None)


async def test_models_are_the_backbone_the_policies_and_the_heads():
    async with serving() as (api, _):
        listed = (await api.get("/v1/models")).json()
        one = (await api.get(f"/v1/models/{LEGEND.name}")).json()
        none = await api.get("/v1/models/some/body")
    kinds = {model["id"]: model["inward"]["kind"] for model in listed["data"]}
    assert kinds == {"tiny": "backbone", "base": "policy", "v1": "policy", "v2": "policy", LEGEND.name: "head"}
    assert one == next(model for model in listed["data"] if model["id"] == LEGEND.name)
    assert (none.status_code, error(none)["param"]) == (404, "name")


async def test_what_may_end_an_answer_early_is_passed_on():
    seen = []
    async with serving() as (api, c):
        draw = c.backbone.sample

        async def spy(group, *rest):
            seen.append(group.sampling)
            return await draw(group, *rest)

        c.backbone.sample = spy
        early = {"keep": 0.5, "at": [4]}
        body = (await api.post("/v1/chat/completions", {**CHAT, "best_of": 4, "early_rejection": early})).json()
        guard = {"below": 100.0}
        ended = (await api.post("/v1/chat/completions", {**CHAT, "stop_when": guard})).json()["choices"][0]
    assert body["usage"]["not_drawn_tokens"] > 0
    assert body["choices"][0]["finish_reason"] in {"stop", "length"}
    assert (ended["finish_reason"], ended["inward"]["finish_reason"]) == ("content_filter", "guard")
    assert ended["message"]["content"] == ""


async def test_a_head_that_is_switched_meanwhile_ends_the_stream_with_an_error():
    async with serving() as (api, c):
        asks = 0
        draw = c.backbone.sample

        async def switching(group):
            nonlocal asks
            asks += 1
            c.registry.heads = {LEGEND.name: FakeHead(LEGEND.name, LEGEND.version + asks)}
            return await draw(group)

        c.backbone.sample = switching
        response = await api.post("/v1/chat/completions", {**CHAT, "stream": True, "best_of": 3})
    assert '"code": "unavailable"' in response.text


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny", "/v1/chat/completions", "/v1/completions"])
async def test_a_key_is_needed(path):
    api = FakeServices(keys=frozenset({"secret"}))
    assert (await api.get(path)).status_code == 401
    assert (await api.post(path, CHAT)).status_code == 401
    answer = await api.get(path, headers={"authorization": "Bearer secret"})
    assert answer.status_code in (200, 405)  # let in
