"""Fits hybrid heads (arXiv 2503.10093): a whitened direction per layer as warm start, then probes and gate jointly.

Everything that has to be chosen (strength of the shrinkage, weights of the layers at the start, number of joint steps)
is chosen by cross-validation over prompts; the head that is kept is fitted in the same way on all pairs, in the same
passes. The warm start needs running sums only and the joint training minibatches, so states may be in a file of any
size. Rewards of held-out pairs along the way give the calibration and the report's figures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from inward.errors import DataError
from inward.files import whole
from inward.heads.calibration import Platt
from inward.heads.held_out import HeldOut
from inward.heads.hybrid import Gate, HybridHead
from inward.offline.data.pairs import grouped_folds, whole_prompts
from inward.offline.fit.joint import (
    JUDGED_PAIRS,
    Features,
    Joint,
    Parameters,
    SpanFeatures,
    StandardisedFeatures,
    Training,
)
from inward.offline.fit.prepare import calibration, manifest
from inward.offline.fit.probes import SHRINKAGE, LayerProbes, auc, both, fit_layer, labels, pair_accuracy
from inward.offline.fit.reproducible import LARGE, reproducible
from inward.offline.states.stored import PairSource
from inward.types import Doubles, Floats, Indices

SKILL_POWER = 4
"""How sharply the start prefers layers whose probes do well alone: enough to leave out the shallow ones, not to pick a
single one.
"""
SPAN_BYTES = 512 * 2**20
"""Most memory for the coordinates of rows in their span; larger sets are worked with in all dimensions."""
WIDE = 1024
"""In wider layers a solve is dear, so that only every so many of them are asked for the shrinkage."""
ASKED = 8


@dataclass(frozen=True, slots=True)
class LayerSkill:
    """One layer by itself, on held-out prompts."""

    layer: int
    accuracy: float
    auc: float
    mean_difference_accuracy: float
    mean_difference_auc: float
    weight: float
    """Its share of the reward at the start of the joint training."""


@dataclass(frozen=True, slots=True)
class HybridReport:
    """What ``inward fit hybrid`` prints and ``Manifest.fit["metrics"]`` keeps; figures are of held-out prompts in
    cross-validation.

    Shrinkage, weights and number of steps were chosen on the same folds, so they flatter a little: ``like.left_out``
    does not.
    """

    pairs: int
    judged: int
    """Pairs of the figures: all, or of very many a part."""
    prompts: int
    c: float
    """Shrinkage of the warm start: lambda as a multiple of the mean variance of a standardised dimension."""
    steps: int
    accuracy: float
    """Pairs whose chosen response has the higher reward."""
    auc: float
    """Rewards of chosen against rejected responses, across pairs."""
    warm_start_accuracy: float
    warm_start_auc: float
    layers: tuple[LayerSkill, ...]

    @property
    def best_layer(self) -> LayerSkill:
        return max(self.layers, key=lambda row: (row.accuracy + row.auc, -row.layer))

    def metrics(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "best_layer": self.best_layer.layer, "verdict": self.verdict}

    @property
    def verdict(self) -> str:
        """Whether all layers together beat the best one, and how much could be chance."""
        best = self.best_layer
        low, high = HeldOut(self.accuracy, self.judged).interval
        figures = f"accuracy {self.accuracy:.3f} against {best.accuracy:.3f}, AUC {self.auc:.3f} against {best.auc:.3f}"
        if self.accuracy > best.accuracy and self.auc > best.auc:
            said = f"beats its best single layer ({best.layer}): {figures}; "
        else:
            said = (
                f"does not beat its best single layer ({best.layer}) on every count: {figures}; that layer is the best "
                f"of {len(self.layers)} picked on these same pairs, and "
            )
        return f"{said}the 95 % interval of the head's accuracy is {low:.3f} to {high:.3f}"

    def __rich__(self) -> RenderableType:
        facts = Table("hybrid reward", f"{self.pairs} pairs of {self.prompts} prompts", box=None, pad_edge=False)
        facts.add_row("pair accuracy, held out", f"{self.accuracy:.3f}  (warm start {self.warm_start_accuracy:.3f})")
        facts.add_row("AUC, held out", f"{self.auc:.3f}  (warm start {self.warm_start_auc:.3f})")
        facts.add_row("shrinkage c", f"{self.c:g}")
        facts.add_row("joint steps", str(self.steps))
        table = Table("layer", "accuracy", "AUC", "mean difference", "its AUC", "weight", box=None, pad_edge=False)
        for row in self.layers:
            numbers = (row.accuracy, row.auc, row.mean_difference_accuracy, row.mean_difference_auc, row.weight)
            table.add_row(str(row.layer), *(f"{number:.3f}" for number in numbers))
        return Lines(facts, "", table, "", self.verdict)


def fit_hybrid(
    states: PairSource,
    *,
    name: str = "hybrid",
    gate: Gate = "sigmoid",
    shrinkage: Sequence[float] = SHRINKAGE,
    joint: Joint | None = None,
    folds: int = 5,
    seed: int = 0,
    cache: Path | None = None,
    progress: bool = True,
) -> tuple[HybridHead, HybridReport]:
    """Fits a hybrid head on all pairs.

    Args:
        states: the head reads all of their layers, except the embedding (0).
        gate: ``sigmoid``, or ``softmax`` as in the paper's text.
        shrinkage: what the warm start chooses from.
        joint: how the joint training goes.
        folds: of the cross-validation; fewer where there are fewer prompts.
        cache: folder for what is done already; give the same one to go on after an interruption.
        progress: show bars.

    Raises:
        DataError: fewer than two prompts, or no layer but the embedding.
    """
    joint = joint or Joint()
    axes = [axis for axis, layer in enumerate(states.layers) if layer > 0]
    if not axes:
        raise DataError("a hybrid head needs the states of at least one block; these are of the embedding only")
    prompts = len(np.unique(states.groups_N))
    parts = grouped_folds(states.groups_N, min(folds, prompts), seed)
    fold_N = np.empty(len(states), dtype=np.int64)
    for fold, (_, held_out) in enumerate(parts):
        fold_N[held_out] = fold
    kept = cache / _key(states, gate, shrinkage, joint, len(parts), seed) if cache else None
    with reproducible(seed, large=len(states) * len(axes) * states.width > LARGE):
        span = 2 * len(states) <= states.width // 2 and 16 * len(axes) * len(states) ** 2 <= SPAN_BYTES
        layers, c = _warm_start(states, axes, fold_N, len(parts), shrinkage, kept, span=span, progress=progress)
        single_LM = np.stack([layer.held_out_CM[c] for layer in layers])
        weight_L = _layer_weights(single_LM, gate)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        features: Features = (
            SpanFeatures(layers, states.width, device) if span else StandardisedFeatures(states, layers, axes, device)
        )
        judged_N = whole_prompts(states.groups_N, JUDGED_PAIRS)
        start = _parameters(layers, c, weight_L, len(parts) + 1, states.width, device)
        checkpoint = kept and kept / "joint.safetensors"
        trained = Training(
            features, start, fold_N, judged_N, gate, joint, _criterion, seed=seed, checkpoint=checkpoint
        ).run(progress=progress)
    rewards_M = trained.held_out_M
    share_L = weight_L / weight_L.sum()
    report = HybridReport(
        pairs=len(states),
        judged=len(judged_N),
        prompts=prompts,
        c=shrinkage[c],
        steps=trained.steps,
        accuracy=pair_accuracy(rewards_M),
        auc=auc(rewards_M),
        warm_start_accuracy=pair_accuracy(trained.start_M),
        warm_start_auc=auc(trained.start_M),
        layers=tuple(
            _skills([states.layers[axis] for axis in axes], layers, single_LM, share_L, both(judged_N, len(states)))
        ),
    )
    own = manifest(
        name,
        "hybrid",
        states,
        [states.layers[axis] for axis in axes],
        seed=seed,
        calibration=calibration(rewards_M),
        metrics=report.metrics(),
        options={"gate": gate},
    )
    return HybridHead.from_tensors(own, _tensors(trained.parameters, layers, states.width)), report


def _warm_start(
    states: PairSource,
    axes: Sequence[int],
    fold_N: Indices,
    folds: int,
    shrinkage: Sequence[float],
    kept: Path | None,
    *,
    span: bool,
    progress: bool,
) -> tuple[list[LayerProbes], int]:
    """Every layer's probes, and which of the shrinkages does best on held-out prompts, on average over the layers.

    Returns:
        The probes; those of layers that were not asked hold one shrinkage, the chosen one, in the place of all.
    """
    every = 1 if span or states.width <= WIDE else max(1, len(axes) // ASKED)
    asked = list(range(len(axes)))[every - 1 :: every]
    found: dict[int, LayerProbes] = {}

    def fit(l: int, c: Sequence[float], bar: Any) -> None:
        path = kept and kept / f"layer-{states.layers[axes[l]]}-{len(c)}.safetensors"
        found[l] = _kept_or(path) or fit_layer(states, axes[l], fold_N, folds, c, span=span)
        if path and not path.is_file():
            with whole(path) as file:
                save_file(found[l].tensors(), file)
        bar.update()

    with tqdm(total=len(axes), desc="fit probes", unit="layer", disable=not progress) as bar:
        for l in asked:
            fit(l, shrinkage, bar)
        skill_C = np.mean([[pair_accuracy(one) + auc(one) for one in found[l].held_out_CM] for l in asked], axis=0)
        c = int(skill_C.argmax())
        for l in range(len(axes)):
            if l not in found:
                fit(l, [shrinkage[c]], bar)
    return [found[l] if l in asked else _repeated(found[l], len(shrinkage)) for l in range(len(axes))], c


def _repeated(layer: LayerProbes, times: int) -> LayerProbes:
    """One shrinkage in the place of each."""
    return replace(
        layer,
        probe_FCR=np.repeat(layer.probe_FCR, times, axis=1),
        bias_FC=np.repeat(layer.bias_FC, times, axis=1),
        held_out_CM=np.repeat(layer.held_out_CM, times, axis=0),
    )


def _kept_or(path: Path | None) -> LayerProbes | None:
    if path is None or not path.is_file():
        return None
    try:
        return LayerProbes.from_tensors(load_file(path))
    except (SafetensorError, KeyError, OSError):  # it is written at once or not at all: by somebody else's hand
        path.unlink()
        return None


def _key(states: PairSource, gate: Gate, shrinkage: Sequence[float], joint: Joint, folds: int, seed: int) -> str:
    """What the fit depends on."""
    origin = states.origin
    backbone = origin.backbone.fingerprint if origin.backbone else None
    where = [origin.data_hash, len(states), states.layers, origin.position]
    facts = [*where, gate, list(shrinkage), asdict(joint), folds, seed, backbone]
    return "hybrid-" + hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _parameters(
    layers: Sequence[LayerProbes], c: int, weight_L: Doubles, runs: int, width: int, device: torch.device
) -> Parameters:
    """Probes fitted one by one, on ``Features``, scaled so that outputs have deviation ``weight_L``; biases that centre
    them; gates that treat all layers alike (V = 0). ``width``: of the states.
    """
    size = max(layer.probe_FCR.shape[2] for layer in layers)
    probes = [np.pad(l.probe_FCR[:, c], ((0, 0), (0, size - l.probe_FCR.shape[2]))) for l in layers]
    scale_L = weight_L.astype(np.float32)
    probe_FLR = np.stack(probes, axis=1) * scale_L[:, None] * np.float32((width * size) ** 0.5)
    bias_FL = np.stack([layer.bias_FC[:, c] for layer in layers], axis=1) * scale_L
    gate_FLL = np.zeros((runs, len(layers), len(layers)), dtype=np.float32)
    return Parameters(*(torch.from_numpy(array).to(device) for array in (probe_FLR, bias_FL, gate_FLL)))


def _tensors(parameters: Parameters, layers: Sequence[LayerProbes], width: int) -> dict[str, Floats]:
    """What ``head.safetensors`` holds, of the one run."""
    probe_LR = parameters.probe[0].double().numpy() / (width * parameters.probe.shape[2]) ** 0.5
    weights = [
        one if layer.basis_DR is None else layer.basis_DR.astype(np.float64) @ one[: layer.basis_DR.shape[1]]
        for one, layer in zip(probe_LR, layers, strict=True)
    ]
    return {
        "probe_weight": np.stack(weights).astype(np.float32),
        "probe_bias": parameters.bias[0].numpy(),
        "gate_weight": parameters.gate[0].numpy(),
        "mean": np.stack([layer.mean_D for layer in layers]),
        "scale": np.stack([layer.scale_D for layer in layers]),
    }


def _skills(
    numbers: Sequence[int], layers: Sequence[LayerProbes], single_LM: Doubles, share_L: Doubles, judged: Indices
) -> Iterator[LayerSkill]:
    """``judged``: the responses of the report's figures, so that layers and head are compared on the same ones."""
    for number, layer, one_M, share in zip(numbers, layers, single_LM, share_L, strict=True):
        one, difference = one_M[judged], layer.difference_M[judged]
        accuracies = pair_accuracy(one), auc(one), pair_accuracy(difference), auc(difference)
        yield LayerSkill(number, *accuracies, float(share))


