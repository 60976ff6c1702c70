"""One forward pass of the base model over a batch, packed or padded, that leaves only what the products read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from inward.backbones.transformers.attention import AttentionLayout, packed
from inward.backbones.transformers.capture import DeviceProduct, capture
from inward.backbones.transformers.model import Model
from inward.backbones.transformers.packing import Packed, Padded
from inward.types import Floats


def forward_packed(
    model: Model, batch: Packed, products: Sequence[DeviceProduct], layout: AttentionLayout | None = None
) -> list[Floats]:
    """For each product ``[N, K]`` (``[T, K]`` where it reads ``tokens``) for all responses of all groups."""
    ids = torch.from_numpy(batch.ids_T)[None].to(model.device)
    positions = torch.from_numpy(batch.positions_T)[None].to(model.device)
    spans = [span for group in batch.spans for span in group]

    def forward() -> None:
        with packed(layout or AttentionLayout(batch.segments, model.device, model.dtype)):
            model.base(input_ids=ids, position_ids=positions, use_cache=False)

    return capture(model.base, model.blocks, products, spans, forward)


def forward_padded(model: Model, batch: Padded, products: Sequence[DeviceProduct]) -> list[list[Floats]]:
    """For each text, for each product, ``[1, K]`` (``[T, K]`` where it reads ``tokens``)."""
    ids = torch.from_numpy(batch.ids_BT).to(model.device)
    mask = torch.from_numpy(batch.mask_BT).to(model.device)
    options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}

    def forward() -> None:
        model.base(input_ids=ids, attention_mask=mask, **options)

    outputs = capture(model.base, model.blocks, products, batch.spans, forward)
    ends = np.cumsum([len(span.rows) for span in batch.spans])
    by_product = [
        np.split(output, ends[:-1]) if product.product.where == "tokens" else np.split(output, len(output))
        for product, output in zip(products, outputs, strict=True)
    ]
    return [list(parts) for parts in zip(*by_product, strict=True)]
