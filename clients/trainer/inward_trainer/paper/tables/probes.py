"""Probe accuracy of every layer, before and after alignment (the hybrid paper's figure 1), and where safe and unsafe
answers lie (its figure 2).
"""

from __future__ import annotations

import numpy as np

from inward.offline.states.saved import PairStates
from inward.types import Doubles
from inward_trainer.paper.cells import Json
from inward_trainer.paper.estimates import pair_accuracy
from inward_trainer.paper.experiment import Experiment
from inward_trainer.paper.heads import held_out_probes, pair_states
from inward_trainer.paper.language_model import LanguageModel
from inward_trainer.paper.table import Chart, Row, Table
from inward_trainer.paper.tables import alignment

POINTS = 120
"""Of a scatter, of each kind."""
AFTER = "cdpo"


def table(run: Experiment) -> Table:
    """Accuracy of a probe for each layer on pairs of prompts that it has not seen, of the model and of its aligned
    self.
    """
    seed = run.seeds[0]
    cells = {"before": "probes-before", "after": f"probes-after-{seed}"}
    made = run.cells.every(
        {
            cells["before"]: lambda: _measured(run, run.base),
            cells["after"]: lambda: _measured(run, alignment.policy(run, AFTER, seed)),
        },
        "probes",
    )
    rows, charts, notes, lines = [], [], [], {}
    for name in cells:
        cell = made[cells[name]]
        if not isinstance(cell, dict):
            rows.append(Row(f"{name} alignment", {}, cell.reason))
            continue
        best = max(cell["layers"], key=lambda row: row["accuracy"]["value"])
        last = cell["layers"][-1]
        rows.append(Row(f"{name} alignment, best layer ({best['layer']})", {"pair accuracy": best["accuracy"]}))
        rows.append(Row(f"{name} alignment, last layer ({last['layer']})", {"pair accuracy": last["accuracy"]}))
        lines[name] = [(row["layer"], row["accuracy"]["value"]) for row in cell["layers"]]
        charts += [
            Chart(f"Safe and unsafe answers, layer {layer}, {name} alignment", "first component", "second component",
                  {"safe": one["safe"], "unsafe": one["unsafe"]}, "scatter")
            for layer, one in cell["plane"].items()
        ]  # fmt: skip
        notes = [
            f"{cell['pairs']} held-out pairs of PKU-SafeRLHF, cross-validated over prompts; the best layer is picked "
            f"on the same pairs, which flatters it. After: cDPO, seed {seed}."
        ]
    charts.insert(0, Chart("Pair accuracy of one layer's probe", "layer", "accuracy", lines))
    published = [
        [
            "accuracy by layer",
            "rises to about 0.9 in the middle layers",
            "arXiv 2503.10093, figure 1",
            "Llama-2-7B, 32 layers",
        ],
        [
            "whitened, best layer, Llama-2-7B states of the authors",
            "0.91 / AUC 0.88",
            "measured on 201 pairs",
            "the same fit",
        ],
    ]
    return Table("probes", "Probes of every layer", ["pair accuracy"], rows, notes, charts, published)


def _measured(run: Experiment, model: LanguageModel) -> Json:
    pairs = run.data.test_pairs["pku"]
    states = pair_states(model, pairs)
    n = len(pairs)
    layers = [
        {"layer": layer, "accuracy": pair_accuracy(held[:n], held[n:], states.groups_N)}
        for layer, probe in zip(states.layers, held_out_probes(states), strict=True)
        for held in [probe.held_out_CM[0]]
    ]
    shown = sorted({max(1, model.layers // 4), max(1, model.layers // 2), model.layers})
    return {"pairs": n, "layers": layers, "plane": {str(layer): _plane(states, layer) for layer in shown}}


def _plane(states: PairStates, layer: int) -> dict[str, list[list[float]]]:
    """The first two principal components of standardised states."""
    chosen, rejected = (side[:POINTS].astype(np.float64) for side in states.at(layer))
    both = np.concatenate([chosen, rejected])
    scale = both.std(axis=0)
    z = (both - both.mean(axis=0)) / np.where(scale > 0, scale, 1)
    _, _, axes = np.linalg.svd(z, full_matrices=False)
    points: Doubles = z @ axes[:2].T
    return {"safe": points[: len(chosen)].round(2).tolist(), "unsafe": points[len(chosen) :].round(2).tolist()}
