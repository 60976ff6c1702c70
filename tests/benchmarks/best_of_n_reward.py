"""Is the best of N better? Draws N answers a prompt, picks by one head, and judges the pick by *another* head that took
no part in it.

    python tests/benchmarks/best_of_n_reward.py --prompts PAIRS.jsonl --pick hybrid --judge legend --plot best_of_n.svg

For N = 1, 2, 4 … : the mean reward of the pick by the head that picked; and by the judging head the pick, the first of
N and a random one of N, all in units of that head's standard deviation over all answers. Intervals are 95 %,
bootstrapped over prompts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from inward.engine import Engine
from inward.errors import InwardError
from inward.heads.registry import Registry
from inward.processes.wiring import find_model, heads_folder, open_backbone, open_prompts
from inward.prompts import Texts
from inward.settings import Settings
from inward.types import Group, Job, SamplingSpec, Scored


async def scores(args: argparse.Namespace) -> NDArray[np.float64]:
    """``[2, P, N]``: of the picking and of the judging head, for each prompt and answer."""
    settings = Settings(
        model=args.model, heads=args.heads, backbone=args.backbone, dtype="float32", vllm_options=args.vllm_options
    )
    model = find_model(settings)
    backbone = await asyncio.to_thread(open_backbone, settings, model)
    try:
        prompts = open_prompts(settings, model, backbone.info.max_tokens)
        registry = Registry.open(heads_folder(settings), info=backbone.info, template=prompts.template)
        engine = Engine(backbone, registry)
        rows = [json.loads(line)["prompt"] for line in args.prompts.read_text(encoding="utf-8").splitlines()]
        texts = [Texts(prompt, (), truncate=False) for prompt in dict.fromkeys(rows)][: args.count]
        groups = [g.group for g in await prompts.group_many(texts) if not isinstance(g, InwardError)]
        spec = SamplingSpec(args.n, max_tokens=args.tokens, temperature=args.temperature, top_p=0.95)
        jobs = [  # each with seeds of its own: one for all would give the first answers of all prompts the same noise
            Job(str(i), Group(group.prompt_ids, sampling=replace(spec, seed=i * args.n)), (args.pick, args.judge))
            for i, group in enumerate(groups)
            if len(group.prompt_ids) + args.tokens < backbone.info.max_tokens
        ]
        outcomes = [outcome for [outcome] in await asyncio.gather(*(engine.run([job]) for job in jobs))]
    finally:
        await backbone.close()
    good = [o for o in outcomes if isinstance(o, Scored) and not any(None in s.scores_N for s in o.scores)]
    print(f"{len(good)} of {len(jobs)} prompts, {args.n} answers each")
    return np.array([[o.scores[k].scores_N for o in good] for k in (0, 1)], dtype=np.float64)


def table(scores_2PN: NDArray[np.float64], ns: list[int]) -> dict[str, list[tuple[float, float, float]]]:
    """For each row of the table, for each N, a mean over prompts and its interval."""
    scores_2PN = (scores_2PN - scores_2PN.mean(axis=(1, 2), keepdims=True)) / scores_2PN.std(axis=(1, 2), keepdims=True)
    picking_PN, judging_PN = scores_2PN
    rng = np.random.default_rng(0)
    P = len(picking_PN)
    resampled = rng.integers(0, P, (1000, P))

    def estimate(values_P: NDArray[np.float64]) -> tuple[float, float, float]:
        low, high = np.quantile(values_P[resampled].mean(axis=1), [0.025, 0.975])
        return float(values_P.mean()), float(low), float(high)

    picks = {n: picking_PN[:, :n].argmax(axis=1) for n in ns}
    every = np.arange(P)
    return {
        "pick, by the head that picked": [estimate(picking_PN[every, picks[n]]) for n in ns],
        "pick, by the other head": [estimate(judging_PN[every, picks[n]]) for n in ns],
        "random of N, by the other head": [estimate(judging_PN[every, rng.integers(0, n, P)]) for n in ns],
        "first of N, by the other head": [estimate(judging_PN[:, 0]) for _ in ns],
        "best of N by the other head itself": [estimate(judging_PN[:, :n].max(axis=1)) for n in ns],
    }


def plot(rows: dict[str, list[tuple[float, float, float]]], ns: list[int], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "inward"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for name, estimates in rows.items():
        mean, low, high = np.array(estimates).T
        axes.errorbar(ns, mean, (mean - low, high - mean), marker="o", capsize=2, label=name)
    axes.set(xscale="log", xticks=ns, xticklabels=ns, xlabel="N", ylabel="reward (standard deviations)")
    axes.legend(fontsize="small")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})  # the same numbers are the same file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--heads", type=Path)
    parser.add_argument("--backbone", default="vllm")
    parser.add_argument("--vllm-options", type=json.loads, default={})
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL with a field prompt")
    parser.add_argument("--count", type=int, default=200, help="prompts (default: %(default)s)")
    parser.add_argument("--pick", default="hybrid")
    parser.add_argument("--judge", default="legend")
    parser.add_argument("--n", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    ns = [2**k for k in range(args.n.bit_length())]
    rows = table(asyncio.run(scores(args)), ns)
    print("| reward | " + " | ".join(f"N = {n}" for n in ns) + " |\n|---|" + "---|" * len(ns))
    for name, estimates in rows.items():
        print(
            f"| {name} | " + " | ".join(f"{mean:.2f} ({low:.2f} to {high:.2f})" for mean, low, high in estimates) + " |"
        )
    if args.plot:
        plot(rows, ns, args.plot)


if __name__ == "__main__":
    main()
