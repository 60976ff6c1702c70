"""``inward fit``: from rows or saved states, through the model where states are wanted, to a head and its report."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from inward.backbones.base import Backbone
from inward.errors import DataError, SetupError
from inward.heads import store
from inward.heads.base import Head
from inward.heads.guard import GuardThresholds
from inward.heads.pooling import Pool
from inward.offline.cluster import Cluster
from inward.offline.data.pairs import (
    CalibrationRow,
    Pair,
    check_prompts,
    data_hash,
    has_refusals,
    prompt_groups,
    read_calibration,
    read_lists,
    read_pairs,
    read_prompts,
    read_texts,
)
from inward.offline.fit.ensemble import Judges, fit_ensemble
from inward.offline.fit.guard import fit_guard
from inward.offline.fit.hybrid import fit_hybrid
from inward.offline.fit.legend import constant_refusal, fit_legend
from inward.offline.fit.options import DRAWN_TOKENS
from inward.offline.fit.pool import fit_pool
from inward.offline.fit.ray import SpreadPairs
from inward.offline.fit.runs import Runs, draw_runs
from inward.offline.fit.srr import fit_srr
from inward.offline.fit.value import PROMPTS as VALUE_PROMPTS
from inward.offline.fit.value import fit_value
from inward.offline.fit.whitened import Choice, Evidence, FromStates, fit_whitened
from inward.offline.model import OpenModel, with_model
from inward.offline.options import ADVICE, columns
from inward.offline.states.moments import Moments
from inward.offline.states.read import extract_lists, store_pairs, sum_pairs, sum_responses
from inward.offline.states.saved import ListStates, load_list_states, save_states
from inward.offline.states.scores import score_pairs, score_states
from inward.offline.states.stored import PairSource, StoredPairs, blocks
from inward.prompts import Prompts
from inward.types import SamplingSpec
from inward.wire.requests import Sampling
from inward_client.rows import AUTO

Fitted = tuple[Head, Any]
"""A head, and a report that can be printed."""
PROMPTS = {"hybrid": 2, "srr": 2, "ensemble": 2, "value": VALUE_PROMPTS}
"""Different prompts without which a fit can't split its rows: it is told before they are read."""


def fit(args: Namespace, opened: OpenModel, cache: Path) -> Fitted:
    """Fits a head of ``args.kind``.

    Args:
        args: as ``commands.fit`` parses them.
        cache: folder for what is finished of a pass through the model, so that the same command goes on after a stop.

    Raises:
        DataError, SetupError: rows or options that no head can be fitted with.
    """
    if getattr(args, "engine", "local") == "ray":
        return _in_ray(args, opened, cache)
    if getattr(args, "pool", None) and args.kind != "guard":
        return _with_pool(args, opened, cache)
    match args.kind:
        case "legend" if args.direction == "whitened":
            return _whitened(args, opened, cache)
        case "legend":
            return _legend(args, opened, cache)
        case "hybrid":
            return _hybrid(args, opened, cache)
        case "ensemble":
            return _ensemble(args, opened)
        case "value":
            return _value(args, opened, cache)
        case "guard":
            return _guard(args, opened)
        case _:
            return _srr(args, opened, cache)


def _with_pool(args: Namespace, opened: OpenModel, cache: Path) -> Fitted:
    """A head of any pointwise kind, fitted at its position, whose token scores are pooled."""
    if args.kind == "srr":
        raise SetupError("an srr head ranks whole responses against each other: --pool is for legend and hybrid heads")
    if args.states:
        raise SetupError("--pool needs --pairs: saved states are of one position, a pool reads every token")
    try:
        Pool.parse(args.pool, layer=0)
    except ValueError as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        told = f"{'.'.join(map(str, first['loc'])) or 'pool'}: {first['msg']}" if first else str(error)
        raise SetupError(f"--pool {args.pool}: {told}") from None
    files, warnings = _pairs(args)

    def head(states: PairSource) -> Fitted:
        if args.kind == "hybrid":
            return fit_hybrid(states, name=args.name, gate=args.gate, seed=args.seed)
        if args.direction == "mean":
            layer = _single(args.layer or "last")
            return fit_legend(states, name=args.name, layer=layer, seed=args.seed, warnings=warnings)
        choice = _choice(args.layer or "sum", states.layers)
        return fit_whitened(FromStates.of(states), name=args.name, layer=choice, seed=args.seed, warnings=warnings)

    async def use(backbone: Backbone, prompts: Prompts) -> Fitted:
        where = {"layers": numbers(args.layers, backbone.info.layers), "position": args.position}
        path = args.save_states or cache / "states.safetensors"
        states = await store_pairs(backbone, prompts, files[0], path, **where, final_norm=args.kind == "legend")
        return await fit_pool(backbone, prompts, files[0], states, head, args.pool, seed=args.seed)

    return with_model(opened, use)


