"""What ranks a list: SRR's module (arXiv 2505.15710), its loss and training loop, and two pointwise scorers to compare
it with.

States are standardised with training statistics before anything else, which the paper does not do: their norms differ a
lot between layers. ``Ranker.tensors`` folds that into the projection, so that a served head takes states as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from inward.offline.fit.probes import floored
from inward.offline.states.saved import ListStates, layer_axis
from inward.types import Doubles, Floats, Indices

ScorerKind = Literal["srr", "linear", "mlp"]


@dataclass(frozen=True, slots=True)
class Settings:
    """How a scorer is trained; sizes and rates are the paper's."""

    width: int = 64
    tau: float = 0.2
    dropout: float = 0.1
    lr: float = 1e-3
    weight_decay: float = 1e-4
    clip: float = 3.0
    list_size: int = 10
    """Longest list in training, drawn from a prompt's candidates anew in every epoch."""
    batch_size: int = 16
    """Lists in one step."""
    epochs: int = 100
    patience: int = 20
    """Epochs without a better held-out loss after which cross-validation stops."""


class Standardised(nn.Module):
    """Base of the scorers: they take raw states and standardise them with ``mean_D`` and ``scale_D``."""

    mean_D: Tensor
    scale_D: Tensor
    tau: float

    def __init__(self, mean_D: Floats, scale_D: Floats) -> None:
        super().__init__()
        self.register_buffer("mean_D", torch.from_numpy(mean_D), persistent=False)
        self.register_buffer("scale_D", torch.from_numpy(scale_D), persistent=False)

    def standardise(self, states: Tensor) -> Tensor:
        return (states - self.mean_D) / self.scale_D


class Ranker(Standardised):
    """SRR. ``heads.srr`` does the same in numpy out of ``tensors``."""

    def __init__(self, mean_D: Floats, scale_D: Floats, settings: Settings) -> None:
        super().__init__(mean_D, scale_D)
        k = settings.width
        self.projection = nn.Linear(len(mean_D), k)
        self.type_embedding = nn.Parameter(0.02 * torch.randn(k))
        self.block = nn.TransformerEncoderLayer(k, 1, 4 * k, settings.dropout, "gelu", batch_first=True)
        self.tau = settings.tau

    def forward(self, prompt_BD: Tensor, candidates_BMD: Tensor, mask_BM: Tensor) -> Tensor:
        """Cosines ``[B, M]``; what stands where ``mask_BM`` is false has no influence on the others."""
        instruction_B1K = (self.projection(self.standardise(prompt_BD)) + self.type_embedding)[:, None]
        sequence_BSK = torch.cat([instruction_B1K, self.projection(self.standardise(candidates_BMD))], dim=1)
        padding_BS = torch.cat([torch.zeros_like(mask_BM[:, :1]), ~mask_BM], dim=1)
        encoded_BSK = self.block(sequence_BSK, src_key_padding_mask=padding_BS)
        return nn.functional.cosine_similarity(encoded_BSK[:, :1], encoded_BSK[:, 1:], dim=-1)

    def tensors(self) -> dict[str, Floats]:
        """What ``head.safetensors`` holds: the ``state_dict`` with the standardisation folded into the projection."""
        tensors = {name: tensor.detach().numpy().astype(np.float32) for name, tensor in self.state_dict().items()}
        weight_KD = tensors["projection.weight"].astype(np.float64) / self.scale_D.numpy()
        tensors["projection.weight"] = weight_KD.astype(np.float32)
        tensors["projection.bias"] = (tensors["projection.bias"] - weight_KD @ self.mean_D.numpy()).astype(np.float32)
        return tensors


class Pointwise(Standardised):
    """Each candidate scored by itself: linear in its vector, or an MLP on the prompt's vector and its own."""

    def __init__(self, mean_D: Floats, scale_D: Floats, settings: Settings, *, mlp: bool) -> None:
        super().__init__(mean_D, scale_D)
        d, k = len(mean_D), settings.width
        hidden = (nn.Linear(2 * d, k), nn.GELU(), nn.Dropout(settings.dropout), nn.Linear(k, 1))
        self.scorer = nn.Sequential(*hidden) if mlp else nn.Linear(d, 1)
        self.mlp = mlp
        self.tau = 1.0

    def forward(self, prompt_BD: Tensor, candidates_BMD: Tensor, mask_BM: Tensor) -> Tensor:
        """Scores ``[B, M]``."""
        features = self.standardise(candidates_BMD)
        if self.mlp:
            features = torch.cat([self.standardise(prompt_BD)[:, None].expand_as(features), features], dim=-1)
        scores_BM: Tensor = self.scorer(features).squeeze(-1)
        return scores_BM


Scorer = Ranker | Pointwise


