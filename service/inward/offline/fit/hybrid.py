"""Fits hybrid heads (arXiv 2503.10093): a regularised probe per layer as warm start, then probes and gate jointly with
a margin loss.

Everything that has to be chosen (kind and strength of the probes, weights of the layers at the start, number of joint
steps) is chosen by cross-validation over prompts; the head that is kept is then fitted in the same way on all pairs.
Rewards of held-out pairs along the way give the calibration and the report's figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from tqdm import tqdm

from inward.errors import DataError
from inward.heads.calibration import Deciles, MarginScale, Platt
from inward.heads.hybrid import Gate, HybridHead
from inward.offline.data.pairs import PairStates, grouped_folds
from inward.offline.fit.joint import Joint, Parameters, train_jointly
from inward.offline.fit.prepare import manifest
from inward.offline.fit.probes import (
    RECIPES,
    Coordinates,
    Doubles,
    Recipe,
    Standardisation,
    auc,
    fit_probes,
    labels,
    mean_difference,
    pair_accuracy,
)
from inward.offline.fit.reproducible import reproducible
from inward.offline.states.saved import Indices
from inward.types import Floats

SKILL_POWER = 4
"""How sharply the start prefers layers whose probes do well alone: enough to leave out the shallow ones, not to pick
a single one."""
Folds = Sequence[tuple[Indices, Indices]]


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

    Recipe, weights and number of steps were chosen on the same folds, so they flatter a little: ``cross_validate`` does
    not.
    """

    pairs: int
    prompts: int
    recipe: Recipe
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
        return {
            **asdict(self),
            "recipe": self.recipe._asdict(),
            "best_layer": self.best_layer.layer,
            "verdict": self.verdict,
        }

    @property
    def verdict(self) -> str:
        """Whether all layers together beat the best one, and if not, by how much that could be chance."""
        best = self.best_layer
        error = (best.accuracy * (1 - best.accuracy) / self.pairs) ** 0.5
        figures = f"accuracy {self.accuracy:.3f} against {best.accuracy:.3f}, AUC {self.auc:.3f} against {best.auc:.3f}"
        if self.accuracy > best.accuracy and self.auc > best.auc:
            return f"beats its best single layer ({best.layer}): {figures}; one standard error of an accuracy is {error:.3f} here"
        return (
            f"does not beat its best single layer ({best.layer}) on every count: {figures}; that layer is the best of {len(self.layers)} "
            f"picked on these same pairs, and one standard error of an accuracy is {error:.3f} here"
        )

    def __rich__(self) -> RenderableType:
        facts = Table("hybrid reward", f"{self.pairs} pairs of {self.prompts} prompts", box=None, pad_edge=False)
        facts.add_row("pair accuracy, held out", f"{self.accuracy:.3f}  (warm start {self.warm_start_accuracy:.3f})")
        facts.add_row("AUC, held out", f"{self.auc:.3f}  (warm start {self.warm_start_auc:.3f})")
        facts.add_row("probes", f"{self.recipe.kind}, C = {self.recipe.c:g}")
        facts.add_row("joint steps", str(self.steps))
        table = Table("layer", "accuracy", "AUC", "mean difference", "its AUC", "weight", box=None, pad_edge=False)
        for row in self.layers:
            numbers = (row.accuracy, row.auc, row.mean_difference_accuracy, row.mean_difference_auc, row.weight)
            table.add_row(str(row.layer), *(f"{number:.3f}" for number in numbers))
        return Lines(facts, "", table, "", self.verdict)


