"""What ``inward evaluate`` does before and around the judgement: files to examples through a backbone, and heads
refitted by folds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from inward.backbones.base import Backbone
from inward.batching import within
from inward.errors import SetupError
from inward.heads.base import Head
from inward.offline.data.pairs import Response, ResponseList, data_hash, read_lists, read_pairs
from inward.offline.evaluate.baselines import stable_rank
from inward.offline.evaluate.examples import Examples, Source, comparisons, of_lists, of_pairs
from inward.offline.evaluate.responses import LabelledResponse, read_responses
from inward.offline.evaluate.statistics import Doubles, Indices
from inward.offline.states.read import extract_lists
from inward.offline.states.saved import ListStates, PairStates
from inward.prompts import Prompts
from inward.types import Group, Kind, Position, Readout, Tap

LARGEST = 8 * 2**30
"""Bytes of states that are held in memory."""
Folds = Sequence[tuple[Indices, Indices]]


@dataclass(frozen=True, slots=True)
class Rows:
    """Texts to judge, whatever their file was: one list a pair, a ranking list, or all labelled responses to a
    prompt.
    """

    source: Source
    lists: tuple[ResponseList, ...]
    data: str
    """Hash as a fit on the same rows would write it."""
    labelled: tuple[LabelledResponse, ...] = ()
    """One for each response of the lists in order, if they came with labels of their own."""
    left_out: int = 0

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(response.text for one in self.lists for response in one.responses)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where states come from: what the manifest of a head fitted on them says."""

    states: PairStates | ListStates
    data: str


def read_rows(source: Source, path: Path, limit: int | None, *, parse_json: bool = False) -> Rows:
    """The rows of a file; the first ``limit`` of them.

    Raises:
        DataError: names file, line and field.
    """
    if source == "pairs":
        pairs = read_pairs(path, parse_json=parse_json)[:limit]
        both = (ResponseList(p.prompt, (Response(p.chosen, True), Response(p.rejected, False))) for p in pairs)
        return Rows(source, tuple(both), data_hash(pairs))
    if source == "lists":
        lists = tuple(read_lists(path)[:limit])
        return Rows(source, lists, data_hash(lists))
    labelled, left_out = read_responses(path)
    by_prompt: dict[str, list[LabelledResponse]] = {}
    for one in labelled[:limit]:
        by_prompt.setdefault(json.dumps(one.prompt), []).append(one)
    lists = tuple(
        ResponseList(ones[0].prompt, tuple(Response(one.text, one.safe) for one in ones)) for ones in by_prompt.values()
    )
    return Rows(source, lists, data_hash(lists), tuple(one for ones in by_prompt.values() for one in ones), left_out)


def shorten(rows: Rows, prompts: Prompts, tokens: int) -> Rows:
    """The same rows with the first ``tokens`` tokens of each response: where the model is too short for prompt and
    response.
    """

    def cut(text: str) -> str:
        ids = prompts.tokenizer([text], add_special_tokens=False)["input_ids"][0]
        return text if len(ids) <= tokens else str(prompts.tokenizer.decode(ids[:tokens], skip_special_tokens=False))

    lists = tuple(
        replace(one, responses=tuple(replace(r, text=cut(r.text)) for r in one.responses)) for one in rows.lists
    )
    return replace(rows, lists=lists)


async def extract(
    backbone: Backbone,
    prompts: Prompts,
    rows: Rows,
    *,
    layers: Sequence[int],
    position: Position,
    final_norm: bool,
    untrained: bool,
    cache: Path | None = None,
    progress: bool = True,
) -> tuple[Examples, Origin, float]:
    """Reads the rows' states.

    Args:
        untrained: also work out each response's stable rank, which takes a forward pass of its own.
        cache: see ``extract_lists``.

    Returns:
        The examples, where they come from, and the seconds that the forward passes for the states took.

    Raises:
        SetupError: more states than are held in memory.
    """
    size = 4 * len(rows.texts) * len(layers) * backbone.info.width
    if size > LARGEST:
        raise SetupError(
            f"{len(layers)} layers of {len(rows.texts)} responses take {size / 2**30:.0f} GiB: choose some with "
            "--layers or --limit"
        )
    started = time.perf_counter()
    states = await extract_lists(
        backbone,
        prompts,
        rows.lists,
        layers=layers,
        position=position,
        final_norm=final_norm,
        cache=cache,
        progress=progress,
    )
    seconds = time.perf_counter() - started
    groups = [prompts.group(one.prompt, [r.text for r in one.responses], truncate=True).group for one in rows.lists]
    examples = of_lists(
        states.candidates_MLD,
        states.safe_M,
        states.group_M,
        states.groups_G,
        layers=states.layers,
        position=position,
        prompt_states_GLD=states.prompt_GLD,
        length=[len(ids) for group in groups for ids in group.responses_ids],
        text=rows.texts,
        source=rows.source,
    )
    if any(one.behaviour for one in rows.labelled):
        examples = replace(examples, refusals_P2=_refusals(examples, rows.labelled))
    if untrained:
        examples = replace(examples, stable_rank_M=await _stable_ranks(backbone, groups))
    return examples, Origin(states, rows.data), seconds


