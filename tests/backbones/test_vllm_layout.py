"""Which tokens are read, who has which columns, and how rows become readings again: against the shared definition in
``readout``.
"""

from __future__ import annotations

import numpy as np
import pytest

from inward.backbones.base import first_alike
from inward.backbones.readout import NOWHERE, Fusion, Product, Span
from inward.backbones.vllm import layout as module
from inward.backbones.vllm.layout import ColumnTable, Policy, ReadRequest, WideLayout, readings, want
from inward.backbones.vllm.protocol import TableColumns
from inward.errors import InvalidField
from inward.types import Floats, Position, Readout, Tap

L, D = 3, 6
RNG = np.random.default_rng(0)
POSITIONS: tuple[Position, ...] = ("prompt", "last", "eos", "mean")
States = dict[int, Floats]
"""By place: 0 to L, and L + 1 after the final norm."""


def weight(K: int) -> Floats:
    return RNG.normal(size=(D, K)).astype(np.float32)


def mapped() -> tuple[Readout, ...]:
    shared = weight(2)
    return (
        Readout(tuple(Tap(2, position, shared) for position in POSITIONS)),
        Readout((Tap(2, "mean", weight(3), np.ones(3, np.float32)), Tap(L, "eos", weight(1), final_norm=True))),
        Readout((Tap(1, "prompt", weight(1)), Tap(1, "mean", weight(2)))),
    )


WHOLE = (*mapped(), Readout((Tap(1, "prompt"), Tap(1, "mean"), Tap(L, "last", final_norm=True))))


def table_rows(installed: list[TableColumns], states: States, width: int) -> Floats:
    """What the worker keeps of each token."""
    T = len(states[0])
    rows = np.full((T, width), np.nan, np.float32)
    for part in installed:
        K = len(part.columns)
        weight_DK = np.frombuffer(part.weight, np.float32).reshape(D, K)
        rows[:, part.columns] = states[part.place] @ weight_DK + np.frombuffer(part.bias, np.float32)
    return rows


def wide_rows(layout: WideLayout, states: States) -> Floats:
    rows = np.full((len(states[0]), layout.width), np.nan, np.float32)
    for part in layout.parts:
        bias = np.frombuffer(part.bias, np.float32)
        weight_DK = np.frombuffer(part.weight, np.float32).reshape(D, len(bias))
        product = Product((part.place, False), "last", part.state, weight_DK, bias)  # type: ignore[arg-type]
        rows[:, part.start : part.stop] = product.apply(states[part.place])
    return rows