def fit_hybrid(
    states: PairStates,
    *,
    name: str = "hybrid",
    gate: Gate = "sigmoid",
    recipes: Sequence[Recipe] = RECIPES,
    joint: Joint | None = None,
    folds: int = 5,
    seed: int = 0,
    progress: bool = True,
) -> tuple[HybridHead, HybridReport]:
    """Fits a hybrid head on all pairs.

    Args:
        states: the head reads all of ``states.layers``, except the embedding (0).
        gate: ``sigmoid``, or ``softmax`` as in the paper's text.
        recipes: what the warm start chooses from.
        joint: how the joint training goes.
        folds: of the cross-validation; fewer where there are fewer prompts.
        progress: show a bar.

    Raises:
        DataError: fewer than two prompts, or no layer but the embedding.
    """
    joint = joint or Joint()
    states = _without_embedding(states)
    prompts = len(np.unique(states.groups_N))
    parts = grouped_folds(states.groups_N, min(folds, prompts) if prompts > 1 else 2, seed)
    with (
        reproducible(seed),
        tqdm(total=len(recipes) + len(parts) + 2, desc="fit hybrid", unit="run", disable=not progress) as bar,
    ):
        standardisation = Standardisation.fit(states)
        coordinates = Coordinates.of(states, standardisation)
        recipe, single_LM = _choose(coordinates, parts, recipes, seed, bar)
        weight_L = _layer_weights(single_LM, gate)
        difference_LM = _crossfit(coordinates, parts, None, seed)
        bar.update()
        paths = []
        for train, test in parts:
            start = _warm_start(coordinates.rows(train), recipe, weight_L, seed)
            paths.append(
                train_jointly(start, coordinates.rows(train), gate, joint, joint.steps, coordinates.rows(test)).held_out
            )
            bar.update()
        rewards_SM = _held_out(paths, parts, len(states))
        best = 1 + int(np.argmin([_criterion(rewards_M) for rewards_M in rewards_SM[1:]]))
        start = _warm_start(coordinates.points_LMR, recipe, weight_L, seed)
        final = train_jointly(start, coordinates.points_LMR, gate, joint, best * joint.every).parameters
        bar.update()
    rewards_M = rewards_SM[best]
    report = HybridReport(
        pairs=len(states),
        prompts=prompts,
        recipe=recipe,
        steps=best * joint.every,
        accuracy=pair_accuracy(rewards_M),
        auc=auc(rewards_M),
        warm_start_accuracy=pair_accuracy(rewards_SM[0]),
        warm_start_auc=auc(rewards_SM[0]),
        layers=tuple(
            LayerSkill(layer, pair_accuracy(one), auc(one), pair_accuracy(difference), auc(difference), float(weight))
            for layer, one, difference, weight in zip(
                states.layers, single_LM, difference_LM, weight_L / weight_L.sum(), strict=True
            )
        ),
    )
    tensors: dict[str, Floats] = {
        "probe_weight": coordinates.weight(final.probe_LR.double().numpy()).astype(np.float32),
        "probe_bias": final.bias_L.numpy(),
        "gate_weight": final.gate_LL.numpy(),
        "mean": standardisation.mean_LD,
        "scale": standardisation.scale_LD,
    }
    head_manifest = manifest(
        name,
        "hybrid",
        states,
        states.layers,
        seed=seed,
        calibration=_calibration(rewards_M),
        metrics=report.metrics(),
        options={"gate": gate},
    )
    return HybridHead.from_tensors(head_manifest, tensors), report


def cross_validate(states: PairStates, *, folds: int = 10, seed: int = 0, **options: Any) -> Doubles:
    """``[2N]``: rewards of ``labels``' rows, each by a head fitted, choices included, without its prompt.

    Args:
        options: passed on to ``fit_hybrid``.
    """
    rewards_M = np.empty(2 * len(states))
    for train, test in grouped_folds(states.groups_N, folds, seed):
        head, _ = fit_hybrid(states.rows(train), seed=seed, progress=False, **options)
        held_out = _without_embedding(states.rows(test))
        both_MLD = np.concatenate([held_out.chosen_NLD, held_out.rejected_NLD])
        weights_LD = np.stack([tap.weight_DK[:, 0] for tap in head.readout.taps if tap.weight_DK is not None])
        biases_L = np.concatenate([tap.bias_K for tap in head.readout.taps if tap.bias_K is not None])
        rewards_M[_both(test, len(states))] = head.rewards(np.einsum("mld,ld->ml", both_MLD, weights_LD) + biases_L)[0]
    return rewards_M


def _warm_start(points_LMR: Doubles, recipe: Recipe, weight_L: Doubles, seed: int) -> Parameters:
    """Probes fitted one by one and scaled to ``weight_L``, biases that centre them, and a gate that treats all
    layers alike (V = 0).
    """
    probe_LR, mean_L, std_L = _unit_probes(points_LMR, fit_probes(points_LMR, recipe, seed))
    layers = len(points_LMR)
    scale_L = weight_L / std_L
    parameters = (probe_LR * scale_L[:, None], -mean_L * scale_L, np.zeros((layers, layers)))
    return Parameters(*(torch.from_numpy(array).float() for array in parameters))


def _unit_probes(points_LMR: Doubles, probe_LR: Doubles) -> tuple[Doubles, Doubles, Doubles]:
    """The probes with the mean and standard deviation of their outputs on the rows that they were fitted on."""
    output_LM = np.einsum("lmr,lr->lm", points_LMR, probe_LR, optimize=True)
    return probe_LR, output_LM.mean(axis=1), np.maximum(output_LM.std(axis=1), 1e-12)


