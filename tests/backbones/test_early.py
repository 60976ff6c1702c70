"""Guards and early rejection on the transformers backbone, on tiny models, with every kind of cache."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import transformers

from heads.test_watch import Heads
from inward.backbones.transformers.backbone import TransformersBackbone
from inward.heads.base import BackboneRef, Manifest
from inward.heads.legend import LegendHead
from inward.heads.watch import watch
from inward.types import EarlyRejection, Group, SamplingSpec, StopRule
from support import parity
from support.parity import LAYERS, WIDTH, ids


def direction(name: str, layer: int, seed: int, kind: str = "legend", **options: str) -> LegendHead:
    manifest = Manifest(
        name=name, kind=kind, version=1, created="", backbone=BackboneRef(name="x", fingerprint="f"), layers=(layer,),
        position="eos", template="", options=options,
    )  # fmt: skip
    return LegendHead(manifest, np.random.default_rng(seed).normal(size=(1, WIDTH)).astype(np.float32))


HEADS = Heads(direction("plain", 3, 1), direction("value", LAYERS, 2, "value", of="plain"))
PLAIN = HEADS.resolve("plain").readout
PROMPT = ids(np.random.default_rng(5), 21)
SPEC = SamplingSpec(6, max_tokens=24, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parity.save(transformers.LlamaConfig, tmp_path_factory.mktemp("early"))


@pytest.fixture(scope="module")
def opened(folder: Path):
    backbone = TransformersBackbone(folder, name="tiny", dtype="float32", device="cpu")
    yield backbone
    asyncio.run(backbone.close())


@pytest.fixture(params=["shared", "repeated", "alone", "none"])
def backbone(opened, request: pytest.FixtureRequest):
    opened._scheduler._sampler._caching = request.param
    return opened


def draw(backbone, spec, *more):
    async def run():
        groups = [Group(PROMPT, sampling=one) for one in (spec, *more)]
        calls = [backbone.sample_and_read(g, [PLAIN], watch=watch(g.sampling, "plain", HEADS)) for g in groups]
        return await asyncio.gather(*calls)

    return asyncio.run(run())


def token_scores(backbone, samples, name):
    """Of each sample, the head's score at every token, as they are read afterwards."""
    group = Group(PROMPT, tuple(sample.ids for sample in samples))
    (read,) = asyncio.run(backbone.read([group], [HEADS.resolve(name).readout], tokens=True))
    return [tokens[:, 0] for tokens in read.readings[0].tokens_TK]


