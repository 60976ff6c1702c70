"""Other projects' requests as their clients send them, and the answers that their clients read. Scores here are
numbers of characters."""

from __future__ import annotations

import json
import math

import pytest

from inward.errors import NotFinite, Overloaded, OverQuota
from support.fake_services import HYBRID, LEGEND, MAX_TOKENS, SRR, FakeServices

PROMPT, GOOD, BAD = "Say hi", "hello", "go"


@pytest.fixture
def api():
    """All kinds of heads; the hybrid one is first for single texts, the ranker for lists."""
    return FakeServices(LEGEND, HYBRID, SRR)


@pytest.fixture
def legend_house():
    return FakeServices(LEGEND)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


async def test_openrlhf_gets_a_number_for_each_query_and_numeric_logs(api):
    body = {"query": [PROMPT + GOOD, PROMPT + BAD], "prompts": [PROMPT, PROMPT], "labels": ["x", None]}
    response = await api.post("/get_reward", body)
    assert response.status_code == 200
    answer = response.json()
    assert answer["rewards"] == [5.0, 2.0]
    assert answer["scores"] == [0.5, 0.5]
    assert all(isinstance(x, float) for values in answer["extra_logs"].values() for x in values)
    assert {len(values) for values in answer["extra_logs"].values()} == {2}
    assert response.headers["x-inward-head"] == f"{HYBRID.name}/{HYBRID.version}"


async def test_openrlhf_without_prompts_and_with_empty_lists(api):
    assert (await api.post("/get_reward", {"query": ["abc"]})).json()["rewards"] == [0.0]  # all of it is the prompt
    empty = await api.post("/get_reward", {"query": [], "prompts": [], "labels": []})
    assert (empty.status_code, empty.json()["rewards"], empty.json()["scores"]) == (200, [], [])
    assert all(values == [] for values in empty.json()["extra_logs"].values())


async def test_openrlhf_text_that_is_too_long_is_cut_and_counted(api):
    response = await api.post("/get_reward", {"query": ["p" + "x" * 3 * MAX_TOKENS, "pa"], "prompts": ["p", "p"]})
    assert response.status_code == 200
    assert response.json()["extra_logs"]["truncated"] == [1.0, 0.0]
    assert response.headers["x-inward-truncated"] == "1"


async def test_prompts_of_another_number_are_refused(api):
    response = await api.post("/get_reward", {"query": ["a", "b"], "prompts": ["a"]})
    assert (response.status_code, response.json()["error"]["param"]) == (422, "prompts")


async def test_slime_gets_a_bare_number(api):
    chat = [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]
    for prompt in (PROMPT, chat):
        response = await api.post("/slime", {"prompt": prompt, "response": GOOD, "label": 3})
        assert (response.status_code, response.json()) == (200, 5.0)


async def test_llama_factory_gets_scores(api):
    answer = (await api.post("/llama-factory", {"model": "model", "messages": ["abc", "de"]})).json()
    assert answer["scores"] == [0.0, 0.0]
    assert len(api.intake.calls[-1]["groups"]) == 2


async def test_verl_reads_the_last_probability_of_the_last_row(api):
    body = {"model": "/models/rm", "input": PROMPT + GOOD, "use_activation": False}
    answer = (await api.post("/classify", body)).json()
    assert answer["data"][-1]["probs"][-1] == 0.0
    assert answer["data"][0]["num_classes"] == 1
    many = (await api.post("/classify", {"input": ["ab", "cd"], "use_activation": True})).json()
    assert [row["probs"] for row in many["data"]] == [[0.5], [0.5]]
    assert many["usage"] == {"prompt_tokens": 4, "total_tokens": 4, "completion_tokens": 0}


