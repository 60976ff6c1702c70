"""The service as the trainer uses it: what is waited for, what is asked at once, and which answers are believed."""

import asyncio
import json
import logging

import httpx
import pytest

from inward_trainer.errors import OptionsError, ServiceError, ServiceGone, Stopped
from inward_trainer.pairs import read_row
from inward_trainer.progress import Progress, told
from inward_trainer.service import Draw, Service
from inward_trainer.stopping import Stopping
from support.fake_inward import FakeInward, score, service, service_of
from support.small_policy import rows

PAIRS = [read_row(row, str(i)) for i, row in enumerate(rows(4))]


def draws(n):
    return [Draw(i, f"prompt {i}", seed=i) for i in range(n)]


def test_what_passes_is_waited_for_and_what_does_not_is_told():
    fake = FakeInward()
    fake.refuse_next = 2
    with service(fake) as asked:
        assert asked.find_head(None, "--head").kind == "hybrid"
        with pytest.raises(ServiceError, match="expected 1") as refusal:
            asked.update_head("hybrid", 5, PAIRS, 1e-3)
    assert refusal.value.status == 409
    fake.refuse_next = 10**6
    with service(fake, patience=0.5) as asked, pytest.raises(ServiceGone, match="not now"):
        asked.find_head(None, "--head")


def test_a_service_that_is_killed_and_comes_back_is_waited_for():
    fake, deaths = FakeInward(), [httpx.ReadError("cut off"), httpx.ConnectError("refused")]

    def answer(request):
        body = json.loads(request.content) if request.content else None
        status, content = fake.answer(request.method, request.url.path, body)
        if deaths:
            raise deaths.pop(0)  # after the work is done: the answer is what is lost
        return httpx.Response(status, json=content)

    with service_of(answer) as asked:
        asked.update_head("hybrid", 1, PAIRS, 1e-3)
        deaths.append(httpx.ReadError("cut off"))
        asked.update_head("hybrid", 2, PAIRS, 1e-3)
    assert list(fake.updates) == [1, 2]


def test_an_update_is_applied_once_however_often_it_is_sent():
    fake = FakeInward()
    with service(fake) as asked:
        for sequence, some in ((1, PAIRS[:2]), (1, PAIRS[:2]), (2, PAIRS[2:]), (1, PAIRS[:2])):
            asked.update_head("hybrid", sequence, some, 1e-3)
    assert fake.updates == {1: [pair.texts() for pair in PAIRS[:2]], 2: [pair.texts() for pair in PAIRS[2:]]}


def test_a_url_that_is_none_is_an_option_to_mend():
    with pytest.raises(OptionsError, match=r"--url: url must begin with http"):
        Service("localhost:8080")


def test_no_more_is_asked_at_once_than_the_service_computes():
    busy = most = 0
    fake = FakeInward(about={"concurrency": 2})

    async def answer(request):
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        await asyncio.sleep(0.02)
        busy -= 1
        body = json.loads(request.content) if request.content else None
        status, content = fake.answer(request.method, request.url.path, body)
        return httpx.Response(status, json=content)

    with service_of(answer, at_once=8) as asked:
        asked.draw(draws(6), 2, {}, "hybrid")
        assert most == 6
        most = 0
        assert asked.info().concurrency == 2
        asked.draw(draws(6), 2, {}, "hybrid")
        asked.rewards(PAIRS * 100)
    assert most == 2


def test_draws_that_take_too_long_are_asked_for_in_parts_from_then_on():
    fake = FakeInward(most_at_once=3)
    with service(fake) as asked:
        first, second = asked.draw(draws(2), 8, {"top_k": 8}, "hybrid")
        asked_for = [body["n"] for path, body in fake.asked if path == "/rerank"]
        (third,) = asked.draw(draws(1), 8, {}, "hybrid")
    assert asked_for.count(2) == 8 and 8 in asked_for and 4 in asked_for
    assert [body["n"] for path, body in fake.asked if path == "/rerank"][len(asked_for) :] == [2, 2, 2, 2]
    for drawn in (first, second, third):
        assert len({sample.text for sample in drawn.samples}) == 8, "each part has a seed of its own"
        assert [sample.score for sample in drawn.samples] == sorted(
            (score(s.text) for s in drawn.samples), reverse=True
        )
        assert drawn.confidence is None, "no request has seen best and worst together: it is asked for"


def test_samples_that_were_rejected_are_left_out():
    fake = FakeInward()
    original = fake.answer

    def rejecting(method, path, body):
        status, answer = original(method, path, body)
        if body.get("early_rejection"):
            answer["results"][0]["finish_reason"] = "rejected"
        return status, answer

    fake.answer = rejecting
    rule = {"keep": 0.5, "at": [16]}
    with service(fake) as asked:
        ((whole,), (kept,)) = (asked.draw(draws(1), 4, {}, "hybrid", early_rejection) for early_rejection in ({}, rule))
    assert [body.get("early_rejection") for path, body in fake.asked if path == "/rerank"] == [None, rule]
    assert kept.samples == whole.samples[1:]


