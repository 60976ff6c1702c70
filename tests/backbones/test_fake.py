from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from inward.backbones.fake import FakeBackbone
from inward.errors import EngineDead, InternalError, InvalidField
from inward.types import Group, Position, Reading, Readout, SamplingSpec, Tap

PROMPT = (5, 6, 7)


def read(backbone: FakeBackbone, *groups: Group, taps: tuple[Tap, ...], tokens: bool = False) -> list[Reading]:
    return [result.readings[0] for result in asyncio.run(backbone.read(groups, [Readout(taps)], tokens=tokens))]


def state(ids: tuple[int, ...], layer: int = 2, position: Position = "last") -> np.ndarray:
    (reading,) = read(FakeBackbone(), Group((), (ids,)), taps=(Tap(layer, position),))
    return reading.values_NK[0]


def test_a_state_depends_on_the_whole_prefix_and_the_layer_and_on_nothing_else() -> None:
    (reading, _) = read(FakeBackbone(), Group(PROMPT, ((8, 9), (9,))), Group((1,), ((2,),)), taps=(Tap(2, "last"),))
    np.testing.assert_array_equal(reading.values_NK[0], state((*PROMPT, 8, 9)))
    np.testing.assert_array_equal(reading.values_NK[1], state((*PROMPT, 9)))
    assert not np.allclose(state((*PROMPT, 8, 9)), state((1, 6, 7, 8, 9)))
    assert not np.allclose(state((5,), 1), state((5,), 2))


def test_positions_are_those_of_the_contract() -> None:
    taps = tuple(Tap(1, position) for position in ("prompt", "last", "eos", "mean"))
    (reading,) = read(FakeBackbone(eos_id=0), Group(PROMPT, ((8, 9), ())), taps=taps)
    prompt, last, eos, mean = np.split(reading.values_NK[0], 4)
    np.testing.assert_array_equal(prompt, state(PROMPT, 1))
    np.testing.assert_array_equal(last, state((*PROMPT, 8, 9), 1))
    np.testing.assert_array_equal(eos, state((*PROMPT, 8, 9, 0), 1))
    np.testing.assert_allclose(mean, (state((*PROMPT, 8), 1) + last) / 2, rtol=1e-6)
    of_empty = np.split(reading.values_NK[1], 4)
    for position in (0, 1, 3):
        np.testing.assert_array_equal(of_empty[position], prompt)


def test_tokens_repeat_the_prompt_and_otherwise_read_each_token() -> None:
    (reading,) = read(FakeBackbone(), Group(PROMPT, ((8, 9), ())), taps=(Tap(1, "prompt"), Tap(1, "mean")), tokens=True)
    assert reading.tokens_TK is not None
    np.testing.assert_array_equal(reading.tokens_TK[0][:, :16], np.tile(state(PROMPT, 1), (2, 1)))
    np.testing.assert_array_equal(reading.tokens_TK[0][:, 16:], [state((*PROMPT, 8), 1), state((*PROMPT, 8, 9), 1)])
    assert reading.tokens_TK[1].shape == (0, 32)


def test_states_have_unit_variance_and_the_final_norm_fixes_their_length() -> None:
    (reading,) = read(
        FakeBackbone(width=512), Group(PROMPT, ((8,),)), taps=(Tap(4, "last"), Tap(4, "last", final_norm=True))
    )
    plain, normed = np.split(reading.values_NK[0], 2)
    assert abs(plain.std() - 1) < 0.1
    np.testing.assert_allclose(np.mean(normed**2), 1, rtol=1e-5)


def test_a_tap_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InvalidField, match="layer 5"):
        read(FakeBackbone(layers=4), Group(PROMPT, ((8,),)), taps=(Tap(5, "last"),))


def test_it_counts_what_it_computed_fails_when_told_and_dies() -> None:
    backbone, good, bad = FakeBackbone(), Group(PROMPT, ((8,),)), Group(PROMPT, ((13,),))
    read(backbone, good, good, taps=(Tap(1, "last"),))
    assert (backbone.calls, list(backbone.computed)) == (1, [good, good])
    backbone.fail_on(lambda group: group is bad)
    with pytest.raises(InternalError):
        read(backbone, good, bad, taps=(Tap(1, "last"),))
    assert backbone.healthy()
    backbone.die()
    assert not backbone.healthy()
    with pytest.raises(EngineDead):
        read(backbone, good, taps=(Tap(1, "last"),))


def test_samples_follow_the_seed_and_the_limit() -> None:
    def draw(seed: int | None) -> list[object]:
        return list(asyncio.run(backbone.sample(Group(PROMPT, sampling=SamplingSpec(20, max_tokens=6, seed=seed)))))

    backbone = FakeBackbone(eos_id=3)
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)
    samples = asyncio.run(backbone.sample(Group(PROMPT, sampling=SamplingSpec(20, max_tokens=6, seed=0))))
    assert all(3 not in sample.ids and 1 <= len(sample.ids) <= 6 for sample in samples)
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}


def test_it_needs_no_torch() -> None:
    code = "import sys, inward.backbones.fake; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    service = Path(__file__).parents[2] / "service"
    assert subprocess.run([sys.executable, "-c", code], cwd=service, check=False).returncode == 0
