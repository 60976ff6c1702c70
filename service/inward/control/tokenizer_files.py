"""The tokenizer and the settings of a model, as a worker sends them to replicas whose model is one file with its
weights (GGUF): so a replica needs neither the file nor what reads it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import zlib
from collections.abc import Mapping
from pathlib import Path

from inward import codec, logs
from inward.control.channel import ControlChannel
from inward.errors import SetupError, Unavailable
from inward.files import whole_folder

LOG = logs.logger("control")
VERB = "tokenizer"
"""What a worker is asked."""
NAMES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "config.json", "generation_config.json",
)  # fmt: skip
"""Files that are sent; no other name is believed."""
LONGEST_BYTES = 128 * 2**20
"""Of one file."""
PATIENCE_S = 60.0
"""For an answer, before a worker is asked anew."""
AGAIN_S = 1.0


def pack(folder: Path) -> dict[str, bytes]:
    """Those of ``NAMES`` that ``folder`` has, compressed."""
    return {name: zlib.compress((folder / name).read_bytes()) for name in NAMES if (folder / name).is_file()}


def unpack(files: Mapping[str, bytes], root: Path) -> Path:
    """Writes them into a folder below ``root``, which is called by what they hold, and gives it.

    Raises:
        SetupError: one is damaged or too long, or there is no room.
    """
    digest = hashlib.sha256(b"".join(name.encode() + files[name] for name in NAMES if name in files)).hexdigest()[:32]
    folder = root / digest
    if folder.is_dir():
        return folder
    try:
        with whole_folder(folder) as aside:
            for name in NAMES:
                if name in files:
                    (aside / name).write_bytes(_plain(files[name]))
    except OSError as error:
        raise SetupError(f"the worker's tokenizer can't be kept in {root}: {error.strerror}") from None
    except zlib.error as error:
        raise SetupError(f"the worker's tokenizer is damaged: {error}") from None
    return folder


async def fetch(control: ControlChannel, root: Path) -> Path:
    """Asks the workers, for as long as there is none, and gives the folder with what one of them sent.

    Raises:
        SetupError: it sends none: it is of an older release.
    """
    logs.event(LOG, "waiting_for_tokenizer")
    while True:
        try:
            answer = codec.decode_map(await control.ask(codec.encode_map(VERB, {}), PATIENCE_S), "answer")
        except Unavailable as error:
            logs.event(LOG, "no_tokenizer_yet", severity=logging.DEBUG, reason=error.message)
            await asyncio.sleep(AGAIN_S)
            continue
        if "files" not in answer:
            raise SetupError("the workers do not send their tokenizer: upgrade them, or give the folder of the model")
        return await asyncio.to_thread(unpack, answer["files"], root)


def _plain(data: bytes) -> bytes:
    stream = zlib.decompressobj()
    content = stream.decompress(data, LONGEST_BYTES)
    if not stream.eof:
        raise SetupError("the worker's tokenizer is damaged or too long")
    return content
