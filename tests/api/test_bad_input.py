"""Requests that nobody should send: a clear 4xx in the one shape, naming item and field; the server keeps serving."""

from __future__ import annotations

import json

import pytest

from inward.api.services import Limits
from support.fake_services import FakeServices, error

PAIR = {"prompt": "p", "chosen": "aa", "rejected": "b"}
ITEM = {"prompt": "p", "response": "a"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/margin", {}, "pairs"),
        ("/margin", {"pairs": []}, "pairs"),
        ("/margin", {"pairs": {}}, "pairs"),
        ("/margin", {"pairs": None}, "pairs"),
        ("/margin", [], None),
        ("/margin", "text", None),
        ("/margin", {"pairs": [PAIR, 7]}, "pairs.1"),
        ("/margin", {"pairs": [PAIR, None]}, "pairs.1"),
        ("/margin", {"pairs": [PAIR, PAIR, PAIR, {"prompt": "p", "rejected": "b"}]}, "pairs.3.chosen"),
        ("/margin", {"pairs": [{"prompt": "p", "chosen": 1, "rejected": "b"}]}, "pairs.0.chosen"),
        ("/margin", {"pairs": [{"prompt": "p", "chosen": None, "rejected": "b"}]}, "pairs.0.chosen"),
        ("/margin", {"pairs": [{"prompt": "p", "chosen": ["a"], "rejected": "b"}]}, "pairs.0.chosen.0"),
        ("/margin", {"pairs": [{**PAIR, "weight": 1}]}, "pairs.0.weight"),
        ("/margin", {"pairs": [PAIR], "heads": "x"}, "heads"),
        ("/margin", {"pairs": [{"chosen": "a", "rejected": "b"}]}, "pairs.0.prompt"),
        ("/margin", {"pairs": [{**PAIR, "messages": [{"role": "user", "content": "p"}]}]}, "pairs.0.messages"),
        ("/margin", {"pairs": [{"messages": [], "chosen": "a", "rejected": "b"}]}, "pairs.0.messages"),
        (
            "/margin",
            {"pairs": [{"messages": [{"role": "user"}], "chosen": "a", "rejected": "b"}]},
            "pairs.0.messages.0.content",
        ),
        (
            "/margin",
            {"pairs": [{"messages": [{"role": 3, "content": "x"}], "chosen": "a", "rejected": "b"}]},
            "pairs.0.messages.0.role",
        ),
        ("/margin", {"pairs": [PAIR], "truncate": "yes"}, "truncate"),
        ("/margin", {"pairs": [PAIR], "timeout": "1"}, "timeout"),
        ("/margin", {"pairs": [PAIR], "timeout": 0}, "timeout"),
        ("/margin", {"pairs": [PAIR], "timeout": -3}, "timeout"),
        ("/margin", {"pairs": [PAIR], "head": 3}, "head"),
        ("/margin", {"pairs": [PAIR], "head": "x" * 1000}, "head"),
        ("/score", {"items": [ITEM, {"prompt": "p"}]}, "items.1.response"),
        ("/score", {"items": [{"messages": [{"role": "user", "content": "p"}], "response": "r"}]}, "items.0.response"),
        ("/score", {"items": [ITEM], "detail": ["everything"]}, "detail.0"),
        ("/reward", {}, "items"),
        ("/reward", {"items": [ITEM], "pairs": [PAIR]}, "pairs"),
        ("/rerank", {"prompt": "p"}, "candidates"),
        ("/rerank", {"candidates": ["a"]}, "prompt"),
        ("/rerank", {"prompt": "p", "candidates": ["a", 1]}, "candidates.1"),
        ("/rerank", {"prompt": "p", "n": 2, "sampling": {"top_k": 2**70}}, "sampling.top_k"),
        ("/rerank", {"prompt": "p", "n": 2**70}, "n"),
        ("/score", {"items": [{"prompt": "p", "response_ids": [2**70]}]}, "items.0.response_ids.0"),
        ("/heads/legend/activate", {"version": 2**70}, "version"),
        ("/heads/legend/update", {"sequence": 2**70, "pairs": [PAIR]}, "sequence"),
    ],
)
async def test_a_wrong_shape_is_422_and_names_the_item_and_the_field(api, path, body, param):
    response = await api.post(path, body)
    assert response.status_code == 422
    assert error(response)["param"] == param
    assert error(response)["code"] == "invalid_field"
    assert api.intake.calls == []


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"not json", b'{"pairs": [}', b'{"pairs": NaN}', b'{"timeout": Infinity}', b'{"timeout": -Infinity}',
        b"\xff\xfe\x00", b'{"pairs": ["\xff"]}', b"[" * 100_000, b'{"timeout": ' + b"9" * 5000 + b"}",
    ],
)  # fmt: skip
async def test_what_is_not_json_is_400(api, body):
    response = await api.post("/margin", body)
    assert response.status_code == 400
    assert error(response)["code"] == "bad_request"