def of_states(states: PairStates | ListStates) -> Examples:
    """Saved states as examples; they have no texts, and lengths only as differences."""
    if isinstance(states, PairStates):
        return of_pairs(
            states.chosen_NLD,
            states.rejected_NLD,
            layers=states.layers,
            groups=states.groups_N,
            position=states.position,
            length_difference=states.length_difference_N,
        )
    return of_lists(
        states.candidates_MLD,
        states.safe_M,
        states.group_M,
        states.groups_G,
        layers=states.layers,
        position=states.position,
        prompt_states_GLD=states.prompt_GLD,
    )


def refit(kind: Kind, like: Head | None, examples: Examples, origin: Origin, folds: Folds, seed: int) -> list[Head]:
    """A head of this kind for every fold, fitted without the fold's prompts.

    Args:
        like: a head whose layer and gate are kept; None: the defaults, for legend and srr the layer that the training
            part chooses.

    Raises:
        SetupError: an srr head is wanted, but these are states of pairs.
    """
    return [
        _fit(kind, like, examples, origin, train, seed) for train, _ in tqdm(folds, desc=f"refit {kind}", unit="fold")
    ]


def _fit(kind: Kind, like: Head | None, examples: Examples, origin: Origin, train: Indices, seed: int) -> Head:
    if kind == "srr":
        from inward.offline.fit.srr import fit_srr

        if not isinstance(origin.states, ListStates):
            raise SetupError("an srr head ranks lists, but these are states of pairs: give --lists, or states of lists")
        lists = origin.states.lists(np.unique(examples.list_M[train]))
        layer: int | str = like.manifest.layers[0] if like else "sweep"
        return fit_srr(lists, layer=layer, seed=seed, baselines=False, progress=False)[0]  # type: ignore[arg-type]
    pairs = _pairs(examples, origin, train)
    if kind == "legend":
        from inward.offline.fit.legend import fit_legend

        return fit_legend(pairs, layer=like.manifest.layers[0] if like else "sweep", seed=seed)[0]
    from inward.heads.hybrid import HybridHead
    from inward.offline.fit.hybrid import fit_hybrid

    gate = like.options.gate if isinstance(like, HybridHead) else "sigmoid"
    return fit_hybrid(pairs, gate=gate, seed=seed, progress=False)[0]


def _pairs(examples: Examples, origin: Origin, train: Indices) -> PairStates:
    """The comparisons of the training prompts."""
    chosen = np.isin(examples.pairs_P2[:, 0], train)
    better, worse = examples.pairs_P2[chosen].T
    difference = examples.length_difference_P
    return PairStates(
        examples.states_MLD[better],
        examples.states_MLD[worse],
        examples.layers,
        examples.prompt_M[better],
        None if difference is None else difference[chosen],
        origin.states.position,
        origin.states.final_norm,
        origin.states.backbone,
        origin.states.template,
        origin.data,
    )


def _refusals(examples: Examples, labelled: Sequence[LabelledResponse]) -> Indices:
    """(refusal, helpful answer) to the same harmless prompt."""
    harmless_M = np.array([one.harmful is False for one in labelled])
    refuses_M = np.array([one.behaviour == "refuse" for one in labelled])
    return comparisons(examples.list_M, harmless_M & refuses_M, harmless_M & ~refuses_M)


async def _stable_ranks(backbone: Backbone, groups: Sequence[Group]) -> Doubles:
    """Of every response's token states after the last block and the final norm."""
    readout = Readout((Tap(backbone.info.layers, "last", final_norm=True),))
    ranks: list[float] = []
    for batch in within(groups, backbone.capacity.tokens, lambda group: group.tokens):
        for reading in await backbone.read(batch, [readout], tokens=True):
            ranks.extend(stable_rank(tokens_TD) for tokens_TD in reading.readings[0].tokens_TK or ())
    return np.array(ranks)
