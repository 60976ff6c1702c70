"""How many planted flips are found: labels of a known share of pairs turned round, and looked for.

    inward fit hybrid --pairs pku_saferlhf_pairs.jsonl --pool none --save-states pku.safetensors --out /tmp/unused
    python tests/benchmarks/planted_flips.py --states pku.safetensors --pairs pku_saferlhf_pairs.jsonl --out out/pku

For each rate and seed: which pairs were turned round is drawn, and each way gives every pair a margin by a fit that has
not seen its prompt. ``elsewhere`` fits on the clean labels of the other folds' prompts (a head that comes from other
data), ``here`` on the noisy labels of the other folds (there is no other data). Everything that takes time is kept in
``--out`` and found again, so the script may be stopped. It is no part of the tests.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inward.offline.data.pairs import grouped_folds
from inward.offline.fit.like import Like, fit_like
from inward.offline.states.saved import PairStates, load_states
from inward.offline.states.scores import score_states
from inward.offline.states.stored import Subset
from inward_client.rows import collect_pairs

Doubles = NDArray[np.float64]
Bools = NDArray[np.bool_]
HEADS: tuple[Like, ...] = ("hybrid", "whitened")
FOLDS = 3
RESAMPLES = 500
TFIDF_C = 3.0


def main() -> None:
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    states = load_states(args.states)
    assert isinstance(states, PairStates)
    states = some_layers(states, args.every)
    pairs = collect_pairs(args.pairs).values[: len(states)]
    rows: list[dict[str, Any]] = []
    for rate, seed in itertools.product(args.rates, args.seeds):
        flipped_N = planted(len(states), rate, seed)
        for way, margin_N in ways(args.out, states, pairs, flipped_N, f"{rate}-{seed}", heads=not args.text_only):
            rows.append({"rate": rate, "seed": seed, "way": way, **judge(margin_N, flipped_N, states, seed)})
            print(json.dumps(rows[-1]), flush=True)
    (args.out / "results.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


def some_layers(states: PairStates, every: int) -> PairStates:
    """Every so many layers."""
    axes = range(every - 1, len(states.layers), every)
    return replace(
        states,
        chosen_NLD=np.ascontiguousarray(states.chosen_NLD[:, axes]),
        rejected_NLD=np.ascontiguousarray(states.rejected_NLD[:, axes]),
        layers=tuple(states.layers[axis] for axis in axes),
    )


def planted(n: int, rate: float, seed: int) -> Bools:
    """Which pairs are turned round: exactly that share of them."""
    flipped_N = np.zeros(n, dtype=bool)
    flipped_N[np.random.default_rng(seed).permutation(n)[: round(rate * n)]] = True
    return flipped_N


def ways(
    out: Path, states: PairStates, pairs: Sequence[Any], flipped_N: Bools, noise: str, *, heads: bool
) -> Iterator[tuple[str, Doubles]]:
    """Each way's margins ``[N]`` in favour of the label as it is given."""
    sign_N = np.where(flipped_N, -1.0, 1.0)
    if heads:
        for where in ("elsewhere", "here"):
            noisy = states if where == "elsewhere" else turned(states, flipped_N)
            clean_sign_N = sign_N if where == "elsewhere" else 1.0
            both = []
            for like in HEADS:
                kept = out / f"{like}-{'clean' if where == 'elsewhere' else noise}"
                margin_N = clean_sign_N * cached(kept, lambda noisy=noisy, like=like: of_head(noisy, like))
                both.append(margin_N / margin_N.std())
                yield f"{like}, fitted {where}", margin_N
            yield f"hybrid + whitened, fitted {where}", np.mean(both, axis=0)
    kept = out / f"tfidf-{noise}"
    yield "TF-IDF, fitted here", cached(kept, lambda: of_words(pairs, states.groups_N, flipped_N))
    assert states.length_difference_N is not None
    longer_N = sign_N * states.length_difference_N
    # which direction is better is learnt from the noisy labels themselves
    yield "length", longer_N if longer_N.sum() >= 0 else -longer_N


def cached(path: Path, work: Callable[[], Doubles]) -> Doubles:
    """What was worked out before, or is now."""
    path = path.with_name(path.name + ".npy")
    if not path.is_file():
        values_N = work()
        fresh = path.with_suffix(".new.npy")
        np.save(fresh, values_N)
        fresh.replace(path)
    return np.asarray(np.load(path), dtype=np.float64)


def turned(states: PairStates, flipped_N: Bools) -> PairStates:
    """The same pairs with some labels the other way round."""
    where = flipped_N[:, None, None]
    difference_N = states.length_difference_N
    return replace(
        states,
        chosen_NLD=np.where(where, states.rejected_NLD, states.chosen_NLD),
        rejected_NLD=np.where(where, states.chosen_NLD, states.rejected_NLD),
        length_difference_N=None if difference_N is None else np.where(flipped_N, -difference_N, difference_N),
    )


def of_head(states: PairStates, like: Like) -> Doubles:
    """Margins by heads whose fits have not seen the pair's prompt."""
    margin_N = np.empty(len(states))
    for train, held_out in grouped_folds(states.groups_N, FOLDS, 0):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            head = fit_like(like, None, Subset(states, train))
        score_2N = score_states(Subset(states, held_out), [head])[0]
        n = len(held_out)
        # folds are brought to one scale; zero stays where it is
        difference_N = score_2N[:n] - score_2N[n:]
        margin_N[held_out] = difference_N / difference_N.std()
    return margin_N


