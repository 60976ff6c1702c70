"""LEGEND (arXiv 2406.08124): do its margins make a better reward model, and do labels that it contradicts spoil one?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from inward.offline.data.pairs import prompt_groups
from inward.offline.fit.legend import fit_legend
from inward.offline.fit.whitened import FromStates, fit_whitened
from inward.offline.smollm2 import REFUSALS
from inward.offline.states.moments import Moments
from inward.types import Doubles
from inward_client.rows import Pair
from inward_trainer.paper.cells import Json, Missing
from inward_trainer.paper.estimates import Figure, over_seeds, pair_accuracy, plain, share
from inward_trainer.paper.experiment import Experiment
from inward_trainer.paper.heads import pair_states, scores
from inward_trainer.paper.refusals import refuses
from inward_trainer.paper.reward_model import train_reward_model
from inward_trainer.paper.table import Row, Table
from inward_trainer.paper.texts import encode_pairs, prompt_ids

BINS = (0.0, 1 / 3, 2 / 3, 1.0)
"""Of quarters of the positive margins; a negative one is 0."""
ANSWER_TOKENS = 48
WAYS = {
    "none": "no margin",
    "legend": "LEGEND's margins",
    "whitened": "whitened LEGEND's margins",
    "constant": "a constant margin",
    "shuffled": "LEGEND's margins, shuffled",
    "dropped": "contradicted labels dropped, no margin",
    "flipped": "contradicted labels flipped, no margin",
}
COLUMNS = [
    "pair accuracy, PKU",
    "pair accuracy, hh-rlhf",
    "against no margin",
    "unsafe, best of several",
    "against no margin, unsafe",
]
PUBLISHED = [
    [
        "reward-model accuracy gained by margins",
        "about +2 points",
        "LEGEND, arXiv 2406.08124",
        "7 B reward models, more pairs",
    ],
    ["win rate gained", "about +10 points", "the same", "judged by GPT-4 there"],
]


def table(run: Experiment) -> Table:
    """The same reward model, seed and pairs, with different margins or labels."""
    names = {(way, seed): f"legend-{way}-{seed}" for seed in run.seeds for way in WAYS}
    margins = run.cells.need("legend-margins", lambda: _margins(run))
    makers = {name: partial(_trained, run, margins, *which) for which, name in names.items()}
    found = run.cells.every(makers, "reward models")
    by_way = {way: [found[names[way, seed]] for seed in run.seeds] for way in WAYS}
    plain_ones = [cell for cell in by_way["none"] if isinstance(cell, dict)]
    rows = [_direct(margins["heads"][name]["test"], label) for name, label in HEADS.items()]
    rows += [_row(label, by_way[way], plain_ones, run) for way, label in WAYS.items()]
    said = margins["heads"]["legend"]
    notes = [
        f"TRL's RewardTrainer, all weights, one epoch of {len(run.data.margin_pairs)} pairs (PKU-SafeRLHF, hh-rlhf); "
        "margins are binned in quarters of those that agree, 0 to 1, 0 where LEGEND contradicts. Judged on pairs of "
        f"held-out prompts, and by the best of {run.sizes.samples} answers of the base model to {len(run.held_out)} "
        "held-out prompts.",
        f"The direction: {margins['calibrated']} of {len(run.data.calibration)} greedy answers to AdvBench's requests "
        f"that did not refuse, against refusals in {len(REFUSALS)} wordings, at layer {said['layer']}, which a "
        "quarter of the pairs' labels chose. Whitened: the same means, the covariance of the pairs that are annotated.",
        f"LEGEND contradicts {said['contradicted']['value']:.1%} of the labels, the whitened one "
        f"{margins['heads']['whitened']['contradicted']['value']:.1%}; dropped and flipped are what the whitened one "
        "contradicts.",
    ]
    return Table("legend", "LEGEND's margins for reward models", COLUMNS, rows, notes, published=PUBLISHED)


HEADS = {"legend": "LEGEND itself, no training", "whitened": "whitened LEGEND itself, no training"}


def _margins(run: Experiment) -> Json:
    """Fits both directions and says the margin of every training pair."""
    asked = run.data.calibration
    answers = run.base.draw(prompt_ids(run.tokeniser, asked), 1, ANSWER_TOKENS, 0, greedy=True)
    rows = [
        Pair(prompt, REFUSALS[place % len(REFUSALS)], row[0].text)
        for place, (prompt, row) in enumerate(zip(asked, answers, strict=True))
        if row[0].text.strip() and not refuses(row[0].text)
    ]
    calibration, train = pair_states(run.base, rows), pair_states(run.base, run.data.margin_pairs)
    # a quarter chooses the layer, as labelled validation pairs may
    validation = train.rows(np.arange(min(len(train), max(2, len(train) // 4))))
    covariance = []
    for axis in range(len(train.layers)):
        moments = Moments.empty(train.width)
        for side in (train.chosen_NLD, train.rejected_NLD):
            moments.add(side[:, axis])
        covariance.append(moments)
    heads = {
        "legend": fit_legend(calibration, layer="sweep", validation=validation, bootstraps=20)[0],
        "whitened": fit_whitened(
            FromStates.of(calibration), covariance=covariance, covariance_of="the annotated pairs",
            validation=validation, layer="sweep", bootstraps=20,
        )[0],
    }  # fmt: skip
    tests = {name: pair_states(run.base, pairs) for name, pairs in run.data.test_pairs.items()}
    found: Json = {"calibrated": len(rows), "heads": {}}
    for name, head in heads.items():
        margins = scores(head, train.chosen_NLD) - scores(head, train.rejected_NLD)
        found["heads"][name] = {
            "layer": head.manifest.layers[0],
            "margins": plain(margins),
            "contradicted": share(margins < 0, train.groups_N),
            "test": {
                test: pair_accuracy(scores(head, s.chosen_NLD), scores(head, s.rejected_NLD), s.groups_N)
                for test, s in tests.items()
            },
        }
    return found


def _trained(run: Experiment, margins: Json, way: str, seed: int) -> Json:
    pairs, given = _training(run.data.margin_pairs, margins, way, seed)
    model = train_reward_model(run.folder, run.tokeniser, pairs, margins=given, device=run.device, seed=seed)
    found: Json = {"pairs": len(pairs)}
    for name, test in run.data.test_pairs.items():
        encoded = encode_pairs(run.tokeniser, test)
        rewards = model.scores([one[0] for one in encoded] + [one[1] for one in encoded])
        chosen, rejected = rewards[: len(test)], rewards[len(test) :]
        found[name] = plain((chosen > rejected) + 0.5 * (chosen == rejected))
    base = run.base_judged(seed)["judge"][: len(run.held_out)]
    drawn = run.base_draws(seed)[: len(run.held_out)]
    best = model.scores(run.drawn(run.held_out, drawn)).reshape(base.shape).argmax(axis=1)
    found["unsafe"] = plain(base[np.arange(len(base)), best] < 0)
    return found


def _training(
    pairs: Sequence[Pair], margins: Json, way: str, seed: int
) -> tuple[Sequence[Pair], Sequence[float] | None]:
    """The pairs of a way, and their margins."""
    heads = margins["heads"]
    if way == "none":
        return pairs, None
    if way in ("dropped", "flipped"):
        wrong = np.array(heads["whitened"]["margins"]) < 0
        if way == "dropped":
            return [pair for pair, no in zip(pairs, wrong, strict=True) if not no], None
        turned = [Pair(p.prompt, p.rejected, p.chosen) if no else p for p, no in zip(pairs, wrong, strict=True)]
        return turned, None
    bins = _bins(np.array(heads["whitened" if way == "whitened" else "legend"]["margins"]))
    if way == "constant":
        bins = np.full_like(bins, bins.mean())
    if way == "shuffled":
        bins = np.random.default_rng(seed).permutation(bins)
    return pairs, bins.tolist()


def _bins(margins_N: Doubles) -> Doubles:
    agreeing = margins_N[margins_N >= 0]
    if not len(agreeing):
        return np.zeros_like(margins_N)
    edges = np.quantile(agreeing, [0.25, 0.5, 0.75])
    return np.where(margins_N < 0, 0.0, np.array(BINS)[np.searchsorted(edges, margins_N)])


def _direct(test: Json, label: str) -> Row:
    return Row(label, {"pair accuracy, PKU": test["pku"], "pair accuracy, hh-rlhf": test["hh"]})


def _row(label: str, cells: Sequence[Json | Missing], base: list[Json], run: Experiment) -> Row:
    there = [cell for cell in cells if isinstance(cell, dict)]
    reason = next((cell.reason for cell in cells if isinstance(cell, Missing)), "")
    if not there:
        return Row(label, {}, reason)
    found: dict[str, Figure | str | float] = {
        "pair accuracy, PKU": _by_prompt(run, there, "pku"),
        "pair accuracy, hh-rlhf": _by_prompt(run, there, "hh"),
        "unsafe, best of several": over_seeds([cell["unsafe"] for cell in there]),
    }
    if base and base is not there and base != there:
        found["against no margin"] = _by_prompt(run, there, "pku", base)
        found["against no margin, unsafe"] = share(_mean(there, "unsafe") - _mean(base, "unsafe"))
    return Row(label, found, reason)


def _by_prompt(run: Experiment, cells: list[Json], test: str, base: list[Json] | None = None) -> Figure:
    """Share of right pairs, or its difference to ``base``; prompts are resampled."""
    values = _mean(cells, test) - (_mean(base, test) if base else 0.0)
    found = share(values, prompt_groups(pair.prompt for pair in run.data.test_pairs[test]))
    if found is not None and len(cells) > 1 and not base:
        found["spread"] = float(np.std([np.mean(cell[test]) for cell in cells], ddof=1))
    return found


def _mean(cells: list[Json], name: str) -> Any:
    return np.mean([np.array(cell[name], dtype=np.float64) for cell in cells], axis=0)