async def test_nemo_gym_gets_its_request_back_with_a_reward(api):
    body = {
        "responses_create_params": {
            "input": [{"role": "user", "content": PROMPT}],
            "instructions": "Be kind",
            "model": "policy",
        },
        "response": {
            "output": [
                {"type": "reasoning", "summary": []},
                {
                    "type": "message",
                    "role": "assistant",
                    "content": [{"type": "output_text", "text": GOOD, "annotations": []}],
                },
            ]
        },
        "expected": {"answer": 42},
    }
    answer = (await api.post("/verify", body)).json()
    assert answer == {**body, "reward": 5.0}
    assert (await api.post("/seed_session", {"anything": 1})).json() == {}
    silent = await api.post("/verify", {**body, "response": {"output": []}})
    assert silent.status_code == 422
    assert set(silent.json()) == {"detail"}


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank"])
async def test_vllm_and_jina_rerank(api, path):
    body = {"model": "m", "query": PROMPT, "documents": [BAD, GOOD, {"text": "abc"}], "top_n": 2, "user": "me"}
    answer = (await api.post(path, body)).json()
    assert [row["index"] for row in answer["results"]] == [1, 2]
    assert answer["results"][0]["document"] == {"text": GOOD}
    assert answer["results"][0]["relevance_score"] == 0.5  # the hybrid head's calibrated probability
    ranked = (await api.post(path, body | {"head": "lists"})).json()
    assert ranked["results"][0]["relevance_score"] == 1.0  # (1 + 5) / 2, no more than 1: a listwise head gives cosines
    assert answer["usage"]["total_tokens"] == 3 * len(PROMPT + "\n\n") + 10
    assert answer["model"] == "tiny"
    assert answer["id"]


async def test_cohere_v2_rerank_has_no_documents_and_a_meta(api):
    answer = (await api.post("/v2/rerank", {"model": "m", "query": PROMPT, "documents": [BAD, GOOD]})).json()
    assert [set(row) for row in answer["results"]] == [{"index", "relevance_score"}] * 2
    assert answer["meta"] == {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}}
    assert all(0 <= row["relevance_score"] <= 1 for row in answer["results"])
    body = {"query": PROMPT, "documents": [BAD, GOOD], "return_documents": False}
    assert "document" not in (await api.post("/v1/rerank", body)).json()["results"][0]


