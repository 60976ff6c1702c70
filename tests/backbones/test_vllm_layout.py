"""Which tokens are read, and how rows become readings again: against the shared definition in ``readout``."""

from __future__ import annotations

import numpy as np
import pytest

from inward.backbones.base import first_alike
from inward.backbones.readout import NOWHERE, Fusion, Span
from inward.backbones.vllm import layout as edition_module
from inward.backbones.vllm.layout import Policy, ReadoutLayout, ReadRequest, succeeding, want
from inward.errors import InvalidField
from inward.types import Floats, Position, Readout, Tap

L, D = 3, 6
RNG = np.random.default_rng(0)
POSITIONS: tuple[Position, ...] = ("prompt", "last", "eos", "mean")


def weight(K: int) -> Floats:
    return RNG.normal(size=(D, K)).astype(np.float32)


READOUTS = (
    Readout(tuple(Tap(2, position, weight(2)) for position in POSITIONS)),
    Readout(
        (Tap(1, "last"), Tap(2, "mean", weight(3), np.ones(3, np.float32)), Tap(L, "eos", weight(1), final_norm=True))
    ),
    Readout((Tap(1, "prompt"), Tap(1, "mean"))),
)


def row(edition: ReadoutLayout, states: dict[tuple[int, bool], Floats], token: int) -> Floats:
    """What the worker keeps of a token."""
    return np.concatenate([part.product.apply(states[part.product.place][[token]])[0] for part in edition.parts])


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("lengths", [(4, 3), (1, 1), (5, 0), (0, 2), (0, 0)], ids=str)
def test_readings_equal_those_of_the_shared_definition(lengths: tuple[int, int], tokens: bool) -> None:
    P, T = lengths
    edition = ReadoutLayout(1, READOUTS, layers=L, width=D)
    states = {
        place: RNG.normal(size=(P + T + 1, D)).astype(np.float32) for place in ((1, False), (2, False), (L, True))
    }
    for readouts in (READOUTS, READOUTS[1:2], READOUTS[:0:-1]):
        wanted = want(P, T, {tap.position for readout in readouts for tap in readout.taps}, tokens=tokens)
        rows = np.stack(
            [row(edition, states, token) for token in range(wanted.start, wanted.stop)] or [np.zeros(edition.width)]
        )
        got = edition.readings(readouts, [(wanted, rows[: wanted.stop - wanted.start])], tokens=tokens)
        span = Span(P - 1 if P else NOWHERE, range(P, P + T), P + T)
        (truth,) = Fusion(readouts, layers=L, width=D, tokens=tokens).evaluate(
            lambda place, r: states[place][r], [[span]]
        )
        for one, other in zip(got, truth, strict=True):
            np.testing.assert_allclose(one.values_NK, other.values_NK, rtol=1e-5, atol=1e-5)
            if tokens:
                assert one.tokens_TK is not None
                assert other.tokens_TK is not None
                np.testing.assert_allclose(one.tokens_TK[0], other.tokens_TK[0], rtol=1e-5, atol=1e-5)


def test_only_tokens_that_some_position_reads_are_wanted() -> None:
    assert (want(5, 3, ["last"], tokens=False).start, want(5, 3, ["last"], tokens=False).stop) == (7, 8)
    assert (want(5, 3, ["eos"], tokens=False).start, want(5, 3, ["eos"], tokens=False).stop) == (7, 9)
    assert want(5, 3, ["mean"], tokens=False).start == 5
    assert want(5, 3, ["last"], tokens=True).start == 5
    assert want(5, 3, ["prompt"], tokens=False).start == 4
    assert want(5, 0, ["mean"], tokens=False).start == 4


def test_an_edition_that_has_all_readouts_stays_and_a_new_one_keeps_the_older() -> None:
    empty = ReadoutLayout(0, (), layers=L, width=D)
    first = succeeding(empty, READOUTS[:1], 1, layers=L, width=D)
    assert succeeding(first, READOUTS[:1], 2, layers=L, width=D) is first
    second = succeeding(first, READOUTS[1:2], 2, layers=L, width=D)
    assert second.number == 2
    assert set(map(id, second.readouts)) == set(map(id, READOUTS[:2]))


def test_cached_tokens_of_other_editions_and_policies_are_not_found() -> None:
    first, second = (ReadoutLayout(number, (), layers=L, width=D) for number in (1, 2))
    base, adapted = Policy(), Policy("step-1", 1, "adapters/step-1")
    assert len({ReadRequest(edition, policy).salt for edition in (first, second) for policy in (base, adapted)}) == 4
    assert ReadRequest(first, base).salt == ReadRequest(first, Policy()).salt


def test_older_readouts_make_room_the_oldest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, c = (Readout((Tap(1, "last", weight(4)),)) for _ in range(3))
    monkeypatch.setattr(edition_module, "COLUMNS", 8)
    edition = ReadoutLayout(0, (), layers=L, width=D)
    for number, readout in enumerate((a, b, c), start=1):
        edition = succeeding(edition, [readout], number, layers=L, width=D)
    assert edition.readouts == (b, c)


def test_more_numbers_than_are_kept_for_every_token_get_an_edition_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(edition_module, "COLUMNS", 2 * D)
    current = succeeding(ReadoutLayout(0, (), layers=L, width=D), [Readout((Tap(1, "last"),))], 1, layers=L, width=D)
    assert not current.wide
    wide = succeeding(current, [Readout(tuple(Tap(k, "eos") for k in range(1, L + 1)))], 2, layers=L, width=D)
    assert wide.wide
    assert len(wide.readouts) == 1


def test_a_tap_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InvalidField, match="layer 4"):
        succeeding(ReadoutLayout(0, (), layers=L, width=D), [Readout((Tap(4, "last"),))], 1, layers=L, width=D)


def test_the_first_of_equal_texts_stands_for_all() -> None:
    assert first_alike([(1,), (2,), (1,), (), (2,), ()]) == [0, 1, 0, 3, 1, 3]
