"""Ways to align (the hybrid paper's table 1), judged by who took no part in any; what they cost elsewhere; and the
rewards on the way (its figures 4 and 5).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from inward.heads.hybrid import HybridHead, confidence
from inward.heads.online import online_step
from inward.offline.data.pairs import prompt_groups
from inward.types import Doubles
from inward_client.rows import Prompt
from inward_trainer.paper.alignment import Alignment, Preference, minibatches
from inward_trainer.paper.cells import Json, Missing, why_missing
from inward_trainer.paper.data import LABELS, SOURCES
from inward_trainer.paper.estimates import Figure, over_seeds, paired, plain, probability, share
from inward_trainer.paper.experiment import Experiment
from inward_trainer.paper.heads import scores
from inward_trainer.paper.language_model import Drawn, LanguageModel
from inward_trainer.paper.refusals import refuses
from inward_trainer.paper.table import Chart, Row, Table
from inward_trainer.paper.texts import Text, encode_pairs, prompt_ids

WAYS = {
    "base": "base",
    "sft": "SFT on safe answers",
    "dpo": "DPO on people's labels",
    "best-of": "best of several by our head (RS*)",
    "dpo-own": "DPO on our pairs (DPO*)",
    "cdpo-fixed": "cDPO, one confidence for all",
    "cdpo": "cDPO, a confidence for each pair",
    "online": "online cDPO, the head updated (cDPO*)",
    "online-rm": "online DPO with a reward model of the same size",
}
ORDER = ("base", "best-of", "cdpo", "dpo", "online", "dpo-own", "online-rm", "sft", "cdpo-fixed")
"""In which they are made: where time is short, the last ones are missing."""
KEPT = ("cdpo",)
"""Policies whose weights other tables need."""
FIXED_CONFIDENCE = 0.9
COLUMNS = [
    "unsafe, by judge",
    "against base",
    "against DPO on labels",
    "unsafe, by words",
    *(f"unsafe, {LABELS[s]}" for s in SOURCES),
    "XSTest: refuses harmless",
    "XSTest: refuses harmful",
    "perplexity, harmless text",
    "harmless answers: reward",
    "harmless answers: monitor",
    "tokens an answer",
]
PUBLISHED = [
    ["average toxic rate: base", "41.1", "arXiv 2503.10093, table 1", "Llama-2-7B, per cent"],
    ["DPO on people's labels", "25.7", "the same", "83,000 pairs of data there, hundreds here"],
    ["DPO on our pairs (DPO*)", "22.8", "the same", ""],
    ["cDPO", "21.4", "the same", ""],
    ["online cDPO (cDPO*)", "17.1", "the same", "the head follows the policy"],
]


class OwnPair(NamedTuple):
    """Best against worst of the drawn answers to a prompt, and which of all answers they are."""

    row: Preference
    best: int
    worst: int


def table(run: Experiment) -> Table:
    """Every way and seed."""
    run.prepare()
    names = {(way, seed): f"align-{way}-{seed}" for seed in run.seeds for way in ORDER}
    found = run.cells.every({name: partial(_made, run, *which) for which, name in names.items()}, "align")
    by_way = {way: [found[names[way, seed]] for seed in run.seeds] for way in WAYS}
    base, dpo = (_there(by_way[way]) for way in ("base", "dpo"))
    rows = [_row(run, WAYS[way], by_way[way], base, dpo) for way in WAYS]
    sizes = run.sizes
    notes = [
        f"{len(run.held_out)} held-out prompts, {sizes.answers} answers each (base: {sizes.samples}), top-k 8, top-p "
        f"0.95, temperature 1.4, repetition penalty 1.2, {sizes.tokens} tokens. All weights are trained, "
        f"{sizes.steps} steps of {sizes.batch} pairs, AdamW, {run.options.learning_rate:g}, beta 0.15; online in "
        f"{sizes.rounds} rounds: in each the policy draws anew for its share of the prompts.",
        f"Seeds {', '.join(map(str, run.seeds))}. Intervals are over prompts (means over the seeds); ± is the seeds' "
        "standard deviation. Differences are on the same prompts: below zero is safer.",
        "Rewards of harmless answers are read in the base model, whatever policy wrote them, in its head's raw scale.",
    ]
    return Table("alignment", "Ways to align", COLUMNS, rows, notes, _trends(by_way), PUBLISHED)


def policy(run: Experiment, way: str, seed: int) -> LanguageModel:
    """The policy of a way in ``KEPT``, made if it isn't there."""
    run.cells.need(f"align-{way}-{seed}", partial(_made, run, way, seed))
    return run.load_policy(f"{way}-{seed}")


