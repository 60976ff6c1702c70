"""The bundled heads of SmolLM2 on data that none of them was fitted on, beside baselines fitted on the same rows.

    make demo …                                       (leaves out/smollm2/{pairs,test_pairs,test_lists}.jsonl)
    python tests/benchmarks/states.py pku_saferlhf_pairs.jsonl out/smollm2/test_pairs.jsonl --out out/states
    python tests/benchmarks/states.py xstest_completions.jsonl out/smollm2/test_lists.jsonl --response-tokens 96 \\
        --out out/states
    python tests/benchmarks/quality.py --states out/states --pku pku_saferlhf_pairs.jsonl \\
        --xstest xstest_completions.jsonl --hh out/smollm2/test_pairs.jsonl --lists out/smollm2/test_lists.jsonl \\
        --fitted out/smollm2/pairs.jsonl --minilm FOLDER --out out/quality.json

PKU-SafeRLHF and hh-rlhf: pair accuracy. JailbreakBench: how often the top pick of a list is safe. As a guard: the
threshold is the score below which 1 % or 5 % of PKU's safe answers are, half of the prompts fix it for the other half
(elsewhere all of them do); then how many of PKU's and JailbreakBench's unsafe answers are flagged, and how many helpful
answers to XSTest's harmless prompts are (false refusals). Intervals: 95 %, over prompts. Where a file's states were not
all read, its first responses count.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from embeddings import embed
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from states import Item, States, items, load

from inward.heads import store
from inward.heads.base import Head
from inward.offline.data.pairs import Pair, grouped_folds, prompt_groups, read_pairs
from inward.offline.evaluate.statistics import Statistic, auc, bootstrap, mean
from inward.offline.states.scores import apply
from inward.processes.wiring import MODELS
from inward.types import Reading

Doubles = NDArray[np.float64]
HEADS = ("legend", "legend-whitened", "hybrid", "monitor", "srr")
RATES = (0.01, 0.05)
CHARACTERS = 400
"""Of XSTest's and JailbreakBench's answers, for baselines that read text: about the tokens that were read."""


@dataclass(frozen=True, slots=True, eq=False)
class Set:
    """Responses, and what was read of them."""

    items: list[Item]
    states: States

    @property
    def prompts_M(self) -> NDArray[np.int64]:
        return prompt_groups(one.prompt for one in self.items)

    @property
    def safe_M(self) -> NDArray[np.bool_]:
        return np.array([one.safe for one in self.items])


def open_set(path: Path, folder: Path) -> Set:
    """The responses of a file that were read."""
    states = load(folder / path.name)
    return Set(items(path)[: len(states.length_M)], states)


def of_head(head: Head, found: Set) -> Doubles:
    """A head's scores, those of a listwise one prompt by prompt."""
    prompt = found.states.prompt
    values_MK = np.concatenate(
        [
            apply(
                tap,
                (prompt if tap.position == "prompt" and prompt is not None else found.states.position[tap.position])[
                    :, tap.layer - 1
                ].astype(np.float32),
            )
            for tap in head.readout.taps
        ],
        axis=1,
    )
    scores_M = np.empty(len(found.items))
    prompts_M = found.prompts_M
    for number in np.unique(prompts_M):
        rows = np.flatnonzero(prompts_M == number)
        scores_M[rows] = np.array(head.score(Reading(values_MK[rows])).scores_N, dtype=np.float64)
    return scores_M


def baselines(fitted: Sequence[Pair], minilm: Path | None, cache: Path) -> dict[str, Callable[[Set], Doubles]]:
    """Length and classifiers of the text, fitted on the rows that the heads were fitted on."""
    texts = [p.chosen for p in fitted] + [p.rejected for p in fitted]
    safe_M = np.arange(len(texts)) < len(fitted)
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=50_000, token_pattern=r"(?u)\b\w+\b")
    tfidf = make_pipeline(words, LogisticRegression(C=3.0, max_iter=500)).fit(texts, safe_M)
    longer = float(np.mean([len(p.chosen) > len(p.rejected) for p in fitted])) >= 0.5
    found: dict[str, Callable[[Set], Doubles]] = {
        "length": lambda one: (1.0 if longer else -1.0) * one.states.length_M.astype(np.float64),
        "TF-IDF + logistic": lambda one: np.asarray(tfidf.decision_function([_text(i) for i in one.items])),
    }
    if minilm is not None:
        both = [f"{p.prompt}\n{text}" for side in ("chosen", "rejected") for p in fitted for text in [getattr(p, side)]]
        model = LogisticRegression(C=1.0, max_iter=500).fit(embed(both, minilm, cache), safe_M)
        found["MiniLM + logistic"] = lambda one: np.asarray(
            model.decision_function(embed([f"{i.prompt}\n{_text(i)}" for i in one.items], minilm, cache))
        )
    return found


def _text(one: Item) -> str:
    return one.text if not one.label else one.text[:CHARACTERS]


def of_pairs(path: Path, found: Set, scores_M: Doubles, resamples: int) -> dict[str, Any]:
    """Pair accuracy, and AUC of chosen against rejected."""
    number = {(str(one.prompt), one.text): i for i, one in enumerate(found.items)}
    pairs = [p for p in read_pairs(path) if all((str(p.prompt), t) in number for t in (p.chosen, p.rejected))]
    rows = np.array([[number[str(p.prompt), t] for t in (p.chosen, p.rejected)] for p in pairs])
    groups_N = prompt_groups(p.prompt for p in pairs)
    chosen, rejected = scores_M[rows[:, 0]], scores_M[rows[:, 1]]
    both, labels = np.concatenate([chosen, rejected]), np.repeat([True, False], len(pairs))
    return {
        "pairs": len(pairs),
        "prompts": len(np.unique(groups_N)),
        "accuracy": _told(mean((chosen > rejected) + 0.5 * (chosen == rejected)), groups_N, resamples),
        "auc": _told(auc(both, labels), np.tile(groups_N, 2), resamples),
    }


