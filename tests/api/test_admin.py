"""Heads, health, info, metrics."""

from __future__ import annotations

import pytest

from support.fake_services import error

PAIR = {"prompt": "p", "chosen": "aa", "rejected": "b"}


async def test_heads_are_listed_and_shown(api):
    assert [head["name"] for head in (await api.get("/heads")).json()["heads"]] == ["harmless", "helpful"]
    assert (await api.get("/heads/harmless")).json()["versions"] == [3]
    missing = await api.get("/heads/nobody")
    assert (missing.status_code, error(missing)["code"]) == (404, "not_found")


async def test_activating_a_version_answers_with_it_and_the_next_score_names_it(api):
    answer = await api.post("/heads/harmless/activate", {"version": 2})
    assert answer.json() == {"name": "harmless", "kind": "legend", "version": 2}
    assert (await api.post("/margin", {"pairs": [PAIR]})).json()["head"]["version"] == 2
    assert (await api.post("/heads/harmless/activate", {"version": 10})).status_code == 404
    for version in (0, "2", 1.5, None, True):
        assert error(await api.post("/heads/harmless/activate", {"version": version}))["param"] == "version"


async def test_an_update_hands_the_desk_its_pairs_and_a_stale_one_is_409(api):
    answer = await api.post("/heads/helpful/update", {"sequence": 1, "pairs": [PAIR]})
    assert answer.json()["version"] == 2
    ((name, sequence, texts, lr),) = api.head_control.updates
    assert (name, sequence, lr) == ("helpful", 1, 0.001)
    assert (texts[0].prompt, texts[0].responses) == ("p", ("aa", "b"))
    stale = await api.post("/heads/helpful/update", {"sequence": 7, "pairs": [PAIR]})
    assert (stale.status_code, error(stale)["type"]) == (409, "conflict_error")


async def test_an_update_with_one_bad_pair_changes_nothing(api):
    bad = {"prompt": "p", "chosen": [{"role": "user", "content": "x"}], "rejected": "b"}
    answer = await api.post("/heads/helpful/update", {"sequence": 1, "pairs": [PAIR, bad]})
    assert (answer.status_code, error(answer)["param"]) == (422, "pairs.1.chosen")
    assert api.head_control.updates == []


@pytest.mark.parametrize("path", ["/readyz", "/health"])
async def test_readiness_is_red_while_draining_and_liveness_is_not(api, path):
    assert (await api.get(path)).status_code == 200
    api.readiness = (False, "shutting down")
    red = await api.get(path)
    assert (red.status_code, error(red)["message"], error(red)["code"]) == (503, "shutting down", "unavailable")
    assert red.headers["retry-after"]
    assert (await api.get("/livez")).status_code == 200


async def test_a_dead_engine_is_neither_ready_nor_alive(api):
    api.is_alive, api.readiness = False, (False, "the engine is dead")
    for path in ("/readyz", "/livez"):
        red = await api.get(path)
        assert (red.status_code, error(red)["code"]) == (503, "engine_dead")


async def test_info_and_docs_and_the_openapi_document_answer(api):
    assert (await api.get("/info")).json()["model"] == "tiny"
    assert "swagger" in (await api.get("/docs")).text
    assert (await api.get("/openapi.json")).json()["info"]["title"] == "Inward"


async def test_metrics_are_in_prometheus_text_format(api):
    response = await api.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "# TYPE inward_queue_tokens gauge" in response.text
    assert "process_resident_memory_bytes" in response.text


async def test_the_policy_is_switched_and_shown_with_its_history(api):
    first = (await api.get("/policy")).json()
    assert (first["policy_version"], first["previous"], first["available"]) == ("base", None, ["base", "v1", "v2"])
    answer = await api.post("/policy", {"version": "v2"})
    assert answer.json() == (await api.get("/policy")).json()
    assert (answer.json()["policy_version"], answer.json()["previous"]) == ("v2", "base")
    assert [set(activation) for activation in answer.json()["history"]] == [{"policy_version", "activated"}] * 2
    missing = await api.post("/policy", {"version": "v3"})
    assert (missing.status_code, error(missing)["param"]) == (404, "version")
    for version in ("../v1", "", 1, None, "v1\n"):
        refused = await api.post("/policy", {"version": version})
        assert (refused.status_code, error(refused)["param"]) == (422, "version")
