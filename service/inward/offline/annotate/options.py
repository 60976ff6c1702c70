"""What ``inward annotate`` may be asked for: its options, as arguments and as values."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from inward.errors import SetupError
from inward.offline import cluster
from inward.offline.annotate import fetch
from inward.offline.options import add_layout, check_least, columns
from inward_client.rows import AUTO

SUSPICIOUS = 10
"""Pairs that are printed where ``--suspicious`` has no number."""
CLUSTERS = 8
"""Where ``--clusters`` has no number."""
ON_PAGE = 200
"""Pairs on the page."""
PageOf = Literal["suspicious", "sample"]
"""Which pairs: those whose labels are contradicted most, or any, drawn by a hash."""


APPLIED = frozenset({"input", "output", "layout", "columns", "parse_json", "prefix", "restart", "split", "apply"})
"""Options by which ``--apply`` goes."""


@dataclass(frozen=True, slots=True)
class AnnotateOptions:
    """All options, checked by themselves."""

    input: Path
    output: Path
    layout: str = AUTO
    columns: Mapping[str, str] | None = None
    """The layout's columns → the dataset's; an empty name says that there is none."""
    parse_json: bool = False
    trl: bool = False
    prefix: str = ""
    replace_columns: bool = False
    head: str | None = None
    truncate: bool = False
    limit: int | None = None
    url: str | None = None
    engine: Literal["local", "ray"] = "local"
    actors: int = 1
    gpus: float = 0.0
    at_once: int | None = None
    restart: bool = False
    by: str | None = None
    """A column that divides the estimates."""
    apply: Path | None = None
    """Decisions to write into the set; nothing is annotated then."""
    only_flipped: bool = False
    drop_below: float | None = None
    split: str = "train"
    """Of a hub's dataset; with a configuration as ``CONFIG/SPLIT``."""
    argilla: Path | None = None
    clusters: int = 0
    suspicious: int = 0
    html: Path | None = None
    page_rows: int = ON_PAGE
    page_of: PageOf = "suspicious"
    token_scores: bool = False
    json: bool = False

    @property
    def from_stdin(self) -> bool:
        """Whether IN is ``-``."""
        return str(self.input) == fetch.STDIN

    @classmethod
    def of(cls, args: argparse.Namespace) -> AnnotateOptions:
        """From the command line.

        Raises:
            SetupError: names the option.
        """
        given: dict[str, Any] = {field.name: getattr(args, field.name) for field in fields(cls)}
        check_least(args, at_once=1, actors=1, suspicious=0, page_rows=1, clusters=0)
        if args.drop_below is not None and not 0 <= args.drop_below <= 1:
            raise SetupError(f"--drop-below {args.drop_below}: a probability, from 0 to 1")
        if args.token_scores and (args.html is None or args.engine != "local"):
            raise SetupError("--token-scores colours the page of --html, by the model in this process or at --url")
        if args.clusters and (args.url is not None or args.engine != "local"):
            raise SetupError("--clusters reads states, which needs the model in this process")
        if args.apply is not None:
            usual = {field.name: field.default for field in fields(cls)}
            if others := [name for name in given if name not in APPLIED and given[name] != usual[name]]:
                raise SetupError(
                    "--apply writes all rows but those that were dropped, and annotates none: it does not go with "
                    + ", ".join(f"--{name.replace('_', '-')}" for name in others)
                )
        check_least(args, limit=1)
        return cls(**given | {"columns": columns(args.columns)})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds them all."""
    add = parser.add_argument
    add(
        "input",
        metavar="IN",
        type=Path,
        help="a file, a folder of files, a dataset that was saved to disk, a hub's organisation/dataset, or - for JSON "
        "on standard input",
    )
    add("output", metavar="OUT", type=Path, help="a file, or for several tables a folder; its ending is the format")
    add = parser.add_argument_group("what is read and written").add_argument
    add_layout(add)
    add("--parse-json", action="store_true", help="read messages that are stored as JSON text")
    add("--trl", action="store_true", help="write prompt, chosen, rejected and a margin in [0, 1] (the bin)")
    add("--prefix", default="", help="put before the names of the new columns")
    add("--replace-columns", action="store_true", help="overwrite columns that have these names already")
    add("--head", metavar="NAME", help="head that gives the margins (default: the only legend or hybrid one)")
    add(
        "--truncate", action="store_true", help="cut text that is longer than the model takes; else the row is left out"
    )
    add("--only-flipped", action="store_true", help="write only rows whose label the head contradicts")
    add("--drop-below", type=float, metavar="P", help="leave out rows whose label_probability is below P")
    add("--apply", type=Path, metavar="FILE", help="write IN with the decisions that the page gave out; loads no model")
    add("--split", default="train", help="of a hub's dataset; CONFIG/SPLIT where it has several (default: %(default)s)")
    add("--limit", type=int, metavar="N", help="only the first N rows of each table")
    how = parser.add_argument_group("how")
    add = how.add_argument
    add("--url", help="a running service instead of a model here (key: $INWARD_API_KEY, or in the URL)")
    cluster.add_arguments(how, "ray: on the Ray cluster at $RAY_ADDRESS")
    add("--at-once", type=int, metavar="N", help="chunks in flight (default: 1, which is reproducible; with --url 4)")
    add(
        "--restart",
        action="store_true",
        help="throw away what an interrupted job has done, and an OUT (or records of --argilla) that is there",
    )
    add = parser.add_argument_group("what is shown in the end").add_argument
    add("--by", metavar="COLUMN", help="estimate the share of wrong labels for each value of a column, too")
    add(
        "--clusters",
        type=int,
        nargs="?",
        const=CLUSTERS,
        default=0,
        metavar="N",
        help=f"where contradicted labels gather: N ({CLUSTERS}) clusters of states, which are read once more",
    )
    add("--suspicious", type=int, nargs="?", const=SUSPICIOUS, default=0, metavar="N",
        help=f"print the N ({SUSPICIOUS}) pairs whose labels are contradicted most")  # fmt: skip
    add("--html", type=Path, metavar="FILE", help="a page for looking through pairs and deciding on their labels")
    add("--page-rows", type=int, default=ON_PAGE, metavar="N", help="pairs on the page (default: %(default)s)")
    add(
        "--page-of",
        choices=get_args(PageOf),
        default="suspicious",
        help="those whose labels are contradicted most, or a sample of all (default: %(default)s)",
    )
    add("--token-scores", action="store_true", help="with the score of every token of the pairs on the page")
    add("--argilla", type=Path, metavar="FILE", help="records for Argilla, with the head's suggestions")
    add("--json", action="store_true", help="print the summary as JSON")
