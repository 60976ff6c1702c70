"""The low-rank products of vLLM's CPU build (0.32), put right: for use inside its process.

There a token without an adapter is given the one in the last slot (index -1), and the matrices are copied once for
every token: gigabytes for a batch of a real model. Here each adapter's tokens are one product, and tokens without one
are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from inward.backbones.vllm.internals import lora_ops, punica_cpu


def install() -> None:
    """Replaces vLLM's own, under the names by which they are called."""
    for place in (lora_ops, punica_cpu):
        place.bgmv_shrink = shrink
        place.bgmv_expand_slice = expand_slice


def shrink(
    inputs: torch.Tensor, weights: torch.Tensor, output: torch.Tensor, indices: torch.Tensor, scaling: float = 1.0
) -> None:
    """``output[t] = scaling * A[indices[t]] @ inputs[t]``, with ``weights`` of shape ``[slots, 1, rank, inputs]``."""
    output[: len(indices)] = 0
    for rows, product in _products(inputs, weights, indices, output.dtype):
        output[rows, : product.shape[1]] = scaling * product


def expand_slice(
    inputs: torch.Tensor,
    weights: torch.Tensor,
    output: torch.Tensor,
    indices: torch.Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """``output[t, slice] += B[indices[t]] @ inputs[t]``, with ``weights`` of shape ``[slots, 1, slice, rank]``."""
    columns = output[:, slice_offset : slice_offset + slice_size]
    if not add_inputs:
        columns[: len(indices)] = 0
    for rows, product in _products(inputs, weights, indices, output.dtype):
        columns[rows] += product


def _products(
    inputs: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, dtype: torch.dtype
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each adapter in use its tokens and their products."""
    for slot in set(indices.tolist()):
        if slot >= 0:
            rows = (indices == slot).nonzero().squeeze(1)
            yield rows, inputs[rows].to(dtype) @ weights[slot].flatten(0, -2).to(dtype).T
