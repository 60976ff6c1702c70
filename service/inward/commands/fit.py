"""``inward fit legend | hybrid | srr``: texts or saved states in, a head out, and a report of what was found."""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from inward.backbones.base import Backbone
from inward.commands import COMMANDS
from inward.commands.options import MODEL_SETTINGS, add_settings, settings_of
from inward.errors import DataError, SetupError
from inward.heads import store
from inward.heads.base import Head
from inward.offline.data.pairs import CalibrationRow, Pair, has_refusals, read_calibration, read_lists, read_pairs
from inward.offline.states.read import extract_lists, extract_pairs
from inward.offline.states.saved import ListStates, PairStates, load_list_states, load_pair_states, save_states
from inward.processes.wiring import find_model, open_backbone, open_prompts
from inward.prompts import Prompts
from inward.types import Position

EPILOG = {
    "legend": "example: inward fit legend --pairs calibration.jsonl --layer sweep --out heads/safety\n"
    "Rows: prompt, harmful, refusal (the paper's calibration) or prompt, chosen, rejected (labelled pairs).",
    "hybrid": "example: inward fit hybrid --pairs pairs.jsonl --out heads/hybrid\nRows: prompt, chosen, rejected.",
    "srr": 'example: inward fit srr --lists lists.jsonl --layer 0.25 --out heads/ranker\nRows: prompt, responses: [{"text", "safe"}, …].',
}
ABOUT = {
    "legend": "a safety direction without training (arXiv 2406.08124)",
    "hybrid": "a linear probe per layer and a gate (arXiv 2503.10093)",
    "srr": "a listwise ranker of safe responses (arXiv 2505.15710)",
}


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "fit", help=COMMANDS["fit"], description="Fits a head for a model, from JSONL or Parquet, or from states."
    )
    kinds = parser.add_subparsers(dest="kind", metavar="legend|hybrid|srr", required=True)
    for kind, about in ABOUT.items():
        one = kinds.add_parser(
            kind,
            help=about,
            description=f"Fits {about}.",
            epilog=EPILOG[kind],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        source = one.add_mutually_exclusive_group(required=True)
        rows = "lists" if kind == "srr" else "pairs"
        source.add_argument(f"--{rows}", dest="rows", type=Path, metavar="FILE", help="JSONL or Parquet; see below")
        source.add_argument("--states", type=Path, metavar="FILE", help="states of such rows, saved with --save-states")
        one.add_argument(
            "--out", type=Path, required=True, metavar="DIR", help="folder of the head; its name is the head's"
        )
        one.add_argument("--name", help="another name for the head")
        one.add_argument("--replace", action="store_true", help="overwrite a head that is there already")
        one.add_argument(
            "--save-states", type=Path, metavar="FILE", help="keep the states, to fit again without the model"
        )
        one.add_argument(
            "--layers",
            default="all",
            help="layers to read: all, last, or numbers such as 8,12,16 (default: %(default)s)",
        )
        one.add_argument(
            "--position",
            choices=["last", "eos", "mean"],
            help="where a response is read (default: eos for hybrid, else last)",
        )
        one.add_argument("--seed", type=int, default=0, help="of splits and training (default: %(default)s)")
        one.add_argument("--limit", type=int, metavar="N", help="use the first N rows only")
        one.add_argument("--parse-json", action="store_true", help="read messages that are stored as JSON text")
        _ADD[kind](one)
        add_settings(one, MODEL_SETTINGS)
    parser.set_defaults(run=run)


def _add_legend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layer", default="last", help="a number, last, or sweep: choose by validation (default: %(default)s)"
    )
    parser.add_argument(
        "--validation", type=Path, metavar="FILE", help="labelled pairs that choose the layer and give the agreement"
    )


