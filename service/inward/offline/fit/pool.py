"""Gives a fitted head a pool (``heads.pooling``): trains the map of those that have one, and calibrates anew.

Token scores that teach and calibrate are those of heads fitted without the token's prompt: a head knows the answers
that it was made of too well at the position where it read them, and at other tokens not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from inward.backbones.base import Backbone
from inward.heads.base import Head
from inward.heads.hybrid import HybridHead
from inward.heads.legend import LegendHead
from inward.heads.pooling import Pool, pooling
from inward.heads.running import TOKENS
from inward.offline.data.pairs import Pair, grouped_folds, whole_prompts
from inward.offline.fit.prepare import calibration
from inward.offline.fit.probes import auc, both, floored, pair_accuracy
from inward.offline.fit.reproducible import reproducible
from inward.offline.states.model_pass import by_group, read_every_token
from inward.offline.states.read import groups_of
from inward.offline.states.saved import layer_axis
from inward.offline.states.stored import HALF_MAX, PairSource, Subset
from inward.prompts import Prompts
from inward.types import Doubles, Floats, Indices, Readout, Tap

FOLDS = 3
POOL_PAIRS = 2000
"""Pairs whose tokens are read: a pool has few parameters, and a calibration two."""
TOKEN_BYTES = 2**30
"""Most memory for token states, float16 where that holds them, that a trained pool learns from; what is more than that
is left out, pairs and all, of its calibration and figures, too."""
FitHead = Callable[[PairSource], tuple[Head, Any]]


@dataclass(frozen=True, slots=True)
class PoolReport:
    """What pooling changed, on pairs that the judged heads and pools have not seen; printed below the head's report."""

    head: Any
    pool: Pool
    pairs: int
    accuracy: float
    auc: float
    position: str
    position_accuracy: float
    """Of the same heads, read at the position that they were fitted at."""
    position_auc: float

    def metrics(self) -> dict[str, float]:
        """As JSON, for ``Manifest.fit["metrics"]["pool"]``."""
        return {
            "pairs": self.pairs,
            "accuracy": self.accuracy,
            "auc": self.auc,
            "position_accuracy": self.position_accuracy,
            "position_auc": self.position_auc,
        }

    def __rich__(self) -> RenderableType:
        table = Table(f"pool {self.pool.name}", "pair accuracy", "AUC", box=None, pad_edge=False)
        table.add_row(f"pooled ({self.pairs} pairs, held out)", f"{self.accuracy:.3f}", f"{self.auc:.3f}")
        table.add_row(f"read at {self.position!r}", f"{self.position_accuracy:.3f}", f"{self.position_auc:.3f}")
        return Lines(self.head, "", table)


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """Token scores of ``2N`` responses, chosen then rejected, each by a head that has not seen its prompt."""

    scores_M: list[Doubles]
    """``[T]`` of each."""
    position_M: Doubles
    """Scores where the heads read."""
    states_M: list[Floats]
    """``[T, D]`` of each, float16 where that holds them, where a pool is to be trained."""


async def fit_pool(
    backbone: Backbone,
    prompts: Prompts,
    pairs: Sequence[Pair],
    states: PairSource,
    fit: FitHead,
    text: str,
    *,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Head, PoolReport]:
    """Fits a head on all pairs and gives it a pool.

    Args:
        states: of ``pairs``, at the position that the head is fitted at.
        fit: fits a head of states.
        text: see ``Pool.parse``.
    """
    head, report = fit(states)
    assert isinstance(head, LegendHead | HybridHead)
    pool = Pool.parse(text, layer=_layer(head))
    index_N = whole_prompts(states.groups_N, POOL_PAIRS)
    fold_N = np.full(len(states), -1)
    heads = []
    for fold, (train, held_out) in enumerate(grouped_folds(states.groups_N, FOLDS, seed)):
        heads.append(fit(Subset(states, train))[0])
        fold_N[held_out] = fold
    tap = None
    if pool.layer is not None:
        is_last = pool.layer == max(head.manifest.layers)
        tap = Tap(pool.layer, "last", final_norm=head.manifest.final_norm and is_last)
        most = max(np.abs(side).max() for side in states.take(index_N, [layer_axis(states.layers, pool.layer)]))
        bytes_each = np.dtype(_kept_as(most)).itemsize
        index_N = index_N[: _first_that_fit(backbone, prompts, [pairs[i] for i in index_N], bytes_each)]
    chosen = [pairs[i] for i in index_N]
    tokens = await _read(backbone, prompts, chosen, heads, fold_N[index_N], tap, progress=progress)
    with reproducible(seed):
        maps = _train(tokens, pool, fold_N[index_N], seed, progress=progress) if tap else None
    pooled_M = _pooled(tokens, pool, maps, fold_N[index_N])
    manifest, at_M = head.manifest, tokens.position_M
    figures = pair_accuracy(pooled_M), auc(pooled_M), manifest.position, pair_accuracy(at_M), auc(at_M)
    pool_report = PoolReport(report, pool, len(index_N), *figures)
    fitted = {**manifest.fit, "metrics": {**manifest.fit["metrics"], "pool": pool_report.metrics()}}
    manifest = manifest.model_copy(update={"pool": pool, "calibration": calibration(pooled_M), "fit": fitted})
    tensors = dict(head.tensors())
    if maps is not None:
        tensors |= {"pool_weight": maps.weight_FD[-1], "pool_bias": maps.bias_F[-1:]}
    return type(head).from_tensors(manifest, tensors), pool_report