@pytest.mark.parametrize("wide", [False, True], ids=["table", "wide"])
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("lengths", [(4, 3), (1, 1), (5, 0), (0, 2), (0, 0)], ids=str)
def test_readings_equal_those_of_the_shared_definition(lengths: tuple[int, int], tokens: bool, wide: bool) -> None:
    P, T = lengths
    every = WHOLE if wide else mapped()
    states = {place: RNG.normal(size=(P + T + 1, D)).astype(np.float32) for place in range(L + 2)}
    if wide:
        layout = WideLayout(1, every, layers=L, width=D)
        columns, rows = layout.columns, wide_rows(layout, states)
    else:
        table = ColumnTable(layers=L, width=D)
        installed = table.place(every)
        assert installed is not None
        columns = table.begin(every)
        rows = table_rows(installed, states, 40)
    for readouts in (every, every[1:2], every[:0:-1]):
        request = ReadRequest(Policy(), 1, {id(t): columns[id(t)] for r in readouts for t in r.taps}, readouts, tokens)
        needed, chosen = request.selected()
        wanted = want(P, T, request.positions, tokens=tokens)
        got = readings(chosen, readouts, [(wanted, rows[wanted.start : wanted.stop][:, needed])], tokens=tokens)
        span = Span(P - 1 if P else NOWHERE, range(P, P + T), P + T)
        (truth,) = Fusion(readouts, layers=L, width=D, tokens=tokens).evaluate(
            lambda place, r: states[L + 1 if place.final_norm else place.layer][r], [[span]]
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


def test_readouts_that_have_their_columns_keep_them_and_a_new_one_changes_the_number() -> None:
    table, (first, second, _) = ColumnTable(layers=L, width=D), mapped()
    assert table.place([first])
    assert (table.number, table.place([first])) == (1, [])
    columns = table.begin([first])
    assert table.place([first, second])
    assert table.number == 2
    again = table.begin([first, second])
    assert all((again[id(tap)] == columns[id(tap)]).all() for tap in first.taps)
    taken = [
        int(column)
        for readout in (first, second)
        for c in {*map(tuple, [again[id(t)] for t in readout.taps])}
        for column in c
    ]
    assert sorted(taken) == table.live() == list(range(6))


def test_a_weight_that_is_read_at_several_positions_stands_in_the_table_once() -> None:
    table, (readout, *_) = ColumnTable(layers=L, width=D), mapped()
    (part,) = table.place([readout]) or []
    assert len(part.columns) == 2
    assert len({tuple(table.begin([readout])[id(tap)]) for tap in readout.taps}) == 1


def test_columns_belong_to_what_is_live_whatever_number_of_versions_came_before() -> None:
    table = ColumnTable(layers=L, width=D)
    stays = mapped()[0]
    table.place([stays])
    kept = table.begin([stays])
    for _ in range(200):
        version = Readout((Tap(1, "last", weight(5)), Tap(2, "last", weight(5))))
        assert table.place([version, stays])
        table.begin([version])
        table.end([version])
        assert len(table.live()) == 12
        assert max(table.live()) <= 22
    assert all((table.begin([stays])[tap] == columns).all() for tap, columns in kept.items())
    assert table.number == 201


def test_idle_readouts_give_way_the_longest_unused_first_and_those_in_use_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "TABLE_COLUMNS", 12)
    table = ColumnTable(layers=L, width=D)
    a, b, c, d = (Readout((Tap(k, "last", weight(4)),)) for k in (0, 1, 2, 3))
    for readout in (a, b, c):
        assert table.place([readout])
    table.begin([a])
    table.end([a])  # so b is the longest unused
    assert table.place([d])
    assert [readout in table for readout in (a, b, c, d)] == [True, False, True, True]
    for readout in (a, c, d):
        table.begin([readout])
    assert table.place([b]) is None
    table.end([c])
    assert table.place([b])
    assert c not in table


def test_one_place_takes_no_more_than_its_product_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PLACE_COLUMNS", 6)
    table = ColumnTable(layers=L, width=D)
    a, b, other = (Readout((Tap(layer, "last", weight(4)),)) for layer in (1, 1, 2))
    assert table.place([a, other])
    table.begin([a, other])
    assert table.place([b]) is None
    assert table.place([Readout((Tap(3, "last", weight(7)),))]) is None


def test_whole_states_are_not_kept_and_get_rows_of_their_own() -> None:
    table = ColumnTable(layers=L, width=D)
    assert table.place([WHOLE[-1]]) is None
    assert table.place(WHOLE) is None
    assert table.live() == []
    layout = WideLayout(1, WHOLE[-1:], layers=L, width=D)
    assert layout.width == 2 * D


def test_what_could_not_be_installed_has_no_columns() -> None:
    table, (readout, *_) = ColumnTable(layers=L, width=D), mapped()
    table.place([readout])
    table.forget([readout])
    assert readout not in table
    assert table.live() == []


def test_cached_tokens_of_other_columns_and_policies_are_not_found() -> None:
    base, adapted = Policy(), Policy("step-1", 1, "adapters/step-1")
    assert len({ReadRequest(policy, number).salt for number in (1, 2) for policy in (base, adapted)}) == 4
    assert ReadRequest(base, 1).salt == ReadRequest(Policy(), 1).salt


@pytest.mark.parametrize(
    "tap", [Tap(L + 1, "last", np.ones((D, 1), np.float32)), Tap(1, "last", np.ones((5, 1), np.float32))]
)
def test_a_tap_that_does_not_fit_is_refused(tap: Tap) -> None:
    with pytest.raises(InvalidField):
        ColumnTable(layers=L, width=D).place([Readout((tap,))])


def test_the_first_of_equal_texts_stands_for_all() -> None:
    assert first_alike([(1,), (2,), (1,), (), (2,), ()]) == [0, 1, 0, 3, 1, 3]
