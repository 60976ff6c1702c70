"""What is counted, and that it is counted once."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

import inward
from inward import metrics
from inward.errors import NotFound
from inward.heads.registry import Registry
from inward.types import Group, SamplingSpec
from support.corridor import FakeHead, corridor, groups


def value(name, **labels):
    return metrics.REGISTRY.get_sample_value(name, labels) or 0.0


@pytest.fixture
def head(request):
    """A head with a name of its own, so that its series begin at zero."""
    return FakeHead(name=request.node.name[-40:])


async def test_every_score_is_counted_once_and_in_its_tenth_of_the_calibration_set(head):
    head.manifest = SimpleNamespace(calibration={"score_deciles": [-1e9] * 4 + [0.0] + [1e9] * 4})
    async with corridor() as opened:
        opened.registry.heads = {head.ref.name: head}
        scored = await opened.score(groups(20, responses=2), heads=(head.ref.name,))
    scores = [score for one in scored for score in one.scores[0].scores_N]
    assert value("inward_reward_count", head=head.ref.name, version="1") == 40
    tenths = {
        d: value("inward_reward_decile_total", head=head.ref.name, version="1", decile=str(d)) for d in range(1, 11)
    }
    assert tenths == dict.fromkeys(range(1, 11), 0) | {5: sum(s < 0 for s in scores), 6: sum(s >= 0 for s in scores)}


async def test_a_pair_gives_a_margin_and_says_whether_it_agrees(head):
    async with corridor() as opened:
        opened.registry.heads = {head.ref.name: head}
        scored = await opened.score(groups(20, responses=2), heads=(head.ref.name,), pair=True)
    agree = sum(one.scores[0].pair.label_agrees for one in scored)
    assert value("inward_margin_count", head=head.ref.name, version="1") == 20
    assert value("inward_margin_bucket", head=head.ref.name, version="1", le="0.0") == 20 - agree
    assert value("inward_label_agreement_total", head=head.ref.name, agrees="true") == agree
    assert value("inward_label_agreement_total", head=head.ref.name, agrees="false") == 20 - agree


async def test_the_gain_of_the_best_of_n_is_above_the_mean_of_what_was_drawn(head):
    async with corridor() as opened:
        opened.registry.heads = {head.ref.name: head}
        (scored,) = await opened.score(
            [Group((1, 2, 3), sampling=SamplingSpec(n=4, max_tokens=5, seed=1))], heads=(head.ref.name,)
        )
        await opened.score(groups(3, responses=4), heads=(head.ref.name,))  # given, not drawn
    scores = scored.scores[0].scores_N
    assert value("inward_best_of_n_gain_count", head=head.ref.name) == 1
    assert value("inward_best_of_n_gain_sum", head=head.ref.name) == pytest.approx(max(scores) - sum(scores) / 4)


async def test_a_failure_is_counted_once_by_its_code():
    before = value("inward_failures_total", reason=NotFound.code)
    async with corridor() as opened:
        failed = await opened.score(groups(3), heads=("nobody",))
    assert all(isinstance(one, NotFound) for one in failed)
    assert value("inward_failures_total", reason=NotFound.code) == before + 3


def test_the_counters_of_a_loaded_head_begin_at_zero():
    Registry.open(Path(inward.__file__).parent / "models/toy/heads")
    for counter, labels in (("abstentions", {}), ("head_updates", {}), ("label_agreement", {"agrees": "false"})):
        assert metrics.REGISTRY.get_sample_value(f"inward_{counter}_total", {"head": "hybrid", **labels}) is not None


def test_every_series_is_named_in_the_prometheus_way_and_observed_in_one_file():
    text = metrics.exposition().decode()
    ours = re.findall(r"^# TYPE (inward_\S+) (\S+)$", text, re.M)
    assert {kind for _, kind in ours} == {"counter", "gauge", "histogram"}
    assert all(name.endswith("_total") for name, kind in ours if kind == "counter")
    source = Path(metrics.__file__).parent
    for name in (name for name in vars(metrics) if name.isupper() and hasattr(getattr(metrics, name), "_labelnames")):
        users = [
            path
            for path in source.rglob("*.py")
            if path.name != "metrics.py" and re.search(rf"metrics\.{name}\b", path.read_text())
        ]
        assert users or name == "DECILES_TOTAL", f"{name} is never observed"


def test_the_scores_of_a_version_that_is_served_begin_at_zero():
    metrics.serving("silent", "1")
    labels = {"head": "silent", "version": "1"}
    assert metrics.REGISTRY.get_sample_value("inward_reward_count", labels) == 0


def test_only_the_newest_versions_of_a_head_have_series():
    def versions(name):
        samples = (sample for family in metrics.REGISTRY.collect() for sample in family.samples)
        return {
            sample.labels["version"] for sample in samples if sample.name == name and sample.labels["head"] == "moving"
        }

    for version in map(str, range(1, 30)):  # as many online updates
        metrics.serving("moving", version)
        metrics.SCORES.labels(head="moving", version=version).observe(1.0)
        metrics.deciles("moving", version)[0].inc()
    newest = {str(version) for version in range(30 - metrics.KEPT_VERSIONS, 30)}
    assert versions("inward_reward_count") == versions("inward_reward_decile_total") == newest
    metrics.serving("moving", "3")  # rolled back
    metrics.deciles("moving", "3")[0].inc()
    assert versions("inward_reward_decile_total") == {"3", *sorted(newest, key=int)[1:]}


def test_another_registry_shows_ours_without_those_of_the_process(monkeypatch):
    theirs = CollectorRegistry()
    ProcessCollector(registry=theirs)
    monkeypatch.setattr(metrics.prometheus_client, "REGISTRY", theirs)
    metrics.show_elsewhere()
    names = re.findall(r"^# TYPE (\S+)", generate_latest(theirs).decode(), re.M)
    assert "inward_requests_total" in names
    assert len(names) == len(set(names)) > len([name for name in names if name.startswith("inward_")]) > 0