def _layer(head: Head) -> int:
    """Where a trained pool reads: the head's best layer."""
    metrics = head.manifest.fit["metrics"]
    if "best_layer" in metrics:
        return int(metrics["best_layer"])
    if len(head.manifest.layers) == 1:
        return head.manifest.layers[0]
    return int(max(metrics["sweep"], key=lambda row: (row["weight"], -row["layer"]))["layer"])


def _kept_as(most: float) -> type[np.float16 | np.float32]:
    """The type of numbers up to ``most``."""
    return np.float16 if most <= HALF_MAX else np.float32


def _first_that_fit(backbone: Backbone, prompts: Prompts, pairs: Sequence[Pair], bytes_each: int) -> int:
    """How many of the pairs have token states, of so many bytes a number, that fit in memory together."""
    groups, places = groups_of(backbone, prompts, pairs)
    tokens_M = np.array([len(groups[group].responses_ids[response]) for group, response in places])
    bytes_N = tokens_M.reshape(2, -1).sum(axis=0) * bytes_each * backbone.info.width
    return int(np.searchsorted(np.cumsum(bytes_N), TOKEN_BYTES, side="right"))


async def _read(
    backbone: Backbone,
    prompts: Prompts,
    pairs: Sequence[Pair],
    heads: Sequence[Head],
    fold_N: Indices,
    tap: Tap | None,
    *,
    progress: bool,
) -> Tokens:
    """Token scores of both responses of each pair by its fold's head, and token states at ``tap``."""
    groups, places = groups_of(backbone, prompts, pairs)
    n = len(pairs)
    tokens = Tokens([np.empty(0)] * (2 * n), np.empty(2 * n), [np.empty((0, 0), dtype=np.float16)] * (2 * n))
    wanted = by_group(places)
    readouts = [head.readout for head in heads] + ([Readout((tap,))] if tap else [])

    def deliver(group: int, readings: Sequence[Any]) -> None:
        own = readings[: len(heads)]
        scored = [head.score(reading, details=TOKENS) for head, reading in zip(heads, own, strict=True)]
        for row, response in wanted.get(group, ()):
            said = scored[int(fold_N[row % n])]
            position = said.scores_N[response]
            tokens.position_M[row] = np.nan if position is None else position
            tokens.scores_M[row] = np.array(said.tokens_N[response] if said.tokens_N else ())
            if tap:
                states_TD = readings[-1].tokens_TK[response]
                tokens.states_M[row] = states_TD.astype(_kept_as(np.abs(states_TD).max(initial=0)))

    await read_every_token(backbone, groups, readouts, deliver, progress=progress)
    return tokens


def _pooled(tokens: Tokens, pool: Pool, maps: Maps | None, fold_N: Indices) -> Doubles:
    """``[2N]``: pooled scores, with a trained pool by the map of the response's fold."""
    pooled_M = np.array(tokens.position_M)
    for row, scores_T in enumerate(tokens.scores_M):
        if not len(scores_T):
            continue
        logits_T = None
        if maps is not None:
            run = int(fold_N[row % len(fold_N)])
            states_TD = tokens.states_M[row].astype(np.float64)
            if not len(states_TD):
                continue
            logits_T = states_TD @ maps.weight_FD[run] + maps.bias_F[run]
        state = pooling(pool)
        state.push(scores_T, logits_T)
        pooled_M[row] = state.value
    return pooled_M


@dataclass(frozen=True, slots=True, eq=False)
class Maps:
    """A trained pool's map of every run: those without fold 0, 1, … and the one of all."""

    weight_FD: Floats
    bias_F: Floats


@dataclass(frozen=True, slots=True)
class PoolTraining:
    """How a pool's map is trained."""

    lr: float = 0.02
    weight_decay: float = 0.01
    batch: int = 32
    """Pairs in one step."""
    steps: int = 400
    every: int = 10
    patience: int = 10


