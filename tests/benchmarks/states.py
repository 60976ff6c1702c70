"""Reads the states of labelled responses once, for the tables of ``quality.py`` and ``peers.py``: hours are not spent
twice, and every method sees the same numbers.

    python tests/benchmarks/states.py pku_saferlhf_pairs.jsonl xstest_completions.jsonl --out out/states

Of each distinct response: the states of all blocks at ``last``, ``eos`` and as ``mean``, those of the prompt, and those
of a few blocks at every token, float16; computed in float32. One file for each ``CHUNK`` responses, in a folder named
after the rows; what is there already is not read again, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from inward.backbones.base import Backbone
from inward.backbones.loading import SMOLLM2, resolve
from inward.backbones.tokenizer import load_tokenizer
from inward.backbones.transformers.backbone import TransformersBackbone
from inward.offline.data.pairs import read_lists, read_pairs
from inward.offline.evaluate.responses import read_responses
from inward.prompts import Prompt, Prompts
from inward.types import Group, Readout, Tap

CHUNK = 64
TOKEN_LAYERS = (15, 20, 23, 27)
"""Blocks that are kept at every token, to pool over."""
MAX_TOKENS = 1024
"""Of prompt and response; longer prompts lose their beginning."""
POSITIONS = ("last", "eos", "mean")


@dataclass(frozen=True, slots=True)
class Item:
    """One response, and what is known about it."""

    prompt: Prompt
    text: str
    safe: bool
    label: str = ""
    """XSTest: ``comply`` or ``refuse``."""


def items(path: Path) -> list[Item]:
    """Distinct responses of a file of pairs, of lists, or of XSTest's completions (those to harmless prompts), in its
    order.
    """
    first = json.loads(path.read_text(encoding="utf-8").partition("\n")[0])
    if "label" in first:
        rows, _ = read_responses(path)
        found = [Item(r.prompt, r.text, r.safe, str(r.behaviour)) for r in rows if not r.harmful]
    elif "responses" in first:
        found = [Item(one.prompt, r.text, r.safe) for one in read_lists(path) for r in one.responses]
    else:
        pairs = read_pairs(path)
        found = [Item(p.prompt, text, safe) for p in pairs for text, safe in ((p.chosen, True), (p.rejected, False))]
    distinct: dict[tuple[str, str], Item] = {}
    for one in found:
        distinct.setdefault((str(one.prompt), one.text), one)
    return list(distinct.values())


@dataclass(frozen=True, slots=True, eq=False)
class States:
    """What was read of ``items``, in their order."""

    position: dict[str, NDArray[np.float16]]
    """``[M, L, D]`` at each position."""
    prompt: NDArray[np.float16] | None
    """``[M, L, D]``: at the prompt's last token."""
    tokens_M: list[NDArray[np.float16]]
    """``[T, len(TOKEN_LAYERS), D]`` of each response."""
    length_M: NDArray[np.int64]


def load(folder: Path, *, tokens: bool = False) -> States:
    """All chunks of a folder that has been read."""
    chunks = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    prompt = np.concatenate([c["prompt_state"] for c in chunks]) if "prompt_state" in chunks[0] else None
    every: list[Any] = []
    for chunk in chunks if tokens else ():
        every += np.split(chunk["tokens"], np.cumsum(chunk["n"])[:-1])
    return States(
        {p: np.concatenate([c[p] for c in chunks]) for p in POSITIONS},
        prompt,
        every,
        np.concatenate([c["n"] for c in chunks]),
    )


