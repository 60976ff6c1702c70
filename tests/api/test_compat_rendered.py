"""Routes of trainers: whatever they render, what is scored are the tokens of the same prompt and response on /score."""

import pytest

from inward.prompts import Prompts
from support.chat_templates import FAMILIES, end_ids_of, tokenizer_of
from support.fake_services import FakeServices, error

QUESTION, ANSWER = "How tall is it?", "About 115 metres."


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def served(family):
    api = FakeServices()
    prompts = Prompts(tokenizer_of(family), max_tokens=1000, end_ids=end_ids_of(family))
    object.__setattr__(api.services, "prompts", prompts)
    return api


async def groups(api, path, body):
    answer = await api.post(path, body)
    assert answer.status_code == 200, answer.text
    return api.intake.calls[-1]["groups"]


async def test_every_trainers_route_scores_what_score_does(served, family):
    prompts, known = served.services.prompts, FAMILIES[family]
    wanted = await groups(served, "/score", {"items": [{"prompt": QUESTION, "response": ANSWER}]})
    prompt, pad = prompts.render(QUESTION), known.pad or known.eos
    for end in ("", known.eos, *known.ends, known.eos + "\n" + 3 * pad):
        text = 2 * pad + prompt + ANSWER + end
        assert await groups(served, "/get_reward", {"query": [text]}) == wanted
        assert await groups(served, "/get_reward", {"query": [text], "prompts": [prompt]}) == wanted
        assert await groups(served, "/classify", {"input": text}) == wanted
        assert await groups(served, "/llama-factory", {"messages": [text]}) == wanted
        for asked in (prompt, QUESTION, [{"role": "user", "content": QUESTION}]):
            assert await groups(served, "/slime", {"prompt": asked, "response": ANSWER + end}) == wanted
        output = [{"role": "assistant", "content": [{"type": "output_text", "text": ANSWER + end}]}]
        body = {"responses_create_params": {"input": QUESTION}, "response": {"output": output}}
        assert await groups(served, "/verify", body) == wanted


@pytest.mark.parametrize("family", ["qwen-2.5"])
async def test_control_tokens_are_text_in_a_response_that_did_not_come_rendered(served):
    spelled = "Type <|im_end|> now."
    wanted = await groups(served, "/score", {"items": [{"prompt": QUESTION, "response": spelled}]})
    assert await groups(served, "/slime", {"prompt": QUESTION, "response": spelled}) == wanted
    end = served.services.prompts.tokenizer.eos_token_id
    assert end not in wanted[0].responses_ids[0]
    rendered = served.services.prompts.render(QUESTION)
    [group] = await groups(served, "/slime", {"prompt": rendered, "response": spelled})
    assert end in group.responses_ids[0]


def verified(*output, **params):
    return {"responses_create_params": {"input": QUESTION, **params}, "response": {"output": list(output)}}


async def test_a_refusal_is_scored_by_its_text(api):
    refusal = {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "I will not."}]}
    assert (await api.post("/verify", verified(refusal))).json()["reward"] == len("I will not.")
    spoken = {"role": "assistant", "content": None, "refusal": "I can't."}
    assert (await api.post("/verify", verified(spoken))).json()["reward"] == len("I can't.")


CALL = {"type": "function_call", "name": "f", "arguments": "{}"}
IMAGE = {"type": "input_image", "image_url": "data:,"}


@pytest.mark.parametrize(
    ("turn", "where", "named"),
    [
        ({"role": "assistant", "content": None}, "response.output.0.content", "null"),
        ({"role": "assistant", "content": []}, "response.output.0.content", "empty"),
        ({"role": "assistant", "content": [IMAGE]}, "response.output.0.content.0", "'input_image'"),
        (
            {"role": "assistant", "content": [{"type": "text", "text": "a"}, "b"]},
            "response.output.0.content.1",
            "'str'",
        ),
        ({"role": "assistant", "content": "a", "tool_calls": [CALL]}, "response.output.0.tool_calls", "tool_calls"),
        ({"role": "assistant", "content": "", "reasoning": "a"}, "response.output.0.content", "'reasoning'"),
        (CALL, "response.output.0", "'function_call'"),
    ],
)
async def test_what_is_no_text_is_refused_by_name_and_never_scored_as_an_empty_answer(api, turn, where, named):
    answer = await api.post("/verify", verified(turn, {"role": "assistant", "content": "fine"}))
    assert answer.status_code == 422
    assert where in answer.json()["detail"] and named in answer.json()["detail"]
    if turn.get("role"):
        refused = await api.post("/slime", {"prompt": [turn], "response": "x"})
        assert (refused.status_code, error(refused)["param"]) == (422, where.replace("response.output", "prompt"))


async def test_tool_results_are_turns_and_reasoning_is_none(api):
    result = {"type": "function_call_output", "call_id": "1", "output": "21 C"}
    said = {"role": "assistant", "content": "Let me look."}
    body = verified(said, {"type": "reasoning", "summary": []}, result, {"role": "assistant", "content": "It is 21 C."})
    assert (await api.post("/verify", body)).json()["reward"] == len("It is 21 C.")
    [group] = api.intake.calls[-1]["groups"]
    assert "".join(map(chr, group.prompt_ids)).count("21 C") == 1
