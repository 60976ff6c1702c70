"""``inward evaluate``: how good is a head, beside everything that it has to beat."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from inward.commands import COMMANDS
from inward.commands.options import MODEL_SETTINGS, add_settings, head_folder, settings_of
from inward.errors import DataError, SetupError
from inward.heads import store
from inward.heads.base import Head, Manifest
from inward.types import Kind, Position

if TYPE_CHECKING:
    from inward.offline.evaluate.examples import Examples
    from inward.offline.evaluate.judge import Judgement
    from inward.offline.evaluate.report import Origin, Rows

EPILOG = """examples:
  inward evaluate --head hybrid --pairs pairs.jsonl --html report.html
  inward evaluate --head heads/ranker --lists lists.jsonl --json
  inward evaluate --cross-validate hybrid --states states.safetensors

Pairs: prompt, chosen, rejected. Lists: prompt, responses: [{"text", "safe"}, …].
Responses: prompt, response, safe; or, as XSTest has them, prompt, response, type, label (1 compliance, 2 refusal,
3 partial)."""
POSITIONS: dict[Kind, Position] = {"legend": "last", "hybrid": "eos", "srr": "last"}


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "evaluate",
        help=COMMANDS["evaluate"],
        description="Judges a head on pairs, lists, labelled responses or saved states: every figure with its 95 % "
        "interval, resampled by "
        "prompt, beside length, mean difference, a logistic probe, TF-IDF and stable rank.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--head", metavar="NAME", help="name of a head in the heads folder, or the folder of one")
    source = parser.add_mutually_exclusive_group(required=True)
    for name, about in {
        "pairs": "labelled pairs",
        "lists": "lists of labelled responses",
        "responses": "single labelled responses",
        "states": "states saved by inward fit --save-states; needs no model",
    }.items():
        source.add_argument(f"--{name}", type=Path, metavar="FILE", help=about)
    parser.add_argument(
        "--cross-validate",
        nargs="?",
        const="like",
        choices=["like", *get_args(Kind)],
        metavar="KIND",
        help="judge heads that are refitted on the other folds: of the kind of --head, or of KIND (legend, hybrid, "
        "srr)",
    )
    parser.add_argument("--json", action="store_true", help="the whole report as JSON on standard output")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="also write one self-contained HTML file with pictures"
    )
    parser.add_argument(
        "--baselines", action=argparse.BooleanOptionalAction, default=True, help="beside them (default: yes)"
    )
    parser.add_argument(
        "--layers", default="all", help="layers to read: all, head, or numbers such as 8,12,16 (default: %(default)s)"
    )
    parser.add_argument(
        "--position",
        choices=["last", "eos", "mean"],
        help="without --head: where a response is read (hybrid: eos, else last)",
    )
    parser.add_argument("--folds", type=int, default=5, help="of every cross-validation (default: %(default)s)")
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of folds, bootstrap and refits (default: %(default)s)")
    parser.add_argument("--response-tokens", type=int, metavar="N", help="judge by the first N tokens of each response")
    parser.add_argument("--limit", type=int, metavar="N", help="judge the first N rows only")
    parser.add_argument("--parse-json", action="store_true", help="read messages that are stored as JSON text")
    add_settings(parser, (*MODEL_SETTINGS, "heads"))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    # scikit-learn and matplotlib take their time to import: not for those who serve
    from rich.console import Console

    from inward.offline.evaluate.tables import table

    _check(args)
    folder = head_folder(args, args.head) if args.head else None
    judgement, report = _judge_states(args, folder) if args.states else _judge_rows(args, folder)
    if args.html:
        from inward.offline.evaluate.page import page

        args.html.parent.mkdir(parents=True, exist_ok=True)
        args.html.write_text(page(judgement, report), encoding="utf-8")
    if args.json:
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        Console(width=None if Console().is_terminal else 200, highlight=False).print(table(judgement, report))
    if args.html:
        print(f"wrote {args.html}", file=sys.stderr)
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.head is None and args.cross_validate in (None, "like"):
        raise SetupError(
            "name a head with --head, or a kind of head to refit with --cross-validate legend | hybrid | srr"
        )
    if args.folds < 3:
        raise SetupError(f"--folds {args.folds}: at least 3, since a layer is chosen on folds that are not judged")
    if args.resamples < 1:
        raise SetupError(f"--resamples {args.resamples}: at least 1")


def _judge_states(args: argparse.Namespace, folder: Path | None) -> tuple[Judgement, dict[str, Any]]:
    """Without a model: the head's taps are evaluated on the stored states."""
    from inward.offline.evaluate.report import Origin, of_states
    from inward.offline.states.saved import PairStates, load_states

    states = load_states(args.states)
    if args.limit is not None:
        first = np.arange(min(args.limit, len(states)))
        states = states.rows(first) if isinstance(states, PairStates) else states.lists(first)
    notes = []
    if folder and states.backbone is None:
        notes.append(
            "the states do not say which backbone they are of, so it was not checked that the head belongs to them"
        )
    origin = states.backbone
    head = None
    if folder:
        named = origin.name if origin else "unknown"
        head = store.load(
            folder, template=states.template, fingerprint=origin.fingerprint if origin else None, backbone=named
        )
    return _judge(args, head, of_states(states), Origin(states, states.data_hash), None, notes)


