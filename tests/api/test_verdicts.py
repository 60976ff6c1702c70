"""Heads as judges, on an intake that gives a text the score of its length; ``test_openai_client`` has OpenAI's own
client, ``tests/litellm`` a real proxy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from support.fake_services import HYBRID, LEGEND, MAX_TOKENS, SRR, FakeServices, error

ACCEPTABLE = {"acceptable": {"rates": [0.01, 0.5], "scores": [5.0, 50.0]}}
ASK = {"type": "predicate", "instructions": "?"}
CHOICE = {"type": "choice", "instructions": "?"}
SHOWN = {"role": "user", "content": [{"type": "input_image"}]}
LEVELS = [{"label": "low"}, {"label": "high"}]
DECILES = {"score_deciles": [10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0]}


@pytest.fixture
def api() -> FakeServices:
    api = FakeServices(LEGEND, HYBRID, SRR)
    api.head_control.calibrations[HYBRID.name] = ACCEPTABLE | DECILES
    return api


async def post(api: FakeServices, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = await api.post(path, body)
    assert response.status_code == 200, response.text
    return response.json()


async def test_a_text_below_the_threshold_is_flagged_by_each_head_that_knows_its_own(api):
    body = await post(api, "/v1/moderations", {"input": ["bad", "long enough"], "model": "omni-moderation-latest"})
    bad, good = body["results"]
    assert (bad["flagged"], good["flagged"]) == (True, False)
    assert bad["categories"] == {HYBRID.name: True}  # the LEGEND head knows no threshold
    assert bad["inward"] == {HYBRID.name: {"score": 3.0, "threshold": 5.0, "false_positives": 0.01, "estimated": False}}
    assert 0 <= bad["category_scores"][HYBRID.name] <= 1


async def test_a_rate_moves_the_threshold_and_a_head_can_be_asked_alone(api):
    api.head_control.calibrations[LEGEND.name] = ACCEPTABLE
    texts = {"input": "long enough", "false_positives": 0.5}
    both = (await post(api, "/v1/moderations", texts))["results"][0]
    assert both["categories"] == {HYBRID.name: True, LEGEND.name: True}
    for asked in ({"model": LEGEND.name}, {"head": LEGEND.name}):
        assert (await post(api, "/v1/moderations", {**texts, **asked}))["results"][0]["categories"] == {
            LEGEND.name: True
        }


async def test_parts_are_one_text_and_the_prompt_is_context(api):
    body = {"input": [{"type": "text", "text": "long "}, {"type": "text", "text": "enough"}], "prompt": "Well?"}
    assert len((await post(api, "/v1/moderations", body))["results"]) == 1
    (group,) = api.intake.calls[-1]["groups"]
    assert "".join(map(chr, group.prompt_ids)).startswith("Well?")
    assert len(group.responses_ids[0]) == len("long enough")


@pytest.mark.parametrize(
    ("path", "change", "status", "param"),
    [
        ("/v1/moderations", {"input": [{"type": "image_url"}]}, 422, "input.0"),
        ("/v1/moderations", {"input": ["ok", "x" * MAX_TOKENS]}, 413, "input.1"),
        ("/v1/moderations", {"input": "ok", "head": LEGEND.name}, 422, "head"),
        ("/v1/moderations", {"input": "ok", "head": SRR.name}, 404, "head"),
        ("/v1/moderations", {"input": "ok", "model": SRR.name}, 404, "model"),
        ("/v1/moderations", {"input": "ok", "head": HYBRID.name, "false_positives": 0.001}, 422, "false_positives"),
        ("/v1/moderations", {"input": "ok", "false_positive": 0.1}, 422, "false_positive"),
        ("/v1/moderations", {"input": "ok", "promt": "Well?"}, 422, "promt"),
        ("/v1/moderations", {"input": []}, 422, "input"),
        ("/v1/moderations", {"input": ["ok"] * 51}, 413, "input"),
        ("/v1/decisions", {"input": "ok", "questions": []}, 422, "questions"),
        ("/v1/decisions", {"input": "ok", "questions": [CHOICE]}, 422, "questions.0.choices"),
        ("/v1/decisions", {"input": [SHOWN], "questions": [ASK]}, 422, "input.0.content.0"),
        (
            "/beta/litellm_basic_guardrail_api",
            {"texts": ["ok"], "additional_provider_specific_params": {"false_positive": 0.1}},
            422,
            "additional_provider_specific_params.false_positive",
        ),
        ("/beta/litellm_basic_guardrail_api", {"texts": ["ok"], "images": ["data:"]}, 422, "images"),
        ("/beta/litellm_basic_guardrail_api", {"texts": ["ok"], "tool_calls": [{}]}, 422, "tool_calls"),
        ("/beta/litellm_basic_guardrail_api", {"texts": ["ok", "x" * MAX_TOKENS]}, 413, "texts.1"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
async def test_what_can_not_be_judged_is_an_error_and_no_verdict(api, path, change, status, param):
    response = await api.post(path, change)
    assert (response.status_code, error(response)["param"]) == (status, param)


async def test_without_a_calibrated_head_nothing_is_moderated(api):
    api.head_control.calibrations.clear()
    response = await api.post("/v1/moderations", {"input": "ok"})
    assert (response.status_code, error(response)["param"]) == (404, "head")


async def test_a_rate_that_no_head_is_calibrated_for_is_told_with_those_that_are(api):
    api.head_control.calibrations[LEGEND.name] = {"acceptable": {"rates": [0.02, 0.5], "scores": [5.0, 50.0]}}
    response = await api.post("/v1/moderations", {"input": "ok", "false_positives": 0.0001})
    assert (response.status_code, error(response)["param"]) == (422, "false_positives")
    assert f"{HYBRID.name!r} 0.01 to 0.5" in error(response)["message"]
    assert f"{LEGEND.name!r} 0.02 to 0.5" in error(response)["message"]


async def test_a_model_that_names_a_head_which_can_not_judge_has_no_decision(api):
    for named in ({"model": SRR.name}, {"head": SRR.name}):
        (answer,) = (await post(api, "/v1/decisions", {"input": "ok", "questions": [ASK], **named}))["answers"]
        assert answer["type"] == "refusal"


async def test_a_score_that_is_not_finite_is_an_error_and_no_verdict(api):
    from dataclasses import replace

    api.intake.outcome = lambda i, scored: replace(
        scored, scores=tuple(replace(scores, scores_N=(None,)) for scores in scored.scores)
    )
    for path, body in (("/v1/moderations", {"input": "ok"}), ("/beta/litellm_basic_guardrail_api", {"texts": ["ok"]})):
        assert (await api.post(path, body)).status_code == 500


async def test_the_guardrail_blocks_what_is_below_the_threshold_without_repeating_it(api):
    async def ask(**body: Any) -> dict[str, Any]:
        return await post(
            api, "/beta/litellm_basic_guardrail_api", {"input_type": "response", "request_data": {}, **body}
        )

    assert await ask(texts=["long enough", "also fine"]) == {"action": "NONE", "blocked_reason": None}
    blocked = await ask(texts=["long enough", "bad"])
    assert blocked["action"] == "BLOCKED"
    assert blocked["blocked_reason"] == (
        "the head 'helpful' scores 3.000, below its threshold 5.000 (1.00% false positives)"
    )
    strict = {"false_positives": 0.5, "head": HYBRID.name}
    assert (await ask(texts=["long enough"], additional_provider_specific_params=strict))["action"] == "BLOCKED"
    calls = len(api.intake.calls)
    assert (await ask(texts=["", " "]))["action"] == "NONE"
    assert (await ask())["action"] == "NONE"
    assert len(api.intake.calls) == calls
    only = {"text_only": True}
    assert (await ask(texts=["fine text"], images=["data:"], additional_provider_specific_params=only))[
        "action"
    ] == "NONE"


async def test_a_response_is_judged_after_what_was_asked_and_a_request_by_itself(api):
    turns = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "long enough"}]
    for kind, begins in (("response", "Well?"), ("request", "\n\n")):
        await post(
            api,
            "/beta/litellm_basic_guardrail_api",
            {"input_type": kind, "texts": ["long enough"], "structured_messages": turns},
        )
        (group,) = api.intake.calls[-1]["groups"]
        assert "".join(map(chr, group.prompt_ids)).startswith(begins)


@pytest.mark.parametrize(
    ("content", "begins"),
    [
        ([{"type": "text", "text": "Well?"}, {"type": "image_url", "image_url": {"url": "data:"}}], "Well?"),
        ([{"type": "image_url", "image_url": {"url": "data:"}}], "\n\n"),  # a turn without text
    ],
)
async def test_text_only_lets_images_pass_in_the_context_of_a_response_too(api, content, begins):
    body = {
        "input_type": "response",
        "texts": ["long enough"],
        "structured_messages": [{"role": "user", "content": content}],
    }
    path = "/beta/litellm_basic_guardrail_api"
    refused = await api.post(path, body)
    assert (refused.status_code, error(refused)["param"][:-1]) == (422, "structured_messages.0.content.")
    only = {"additional_provider_specific_params": {"text_only": True}}
    await post(api, path, body | only)
    (group,) = api.intake.calls[-1]["groups"]
    assert "".join(map(chr, group.prompt_ids)).startswith(begins)


@pytest.mark.parametrize(
    ("turn", "read"),
    [
        ({"role": "assistant", "content": None, "tool_calls": [{}]}, True),
        ({"role": "user", "content": [{"type": "text", "text": 5}]}, False),
        ({"role": "user", "content": None}, False),
        ({"content": "go on"}, False),
    ],
)
async def test_text_only_loses_no_turn_and_lets_nothing_malformed_pass(api, turn, read):
    asked = [{"role": "user", "content": "Well?"}, turn, {"role": "user", "content": "And?"}]
    body = {"input_type": "response", "texts": ["long enough"], "structured_messages": asked}
    only = {"additional_provider_specific_params": {"text_only": True}}
    response = await api.post("/beta/litellm_basic_guardrail_api", body | only)
    assert response.status_code == (200 if read else 422), response.text
    if read:
        text = "".join(map(chr, api.intake.calls[-1]["groups"][0].prompt_ids))
        assert text.index("Well?") < text.index("And?")


STRICTER = {"acceptable": {"rates": [0.01, 0.5], "scores": [12.0, 50.0]}, "score_deciles": [1.0 + i for i in range(9)]}
VERDICTS = [
    ("/v1/moderations", {"input": "long enough"}, lambda body: body["results"][0]["flagged"]),
    ("/beta/litellm_basic_guardrail_api", {"texts": ["long enough"]}, lambda body: body["action"] == "BLOCKED"),
    (
        "/v1/decisions",
        {
            "input": "long enough",
            "questions": [{"type": "score", "name": HYBRID.name, "instructions": "", "levels": LEVELS}],
        },
        lambda body: body["answers"][0]["score"] == 1.0,
    ),
]


@pytest.mark.parametrize(("path", "body", "strict"), VERDICTS)
async def test_a_head_that_is_switched_meanwhile_is_judged_by_its_own_thresholds(api, path, body, strict):
    """What is known is of the version that is active when the request begins; its texts are read by the next one."""
    score, known = api.intake.score, api.head_control

    async def after_a_switch(*args: Any, **options: Any) -> Any:
        api.refs[HYBRID.name] = known.refs[HYBRID.name] = replace(HYBRID, version=HYBRID.version + 1)
        known.calibrations[HYBRID.name] = STRICTER
        return await score(*args, **options)

    assert not strict(await post(api, path, body))
    api.intake.score = after_a_switch
    assert strict(await post(api, path, body))


async def test_what_a_replica_has_not_heard_of_yet_is_asked_for(api):
    """A worker has switched; the replica knows of it when it looks."""
    new = replace(HYBRID, version=HYBRID.version + 1)
    api.intake.outcome = lambda i, s: replace(s, heads=(new,))

    def refreshed() -> None:
        api.head_control.refs[HYBRID.name] = new
        api.head_control.calibrations[HYBRID.name] = STRICTER

    api.head_control.refreshed = refreshed
    path, body, strict = VERDICTS[0]
    assert strict(await post(api, path, body))
    assert len(api.intake.calls) == 1


@pytest.mark.parametrize(("path", "body", "strict"), VERDICTS)
async def test_without_the_thresholds_of_the_version_that_read_there_is_no_verdict(api, path, body, strict):
    api.intake.outcome = lambda i, s: replace(s, heads=tuple(replace(head, version=99) for head in s.heads))
    response = await api.post(path, body)
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")


async def test_the_setting_names_the_head_that_guards(api):
    from inward.api.app import create_app

    api.services = replace(api.services, guard_head=LEGEND.name)
    api.app = create_app(api.services)
    response = await api.post("/beta/litellm_basic_guardrail_api", {"texts": ["ok"]})
    assert (response.status_code, error(response)["param"]) == (422, "head")  # not calibrated: no quiet fallback


async def test_questions_are_answered_in_their_order_by_those_who_can(api):
    questions = [
        {"type": "score", "name": HYBRID.name, "instructions": "", "levels": [{"label": "low"}, {"label": "high"}]},
        {"type": "predicate", "instructions": "Is it fine?"},
        {"type": "choice", "name": "best", "instructions": "Which?", "choices": [{"value": "a"}, {"value": "abc"}]},
        {"type": "predicate", "name": "is it blue", "instructions": ""},
        {"type": "predicate", "name": LEGEND.name, "instructions": ""},
    ]
    body = await post(api, "/v1/decisions", {"model": "gpt-6-luna", "input": "x" * 50, "questions": questions})
    score, predicate, choice, unknown, uncalibrated = body["answers"]
    assert score["score"] == pytest.approx(0.5)  # the middle of the calibration set
    assert [(p["label"], p["value"], p["probability"]) for p in score["probabilities"]] == [
        ("low", 0, 0.5), ("high", 1, 0.5),
    ]  # fmt: skip
    assert predicate == {"type": "predicate", "name": None, "probability": 0.5}
    assert (choice["name"], choice["choice"]) == ("best", "abc")
    assert sum(p["probability"] for p in choice["probabilities"]) == pytest.approx(1)
    assert unknown == {"type": "refusal", "name": "is it blue"}
    assert uncalibrated == {"type": "refusal", "name": LEGEND.name}
    assert body["usage"]["total_tokens"] == body["usage"]["input_tokens"] > 50
    assert api.intake.calls[0]["heads"] == tuple(sorted({HYBRID.name, LEGEND.name}))  # one pass for all


async def test_a_conversation_that_ends_with_the_user_is_not_judged_by_its_last_turn_alone(api):
    turns = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "No."}]
    response = await api.post("/v1/decisions", {"input": [*turns, turns[0]], "questions": [ASK]})
    assert (response.status_code, error(response)["param"]) == (422, "input")
    await post(
        api,
        "/v1/decisions",
        {"input": [*turns, turns[0]], "questions": [{**CHOICE, "choices": [{"value": "a"}, {"value": "b"}]}]},
    )
    (group,) = api.intake.calls[-1]["groups"]  # a choice is asked after all of them
    assert "No." in "".join(map(chr, group.prompt_ids))


async def test_a_question_joins_the_input_where_two_turns_of_the_user_may_not_follow_each_other(api):
    from inward.api.app import create_app
    from inward.prompts import Prompts
    from support.chat_templates import tokenizer_of

    api.services = replace(api.services, prompts=Prompts(tokenizer_of("mistral"), max_tokens=MAX_TOKENS))
    api.app = create_app(api.services)
    which = {"type": "choice", "instructions": "Which?", "choices": [{"value": "a"}, {"value": "abc"}]}
    body = await post(api, "/v1/decisions", {"input": "Two letters.", "questions": [which]})
    assert body["answers"][0]["choice"] == "abc"


@pytest.mark.parametrize("path", ["/v1/moderations", "/v1/decisions", "/beta/litellm_basic_guardrail_api"])
async def test_a_key_is_needed(path):
    api = FakeServices(keys=frozenset({"secret"}))
    assert (await api.post(path, {})).status_code == 401
    assert (await api.post(path, {}, headers={"x-api-key": "wrong"})).status_code == 401
    for headers in ({"authorization": "Bearer secret"}, {"x-api-key": "secret"}):
        assert (await api.post(path, {}, headers=headers)).status_code != 401