def test_one_sample_that_takes_too_long_is_told_with_what_would_help():
    with (
        service(FakeInward(most_at_once=0)) as asked,
        pytest.raises(ServiceError, match=r"not done within 95 s.*max_tokens in --sampling"),
    ):
        asked.draw(draws(1), 4, {}, "hybrid")


def test_a_request_that_is_wrong_for_every_prompt_ends_the_draw_and_one_prompt_does_not():
    fake = FakeInward()
    original = fake.answer

    def refusing(method, path, body):
        if "top_k" in body["sampling"]:
            return 422, {"error": {"message": "no such number", "param": "sampling.top_k"}}
        if body["prompt"] == "prompt 1":
            return 422, {"error": {"message": "half a surrogate pair", "param": "prompt"}}
        return original(method, path, body)

    fake.answer = refusing
    with service(fake) as asked:
        assert [one is None for one in asked.draw(draws(3), 2, {}, "hybrid")] == [False, True, False]
        with pytest.raises(ServiceError, match="no such number"):
            asked.draw(draws(3), 2, {"top_k": -1}, "hybrid")


@pytest.mark.parametrize(
    ("status", "param", "ends"),
    [
        (422, "prompt", False),
        (422, "prompt.0.role", False),
        (413, "prompt", False),
        (413, "sampling.max_tokens", False),
        (413, None, False),
        (422, "early_rejection.max_loss", True),
        (422, "stop_when.fpr", True),
        (422, None, True),
        (413, "n", True),
        (404, "early_rejection.head", True),
        (400, None, True),
    ],
)
def test_only_what_is_wrong_with_a_prompt_costs_no_more_than_that_prompt(status, param, ends):
    fake = FakeInward()
    original = fake.answer

    def refusing(method, path, body):
        if body["prompt"] == "prompt 1":
            return status, {"error": {"message": "not like this", "param": param}}
        return original(method, path, body)

    fake.answer = refusing
    with service(fake) as asked:
        if ends:
            with pytest.raises(ServiceError, match=f"{status}: not like this"):
                asked.draw(draws(3), 2, {}, "hybrid")
        else:
            assert [one is None for one in asked.draw(draws(3), 2, {}, "hybrid")] == [False, True, False]


def test_if_no_pair_of_a_list_can_be_scored_none_is():
    def refused(request):
        first = {"message": "no text", "param": "pairs.0.chosen", "code": "invalid_field"}
        return httpx.Response(422, json={"error": first})

    with service_of(refused) as asked:
        assert [reward.chosen_score for reward, _ in asked.rewards(PAIRS)] == [None] * 4


def test_answers_of_another_policy_are_asked_for_again(tmp_path):
    fake = FakeInward(adapters=tmp_path)
    (tmp_path / "run-000002").mkdir()
    (tmp_path / "run-000002/adapter_model.safetensors").touch()
    with service(fake) as asked:
        asked.load_policy("run-000002")
        for ask in (
            lambda: asked.draw(draws(1), 2, {}, "hybrid")[0].policy_version,
            lambda: asked.rewards(PAIRS)[0][1],
            lambda: asked.scores([("p", "r")], "monitor") and fake.policy,
            lambda: asked.margins(PAIRS) and fake.policy,
        ):
            fake.policies.append("base")  # it was started again
            assert ask() == "run-000002"


def test_a_wait_ends_when_somebody_asks_and_a_step_that_ends_has_a_little_longer():
    stopping, begun = Stopping(), []

    async def slow(seconds):
        begun.append(seconds)
        await asyncio.sleep(seconds)
        return "done"

    stopping.request()
    assert stopping.wait(slow(0.05), grace_s=60) == "done"
    with pytest.raises(Stopped):
        stopping.wait(slow(600))
    with pytest.raises(Stopped):
        stopping.wait(slow(600), grace_s=0.05)


def test_the_console_is_told_what_is_waited_for_and_what_would_help(monkeypatch, caplog):
    for name in ("FIRST_S", "EVERY_S", "HINT_S"):
        monkeypatch.setattr(f"inward_trainer.progress.{name}", 0.01)

    async def wait():
        async with told("sampling", 32, "fewer --samples") as progress:
            progress.done, progress.tokens = 12, 100
            await asyncio.sleep(0.2)

    with caplog.at_level(logging.INFO, "inward_trainer"):
        asyncio.run(wait())
    assert "sampling 12/32, " in caplog.text and "tokens/s" in caplog.text
    assert caplog.text.count("shorter waits: fewer --samples") == 1
    assert Progress("sampling", 32, done=12, tokens=0).line() == "sampling 12/32"