def _layer_weights(single_LM: Doubles, gate: Gate) -> Doubles:
    """How much each layer counts at the start: by its held-out AUC above chance, to the power of ``SKILL_POWER``.

    Scaled so that held-out rewards have standard deviation 1 while the gate is even (1/2 each, or 1/L with softmax):
    the scale for which the confidence's alpha is meant.
    """
    skill_L = np.maximum([auc(one) - 0.5 for one in single_LM], 1e-3) ** SKILL_POWER
    even = 0.5 if gate == "sigmoid" else 1 / len(skill_L)
    return np.asarray(skill_L / (even * (skill_L @ single_LM).std()))


def _criterion(rewards_M: Doubles) -> float:
    """What decides when to stop: the log loss of what the head is for, calibrated probabilities of responses and of
    pairs.

    Not the training loss: it falls with the mere scale of the rewards, and it does not see whether rewards of different
    prompts can still be compared, which is what the margin loss spoils first.
    """
    n = len(rewards_M) // 2
    margins_M = np.concatenate([rewards_M[:n] - rewards_M[n:], rewards_M[n:] - rewards_M[:n]])
    return sum(_log_loss(x_M, Platt.fit(x_M, labels(n))) for x_M in (rewards_M, margins_M))


def _log_loss(x_M: Doubles, platt: Platt) -> float:
    logits_M = platt.slope * x_M + platt.intercept
    return float(np.mean(np.logaddexp(0, np.where(labels(len(x_M) // 2) > 0, -logits_M, logits_M))))
