"""``inward evaluate``: from rows or saved states, through the model where there are texts, to a judgement."""

from __future__ import annotations

import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from inward.backbones.base import Backbone
from inward.errors import DataError
from inward.heads import store
from inward.heads.base import Head, Manifest
from inward.offline.data.pairs import grouped_folds
from inward.offline.evaluate.compare import Difference, compare
from inward.offline.evaluate.examples import Examples, Source
from inward.offline.evaluate.guard import operations
from inward.offline.evaluate.heatmap import TokenScores, read_examples
from inward.offline.evaluate.judge import Judgement, judge
from inward.offline.evaluate.metrics import by_part
from inward.offline.evaluate.report import (
    Rows,
    States,
    extract,
    groups_of_rows,
    of_states,
    read_rows,
    refit,
    shorten,
)
from inward.offline.evaluate.scoring import Judged, of_texts, score, score_folds
from inward.offline.evaluate.statistics import Resampling
from inward.offline.evaluate.verdict import verdict
from inward.offline.fit.like import Like, like_of
from inward.offline.fit.seen_prompts import seen
from inward.offline.model import OpenModel, with_model
from inward.offline.options import columns
from inward.offline.states.saved import PairStates, load_states
from inward.offline.states.scores import check_readable, score_groups
from inward.prompts import Prompts
from inward.types import Doubles, Indices, Position

POSITIONS: dict[Like, Position] = {"legend": "last", "whitened": "last", "hybrid": "eos", "srr": "last"}
"""Where a response is read, by the kind of head that is to be refitted."""


@dataclass(slots=True)
class Material:
    """What there is to judge by."""

    heads: list[Head]
    examples: Examples
    states: States
    """Theirs."""
    seconds: float | None = None
    """Of the forward passes for the states, or for ``said`` where there is that; None where states were given."""
    said: list[Judged] = field(default_factory=list)
    """Scores of heads that read through the backbone what no stored state holds."""
    calibration: Doubles | None = None
    """The first head's scores of safe responses by which thresholds are fixed."""
    refusals: tuple[Doubles, Indices] | None = None
    """Its scores of helpful answers to harmless prompts, and the prompt of each."""
    notes: list[str] = field(default_factory=list)
    tokens: tuple[TokenScores, ...] = ()
    """A few responses token by token, for the page."""


def evaluate(
    args: Namespace, folders: Sequence[Path], opened: OpenModel, cache: Callable[[str], Path]
) -> tuple[Judgement, dict[str, Any]]:
    """Judges one head, or heads that are refitted.

    Args:
        args: as ``commands.evaluate`` parses them.
        folders: of the head, if one was named.
        cache: folder of a name for finished parts of a pass through the model.

    Returns:
        The judgement, and the report as ``--json`` prints it.

    Raises:
        DataError, SetupError: rows or options by which nothing can be judged.
    """
    found = _material(args, folders, opened, cache)
    head = found.heads[0] if found.heads else None
    examples, states, notes = found.examples, found.states, found.notes
    prompts = min(args.folds, examples.prompts)
    folds = grouped_folds(examples.prompt_M, prompts, args.seed) if prompts > 1 else []
    heads: Sequence[Head] = found.heads
    if args.cross_validate:
        heads = refit(_like(args, head), head, examples, states, folds, args.seed)
    elif head:
        notes += [f"{one}: use other rows, or --cross-validate" for one in _flattered(head.manifest, found)]
    started = time.perf_counter()
    if args.cross_validate:
        ours = score_folds(heads, folds, examples)
    else:
        ours = found.said[0] if found.said else score(heads[0], examples)
    spent = time.perf_counter() - started
    shown, resampling = heads[0].manifest, Resampling(args.resamples, args.seed)
    layer = shown.layers[0] if shown.kind == "srr" else None
    judgement = replace(
        judge(examples, ours, folds if args.baselines else (), resampling, layer=layer, progress=True),
        guard=operations(examples, ours, folds, resampling, calibration=found.calibration, refusals=found.refusals),
        parts=by_part(examples, ours, resampling),
        tokens=found.tokens,
        seen=None if args.cross_validate else seen(heads[0].manifest, examples.prompt_M),
    )
    forward_ms = None if found.seconds is None else 1e3 * found.seconds / len(examples)
    # what was said was said between the forward passes, which cannot be told apart from the head there
    head_ms = None if found.said else 1e3 * spent / (len(examples) * len(heads))
    report = {
        "input": {
            "file": next(Path(p).name for p in (args.pairs, args.lists, args.responses, args.states) if p),
            "kind": examples.source,
            "responses": len(examples),
            "prompts": examples.prompts,
            "prompts_in_the_fit": judgement.seen and judgement.seen.prompts,
            "comparisons": len(examples.pairs_P2),
            "mixed_lists": len(examples.mixed),
            "layers": list(examples.layers),
            "cross_validated": bool(args.cross_validate),
            "folds": len(folds) if args.baselines or args.cross_validate else 0,
            "resamples": args.resamples,
            "seed": args.seed,
        },
        "head": _describe(shown, head, args.cross_validate),
        **judgement.to_json(),
        "verdict": verdict(judgement, resampling).paragraph,
        "cost": {
            "head_ms": head_ms,
            "with_forward_ms": None if forward_ms is None else forward_ms + (head_ms or 0.0),
            "with_generation_ms": None,
        },
        "notes": notes,
    }
    return judgement, report