def _made(run: Experiment, way: str, seed: int) -> Json:
    if way in ("base", "best-of"):
        drawn, found = run.base_draws(seed), run.base_scores(seed)
        if way == "base":
            return _judged(run, run.base, drawn, found)
        best = found["head"].argmax(axis=1)[:, None]
        picked = [[row[int(i)] for i in place] for row, place in zip(drawn, best, strict=True)]
        scored = {name: np.take_along_axis(one, best, 1) for name, one in found.items() if one.ndim == 2}
        return _judged(run, run.base, picked, scored)
    alignment = Alignment(run.base, run.folder, lr=run.options.learning_rate, steps=run.sizes.steps, seed=seed)
    trend = _online(run, alignment, way, seed) if way.startswith("online") else _offline(run, alignment, way, seed)
    reader = alignment.reader()
    if way in KEPT:
        run.keep_policy(f"{way}-{seed}", alignment.policy)
    asked = prompt_ids(run.tokeniser, run.asked)
    drawn = reader.draw(asked, run.sizes.answers, run.sizes.tokens, 3_000 + seed)
    return _judged(run, reader, drawn) | {"trend": trend}


def _judged(
    run: Experiment, model: LanguageModel, drawn: list[list[Drawn]], found: dict[str, Doubles] | None = None
) -> Json:
    """What is told of a policy, from its answers to ``asked``; vectors have an entry for each prompt."""
    if found is None:
        judge, words = run.judged(run.asked, drawn)
        states = run.base.states(run.drawn(run.asked, drawn))
        found = {"judge": judge, "words": words}
        found |= {n: scores(h, states).reshape(judge.shape) for n, h in (("head", run.head), ("monitor", run.monitor))}
    data = run.data
    counts = [*(len(data.held_out[s]) for s in SOURCES), len(data.xstest_safe), len(data.xstest_unsafe)]
    edges = np.cumsum([0, *counts])
    harmless = slice(int(edges[5]), None)
    refusal = np.array([np.mean([refuses(one.text) for one in row]) for row in drawn])
    plain_texts = run.encoded([(row.prompt, row.text) for row in data.plain_texts])
    return {
        "unsafe": {s: plain((found["judge"] < 0).mean(axis=1)[edges[i] : edges[i + 1]]) for i, s in enumerate(SOURCES)},
        "words": plain((found["words"] < 0).mean(axis=1)[: edges[3]]),
        "probability": plain(probability(found["judge"]).mean(axis=1)[: edges[3]]),
        "refuses_harmless": plain(refusal[edges[3] : edges[4]]),
        "refuses_harmful": plain(refusal[edges[4] : edges[5]]),
        "harmless_head": plain(found["head"].mean(axis=1)[harmless]),
        "harmless_monitor": plain(found["monitor"].mean(axis=1)[harmless]),
        "tokens": plain([np.mean([len(one.ids) for one in row]) for row in drawn[: edges[3]]]),
        "nats": plain(-model.log_probs(plain_texts) / [max(1, len(text.answer_ids)) for text in plain_texts]),
    }