def _in_ray(args: Namespace, opened: OpenModel, cache: Path) -> Fitted:
    """A LEGEND head whose pairs are read by the actors of a cluster; what is made of them is made here."""
    if args.states or args.pool or args.validation or args.save_states or args.covariance:
        raise SetupError(
            "--engine ray reads --pairs: not with --states, --save-states, --validation, --covariance or --pool"
        )
    (pairs,), warnings = _pairs(args)
    whitened = args.direction == "whitened"
    layer = args.layer or ("sum" if whitened else "last")
    _choice(layer, (0,)) if whitened else _single(layer)  # refused before the cluster is started
    with Cluster(actors=args.actors, gpus=args.gpus) as cluster:
        spread = SpreadPairs(cluster, opened, pairs, cache)
        evidence = spread.sums(_layers(args, layer, spread.depth), args.position, scatter=whitened)
        if whitened:
            choice = _choice(layer, evidence.kept.layers)
            return fit_whitened(
                evidence, name=args.name, layer=choice, seed=args.seed, progress=True, warnings=warnings
            )
    return fit_legend(evidence, name=args.name, layer=_single(layer), seed=args.seed, warnings=warnings)


def _legend(args: Namespace, opened: OpenModel, cache: Path) -> Fitted:
    layer = args.layer or "last"
    options: dict[str, Any] = {"name": args.name, "layer": _single(layer), "seed": args.seed}
    if args.covariance:
        raise SetupError("--covariance is for --direction whitened: a mean difference needs none")
    if args.states:
        states = StoredPairs.open(args.states)
        _check_validation(args)
        return fit_legend(states, **options)
    files, warnings = _pairs(args)
    paths = [args.save_states or cache / "states.safetensors", cache / "validation.safetensors"]

    async def store(backbone: Backbone, prompts: Prompts) -> list[StoredPairs]:
        layers = _layers(args, layer, backbone.info.layers)
        where: dict[str, Any] = {"layers": layers, "position": args.position, "final_norm": True}
        return [await store_pairs(backbone, prompts, *one, **where) for one in zip(files, paths, strict=False)]

    states, *validation = with_model(opened, store)
    return fit_legend(states, **options, validation=next(iter(validation), None), warnings=warnings)


def _whitened(args: Namespace, opened: OpenModel, cache: Path) -> Fitted:
    layer = args.layer or "sum"
    _choice(layer, (0,))
    if args.states:
        _check_validation(args)
    files, warnings = ([], []) if args.states else _pairs(args)
    if warnings and not args.covariance:
        warnings.append(
            "S is made of these refusals as well, which hardly vary: --covariance FILE takes it from others"
        )
    evidence, validation, covariance = (
        (FromStates.of(StoredPairs.open(args.states)), None, None)
        if args.states
        else with_model(opened, lambda backbone, prompts: _sums(args, layer, files, cache, backbone, prompts))
    )
    if args.covariance and _is_states(args.covariance):
        covariance = _moments(StoredPairs.open(args.covariance), evidence.kept)
    elif args.covariance and covariance is None:
        covariance = with_model(
            opened, lambda backbone, prompts: _response_sums(args, evidence.kept, cache, backbone, prompts)
        )
    return fit_whitened(
        evidence,
        name=args.name,
        layer=_choice(layer, evidence.kept.layers),
        covariance=covariance,
        covariance_of="the pairs themselves" if covariance is None else Path(args.covariance).name,
        validation=validation,
        seed=args.seed,
        progress=True,
        warnings=warnings,
    )


def _check_validation(args: Namespace) -> None:
    if args.validation:
        raise SetupError("--validation needs --pairs: with --states, give states that hold all pairs")


def _layers(args: Namespace, layer: str, depth: int) -> list[int]:
    """The layers of ``--layers``; where they are all, and one is chosen by ``--layer``, that one only."""
    return numbers(args.layers if args.layers != "all" or layer in ("sum", "sweep") else layer, depth)


def _single(layer: str) -> int | Literal["sweep"] | None:
    """``--layer`` of the published direction."""
    if layer == "sweep":
        return "sweep"
    if layer != "last" and not layer.isdigit():
        raise SetupError(f"--layer {layer}: a number, last or sweep; a sum of layers is for --direction whitened")
    return None if layer == "last" else int(layer)


def _choice(layer: str, layers: Sequence[int]) -> Choice:
    """``--layer`` of a whitened direction."""
    match layer:
        case "sum":
            return "sum"
        case "sweep":
            return "sweep"
        case "last":
            return layers[-1]
        case _ if layer.isdigit():
            return int(layer)
    raise SetupError(f"--layer {layer}: a number, last, sweep or sum")


