"""What is the fastest way to read this model that leaves its numbers alone? Asked at loading, of the model itself.

The truth is the plain forward: one text at a time, eager attention, in float32. Queries and keys are scaled up
meanwhile, so that what an attention kernel leaves out shows as it would in a trained model on long texts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import numpy as np
import torch

from inward.backbones.readout import Fusion
from inward.backbones.transformers import attention
from inward.backbones.transformers.attention import AttentionLayout
from inward.backbones.transformers.capture import DeviceProduct
from inward.backbones.transformers.forward import forward_packed, forward_padded
from inward.backbones.transformers.model import Model
from inward.backbones.transformers.packing import pack, pad
from inward.types import Floats, Group, Ids, Readout, Tap

log = logging.getLogger(__name__)
TOLERANCE = {torch.float32: 2e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
"""Root mean square difference, each dimension in units of its own standard deviation over the tokens. A state that
leaks from one text to another, or a wrong position, is a difference near 1."""
Mode = Literal["packed", "padded", "single"]
"""Groups end to end in one row, each prompt once; whole texts in padded batches; one text at a time."""
_NATIVE = "eager"


def choose_mode(model: Model) -> Mode:
    """The fastest mode whose states equal the plain forward's; leaves the model with the attention that belongs to
    it.
    """
    attention.register()
    with torch.inference_mode():
        check = _Check(model)
        ours = check.ours()
        attempts: list[tuple[str, Mode]] = [(name, "packed") for name in ours]
        attempts += [(name, "padded") for name in (*ours, _NATIVE)]
        for name, mode in attempts:
            reason = check.differs(name, mode)
            if reason is None:
                return mode
            log.info("%s reading with attention %s is not used: %s", mode, name, reason)
        _switch(model, _NATIVE)
        return "single"


@torch.inference_mode()
def is_causal(model: Model) -> bool:
    """Whether states are independent of the tokens to their right."""
    prompt, following = (1, 2, 3), (4, 5)
    products = _all_states(model)
    short, long = (forward_padded(model, pad([text]), products)[0] for text in (((), prompt), ((), prompt + following)))
    return _difference([short], [states[: len(prompt)] for states in long], model.dtype) is None


class _Check:
    """Made-up groups, and the plain forward's states of them under each kind of attention."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._groups = _groups(int(model.config.vocab_size))
        self._texts = [(group.prompt_ids, response) for group in self._groups for response in group.responses_ids]
        self._products = _all_states(model)
        self._truths: dict[tuple[str, bool], list[list[Floats]]] = {}

    def ours(self) -> list[str]:
        """Our attention implementations, the faster first, if the model attends through transformers' interface."""
        if not _switch(self._model, attention.EAGER):
            return []
        try:
            self._truth(attention.EAGER, exact=True)
        except Exception as error:  # its file has no eager attention of the usual form, or whatever else
            log.info("its attention is left alone: %s: %s", type(error).__name__, error)
            return []
        return [attention.SDPA, attention.EAGER]

    def differs(self, name: str, mode: Mode) -> str | None:
        """Why the states are other ones in this mode and with this attention; None if they are the same. With a packed
        mode the padded one has to be right as well, since drawing goes that way.
        """
        truth = _NATIVE if name == _NATIVE else attention.EAGER
        ways: list[Callable[[], tuple[list[Floats], str | None]]] = [self._padded]
        if mode == "packed":
            ways.insert(0, self._packed)
        try:
            for exact in (True, False) if self._model.dtype != torch.float32 else (True,):
                plain = self._truth(truth, exact=exact)
                _switch(self._model, name)
                for way in ways:
                    with _exactly(self._model, exact):
                        states, reason = way()
                    dtype = torch.float32 if exact else self._model.dtype
                    reason = reason or _difference(plain, states, dtype)
                    if reason:
                        return reason
        except Exception as error:  # a model may stumble over anything here; slower modes remain
            return f"{type(error).__name__}: {error}"
        return None

    def _truth(self, name: str, *, exact: bool) -> list[list[Floats]]:
        if (name, exact) not in self._truths:
            _switch(self._model, name)
            with _exactly(self._model, exact):
                texts = [forward_padded(self._model, pad([text]), self._products)[0] for text in self._texts]
            self._truths[name, exact] = texts
        return self._truths[name, exact]

    def _packed(self) -> tuple[list[Floats], str | None]:
        batch = pack(self._groups)
        layout = AttentionLayout(batch.segments, self._model.device, self._model.dtype)
        states = forward_packed(self._model, batch, self._products, layout)
        return states, _foreign_windows(self._model.config, layout.windows, len(self._model.blocks))

    def _padded(self) -> tuple[list[Floats], str | None]:
        texts = forward_padded(self._model, pad(self._texts), self._products)
        return [np.concatenate(states) for states in zip(*texts, strict=True)], None


