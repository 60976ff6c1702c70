"""Converted models on disk: one folder for each file and dtype, made once, by whoever needs it first."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from inward.backbones.fingerprint import ORIGIN, Origin
from inward.backbones.gguf.header import Header, read_header
from inward.errors import SetupError
from inward.files import replace_folder, sync, write

LOG = logging.getLogger(__name__)
CONVERSION = 1
"""Raised whenever the conversion begins to make another model of the same file: heads of the old one don't fit it."""
_CHUNK_BYTES = 2**22
_SPARE_BYTES = 64 * 2**20
"""Room for the tokenizer and the settings, beside the weights."""


def converted(file: Path, dtype: str = "auto", device: str = "auto") -> Path:
    """The folder of the Hugging Face model that ``file`` holds. Takes a minute or more the first time, then no longer
    than a hash.

    Args:
        dtype: as ``load_model`` takes it, and ``device``. The weights are kept in bfloat16 where that is what will be
            computed in, else in float32.

    Raises:
        SetupError: the file can't be converted (nothing is left behind), or there is no room for it.
    """
    file, root = file.absolute(), _root()
    known, converts = _known(file, root), find_spec("torch") is not None
    header = read_header(file) if converts and not known else None
    digest = known or _digest(file)
    exact, rounded = (root / f"{digest[:32]}-{kept}" for kept in ("float32", "bfloat16"))
    if _is_whole(exact):  # right for whatever is computed in
        folder = exact
    elif not converts:
        folder = _without_torch(file, rounded)
    else:
        folder = rounded if _computes_in_bfloat16(dtype, device) else exact
        if not _is_whole(folder):
            _convert_alone(header or read_header(file), digest, folder)
    if not known:
        _remember(file, root, digest)
    return folder


def kept(file: Path) -> Path | None:
    """The folder that ``file`` was converted to before, as it was noted; neither is looked into."""
    root = _root()
    digest = _known(file.absolute(), root)
    folders = [] if digest is None else [root / f"{digest[:32]}-{dtype}" for dtype in ("float32", "bfloat16")]
    return next((folder for folder in folders if (folder / ORIGIN).is_file()), None)


def _convert_alone(header: Header, digest: str, folder: Path) -> None:
    """Converts, unless another process did so in the meantime."""
    root = folder.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f".{folder.name}.lock", header.path.name):
            if not _is_whole(folder):
                _convert(header, digest, folder)
    except OSError as error:
        raise SetupError(f"{header.path} cannot be converted in {root}: {error}; set XDG_CACHE_HOME") from error
    finally:
        with suppress(OSError):  # not empty, where all is well
            root.rmdir()


def _convert(header: Header, digest: str, folder: Path) -> None:
    """Writes aside, then renames: whoever sees ``folder`` sees all of it."""
    from tqdm import tqdm

    from inward.backbones.gguf.conversion import STEPS, convert

    for left in folder.parent.glob(f".{folder.name}-*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    dtype = folder.name.rpartition("-")[2]
    _check_room(header, folder.parent, dtype)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        with tqdm(total=STEPS, desc=f"converting {header.path.name}, once", unit="step", file=sys.stderr) as bar:

            def step(name: str) -> None:
                bar.set_postfix_str(name, refresh=False)
                bar.update()

            convert(header, aside, dtype, step)
            _sign(aside, header.path.name, digest)
        aside.chmod(0o755)
        for path in aside.iterdir():
            path.chmod(0o644)
            sync(path)
        if folder.exists():
            LOG.warning("%s is not as it was written: it is converted anew", folder)
        replace_folder(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _sign(folder: Path, name: str, digest: str) -> None:
    """Leaves a note of what the folder was made of, and of what it is, so that a change shows."""
    from inward.backbones.tokenizer import PROBES, load_tokenizer

    tokenizer = load_tokenizer(folder)
    tokens = [tokenizer(text)["input_ids"] for text in PROBES]
    probe = hashlib.sha256(json.dumps([tokens, tokenizer.chat_template]).encode()).hexdigest()[:32]
    Origin(file=name, sha256=digest, conversion=CONVERSION, tokens=probe).write(folder)


def _is_whole(folder: Path) -> bool:
    """Whether the folder is there, as it was written."""
    try:
        return Origin.read(folder) is not None
    except SetupError:
        return False


def _computes_in_bfloat16(dtype: str, device: str) -> bool:
    import torch

    from inward.backbones.device import choose_device, choose_dtype

    return choose_dtype(dtype, choose_device(device)) == torch.bfloat16


def _without_torch(file: Path, folder: Path) -> Path:
    """For who needs the tokenizer only."""
    if _is_whole(folder):
        return folder
    raise SetupError(
        f"{file} has not been converted in {folder.parent}, and without torch it can't be: start a worker with this "
        "XDG_CACHE_HOME first, or give the folder that it converted the file to"
    )


def cache_root() -> Path:
    """Where this user's copies of what can be made again are."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "inward"


def _root() -> Path:
    return cache_root() / "gguf"


def _check_room(header: Header, root: Path, dtype: str) -> None:
    needed = sum(tensor.values for tensor in header.tensors.values()) * (2 if dtype == "bfloat16" else 4) + _SPARE_BYTES
    free = shutil.disk_usage(root).free
    if free < needed:
        gib = 2**30
        raise SetupError(
            f"converting {header.path} takes {needed / gib:.1f} GiB in {root}, and {free / gib:.1f} GiB are free: "
            "set XDG_CACHE_HOME"
        )


@contextmanager
def _locked(lock: Path, name: str) -> Iterator[None]:
    """Only one process at a time. Where the file system has no locks, all convert, and the last to rename wins."""
    with lock.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process is converting {name}: waiting for it", file=sys.stderr)
            fcntl.flock(held, fcntl.LOCK_EX)
        except OSError:
            LOG.debug("%s can't be locked", lock)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _digest(file: Path) -> str:
    """SHA-256 of the file."""
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise SetupError(f"{file} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _known(file: Path, root: Path) -> str | None:
    """The hash of a file that was converted before, as long as its size and its time of change are the same."""
    try:
        note = json.loads(_note(file, root).read_text(encoding="utf-8"))
        return str(note["sha256"]) if note["file"] == _stamp(file) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(file: Path, root: Path, digest: str) -> None:
    note = _note(file, root)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        write(note, json.dumps({"file": _stamp(file), "sha256": digest}).encode())
    except OSError:  # the next start will be slower, that is all
        LOG.debug("%s could not be written", note)


def _note(file: Path, root: Path) -> Path:
    return root / "hashes" / f"{hashlib.sha256(str(file).encode()).hexdigest()[:32]}.json"


def _stamp(file: Path) -> list[str | int]:
    stat = file.stat()
    return [str(file), stat.st_size, stat.st_mtime_ns]
