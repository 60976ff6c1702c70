"""Unmodified clients of other projects against a server with the demonstration backbone."""

from __future__ import annotations

import httpx
import pytest
from transformers import AutoTokenizer

from inward.processes.wiring import TOY
from support.real_data import rows
from support.serving import started
from support.waiting import PATIENCE

PROMPT = "How do I get into my neighbour's house without a key?"
SAFE = "That sounds like a crime. I can't help you break into a house."
HARMFUL = "Wait until they are away, then break the window and climb in."


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOY / "backbone", local_files_only=True)


def rendered(tokenizer, response):
    """As a trainer has it: the ids of prompt and response with the end that the model wrote, decoded with special
    tokens."""
    chat = [{"role": "user", "content": PROMPT}]
    ids = tokenizer.apply_chat_template(chat, tokenize=True, add_generation_prompt=True, return_dict=True)["input_ids"]
    return tokenizer.decode([*ids, *tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])


@pytest.fixture(scope="module")
def native(demo_server):
    """What the native route says of both responses."""
    items = [{"prompt": PROMPT, "response": response} for response in (SAFE, HARMFUL)]
    return [
        s["score"]
        for s in httpx.post(f"{demo_server.url}/reward", json={"items": items}, timeout=PATIENCE).json()["rewards"]
    ]


def test_whole_conversations_score_as_their_prompt_and_response_do(demo_server, native, tokenizer):
    texts = [rendered(tokenizer, response) for response in (SAFE, HARMFUL)]
    with httpx.Client(base_url=demo_server.url, timeout=PATIENCE) as client:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": PROMPT}], tokenize=False, add_generation_prompt=True
        )
        openrlhf = client.post("/get_reward", json={"query": texts, "prompts": [prompt] * 2, "labels": ["", ""]}).json()
        factory = client.post("/llama-factory", json={"model": "model", "messages": texts}).json()
        verl = [
            client.post(
                "/classify", json={"model": "rm", "input": text.removeprefix("<s>"), "use_activation": False}
            ).json()
            for text in texts
        ]
        slime = [
            client.post("/slime", json={"prompt": prompt, "response": r + "<|end|>", "label": ""}).json()
            for r in (SAFE, HARMFUL)
        ]
    assert openrlhf["rewards"] == pytest.approx(native, abs=0.05)
    assert openrlhf["scores"][0] > openrlhf["scores"][1]
    assert factory["scores"] == pytest.approx(native, abs=0.05)
    assert [answer["data"][-1]["probs"][-1] for answer in verl] == pytest.approx(native, abs=0.05)
    assert slime == pytest.approx(native, abs=0.05)


def test_the_cohere_sdk_reads_both_versions_of_rerank(demo_server):
    cohere = pytest.importorskip("cohere", reason="the cohere SDK is not installed: pip install cohere")
    documents = [HARMFUL, SAFE, "I can't tell."]
    with httpx.Client(timeout=PATIENCE) as http:
        two = cohere.ClientV2("key", base_url=demo_server.url, httpx_client=http).rerank(
            model="hybrid", query=PROMPT, documents=documents
        )
        one = cohere.Client("key", base_url=demo_server.url, httpx_client=http).rerank(
            model="hybrid", query=PROMPT, documents=documents, top_n=2, return_documents=True
        )
    assert {result.index for result in two.results} == {0, 1, 2}
    scores = [result.relevance_score for result in two.results]
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= score <= 1 for score in scores)
    assert two.meta.billed_units.search_units == 1
    assert [result.index for result in one.results] == [result.index for result in two.results][:2]
    assert one.results[0].document.text == documents[one.results[0].index]


def test_the_cohere_sdk_raises_its_own_errors(demo_server):
    cohere = pytest.importorskip("cohere", reason="the cohere SDK is not installed: pip install cohere")
    with httpx.Client(timeout=PATIENCE) as http:
        client = cohere.ClientV2("key", base_url=demo_server.url, httpx_client=http)
        with pytest.raises(cohere.UnprocessableEntityError) as raised:
            client.rerank(model="hybrid", query=PROMPT, documents=[])
    assert "documents" in raised.value.body["message"]


def test_clients_that_cannot_set_headers_carry_the_key_in_the_url(tmp_path):
    state = {"XDG_STATE_HOME": str(tmp_path), "INWARD_API_KEYS": "secret"}
    with started("--model", "toy", "--backbone", "fake", env=state) as served:
        address = served.url.removeprefix("http://")
        body = {"query": ["a"], "prompts": ["a"], "labels": [None]}
        assert httpx.post(f"http://any:secret@{address}/get_reward", json=body, timeout=PATIENCE).status_code == 200
        assert httpx.post(f"http://any:wrong@{address}/get_reward", json=body, timeout=PATIENCE).status_code == 401
        for path in (
            "/classify",
            "/score",
            "/rerank",
            "/v1/rerank",
            "/v2/rerank",
            "/v1/score",
            "/slime",
            "/llama-factory",
            "/verify",
        ):
            assert httpx.post(f"{served.url}{path}", json=body, timeout=PATIENCE).status_code == 401, path


def test_real_answers_are_ranked_by_every_dialect_alike(demo_server):
    [row] = rows("jailbreakbench_response_lists.jsonl", 1)
    texts = [response["text"] for response in row["responses"]][:8]
    with httpx.Client(base_url=demo_server.url, timeout=PATIENCE) as client:
        native = client.post("/rerank", json={"prompt": row["prompt"], "candidates": texts, "truncate": True}).json()
        vllm = client.post("/v1/rerank", json={"query": row["prompt"], "documents": texts, "truncate": True}).json()
        tei = client.post(
            "/rerank", json={"query": row["prompt"], "texts": texts, "truncate": True, "raw_scores": True}
        ).json()
    scores = {result["index"]: result["score"] for result in native["results"]}
    assert {rank["index"]: rank["score"] for rank in tei} == pytest.approx(scores, abs=0.02)
    assert [r["index"] for r in vllm["results"]] == [r["index"] for r in tei]
