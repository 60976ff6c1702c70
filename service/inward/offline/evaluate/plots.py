"""The pictures of a report, as SVG text. matplotlib without a display, and without its global state."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from inward.offline.evaluate.judge import Judgement
from inward.offline.evaluate.statistics import bin_of
from inward.types import Doubles, Floats

SAFE, UNSAFE, OURS, OTHER, FAINT = "#2f6fa7", "#d1742a", "#1d1d1f", "#8a8f98", "#d9dbdf"
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9a9ea6",
    "axes.labelcolor": "#3c3f45",
    "axes.titlesize": 9,
    "axes.titlecolor": "#3c3f45",
    "xtick.color": "#5b5f67",
    "ytick.color": "#5b5f67",
    "legend.frameon": False,
    "svg.hashsalt": "inward",  # the same report twice is the same file
    "svg.fonttype": "path",
}
Picture = Callable[[Judgement], str | None]
PCA_LAYERS = 6
PCA_POINTS = 800
BINS = 10


def draw(picture: Picture, judgement: Judgement) -> str | None:
    """SVG text, or None where the judgement lacks what the picture shows."""
    with matplotlib.rc_context(STYLE):
        return picture(judgement)


def layers(judgement: Judgement) -> str | None:
    """Held-out accuracy and AUC of every layer's probe, beside the mean difference and the head's own part of that
    layer.
    """
    rows = judgement.layers
    names = {
        "probe": ("logistic probe", SAFE),
        "mean_difference": ("mean difference", OTHER),
        "head": ("head's own layer", UNSAFE),
    }
    kinds = [k for k in ("accuracy", "auc") if any(row[f"{name}_{k}"] is not None for name in names for row in rows)]
    if len(rows) < 2 or not kinds:
        return None
    figure = _figure(7.4, 2.9)
    for panel, kind in enumerate(kinds):
        axes = figure.add_subplot(1, len(kinds), panel + 1)
        axes.axhline(0.5, color=FAINT, linewidth=1)
        for name, (label, colour) in names.items():
            values = [row[f"{name}_{kind}"] for row in rows]
            if all(v is not None for v in values):
                numbers = [row["layer"] for row in rows]
                axes.plot(numbers, values, color=colour, marker="o", markersize=3, linewidth=1.4, label=label)
        ours = judgement.metrics["pair_accuracy" if kind == "accuracy" else "auc"]
        if ours:
            axes.axhline(ours.value, color=OURS, linewidth=1, linestyle=(0, (4, 3)), label="the whole head")
        axes.set(xlabel="layer (blocks passed)", ylabel={"accuracy": "pair accuracy", "auc": "AUC"}[kind])
        if panel == len(kinds) - 1:
            axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _svg(figure)


def pca(judgement: Judgement) -> str | None:
    """Safe and unsafe states on their first two principal components, at some layers."""
    examples = judgement.examples
    count = min(PCA_LAYERS, len(examples.layers))
    shown = sorted({int(i) for i in np.linspace(0, len(examples.layers) - 1, count).round()})
    keep = np.sort(np.random.default_rng(0).permutation(len(examples))[:PCA_POINTS])
    columns = min(3, len(shown))
    height = -(-len(shown) // columns)
    figure = _figure(2.45 * columns, 2.2 * height)
    for panel, axis in enumerate(shown):
        points, share = _components(examples.states_MLD[keep, axis])
        axes = figure.add_subplot(height, columns, panel + 1)
        for safe, colour, label in ((False, UNSAFE, "unsafe"), (True, SAFE, "safe")):
            these = points[examples.safe_M[keep] == safe]
            axes.scatter(*these.T, s=7, color=colour, alpha=0.55, linewidths=0, label=label, rasterized=len(keep) > 300)
        axes.set_title(f"layer {examples.layers[axis]}  ({share:.0%} of variance)")
        axes.set(xticks=[], yticks=[])
        if panel == 0:
            axes.legend(fontsize=8, handletextpad=0.1, borderpad=0.1, loc="best")
    return _svg(figure)


def rewards(judgement: Judgement) -> str | None:
    """How the head's scores of safe and unsafe (chosen and rejected) responses are spread."""
    if judgement.ours.scores_M is None:
        return None
    scores_M, safe_M = judgement.ours.scores_M, judgement.examples.safe_M
    low, high = np.quantile(scores_M, [0.005, 0.995])
    edges = np.linspace(low, high if high > low else low + 1, 41)
    figure, axes = _axes(5.4, 2.7)
    better, worse = ("chosen", "rejected") if judgement.examples.source == "pairs" else ("safe", "unsafe")
    for rows, colour, label in ((~safe_M, UNSAFE, worse), (safe_M, SAFE, better)):
        clipped = np.clip(scores_M[rows], edges[0], edges[-1])
        axes.hist(clipped, edges, color=colour, alpha=0.55, density=True, label=label)
        axes.axvline(float(np.median(scores_M[rows])), color=colour, linewidth=1.4)
    axes.set(xlabel="score", ylabel="density", yticks=[])
    axes.legend(fontsize=8)
    return _svg(figure)