async def _sums(
    args: Namespace, layer: str, files: Sequence[Sequence[Pair]], cache: Path, backbone: Backbone, prompts: Prompts
) -> tuple[Evidence, PairSource | None, Sequence[Moments] | None]:
    """Evidence, validation states and covariance from texts, with one loading of the model."""
    layers = _layers(args, layer, backbone.info.layers)
    where: dict[str, Any] = {"layers": layers, "position": args.position, "final_norm": True}
    evidence: Evidence
    if args.save_states:
        evidence = FromStates.of(await store_pairs(backbone, prompts, files[0], args.save_states, **where))
    else:
        evidence = await sum_pairs(backbone, prompts, files[0], **where, checkpoint=cache)
    validation = None
    if len(files) > 1:
        validation = await store_pairs(backbone, prompts, files[1], cache / "validation.safetensors", **where)
    if not args.covariance or _is_states(args.covariance):
        return evidence, validation, None
    return evidence, validation, await _response_sums(args, evidence.kept, cache, backbone, prompts)


async def _response_sums(
    args: Namespace, like: PairSource, cache: Path, backbone: Backbone, prompts: Prompts
) -> Sequence[Moments]:
    return await sum_responses(
        backbone,
        prompts,
        read_texts(args.covariance),
        layers=like.layers,
        position=like.origin.position,
        final_norm=like.origin.final_norm,
        checkpoint=cache,
    )


def _moments(states: StoredPairs, like: PairSource) -> list[Moments]:
    """Of all responses in a file of states, at the layers that are fitted."""
    own, wanted = (states.width, states.origin.position), (like.width, like.origin.position)
    if own != wanted:
        raise DataError(
            f"{states.path} holds states of width {own[0]} at position {own[1]!r}, the pairs have {wanted[0]} at "
            f"{wanted[1]!r}: the covariance must be of the same model, read at the same position"
        )
    if missing := [k for k in like.layers if k not in states.layers]:
        raise DataError(f"{states.path} lacks layers {', '.join(map(str, missing))}: choose others with --layers")
    found = []
    for layer in like.layers:
        moments = Moments.empty(states.width)
        for _, chosen, rejected in blocks(states, [states.layers.index(layer)]):
            moments.add(chosen[:, 0])
            moments.add(rejected[:, 0])
        found.append(moments)
    return found


def _hybrid(args: Namespace, opened: OpenModel, cache: Path) -> Fitted:
    if args.states:
        states = StoredPairs.open(args.states)
    else:
        pairs = _read(args, args.rows)[: args.limit]
        check_prompts(prompt_groups(pair.prompt for pair in pairs), PROMPTS[args.kind])
        path = args.save_states or cache / "states.safetensors"

        async def store(backbone: Backbone, prompts: Prompts) -> StoredPairs:
            layers = numbers(args.layers, backbone.info.layers)
            return await store_pairs(backbone, prompts, pairs, path, layers=layers, position=args.position)

        states = with_model(opened, store)
    return fit_hybrid(states, name=args.name, gate=args.gate, seed=args.seed, cache=cache)


def _ensemble(args: Namespace, opened: OpenModel) -> Fitted:
    heads = [store.load(path) for path in args.parts]
    for other in heads[1:]:
        if other.manifest.backbone.fingerprint != heads[0].manifest.backbone.fingerprint:
            names = f"{heads[0].manifest.name!r} and {other.manifest.name!r}"
            raise DataError(f"heads {names} were fitted on different backbones: they cannot be one head")
    if args.states:
        states = StoredPairs.open(args.states)
        check_prompts(states.groups_N, PROMPTS[args.kind])
        judges = Judges(states.groups_N, states.origin.data_hash)
        return fit_ensemble(heads, score_states(states, heads), judges, name=args.name, seed=args.seed)
    pairs = _read(args, args.rows)[: args.limit]
    groups_N = prompt_groups(pair.prompt for pair in pairs)
    check_prompts(groups_N, PROMPTS[args.kind])

    async def use(backbone: Backbone, prompts: Prompts) -> Fitted:
        for path in args.parts:  # again, as the server would: the backbone is known now
            store.load(path, fingerprint=backbone.info.fingerprint, template=prompts.template)
        scores_PM = await score_pairs(backbone, prompts, pairs, heads)
        return fit_ensemble(heads, scores_PM, Judges(groups_N, data_hash(pairs)), name=args.name, seed=args.seed)

    return with_model(opened, use)