async def test_tei_rerank_is_a_bare_list(api):
    answer = (
        await api.post("/rerank", {"query": PROMPT, "texts": [BAD, GOOD], "raw_scores": True, "return_text": True})
    ).json()
    assert answer == [{"index": 1, "score": 5.0, "text": GOOD}, {"index": 0, "score": 2.0, "text": BAD}]
    answer = (await api.post("/rerank", {"query": PROMPT, "texts": [BAD, GOOD]})).json()
    assert [set(row) for row in answer] == [{"index", "score"}] * 2


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
async def test_vllm_score_of_one_with_each_and_of_each_with_its_own(legend_house, path):
    for body in ({"text_1": PROMPT, "text_2": [BAD, GOOD]}, {"queries": [PROMPT, PROMPT], "documents": [BAD, GOOD]}):
        answer = (await legend_house.post(path, body)).json()
        assert [row["index"] for row in answer["data"]] == [0, 1]
        assert [row["score"] for row in answer["data"]] == pytest.approx([sigmoid(2), sigmoid(5)])
    raw = (await legend_house.post(path, {"text_1": PROMPT, "text_2": GOOD, "use_activation": False})).json()
    assert raw["data"][0] == {"index": 0, "object": "score", "score": 5.0}
    wrong = await legend_house.post(path, {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (422, 422)


async def test_the_native_dialects_still_answer_on_the_shared_paths(api):
    native = (await api.post("/rerank", {"prompt": PROMPT, "candidates": [BAD, GOOD]})).json()
    assert native["best"]["text"] == GOOD
    assert "scores" in (await api.post("/score", {"items": [{"prompt": PROMPT, "response": GOOD}]})).json()
    unknown = await api.post("/rerank", {"prompt": PROMPT, "candidates": [BAD], "user": "me"})
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (422, "user")


async def test_the_field_the_model_and_the_setting_choose_the_head():
    api = FakeServices(LEGEND, HYBRID, SRR)

    async def answering(**fields):
        response = await api.post("/get_reward", {"query": ["ab"], **fields})
        return response.headers.get("x-inward-head", response.status_code)

    assert await answering() == "helpful/1"
    assert await answering(head="harmless") == "harmless/3"
    assert await answering(head="nobody") == 404
    response = await api.post("/classify", {"input": "ab", "model": "harmless"})
    assert response.headers["x-inward-head"] == "harmless/3"
    for path, named in (("/classify", "model"), ("/classify", "head"), ("/v1/score", "model")):
        body = {"input": "ab", "text_1": "a", "text_2": "b", named: "lists"}  # a ranker is asked for one text's score
        refused = await api.post(path, body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (404, named)
    api = FakeServices(LEGEND, HYBRID, SRR, compat_head="harmless")
    assert await answering() == "harmless/3"
    assert await answering(head="helpful") == "helpful/1"
    assert (await api.post("/v2/rerank", {"query": "q", "documents": ["a"]})).headers["x-inward-head"] == "harmless/3"


@pytest.mark.parametrize("body", [{"prompt": "q", "candidates": ["a", "b"]}, {"query": "q", "documents": ["a", "b"]}])
@pytest.mark.parametrize(
    ("loaded", "ranks"),
    [((SRR, LEGEND, HYBRID), "helpful"), ((SRR, LEGEND), "harmless"), ((SRR,), "lists")],
)
async def test_a_hybrid_head_ranks_else_legend_else_a_ranker_unless_it_is_set_otherwise(body, loaded, ranks):
    async def ranking(**settings):
        api = FakeServices(*loaded, **settings)
        assert (await api.post("/rerank", body)).status_code == 200
        return api.intake.calls[0]["heads"][0]

    assert await ranking() == ranks
    assert await ranking(rerank_head="lists") == "lists"


FAMILIES = [
    ("/get_reward", {"query": ["ab"]}, lambda e: e["error"]["message"]),
    ("/slime", {"prompt": "a", "response": "b"}, lambda e: e["error"]["message"]),
    ("/llama-factory", {"messages": ["ab"]}, lambda e: e["error"]["message"]),
    ("/classify", {"input": "ab"}, lambda e: e["error"]["message"] if isinstance(e["error"]["code"], int) else None),
    (
        "/v1/score",
        {"text_1": "a", "text_2": "b"},
        lambda e: e["error"]["message"] if isinstance(e["error"]["code"], int) else None,
    ),
    (
        "/score",
        {"text_1": "a", "text_2": "b"},
        lambda e: e["error"]["message"] if isinstance(e["error"]["code"], int) else None,
    ),
    ("/v2/rerank", {"query": "a", "documents": ["b"]}, lambda e: e["message"] if set(e) == {"message"} else None),
    ("/v1/rerank", {"query": "a", "documents": ["b"]}, lambda e: e["message"] == e["detail"] and e["error"]["message"]),
    ("/rerank", {"query": "a", "documents": ["b"]}, lambda e: e["message"] == e["detail"] and e["error"]["message"]),
    ("/rerank", {"query": "a", "texts": ["b"]}, lambda e: e["error"] if set(e) == {"error", "error_type"} else None),
    (
        "/verify",
        {"responses_create_params": {"input": "a"}, "response": {"output": [{"role": "assistant", "content": "b"}]}},
        lambda e: e["detail"] if set(e) == {"detail"} else None,
    ),
]


@pytest.mark.parametrize(
    ("path", "body", "message"), FAMILIES, ids=[f"{path}-{next(iter(body))}" for path, body, _ in FAMILIES]
)
async def test_each_family_reads_its_own_errors_and_never_a_429(api, path, body, message):
    api.intake.error = Overloaded("full", retry_after=7)
    full = await api.post(path, body)
    assert (full.status_code, full.headers["retry-after"], message(full.json())) == (503, "7", "full")
    api.intake.error = OverQuota("too much", retry_after=9)
    quota = await api.post(path, body)
    assert (quota.status_code, quota.headers["retry-after"], message(quota.json())) == (503, "9", "too much")
    api.intake.error = None
    api.intake.outcome = lambda i, scored: NotFinite("no number")
    assert (await api.post(path, body)).status_code == 500  # never a zero
    wrong = await api.post(path, {**body, next(iter(body)): 7})
    assert wrong.status_code == 422
    assert message(wrong.json())


async def test_the_element_to_blame_is_named_in_the_callers_words(api):
    bad = "\ud800"
    for path, body, param in [
        ("/get_reward", {"query": ["ab", bad]}, "query.1"),
        ("/classify", {"input": ["ab", bad]}, "input.1"),
        ("/get_reward", {"query": ["ab", "a"]}, "query.1"),
        ("/classify", {"input": ["ab", "a"]}, "input.1"),
        ("/v1/rerank", {"query": "a", "documents": ["a", bad]}, "documents.1"),
        ("/v1/rerank", {"query": bad, "documents": ["a"]}, "query"),
        ("/v1/score", {"text_1": "a", "text_2": ["b", bad]}, "text_2.1"),
        ("/v1/rerank", {"query": "a", "documents": ["a", 7]}, "documents.1"),
        ("/get_reward", {"query": ["a", 7]}, "query.1"),
        ("/classify", {"input": 7}, "input"),
        ("/slime", {"prompt": ["x"], "response": "b"}, "prompt.0"),
    ]:
        response = await api.post(path, json.dumps(body).encode())
        assert (response.status_code, response.json()["error"]["param"]) == (422, param), path