def of_words(pairs: Sequence[Any], groups_N: NDArray[np.int64], flipped_N: Bools) -> Doubles:
    """Margins by a logistic regression on differences of TF-IDF features."""
    from scipy.sparse import vstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    better = [p.rejected if f else p.chosen for p, f in zip(pairs, flipped_N, strict=True)]
    worse = [p.chosen if f else p.rejected for p, f in zip(pairs, flipped_N, strict=True)]
    margin_N = np.empty(len(pairs))
    for train, held_out in grouped_folds(groups_N, FOLDS, 0):
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=50_000)
        words.fit([text for i in train for text in (better[i], worse[i])])
        rows = words.transform(better) - words.transform(worse)
        # each pair both ways round: no class is larger, and no intercept is needed
        model = LogisticRegression(C=TFIDF_C, max_iter=500, fit_intercept=False)
        model.fit(vstack([rows[train], -rows[train]]), np.repeat([1, 0], len(train)))
        margin_N[held_out] = model.decision_function(rows[held_out])
    return margin_N


def judge(margin_N: Doubles, flipped_N: Bools, states: PairStates, seed: int) -> dict[str, Any]:
    """What the flags and the order of one way are worth, and the rates that are estimated from it."""
    from sklearn.metrics import average_precision_score

    from inward.offline.annotate.noise import noise

    order = np.argsort(margin_N, kind="stable")
    flagged_N = margin_N < 0
    found = noise(margin_N, states.groups_N)
    return {
        "p10": float(flipped_N[order[:10]].mean()),
        "p50": float(flipped_N[order[:50]].mean()),
        "flagged": int(flagged_N.sum()),
        "p_flagged": float(flipped_N[flagged_N].mean()) if flagged_N.any() else None,
        "recall": float(flagged_N[flipped_N].mean()),
        "ap": float(average_precision_score(flipped_N, -margin_N)),
        "ap_interval": interval(margin_N, flipped_N, states.groups_N, seed),
        "rate_true": float(flipped_N.mean()),
        "rate_estimated": [found.wrong.value, found.wrong.low, found.wrong.high] if found else None,
        "confident_rate": found.flagged.value if found else None,
        **of_cleanlab(margin_N, flipped_N, states.groups_N),
    }


def of_cleanlab(margin_N: Doubles, flipped_N: Bools, groups_N: NDArray[np.int64]) -> dict[str, Any]:
    """What cleanlab makes of the same out-of-fold probabilities: its flags, and its number of wrong labels."""
    try:
        from cleanlab.count import num_label_issues
        from cleanlab.filter import find_label_issues
    except ImportError:
        return {}
    from inward.offline.annotate.noise import out_of_fold

    p_N = out_of_fold(margin_N, groups_N)
    # two classes, "the first is better" and "the second is", half of the pairs shown the other way round
    second_N = np.array([hashlib.sha256(str(i).encode()).digest()[0] % 2 for i in range(len(p_N))])
    probability_NK = np.empty((len(p_N), 2))
    probability_NK[np.arange(len(p_N)), second_N] = p_N
    probability_NK[np.arange(len(p_N)), 1 - second_N] = 1 - p_N
    issues_N = find_label_issues(second_N, probability_NK, n_jobs=1)
    return {
        "cleanlab_flagged": int(issues_N.sum()),
        "cleanlab_precision": float(flipped_N[issues_N].mean()) if issues_N.any() else None,
        "cleanlab_recall": float(issues_N[flipped_N].mean()),
        "cleanlab_rate": num_label_issues(second_N, probability_NK) / len(p_N),
    }


def interval(margin_N: Doubles, flipped_N: Bools, groups_N: NDArray[np.int64], seed: int) -> list[float]:
    """Of the average precision, 95 %, over prompts."""
    from sklearn.metrics import average_precision_score

    rng, (labels, member_N) = np.random.default_rng(seed), np.unique(groups_N, return_inverse=True)
    members = [np.flatnonzero(member_N == g) for g in range(len(labels))]
    values = []
    for _ in range(RESAMPLES):
        rows = np.concatenate([members[g] for g in rng.integers(len(labels), size=len(labels))])
        if flipped_N[rows].any():
            values.append(average_precision_score(flipped_N[rows], -margin_N[rows]))
    return [float(edge) for edge in np.quantile(values, [0.025, 0.975])]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Means over seeds, as Markdown."""
    lines = [
        "| flipped | way | of the first 10 | of the first 50 | flagged | of all flagged | found | average precision | "
        "estimated rate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for rate, way in dict.fromkeys((row["rate"], row["way"]) for row in rows):
        some = [row for row in rows if (row["rate"], row["way"]) == (rate, way)]
        mean = {
            name: np.mean([row[name] for row in some])
            for name in ("p10", "p50", "flagged", "p_flagged", "recall", "ap")
        }
        low, high = (np.mean([row["ap_interval"][edge] for row in some]) for edge in (0, 1))
        rates = [row["rate_estimated"] for row in some if row["rate_estimated"]]
        told = "not said" if len(rates) < len(some) else "{:.2f} [{:.2f}, {:.2f}]".format(*np.mean(rates, axis=0))
        lines.append(
            f"| {rate:.0%} | {way} | {mean['p10']:.2f} | {mean['p50']:.2f} | {mean['flagged']:.0f} | "
            f"{mean['p_flagged']:.2f} | {mean['recall']:.2f} | {mean['ap']:.3f} [{low:.3f}, {high:.3f}] | {told} |"
        )
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, required=True, help="the texts of the same pairs, in the same order")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--every", type=int, default=1, help="fit on every so many layers (default: all)")
    parser.add_argument("--text-only", action="store_true", help="no heads: words and length")
    return parser.parse_args()


if __name__ == "__main__":
    main()