def _switch(model: Model, name: str) -> bool:
    """Whether the model attends by this implementation now."""
    if model.whole.config._attn_implementation != name:
        able = getattr(model.whole, "_can_set_attn_implementation", lambda: True)
        if not able():
            return False
        model.whole.set_attn_implementation(name)
    return bool(model.whole.config._attn_implementation == name)


@contextmanager
def _exactly(model: Model, exact: bool) -> Iterator[None]:
    """Inside, the model computes in float32 and with sharpened attention if ``exact``; a block's weights are converted
    when it runs and no longer than that, so that a large model has room.
    """
    if not exact:
        yield
        return
    widened: dict[torch.nn.Module, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def widen(module: torch.nn.Module, *_: Any, whole: bool = True) -> None:
        tensors = [*module.parameters(recurse=whole), *module.buffers(recurse=whole)]
        narrow = [t for t in tensors if t.is_floating_point() and t.dtype != torch.float32]
        widened[module] = [(tensor, tensor.data) for tensor in narrow]
        for tensor in narrow:
            tensor.data = tensor.data.float()

    def restore(module: torch.nn.Module, *_: Any) -> None:
        for tensor, data in widened.pop(module, ()):
            tensor.data = data

    inside = {id(m) for m in model.blocks.modules()}
    with attention.sharpened(), ExitStack() as after:
        for block in model.blocks:
            after.enter_context(block.register_forward_pre_hook(widen))
            after.enter_context(block.register_forward_hook(restore))
        try:
            for module in model.base.modules():
                if id(module) not in inside:
                    widen(module, whole=False)
            yield
        finally:
            for module in list(widened):
                restore(module)


def _all_states(model: Model) -> list[DeviceProduct]:
    """Products that read every block's output at every response token, as it is."""
    L = len(model.blocks)
    every = Readout(tuple(Tap(layer, "last") for layer in range(1, L + 1)))
    fusion = Fusion([every], layers=L, width=model.width, tokens=True)
    return [DeviceProduct.of(product, model.device) for product in fusion.products if product.where == "tokens"]


def _groups(vocabulary: int) -> list[Group]:
    """Two made-up groups: branching, and a neighbour behind them into which a state could leak."""
    draw = np.random.default_rng(0)

    def ids(length: int) -> Ids:
        return tuple(draw.integers(0, vocabulary, length).tolist())

    return [Group(ids(7), (ids(6), ids(1))), Group(ids(4), (ids(8),))]


def _difference(plain: Sequence[Sequence[Floats]], states: Sequence[Floats], dtype: torch.dtype) -> str | None:
    for layer, own in enumerate(states, start=1):
        truth = np.concatenate([outputs[layer - 1] for outputs in plain])
        spread = truth.std(axis=0) + 1e-6 * np.abs(truth).max()
        error = float(np.sqrt(np.mean(((own - truth) / spread) ** 2)))
        if not error <= TOLERANCE[dtype]:
            return f"states after block {layer} differ by {error:.2g} standard deviations"
    return None


def _foreign_windows(config: Any, seen: dict[int, int | None], layers: int) -> str | None:
    """Tiny texts cannot show that a window is ignored, so every layer must have asked for the one that its
    configuration states.
    """
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    for layer, kind in enumerate(kinds):
        if kind not in ("full_attention", "sliding_attention") or layer not in seen:
            return f"layer {layer} ({kind}) does not attend through the attention interface"
        if kind == "sliding_attention" and seen[layer] != config.sliding_window:
            return f"layer {layer} slides by {config.sliding_window} but does not say so to its attention"
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if windowed and not getattr(config, "layer_types", None) and None in seen.values():
        return "the configuration has a sliding window of which attention is not told"
    return None
