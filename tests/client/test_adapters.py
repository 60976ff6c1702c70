"""What training frameworks call, without the frameworks: the forms of their rows, and their exact calls against a
live server."""

from __future__ import annotations

import inspect
import pickle

import pytest

from inward_client import Inward, NotFound
from inward_client.adapters import nemo, rows, verl
from inward_client.adapters.trl import AsyncInwardReward, InwardReward, with_confidences, with_margins

PROMPT = "How do I get into my neighbour's house without a key?"
SAFE = "That sounds like a crime. I can't help you break into a house."
HARMFUL = "Wait until they are away, then break the window and climb in."
ASKED = [{"role": "user", "content": PROMPT}]


def said(text):
    return [{"role": "assistant", "content": text}]


def test_a_pair_is_the_same_in_every_form_of_trl():
    plain = {"prompt": ASKED, "chosen": SAFE, "rejected": HARMFUL}
    assert rows.pair({"prompt": PROMPT, "chosen": SAFE, "rejected": HARMFUL}) == {**plain, "prompt": PROMPT}
    assert rows.pair({"prompt": ASKED, "chosen": said(SAFE), "rejected": said(HARMFUL), "id": 3}) == plain
    assert rows.pair({"chosen": ASKED + said(SAFE), "rejected": ASKED + said(HARMFUL)}) == plain
    assert rows.pair({"prompt": ASKED, "chosen": ASKED + said(SAFE), "rejected": ASKED + said(HARMFUL)}) == plain
    assert rows.pair({"prompt": ASKED, "chosen": SAFE, "rejected": said(HARMFUL)}) == plain
    assert rows.pair({"prompt": PROMPT, "chosen": ASKED + said(SAFE), "rejected": ASKED + said(HARMFUL)}) == {
        **plain,
        "prompt": PROMPT,
    }
    assert rows.pair({"prompt": PROMPT, "chosen": SAFE, "rejected": said(HARMFUL)}) == {**plain, "prompt": PROMPT}


def test_a_pair_has_its_whole_context():
    """The turns before the answer, a system column; what `/margin` scores then is what annotate scores."""
    system, more = {"role": "system", "content": "Be kind."}, [*said("No."), {"role": "user", "content": "Why?"}]
    row = {"system": "Be kind.", "prompt": ASKED, "chosen": more + said(SAFE), "rejected": more + said(HARMFUL)}
    assert rows.pair(row) == {"prompt": [system, *ASKED, *more], "chosen": SAFE, "rejected": HARMFUL}


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": SAFE, "rejected": HARMFUL},
        {"chosen": said(SAFE), "rejected": said(HARMFUL)},
        {"chosen": ASKED + said(SAFE), "rejected": [{"role": "user", "content": "Other?"}, *said(HARMFUL)]},
        {"chosen": ASKED, "rejected": ASKED},
        {"prompt": PROMPT, "chosen": SAFE, "rejected": [{"role": "assistant", "content": None, "tool_calls": [{}]}]},
    ],
)
def test_a_pair_without_one_prompt_or_with_an_answer_that_is_no_text_is_refused(row):
    with pytest.raises(ValueError, match=r"\w"):
        rows.pair(row)


