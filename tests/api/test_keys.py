"""Named keys: scopes, ends, quotas, what is counted and told of them."""

from __future__ import annotations

import hashlib
import io
import json
import logging

import pytest

from inward import logs, metrics
from inward.api.keys import KeyRing, read_keys
from inward.errors import SetupError
from support.fake_services import FakeServices, error

PAIRS = {"pairs": [{"prompt": "question", "chosen": "a good answer", "rejected": "no"}]}
MAY = {"read": [200, 403, 403, 403], "update": [200, 200, 200, 403], "admin": [200, 200, 200, 200]}
"""By scope, what becomes of a score, an update, a switch of heads and a switch of policies."""


def entry(name, **fields):
    return {"name": name, "sha256": hashlib.sha256(f"key of {name}".encode()).hexdigest(), **fields}


def by(name):
    return {"headers": {"authorization": f"Bearer key of {name}"}}


@pytest.fixture
def file(tmp_path):
    def write(*entries):
        (tmp_path / "keys").write_text("# ours\n\n" + f"keys: {json.dumps(entries)}\n")
        return tmp_path / "keys"

    return write


@pytest.fixture
def audit():
    """What is told although the level is ``error``."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    stream = io.StringIO()
    logs.configure("error", json=True, stream=stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    root.handlers[:], root.level = before


async def asked(api, **options):
    return [
        (await api.post("/margin", PAIRS, **options)).status_code,
        (await api.post("/heads/harmless/update", {"sequence": 1, "pairs": PAIRS["pairs"]}, **options)).status_code,
        (await api.post("/heads/harmless/activate", {"version": 2}, **options)).status_code,
        (await api.post("/policy", {"version": "v1"}, **options)).status_code,
    ]


@pytest.mark.parametrize("scope", MAY)
async def test_a_scope_opens_what_it_says_and_nothing_more(scope, file):
    api = FakeServices(keys_file=file(entry("a", scope=scope)))
    assert await asked(api, **by("a")) == MAY[scope]
    lends = [(await api.post(path, **by("a"))).status_code for path in ("/sleep", "/wake")]
    assert lends == ([409, 409] if scope == "admin" else [403, 403])  # there is nothing to lend here
    assert (await api.get("/policy", **by("a"))).status_code == 200


async def test_a_refusal_names_the_key_and_what_it_lacks(file):
    refused = await FakeServices(keys_file=file(entry("a"))).post("/policy", {"version": "v1"}, **by("a"))
    assert error(refused)["code"] == "forbidden"
    assert error(refused)["message"] == "the key 'a' has the scope read, and this needs admin"


async def test_plain_keys_may_do_everything_as_without_keys_everybody_may(tmp_path):
    (tmp_path / "keys").write_text("key of b\n")
    api = FakeServices(keys=frozenset({"key of a"}), keys_file=tmp_path / "keys")
    assert await asked(api, **by("a")) == MAY["admin"]
    assert (await api.post("/policy", {"version": "v1"}, **by("b"))).status_code == 200
    assert await asked(FakeServices()) == MAY["admin"]


async def test_a_key_opens_nothing_from_its_end_on(file):
    api = FakeServices(keys_file=file(entry("old", expires="2020-01-31"), entry("new", expires="2999-01-31")))
    refused = await api.get("/heads", **by("old"))
    assert refused.status_code == 401 and "this key has expired" in error(refused)["message"]
    assert (await api.get("/heads", **by("new"))).status_code == 200


def test_a_date_is_its_beginning_in_utc_and_a_moment_is_itself(file, tmp_path):
    file()
    (tmp_path / "keys").write_text(
        "keys:\n"
        f"  - {{name: a, sha256: {'a' * 64}, expires: 2027-01-31}}\n"
        f"  - {{name: b, sha256: {'b' * 64}, expires: 2027-01-31T01:00:00+01:00}}\n"
    )
    first, second = read_keys(tmp_path / "keys")
    assert first.expires == second.expires
    assert not first.expired(first.expires.timestamp() - 1) and first.expired(first.expires.timestamp())


async def test_a_key_has_a_quota_of_its_own_and_others_have_the_common_one(file):
    api = FakeServices(keys_file=file(entry("small", quota=5), entry("large", quota=1000), entry("common")))
    object.__setattr__(api.services, "tokens_a_minute", 20)
    codes = {
        name: [(await api.post("/margin", PAIRS, **by(name))).status_code for _ in range(2)]
        for name in ("small", "large", "common")
    }
    assert codes == {"small": [200, 429], "large": [200, 200], "common": [200, 429]}
    assert "5 tokens" in error(await api.post("/margin", PAIRS, **by("small")))["message"]


async def test_tokens_and_requests_are_counted_by_name_and_told_at_any_level_without_text(file, audit):
    def value(series, **labels):
        return metrics.REGISTRY.get_sample_value(series, labels) or 0

    api = FakeServices(keys_file=file(entry("counted")))
    before = value("inward_key_tokens_total", key="counted")
    await api.post("/margin", PAIRS, headers=by("counted")["headers"] | {"x-request-id": "r-1"})
    await api.get("/heads", **by("counted"))
    await api.post("/policy", {"version": "v1"}, **by("counted"))
    await api.get("/heads")
    tokens = value("inward_key_tokens_total", key="counted") - before
    assert tokens == sum(group.tokens for group in api.intake.calls[0]["groups"])
    assert value("inward_key_requests_total", key="counted", code="200") == 2
    assert value("inward_key_requests_total", key="counted", code="403") == 1
    scored, refused = audit()
    told = ("event", "level", "logger", "key", "tokens", "method", "route", "code")
    assert [scored[name] for name in told] == [
        "audit", "info", "inward.audit", "counted", tokens, "POST", "/margin", 200,
    ]  # fmt: skip
    assert scored["request_id"] == "r-1" and scored.keys() == {*told, "ts", "request_id"}
    assert (refused["route"], refused["code"], refused["tokens"]) == ("/policy", 403, 0)


async def test_a_file_of_named_keys_is_read_again_and_may_have_none(file):
    api = FakeServices(keys_file=file(entry("a"), entry("b")))
    assert (await api.get("/heads", **by("a"))).status_code == 200
    file(entry("b"))
    assert [(await api.get("/heads", **by(name))).status_code for name in "ab"] == [401, 200]
    file()
    assert [(await api.get("/heads", **by(name))).status_code for name in "ab"] == [401, 401]
    assert (await api.get("/heads")).status_code == 401  # it is not open now
    assert not KeyRing().__bool__() and KeyRing(file=file())


async def test_a_file_that_cannot_be_read_any_more_is_told_once_and_the_last_keys_stay(file, tmp_path, caplog):
    api = FakeServices(keys_file=file(entry("a")))
    (tmp_path / "keys").write_text("keys:\n  - {name: b, sha256: not-a-digest}\n")
    assert [(await api.get("/heads", **by("a"))).status_code for _ in range(3)] == [200] * 3
    assert [record.levelname for record in caplog.records if record.getMessage() == "keys_unreadable"] == ["ERROR"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("keys: [", "is no YAML"),
        ("keys: [{name: a}]", r"keys\.0\.sha256: Field required"),
        ("keys: [{name: a, sha256: abc}]", r"keys\.0\.sha256: String should match"),
        (f"keys: [{{name: a, sha256: {'a' * 64}, scope: root}}]", r"keys\.0\.scope: Input should be 'read'"),
        (f"keys: [{{name: a, sha256: {'a' * 64}, key: secret}}]", r"keys\.0\.key: Extra inputs"),
        (f"keys: [{{name: a, sha256: {'a' * 64}}}, {{name: a, sha256: {'b' * 64}}}]", "the name a is taken"),
        (f"keys: [{{name: plain, sha256: {'a' * 64}}}]", "the name plain is taken"),
    ],
)
def test_a_file_with_an_entry_that_cannot_be_used_is_refused_at_the_start(text, said, tmp_path):
    (tmp_path / "keys").write_text(text)
    with pytest.raises(SetupError, match=said) as refused:
        KeyRing(file=tmp_path / "keys")
    assert "secret" not in refused.value.message


@pytest.mark.parametrize("before", ["---\n", "%YAML 1.1\n---\n", "# ours\n\n--- # a document\n"])
def test_named_keys_are_read_whatever_yaml_has_before_them(tmp_path, before):
    (tmp_path / "keys").write_text(f"{before}keys:\n- name: bob\n  sha256: {'a' * 64}\n  scope: read\n")
    assert [(key.name, key.scope) for key in read_keys(tmp_path / "keys")] == [("bob", "read")]


def test_named_keys_are_read_as_json_too(tmp_path):
    (tmp_path / "keys").write_text(json.dumps({"keys": [entry("bob")]}, indent=1))
    assert [key.name for key in read_keys(tmp_path / "keys")] == ["bob"]


@pytest.mark.parametrize(
    "text",
    [
        f"- name: bob\n  sha256: {'a' * 64}\n",
        "name:\n",
        "---\n",
        "a-key\nscope: read\n",
        '[{"name": "bob"}]',
        '{"prompt": "a", "chosen": "b"}',
    ],
)
def test_no_line_of_what_is_no_file_of_keys_is_a_key(tmp_path, text):
    (tmp_path / "keys").write_text(text)
    with pytest.raises(SetupError, match=r"is no key|has no key"):
        KeyRing(file=tmp_path / "keys")


def test_a_file_that_is_damaged_while_it_is_used_lets_nobody_else_in(file, monkeypatch):
    ring = KeyRing(file=(path := file(entry("bob"))))
    path.write_text(path.read_text().replace("keys:", "kays:"))
    assert ring.find(b"key of bob") is not None
    assert ring.find(b"kays:") is None and ring.find(path.read_bytes().splitlines()[-1]) is None


def test_plain_keys_may_have_any_other_character(tmp_path):
    plain = "-9_aZ+/=.~\ninw_x:y\nschlüssel\n"
    (tmp_path / "keys").write_text(plain)
    ring = KeyRing(file=tmp_path / "keys")
    assert all(ring.find(key.encode()) for key in plain.split())
