"""Every route needs a key, except health (and metrics, where that is wanted)."""

from __future__ import annotations

import base64

import pytest
from starlette.datastructures import Headers

from inward.api.auth import credential
from inward.api.keys import KeyRing
from inward.errors import SetupError
from support.fake_services import FakeServices, error

KEYS = frozenset({"first-key", "zweiter-schlüssel"})
GUARDED = [
    "/margin",
    "/heads",
    "/heads/harmless",
    "/info",
    "/docs",
    "/openapi.json",
    "/",
    "/playground/app.js",
    "/nothing",
    "/livez/",
    "//livez",
    "/LIVEZ",
]


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.mark.parametrize("path", GUARDED)
async def test_without_a_key_every_route_is_401(path):
    response = await FakeServices(keys=KEYS).get(path)
    assert response.status_code == 401
    assert error(response)["type"] == "authentication_error"
    assert response.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/health"])
async def test_health_needs_no_key(path):
    assert (await FakeServices(keys=KEYS).get(path)).status_code == 200


async def test_metrics_need_a_key_only_where_they_are_not_open():
    assert (await FakeServices(keys=KEYS).get("/metrics")).status_code == 200
    assert (await FakeServices(keys=KEYS, metrics_open=False).get("/metrics")).status_code == 401


@pytest.mark.parametrize(
    "header",
    [
        "Bearer first-key",
        "bearer  first-key ",
        "Bearer zweiter-schlüssel".encode(),
        basic("anyone", "first-key"),
        basic("", "zweiter-schlüssel"),
    ],
)
async def test_any_key_opens_as_bearer_or_as_basic_password(header):
    assert (await FakeServices(keys=KEYS).get("/heads", headers={"authorization": header})).status_code == 200


@pytest.mark.parametrize(
    "header",
    [
        "", "Bearer", "Bearer ", "Bearer first-ke", "Bearer first-key2", "first-key", "Digest first-key",
        basic("first-key", ""), basic("first-key", "x"), "Basic !!", "Basic " + base64.b64encode(b"first-key").decode(),
    ],
)  # fmt: skip
async def test_a_wrong_key_is_401(header):
    response = await FakeServices(keys=KEYS).get("/heads", headers={"authorization": header})
    assert response.status_code == 401
    assert error(response)["code"] == "unauthorized"


async def test_the_key_may_stand_in_the_url():
    async with FakeServices(keys=KEYS).client() as client:
        assert (await client.get("http://key:first-key@inward/heads")).status_code == 200


async def test_a_stranger_is_refused_before_the_body_is_read():
    async def never():
        raise AssertionError("the body was read")
        yield b""

    async with FakeServices(keys=KEYS).client() as client:
        assert (await client.post("/margin", content=never())).status_code == 401


async def test_no_keys_means_open():
    assert (await FakeServices().get("/heads")).status_code == 200


async def test_keys_of_a_file_are_rotated_without_a_restart(tmp_path):
    file = tmp_path / "keys"

    async def opens(*keys):
        return [
            (await api.get("/heads", headers={"authorization": f"Bearer {key}"})).status_code == 200 for key in keys
        ]

    file.write_text("# ours\n old \n\n")
    api = FakeServices(keys=frozenset({"fixed"}), keys_file=file)
    assert await opens("fixed", "old", "new", "# ours", "") == [True, True, False, False, False]
    file.write_text("old\nnew\n")
    assert await opens("fixed", "old", "new") == [True, True, True]
    (tmp_path / "next").write_text("new\n")
    (tmp_path / "next").replace(file)  # as a Kubernetes secret is exchanged
    assert await opens("fixed", "old", "new") == [True, False, True]


async def test_a_file_of_keys_that_is_away_or_empty_for_a_moment_changes_nothing(tmp_path):
    file = tmp_path / "keys"
    file.write_text("one")
    api = FakeServices(keys_file=file)
    for change in (file.unlink, file.touch, lambda: file.write_text("# none\n")):
        change()
        assert (await api.get("/heads")).status_code == 401
        assert (await api.get("/heads", headers={"authorization": "Bearer one"})).status_code == 200


@pytest.mark.parametrize("content", [None, "", "# nothing\n"])
def test_a_file_of_keys_without_any_is_refused_at_the_start(tmp_path, content):
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SetupError, match="--api-keys-file"):
        KeyRing(file=file)


def test_a_password_may_hold_colons():
    assert credential(Headers({"authorization": basic("user", "a:b")})) == b"a:b"