def _judge_rows(args: argparse.Namespace, folder: Path | None) -> tuple[Judgement, dict[str, Any]]:
    """Texts: their states are read through the model first."""
    from inward.offline.evaluate.report import read_rows

    source = next(name for name in ("pairs", "lists", "responses") if getattr(args, name))
    path = getattr(args, source)
    rows = read_rows(source, path, args.limit, parse_json=args.parse_json)  # type: ignore[arg-type]
    cache = _cache_folder(rows)
    head, examples, origin, seconds = asyncio.run(_read(args, folder, rows, cache))
    shutil.rmtree(cache, ignore_errors=True)
    notes = [f"{rows.left_out} partial refusals were left out"] if rows.left_out else []
    if args.response_tokens is not None:
        notes.append(f"responses were cut after their first {args.response_tokens} tokens")
    return _judge(args, head, examples, origin, seconds, notes)


async def _read(
    args: argparse.Namespace, folder: Path | None, rows: Rows, cache: Path
) -> tuple[Head | None, Examples, Origin, float]:
    from inward.offline.evaluate.report import extract, shorten
    from inward.processes.wiring import find_model, open_backbone, open_prompts

    settings = settings_of(args)
    model = find_model(settings)
    backbone = open_backbone(settings, model)
    try:
        info = backbone.info
        prompts = open_prompts(settings, model, info.max_tokens)
        head = None
        if folder:
            head = store.load(
                folder,
                fingerprint=info.fingerprint,
                template=prompts.template,
                depth=info.layers,
                width=info.width,
                backbone=info.name,
            )
        kind = _kind(args, head)
        examples, origin, seconds = await extract(
            backbone,
            prompts,
            rows if args.response_tokens is None else shorten(rows, prompts, args.response_tokens),
            layers=_layers(args, head.manifest if head else None, info.layers),
            position=head.manifest.position if head else args.position or POSITIONS[kind],
            final_norm=head.manifest.final_norm if head else kind == "legend",
            untrained=args.baselines,
            cache=cache,
        )
        return head, examples, origin, seconds
    finally:
        await backbone.close()


def _judge(
    args: argparse.Namespace,
    head: Head | None,
    examples: Examples,
    origin: Origin,
    seconds: float | None,
    notes: list[str],
) -> tuple[Judgement, dict[str, Any]]:
    """The judgement, and the report as ``--json`` prints it."""
    from inward.offline.data.pairs import grouped_folds
    from inward.offline.evaluate.judge import judge
    from inward.offline.evaluate.report import refit
    from inward.offline.evaluate.scoring import score, score_folds

    needed = args.baselines or args.cross_validate
    folds = grouped_folds(examples.prompt_M, min(args.folds, examples.prompts), args.seed) if needed else []
    heads: Sequence[Head] = [head] if head else []
    if args.cross_validate:
        heads = refit(_kind(args, head), head, examples, origin, folds, args.seed)
    elif head and head.manifest.fit.get("data") == origin.data:
        notes.append("the head was fitted on these very rows, which flatters it: use other rows, or --cross-validate")
    started = time.perf_counter()
    ours = score_folds(heads, folds, examples) if args.cross_validate else score(heads[0], examples)
    spent = time.perf_counter() - started
    shown = heads[0].manifest
    scorer_layer = shown.layers[0] if shown.kind == "srr" else None
    judgement = judge(
        examples,
        ours,
        folds if args.baselines else (),
        layer=scorer_layer,
        resamples=args.resamples,
        seed=args.seed,
        progress=True,
    )
    head_ms = 1e3 * spent / (len(examples) * len(heads))
    report = {
        "input": {
            "file": next(Path(p).name for p in (args.pairs, args.lists, args.responses, args.states) if p),
            "kind": examples.source,
            "responses": len(examples),
            "prompts": examples.prompts,
            "comparisons": len(examples.pairs_P2),
            "mixed_lists": len(examples.mixed),
            "layers": list(examples.layers),
            "cross_validated": bool(args.cross_validate),
            "folds": len(folds),
            "resamples": args.resamples,
            "seed": args.seed,
        },
        "head": _describe(shown, head, args.cross_validate),
        **judgement.to_json(),
        "cost": {
            "head_ms": head_ms,
            "with_forward_ms": None if seconds is None else head_ms + 1e3 * seconds / len(examples),
            "with_generation_ms": None,
        },
        "notes": notes,
    }
    return judgement, report


def _describe(manifest: Manifest, head: Head | None, cross_validated: str | None) -> dict[str, Any]:
    return {
        "name": f"{head.manifest.name if head else manifest.kind}{', refitted' if cross_validated and head else ''}",
        "kind": manifest.kind,
        "version": head.manifest.version if head else manifest.version,
        "layers": list(manifest.layers),
        "position": manifest.position,
        "backbone": manifest.backbone.name,
    }


def _kind(args: argparse.Namespace, head: Head | None) -> Kind:
    """Of the heads that are judged."""
    if args.cross_validate not in (None, "like"):
        chosen: Kind = args.cross_validate
        return chosen
    assert head is not None
    return head.manifest.kind


def _layers(args: argparse.Namespace, manifest: Manifest | None, depth: int) -> list[int]:
    """Layers to read; the head's are always among them."""
    own = set(manifest.layers) if manifest else set()
    if args.layers == "head" or (args.layers == "all" and not args.baselines and not args.cross_validate):
        return sorted(own or range(1, depth + 1))
    if args.layers == "all":
        return sorted(own | set(range(1, depth + 1)))
    try:
        return sorted(own | {int(part) for part in args.layers.split(",")})
    except ValueError:
        raise DataError(f"--layers {args.layers}: all, head, or numbers from 0 to {depth} such as 8,12,16") from None


def _cache_folder(rows: Rows) -> Path:
    """Finished parts of the pass through the model: found again after an interruption, removed once it is through."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return base / "inward" / "states" / f"evaluate-{rows.data.rpartition(':')[2]}"
