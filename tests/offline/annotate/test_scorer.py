import json
from types import SimpleNamespace

import httpx
import numpy as np
import pytest

from inward.errors import NotFound, SetupError, Unavailable
from inward.heads.held_out import HeldOut
from inward.offline.annotate import scorer as scoring
from inward.offline.annotate.scorer import COLUMNS, PATIENCE, RowScorer, ServiceScorer, TokenScores
from inward_client import aio
from inward_client.rows import Pair

PAIRS = [Pair("p", f"chosen {n}", "r") for n in range(9)]
HEAD = {"name": "legend", "kind": "legend", "version": 2}
HYBRID = {"name": "second", "kind": "hybrid", "version": 5}
BY = {"head": HEAD, "policy_version": "base", "confidence_head": None}
INFO = {
    "model": "m", "revision": "r", "fingerprint": "f", "dtype": "float32", "template": "t", "version": "0.1.0",
    "policy_version": "base", "heads": [],
}  # fmt: skip


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
    by = {"model": "m", "policy_version": "base", "head": HEAD}
    return httpx.Response(200, json={**by, "margins": margins(pairs)})


def refused(status, message="no", param=None, **headers):
    code = "deadline_exceeded" if status == 504 else "refused"
    error = {"message": message, "type": "error", "param": param, "code": code}  # of the service, not of a proxy
    return httpx.Response(status, json={"error": error}, headers=headers)


@pytest.fixture
def ask(monkeypatch):
    """Has ``handler`` answer; waits are written down instead of waited, and the clock goes on by them."""
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    monkeypatch.setattr(aio, "asyncio", SimpleNamespace(**vars(aio.asyncio) | {"sleep": sleep}))
    monkeypatch.setattr(aio, "time", SimpleNamespace(monotonic=lambda: sum(waits)))

    async def ask(handler, pairs=PAIRS):
        async with httpx.AsyncClient(transport=httpx.MockTransport(handler)) as client:
            return await ServiceScorer("http://service", None, head="legend", truncate=False, http=client).annotate(
                pairs
            )

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
        return refused(422, "chosen 6 is bad", param="pairs.0.chosen") if bad else answered(request)

    results, by = await ask(handler)
    assert [one.columns and one.columns["margin"] for one in results] == [0, 1, 2, 3, 4, 5, None, 7, 8]
    assert results[6].error == "chosen 6 is bad"
    assert by == BY


async def test_a_row_that_ends_workers_is_asked_once_and_harms_itself_only(ask):
    asked = []

    def handler(request):
        pairs = json.loads(request.content)["pairs"]
        asked.append([pair["chosen"] for pair in pairs])
        if asked[-1] == ["chosen 6"]:
            return refused(500, "3 workers ended while they had it", param="pairs.0")
        if "chosen 6" in asked[-1]:
            return refused(413)
        return answered(request)

    results, _ = await ask(handler)
    assert [one.columns and one.columns["margin"] for one in results] == [0, 1, 2, 3, 4, 5, None, 7, 8]
    assert results[6].error == "3 workers ended while they had it"
    assert asked.count(["chosen 6"]) == 1 and not ask.waits


async def test_a_row_that_takes_too_long_by_itself_harms_itself_only(ask):
    def handler(request):
        slow = any(pair["chosen"] == "chosen 6" for pair in json.loads(request.content)["pairs"])
        return refused(504, "not done within 95 s") if slow else answered(request)

    results, _ = await ask(handler)
    assert [one.error for one in results] == [None] * 6 + ["not done within 95 s"] + [None] * 2


async def test_rows_of_which_none_can_be_scored_have_their_own_errors(ask):
    asked = []

    def handler(request):
        pairs = json.loads(request.content)["pairs"]
        asked.append(len(pairs))
        return refused(500, f"not finite: {pairs[0]['chosen']}", param="pairs.0")

    results, by = await ask(handler, PAIRS[:3])
    assert [one.error for one in results] == [f"not finite: chosen {i}" for i in range(3)] and by is None
    assert sorted(asked) == [1, 1, 1, 2, 3] and not ask.waits


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
    assert 7 <= ask.waits[0] < 9
    assert len(ask.waits) == 3


async def test_a_service_that_stays_away_ends_the_job_and_says_that_nothing_is_lost(ask):
    with pytest.raises(Unavailable, match="what is done is kept"):
        await ask(lambda request: refused(503, "starting"))
    assert PATIENCE.patience - 1.25 * PATIENCE.cap <= sum(ask.waits) <= PATIENCE.patience
    assert max(ask.waits) <= 1.25 * PATIENCE.cap


@pytest.mark.parametrize("rounds", [2, 1000])
async def test_pairs_whose_shard_is_away_are_asked_again_as_patiently(ask, monkeypatch, rounds):
    monkeypatch.setattr(scoring, "asyncio", aio.asyncio)
    asked = []

    def handler(request):
        answer = answered(request).json()
        asked.append(1)
        if len(asked) <= rounds:
            error = {"message": "shard 2 of 3", "type": "unavailable_error", "param": "pairs.1", "code": "shard_away"}
            answer["margins"][1] = {"error": error, "truncated": False}
        return httpx.Response(200, json=answer)

    if rounds == 2:
        results, _ = await ask(handler)
        assert [one.columns["margin"] for one in results] == list(range(9)) and ask.waits == [0.5, 1.0]
        return
    with pytest.raises(Unavailable, match=r"shard 2 of 3.*what is done is kept"):
        await ask(handler)
    assert PATIENCE.patience - PATIENCE.cap <= sum(ask.waits) <= PATIENCE.patience


