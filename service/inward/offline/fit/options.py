"""What ``inward fit`` may be asked for, kind by kind."""

from __future__ import annotations

import argparse
from pathlib import Path

from pydantic import ValidationError

from inward.errors import SetupError
from inward.offline import cluster
from inward.offline.options import add_layout, check_least
from inward.wire.requests import Sampling

EPILOG = {
    "legend": """examples:
  inward fit legend --pairs calibration.jsonl --layer sweep --out heads/safety
  inward fit legend --direction whitened --pairs calibration.jsonl --covariance responses.jsonl --out heads/safety

Rows: prompt, harmful, refusal (the paper's calibration) or prompt, chosen, rejected (labelled pairs).""",
    "hybrid": "example: inward fit hybrid --pairs pairs.jsonl --out heads/hybrid\n"
    "Rows: prompt, chosen, rejected, or any layout that inward annotate reads.",
    "srr": "example: inward fit srr --lists lists.jsonl --layer 0.25 --out heads/ranker\n"
    'Rows: prompt, responses: [{"text", "safe"}, …].',
    "ensemble": "example: inward fit ensemble --heads heads/hybrid heads/legend --pairs others.jsonl --out heads/both\n"
    "Rows: prompt, chosen, rejected; best of prompts that none of the heads was fitted on.",
    "value": "example: inward fit value --head hybrid --prompts prompts.jsonl --out heads/hybrid-value\n"
    "Rows: prompt. Each is answered --samples times; better 200 prompts and more.",
    "guard": "example: inward fit guard --head hybrid --safe answers.jsonl --out heads/hybrid\n"
    "Rows: prompt, response (or responses): the acceptable ones, which those labelled safe, chosen or refusal are.",
}
ABOUT = {
    "legend": "a safety direction without training (arXiv 2406.08124)",
    "hybrid": "a linear probe per layer and a gate (arXiv 2503.10093)",
    "srr": "a listwise ranker of safe responses (arXiv 2505.15710)",
    "ensemble": "the weighted sum of several heads' scores, as one head",
    "value": "what a head will say of a finished answer, predicted from any token of it (arXiv 2310.17022)",
    "guard": "a head's thresholds for ending answers, by false-positive rate",
}
DRAWN_TOKENS = 128
"""Most tokens of an answer that a value head is fitted on, where ``--sampling`` does not say."""
ROWS = {"srr": "lists", "value": "prompts", "guard": "safe"}
"""The option that names the rows; pairs where nothing is said."""
FEW_PROMPTS = 100
"""Fewer are told to be too few."""
USUAL = {
    "legend": "some hundred pairs",
    "hybrid": "thousands of pairs",
    "srr": "some hundred lists",
    "ensemble": "thousands of pairs",
    "value": "some hundred prompts",
}
"""What a kind is usually fitted on."""


def add_arguments(parser: argparse.ArgumentParser, kind: str) -> None:
    """The options of ``inward fit KIND``, but those that are settings."""
    _add_common(parser, ROWS.get(kind, "pairs"))
    _ADD[kind](parser)


def check(args: argparse.Namespace) -> None:
    """What can be said of the options, and of the places that are to be written to, before anything is read.

    Raises:
        SetupError: names the option or the place.
    """
    from inward.offline.places import check_head, check_states  # which takes its time: not for --help

    check_least(args, limit=1, seed=0)
    check_head(args.out, args.name, replace=args.replace)
    if kept := getattr(args, "save_states", None):
        check_states(kept)
        if (read := getattr(args, "covariance", None)) and read.resolve() == kept.resolve():
            raise SetupError(f"{kept} is {read}, which is read: name another file, an input is never written to")
    if args.kind == "value":
        if args.samples < 2:
            raise SetupError("--samples: a value head needs two answers to each prompt at least, better eight")
        if args.at[0] >= (drawn := args.sampling.max_tokens or DRAWN_TOKENS):
            raise SetupError(f"--at {args.at[0]}: answers have {drawn} tokens at most; decide sooner, or draw more")


