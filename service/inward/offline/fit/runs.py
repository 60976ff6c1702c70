"""Responses that the model draws to their end, a head's reward of each, and its states on the way: what a value head
learns from.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from inward.backbones.base import Backbone
from inward.errors import DataError, InwardError
from inward.files import whole
from inward.heads.base import BackboneRef, Head
from inward.heads.running import token_scores
from inward.offline.data.pairs import prompt_groups
from inward.prompts import Prompts, Texts
from inward.types import Doubles, Floats, Group, Ids, Indices, Prompt, Readout, SamplingSpec, Tap

AT_ONCE = 4
"""Prompts that are drawn for at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """``N`` finished responses to each of ``P`` prompts, looked at after ``A`` numbers of tokens, at ``L`` layers.
    What a response has not reached is NaN.
    """

    at: tuple[int, ...]
    layers: tuple[int, ...]
    rewards_PN: Doubles
    lengths_PN: np.ndarray[tuple[int, ...], np.dtype[np.int64]]
    states_PNALD: Floats
    """At the last of so many tokens."""
    means_PNALD: Floats
    """Of all of them."""
    own_PNA: Doubles
    """The head's own running score: the mean of its scores of these tokens."""
    backbone: BackboneRef
    template: str
    data_hash: str
    groups_P: Indices
    """Numbers of the prompts, see ``prompt_groups``."""


async def draw_runs(
    backbone: Backbone,
    prompts: Prompts,
    head: Head,
    asked: Sequence[Prompt],
    spec: SamplingSpec,
    *,
    at: Sequence[int],
    layers: Sequence[int],
    cache: Path,
) -> Runs:
    """Draws, and keeps what is done of it in ``cache``, so that the same call goes on after a stop. Prompts with a
    response that has no score are left out.

    Raises:
        DataError: no prompt is usable.
    """
    grouped = await prompts.group_many([Texts(prompt, ()) for prompt in asked])
    room = backbone.info.max_tokens - spec.max_tokens - 1
    fitting = {
        i: g.group.prompt_ids
        for i, g in enumerate(grouped)
        if not isinstance(g, InwardError) and len(g.group.prompt_ids) <= room
    }
    ids = list(fitting.values())
    identity = _identity(head)
    turns = asyncio.Semaphore(max(AT_ONCE, min(backbone.capacity.concurrency, 64)))
    with tqdm(total=len(ids), desc="drawing", unit="prompt") as bar:

        async def one(i: int, prompt: Ids) -> dict[str, Floats] | None:
            own = replace(spec, seed=((spec.seed or 0) * 1_000_003 + i * spec.n) % 2**32)
            async with turns:
                run = await _run(backbone, head, identity, Group(prompt, sampling=own), at, layers, cache)
            bar.update()
            return run

        drawn = await asyncio.gather(*map(one, range(len(ids)), ids))
    groups_P = prompt_groups(asked[i] for i, run in zip(fitting, drawn, strict=True) if run is not None)
    runs = [run for run in drawn if run is not None]
    if len(runs) < 2:
        raise DataError(f"{len(runs)} of {len(asked)} prompts can be used: a value head needs two at least, better 200")
    together = {name: np.stack([run[name] for run in runs]) for name in runs[0]}
    return Runs(
        tuple(at), tuple(layers), together["rewards"].astype(np.float64), together["lengths"].astype(np.int64),
        together["states"], together["means"], together["own"].astype(np.float64),
        BackboneRef.of(backbone.info), prompts.template, hashlib.sha256(repr(ids).encode()).hexdigest(), groups_P,
    )  # fmt: skip


def _identity(head: Head) -> str:
    """Of its weights, too: one that is fitted anew has the same name and version."""
    digest = hashlib.sha256(repr((head.ref, head.manifest)).encode())
    for name, tensor in sorted(head.tensors().items()):
        digest.update(name.encode() + np.ascontiguousarray(tensor).tobytes())
    return digest.hexdigest()


async def _run(
    backbone: Backbone,
    head: Head,
    identity: str,
    group: Group,
    at: Sequence[int],
    layers: Sequence[int],
    cache: Path,
) -> dict[str, Floats] | None:
    what = repr((group, tuple(at), tuple(layers), identity, backbone.info.identity))
    kept = cache / f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.safetensors"
    if kept.exists():
        return dict(load_file(kept))
    states_at = Readout(tuple(Tap(layer, "last") for layer in layers))
    samples, reading = await backbone.sample_and_read(group, [head.readout, states_at], tokens=True)
    scores = head.score(reading.readings[0]).scores_N
    tokens, states = (one.tokens_TK or () for one in reading.readings)
    if None in scores:
        return None
    A, L, D = len(at), len(layers), backbone.info.width
    run = {
        "rewards": np.array(scores, np.float32),
        "lengths": np.array([len(sample.ids) for sample in samples], np.float32),
        "states": np.full((len(samples), A, L, D), np.nan, np.float32),
        "means": np.full((len(samples), A, L, D), np.nan, np.float32),
        "own": np.full((len(samples), A), np.nan, np.float32),
    }
    own = token_scores(head, {n: values_TK for n, values_TK in enumerate(tokens) if len(values_TK)})
    for n, states_TK in enumerate(states):
        states_TLD = states_TK.reshape(-1, L, D)
        for a, point in enumerate(at):
            if point <= len(states_TLD):
                run["states"][n, a] = states_TLD[point - 1]
                run["means"][n, a] = states_TLD[:point].mean(axis=0)
                run["own"][n, a] = own[n][:point].mean()
    with whole(kept) as file:
        save_file(run, file)
    return run