def _value(args: Namespace, opened: OpenModel, cache: Path) -> Fitted:
    asked = read_prompts(args.rows)[: args.limit]
    check_prompts(prompt_groups(asked), PROMPTS[args.kind])
    of = store.load_manifest(args.of)
    if of.kind in ("srr", "value"):
        raise SetupError(f"--head {of.name}: a {of.kind} head gives no answer a reward of its own")
    how: Sampling = args.sampling
    given = how.model_dump(exclude={"max_tokens", "seed", "stop"})
    seed = args.seed if how.seed is None else how.seed
    spec = SamplingSpec(
        args.samples, max_tokens=how.max_tokens or DRAWN_TOKENS, seed=seed, stop=tuple(how.stop), **given
    )
    at = [point for point in args.at if point < spec.max_tokens]

    async def draw(backbone: Backbone, prompts: Prompts) -> tuple[Head, Runs]:
        head = store.load(args.of, fingerprint=backbone.info.fingerprint, template=prompts.template)
        layers = numbers(args.layers, backbone.info.layers) if args.layers else quarters(backbone.info.layers)
        return head, await draw_runs(backbone, prompts, head, asked, spec, at=at, layers=layers, cache=cache)

    head, runs = with_model(opened, draw)
    return fit_value(runs, head, name=args.name, seed=args.seed)


def quarters(depth: int) -> list[int]:
    """Four layers, evenly spaced, the last among them."""
    return sorted({max(1, round(depth * k / 4)) for k in range(1, 5)})


def _guard(args: Namespace, opened: OpenModel) -> Fitted:
    texts = read_texts(args.rows, acceptable=True)[: args.limit]
    GuardThresholds.check(sum(len(responses) for _, responses in texts))

    async def use(backbone: Backbone, prompts: Prompts) -> Fitted:
        head = store.load(args.of, fingerprint=backbone.info.fingerprint, template=prompts.template)
        return await fit_guard(backbone, prompts, head, texts, name=args.name, pool=args.pool or "")

    return with_model(opened, use)


def _srr(args: Namespace, opened: OpenModel, cache: Path) -> Fitted:
    states = load_list_states(args.states) if args.states else _states_of_lists(args, opened, cache)
    layer = args.layer or "0.25"
    chosen: int | float | Literal["sweep"] = "sweep"
    try:
        if layer != "sweep":
            chosen = float(layer) if "." in layer else int(layer)
    except ValueError:
        raise SetupError(f"--layer {layer}: a number, a fraction such as 0.25, or sweep") from None
    return fit_srr(states, name=args.name, layer=chosen, seed=args.seed)


def _states_of_lists(args: Namespace, opened: OpenModel, cache: Path) -> ListStates:
    lists = read_lists(args.rows)[: args.limit]
    mixed = [one.prompt for one in lists if len({response.safe for response in one.responses}) == 2]
    check_prompts(prompt_groups(mixed), PROMPTS[args.kind], "with a safe and an unsafe response")

    async def extract(backbone: Backbone, prompts: Prompts) -> ListStates:
        layers = numbers(args.layers, backbone.info.layers)
        return await extract_lists(backbone, prompts, lists, layers=layers, position=args.position, cache=cache)

    states = with_model(opened, extract)
    if args.save_states:
        save_states(states, args.save_states)
    return states


def _read(args: Namespace, path: Path) -> list[Pair]:
    """The pairs of a file, as the options say."""
    names = columns(args.columns)
    return read_pairs(path, layout=args.layout, columns=names, parse_json=args.parse_json, advice=ADVICE)


def _pairs(args: Namespace) -> tuple[list[list[Pair]], list[str]]:
    """The pairs of the file to fit on, and of the one to validate on, and what is to be warned of."""
    plain = args.layout == AUTO and not args.columns
    rows: Sequence[Pair | CalibrationRow] = (
        read_calibration(args.rows) if plain and has_refusals(args.rows) else _read(args, args.rows)
    )
    rows = rows[: args.limit]
    files = [[row.pair if isinstance(row, CalibrationRow) else row for row in rows]]
    if args.validation:
        files.append(_read(args, args.validation))
    least = (3 if args.direction == "mean" else 2) - bool(args.validation)  # a mean holds some out to choose its layer
    for pairs, fewest in zip(files, (least, 2), strict=False):
        check_prompts(prompt_groups(pair.prompt for pair in pairs), fewest)
    return files, constant_refusal(rows)


def numbers(text: str, depth: int) -> list[int]:
    """Layer numbers; the embedding (0) is not among ``all``, since it knows one token only.

    Raises:
        DataError: neither a list of numbers nor one of the words.
    """
    if text == "all":
        return list(range(1, depth + 1))
    if text == "last":
        return [depth]
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise DataError(f"layers {text!r}: all, last, or numbers from 0 to {depth} such as 8,12,16") from None


def _is_states(path: Path) -> bool:
    return path.suffix == ".safetensors"
