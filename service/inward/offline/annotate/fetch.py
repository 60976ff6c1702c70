"""Inputs that are no path: standard input, and datasets of a hub."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from pathlib import Path

from inward.errors import SetupError
from inward_client.rows import Source

STDIN = "-"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
CONVERTED = "refs/convert/parquet"
"""Where a hub keeps every dataset as Parquet, so that none of a dataset's own code is run."""
_PIECE = 1 << 20


def spool(out: Path) -> Path:
    """Standard input as a file beside the output: JSON lines, or one JSON array.

    Its time is made of its content, so that a job that was stopped goes on when the same is given again.

    Raises:
        SetupError: nothing was given, or OUT has no folder.
    """
    if not out.parent.is_dir():
        raise SetupError(f"{out.parent} is not a folder")
    digest, beside = hashlib.sha256(), out.with_name(f"{out.name}.stdin")
    first = b""
    with beside.open("wb") as file:
        while piece := sys.stdin.buffer.read(_PIECE):
            first = first or piece.lstrip()[:1]
            digest.update(piece)
            file.write(piece)
    if not first:
        beside.unlink()
        raise SetupError("IN is -, but nothing came from standard input")
    named = beside.with_name(beside.name + (".json" if first == b"[" else ".jsonl"))
    beside.replace(named)
    time_ns = int.from_bytes(digest.digest()[:6], "big") * 1000
    os.utime(named, ns=(time_ns, time_ns))
    return named


def is_hub_id(path: Path) -> bool:
    """Whether an input is none of this machine's files, and could be ``organisation/dataset``."""
    return not path.exists() and HUB_ID.fullmatch(path.as_posix()) is not None


def from_hub(name: str, split: str, config: str | None = None) -> Source:
    """A split of a hub's dataset, fetched into the hub's cache.

    Raises:
        SetupError: the hub can't be reached, or has no such dataset or split.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    pattern = f"{config or '*'}/{split}/*.parquet"
    try:
        folder = Path(snapshot_download(name, repo_type="dataset", revision=CONVERTED, allow_patterns=pattern))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        told = str(error).split("\n")[0]
        raise SetupError(f"{name} is no path here, and was not fetched as a dataset of the hub: {told}") from None
    configs = sorted({path.parts[-3] for path in folder.glob(pattern)})
    if not configs:
        raise SetupError(f"the hub's dataset {name} has no split {split!r}: name another with --split")
    if len(configs) > 1:
        raise SetupError(f"{name} has the configurations {', '.join(configs)}: name one, as --split CONFIG/{split}")
    return Source(split, tuple(sorted(folder.glob(f"{configs[0]}/{split}/*.parquet"))), "parquet")