def thresholds(judgement: Judgement) -> str | None:
    """Share of the unsafe responses that each threshold flags against that of the safe ones, with operating points."""
    scores_M, safe_M = judgement.ours.scores_M, judgement.examples.safe_M
    if scores_M is None:
        return None
    cuts = np.unique(scores_M)
    false, true = (
        np.searchsorted(np.sort(scores_M[rows]), cuts, side="right") / rows.sum() for rows in (safe_M, ~safe_M)
    )
    figure, axes = _axes(5.4, 2.9)
    least = 0.5 / safe_M.sum()
    even = np.geomspace(least, 1, 60)
    axes.plot(even, even, color=FAINT, linewidth=1)
    axes.plot(np.maximum(false, least), true, color=OURS, linewidth=1.4)
    for one in judgement.guard:
        if one.false_positives and one.true_positives:
            x, y = max(one.false_positives.value, least), one.true_positives
            error = [[y.value - y.low], [y.high - y.value]]
            axes.errorbar(x, y.value, yerr=error, color=UNSAFE, marker="o", markersize=4)
            axes.annotate(f"{one.rate:.0%}", (x, y.value), xytext=(5, -9), textcoords="offset points", color=UNSAFE)
    axes.set(xscale="log", xlim=(least, 1), ylim=(0, 1.02), xlabel="false positives", ylabel="caught")
    return _svg(figure)


def reliability(judgement: Judgement) -> str | None:
    """Observed share of safe responses against the stated probability."""
    p_M, safe_M = judgement.ours.probability_M, judgement.examples.safe_M
    if p_M is None:
        return None
    bin_M = bin_of(p_M, BINS)
    figure, axes = _axes(3.5, 3.3)
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1)
    filled = [k for k in range(BINS) if (bin_M == k).any()]
    stated = np.array([p_M[bin_M == k].mean() for k in filled])
    observed = np.array([safe_M[bin_M == k].mean() for k in filled])
    size = np.array([(bin_M == k).sum() for k in filled])
    error = 1.96 * np.sqrt(np.maximum(observed * (1 - observed), 0.25 / size) / size)
    axes.errorbar(stated, observed, yerr=error, color=SAFE, linewidth=1.4, elinewidth=0.8, ecolor=OTHER)
    axes.scatter(stated, observed, s=12 + 160 * size / size.sum(), color=SAFE, zorder=3)
    axes.set(xlabel="stated probability of being safe", ylabel="observed share", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    return _svg(figure)


def strategies(judgement: Judgement) -> str | None:
    """Best, ours, last, random and worst layer as bars with intervals."""
    found = judgement.strategies[::-1]
    if not found:
        return None
    figure, axes = _axes(5.6, 2.2)
    values = np.array([one.estimate.value for one in found])
    error = np.array(
        [[one.estimate.value - one.estimate.low, one.estimate.high - one.estimate.value] for one in found]
    ).T
    colours = [SAFE if one.name == "ours" else FAINT for one in found]
    labels = [f"{one.name} ({one.layer})" if one.layer is not None else one.name for one in found]
    axes.barh(labels, values, color=colours, height=0.62)
    axes.errorbar(values, range(len(found)), xerr=np.maximum(error, 0), fmt="none", ecolor=OURS, elinewidth=1)
    for row, (value, above) in enumerate(zip(values, error[1], strict=True)):
        axes.text(value + max(float(above), 0) + 0.012, row, f"{value:.3f}", va="center", fontsize=8)
    axes.set(xlim=(0, min(1.12, float(max(values + error[1])) + 0.12)), xlabel="")
    axes.tick_params(axis="y", length=0)
    return _svg(figure)


def margins(judgement: Judgement) -> str | None:
    """Margin against length difference, one point a comparison."""
    difference_P = judgement.examples.length_difference_P
    margin_P = judgement.ours.margins(judgement.examples)
    if difference_P is None or not len(margin_P):
        return None
    keep = np.random.default_rng(0).permutation(len(margin_P))[: 2 * PCA_POINTS]
    figure, axes = _axes(5.4, 2.9)
    axes.axhline(0, color=FAINT, linewidth=1)
    axes.axvline(0, color=FAINT, linewidth=1)
    right = margin_P[keep] > 0
    for rows, colour, label in ((right, SAFE, "label agrees"), (~right, UNSAFE, "disagrees")):
        x, y = difference_P[keep][rows], margin_P[keep][rows]
        axes.scatter(x, y, s=8, color=colour, alpha=0.5, linewidths=0, label=label, rasterized=len(keep) > 300)
    axes.set(xlabel="length difference, better minus worse (tokens)", ylabel="margin")
    axes.legend(fontsize=8)
    return _svg(figure)


def _components(states_ND: Floats) -> tuple[Doubles, float]:
    """First two principal components ``[N, 2]`` and their share of the variance."""
    x = states_ND.astype(np.float64)
    x -= x.mean(axis=0)
    gram = x @ x.T if len(x) <= x.shape[1] else x.T @ x
    values, vectors = np.linalg.eigh(gram)
    top = vectors[:, :-3:-1]
    points = top * np.sqrt(np.maximum(values[:-3:-1], 0)) if len(x) <= x.shape[1] else x @ top
    if points.shape[1] < 2:
        points = np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
    return points, float(values[:-3:-1].sum() / max(values.sum(), 1e-30))


def _figure(width: float, height: float) -> Any:
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _axes(width: float, height: float) -> tuple[Any, Any]:
    figure = _figure(width, height)
    return figure, figure.add_subplot()


def _svg(figure: Any) -> str:
    text = io.StringIO()
    FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return text.getvalue()
