"""Fits SRR heads (arXiv 2505.15710) and says how they rank, beside a linear and an MLP scorer of the same vectors.

How long to train is chosen on held-out prompts in cross-validation, the folds advancing together; the head that is kept
is then trained that long on all lists. The scores of held-out lists along the way make the report and the calibration.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
import torch
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from tqdm import tqdm

from inward.errors import DataError
from inward.heads.calibration import Deciles, MarginScale
from inward.heads.srr import SrrHead
from inward.offline.data.pairs import Folds, grouped_folds
from inward.offline.fit.prepare import manifest
from inward.offline.fit.rankers import Lists, Ranker, ScorerKind, Settings, held_out, train
from inward.offline.fit.reproducible import reproducible
from inward.offline.states.saved import ListStates, layer_axis
from inward.types import Doubles

FRACTIONS = (0.25, 0.4, 0.5, 0.6, 0.75, 1.0)
"""Of the depth: the layers that a sweep tries."""


@dataclass(frozen=True, slots=True)
class LayerRanking:
    """One row of the sweep, by cross-validation over prompts."""

    layer: int
    loss: float
    """Listwise KL: what the layer is chosen by."""
    top1: float
    epochs: int


@dataclass(frozen=True, slots=True)
class SrrReport:
    """What ``inward fit srr`` prints and ``Manifest.fit["metrics"]`` keeps. Rates are over mixed lists (a safe and
    an unsafe answer).
    """

    layer: int
    epochs: int
    lists: int
    mixed_lists: int
    top1: dict[str, float]
    """How often the top pick is safe: ``first``, ``random``, ``oracle``; by cross-validation over prompts ``srr``,
    ``linear``, ``mlp``."""
    sweep: tuple[LayerRanking, ...]

    def metrics(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def __rich__(self) -> RenderableType:
        title = f"SRR, layer {self.layer}, {self.epochs} epochs, {self.mixed_lists} mixed lists of {self.lists}"
        rates = Table("top pick is safe", title, box=None, pad_edge=False)
        for name, rate in self.top1.items():
            rates.add_row(name, f"{rate:.3f}")
        layers = Table("layer", "held-out loss", "top-1 safe", "epochs", "", box=None, pad_edge=False)
        for row in self.sweep:
            mark = "chosen" if row.layer == self.layer else ""
            layers.add_row(str(row.layer), f"{row.loss:.3f}", f"{row.top1:.3f}", str(row.epochs), mark)
        return Lines(rates, "", layers)


class CrossValidated(NamedTuple):
    """Held-out loss at the best number of epochs, and every candidate's score by a scorer that had not seen its
    prompt.
    """

    loss: float
    epochs: int
    scores_M: Doubles


def fit_srr(
    states: ListStates,
    *,
    name: str = "srr",
    layer: int | float | Literal["sweep"] = "sweep",
    settings: Settings | None = None,
    folds: int = 5,
    seed: int = 0,
    baselines: bool = True,
    progress: bool = True,
) -> tuple[SrrHead, SrrReport]:
    """Fits a ranker on all mixed lists; lists without a safe or without an unsafe candidate teach nothing and are left
    out.

    Args:
        states: prompts and labelled candidates.
        layer: one of ``states.layers`` (int), a fraction of the depth (float: the nearest layer there is), or the best
            of ``FRACTIONS``.
        folds: of the cross-validation; fewer where there are fewer prompts.
        baselines: also train the linear and the MLP scorer, for the report.
        progress: show a bar.

    Raises:
        DataError: fewer than two prompts with a safe and an unsafe candidate, or no such layer.
    """
    settings = settings or Settings()
    total = len(states)
    states = _mixed(states)
    parts = grouped_folds(states.groups_G, min(folds, len(np.unique(states.groups_G))), seed)
    layers = _candidates(states.layers, layer)
    kinds = [kind for kind in get_args(ScorerKind) if baselines and kind != "srr"]
    with (
        reproducible(seed),
        tqdm(total=len(layers) + len(kinds) + 1, desc="fit srr", unit="run", disable=not progress) as bar,
    ):
        sweep: dict[int, CrossValidated] = {}
        for k in layers:
            sweep[k] = _cross_validate("srr", Lists(states, k), parts, settings, seed)
            bar.update()
        best = min(sweep, key=lambda k: (sweep[k].loss, k))
        lists = Lists(states, best)
        top1 = {"srr": _top1(lists, sweep[best].scores_M)}
        for kind in kinds:
            top1[kind] = _top1(lists, _cross_validate(kind, lists, parts, settings, seed).scores_M)
            bar.update()
        ranker = _fit(lists, settings, sweep[best].epochs, seed)
        bar.update()
    top1 |= {
        "first": float(np.mean([lists.safe_M[rows[0]] for rows in lists.members])),
        "random": float(np.mean([lists.safe_M[rows].mean() for rows in lists.members])),
        "oracle": 1.0,
    }
    table = tuple(LayerRanking(k, run.loss, _top1(lists, run.scores_M), run.epochs) for k, run in sweep.items())
    report = SrrReport(best, sweep[best].epochs, total, len(states), top1, table)
    head_manifest = manifest(
        name,
        "srr",
        states,
        [best],
        seed=seed,
        calibration=_calibration(lists, sweep[best].scores_M),
        metrics=report.metrics(),
        options={"tau": settings.tau},
    )
    return SrrHead.from_tensors(head_manifest, ranker.tensors()), report


def _mixed(states: ListStates) -> ListStates:
    """The lists that have both a safe and an unsafe candidate."""
    mixed = [g for g in range(len(states)) if len(np.unique(states.safe_M[states.group_M == g])) == 2]
    if len(np.unique(states.groups_G[mixed])) < 2:
        raise DataError(
            f"of {len(states)} lists {len(mixed)} have both a safe and an unsafe response; a ranker needs two such "
            "prompts"
        )
    return states.lists(np.array(mixed, dtype=np.int64))


def _candidates(available: tuple[int, ...], layer: int | float | Literal["sweep"]) -> list[int]:
    """The layers to try, of those there are; fractions are of the deepest."""
    if isinstance(layer, int):
        layer_axis(available, layer)
        return [layer]
    fractions = FRACTIONS if layer == "sweep" else (float(layer),)
    return sorted({min(available, key=lambda k: (abs(k - fraction * max(available)), k)) for fraction in fractions})


def _cross_validate(kind: ScorerKind, lists: Lists, parts: Folds, settings: Settings, seed: int) -> CrossValidated:
    """Trains one scorer a fold, all folds together, until their held-out loss has not improved for ``patience``
    epochs.
    """
    torch.manual_seed(seed)
    scorers = [lists.scorer(kind, index, settings) for index, _ in parts]
    training = [
        train(scorer, lists, index, settings, np.random.default_rng([seed, fold]))
        for fold, (scorer, (index, _)) in enumerate(zip(scorers, parts, strict=True))
    ]
    best = CrossValidated(np.inf, 0, np.empty(0))
    for epoch in range(1, settings.epochs + 1):
        for one in training:
            next(one)
        judged = [held_out(scorer, lists, test) for scorer, (_, test) in zip(scorers, parts, strict=True)]
        loss = float(np.average([j[0] for j in judged], weights=[len(test) for _, test in parts]))
        if loss < best.loss:
            scores_M = np.empty(len(lists.safe_M))
            for _, scores, rows in judged:
                scores_M[rows] = scores
            best = CrossValidated(loss, epoch, scores_M)
        elif epoch - best.epochs >= settings.patience:
            break
    return best


def _fit(lists: Lists, settings: Settings, epochs: int, seed: int) -> Ranker:
    """The ranker, trained on all lists."""
    torch.manual_seed(seed)
    index = np.arange(len(lists.members))
    ranker = cast(Ranker, lists.scorer("srr", index, settings))
    for _ in islice(train(ranker, lists, index, settings, np.random.default_rng(seed)), epochs):
        pass
    return ranker.eval()


def _top1(lists: Lists, scores_M: Doubles) -> float:
    """Share of lists whose highest score is a safe candidate's."""
    return float(np.mean([lists.safe_M[rows[np.argmax(scores_M[rows])]] for rows in lists.members]))


def _calibration(lists: Lists, scores_M: Doubles) -> dict[str, Any]:
    """Tenths of the scores, and scale and bins of margins between the safe and the unsafe candidates of a list.

    No margins where too few are above zero.
    """
    deciles = Deciles.fit(scores_M).dump()
    margins = [
        (scores_M[rows[lists.safe_M[rows]]][:, None] - scores_M[rows[~lists.safe_M[rows]]][None]).ravel()
        for rows in lists.members
    ]
    try:
        return deciles | MarginScale.fit(np.concatenate(margins)).dump()
    except DataError:
        return deciles