def compare_heads(
    args: Namespace, folders: Sequence[Path], opened: OpenModel, cache: Callable[[str], Path]
) -> tuple[tuple[Difference, ...], tuple[str, str]]:
    """Two heads on the same responses: every metric of both, and their difference."""
    found = _material(args, folders, opened, cache)
    first, second = found.said or [score(head, found.examples) for head in found.heads]
    for head in found.heads:
        for one in _flattered(head.manifest, found):
            print(f"note: head {head.manifest.name!r}: {one}: use other rows", file=sys.stderr)
    names = found.heads[0].manifest.name, found.heads[1].manifest.name
    if names[0] == names[1]:
        names = f"{names[0]} ({folders[0].parent.name})", f"{names[1]} ({folders[1].parent.name})"
    return compare(found.examples, first, second, Resampling(args.resamples, args.seed)), names


def _material(args: Namespace, folders: Sequence[Path], opened: OpenModel, cache: Callable[[str], Path]) -> Material:
    if args.states:
        return _of_states(args, folders)
    source: Source = next(name for name in ("pairs", "lists", "responses") if getattr(args, name))
    how: dict[str, Any] = {"layout": args.layout, "columns": columns(args.columns), "parse_json": args.parse_json}
    rows = read_rows(source, getattr(args, source), args.limit, by=args.by, **how)
    calibration = read_rows(source, args.calibration, None, **how) if args.calibration else None
    xstest = read_rows("responses", args.xstest, None) if args.xstest else None
    kept = cache(f"evaluate-{rows.data.rpartition(':')[2]}")
    found = with_model(
        opened, lambda backbone, prompts: _of_rows(args, folders, rows, calibration, xstest, kept, backbone, prompts)
    )
    shutil.rmtree(kept, ignore_errors=True)
    if rows.left_out:
        found.notes.append(f"{rows.left_out} partial refusals were left out")
    if args.response_tokens is not None:
        found.notes.append(f"responses were cut after their first {args.response_tokens} tokens")
    return found


def _of_states(args: Namespace, folders: Sequence[Path]) -> Material:
    """Without a model: the heads' taps are evaluated on the stored states."""
    states = load_states(args.states)
    if args.limit is not None:
        first = np.arange(min(args.limit, len(states)))
        states = states.rows(first) if isinstance(states, PairStates) else states.lists(first)
    notes = []
    origin = states.origin
    if folders and origin.backbone is None:
        notes.append(
            "the states do not say which backbone they are of, so it was not checked that the head belongs to them"
        )
    named = origin.backbone.name if origin.backbone else "unknown"
    fingerprint = origin.backbone.fingerprint if origin.backbone else None
    heads = [
        store.load(folder, template=origin.template, fingerprint=fingerprint, backbone=named) for folder in folders
    ]
    return Material(heads, of_states(states), states, notes=notes)