def _crossfit(coordinates: Coordinates, parts: Folds, recipe: Recipe | None, seed: int) -> Doubles:
    """``[L, 2N]``: each row's probe outputs, in units of their spread, by probes of folds that its prompt is not in.

    No recipe: by the mean difference.
    """
    outputs_LM = np.empty(coordinates.points_LMR.shape[:2])
    for train, test in parts:
        points_LMR = coordinates.rows(train)
        probe_LR = mean_difference(points_LMR) if recipe is None else fit_probes(points_LMR, recipe, seed)
        probe_LR, mean_L, std_L = _unit_probes(points_LMR, probe_LR)
        judged_LM = np.einsum("lmr,lr->lm", coordinates.rows(test), probe_LR, optimize=True)
        outputs_LM[:, _both(test, coordinates.pairs)] = (judged_LM - mean_L[:, None]) / std_L[:, None]
    return outputs_LM


def _choose(
    coordinates: Coordinates, parts: Folds, recipes: Sequence[Recipe], seed: int, bar: Any
) -> tuple[Recipe, Doubles]:
    """The recipe whose probes do best on held-out prompts, on average over the layers, and their held-out outputs."""
    best, best_skill, outputs_LM = recipes[0], -np.inf, np.empty(0)
    for recipe in recipes:
        held_out_LM = _crossfit(coordinates, parts, recipe, seed)
        skill = float(np.mean([pair_accuracy(one) + auc(one) for one in held_out_LM]))
        if skill > best_skill:
            best, best_skill, outputs_LM = recipe, skill, held_out_LM
        bar.update()
    return best, outputs_LM


def _layer_weights(single_LM: Doubles, gate: Gate) -> Doubles:
    """How much each layer counts at the start: by its held-out AUC above chance, to the power of ``SKILL_POWER``.

    Scaled so that held-out rewards have standard deviation 1 while the gate is even (1/2 each, or 1/L with softmax):
    the scale for which the confidence's alpha is meant.
    """
    skill_L = np.maximum([auc(one) - 0.5 for one in single_LM], 1e-3) ** SKILL_POWER
    even = 0.5 if gate == "sigmoid" else 1 / len(skill_L)
    return np.asarray(skill_L / (even * (skill_L @ single_LM).std()))


def _held_out(paths: Sequence[Doubles], parts: Folds, pairs: int) -> Doubles:
    """``[S, 2N]``: the folds' held-out rewards, put together."""
    rewards_SM = np.empty((len(paths[0]), 2 * pairs))
    for path, (_, test) in zip(paths, parts, strict=True):
        rewards_SM[:, _both(test, pairs)] = path
    return rewards_SM


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


def _calibration(rewards_M: Doubles) -> dict[str, Any]:
    """Probabilities of a response and of a pair's label, tenths of the rewards and the scale of margins, from held-out
    rewards.

    A pair and the same pair turned round say the same, so the pair's curve is fitted on both and passes through 1/2 at
    margin 0.
    """
    n = len(rewards_M) // 2
    margins_N = rewards_M[:n] - rewards_M[n:]
    pair = Platt.fit(np.concatenate([margins_N, -margins_N]), labels(n))
    calibration: dict[str, Any] = {
        "platt": Platt.fit(rewards_M, labels(n)).dump(),
        "platt_pair": {"slope": pair.slope, "intercept": 0.0},
    }
    calibration |= Deciles.fit(rewards_M).dump()
    try:
        return calibration | MarginScale.fit(margins_N).dump()
    except DataError:  # too few margins above zero for bins: the report tells how bad the head is
        return calibration


def _both(index: Indices, pairs: int) -> Indices:
    """Rows of the chosen and then of the rejected responses of some pairs."""
    return np.concatenate([index, index + pairs])


def _without_embedding(states: PairStates) -> PairStates:
    """Layer 0 is the embedding of the last token, which the reward does not use."""
    kept = [axis for axis, layer in enumerate(states.layers) if layer > 0]
    if not kept:
        raise DataError("a hybrid head needs the states of at least one block; these are of the embedding only")
    if len(kept) == len(states.layers):
        return states
    layers = tuple(states.layers[axis] for axis in kept)
    return replace(
        states, chosen_NLD=states.chosen_NLD[:, kept], rejected_NLD=states.rejected_NLD[:, kept], layers=layers
    )
