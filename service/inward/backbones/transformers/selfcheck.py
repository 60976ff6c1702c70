"""Does packing leave this model's numbers alone? Asked once, at loading, of the model itself."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from inward.backbones.readout import Fusion
from inward.backbones.transformers import attention
from inward.backbones.transformers.attention import AttentionLayout
from inward.backbones.transformers.capture import DeviceProduct
from inward.backbones.transformers.forward import forward_packed, forward_padded
from inward.backbones.transformers.model import Model
from inward.backbones.transformers.packing import pack, pad
from inward.types import Floats, Group, Readout, Tap

log = logging.getLogger(__name__)
TOLERANCE = {torch.float32: 2e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
"""Root mean square difference, each dimension in units of its own standard deviation over the tokens. A state that
leaks from one text to another, or a wrong position, is a difference near 1."""


def packing_is_right(model: Model) -> bool:
    """Switches the model over to packed attention if its states then equal those of a plain forward; else leaves it
    as it was.
    """
    groups = _groups(int(model.config.vocab_size))
    products = _all_states(model)
    original = model.whole.config._attn_implementation
    with torch.inference_mode():
        texts = [(group.prompt_ids, response) for group in groups for response in group.responses_ids]
        plain = [forward_padded(model, pad([text]), products)[0] for text in texts]
        try:
            attention.register()
            model.whole.set_attn_implementation(attention.NAME)
            batch = pack(groups)
            layout = AttentionLayout(batch.segments, model.device, model.dtype)
            packed = forward_packed(model, batch, products, layout)
            reason = _foreign_windows(model.config, layout.windows, len(model.blocks)) or _difference(
                plain, packed, model.dtype
            )
        except Exception as error:  # a model may stumble over anything here; padded reading remains
            reason = f"{type(error).__name__}: {error}"
    if reason:
        model.whole.set_attn_implementation(original)
        log.info("packed attention is not used: %s", reason)
    return reason is None


@torch.inference_mode()
def is_causal(model: Model) -> bool:
    """Whether states are independent of the tokens to their right."""
    prompt, following = (1, 2, 3), (4, 5)
    products = _all_states(model)
    short, long = (forward_padded(model, pad([text]), products)[0] for text in (((), prompt), ((), prompt + following)))
    return _difference([short], [states[: len(prompt)] for states in long], model.dtype) is None


def _all_states(model: Model) -> list[DeviceProduct]:
    """Products that read every block's output at every response token, as it is."""
    L = len(model.blocks)
    every = Readout(tuple(Tap(layer, "last") for layer in range(1, L + 1)))
    fusion = Fusion([every], layers=L, width=model.width, tokens=True)
    return [DeviceProduct.of(product, model.device) for product in fusion.products if product.where == "tokens"]


def _groups(vocabulary: int) -> list[Group]:
    """Two made-up groups: branching, and a neighbour behind them into which a state could leak."""
    draw = np.random.default_rng(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draw.integers(0, vocabulary, length).tolist())

    return [Group(ids(7), (ids(5), ids(6), ids(1))), Group(ids(4), (ids(3), ids(8)))]


def _difference(plain: Sequence[Sequence[Floats]], packed: Sequence[Floats], dtype: torch.dtype) -> str | None:
    for layer, states in enumerate(packed, start=1):
        truth = np.concatenate([outputs[layer - 1] for outputs in plain])
        spread = truth.std(axis=0) + 1e-6 * np.abs(truth).max()
        error = float(np.sqrt(np.mean(((states - truth) / spread) ** 2)))
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
