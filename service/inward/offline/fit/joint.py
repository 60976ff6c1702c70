"""The joint part of a hybrid head's fit (arXiv 2503.10093): all probes and the gate together, with a margin loss.

One run a fold and one of all pairs are trained side by side, on the same minibatches: every state is read once for all
of them, and the fold's run learns nothing of the fold's pairs. Their rewards say when to stop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from inward.files import whole
from inward.heads.hybrid import Gate
from inward.offline.fit.probes import LayerProbes, both
from inward.offline.states.stored import PairSource, blocks
from inward.types import Doubles, Floats, Indices

CHECKPOINT_S = 30.0
"""Between two checkpoints, at least."""
CACHE_BYTES = 2**30
"""Features that are held in memory, float32; more are read again in every epoch."""
ADAM = ("step", "exp_avg", "exp_avg_sq")
"""What the optimiser keeps of a parameter."""
JUDGED_PAIRS = 4000
"""Pairs whose held-out rewards decide when to stop: more would not decide better, and cost a pass each time."""


@dataclass(frozen=True, slots=True)
class Joint:
    """The joint training; rates and margin are the paper's."""

    mu: float = 1.0
    pointwise: float = 1.0
    """Weight of ``-log sigmoid(R_c) - log sigmoid(-R_r)`` beside the margin loss, which is blind to what all rewards of
    a prompt share: without it they drift, and rewards of different prompts cannot be compared.
    """
    lr: float = 1e-3
    weight_decay: float = 0.01
    batch: int = 256
    """Pairs in one step; of fewer, all."""
    steps: int = 200
    """At most, or ``epochs`` where these are more: held-out pairs say when to stop."""
    epochs: int = 4
    every: int = 5
    """Steps between two looks at the held-out pairs; with many pairs, a quarter of an epoch."""
    patience: int = 12
    """Looks without improvement after which it stops."""
    tolerance: float = 5e-3
    """Share of the held-out loss that counts as an improvement."""

    def limit(self, pairs: int) -> int:
        """Most steps."""
        return max(self.steps, self.epochs * self.in_epoch(pairs))

    def in_epoch(self, pairs: int) -> int:
        """Steps of one epoch."""
        return max(1, round(pairs / self.batch))

    def look(self, pairs: int) -> int:
        """Steps between two looks."""
        return max(self.every, self.in_epoch(pairs) // 4)


class Features(Protocol):
    """What probes see: ``[L, 2n, R]`` of some pairs, chosen then rejected, of lengths near 1 / sqrt(R).

    Adam moves every coordinate by about ``lr``, so on rows of length 1 an output would move by up to ``lr sqrt(R)``,
    far beyond a warm start in a few steps. So ``lr`` is the movement of an output, as in ``heads.online``.
    """

    width: int

    def batch(self, index: Indices) -> Tensor: ...


class SpanFeatures:
    """Coordinates in the span of the rows, all in memory."""

    def __init__(self, layers: Sequence[LayerProbes], width: int, device: torch.device) -> None:
        """Layers may have spans of different size: short ones are padded with zeros."""
        points = [layer.points_MR for layer in layers if layer.points_MR is not None]
        self.width = max(one.shape[1] for one in points)
        padded = np.stack([np.pad(one, ((0, 0), (0, self.width - one.shape[1]))) for one in points])
        self._points_2NLR = _sides(padded / np.float32((width * self.width) ** 0.5), device)

    def batch(self, index: Indices) -> Tensor:
        return _batch(self._points_2NLR, index)


class StandardisedFeatures:
    """Standardised states, read when they are wanted, or kept where they are few."""

    def __init__(
        self, source: PairSource, layers: Sequence[LayerProbes], axes: Sequence[int], device: torch.device
    ) -> None:
        """``axes``: entries of ``source.layers`` that ``layers`` are."""
        self.width = source.width
        self._source, self._axes = source, None if len(axes) == len(source.layers) else list(axes)
        self._mean = torch.from_numpy(np.stack([layer.mean_D for layer in layers])).to(device)
        scale_LD = np.stack([layer.scale_D for layer in layers]) * np.float32(source.width)
        self._inverse = torch.from_numpy(1 / scale_LD).to(device)
        few = 8 * len(source) * len(axes) * source.width <= CACHE_BYTES
        self._kept = self._all() if few else None

    def batch(self, index: Indices) -> Tensor:
        if self._kept is not None:
            return _batch(self._kept, index)
        states_MLD = torch.from_numpy(np.concatenate(self._source.take(index, self._axes))).to(self._mean.device)
        return states_MLD.sub_(self._mean).mul_(self._inverse).transpose(0, 1)

    def _all(self) -> Tensor:
        kept = torch.empty((2, len(self._source), *self._mean.shape), device=self._mean.device)
        for index, *sides in blocks(self._source, self._axes):
            part = kept[:, int(index[0]) : int(index[-1]) + 1]
            for side, states_NLD in enumerate(sides):
                torch.sub(torch.from_numpy(states_NLD).to(part.device), self._mean, out=part[side])
            part.mul_(self._inverse)
        return kept


def _sides(rows_LMR: Floats, device: torch.device) -> Tensor:
    """``[2, N, L, R]`` of ``[L, 2N, R]``: a pair's rows lie together, since batches are of pairs."""
    layers, m, width = rows_LMR.shape
    return torch.from_numpy(rows_LMR.reshape(layers, 2, m // 2, width)).permute(1, 2, 0, 3).contiguous().to(device)


def _batch(sides_2NLR: Tensor, index: Indices) -> Tensor:
    if len(index) and index[-1] - index[0] == len(index) - 1 and (np.diff(index) == 1).all():
        chosen = sides_2NLR[:, int(index[0]) : int(index[-1]) + 1]
    else:
        chosen = sides_2NLR[:, torch.from_numpy(index).to(sides_2NLR.device)]
    return chosen.flatten(0, 1).transpose(0, 1)


class Parameters(NamedTuple):
    """Probes on features ``[F, L, R]``, their biases ``[F, L]``, and the gates ``[F, L, L]``, of F runs."""

    probe: Tensor
    bias: Tensor
    gate: Tensor

    def rewards(self, features_LMR: Tensor, gate: Gate) -> Tensor:
        """``[F, M]``"""
        t_LMF = torch.bmm(features_LMR, self.probe.permute(1, 2, 0)) + self.bias.T[:, None]
        t_FML = t_LMF.permute(2, 1, 0)
        logits_FML = torch.bmm(t_FML, self.gate.transpose(1, 2))
        g_FML = torch.sigmoid(logits_FML) if gate == "sigmoid" else torch.softmax(logits_FML, dim=2)
        return (g_FML * t_FML).sum(dim=2)


@dataclass(slots=True)
class Trained:
    """The run of all pairs, as it was when the held-out pairs were judged best, and what they were judged by."""

    parameters: Parameters
    """Of one run: ``[1, …]``."""
    steps: int
    held_out_M: Doubles
    """Rewards of the judged pairs at that time, each by the run that has not seen its fold."""
    start_M: Doubles
    """The same before the first step."""


@dataclass(slots=True)
class _State:
    """Where a training is."""

    step: int = 0
    best: float = np.inf
    best_step: int = 0
    waited: int = 0
    start: Tensor = field(default_factory=lambda: torch.empty(0))
    held_out: Tensor = field(default_factory=lambda: torch.empty(0))
    kept: tuple[Tensor, ...] = ()


class Training:
    """See the module."""

    def __init__(
        self,
        features: Features,
        start: Parameters,
        fold_N: Indices,
        judged_N: Indices,
        gate: Gate,
        joint: Joint,
        criterion: Callable[[Doubles], float],
        *,
        seed: int,
        checkpoint: Path | None = None,
    ) -> None:
        """Args:
        start: of F runs; run f does not see pairs of fold f, the last one sees all.
        judged_N: pairs that decide when to stop.
        criterion: of their held-out rewards ``[2J]``; the lower the better.
        checkpoint: file to go on from.
        """
        self._features, self._gate, self._joint, self._criterion = features, gate, joint, criterion
        self._fold, self._judged, self._seed = torch.from_numpy(fold_N), judged_N, seed
        self._pairs = len(fold_N)
        self._now = Parameters(*(tensor.clone().requires_grad_() for tensor in start))
        # Weight decay is decoupled, since Adam's own would depend on the scale of the features.
        self._optimizer = torch.optim.AdamW(list(self._now), lr=joint.lr, weight_decay=joint.weight_decay)
        self._state = _State()
        self._checkpoint, self._saved = checkpoint, time.monotonic()

    def run(self, *, progress: bool = True) -> Trained:
        """Trains until the held-out pairs gain nothing more, and at least until the first look at them."""
        joint, state = self._joint, self._state
        limit, look = joint.limit(self._pairs), joint.look(self._pairs)
        self._resume()
        with tqdm(total=limit, initial=state.step, desc="joint training", unit="step", disable=not progress) as bar:
            if state.step == 0:
                state.start = torch.from_numpy(self._held_out())
            for index in self._batches(state.step, limit):
                if state.waited >= joint.patience:
                    break
                self._step(index)
                state.step += 1
                bar.update()
                if state.step % look == 0 or state.step == limit:
                    self._look()
                    bar.set_postfix_str(f"held-out loss {state.best:.4f}")
                    self._keep()
        return Trained(Parameters(*state.kept), state.best_step, state.held_out.numpy(), state.start.numpy())

    def _batches(self, step: int, limit: int) -> Iterator[Indices]:
        """From this step on; the order of an epoch depends on seed and epoch alone."""
        in_epoch = self._joint.in_epoch(self._pairs)
        while step < limit:
            epoch, first = divmod(step, in_epoch)
            order = np.random.default_rng([self._seed, epoch]).permutation(self._pairs)
            for index in np.array_split(order, in_epoch)[first:]:
                if step < limit:
                    yield np.sort(index)  # neighbours in a file are read together
                    step += 1

    def _step(self, index: Indices) -> None:
        rewards_FM = self._now.rewards(self._features.batch(index), self._gate)
        chosen_FN, rejected_FN = rewards_FM[:, : len(index)], rewards_FM[:, len(index) :]
        softplus = torch.nn.functional.softplus
        loss_FN = softplus(self._joint.mu - (chosen_FN - rejected_FN))
        loss_FN = loss_FN + self._joint.pointwise * (softplus(-chosen_FN) + softplus(rejected_FN))
        runs = torch.arange(len(rewards_FM))
        seen_FN = (self._fold[torch.from_numpy(index)][None] != runs[:, None]).to(loss_FN.device)
        loss = ((loss_FN * seen_FN).sum(dim=1) / seen_FN.sum(dim=1).clamp(min=1)).sum()  # runs share no parameter
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()

    @torch.no_grad()
    def _held_out(self) -> Doubles:
        """``[2J]``: rewards of the judged pairs."""
        rewards_M = np.empty(2 * len(self._judged))
        step = max(1, 2**24 // (2 * self._now.bias.shape[1] * self._features.width))
        for start in range(0, len(self._judged), step):
            index = self._judged[start : start + step]
            rewards_FM = self._now.rewards(self._features.batch(index), self._gate).double().cpu()
            run_M = self._fold[torch.from_numpy(index)].repeat(2)
            own_M = rewards_FM.gather(0, run_M[None])[0].numpy()
            rewards_M[both(np.arange(start, start + len(index)), len(self._judged))] = own_M
        return rewards_M

    def _look(self) -> None:
        state, rewards_M = self._state, self._held_out()
        value = self._criterion(rewards_M)
        state.waited += 1
        if value < state.best * (1 - self._joint.tolerance):
            state.best, state.best_step, state.waited = value, state.step, 0
            state.held_out = torch.from_numpy(rewards_M)
            state.kept = tuple(tensor[-1:].detach().cpu().clone() for tensor in self._now)

    def _keep(self) -> None:
        """Writes a checkpoint now and then."""
        path, state = self._checkpoint, self._state
        if path is None or time.monotonic() - self._saved < CHECKPOINT_S:
            return
        numbers = torch.tensor([state.step, state.best, state.best_step, state.waited], dtype=torch.float64)
        tensors = {"numbers": numbers, "start": state.start, "held_out": state.held_out}
        for i, (now, kept) in enumerate(zip(self._now, state.kept, strict=True)):
            moments = self._optimizer.state[now]
            tensors |= {f"now.{i}": now.detach().cpu(), f"kept.{i}": kept}
            tensors |= {f"adam.{i}.{name}": moments[name].cpu() for name in ADAM}
        with whole(path) as file:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
        self._saved = time.monotonic()

    def _resume(self) -> None:
        path, state = self._checkpoint, self._state
        if path is None or not path.is_file():
            return
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError):  # it is written at once or not at all: by somebody else's hand
            return
        step, state.best, best_step, waited = tensors["numbers"].tolist()
        state.step, state.best_step, state.waited = int(step), int(best_step), int(waited)
        state.start, state.held_out = tensors["start"], tensors["held_out"]
        state.kept = tuple(tensors[f"kept.{i}"] for i in range(len(self._now)))
        for i, now in enumerate(self._now):
            with torch.no_grad():
                now.copy_(tensors[f"now.{i}"])
            self._optimizer.state[now] = {
                name: tensors[f"adam.{i}.{name}"].to("cpu" if name == "step" else now.device) for name in ADAM
            }