def listwise_loss(scores_BM: Tensor, safe_BM: Tensor, mask_BM: Tensor, tau: float) -> Tensor:
    """Mean over lists of KL(uniform over the safe candidates || softmax(s / tau)), padding masked out.

    Every list needs a safe candidate.
    """
    log_p_BM = torch.log_softmax((scores_BM / tau).masked_fill(~mask_BM, -torch.inf), dim=1).masked_fill(~mask_BM, 0.0)
    good_BM = (safe_BM & mask_BM).float()
    count_B = good_BM.sum(dim=1)
    return (-(good_BM * log_p_BM).sum(dim=1) / count_B - count_B.log()).mean()


class Batch(NamedTuple):
    """Some lists, padded to the longest."""

    prompt_BD: Tensor
    candidates_BMD: Tensor
    safe_BM: Tensor
    mask_BM: Tensor

    def scored(self, scorer: Scorer) -> tuple[Tensor, Tensor]:
        """Loss, and scores ``[B, M]``."""
        scores_BM: Tensor = scorer(self.prompt_BD, self.candidates_BMD, self.mask_BM)
        return listwise_loss(scores_BM, self.safe_BM, self.mask_BM, scorer.tau), scores_BM


class Lists:
    """Lists of one layer as raw states; ``members`` names the rows of each prompt's candidates."""

    def __init__(self, states: ListStates, layer: int) -> None:
        axis = layer_axis(states.layers, layer)
        self.prompt_GD = np.ascontiguousarray(states.prompt_GLD[:, axis])
        self.candidates_MD = np.ascontiguousarray(states.candidates_MLD[:, axis])
        self.safe_M = states.safe_M
        self.members = [np.flatnonzero(states.group_M == g) for g in range(len(states))]

    def scorer(self, kind: ScorerKind, index: Indices, settings: Settings) -> Scorer:
        """An untrained scorer that standardises with the statistics of the lists in ``index``, prompts and
        candidates together.
        """
        rows = np.concatenate([self.members[g] for g in index])
        both = np.concatenate([self.prompt_GD[index], self.candidates_MD[rows]]).astype(np.float64)
        mean_D, scale_D = both.mean(axis=0).astype(np.float32), floored(both.std(axis=0))
        if kind == "srr":
            return Ranker(mean_D, scale_D, settings)
        return Pointwise(mean_D, scale_D, settings, mlp=kind == "mlp")

    def batch(self, index: Indices, rows: list[Indices] | None = None) -> Batch:
        """Some lists with all their candidates, or only with some ``rows`` of each."""
        rows = [self.members[g] for g in index] if rows is None else rows
        longest = max(map(len, rows))
        padded_BM = np.stack([np.pad(r, (0, longest - len(r))) for r in rows])
        mask_BM = np.arange(longest) < np.array([len(r) for r in rows])[:, None]
        arrays = (self.prompt_GD[index], self.candidates_MD[padded_BM], self.safe_M[padded_BM], mask_BM)
        return Batch(*map(torch.from_numpy, arrays))

    def draw(self, index: Indices, size: int, rng: np.random.Generator) -> list[Indices]:
        """For each list at most ``size`` of its candidates in random order, a safe and an unsafe one always among
        them.
        """
        return [self._draw(self.members[g], size, rng) for g in index]

    def _draw(self, rows: Indices, size: int, rng: np.random.Generator) -> Indices:
        rows = rng.permutation(rows)
        safe = self.safe_M[rows]
        sure = [int(np.argmax(safe)), int(np.argmin(safe))]
        rest = np.delete(rows, sure)
        return rng.permutation(np.concatenate([rows[sure], rest[: size - 2]]))


def train(scorer: Scorer, lists: Lists, index: Indices, settings: Settings, rng: np.random.Generator) -> Iterator[None]:
    """Trains on the lists in ``index`` for as long as it is iterated: one epoch a step."""
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    while True:
        scorer.train()
        order = rng.permutation(index)
        for start in range(0, len(order), settings.batch_size):
            chosen = order[start : start + settings.batch_size]
            optimizer.zero_grad()
            loss, _ = lists.batch(chosen, lists.draw(chosen, settings.list_size, rng)).scored(scorer)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(scorer.parameters(), settings.clip)
            optimizer.step()
        scorer.eval()
        yield


def held_out(scorer: Scorer, lists: Lists, index: Indices) -> tuple[float, Doubles, Indices]:
    """Loss on whole lists, and the scores of their candidates with the rows they belong to."""
    batch = lists.batch(index)
    with torch.no_grad():
        loss, scores_BM = batch.scored(scorer)
    rows = np.concatenate([lists.members[g] for g in index])
    return float(loss), scores_BM[batch.mask_BM].numpy().astype(np.float64), rows
