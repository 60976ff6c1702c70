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
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

from inward.backbones.fingerprint import Origin
from inward.backbones.gguf.header import Header, read_header
from inward.errors import SetupError
from inward.files import write

LOG = logging.getLogger(__name__)
CONVERSION = 1
"""Raised whenever the conversion begins to make another model of the same file: heads of the old one don't fit it."""
_CHUNK_BYTES = 2**22
_SPARE_BYTES = 64 * 2**20
"""Room for the tokenizer and the settings, beside the weights."""
_PROBES = (
    "In 1984, the  2nd  edition cost £12.50.\n\nIt's naïve, isn't it?",
    "def f(x):\n    return x**2  # 日本語 🙂",
    "<|im_end|></s><eos>",
)
"""Texts whose tokens stand for the tokenizer: digits, spaces, contractions, accents, code, scripts, control tokens."""


def converted(file: Path, dtype: str = "auto", device: str = "auto") -> Path:
    """The folder of the Hugging Face model that ``file`` holds. Takes a minute or more the first time, then no longer
    than a hash.

    Args:
        dtype: as ``load_model`` takes it, and ``device``. The weights are kept in bfloat16 where that is what will be
            computed in, else in float32.

    Raises:
        SetupError: the file can't be converted (nothing is left behind), or there is no room for it.
    """
    file = file.resolve()
    root = _root()
    digest = _digest(file, root)
    if find_spec("torch") is None:
        return _without_torch(file, root, digest)
    kept = _kept_as(dtype, device)
    folder = root / f"{digest[:32]}-{kept}"
    if _is_whole(folder):
        return folder
    header = read_header(file)
    _make_root(root)
    with _alone(root / f".{folder.name}.lock", file):
        if not _is_whole(folder):
            _convert(header, digest, folder, kept)
    return folder


def _convert(header: Header, digest: str, folder: Path, dtype: str) -> None:
    """Writes aside, then renames: whoever sees ``folder`` sees all of it."""
    import torch

    from inward.backbones.gguf.conversion import STEPS, convert

    for left in folder.parent.glob(f".{folder.name}-*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    _check_room(header, folder.parent, dtype)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        with tqdm(
            total=STEPS, desc=f"converting {header.path.name} to {dtype}, once", unit="step", file=sys.stderr
        ) as bar:

            def step(name: str) -> None:
                bar.set_postfix_str(name)
                bar.update()

            convert(header, aside, getattr(torch, dtype), step)
            step("checking")
            _sign(aside, header.path.name, digest)
            step("done")
        aside.chmod(0o755)
        for path in aside.iterdir():
            path.chmod(0o644)
            _flush(path)
        if folder.exists():
            LOG.warning("%s is not as it was written: it is converted anew", folder)
            folder.rename(aside.with_name(f"{aside.name}-old"))
            shutil.rmtree(aside.with_name(f"{aside.name}-old"), ignore_errors=True)
        aside.rename(folder)
        _flush(folder.parent)
    except OSError as error:
        raise SetupError(f"{header.path} cannot be converted in {folder.parent}: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _sign(folder: Path, name: str, digest: str) -> None:
    """Leaves a note of what the folder was made of, and of what it is, so that a change shows."""
    from inward.backbones.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    tokens = [tokenizer(text)["input_ids"] for text in _PROBES]
    probe = hashlib.sha256(json.dumps([tokens, tokenizer.chat_template]).encode()).hexdigest()[:32]
    Origin(file=name, sha256=digest, conversion=CONVERSION, tokens=probe).write(folder)


def _is_whole(folder: Path) -> bool:
    """Whether the folder is there, as it was written."""
    try:
        return Origin.read(folder) is not None
    except SetupError:
        return False


def _kept_as(dtype: str, device: str) -> str:
    import torch

    from inward.backbones.transformers.model import choose_device, choose_dtype

    return "bfloat16" if choose_dtype(dtype, choose_device(device)) == torch.bfloat16 else "float32"


def _without_torch(file: Path, root: Path, digest: str) -> Path:
    for kept in ("bfloat16", "float32"):
        if _is_whole(folder := root / f"{digest[:32]}-{kept}"):
            return folder
    raise SetupError(
        f"{file} has not been converted in {root}, and without torch it can't be: start a worker with the same "
        "XDG_CACHE_HOME first, or give the folder that it converted the file to"
    )


def _root() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "inward" / "gguf"


def _make_root(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(
            f"{root}, where converted models are kept, can't be made ({error.strerror}): set XDG_CACHE_HOME"
        ) from error


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
def _alone(lock: Path, file: Path) -> Iterator[None]:
    """Only one process at a time. Where the file system has no locks, the first to rename wins."""
    try:
        with lock.open("w") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"another process is converting {file.name}: waiting for it", file=sys.stderr)
                fcntl.flock(held, fcntl.LOCK_EX)
            except OSError:  # no locks here
                pass
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
    except OSError as error:
        raise SetupError(
            f"{lock.parent}, where converted models are kept, can't be written to: {error.strerror}; set XDG_CACHE_HOME"
        ) from error


def _digest(file: Path, root: Path) -> str:
    """SHA-256 of the file; remembered for as long as its path, size and time of change stay the same."""
    try:
        stat = file.stat()
        seen = [str(file), stat.st_size, stat.st_mtime_ns]
        note = root / "hashes" / f"{hashlib.sha256(str(file).encode()).hexdigest()[:32]}.json"
        try:
            known = json.loads(note.read_text(encoding="utf-8"))
            if known["of"] == seen and len(known["sha256"]) == 64:
                return str(known["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise SetupError(f"{file} cannot be read: {error.strerror}") from error
    _remember(note, {"of": seen, "sha256": digest.hexdigest()})
    return digest.hexdigest()


def _remember(note: Path, content: object) -> None:
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        write(note, json.dumps(content).encode())
    except OSError:  # a cache that can't be written to makes the next start slower, that is all
        LOG.debug("%s could not be written", note)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
