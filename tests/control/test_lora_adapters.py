"""Switching the policy that a backbone carries: names, history, what is refused."""

from __future__ import annotations

import asyncio

import pytest

from inward.backbones.fake import FakeBackbone
from inward.control.lora_adapters import REMEMBERED, LocalPolicyControl
from inward.errors import Conflict, InvalidField, NotFound
from inward.metrics import exposition
from inward.types import Group, SamplingSpec, Scored
from support.adapters import write_adapter
from support.corridor import Corridor, corridor, groups


@pytest.fixture
def folder(tmp_path):
    for name in ("v1", "v2"):
        write_adapter(tmp_path / "adapters" / name)
    return tmp_path / "adapters"


@pytest.fixture
def policies(folder):
    return LocalPolicyControl(FakeBackbone(), folder)


def versions(shown):
    return [activation["policy_version"] for activation in shown["history"]]


async def test_it_begins_with_the_base_and_tells_what_could_be_carried(policies):
    shown = await policies.show()
    assert (shown["policy_version"], shown["previous"], shown["available"]) == ("base", None, ["base", "v1", "v2"])
    assert versions(shown) == ["base"]


async def test_switching_and_going_back_are_remembered_in_order_and_a_repeat_changes_nothing(policies):
    for version in ("v1", "v2", "v2", "base", "v1"):
        shown = await policies.switch(version)
        assert shown["policy_version"] == version
    assert versions(shown) == ["base", "v1", "v2", "base", "v1"]
    assert shown["previous"] == "base"
    times = [activation["activated"] for activation in shown["history"]]
    assert times == sorted(times)
    assert 'inward_policy_info{version="v1"} 1.0' in exposition().decode()
    assert 'version="v2"' not in exposition().decode()


async def test_a_history_does_not_grow_without_end(policies):
    for i in range(REMEMBERED + 5):
        shown = await policies.switch(("v1", "v2")[i % 2])
    assert len(shown["history"]) == REMEMBERED
    assert shown["history"][-1]["policy_version"] == shown["policy_version"]


@pytest.mark.parametrize(
    "name", ["../v1", "v1/../v2", "", ".", "..", ".hidden", "a" * 129, "v1\x00", "/etc", "v 1", "v1\n", "ü"]
)
async def test_a_name_that_is_a_path_is_refused(policies, name):
    with pytest.raises(InvalidField, match="letters"):
        await policies.switch(name)
    assert (await policies.show())["policy_version"] == "base"


async def test_what_leads_out_of_the_folder_is_refused(policies, folder, tmp_path):
    outside = write_adapter(tmp_path / "outside")
    (folder / "linked").symlink_to(outside)
    inside = write_adapter(folder / "inside")
    (inside / "adapter_model.safetensors").unlink()
    (inside / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    for name in ("linked", "inside"):
        with pytest.raises(InvalidField, match="leads out"):
            await policies.switch(name)
    (folder / "alias").symlink_to(folder / "v1")
    assert (await policies.switch("alias"))["policy_version"] == "alias"


async def test_an_unknown_or_broken_version_leaves_the_former_one(policies, folder):
    await policies.switch("v1")
    (folder / "v2" / "adapter_model.safetensors").unlink()
    with pytest.raises(NotFound, match="available: v1, v2"):
        await policies.switch("v3")
    with pytest.raises(InvalidField, match="cannot be used"):
        await policies.switch("v2")
    shown = await policies.show()
    assert (shown["policy_version"], versions(shown)) == ("v1", ["base", "v1"])


async def test_without_a_folder_there_is_only_the_base():
    policies = LocalPolicyControl(FakeBackbone(), None)
    assert (await policies.switch("base"))["available"] == ["base"]
    with pytest.raises(Conflict, match="--adapters"):
        await policies.switch("v1")


async def test_a_follower_carries_what_it_is_told_with_the_others_history(policies, folder):
    await policies.switch("v2")
    follower = LocalPolicyControl(FakeBackbone(), folder)
    await follower.follow(policies.history)
    assert await follower.show() == await policies.show()
    lost = LocalPolicyControl(FakeBackbone(), None)
    with pytest.raises(Conflict):
        await lost.follow(policies.history)
    assert (await lost.show())["policy_version"] == "base"


async def truth(folder, version, wanted):
    """What a backbone that only ever carried ``version`` says."""
    async with corridor() as c:
        await LocalPolicyControl(c.backbone, folder).switch(version)
        return [a.scores[0].scores_N for a in await c.score(wanted)]


async def test_switching_mid_traffic_each_answer_comes_wholly_from_the_version_that_it_names(folder):
    given, drawn = groups(60, responses=2), [Group((i + 1,), sampling=SamplingSpec(2, 8, seed=i)) for i in range(20)]
    of = {
        version: dict(zip(given + drawn, await truth(folder, version, given + drawn), strict=True))
        for version in ("base", "v1", "v2")
    }

    async def ask(c: Corridor, group: Group) -> tuple[Group, Scored]:
        return group, (await c.score([group]))[0]

    async with corridor(tokens=150, delay_per_token=2e-5) as c:
        policies = LocalPolicyControl(c.backbone, folder)
        answers = [await ask(c, given[0])]
        asking = asyncio.gather(*(ask(c, group) for group in given + drawn))
        for version in ("v1", "v2", "base", "v1") * 5:
            await policies.switch(version)
            for _ in range(3):
                await asyncio.sleep(0)
        answers += [*await asking, await ask(c, given[0])]
    assert len({answer.policy_version for _, answer in answers}) > 1
    for group, answer in answers:
        assert answer.scores[0].scores_N == pytest.approx(of[answer.policy_version][group], abs=1e-4)
