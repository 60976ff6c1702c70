"""``inward keys``: a key is shown once, and its file never holds it."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from inward.__main__ import main
from inward.api.keys import KeyRing, read_keys


@pytest.fixture
def file(tmp_path):
    return tmp_path / "keys.yaml"


def inward(file, *words):
    return main(["keys", *words, "--api-keys-file", str(file)])


def test_a_new_key_opens_and_the_file_does_not_hold_it(file, capsys):
    assert inward(file, "new", "trainer", "--scope", "admin", "--expires", "90d", "--quota", "1000") == 0
    said = capsys.readouterr()
    secret = said.out.strip()
    assert secret.startswith("inw_") and len(secret) > 40
    assert secret not in file.read_text() and "trainer" in said.err
    key = KeyRing(file=file).find(secret.encode())
    assert (key.name, key.scope, key.quota) == ("trainer", "admin", 1000)
    assert abs(key.expires - datetime.now(UTC) - timedelta(days=90)) < timedelta(hours=1)


def test_they_are_listed_without_what_is_kept_of_them_and_revoked_by_name(file, capsys):
    for name in ("a", "b"):
        assert inward(file, "new", name, "--expires", "2099-01-31") == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert inward(file, "list", "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        {"name": name, "scope": "read", "expires": "2099-01-31T00:00:00Z", "quota": None} for name in ("a", "b")
    ]
    ring = KeyRing(file=file)
    assert ring.find(first.encode()).name == "a"
    assert inward(file, "revoke", "a") == 0
    assert ring.find(first.encode()) is None
    assert [key.name for key in read_keys(file)] == ["b"]
    assert inward(file, "list") == 0
    assert capsys.readouterr().out == "name b  scope read  expires 2099-01-31T00:00:00Z\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["new", "a"], "has a key called a"),
        (["new", "plain"], "plain is what keys without a name are called"),
        (["new", "b c"], "name: String should match pattern"),
        (["new", "b", "--expires", "soon"], "expires: Input should be a valid datetime"),
        (["new", "b", "--expires", "2020-01-31"], "--expires 2020-01-31 is past"),
        (["new", "b", "--expires", "0d"], "--expires 0d is past"),
        (["new", "b", "--quota", "0"], "quota: Input should be greater than or equal to 1"),
        (["revoke", "b"], "has no key called b; it has a"),
    ],
)
def test_what_cannot_be_done_is_said_and_changes_nothing(file, words, said, capsys):
    assert inward(file, "new", "a") == 0
    before = file.read_text()
    capsys.readouterr()
    assert inward(file, *words) == 2
    assert said in capsys.readouterr().err
    assert file.read_text() == before


def test_a_file_of_plain_keys_is_not_written_to(file, capsys):
    file.write_text("a-plain-key\n")
    assert inward(file, "new", "a") == 2
    assert "has plain keys, one a line" in capsys.readouterr().err
    assert file.read_text() == "a-plain-key\n"
    assert inward(file, "list") == 0
    assert capsys.readouterr().out == "name plain  scope admin\n"


def test_without_a_file_it_asks_for_one(capsys):
    assert main(["keys", "list"]) == 2
    assert "--api-keys-file" in capsys.readouterr().err