def test_what_is_rejected_is_what_the_whole_answers_say_and_the_others_are_untouched(backbone):
    (whole, read), (samples, kept), (again, _) = draw(
        backbone, SPEC, SamplingSpec(6, max_tokens=24, seed=3, early_rejection=EarlyRejection(0.5, (6, 12))),
        SamplingSpec(6, max_tokens=24, seed=4),
    )  # fmt: skip
    assert all(sample.finished for sample in again)
    scores = token_scores(backbone, whole, "value")
    running = {i for i in range(6) if len(whole[i].ids) >= 6}
    for at in (6, 12):
        means = {i: float(scores[i][:at].mean()) for i in running if len(scores[i]) >= at}
        out = set(sorted(means, key=means.get)[: len(means) // 2])
        for i in out:
            assert (samples[i].finish_reason, samples[i].ids) == ("rejected", whole[i].ids[:at])
            assert samples[i].stop_score == pytest.approx(means[i], abs=1e-3)
        running -= out
    finished = [i for i, sample in enumerate(samples) if sample.finished]
    assert finished and len(finished) < 6
    assert [samples[i] for i in finished] == [whole[i] for i in finished]
    values, all_values = kept.readings[0].values_NK, read.readings[0].values_NK
    assert np.abs(values[finished] - all_values[finished]).max() < 1e-4
    assert np.isnan(values[[i for i in range(6) if i not in finished]]).all()
    if backbone._scheduler._sampler._caching in ("shared", "repeated"):  # all at one pace: nothing beyond the points
        assert sum(sample.held_back for sample in samples) == 0


def test_a_guard_stops_within_the_token_and_gives_what_is_safe(backbone):
    ((whole, _),) = draw(backbone, SPEC)
    scores = token_scores(backbone, whole, "plain")
    below = float(np.quantile(np.concatenate(scores), 0.05))
    rule = StopRule("plain", below=below, pool="last")
    ((samples, _),) = draw(backbone, SamplingSpec(6, max_tokens=24, seed=3, stop_when=rule))
    assert {sample.finish_reason for sample in samples} > {"guard"}
    for sample, one, own in zip(samples, whole, scores, strict=True):
        unsafe = np.flatnonzero(own < below)
        if not len(unsafe):
            assert sample == one
            continue
        assert (sample.finish_reason, sample.ids) == ("guard", one.ids[: unsafe[0]])
        assert sample.stop_score == pytest.approx(float(own[unsafe[0]]), abs=1e-3)
        assert len(sample.ids) + sample.held_back <= unsafe[0] + 1 + (unsafe[0] + 1 == len(one.ids))
        assert one.text.startswith(sample.text)


def assert_nothing_read(backbone):
    """Of a group whose every response a guard has ended: numbers that are NaN, and no tokens."""
    rule = StopRule("plain", below=1e6)
    group = Group(PROMPT, sampling=replace(SPEC, stop_when=rule))
    looks = watch(group.sampling, "plain", HEADS)
    samples, read = asyncio.run(backbone.sample_and_read(group, [PLAIN], tokens=True, watch=looks))
    assert {sample.finish_reason for sample in samples} == {"guard"}
    (reading,) = read.readings
    assert reading.values_NK.shape == (6, 1) and np.isnan(reading.values_NK).all()
    assert [tokens.shape for tokens in reading.tokens_TK] == [(0, 1)] * 6


def test_where_a_guard_ends_all_answers_their_tokens_are_read_as_none(backbone):
    assert_nothing_read(backbone)


def test_the_last_token_of_a_cut_answer_is_checked_too(backbone):
    """It never enters the model while the answer is drawn."""
    ((whole, _),) = draw(backbone, SPEC)
    scores = token_scores(backbone, whole, "plain")
    i = max(range(6), key=lambda i: int(scores[i].argmin()))
    at = int(scores[i].argmin())  # cut there, it is the last token
    assert at > 3
    below = (float(scores[i][at]) + float(scores[i][:at].min())) / 2
    last = SamplingSpec(6, max_tokens=at + 1, seed=3, stop_when=StopRule("plain", below=below, pool="last"))
    ((samples, _),) = draw(backbone, last)
    assert (samples[i].finish_reason, samples[i].ids) == ("guard", whole[i].ids[:at])


def follow(backbone, spec):
    """A single response, and each time that tokens were told: those tokens, and how many of them might be given."""
    looks, told = watch(spec, "plain", HEADS), []

    def on_tokens(ids):
        told.append((ids, len(ids) if looks is None else looks.give(0)))

    group = Group(PROMPT, sampling=spec)
    (sample,), _ = asyncio.run(backbone.sample_and_read(group, [PLAIN], watch=looks, on_tokens=on_tokens))
    return sample, told


def assert_told(backbone, seeds):
    """That tokens are told as they are drawn, and what a guard gives of them is safe and stays given."""
    spec = SamplingSpec(1, max_tokens=24)
    ended = 0
    for seed in seeds:
        whole, told = follow(backbone, replace(spec, seed=seed))
        assert len({ids for ids, _ in told}) >= len(whole.ids) - 2
        assert all(ids == whole.ids[: len(ids)] for ids, _ in told)
        (scores,) = token_scores(backbone, [whole], "plain")
        below = float(np.median(scores)) + 0.01 if seed % 2 else float(np.quantile(scores, 0.1))
        guarded, told = follow(
            backbone, replace(spec, seed=seed, stop_when=StopRule("plain", below=below, pool="last"))
        )
        unsafe = np.flatnonzero(scores < below)
        first = int(unsafe[0]) if len(unsafe) else len(scores)
        given = [n for _, n in told]
        assert given == sorted(given)
        assert all(n <= min(first, len(guarded.ids)) for n in given)
        assert guarded.ids == whole.ids[:first]
        ended += guarded.finish_reason == "guard" and max(given, default=0) > 0
    assert ended


def test_tokens_are_told_while_they_are_drawn_and_a_guard_goes_first(backbone):
    assert_told(backbone, range(6))


def ends(backbone, spec):
    """The responses of a drawing, and what was told of their ends: index, sample, and whether that was final."""
    looks, told = watch(spec, "plain", HEADS), []

    def on_ended(i, sample):
        told.append((i, sample, looks is None or looks.final(i)))

    call = backbone.sample_and_read(Group(PROMPT, sampling=spec), [PLAIN], watch=looks, on_ended=on_ended)
    samples, _ = asyncio.run(call)
    return samples, told


def assert_same(samples, others):
    """Drawn twice: scores may be rounded otherwise, and an engine that is told late draws a token more."""
    alike = [[replace(one, stop_score=None, held_back=0) for one in both] for both in (samples, others)]
    assert alike[0] == alike[1]
    stopped = [[one.stop_score for one in both if one.stop_score is not None] for both in (samples, others)]
    assert stopped[0] == pytest.approx(stopped[1], rel=1e-3, abs=1e-3)


def assert_ends_told(backbone, seeds):
    """That every end is told, the rejected ones before others end, and that what is final is what is given."""
    early = 0
    for seed in seeds:
        spec = SamplingSpec(6, max_tokens=24, seed=seed, early_rejection=EarlyRejection(0.5, (6, 12)))
        for one in (replace(spec, early_rejection=None), spec):
            samples, told = ends(backbone, one)
            assert_same(samples, draw(backbone, one)[0][0])
            assert {i: sample for i, sample, _ in told} == dict(enumerate(samples))
            assert all(sample == samples[i] for i, sample, final in told if final or not sample.finished)
        reasons = [sample.finish_reason for _, sample, _ in told]
        early += reasons.index("rejected") < len(told) - 3
    assert early


def test_each_end_is_told_when_it_comes(backbone):
    assert_ends_told(backbone, range(4))


def test_of_several_nothing_depends_on_who_is_told(backbone):
    told = []
    group = Group(PROMPT, sampling=SamplingSpec(1, max_tokens=24, seed=3))

    async def run():
        calls = [backbone.sample_and_read(group, [PLAIN], on_tokens=told.append), backbone.sample(group)]
        return await asyncio.gather(*calls)

    (samples, _), alone = asyncio.run(run())
    assert samples == alone
    assert told


def test_a_watch_that_fails_fails_its_own_drawing_only(backbone):
    class Broken:
        readouts = (PLAIN,)
        guards = False

        def look(self, news, ended=()):
            raise ZeroDivisionError

    async def run():
        group = Group(PROMPT, sampling=SPEC)
        calls = [backbone.sample_and_read(group, [PLAIN], watch=one) for one in (Broken(), None)]
        return await asyncio.gather(*calls, return_exceptions=True)

    failed, (samples, _) = asyncio.run(run())
    assert isinstance(failed, ZeroDivisionError)
    assert len(samples) == 6