def _add_common(parser: argparse.ArgumentParser, rows: str) -> None:
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(f"--{rows}", dest="rows", type=Path, metavar="FILE", help="JSONL or Parquet; see below")
    if rows in ("pairs", "lists"):
        source.add_argument("--states", type=Path, metavar="FILE", help="states of such rows, saved with --save-states")
    out = "folder of the head; its name is the head's"
    add("--out", type=Path, required=True, metavar="DIR", help=out)
    add("--name", help="another name for the head")
    add("--replace", action="store_true", help="overwrite a head that is there already")
    add("--seed", type=int, default=0, help="of splits and training (default: %(default)s)")
    add("--limit", type=int, metavar="N", help="use the first N rows only")
    if rows == "pairs":
        add_layout(add)
    add("--parse-json", action="store_true", help="read messages that are stored as JSON text")


def _add_states(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    kept = "keep the states, to fit again without the model"
    add("--save-states", type=Path, metavar="FILE", help=kept)
    which = "layers to read: all, last, or numbers such as 8,12,16 (default: %(default)s)"
    add("--layers", default="all", help=which)
    add(
        "--position",
        choices=["last", "eos", "mean"],
        help="where a response is read (default: eos for hybrid, mean with --pool, else last)",
    )
    add(
        "--pool",
        metavar="NAME",
        help="make a response's score of those of all its tokens: last, mean, max_ema, max_rolling, topk, or trained: "
        "gated_mean, attention; with parameters as in max_rolling:window=20 (default: the score at --position)",
    )


def _add_legend(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_states(parser)
    add(
        "--direction",
        choices=["mean", "whitened"],
        default="mean",
        help="mean: the published mean difference; whitened: divided by the covariance of responses, far more accurate "
        "and no training either (default: %(default)s)",
    )
    add(
        "--layer",
        help="a number, last, sweep (choose by validation), or for whitened sum: all layers, standardised "
        "(default: last; whitened: sum)",
    )
    add(
        "--covariance",
        type=Path,
        metavar="FILE",
        help="of whitened: rows with prompt and response(s), labels or none, or saved states, to take S from "
        "(default: of the pairs)",
    )
    add("--validation", type=Path, metavar="FILE", help="labelled pairs that choose the layer and give the agreement")
    cluster.add_arguments(
        parser, "ray: read the pairs on the Ray cluster at $RAY_ADDRESS, in blocks that are put together here"
    )


def _add_hybrid(parser: argparse.ArgumentParser) -> None:
    _add_states(parser)
    parser.add_argument("--gate", choices=["sigmoid", "softmax"], default="sigmoid", help="default: %(default)s")


def _add_srr(parser: argparse.ArgumentParser) -> None:
    _add_states(parser)
    parser.add_argument("--layer", help="a number, a fraction of the depth, or sweep (default: 0.25)")


def _add_ensemble(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--heads",
        dest="parts",
        nargs="+",
        required=True,
        metavar="HEAD",
        help="folders of the heads, or their names in the heads folder of the model",
    )


def _add_value(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_of(parser, "head whose reward is predicted")
    add("--samples", type=int, default=8, metavar="N", help="answers to each prompt (default: 8)")
    add(
        "--sampling", type=_sampling, default=Sampling(), metavar="JSON",
        help=f'how they are drawn, such as {{"top_p": 0.95}} (default: up to {DRAWN_TOKENS} tokens)'
    )  # fmt: skip
    add(
        "--at", type=_points, default=(8, 16, 32, 64), help="tokens after which it may be decided (default: 8,16,32,64)"
    )
    add("--layers", help="layers to choose from: all, last, or numbers (default: four, evenly spaced)")


def _add_guard(parser: argparse.ArgumentParser) -> None:
    _add_of(parser, "head that guards")
    parser.add_argument(
        "--pool", metavar="NAME", help="how scores of tokens make a running one (default: its own, else max_ema)"
    )


def _add_of(parser: argparse.ArgumentParser, what: str) -> None:
    where = "its folder, or its name in the heads folder of the model"
    parser.add_argument("--head", dest="of", required=True, metavar="HEAD", help=f"{what}: {where}")


def _sampling(text: str) -> Sampling:
    """As ``/rerank`` takes it."""
    try:
        return Sampling.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise argparse.ArgumentTypeError(f"{field}: {first['msg']}" if field else first["msg"]) from None


def _points(text: str) -> tuple[int, ...]:
    try:
        points = sorted({int(part) for part in text.split(",")})
    except ValueError:
        points = [0]
    if points[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers of tokens from 1, such as 8,16,32")
    return tuple(points)


_ADD = {
    "legend": _add_legend,
    "hybrid": _add_hybrid,
    "srr": _add_srr,
    "ensemble": _add_ensemble,
    "value": _add_value,
    "guard": _add_guard,
}
