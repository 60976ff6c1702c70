"""Does the backbone read what a plain forward pass reads? On real pairs, text by text: `make parity`.

    python tests/benchmarks/parity.py hh_harmless_pairs.jsonl pku_saferlhf_pairs.jsonl --n 200 [--backbone vllm]
        [--dtype bfloat16]

Beside: transformers' own model in float32, one text at a time. Compared: the state of every block, at the last token,
at the end-of-sequence token and as the mean over the response, and the margins of the bundled heads. The error of a
state is the norm of the difference over the norm; printed as JSON. In float32 an error above 1e-4 is exit status 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from inward.backbones.base import Backbone
from inward.backbones.loading import SMOLLM2, resolve
from inward.backbones.tokenizer import load_tokenizer
from inward.backbones.transformers.backbone import TransformersBackbone
from inward.batching import within
from inward.heads import store
from inward.offline.data.pairs import read_pairs
from inward.processes.wiring import MODELS
from inward.prompts import Prompts
from inward.types import Group, Position, Reading, Readout, Tap

LIMIT = 1e-4
POSITIONS: tuple[Position, ...] = ("last", "eos", "mean")
VLLM = {"kv_cache_memory_bytes": 256 * 2**20, "gpu_memory_utilization": 0.2, "max_num_seqs": 16, "max_model_len": 2048}


def open_backbone(name: str, folder: Path, dtype: str) -> Backbone:
    if name == "vllm":
        from inward.backbones.vllm.backbone import VllmBackbone

        return VllmBackbone(folder, name=SMOLLM2, dtype=dtype, options=VLLM)
    return TransformersBackbone(folder, name=SMOLLM2, dtype=dtype)


async def ours(args: argparse.Namespace, folder: Path, groups: list[Group]) -> list[NDArray[np.float32]]:
    """``[2, P, L, D]`` of each pair."""
    backbone = open_backbone(args.backbone, folder, args.dtype)
    layers = backbone.info.layers
    taps = [Tap(k, p, final_norm=k == layers) for p in POSITIONS for k in range(1, layers + 1)]
    found: list[NDArray[np.float32]] = []
    try:
        for batch in within(groups, backbone.capacity.tokens, lambda group: group.tokens):
            for reading in await backbone.read(batch, [Readout(tuple(taps))]):
                found.append(reading.readings[0].values_NK.reshape(2, len(POSITIONS), layers, -1))
    finally:
        await backbone.close()
    return found


@torch.inference_mode()
def plain(model: Any, group: Group, end: int) -> NDArray[np.float32]:
    """The same by a plain forward pass of each text."""
    rows = []
    for response in group.responses_ids:
        ids = torch.tensor([[*group.prompt_ids, *response, end]])
        states_LTD = torch.cat(model(ids, output_hidden_states=True).hidden_states[1:]).numpy()
        said_LTD = states_LTD[:, len(group.prompt_ids) : -1]
        rows.append(np.stack([said_LTD[:, -1], states_LTD[:, -1], said_LTD.mean(axis=1)]))
    return np.stack(rows)


def margins(states_2PLD: NDArray[np.float32]) -> dict[str, float]:
    """What the bundled pointwise heads make of one pair."""
    found = {}
    for name in ("legend", "legend-whitened", "hybrid", "monitor"):
        head = store.load(MODELS / SMOLLM2 / "heads" / name)
        at_2LD = states_2PLD[:, POSITIONS.index(head.manifest.position)]
        values = [
            at_2LD[:, t.layer - 1] @ t.weight_DK + (0 if t.bias_K is None else t.bias_K) for t in head.readout.taps
        ]
        chosen, rejected = head.score(Reading(np.concatenate(values, axis=1).astype(np.float32))).scores_N
        found[name] = float(chosen or 0) - float(rejected or 0)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, nargs="+")
    parser.add_argument("--n", type=int, default=200, help="pairs, equally many of each file (default: %(default)s)")
    parser.add_argument("--backbone", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    folder = resolve(SMOLLM2, dtype="float32")
    prompts = Prompts(load_tokenizer(folder), max_tokens=1024)
    groups = []
    for path in args.pairs:
        every = read_pairs(path)
        some = every[:: max(1, len(every) // (args.n // len(args.pairs)))][: args.n // len(args.pairs)]
        made = [prompts.group(p.prompt, [p.chosen, p.rejected], truncate=True).group for p in some]
        groups += [group for group in made if all(group.responses_ids)]
    read = asyncio.run(ours(args, folder, groups))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    errors, pairs = [], []
    for group, one in zip(tqdm(groups, desc="plain forward passes", unit="pair"), read, strict=True):
        other = plain(model, group, int(model.generation_config.eos_token_id))
        errors.append(np.linalg.norm(one - other, axis=-1) / np.linalg.norm(other, axis=-1))
        pairs.append((margins(one), margins(other)))
    error_NP = np.array([one.max(axis=(0, 2)) for one in errors])
    told = {
        "backbone": args.backbone,
        "dtype": args.dtype,
        "pairs": len(groups),
        "error": {
            p: {"max": float(e.max()), "median": float(np.median(e))}
            for p, e in zip(POSITIONS, error_NP.T, strict=True)
        },
        "margins": {
            name: {
                "max_difference": max(abs(a[name] - b[name]) for a, b in pairs),
                "standard_deviation": float(np.std([b[name] for _, b in pairs])),
                "signs_changed": sum((a[name] > 0) != (b[name] > 0) for a, b in pairs),
            }
            for name in pairs[0][0]
        },
    }  # fmt: skip
    print(json.dumps(told, indent=1))
    return int(args.dtype == "float32" and error_NP.max() > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
