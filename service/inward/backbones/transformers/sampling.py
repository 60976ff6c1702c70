"""From logits to the next token, as ``SamplingSpec`` says; names and order are vLLM's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch

from inward.types import Ids, SamplingSpec


class Choice(NamedTuple):
    """One row's next token: how it is drawn, what stands before it, and where its random number comes from."""

    spec: SamplingSpec
    text: Ids
    random: np.random.Generator


def choose(logits_BV: torch.Tensor, choices: Sequence[Choice]) -> list[int]:
    """The next token of each row. One random number is used for each token that is drawn."""
    tokens: list[int] = []
    rows = enumerate(choices)
    for spec, members in groupby(rows, key=lambda row: row[1].spec):
        own = list(members)
        chosen_NV = logits_BV[own[0][0] : own[-1][0] + 1]
        tokens += _choose(chosen_NV, spec, [choice for _, choice in own])
    return tokens


def _choose(logits_NV: torch.Tensor, spec: SamplingSpec, choices: Sequence[Choice]) -> list[int]:
    if spec.repetition_penalty != 1:
        logits_NV = _penalised(logits_NV, spec.repetition_penalty, [choice.text for choice in choices])
    if spec.temperature <= 0:
        return logits_NV.argmax(dim=-1).tolist()
    kept_NV = filtered(logits_NV / spec.temperature, spec)
    sums_NV = kept_NV.softmax(dim=-1).cumsum(dim=-1)
    uniform_N = torch.tensor([choice.random.random() for choice in choices], dtype=sums_NV.dtype).to(sums_NV.device)
    chosen_N = torch.searchsorted(sums_NV, (uniform_N * sums_NV[:, -1])[:, None], right=True)[:, 0]
    last_N = kept_NV.shape[1] - 1 - kept_NV.isfinite().int().flip(-1).argmax(dim=-1)  # sums may end a rounding early
    return torch.minimum(chosen_N, last_N).tolist()


def filtered(logits_NV: torch.Tensor, spec: SamplingSpec) -> torch.Tensor:
    """Logits with minus infinity for what ``min_p``, ``top_k`` and ``top_p`` leave out, in this order."""
    if spec.min_p > 0:
        least_N1 = logits_NV.amax(dim=-1, keepdim=True) + float(np.log(spec.min_p))
        logits_NV = logits_NV.masked_fill(logits_NV < least_N1, -torch.inf)
    if 0 < spec.top_k < logits_NV.shape[-1]:
        least_N1 = logits_NV.topk(spec.top_k, dim=-1).values[:, -1:]
        logits_NV = logits_NV.masked_fill(logits_NV < least_N1, -torch.inf)
    if spec.top_p < 1:
        sorted_NV, order_NV = logits_NV.sort(dim=-1, descending=True, stable=True)
        probabilities_NV = sorted_NV.softmax(dim=-1)
        unlikely_NV = probabilities_NV.cumsum(dim=-1) - probabilities_NV >= spec.top_p
        unlikely_NV[:, 0] = False
        logits_NV = logits_NV.masked_fill(torch.zeros_like(unlikely_NV).scatter(-1, order_NV, unlikely_NV), -torch.inf)
    return logits_NV


def _penalised(logits_NV: torch.Tensor, penalty: float, texts: Sequence[Ids]) -> torch.Tensor:
    """Tokens that stand in the text already become less likely (CTRL, Keskar et al. 2019)."""
    logits_NV = logits_NV.clone()
    for row, text in enumerate(texts):
        seen = torch.tensor(sorted(set(text)), device=logits_NV.device)
        own = logits_NV[row, seen]
        logits_NV[row, seen] = torch.where(own < 0, own * penalty, own / penalty)
    return logits_NV