def _add_hybrid(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gate", choices=["sigmoid", "softmax"], default="sigmoid", help="default: %(default)s")


def _add_srr(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layer",
        default="0.25",
        help="a number, a fraction of the depth such as 0.25, or sweep (default: %(default)s)",
    )


_ADD = {"legend": _add_legend, "hybrid": _add_hybrid, "srr": _add_srr}


def run(args: argparse.Namespace) -> int:
    if args.out.exists() and not args.replace:
        raise SetupError(f"{args.out} exists already: choose another folder, or say --replace")
    args.name = args.name or args.out.name
    args.position = args.position or ("eos" if args.kind == "hybrid" else "last")
    cache = _cache_folder(args)
    head, report = {"legend": _legend, "hybrid": _hybrid, "srr": _srr}[args.kind](args, cache)
    path = store.save(head, args.out, replace=args.replace)
    shutil.rmtree(cache, ignore_errors=True)
    console = Console(width=None if Console().is_terminal else 120)
    console.print(report)
    console.print(f"saved {args.kind} head {head.ref.name!r} in {path}")
    return 0


_BY_NAME: dict[str, Literal["sweep"] | None] = {"sweep": "sweep", "last": None}


def _legend(args: argparse.Namespace, cache: Path) -> tuple[Head, Any]:
    from inward.offline.fit.legend import constant_refusal, fit_legend

    if args.layer not in _BY_NAME and not args.layer.isdigit():
        raise SetupError(f"--layer {args.layer}: a number, last or sweep")
    warnings: list[str] = []
    validation = None
    if args.states:
        states = load_pair_states(args.states)
        if args.validation:
            raise SetupError("--validation needs --pairs: with --states, give states that hold all pairs")
    else:
        rows: Sequence[Pair | CalibrationRow] = (
            read_calibration(args.rows)
            if has_refusals(args.rows)
            else read_pairs(args.rows, parse_json=args.parse_json)
        )
        rows = rows[: args.limit]
        warnings = constant_refusal(rows)
        pairs = [[row.pair if isinstance(row, CalibrationRow) else row for row in rows]]
        if args.validation:
            pairs.append(read_pairs(args.validation, parse_json=args.parse_json))
        layers = (
            "last"
            if args.layer == "last" and args.layers == "all"
            else args.layer
            if args.layer.isdigit()
            else args.layers
        )
        states, *more = _states_of_pairs(args, pairs, layers, cache, final_norm=True)
        validation = more[0] if more else None
    options: dict[str, Any] = {"name": args.name, "validation": validation, "seed": args.seed, "warnings": warnings}
    return fit_legend(states, layer=int(args.layer) if args.layer.isdigit() else _BY_NAME[args.layer], **options)


def _hybrid(args: argparse.Namespace, cache: Path) -> tuple[Head, Any]:
    from inward.offline.fit.hybrid import fit_hybrid

    if args.states:
        states = load_pair_states(args.states)
    else:
        pairs = read_pairs(args.rows, parse_json=args.parse_json)[: args.limit]
        [states] = _states_of_pairs(args, [pairs], args.layers, cache)
    return fit_hybrid(states, name=args.name, gate=args.gate, seed=args.seed)


def _srr(args: argparse.Namespace, cache: Path) -> tuple[Head, Any]:
    from inward.offline.fit.srr import fit_srr

    states = load_list_states(args.states) if args.states else _states_of_lists(args, cache)
    if args.layer == "sweep":
        return fit_srr(states, name=args.name, layer="sweep", seed=args.seed)
    try:
        layer = float(args.layer) if "." in args.layer else int(args.layer)
    except ValueError:
        raise SetupError(f"--layer {args.layer}: a number, a fraction such as 0.25, or sweep") from None
    return fit_srr(states, name=args.name, layer=layer, seed=args.seed)


def _states_of_pairs(
    args: argparse.Namespace, files: Sequence[Sequence[Pair]], layers: str, cache: Path, *, final_norm: bool = False
) -> list[PairStates]:
    """The states of each file's pairs, with one loading of the model."""

    async def extract(backbone: Backbone, prompts: Prompts) -> list[PairStates]:
        chosen = _layers(layers, backbone.info.layers)
        position: Position = args.position
        return [
            await extract_pairs(
                backbone, prompts, pairs, layers=chosen, position=position, final_norm=final_norm, cache=cache
            )
            for pairs in files
        ]

    states: list[PairStates] = asyncio.run(_with_model(args, extract))
    if args.save_states:
        save_states(states[0], args.save_states)
    return states


def _states_of_lists(args: argparse.Namespace, cache: Path) -> ListStates:
    lists = read_lists(args.rows)[: args.limit]

    async def extract(backbone: Backbone, prompts: Prompts) -> ListStates:
        return await extract_lists(
            backbone,
            prompts,
            lists,
            layers=_layers(args.layers, backbone.info.layers),
            position=args.position,
            cache=cache,
        )

    states: ListStates = asyncio.run(_with_model(args, extract))
    if args.save_states:
        save_states(states, args.save_states)
    return states


async def _with_model(args: argparse.Namespace, use: Any) -> Any:
    settings = settings_of(args)
    model = find_model(settings)
    backbone = open_backbone(settings, model)
    try:
        return await use(backbone, open_prompts(settings, model, backbone.info.max_tokens))
    finally:
        await backbone.close()


def _layers(text: str, depth: int) -> list[int]:
    """Layer numbers; the embedding (0) is not among ``all``, since it knows one token only."""
    if text == "all":
        return list(range(1, depth + 1))
    if text == "last":
        return [depth]
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise DataError(f"layers {text!r}: all, last, or numbers from 0 to {depth} such as 8,12,16") from None


def _cache_folder(args: argparse.Namespace) -> Path:
    """Finished parts of a pass through the model: found again after an interruption, removed once the head is saved."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return base / "inward" / "states" / str(args.out.resolve()).strip("/").replace("/", "-")