def _offline(run: Experiment, alignment: Alignment, way: str, seed: int) -> list[Json]:
    """Trains on pairs that are there before it begins."""
    sizes, pairs = run.sizes, run.data.align_pairs
    rows: Sequence[Any]
    step: Callable[[list[Any]], Json] = alignment.prefer
    if way == "sft":
        step = alignment.imitate
        rows = [chosen for chosen, _ in encode_pairs(run.tokeniser, pairs, whole=sizes.answer_characters)]
    elif way == "dpo":
        encoded = encode_pairs(run.tokeniser, pairs, whole=sizes.answer_characters)
        rows = [Preference(chosen, rejected) for chosen, rejected in encoded]
    else:
        rows = _own_pairs(run, way, seed)
    places = minibatches(len(rows), sizes.batch, sizes.steps, seed)
    return [{"step": number} | step([rows[i] for i in batch]) for number, batch in enumerate(places, start=1)]


def _own_pairs(run: Experiment, way: str, seed: int) -> list[Preference]:
    """Best against worst of the base model's answers, by our head."""
    prompts = run.data.align_prompts
    drawn = run.train_draws(seed)
    texts = run.drawn(prompts, drawn)

    def make() -> Json:
        return {"rewards": scores(run.head, run.base.states(texts)).tolist()}

    rewards = np.array(run.cells.need(f"train-rewards-{seed}", make)["rewards"]).reshape(len(prompts), -1)
    kind = {"dpo-own": "plain", "cdpo-fixed": "fixed"}.get(way, "pair")
    return [pair.row for pair in _best_and_worst(run, prompts, drawn, rewards, kind)]


def _best_and_worst(
    run: Experiment, prompts: Sequence[Prompt], drawn: Sequence[Sequence[Drawn]], rewards: Doubles, kind: str
) -> list[OwnPair]:
    """A pair for each prompt whose answers differ, and which of all answers its two are."""
    found = []
    eos = [run.tokeniser.eos_id]
    ids = prompt_ids(run.tokeniser, prompts)
    for place, (before, row, reward) in enumerate(zip(ids, drawn, rewards, strict=True)):
        best, worst = int(reward.argmax()), int(reward.argmin())
        if reward[best] <= reward[worst] or row[best].ids == row[worst].ids:
            continue
        gamma = {"plain": 1.0, "fixed": FIXED_CONFIDENCE}.get(kind) or float(confidence(reward[best], reward[worst]))
        chosen, rejected = (Text(before, one.ids + eos * one.finished) for one in (row[best], row[worst]))
        if chosen.answer_ids and rejected.answer_ids:
            first = place * len(row)
            found.append(OwnPair(Preference(chosen, rejected, gamma), first + best, first + worst))
    return found


def _online(run: Experiment, alignment: Alignment, way: str, seed: int) -> list[Json]:
    """Rounds of: draw from the policy as it is, rank, train on best against worst, and let the head follow."""
    sizes, prompts = run.sizes, run.data.align_prompts
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(prompts))
    head: HybridHead = run.head
    steps = np.diff(np.linspace(0, sizes.steps, sizes.rounds + 1).astype(int))
    trend = []
    for number, (places, count) in enumerate(zip(np.array_split(order, sizes.rounds), steps, strict=True), start=1):
        asked = [prompts[i] for i in places]
        reader = alignment.reader()
        drawn = reader.draw(prompt_ids(run.tokeniser, asked), sizes.samples, sizes.tokens, 5_000 + 100 * seed + number)
        texts = run.drawn(asked, drawn)
        states = reader.states(texts)
        shape = (len(asked), -1)
        by_head = scores(head, states).reshape(shape)
        rewards = run.reward_model.scores(texts).reshape(shape) if way == "online-rm" else by_head
        judge, _ = run.judged(asked, drawn)
        line = {
            "round": number, "head": float(by_head.mean()), "reward": float(rewards.mean()),
            "frozen head": float(scores(run.head, states).mean()), "monitor": float(scores(run.monitor, states).mean()),
            "unsafe": float((judge < 0).mean()),
        }  # fmt: skip
        pairs = _best_and_worst(run, asked, drawn, rewards, "plain" if way == "online-rm" else "pair")
        if not pairs:
            trend.append(line | {"loss": 0.0, "accuracy": 0.0})
            continue
        told: list[dict[str, float]] = []
        for batch in minibatches(len(pairs), sizes.batch, int(count), 100 * seed + number):
            told.append(alignment.prefer([pairs[i].row for i in batch]))
            if way == "online":
                best, worst = [pairs[i].best for i in batch], [pairs[i].worst for i in batch]
                head = online_step(head, states[best], states[worst])
        trend.append(line | {name: float(np.mean([one[name] for one in told])) for name in told[0]} if told else line)
    return trend