@pytest.mark.parametrize("status", [401, 404])
async def test_no_key_and_no_such_head_end_the_job_at_once(ask, status):
    with pytest.raises(SetupError, match="no such thing"):
        await ask(lambda request: refused(status, "no such thing"))
    assert not ask.waits


async def test_who_annotates_is_asked_first_and_the_head_of_the_confidence_is_the_one_that_gave_it():
    def handler(request):
        if request.url.path == "/info":
            return httpx.Response(200, json=INFO)
        by = {"model": "m", "policy_version": "base"}
        if request.url.path == "/reward":
            return httpx.Response(200, json={**by, "head": HYBRID, "rewards": [{"margin": 1.0}]})
        if request.url.path == "/heads/legend":
            return httpx.Response(200, json={**HEAD, "fit": fit_of("legend")})
        return httpx.Response(200, json={**by, "head": HEAD, "margins": [{"margin": 1.0, "confidence": 0.75}]})

    async with httpx.AsyncClient(transport=httpx.MockTransport(handler)) as client:
        scorer = ServiceScorer("http://service", None, head=None, truncate=False, http=client)
        annotator = await scorer.annotator()
        _, by = await scorer.annotate(PAIRS[:1])
    assert (annotator.head, annotator.confidence_head, annotator.model) == (HEAD, HYBRID, "m")
    assert annotator.held_out == HeldOut(0.7, 60)
    assert by == {**BY, "confidence_head": HYBRID}


async def test_a_service_gives_the_scores_of_all_tokens_and_one_bad_pair_harms_itself_only():
    """A request with the bad pair is refused as a whole; a tie has no token scores."""
    asked = []

    def handler(request):
        by = {"model": "m", "policy_version": "base", "head": HEAD}
        if request.url.path == "/info":
            return httpx.Response(200, json=INFO)
        if request.url.path == "/margin":
            return httpx.Response(200, json={**by, "margins": [{"margin": 1.0}]})
        if request.url.path.startswith("/heads"):
            return httpx.Response(200, json={**HEAD, "fit": {}})
        body = json.loads(request.content)
        asked.append(len(body["items"]))
        assert (body["head"], body["detail"]) == (HEAD["name"], ["tokens"])
        if any(item["response"] == "chosen 3" for item in body["items"]):
            return refused(422, "no")
        scores = [
            {"score": 1.0, "tokens": [0.5, 2.0], "token_texts": [item["response"], "!"]} for item in body["items"]
        ]
        return httpx.Response(200, json={**by, "scores": scores})

    pairs = [Pair("q", f"chosen {n}", f"rejected {n}") for n in range(40)]
    async with httpx.AsyncClient(transport=httpx.MockTransport(handler)) as client:
        scorer = ServiceScorer("http://service", None, head=None, truncate=False, http=client)
        found = await scorer.token_scores(pairs)
        assert await scorer.token_scores([]) == []
    assert max(asked) == 64
    assert [n for n, one in enumerate(found) if one is None] == [3]
    assert found[39] == TokenScores([("chosen 39", 0.5), ("!", 2.0)], [("rejected 39", 0.5), ("!", 2.0)])


async def test_an_address_that_is_none_is_refused():
    with pytest.raises(SetupError, match="must begin with http"):
        ServiceScorer("service:8080", None, head=None, truncate=False)


def fit_of(head):
    """As a manifest has it."""
    return {"metrics": {"held_out": 0.7, "held_out_rows": 60}} if head == HEAD["name"] else {}


async def tokens_of(head, pairs):
    """As the model has them."""
    return [TokenScores([(pair["chosen"], 1.0)], [(head, 0.0)]) for pair in pairs]


async def states_of(pairs):
    """As the backbone has them."""
    return np.ones((len(pairs), 2), dtype=np.float32)


class Row:
    """As ``api.rows`` gives it."""

    def __init__(self, margin=None, error=None):
        self.by, self.tokens = (None, 0) if error else (BY, 12)
        self._body = {"margin": margin, "error": error and {"message": error}, "truncated": False, "bin": 0.5}

    def body(self):
        return self._body


async def test_rows_that_are_scored_in_this_process_come_the_same_way():
    sent = []

    async def score(rows):
        sent.extend(rows)
        return [Row(error="too long") if row["chosen"] == "chosen 1" else Row(2.0) for row in rows]

    scorer = RowScorer(score, INFO, 4096, fit_of, tokens_of, states_of)
    annotator = await scorer.annotator()
    assert annotator.head == HEAD and annotator.held_out == HeldOut(0.7, 60)
    results, by = await scorer.annotate(PAIRS[:3])
    assert await scorer.token_scores(PAIRS[:1]) == [TokenScores([(PAIRS[0].chosen, 1.0)], [("legend", 0.0)])]
    assert (await scorer.states(PAIRS[:3])).shape == (3, 2)
    assert sent[1:4] == [pair.body() for pair in PAIRS[:3]]
    assert [(one.error, one.tokens) for one in results] == [(None, 12), ("too long", 0), (None, 12)]
    assert (results[0].columns["margin"], results[0].columns["margin_bin"], by) == (2.0, 0.5, BY)


async def test_no_such_head_in_this_process_is_refused_before_anything_is_read():
    async def score(rows):
        raise NotFound("no head 'nobody'")

    with pytest.raises(SetupError, match="nobody"):
        await RowScorer(score, INFO, None, fit_of, tokens_of, states_of).annotator()
