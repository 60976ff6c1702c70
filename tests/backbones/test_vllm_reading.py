"""What is kept of a step, on a model that is none: the two ways to multiply, and what a replayed graph leaves to do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm does it", exc_type=ImportError)

from inward.backbones.vllm import reading
from inward.backbones.vllm.protocol import EXTRA_ARG, TABLE_COLUMNS, TableColumns, WidePart, Wish
from inward.backbones.vllm.reading import ResidualReader, TableRows, WideRows
from inward.backbones.vllm.worker import RequestTable

LAYERS, WIDTH, SLOTS, LAYER = 3, 8, 200, "attention"
KEPT = 16


class Block(torch.nn.Module):
    """Passes on two tensors whose sum is the residual stream."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed)))

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        stream = hidden_states if residual is None else hidden_states + residual
        return torch.tanh(stream @ self.weight), stream


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Block(seed) for seed in range(LAYERS))
        self.norm = torch.nn.LayerNorm(WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        residual = None
        for block in self.layers:
            hidden, residual = block(hidden, residual)
        return self.norm(hidden + residual)


class Stepped:
    """A reader on such a model, and steps of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
        self.mapping: dict[str, torch.Tensor] = {}
        monkeypatch.setattr(reading, "get_forward_context", lambda: SimpleNamespace(slot_mapping=self.mapping))
        self.model = Model()
        self.reader = ResidualReader(
            self.model, LAYERS, WIDTH, tokens=64, kept=kept, dtype=torch.float32, device=torch.device("cpu")
        )
        self.reader.open_table(SLOTS, LAYER)

    @torch.inference_mode()
    def step(self, hidden: torch.Tensor, slots: list[int], padding: int = 0) -> None:
        self.mapping = {LAYER: torch.tensor(slots + [-1] * padding)}
        self.model(torch.cat([hidden, torch.zeros(padding, WIDTH)]))
        self.reader.finish_step(len(slots))

    def rows(self, slots: list[int]) -> np.ndarray[Any, Any]:
        table = self.reader.rows(0)
        assert isinstance(table, TableRows)
        return table.take(np.array(slots)).numpy()


def columns(place: int, at: list[int], into: list[int], seed: int) -> TableColumns:
    rng = np.random.default_rng(seed)
    weight, bias = rng.normal(size=(WIDTH, len(at))), rng.normal(size=len(at))
    return TableColumns(place, at, into, weight.astype(np.float32).tobytes(), bias.astype(np.float32).tobytes())


@pytest.mark.parametrize("tokens", [1, KEPT, KEPT + 1, 50])
def test_states_that_are_kept_give_the_numbers_that_each_place_gives(
    monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    parts = [columns(0, [0, 1], [5, 2], 0), columns(2, [3], [0], 1), columns(LAYERS + 1, [0], [1], 2)]
    hidden, slots = torch.randn(tokens, WIDTH), list(range(100, 100 + tokens))
    found = []
    for kept in (0, KEPT):
        stepped = Stepped(monkeypatch, kept)
        stepped.reader.install(parts, [0, 1, 2, 5])
        stepped.step(hidden, slots, padding=3)
        found.append(stepped.rows(slots)[:, [0, 1, 2, 5]])
        assert np.isnan(stepped.rows([99, 100 + tokens])).all()
    assert np.isfinite(found[0]).all() and found[0].std() > 0.1
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_new_weights_take_the_place_of_those_that_nobody_has(monkeypatch: pytest.MonkeyPatch) -> None:
    stepped = Stepped(monkeypatch, KEPT)
    hidden = torch.randn(2, WIDTH)
    stepped.reader.install([columns(1, [0], [0], 0)], [0])
    stepped.step(hidden, [1, 2])
    stepped.reader.install([columns(3, [0], [0], 1), columns(3, [1], [TABLE_COLUMNS - 1], 1)], [0, TABLE_COLUMNS - 1])
    stepped.step(hidden, [3, 4])
    first, second = stepped.rows([1, 2]), stepped.rows([3, 4])
    assert not np.allclose(first[:, 0], second[:, 0])
    np.testing.assert_allclose(second[:, 0], second[:, TABLE_COLUMNS - 1])


@pytest.mark.parametrize(("kept", "replayed"), [(0, False), (KEPT, False), (KEPT, True)])  # else nothing is captured
def test_whole_states_are_read_of_the_wanted_tokens_only(
    monkeypatch: pytest.MonkeyPatch, kept: int, replayed: bool
) -> None:
    stepped = Stepped(monkeypatch, kept)
    hidden, slots = torch.randn(6, WIDTH), [20, 31, 22, 23, 40, 25]
    stepped.step(hidden, slots)
    empty = np.zeros(0, np.float32).tobytes()
    stepped.reader.install_wide(7, WIDTH, [WidePart(2, 0, WIDTH, True, empty, empty)])
    rows = stepped.reader.rows(7)
    assert isinstance(rows, WideRows)
    rows.expect(np.array([31, 40]))
    if replayed:
        stepped.reader.finish_step(len(slots))
    else:
        stepped.step(hidden, slots)
    stepped.mapping = {}
    with torch.inference_mode():
        first, stream = stepped.model.layers[0](hidden, None)
        second, stream = stepped.model.layers[1](first, stream)
    taken = rows.take(np.array([40, 31, 22])).numpy()
    np.testing.assert_allclose(taken[:2], (second + stream).numpy()[[4, 1]], rtol=1e-5, atol=1e-6)
    assert np.isnan(taken[2]).all() and np.isnan(rows.take(np.array([31])).numpy()).all()


def scheduled(tokens: int, **blocks: list[int]) -> Any:
    """What vLLM's scheduler says of a step in which these requests begin."""
    new = [
        SimpleNamespace(
            req_id=name, num_computed_tokens=0, block_ids=[own],
            sampling_params=SimpleNamespace(extra_args={EXTRA_ARG: list(Wish(f"key {name}", 0, 0))}),
        )
        for name, own in blocks.items()
    ]  # fmt: skip
    cached = SimpleNamespace(req_ids=[], resumed_req_ids=set(), new_block_ids=[], num_computed_tokens=[])
    return SimpleNamespace(
        scheduled_new_reqs=new, scheduled_cached_reqs=cached, num_scheduled_tokens=dict.fromkeys(blocks, tokens),
        preempted_req_ids=set(),
    )  # fmt: skip


@pytest.mark.parametrize("preempted", [True, False])
def test_rows_of_a_request_that_has_lost_its_blocks_are_read_again_and_not_those_of_who_has_them_now(
    preempted: bool,
) -> None:
    rows = torch.full((64, TABLE_COLUMNS), torch.nan)
    reader: Any = SimpleNamespace(rows=lambda wide: TableRows(rows), device="cpu")
    table = RequestTable(block_size=4)
    table.note(scheduled(8, own=[2, 3]))
    rows[8:16] = 1
    step = scheduled(8, other=[2, 3] if preempted else [4, 5])  # vLLM schedules it before it knows that "own" has ended
    step.preempted_req_ids = {"own"} if preempted else set()
    table.note(step)
    rows[8:16] = 99 if preempted else 1
    table.gather(["own"], reader)
    assert table.gathered["key own"][:, 0].tolist() == ([] if preempted else [1.0] * 8)
