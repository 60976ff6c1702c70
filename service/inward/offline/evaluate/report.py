"""What ``inward evaluate`` does before and around the judgement: files to examples through a backbone, and heads
refitted by folds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from inward.backbones.base import Backbone
from inward.batching import within
from inward.errors import DataError, SetupError
from inward.heads.base import Head
from inward.offline import options
from inward.offline.data import data_errors
from inward.offline.data.pairs import Folds, Response, ResponseList, collect_lists, collect_pairs, data_hash
from inward.offline.evaluate.baselines import stable_rank
from inward.offline.evaluate.examples import Examples, Source, comparisons, of_lists, of_pairs
from inward.offline.evaluate.responses import LabelledResponse, part_of, read_responses
from inward.offline.fit.like import Like, fit_like
from inward.offline.states.read import extract_lists
from inward.offline.states.saved import ListStates, Origin, PairStates
from inward.prompts import Prompts
from inward.types import Doubles, Group, Indices, Position, Readout, Tap
from inward_client import rows as rows_module

ADVICE = f"{options.ADVICE}. Lists of labelled responses go with --lists, single ones with --responses"
LARGEST = 8 * 2**30
"""Bytes of states that are held in memory."""
States = PairStates | ListStates


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
    parts: tuple[str, ...] = ()
    """Of each response, what the report is divided by."""

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(response.text for one in self.lists for response in one.responses)


def read_rows(source: Source, path: Path, limit: int | None, *, by: str | None = None, **how: Any) -> Rows:
    """The rows of a file; the first ``limit`` of them.

    Args:
        how: pairs are read, see ``inward_client.rows.collect_pairs``.
        by: a column that divides the report.

    Raises:
        DataError: names file, line and field.
    """
    if source == "pairs":
        found = collect_pairs(path, **how, advice=ADVICE)
        pairs = found.values[:limit]
        both = (ResponseList(p.prompt, (Response(p.chosen, True), Response(p.rejected, False))) for p in pairs)
        return Rows(source, tuple(both), data_hash(pairs), parts=_parts(path, by, found.numbers, [2] * len(pairs)))
    if source == "lists":
        read = collect_lists(path)
        lists = tuple(read.values[:limit])
        parts = _parts(path, by, read.numbers, [len(one.responses) for one in lists])
        return Rows(source, lists, data_hash(lists), parts=parts)
    labelled, left_out = read_responses(path, by=by)
    by_prompt: dict[str, list[LabelledResponse]] = {}
    for one in labelled[:limit]:
        by_prompt.setdefault(json.dumps(one.prompt), []).append(one)
    lists = tuple(
        ResponseList(ones[0].prompt, tuple(Response(one.text, one.safe) for one in ones)) for ones in by_prompt.values()
    )
    flat = tuple(one for ones in by_prompt.values() for one in ones)
    parts = _named(path, by, [one.part for one in flat]) if by else ()
    return Rows(source, lists, data_hash(lists), flat, left_out, parts)


def _parts(path: Path, by: str | None, numbers: Sequence[int], responses: Sequence[int]) -> tuple[str, ...]:
    """What stands in the column ``by`` of the rows with these numbers, for each of a row's responses."""
    if by is None:
        return ()
    with data_errors():
        every = rows_module.collect(Path(path), lambda row: part_of(row, by))
    parts = dict(zip(every.numbers, every.values, strict=True))  # of all rows, also of those that hold nothing else
    return _named(path, by, [parts[number] for number, n in zip(numbers, responses, strict=False) for _ in range(n)])


def _named(path: Path, by: str, parts: Sequence[str | None]) -> tuple[str, ...]:
    if all(part is None for part in parts):
        raise DataError(f"{path}: the rows have no column {by!r} to divide the report by", param="by")
    return tuple("none" if part is None else part for part in parts)


def groups_of_rows(prompts: Prompts, rows: Rows) -> list[Group]:
    """Each list as a group."""
    return [prompts.group(one.prompt, [r.text for r in one.responses], truncate=True).group for one in rows.lists]


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
) -> tuple[Examples, ListStates, float]:
    """Reads the rows' states.

    Args:
        untrained: also work out each response's stable rank, which takes a forward pass of its own.
        cache: see ``extract_lists``.

    Returns:
        The examples, their states, and the seconds that the forward passes for the states took.

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
    where: dict[str, Any] = {"layers": layers, "position": position, "final_norm": final_norm}
    states = await extract_lists(backbone, prompts, rows.lists, **where, cache=cache)
    seconds = time.perf_counter() - started
    groups = groups_of_rows(prompts, rows)
    lengths = [len(ids) for group in groups for ids in group.responses_ids]
    examples = _of_lists(states, length=lengths, text=rows.texts, source=rows.source)
    if rows.parts:
        examples = replace(examples, part_M=rows.parts)
    if any(one.behaviour for one in rows.labelled):
        examples = replace(examples, refusals_P2=_refusals(examples, rows.labelled))
    if untrained:
        examples = replace(examples, stable_rank_M=await _stable_ranks(backbone, groups))
    return examples, replace(states, origin=replace(states.origin, data_hash=rows.data)), seconds


def of_states(states: States) -> Examples:
    """Saved states as examples; they have no texts, and lengths only as differences."""
    if isinstance(states, PairStates):
        examples = of_pairs(
            states.chosen_NLD,
            states.rejected_NLD,
            layers=states.layers,
            groups=states.groups_N,
            position=states.origin.position,
            length_difference=states.length_difference_N,
        )
        return replace(examples, final_norm=states.origin.final_norm)
    return _of_lists(states)


def _of_lists(states: ListStates, **known: Any) -> Examples:
    examples = of_lists(
        states.candidates_MLD,
        states.safe_M,
        states.group_M,
        states.groups_G,
        layers=states.layers,
        position=states.origin.position,
        prompt_states_GLD=states.prompt_GLD,
        **known,
    )
    return replace(examples, final_norm=states.origin.final_norm)


def refit(like: Like, head: Head | None, examples: Examples, states: States, folds: Folds, seed: int) -> list[Head]:
    """A head like this for every fold, fitted without the fold's prompts.

    Args:
        head: one whose layer, gate and parts are kept; None: the defaults, for legend and srr the layer that the
            training part chooses.

    Raises:
        SetupError: an srr head is wanted, but these are states of pairs; or a pool, which states do not hold.
    """
    if head is not None and head.pools:
        raise SetupError("a head that pools cannot be refitted here: judge it on other prompts than it was fitted on")
    return [
        _fit(like, head, examples, states, train, seed) for train, _ in tqdm(folds, desc=f"refit {like}", unit="fold")
    ]


def _fit(like: Like, head: Head | None, examples: Examples, states: States, train: Indices, seed: int) -> Head:
    if like == "srr":
        from inward.offline.fit.srr import fit_srr

        if not isinstance(states, ListStates):
            raise SetupError("an srr head ranks lists, but these are states of pairs: give --lists, or states of lists")
        lists = states.lists(np.unique(examples.list_M[train]))
        layer: int | str = head.manifest.layers[0] if head else "sweep"
        return fit_srr(lists, layer=layer, seed=seed, baselines=False, progress=False)[0]  # type: ignore[arg-type]
    return fit_like(like, head, _pairs(examples, states.origin, train), seed=seed)


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
        origin,
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