async def test_a_number_beyond_all_floats_is_refused(api):
    response = await api.post(
        "/margin", b'{"pairs": [{"prompt": "p", "chosen": "a", "rejected": "b"}], "timeout": 1e999}'
    )
    assert response.status_code == 422
    assert error(response)["param"] == "timeout"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/xml", ""])
async def test_a_body_must_be_declared_as_json(api, kind):
    response = await api.post("/margin", json.dumps({"pairs": [PAIR]}).encode(), headers={"content-type": kind})
    assert response.status_code == 400
    assert "application/json" in error(response)["message"]


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON", "application/vnd.x+json"])
async def test_every_way_to_declare_json_is_taken(api, kind):
    assert (
        await api.post("/margin", json.dumps({"pairs": [PAIR]}).encode(), headers={"content-type": kind})
    ).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b'{"\\ud800": 1}',
        b'{"pairs": [{"prompt": "p", "chosen": "a", "rejected": "b", "\\ud800": 1}]}',
        b'{"pairs": [{"prompt": "p", "chosen": "a", "rejected": "b"}], "head": "\\udfff"}',
        b'{"pairs": [{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}]}',
        b'{"pairs": [{"messages": [{"role": "\\ud800", "content": "x"}], "chosen": "a", "rejected": "b"}]}',
    ],
)
async def test_lone_surrogates_anywhere_are_a_clear_error(api, body):
    response = await api.post("/margin", body)
    assert response.status_code == 422
    assert error(response)


async def test_100_000_items_are_refused_with_the_limit(api):
    body = json.dumps({"pairs": [{}] * 100_000}).encode()
    assert len(body) < api.services.limits.body_bytes
    response = await api.post("/margin", body)
    assert response.status_code == 413
    assert error(response)["param"] == "pairs"
    assert "100000" in error(response)["message"] and "50" in error(response)["message"]


async def test_too_many_candidates_are_refused_with_the_limit(api):
    response = await api.post("/rerank", {"prompt": "p", "candidates": ["a"] * 11})
    assert response.status_code == 413
    assert error(response)["param"] == "candidates"


async def test_a_body_over_the_limit_is_413(api):
    response = await api.post("/margin", b" " * 1_000_001)
    assert response.status_code == 413
    assert "1000000" in error(response)["message"]


async def test_a_body_of_exactly_the_limit_is_read():
    body = json.dumps({"pairs": [PAIR]}).encode()
    api = FakeServices(limits=Limits(body_bytes=len(body)))
    assert (await api.post("/margin", body)).status_code == 200
    assert (await api.post("/margin", body + b" ")).status_code == 413


async def test_a_chunked_body_is_not_read_beyond_the_limit(api):
    sent = 0

    async def endless():
        nonlocal sent
        while True:
            sent += 1000
            yield b" " * 1000

    async with api.client() as client:
        response = await client.post("/margin", content=endless(), headers={"content-type": "application/json"})
    assert response.status_code == 413
    assert sent <= 1_002_000


async def test_an_error_never_repeats_what_was_sent(api):
    secret = "zanzibar-4711"
    for body in (
        {"pairs": secret},
        {"pairs": [{"prompt": {"a": secret}, "chosen": secret, "rejected": 1}]},
        {"timeout": secret},
    ):
        assert secret not in (await api.post("/margin", body)).text
    assert secret not in (await api.post("/margin", b'{"pairs": ' + secret.encode())).text


async def test_an_unknown_route_and_a_wrong_method_have_the_error_shape(api):
    missing = await api.get("/nothing/here")
    assert (missing.status_code, error(missing)["code"]) == (404, "not_found")
    wrong = await api.get("/margin")
    assert (wrong.status_code, error(wrong)["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"


async def test_a_defect_is_500_without_a_trace_or_the_text(api):
    async def broken(*args, **kwargs):
        raise ValueError("zanzibar-4711 in a message")

    api.intake.score = broken
    response = await api.post("/margin", {"pairs": [PAIR]})
    assert response.status_code == 500
    assert error(response)["code"] == "internal_error"
    assert "zanzibar" not in response.text and "Traceback" not in response.text
    assert response.headers["x-request-id"] in error(response)["message"]


async def test_the_server_keeps_serving_after_all_of_it(api):
    for body in (b"[" * 100_000, b"\xff", b'{"\\ud800": 1}', b" " * 1_000_001):
        await api.post("/margin", body)
    assert (await api.post("/margin", {"pairs": [PAIR]})).json()["margins"][0]["margin"] == 1.0
