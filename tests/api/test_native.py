"""What the scoring routes answer, and that one bad item harms no other."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from inward.errors import DeadlineExceeded, EngineDead, InternalError, Overloaded
from inward.heads.hybrid import confidence
from inward.types import Scored, Scores
from support.fake_services import HYBRID, LEGEND, MAX_TOKENS, SRR, FakeServices, error

PAIR = {"prompt": "Which way?", "chosen": "To the left.", "rejected": "Left."}
ITEM = {"prompt": "Which way?", "response": "Left."}


async def test_margins_come_in_the_order_of_the_pairs(api):
    pairs = [{"prompt": "p", "chosen": "x" * n, "rejected": "y"} for n in (5, 2, 9)]
    body = (await api.post("/margin", {"pairs": pairs})).json()
    assert [m["margin"] for m in body["margins"]] == [4.0, 1.0, 8.0]


async def test_a_margin_answer_names_everything_it_should(api):
    body = (await api.post("/margin", {"pairs": [PAIR]})).json()
    assert body["model"] == "tiny"
    assert body["policy_version"] == "base"
    assert body["head"] == {"name": "harmless", "kind": "legend", "version": 3}
    drawn = {"drawn_tokens": 0, "not_drawn_tokens": 0}
    assert body["usage"] == {"prompt_tokens": 24, "completion_tokens": 17, "cached_tokens": 12} | drawn
    assert body["margins"] == [
        {
            "error": None, "truncated": False, "margin": 7.0, "margin_scaled": 3.5, "bin": 0.5,
            "chosen_score": 12.0, "rejected_score": 5.0, "label_agrees": True, "label_probability": 0.875,
            "confidence": 0.75,
        }
    ]  # fmt: skip


async def test_without_a_hybrid_head_there_is_no_confidence():
    api = FakeServices(LEGEND)
    body = (await api.post("/margin", {"pairs": [PAIR]})).json()
    assert body["margins"][0]["confidence"] is None
    assert api.intake.calls[0]["heads"] == ("harmless",)


async def test_a_hybrid_head_can_give_the_margins_and_is_asked_once(api):
    body = (await api.post("/margin", {"pairs": [PAIR], "head": "helpful"})).json()
    assert body["head"]["kind"] == "hybrid"
    assert body["margins"][0]["confidence"] == 0.75
    assert api.intake.calls[0]["heads"] == ("helpful",)


@pytest.mark.parametrize(
    "pair",
    [
        {"messages": [{"role": "user", "content": "p"}], "chosen": "aa", "rejected": "b"},
        {"prompt": [{"role": "user", "content": "p"}], "chosen": "aa", "rejected": "b"},
        {
            "prompt": [{"role": "user", "content": "p"}],
            "chosen": [{"role": "assistant", "content": "aa"}],
            "rejected": [{"role": "assistant", "content": "b"}],
        },
    ],
)
async def test_every_form_of_a_pair_is_the_same_pair(api, pair):
    plain = {"prompt": "p", "chosen": "aa", "rejected": "b"}
    await api.post("/margin", {"pairs": [plain, pair]})
    first, second = api.intake.calls[0]["groups"]
    assert first == second


async def test_an_item_may_be_messages_that_end_with_the_assistant(api):
    chat = {"messages": [{"role": "user", "content": "Which way?"}, {"role": "assistant", "content": "Left."}]}
    body = (await api.post("/score", {"items": [ITEM, chat]})).json()
    assert [s["score"] for s in body["scores"]] == [5.0, 5.0]
    first, second = api.intake.calls[0]["groups"]
    assert first == second


async def test_one_bad_item_in_a_list_does_not_harm_the_others(api):
    too_long = {"prompt": "p", "chosen": "x" * MAX_TOKENS, "rejected": "y"}
    half = b'{"prompt": "p", "chosen": "x", "rejected": "\\ud83d"}'
    roles = {"messages": [{"role": "assistant", "content": "hm"}], "chosen": "x", "rejected": "y"}
    unknown_role = {"messages": [{"role": "wizard", "content": "hm"}], "chosen": "x", "rejected": "y"}
    empty = {"prompt": "", "chosen": "", "rejected": "y"}
    two_turns = {
        "prompt": "p",
        "chosen": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}],
        "rejected": "y",
    }
    good = json.dumps(PAIR).encode()
    rows = [
        good,
        json.dumps(too_long).encode(),
        half,
        *(json.dumps(p).encode() for p in (roles, unknown_role, empty, two_turns)),
        good,
    ]
    response = await api.post("/margin", b'{"pairs": [' + b",".join(rows) + b"]}")
    assert response.status_code == 200
    margins = response.json()["margins"]
    assert [m["margin"] for m in margins] == [7.0, None, None, None, None, None, None, 7.0]
    assert [m["error"]["param"] for m in margins[1:-1]] == [
        "pairs.1.chosen", "pairs.2.rejected", "pairs.3.messages.0.role", "pairs.4.messages.0.role", "pairs.5.chosen",
        "pairs.6.chosen",
    ]  # fmt: skip
    assert [m["error"]["code"] for m in margins[1:-1]] == ["too_large"] + 5 * ["invalid_field"]


async def test_a_surrogate_in_the_prompt_is_blamed_on_the_field_it_came_in(api):
    body = b'{"items": [{"prompt": "\\udc00", "response": "x"}, {"prompt": [{"role": "user", "content": "\\udc00"}], "response": "x"}, {"prompt": "p", "response": "x"}]}'  # noqa: E501
    scores = (await api.post("/score", body)).json()["scores"]
    assert [s["error"] and s["error"]["param"] for s in scores] == ["items.0.prompt", "items.1.prompt.0.content", None]


async def test_if_no_item_can_be_used_the_request_fails_with_the_first_ones_error(api):
    response = await api.post(
        "/score", {"items": [{"prompt": "p", "response": "x" * MAX_TOKENS}, {"prompt": "", "response": ""}]}
    )
    assert response.status_code == 413
    assert error(response)["param"] == "items.0.response"


async def test_too_long_text_is_cut_where_asked_and_the_answer_says_so(api):
    items = [{"prompt": "p" * MAX_TOKENS, "response": "x"}, ITEM]
    scores = (await api.post("/score", {"items": items, "truncate": True})).json()["scores"]
    assert [(s["score"], s["truncated"]) for s in scores] == [(1.0, True), (5.0, False)]


async def test_details_come_only_on_request(api):
    plain = (await api.post("/score", {"items": [ITEM]})).json()["scores"][0]
    assert plain["layers"] is None and plain["tokens"] is None
    detailed = (await api.post("/score", {"items": [ITEM], "detail": ["layers", "tokens"]})).json()["scores"][0]
    assert detailed["layers"] == {"layers": [4], "values": [5.0]}
    assert detailed["tokens"] == [0.0, 1.0, 2.0, 3.0, 4.0]


async def test_a_score_that_is_not_finite_is_null_with_an_error_and_never_zero(api):
    api.intake.outcome = lambda i, s: replace(s, scores=(Scores((None,)),)) if i == 1 else s
    scores = (await api.post("/score", {"items": [ITEM, ITEM, ITEM]})).json()["scores"]
    assert [s["score"] for s in scores] == [5.0, None, 5.0]
    assert scores[1]["error"]["code"] == "not_finite"
    assert scores[1]["error"]["param"] == "items.1"


async def test_a_job_that_failed_is_an_error_in_its_place(api):
    api.intake.outcome = lambda i, s: InternalError("scoring failed (ValueError)") if i == 0 else s
    scores = (await api.post("/score", {"items": [ITEM, ITEM]})).json()["scores"]
    assert scores[0]["score"] is None and scores[0]["error"]["code"] == "internal_error"
    assert scores[1]["score"] == 5.0 and scores[1]["error"] is None


async def test_rewards_of_items_have_a_probability_and_of_pairs_a_confidence(api):
    items = (await api.post("/reward", {"items": [ITEM]})).json()
    assert items["head"]["kind"] == "hybrid"
    assert (items["rewards"][0]["score"], items["rewards"][0]["probability"]) == (5.0, 0.5)
    pairs = (await api.post("/reward", {"pairs": [PAIR]})).json()["rewards"][0]
    assert (pairs["margin"], pairs["confidence"], pairs["chosen_probability"]) == (7.0, 0.75, 0.5)
    assert pairs["chosen_layers"] is None


async def test_rewards_of_pairs_have_details_of_both_answers(api):
    [pair] = (await api.post("/reward", {"pairs": [PAIR], "detail": ["layers"]})).json()["rewards"]
    assert pair["chosen_layers"]["values"] == [pair["chosen_score"]]
    assert pair["rejected_layers"]["values"] == [pair["rejected_score"]]


async def test_rerank_gives_best_first_and_a_pair_for_dpo(api):
    body = (await api.post("/rerank", {"prompt": "p", "candidates": ["bb", "a", "dddd", "ccc"]})).json()
    assert [(r["index"], r["text"], r["score"]) for r in body["results"]] == [
        (2, "dddd", 4),
        (3, "ccc", 3),
        (0, "bb", 2),
        (1, "a", 1),
    ]
    assert body["best"] == body["results"][0]
    scores = {"chosen_score": 4.0, "rejected_score": 1.0}
    given = {"chosen_finish_reason": None, "rejected_finish_reason": None}  # nothing was drawn
    assert body["pair"] == {
        "prompt": "p",
        "chosen": "dddd",
        "rejected": "a",
        **scores,
        "margin": 3.0,
        "confidence": pytest.approx(float(confidence(4.0, 1.0))),
        **given,
    }
    assert body["listwise"] is False


@pytest.mark.parametrize(
    ("old", "value", "new"), [("scores", "dpo", "append_to"), ("token_ids", True, "return_token_ids")]
)
async def test_the_former_name_of_a_field_is_refused_with_the_one_it_has(api, old, value, new):
    answer = await api.post("/rerank", {"prompt": "p", "candidates": ["bb", "a"], old: value})
    assert answer.status_code == 422
    assert (error(answer)["param"], error(answer)["message"]) == (old, f"{old} is called `{new}`")


async def test_equal_candidates_make_no_pair_whatever_rounding_says(api):
    api.intake.outcome = lambda i, s: replace(s, scores=(Scores((1.0, 1.0000001)),))
    body = (await api.post("/rerank", {"prompt": "p", "candidates": ["same", "same"]})).json()
    assert [result["score"] for result in body["results"]] == [1.0000001, 1.0]
    assert body["pair"] is None


async def test_an_answer_names_the_model_also_while_no_worker_is_heard_of(api):
    def away():
        raise EngineDead("no worker")

    object.__setattr__(api.services, "info", away)
    for path, body in (("/margin", {"pairs": [PAIR]}), ("/rerank", {"prompt": "p", "candidates": ["bb", "a"]})):
        assert (await api.post(path, body)).json()["model"] == "tiny"
    assert (await api.post("/llama-factory", {"messages": ["abc"]})).json()["model"] == "tiny"


async def test_rerank_sends_all_candidates_as_one_group_and_says_when_scores_depend_on_the_list():
    api = FakeServices(SRR, LEGEND)
    body = (await api.post("/rerank", {"prompt": "p", "candidates": ["bb", "a"], "head": "lists"})).json()
    assert body["head"]["kind"] == "srr" and body["listwise"] is True
    assert body["pair"]["confidence"] is None
    (call,) = api.intake.calls
    assert [len(group.responses_ids) for group in call["groups"]] == [2]


async def test_the_confidence_of_the_pair_is_the_hybrid_heads_and_comes_from_the_pass_that_ranks():
    api = FakeServices(SRR, HYBRID)
    body = (await api.post("/rerank", {"prompt": "p", "candidates": ["bb", "a"], "head": "lists"})).json()
    assert body["pair"]["confidence"] == pytest.approx(float(confidence(2.0, 1.0)))
    assert [call["heads"] for call in api.intake.calls] == [("lists", "helpful")]


async def test_without_a_head_the_hybrid_one_ranks_else_legend_else_a_ranker_unless_the_setting_says_another():
    for refs, setting, ranks in (
        ((LEGEND, HYBRID, SRR), None, HYBRID),
        ((LEGEND, SRR), None, LEGEND),
        ((SRR,), None, SRR),
        ((LEGEND, HYBRID, SRR), SRR.name, SRR),
    ):
        api = FakeServices(*refs, rerank_head=setting)
        body = (await api.post("/rerank", {"prompt": "p", "candidates": ["bb", "a"]})).json()
        assert body["head"]["name"] == ranks.name


async def test_candidates_that_can_not_be_used_stand_last_with_their_errors(api):
    body = b'{"prompt": "p", "candidates": ["\\ud83d", "a", "' + b"x" * MAX_TOKENS + b'", "bb"]}'
    results = (await api.post("/rerank", body)).json()["results"]
    assert [(r["index"], r["score"]) for r in results] == [(3, 2.0), (1, 1.0), (0, None), (2, None)]
    assert [r["error"]["param"] for r in results[2:]] == ["candidates.0", "candidates.2"]
    assert results[2]["text"] is None


async def test_equal_candidates_make_no_pair_and_keep_their_order(api):
    body = (await api.post("/rerank", {"prompt": "p", "candidates": ["ab", "cd"]})).json()
    assert [r["index"] for r in body["results"]] == [0, 1]
    assert body["pair"] is None


async def test_what_is_cut_for_a_long_candidate_is_cut_of_no_other_where_each_is_judged_by_itself(api):
    """The prompt is cut alike for all only where a listwise head compares them."""
    prompt, short, long = "p" * (MAX_TOKENS // 2), "No.", "y" * (MAX_TOKENS * 2 // 3)
    bodies = {}
    for head in (LEGEND.name, SRR.name):
        api.refs[SRR.name] = api.head_control.refs[SRR.name] = SRR
        asked = {"prompt": prompt, "candidates": [short, long, "Yes."], "head": head, "truncate": True}
        bodies[head] = (await api.post("/rerank", asked)).json()
    alone, together = bodies[LEGEND.name], bodies[SRR.name]
    assert {r["index"]: r["truncated"] for r in alone["results"]} == {0: False, 1: True, 2: False}
    assert {r["index"]: r["score"] for r in alone["results"]} == {0: 3.0, 1: float(len(long)), 2: 4.0}
    assert alone["usage"]["completion_tokens"] == len(short) + len(long) + len("Yes.")
    assert [len(call["groups"]) for call in api.intake.calls] == [2, 1]
    assert all(r["truncated"] for r in together["results"])


async def test_an_answer_comes_wholly_from_one_version(api):
    """Two items are scored before a switch, the third after it: the first two are scored again."""

    def before_the_switch(i: int, scored: Scored) -> Scored:
        old = len(api.intake.calls) == 1 and i < 2
        return replace(scored, heads=(replace(scored.heads[0], version=2 if old else 3),))

    api.intake.outcome = before_the_switch
    body = (await api.post("/score", {"items": [ITEM, {**ITEM, "response": "x"}, ITEM]})).json()
    assert body["head"]["version"] == 3
    assert [s["score"] for s in body["scores"]] == [5.0, 1.0, 5.0]
    assert [len(call["groups"]) for call in api.intake.calls] == [3, 2]


async def test_a_head_that_is_switched_without_end_gives_503(api):
    versions = iter(range(1000))
    api.intake.outcome = lambda i, s: replace(s, heads=(replace(s.heads[0], version=next(versions)),))
    response = await api.post("/score", {"items": [ITEM, ITEM]})
    assert response.status_code == 503
    assert len(api.intake.calls) == 4


async def test_overload_is_503_with_retry_after_in_whole_seconds(api):
    api.intake.error = Overloaded("the queue is full", retry_after=3.2)
    response = await api.post("/margin", {"pairs": [PAIR]})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "4"
    assert error(response)["code"] == "overloaded"


async def test_a_deadline_that_has_passed_is_504(api):
    api.intake.error = DeadlineExceeded("not done within 1 s")
    response = await api.post("/margin", {"pairs": [PAIR]})
    assert response.status_code == 504
    assert error(response)["type"] == "timeout_error"


@pytest.mark.parametrize(
    ("outcome", "status"), [(EngineDead("the engine is dead"), 503), (DeadlineExceeded("late"), 504)]
)
async def test_what_is_no_items_fault_fails_the_request(api, outcome, status):
    api.intake.outcome = lambda i, s: outcome if i == 1 else s
    response = await api.post("/score", {"items": [ITEM, ITEM]})
    assert response.status_code == status


async def test_a_caller_may_ask_for_less_time_but_not_for_more(api):
    for asked in (2.0, 1000, None):
        await api.post("/score", {"items": [ITEM], **({} if asked is None else {"timeout": asked})})
    given = [call["timeout"] for call in api.intake.calls]
    assert given[0] == pytest.approx(2.0, abs=0.5)
    assert given[1:] == [pytest.approx(30.0, abs=0.5)] * 2


@pytest.mark.parametrize("path", ["/margin", "/score", "/reward", "/rerank"])
async def test_an_unknown_head_is_404_and_names_the_field(api, path):
    body = {"/margin": {"pairs": [PAIR]}, "/rerank": {"prompt": "p", "candidates": ["a"]}}.get(path, {"items": [ITEM]})
    response = await api.post(path, {**body, "head": "nobody"})
    assert response.status_code == 404
    assert error(response)["param"] == "head"
    assert "harmless" in error(response)["message"]


async def test_timing_headers_are_those_of_the_item_that_took_longest(api):
    api.intake.outcome = lambda i, s: replace(s, timing=replace(s.timing, queued=0.1 * (i + 1)))
    response = await api.post("/score", {"items": [ITEM, ITEM]})
    assert float(response.headers["x-queue-time"]) == pytest.approx(200)
    assert float(response.headers["x-inference-time"]) == pytest.approx(5)
    assert math.isfinite(float(response.headers["x-total-time"]))


def test_the_openapi_document_lists_every_route_field_and_error(api):
    document = api.app.openapi()
    for path in ("/margin", "/score", "/reward", "/rerank"):
        operation = document["paths"][path]["post"]
        assert {"200", "400", "401", "404", "413", "422", "500", "503", "504"} <= set(operation["responses"])
        schema = operation["responses"]["422"]["content"]["application/json"]["schema"]
        assert schema.get("anyOf", [schema])[0]["$ref"].endswith(
            "/ErrorBody"
        )  # /score and /rerank have other dialects too
    schemas = document["components"]["schemas"]
    assert "HTTPValidationError" not in schemas
    assert schemas["MarginRequest"]["examples"]
    assert schemas["Margin"]["properties"]["margin_scaled"]["description"]
    assert schemas["Message"]["properties"]["role"]["type"] == "string"
    assert HYBRID.kind in schemas["NamedHead"]["properties"]["kind"]["enum"]