def test_an_item_has_its_whole_context_and_nothing_in_it_is_lost():
    turn = {"role": "user", "content": [{"type": "text", "text": "Hi"}], "tool_calls": None, "token_ids": [1]}
    asked = [{"role": "user", "content": "Hi"}]
    refusal = [{"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}]
    assert rows.item([turn], refusal) == {"prompt": asked, "response": "No."}
    assert rows.item([turn], said("a") + asked + said("b")) == {"prompt": asked + said("a") + asked, "response": "b"}
    with pytest.raises(ValueError, match="a part of type 'image'"):
        rows.item([{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image"}]}], "a")


@pytest.mark.parametrize("head", [None, "legend"])
async def test_both_reward_functions_give_the_same_for_text_and_messages(demo_server, head):
    one, other = (
        InwardReward(demo_server.url, head=head, timeout=300),
        AsyncInwardReward(demo_server.url, head=head, timeout=300),
    )
    logged = {}
    columns = {
        "completion_ids": [[1], [2]],
        "trainer_state": None,
        "log_metric": logged.__setitem__,
        "source": ["a", "b"],
    }
    text = one(prompts=[PROMPT, PROMPT], completions=[SAFE, HARMFUL], **columns)
    chat = await other(prompts=[ASKED, ASKED], completions=[said(SAFE), said(HARMFUL)], **columns)
    assert text == pytest.approx(chat, abs=0.05)
    assert text[0] > text[1]
    assert logged == {"inward/unscored": 0.0}
    assert inspect.iscoroutinefunction(other.__call__)
    assert not inspect.iscoroutinefunction(one.__call__)
    again = pickle.loads(pickle.dumps(one))  # noqa: S301
    assert again(prompts=[PROMPT], completions=[SAFE]) == pytest.approx(text[:1], abs=0.05)
    for function in (one, again):
        function.close()
    await other.close()


def test_a_completion_that_cant_be_scored_is_none_whether_or_not_another_can(demo_server, caplog):
    reward = InwardReward(demo_server.url, value="probability", timeout=300)
    unusable = ["\ud800", [], [{"role": "tool", "content": "4"}], 7, None]
    found = reward(prompts=[PROMPT] * 6, completions=[*unusable, SAFE])
    assert found[:-1] == [None] * 5
    assert 0 <= found[-1] <= 1
    assert "completion 2 can't be scored: " in caplog.text
    logged = {}
    assert reward(prompts=[PROMPT], completions=["\ud800"], log_metric=logged.__setitem__) == [None]
    assert reward(prompts=[PROMPT], completions=[7]) == [None]
    assert logged == {"inward/unscored": 1.0}
    reward.close()


def test_what_is_not_the_completions_fault_is_an_error(demo_server):
    reward = InwardReward(demo_server.url, head="no-such-head", timeout=300)
    with pytest.raises(NotFound):
        reward(prompts=[PROMPT], completions=[SAFE])
    reward.close()


async def test_verl_gets_a_score_by_its_own_call(demo_server):
    """Arguments by name as its reward managers give them, and the configuration's ``reward_kwargs`` beside them."""
    call = {
        "data_source": "hh", "solution_str": SAFE, "ground_truth": "",
        "extra_info": {"question": PROMPT, "num_turns": None, "rollout_reward_scores": {}}, "url": demo_server.url,
    }  # fmt: skip
    one = verl.compute_score(**call)
    other = await verl.compute_score_async(**call, reward_router_address=None)
    assert one["score"] == pytest.approx(other["score"], abs=0.05)
    assert 0 <= one["probability"] <= 1
    assert verl.compute_score(**call, head="legend")["score"] != one["score"]
    broken = verl.compute_score(**{**call, "solution_str": "\ud800"}, unscored=-3.0)
    assert (broken["score"], broken["unscored"], one["unscored"]) == (-3.0, 1.0, 0.0)
    assert broken.keys() == one.keys(), "verl refuses a batch whose rows differ in them"
    with pytest.raises(ValueError, match="extra_info"):
        verl.compute_score("hh", SAFE, None, {"index": 1}, url=demo_server.url)
    verl._client(demo_server.url).close()
    await verl._client_of_loop(demo_server.url).close()


def test_nemo_rl_gets_a_reward_for_each_conversation(demo_server):
    environment = nemo.InwardEnvironment({"url": demo_server.url, "timeout": 300})
    log = [{"role": "user", "content": PROMPT, "token_ids": [1, 2]}]
    stepped = environment.step([[*log, *said(SAFE)], [*log, *said(HARMFUL)]], [{"a": 1}, None])
    assert stepped.rewards.shape == (2,)
    assert stepped.rewards[0] > stepped.rewards[1]
    assert stepped.terminateds.tolist() == [True, True]
    assert stepped.metadata == [{"a": 1}, None]
    batch, metrics = environment.global_post_process_and_metrics({"total_reward": stepped.rewards})
    assert metrics["inward/mean_reward"] == pytest.approx(float(stepped.rewards.mean()))
    assert batch["total_reward"] is stepped.rewards
    broken = environment.step([[*log, *said("\ud800")], log], [None, None])
    assert broken.rewards.tolist() == [0.0, 0.0]
    assert environment.global_post_process_and_metrics({})[1] == {"inward/unscored": 1.0}
    environment.shutdown()


def test_a_dataset_gets_margins_and_confidences_and_loses_what_cant_be_scored(demo_server, caplog):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    pairs = [{"prompt": PROMPT, "chosen": SAFE, "rejected": HARMFUL, "margin": 9.0}] * 2
    pairs.append({"prompt": PROMPT, "chosen": HARMFUL, "rejected": SAFE, "margin": 9.0})
    dataset = datasets.Dataset.from_list(pairs)
    with Inward(demo_server.url, timeout=300) as inward:
        annotated = with_margins(dataset, inward)
        raw = with_margins(dataset, inward, margin="margin", drop_flipped=True)
        sure = with_confidences(dataset, inward)
    assert annotated.column_names == ["prompt", "chosen", "rejected", "margin"]
    assert all(0 <= margin <= 1 for margin in annotated["margin"])
    assert annotated["margin"][2] == 0.0
    assert len(raw) == 2
    assert "1 of 3" in caplog.text
    assert sure["confidence"][0] > 0.5


def test_a_dataset_loses_rows_that_are_no_pairs_too(demo_server, caplog):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    usable = {"prompt": PROMPT, "chosen": SAFE, "rejected": HARMFUL}
    with Inward(demo_server.url, timeout=300) as inward:
        mixed = with_margins(datasets.Dataset.from_list([usable, {**usable, "prompt": None}]), inward)
        none = with_margins(datasets.Dataset.from_list([{**usable, "prompt": None}]), inward)
    assert (len(mixed), len(none)) == (1, 0)
    assert "pair 1 can't be scored: 'prompt' is missing" in caplog.text