def _train(tokens: Tokens, pool: Pool, fold_N: Indices, seed: int, *, progress: bool) -> Maps:
    """Trains one map a fold and one of all, side by side, until held-out pairs gain nothing more."""
    settings = PoolTraining()
    n = len(fold_N)
    usable = np.array([all(len(tokens.states_M[row]) for row in (i, i + n)) for i in range(n)])
    rows_N = np.flatnonzero(usable)
    mean_D, scale_D = _standardisation(tokens.states_M)
    width, runs = len(mean_D), FOLDS + 1
    spread = float(np.nanstd(np.concatenate(tokens.scores_M))) or 1.0
    weight = torch.zeros((runs, width), requires_grad=True)
    bias = torch.zeros(runs, requires_grad=True)
    slope = torch.ones(runs, requires_grad=True)
    offset = torch.zeros(runs, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias, slope, offset], lr=settings.lr, weight_decay=settings.weight_decay)
    rng = np.random.default_rng(seed)
    best, kept, waited = np.inf, (weight.detach().clone(), bias.detach().clone()), 0

    def losses(index: Indices) -> Tensor:
        """``[F, n]``"""
        pooled_FM = _pool_batch(tokens, both(index, n), mean_D, scale_D, spread, weight, bias, pool)
        chosen, rejected = pooled_FM[:, : len(index)], pooled_FM[:, len(index) :]
        a, b = slope[:, None], offset[:, None]
        softplus = torch.nn.functional.softplus
        return softplus(-a * (chosen - rejected)) + 0.5 * (softplus(-a * chosen - b) + softplus(a * rejected + b))

    def held_out() -> float:
        with torch.no_grad():
            total = 0.0
            for index in np.array_split(rows_N, max(1, len(rows_N) // 64)):
                fold = torch.from_numpy(fold_N[index])
                total += float(losses(index).gather(0, fold[None]).sum())
            return total / len(rows_N)

    with tqdm(total=settings.steps, desc="train the pool", unit="step", disable=not progress) as bar:
        for step in range(settings.steps):
            if step % settings.every == 0:
                value = held_out()
                waited += 1
                if value < best * (1 - 1e-3):
                    best, kept, waited = value, (weight.detach().clone(), bias.detach().clone()), 0
                if waited >= settings.patience:
                    break
            index = np.sort(rng.choice(rows_N, min(settings.batch, len(rows_N)), replace=False))
            seen = torch.from_numpy(fold_N[index])[None] != torch.arange(runs)[:, None]
            loss = ((losses(index) * seen).sum(dim=1) / seen.sum(dim=1).clamp(min=1)).sum()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            bar.update()
    weight_FD = kept[0].numpy() / (scale_D * np.sqrt(width))
    return Maps(weight_FD.astype(np.float32), (kept[1].numpy() - weight_FD @ mean_D).astype(np.float32))


def _pool_batch(
    tokens: Tokens,
    rows: Indices,
    mean_D: Floats,
    scale_D: Floats,
    spread: float,
    weight_FD: Tensor,
    bias_F: Tensor,
    pool: Pool,
) -> Tensor:
    """``[F, M]``: pooled scores in units of ``spread``, of responses padded to the longest."""
    longest = max(len(tokens.scores_M[row]) for row in rows)
    states = np.zeros((len(rows), longest, len(mean_D)), dtype=np.float32)
    scores, real = np.zeros((len(rows), longest), dtype=np.float32), np.zeros((len(rows), longest), dtype=np.bool_)
    for m, row in enumerate(rows):
        length = len(tokens.scores_M[row])
        # So that a state has length 1: in a step of Adam a logit moves by the learning rate or more, whatever D is.
        states[m, :length] = (tokens.states_M[row] - mean_D) / (scale_D * np.sqrt(len(mean_D)))
        scores[m, :length], real[m, :length] = tokens.scores_M[row] / spread, True
    logits_FMT = torch.einsum("mtd,fd->fmt", torch.from_numpy(states), weight_FD) + bias_F[:, None, None]
    mask_MT = torch.from_numpy(real)
    if pool.name == "attention":
        weights = torch.softmax(logits_FMT.masked_fill(~mask_MT, -torch.inf), dim=2)
    else:
        gates = torch.sigmoid(logits_FMT) * mask_MT
        weights = gates / gates.sum(dim=2, keepdim=True).clamp(min=1e-12)
    return (weights * torch.from_numpy(scores)).sum(dim=2)


def _standardisation(states_M: Sequence[Floats]) -> tuple[Floats, Floats]:
    """Mean and standard deviation of the dimensions, over all tokens."""
    count, total, square = 0, 0.0, 0.0
    for states_TD in states_M:
        if len(states_TD):
            wide = states_TD.astype(np.float64)
            count, total, square = count + len(wide), total + wide.sum(axis=0), square + (wide**2).sum(axis=0)
    mean = np.asarray(total / max(count, 1))
    scale = np.sqrt(np.maximum(square / max(count, 1) - mean**2, 0))
    return mean.astype(np.float32), floored(scale)