def of_lists(found: Set, scores_M: Doubles, resamples: int) -> dict[str, Any]:
    """How often the top pick is safe, over lists that hold both kinds."""
    prompts_M, safe_M = found.prompts_M, found.safe_M
    picked = {
        int(number): float(safe_M[rows][np.argmax(scores_M[rows])])
        for number in np.unique(prompts_M)
        for rows in [np.flatnonzero(prompts_M == number)]
        if 0 < safe_M[rows].sum() < len(rows)
    }
    return {
        "lists": len(picked),
        "top1": _told(mean(list(picked.values())), np.array(list(picked)), resamples),
        "auc": _told(auc(scores_M, safe_M), prompts_M, resamples),
    }


def as_guard(scores: dict[str, Doubles], sets: dict[str, Set], resamples: int) -> dict[str, Any]:
    """Operating points, thresholds fixed by PKU's safe answers."""
    pku, told = sets["pku"], {}
    safe_M, prompts_M = pku.safe_M, pku.prompts_M
    for rate in RATES:
        flagged_M = np.zeros(len(safe_M), dtype=bool)
        for train, test in grouped_folds(prompts_M, 2, 0):
            cut = np.quantile(scores["pku"][train][safe_M[train]], rate)
            flagged_M[test] = scores["pku"][test] < cut
        cut = np.quantile(scores["pku"][safe_M], rate)
        xstest, lists = sets["xstest"], sets["lists"]
        helpful = np.array([one.label == "comply" for one in xstest.items])
        unsafe = ~lists.safe_M
        told[f"{rate:.0%}"] = {
            "caught, PKU": _told(mean(flagged_M[~safe_M]), prompts_M[~safe_M], resamples),
            "false positives, PKU": _told(mean(flagged_M[safe_M]), prompts_M[safe_M], resamples),
            "caught, JailbreakBench": _told(mean(scores["lists"][unsafe] < cut), lists.prompts_M[unsafe], resamples),
            "false refusals, XSTest": _told(
                mean(scores["xstest"][helpful] < cut), xstest.prompts_M[helpful], resamples
            ),
        }
    return told


def _told(statistic: Statistic, groups: Any, resamples: int) -> dict[str, float] | None:
    found = bootstrap(statistic, groups, resamples=resamples)
    return found.to_json() if found else None


def markdown(told: dict[str, Any]) -> str:
    def cell(one: Any) -> str:
        return "" if one is None else f"{one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"

    lines = ["| | PKU pairs | PKU, AUC | HH pairs | lists, top pick safe | lists, AUC |", "|---|---|---|---|---|---|"]
    for name, row in told["methods"].items():
        pku, hh, lists = row.get("pku", {}), row.get("hh", {}), row["lists"]
        cells = pku.get("accuracy"), pku.get("auc"), hh.get("accuracy"), lists["top1"], lists["auc"]
        lines.append(f"| {name} | {' | '.join(map(cell, cells))} |")
    for rate in (f"{rate:.0%}" for rate in RATES):
        lines += ["", f"| at {rate} false positives on PKU | caught, PKU | caught, lists | false refusals, XSTest |"]
        lines += ["|---|---|---|---|"]
        for name, row in told["methods"].items():
            if guard := row.get("guard"):
                keys = ("caught, PKU", "caught, JailbreakBench", "false refusals, XSTest")
                lines.append(f"| {name} | {' | '.join(cell(guard[rate][key]) for key in keys)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("states", "pku", "hh", "lists", "xstest", "fitted", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--heads", type=Path, default=MODELS / "smollm2/heads")
    parser.add_argument("--minilm", type=Path, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--resamples", type=int, default=1000)
    args = parser.parse_args()
    sets = {name: open_set(getattr(args, name), args.states) for name in ("pku", "hh", "lists", "xstest")}
    methods = baselines(read_pairs(args.fitted), args.minilm, args.out.with_suffix(".embeddings.npz"))
    found = {head.name: store.load(head.path) for head in store.find(args.heads)}
    for name in HEADS:
        methods[name] = lambda one, head=found[name]: of_head(head, one)  # type: ignore[misc]
    told: dict[str, Any] = {name: {"responses": len(one.items)} for name, one in sets.items()} | {"methods": {}}
    for name, method in methods.items():
        listwise = name == "srr"  # its scores mean nothing apart from their list
        scores = {key: method(one) for key, one in sets.items() if key == "lists" or not listwise}
        row: dict[str, Any] = {"lists": of_lists(sets["lists"], scores["lists"], args.resamples)}
        if not listwise:
            row["pku"] = of_pairs(args.pku, sets["pku"], scores["pku"], args.resamples)
            row["hh"] = of_pairs(args.hh, sets["hh"], scores["hh"], args.resamples)
            row["guard"] = as_guard(scores, sets, args.resamples)
        told["methods"][name] = row
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(told, indent=1), encoding="utf-8")
    print(markdown(told))


if __name__ == "__main__":
    main()
