import json

import httpx
import pytest

from inward.errors import SetupError, Unavailable
from inward.offline.annotate import asking
from inward.offline.annotate.asking import COLUMNS, MarginClient
from inward.offline.data.layouts import Pair

PAIRS = [Pair("p", f"chosen {n}", "r") for n in range(9)]
BY = {"head": {"name": "legend", "kind": "legend", "version": 2}, "policy_version": "base"}


def margins(pairs):
    """As the route answers: a margin made of the text's last number."""
    given = {
        "error": None,
        "truncated": False,
        "margin_scaled": 0.5,
        "bin": 1.0,
        "chosen_score": 1.0,
        "rejected_score": 0.0,
    }
    return [
        {**given, "margin": float(pair["chosen"].split()[-1]), "label_agrees": True, "confidence": None}
        for pair in pairs
    ]


def answered(request):
    pairs = json.loads(request.content)["pairs"]
    return httpx.Response(200, json={**BY, "margins": margins(pairs)})


def refused(status, message="no", **headers):
    return httpx.Response(status, json={"error": {"message": message}}, headers=headers)


@pytest.fixture
def ask(monkeypatch):
    """Has ``handler`` answer; waits are written down instead of waited."""
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    monkeypatch.setattr(asking.asyncio, "sleep", sleep)

    async def ask(handler, pairs=PAIRS):
        async with httpx.AsyncClient(transport=httpx.MockTransport(handler), base_url="http://service") as client:
            return await MarginClient(client, head="legend", truncate=False).annotate(pairs)

    ask.waits = waits
    return ask


async def test_results_come_in_order_with_all_columns_and_name_who_gave_them(ask):
    results, by = await ask(answered)
    assert [one.columns["margin"] for one in results] == list(range(9))
    assert set(results[0].columns) == set(COLUMNS)
    assert results[0].columns["margin_bin"] == 1.0
    assert by == BY


async def test_a_row_that_the_service_refuses_harms_itself_only(ask):
    def handler(request):
        bad = any(pair["chosen"] == "chosen 6" for pair in json.loads(request.content)["pairs"])
        return refused(422, "chosen 6 is bad") if bad else answered(request)

    results, by = await ask(handler)
    assert [one.columns and one.columns["margin"] for one in results] == [0, 1, 2, 3, 4, 5, None, 7, 8]
    assert results[6].error == "chosen 6 is bad"
    assert by == BY


@pytest.mark.parametrize("status", [413, 504])
async def test_what_is_too_much_at_once_is_asked_in_parts(ask, status):
    def handler(request):
        return refused(status) if len(json.loads(request.content)["pairs"]) > 2 else answered(request)

    results, _ = await ask(handler)
    assert [one.columns["margin"] for one in results] == list(range(9))


async def test_overload_and_broken_connections_are_waited_for_as_long_as_the_service_says(ask):
    answers = [refused(503, **{"retry-after": "7"}), httpx.ConnectError("refused"), refused(500)]

    def handler(request):
        if not answers:
            return answered(request)
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    results, _ = await ask(handler)
    assert len(results) == 9
    assert ask.waits[0] == 7
    assert ask.waits == sorted(ask.waits)


async def test_a_service_that_stays_away_ends_the_job_and_says_that_nothing_is_lost(ask):
    with pytest.raises(Unavailable, match="what is done is kept"):
        await ask(lambda request: refused(503, "starting"))
    assert max(ask.waits) <= asking.LONGEST_WAIT


@pytest.mark.parametrize("status", [401, 404])
async def test_no_key_and_no_such_head_end_the_job_at_once(ask, status):
    with pytest.raises(SetupError, match="no such thing"):
        await ask(lambda request: refused(status, "no such thing"))
    assert not ask.waits