async def read(backbone: Backbone, prompts: Prompts, path: Path, out: Path, cap: int | None, part: str) -> None:
    """Reads one file; ``part`` is ``i/n``: every n-th chunk, so that two processes may share the work."""
    every = items(path)
    folder = out / path.name
    folder.mkdir(parents=True, exist_ok=True)
    mine, of = (int(x) for x in part.split("/"))
    started, read_tokens = time.monotonic(), 0
    for start in range(0, len(every), CHUNK):
        file = folder / f"{start:06d}.safetensors"
        if file.exists() or start // CHUNK % of != mine:
            continue
        tensors, count = await _chunk(backbone, prompts, every[start : start + CHUNK], cap)
        unfinished = file.with_suffix(f".part{mine}")
        save_file(tensors, unfinished)
        unfinished.replace(file)
        read_tokens += count
        rate = read_tokens / (time.monotonic() - started)
        print(f"{path.name} {start + CHUNK}/{len(every)}: {read_tokens} tokens, {rate:.0f}/s", flush=True)


async def _chunk(
    backbone: Backbone, prompts: Prompts, some: Sequence[Item], cap: int | None
) -> tuple[dict[str, NDArray[Any]], int]:
    """Tensors of ``some``, and how many tokens it took."""
    layers, width, n = backbone.info.layers, backbone.info.width, len(some)
    blocks = range(1, layers + 1)
    readouts = [Readout(tuple(Tap(k, p) for k in blocks)) for p in ("eos", "prompt")]
    arrays = {p: np.empty((n, layers, width), dtype=np.float16) for p in (*POSITIONS, "prompt_state")}
    tokens_N: list[Any] = [None] * n
    lengths = {name: np.empty(n, dtype=np.int64) for name in ("n", "prompt")}
    count = 0
    for group, members in _groups(prompts, some, cap, backbone.capacity.tokens):
        (reading,) = await backbone.read([group], readouts, tokens=True)
        count += group.tokens
        eos, prompt = reading.readings
        for place, i in enumerate(members):
            states_TLD = eos.tokens_TK[place].reshape(-1, layers, width)
            arrays["eos"][i] = eos.values_NK[place].reshape(layers, width)
            arrays["prompt_state"][i] = prompt.values_NK[place].reshape(layers, width)
            arrays["mean"][i] = states_TLD.mean(axis=0) if len(states_TLD) else arrays["eos"][i]
            arrays["last"][i] = states_TLD[-1] if len(states_TLD) else arrays["eos"][i]
            tokens_N[i] = states_TLD[:, [k - 1 for k in TOKEN_LAYERS]].astype(np.float16)
            lengths["n"][i], lengths["prompt"][i] = len(states_TLD), len(group.prompt_ids)
    return {**arrays, "tokens": np.concatenate(tokens_N), **lengths}, count


def _groups(prompts: Prompts, some: Sequence[Item], cap: int | None, budget: int) -> Iterator[tuple[Group, list[int]]]:
    """Responses of one prompt together, as many as the backbone takes; and which they are."""
    by_prompt: dict[str, list[int]] = {}
    for i, one in enumerate(some):
        by_prompt.setdefault(str(one.prompt), []).append(i)
    for members in by_prompt.values():
        whole = prompts.group(some[members[0]].prompt, [some[i].text for i in members], truncate=True).group
        responses = [ids[:cap] for ids in whole.responses_ids]
        first, cost = 0, len(whole.prompt_ids)
        for j, ids in enumerate(responses):
            if j > first and cost + len(ids) + 1 > budget:
                yield Group(whole.prompt_ids, tuple(responses[first:j])), members[first:j]
                first, cost = j, len(whole.prompt_ids)
            cost += len(ids) + 1
        yield Group(whole.prompt_ids, tuple(responses[first:])), members[first:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--response-tokens", type=int, help="read the first so many tokens of each response")
    parser.add_argument("--part", default="0/1", help="every n-th chunk, as i/n (default: %(default)s)")
    args = parser.parse_args()

    async def all_files() -> None:
        folder = resolve(SMOLLM2)
        backbone = TransformersBackbone(folder, name=SMOLLM2, dtype="float32")
        prompts = Prompts(load_tokenizer(folder), max_tokens=MAX_TOKENS)
        try:
            for path in args.rows:
                await read(backbone, prompts, path, args.out, args.response_tokens, args.part)
        finally:
            await backbone.close()

    asyncio.run(all_files())


if __name__ == "__main__":
    main()
