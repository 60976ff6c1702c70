"""Where a model's residual stream runs, found by looking at what its parts pass on, and what is no such stream.

Everything is read between the blocks, so what passes there must be one state of ``[B, T, D]`` that the blocks, one
after the other, add to, and that ends, through the model's final norm, in what the LM head sees. Some architectures
pass something else (several streams side by side, a part of them, the same blocks twice): a head on those numbers would
mean nothing, so they are refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from inward.backbones.transformers.capture import states_of
from inward.errors import SetupError

TOLERANCE = 0.05
"""Relative, wide enough for bfloat16; something else than the residual stream is off by 1."""
_TOKENS = 6


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """The residual stream: the L blocks between which it runs, its width, and whether it is as wide after the final
    norm.
    """

    blocks: torch.nn.ModuleList
    width: int
    final_norm: bool


@dataclass(slots=True, eq=False)
class _Seen:
    """What one forward pass showed of a list of modules: who ran in which order, what went in first, what came out."""

    blocks: torch.nn.ModuleList
    order: list[int] = field(default_factory=list)
    entered: Any = None
    left: list[Any] = field(default_factory=list)


@torch.inference_mode()
def find_stream(base: Any, layers: int, vocabulary: int, name: str) -> Stream:
    """Runs a short text through ``base`` and looks.

    Args:
        base: the model without its LM head.
        layers: blocks that its configuration states.
        name: for messages.

    Raises:
        SetupError: there is no list of so many blocks, or what passes between them is not one residual stream.
    """
    stacks = [_Seen(m) for m in base.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == layers]
    if not stacks:
        raise SetupError(f"{name} has no list of {layers} blocks that could be read")
    ids = torch.arange(3, 3 + _TOKENS, device=base.device)[None] % vocabulary
    with ExitStack() as hooks:
        for seen in stacks:
            for k in range(layers):
                hooks.enter_context(_watch(seen, k))
        norms = _Norms(base, stacks, hooks)
        try:
            output = base(input_ids=ids)
        except Exception as error:  # a model may stumble over anything
            raise SetupError(f"{name} cannot read a plain text: {type(error).__name__}: {error}") from error
    ran = next((seen for seen in stacks if seen.order == list(range(layers))), None)
    if ran is None:
        orders = [seen.order for seen in stacks if seen.order] or [[]]
        raise SetupError(
            f"{name} does not run its {layers} blocks once each, in their order (it runs {_shown(orders[0])}), "
            "so a layer is no one place that could be read"
        )
    return _checked(ran, norms, getattr(output, "last_hidden_state", None), name)


def _checked(seen: _Seen, norms: _Norms, end: Any, name: str) -> Stream:
    entered = seen.entered
    width = entered.shape[-1] if isinstance(entered, torch.Tensor) else 0
    for k, states in enumerate([entered, *seen.left]):
        if not isinstance(states, torch.Tensor) or tuple(states.shape) != (1, _TOKENS, width):
            shape = list(states.shape) if isinstance(states, torch.Tensor) else type(states).__name__
            where = f"after block {k}" if k else "before block 1"
            raise SetupError(
                f"{name} passes {shape} on {where} where one residual stream of [1, {_TOKENS}, {width or 'width'}] was "
                "expected: it cannot be read"
            )
    last = seen.left[-1]
    if not isinstance(end, torch.Tensor):
        return Stream(seen.blocks, width, False)
    if not _alike(last, end) and not norms.lead(last, end):
        raise SetupError(
            f"what {name} passes from block to block is not its residual stream: no final norm leads from the last "
            "block's output to what its LM head sees; it cannot be read"
        )
    return Stream(seen.blocks, width, end.shape == last.shape)


def _watch(seen: _Seen, k: int) -> Any:
    def left(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.order.append(k)
        if k == 0:
            seen.entered = args[0] if args else kwargs.get("hidden_states")
        seen.left.append(states_of(output))

    return seen.blocks[k].register_forward_hook(left, with_kwargs=True)


class _Norms:
    """What modules outside the blocks made of a state, to find the one that leads from the last block to the end."""

    def __init__(self, base: Any, stacks: Sequence[_Seen], hooks: ExitStack) -> None:
        inside = {id(m) for seen in stacks for m in seen.blocks.modules()}
        self._steps: list[tuple[torch.Tensor, torch.Tensor]] = []
        for module in base.modules():
            if id(module) not in inside and module is not base:
                hooks.enter_context(module.register_forward_hook(self._note))

    def _note(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor):
            self._steps.append((args[0], output))

    def lead(self, start: torch.Tensor, end: torch.Tensor) -> bool:
        """Whether some chain of modules (a norm, a projection after it) leads from ``start`` to ``end``."""
        reached = [start]
        for before, after in self._steps:
            if any(_alike(before, state) for state in reached):
                reached.append(after)
        return any(_alike(state, end) for state in reached[1:])


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or not other.is_floating_point():
        return False
    difference = (one.float() - other.float()).norm()
    return bool(difference <= TOLERANCE * other.float().norm())


def _shown(order: Sequence[int]) -> str:
    return " ".join(str(k + 1) for k in order[:12]) + (" …" if len(order) > 12 else "") if order else "none of them"