async def _of_rows(
    args: Namespace,
    folders: Sequence[Path],
    rows: Rows,
    calibration: Rows | None,
    xstest: Rows | None,
    cache: Path,
    backbone: Backbone,
    prompts: Prompts,
) -> Material:
    """Texts: their states are read through the model first, and what a head reads beyond them."""
    info = backbone.info
    made_for: dict[str, Any] = {"depth": info.layers, "width": info.width, "backbone": info.name}
    made_for |= {"fingerprint": info.fingerprint, "template": prompts.template}
    heads = [store.load(folder, **made_for) for folder in folders]
    if args.response_tokens is not None:
        rows = shorten(rows, prompts, args.response_tokens)
        calibration, xstest = (one and shorten(one, prompts, args.response_tokens) for one in (calibration, xstest))
    head = heads[0] if heads else None
    like = _like(args, head)
    layers, position = _layers(args, heads, info.layers), _position(args, head)
    examples, states, seconds = await extract(
        backbone,
        prompts,
        rows,
        layers=layers,
        position=position,
        final_norm=head.manifest.final_norm if head else like in ("legend", "whitened"),
        untrained=args.baselines and not args.compare,
        cache=cache,
    )
    found = Material(heads, examples, states, seconds)
    if not heads or args.cross_validate:
        return found
    if args.html and head:
        found.tokens = await read_examples(backbone, prompts, rows.lists, head)
    if not all(_readable(one, examples) for one in heads):
        groups = groups_of_rows(prompts, rows)
        started = time.perf_counter()
        said = await score_groups(backbone, groups, heads)
        found.seconds = time.perf_counter() - started
        found.said = [of_texts(one, examples, [of_group[h] for of_group in said]) for h, one in enumerate(heads)]
    if calibration:
        safe = [response.safe for one in calibration.lists for response in one.responses]
        found.calibration = (await _scores(backbone, prompts, calibration, heads[0]))[np.array(safe)]
    if xstest:
        helpful = np.array([one.behaviour == "comply" and one.harmful is False for one in xstest.labelled])
        if not helpful.any():
            raise DataError(
                f"{args.xstest} has no helpful answers to harmless prompts: it needs XSTest's type and label"
            )
        prompt_M = np.repeat(np.arange(len(xstest.lists)), [len(one.responses) for one in xstest.lists])
        found.refusals = (await _scores(backbone, prompts, xstest, heads[0]))[helpful], prompt_M[helpful]
    return found


async def _scores(backbone: Backbone, prompts: Prompts, rows: Rows, head: Head) -> Doubles:
    """Of every response."""
    said = await score_groups(backbone, groups_of_rows(prompts, rows), [head])
    scores = np.array([value for (of_group,) in said for value in of_group.scores_N], dtype=np.float64)
    if not np.isfinite(scores).all():
        raise DataError("a head gives some of the calibration responses no finite score: fit it again")
    return scores


def _readable(head: Head, examples: Examples) -> bool:
    """Whether the states that were read are all that the head reads."""
    try:
        check_readable(head, examples.layers, examples.position, final_norm=examples.final_norm)
    except DataError:
        return False
    return head.manifest.kind != "ensemble"


def _flattered(of: Manifest, found: Material) -> Iterator[str]:
    """What a head was fitted on of what it is judged by."""
    was = seen(of, found.examples.prompt_M)
    if of.fit.get("data") == found.states.origin.data_hash:
        yield "the head was fitted on these very rows, which flatters it"
    elif was and was.clear:
        yield f"{was}, which flatters the head"


def _describe(manifest: Manifest, head: Head | None, cross_validated: str | None) -> dict[str, Any]:
    return {
        "name": f"{head.manifest.name if head else manifest.kind}{', refitted' if cross_validated and head else ''}",
        "kind": manifest.kind,
        "version": head.manifest.version if head else manifest.version,
        "layers": list(manifest.layers),
        "position": manifest.position,
        "pool": manifest.pool.name if manifest.pool else None,
        "backbone": manifest.backbone.name,
    }


def _like(args: Namespace, head: Head | None) -> Like:
    """What kind of head is judged or refitted."""
    if args.cross_validate not in (None, "like"):
        chosen: Like = args.cross_validate
        return chosen
    assert head is not None
    return like_of(head)


def _position(args: Namespace, head: Head | None) -> Position:
    if head is not None:
        return head.manifest.position
    position: Position = args.position or POSITIONS[_like(args, head)]
    return position


def _layers(args: Namespace, heads: Sequence[Head], depth: int) -> list[int]:
    """Layers to read; the heads' are always among them."""
    own = {layer for head in heads for layer in head.manifest.layers}
    few = args.compare or (not args.baselines and not args.cross_validate)
    if args.layers == "head" or (args.layers == "all" and few):
        return sorted(own or range(1, depth + 1))
    if args.layers == "all":
        return sorted(own | set(range(1, depth + 1)))
    try:
        return sorted(own | {int(part) for part in args.layers.split(",")})
    except ValueError:
        raise DataError(f"--layers {args.layers}: all, head, or numbers from 0 to {depth} such as 8,12,16") from None
