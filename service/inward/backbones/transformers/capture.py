"""Reading states while a model runs: hooks on the blocks that somebody reads, and on no others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from inward.backbones.readout import Product, ReadPlace, Selection, Span, select
from inward.types import Floats


class DeepEnough(Exception):
    """Raised in the hook of the deepest wanted block, so that the ones above it do not run."""


@dataclass(frozen=True, slots=True, eq=False)
class DeviceProduct:
    """A ``Product`` with its weights where the states are."""

    product: Product
    weight_DK: torch.Tensor
    bias_K: torch.Tensor

    @classmethod
    def of(cls, product: Product, device: torch.device) -> DeviceProduct:
        return cls(product, torch.from_numpy(product.weight_DK).to(device), torch.from_numpy(product.bias_K).to(device))

    def read(self, states: torch.Tensor, selection: Selection) -> torch.Tensor:
        """The wanted rows of ``[..., D]`` states, and nothing else: ``[N, K]`` float32, still on the device."""
        rows = _to(selection.rows_R, states.device)
        read_ND = states.flatten(0, -2).index_select(0, rows).float()
        if selection.counts_N is not None:
            counts = _to(selection.counts_N, states.device)
            text = torch.arange(len(counts), device=states.device).repeat_interleave(counts)
            sums_ND = read_ND.new_zeros(len(counts), read_ND.shape[1]).index_add_(0, text, read_ND)
            read_ND = sums_ND / counts[:, None]
        mapped_NK = torch.addmm(self.bias_K, read_ND, self.weight_DK)
        return torch.cat([read_ND, mapped_NK], dim=1) if self.product.state else mapped_NK


def capture(
    base: torch.nn.Module,
    blocks: torch.nn.ModuleList,
    products: Sequence[DeviceProduct],
    spans: Sequence[Span],
    forward: Callable[[], Any],
) -> list[Floats]:
    """Runs ``forward``, no deeper than needed, and reads each product for all ``spans``.

    Args:
        base: the model without its LM head; its ``last_hidden_state`` is the stream after the final norm.
        blocks: its L blocks.
        forward: calls ``base``.

    Returns:
        for each product ``[N, K]``, or ``[T, K]`` where it reads ``tokens``.
    """
    outputs: dict[int, torch.Tensor] = {}
    selections = {where: select(where, spans) for where in {product.product.where for product in products}}
    wanted: dict[ReadPlace, list[int]] = {}
    for i, product in enumerate(products):
        wanted.setdefault(product.product.place, []).append(i)
    deepest = max(wanted, default=ReadPlace(0, False))

    def read(place: ReadPlace, states: torch.Tensor) -> None:
        for i in wanted[place]:
            outputs[i] = products[i].read(states, selections[products[i].product.where])
        if place == deepest:
            raise DeepEnough

    with _hooks(base, blocks, wanted, read), suppress(DeepEnough):
        forward()
    return [outputs[i].cpu().numpy() for i in range(len(products))]


@contextmanager
def last_states(
    base: torch.nn.Module, blocks: torch.nn.ModuleList, places: Iterable[ReadPlace]
) -> Iterator[dict[ReadPlace, torch.Tensor]]:
    """The states of the last token of each row, ``[B, D]``, at these places, once the model has run."""
    states: dict[ReadPlace, torch.Tensor] = {}

    def read(place: ReadPlace, states_BTD: torch.Tensor) -> None:
        states[place] = states_BTD[:, -1]

    with _hooks(base, blocks, places, read):
        yield states


@contextmanager
def _hooks(
    base: torch.nn.Module,
    blocks: torch.nn.ModuleList,
    places: Iterable[ReadPlace],
    read: Callable[[ReadPlace, torch.Tensor], None],
) -> Iterator[None]:
    with ExitStack() as hooks:
        for place in places:
            hooks.enter_context(_hook(base, blocks, place, read))
        yield


def _hook(
    base: torch.nn.Module,
    blocks: torch.nn.ModuleList,
    place: ReadPlace,
    read: Callable[[ReadPlace, torch.Tensor], None],
) -> Any:
    def entering(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read(place, args[0] if args else kwargs["hidden_states"])

    def leaving(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        read(place, states_of(output))

    def normed(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        read(place, output.last_hidden_state)

    if place.final_norm:
        return base.register_forward_hook(normed)
    if place.layer == 0:
        return blocks[0].register_forward_pre_hook(entering, with_kwargs=True)
    return blocks[place.layer - 1].register_forward_hook(leaving)


def states_of(output: Any) -> Any:
    """The hidden states among what a block returns."""
    return output[0] if isinstance(output, tuple | list) else output


def _to(rows: NDArray[np.int64], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(rows).to(device, non_blocking=True)
