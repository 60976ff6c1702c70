"""Rows of different lengths as padded tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CUDA_TOKENS, CPU_TOKENS = 65_536, 2_048
"""Tokens of one forward pass, padding included."""
CUDA_TRAINED_TOKENS, CPU_TRAINED_TOKENS = 16_384, 1_024
"""Tokens whose intermediate results are kept for a gradient."""


def most_trained(device: torch.device) -> int:
    """Tokens of one forward and backward pass."""
    return CUDA_TRAINED_TOKENS if device.type == "cuda" else CPU_TRAINED_TOKENS


def most_tokens(device: torch.device) -> int:
    """Of one forward pass."""
    return CUDA_TOKENS if device.type == "cuda" else CPU_TOKENS


def padded(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device, *, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Ids and mask ``[B, T]``."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), pad), torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place] = torch.tensor(row)
        mask[i, place] = 1
    return ids.to(device), mask.to(device)