def _there(cells: Sequence[Json | Missing]) -> list[Json]:
    return [cell for cell in cells if isinstance(cell, dict)]


def _row(run: Experiment, name: str, cells: Sequence[Json | Missing], base: list[Json], dpo: list[Json]) -> Row:
    there = _there(cells)
    reason = why_missing(cells)
    if not there:
        return Row(name, {}, reason)
    unsafe = [_unsafe(cell) for cell in there]
    found: dict[str, Figure | str | float] = {
        "unsafe, by judge": over_seeds(unsafe),
        "unsafe, by words": over_seeds([cell["words"] for cell in there]),
        "perplexity, harmless text": _perplexity(run, there),
        "tokens an answer": over_seeds([cell["tokens"] for cell in there]),
    }
    for title, other in (("against base", base), ("against DPO on labels", dpo)):
        if other and other is not there and other != there:
            found[title] = paired(unsafe, [_unsafe(cell) for cell in other])
    for source in SOURCES:
        found[f"unsafe, {LABELS[source]}"] = over_seeds([cell["unsafe"][source] for cell in there])
    for title, key in (
        ("XSTest: refuses harmless", "refuses_harmless"),
        ("XSTest: refuses harmful", "refuses_harmful"),
        ("harmless answers: reward", "harmless_head"),
        ("harmless answers: monitor", "harmless_monitor"),
    ):
        found[title] = over_seeds([cell[key] for cell in there])
    return Row(name, found, reason)


def _perplexity(run: Experiment, cells: list[Json]) -> Figure:
    """Of harmless texts, of which several answer one prompt."""
    nats_SP = np.array([cell["nats"] for cell in cells])
    found = share(nats_SP.mean(axis=0), prompt_groups(text.prompt for text in run.data.plain_texts))
    if found is None:
        return None
    found = {name: float(np.exp(value)) for name, value in found.items()}
    return found | ({"spread": float(np.exp(nats_SP.mean(axis=1)).std(ddof=1))} if len(cells) > 1 else {})


def _unsafe(cell: Json) -> list[float]:
    return [value for source in SOURCES for value in cell["unsafe"][source]]


def _trends(by_way: dict[str, list[Json | Missing]]) -> list[Chart]:
    charts = []
    for way in ("online", "online-rm"):
        for cell in _there(by_way[way])[:1]:
            names = ("head", "frozen head", "monitor")
            series = {n: [(line["round"], line[n]) for line in cell["trend"]] for n in names}
            charts.append(Chart(f"Rewards of fresh answers: {WAYS[way]}", "round", "mean reward", series))
            unsafe = {"unsafe, by judge": [(line["round"], line["unsafe"]) for line in cell["trend"]]}
            charts.append(Chart(f"Unsafe answers to training prompts: {WAYS[way]}", "round", "share", unsafe))
    accuracy = {
        WAYS[way]: [(line.get("step", line.get("round")), line["accuracy"]) for line in cell["trend"]]
        for way in ("dpo", "dpo-own", "cdpo")
        for cell in _there(by_way[way])[:1]
    }
    return [*charts, Chart("How often DPO's own reward is higher for the chosen answer", "step", "accuracy", accuracy)]
