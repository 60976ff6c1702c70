"""A real server in a process of its own, around a tiny random model with a head."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

from inward.backbones.fingerprint import fingerprint
from inward.offline.bench.workload import write_random_heads
from inward.prompts import Prompts
from inward.types import BackboneInfo
from support.tiny_tokenizer import of_transformers as tokenizer
from support.waiting import PATIENCE

LAYERS, WIDTH = 3, 64
FRESH = {"INWARD_SHARING_WINDOW": "0"}
"""Every score is computed anew, so that two of the same text are worth comparing."""
PATIENT = {f"INWARD_{name}": str(PATIENCE) for name in ("TIMEOUT", "DRAIN_TIMEOUT", "PRESENCE", "CLAIM_IDLE")}
"""A slow machine is not told from a fast one, nor a slow process from a dead one."""


def write_model(folder: Path, seed: int = 0) -> Path:
    """A Llama of three blocks with random weights in ``folder/model`` and a LEGEND head in ``folder/heads``."""
    torch.manual_seed(seed)
    tok = tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tok), hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = folder / "model"
    transformers.LlamaForCausalLM(config).save_pretrained(model)
    tok.save_pretrained(model)
    info = BackboneInfo("model", "", fingerprint(model), LAYERS, WIDTH, 1024, "float32", "cpu")
    write_random_heads(info, Prompts(tok, max_tokens=1024).template, folder / "heads", 1)
    return model


@dataclass
class Served:
    """A running server; ``log`` holds the lines that it wrote to standard error."""

    process: subprocess.Popen[str]
    url: str
    log: list[str] = field(default_factory=list)

    def stop(self, sig: signal.Signals = signal.SIGTERM, timeout: float = 2 * PATIENCE) -> int:
        """Sends the signal and waits for the end; returns the exit status."""
        self.process.send_signal(sig)
        return self.process.wait(timeout)


@contextmanager
def serve(folder: Path, *options: str, env: dict[str, str] | None = None) -> Iterator[Served]:
    """``inward serve`` with the model and the heads of ``write_model``, on a free port; killed in the end if it
    still runs."""
    with started("--model", str(folder / "model"), "--heads", str(folder / "heads"), *options, env=env) as served:
        yield served


@contextmanager
def demo(state: Path) -> Iterator[Served]:
    """``inward serve`` as ``make serve MODEL=toy`` starts it, with ``state`` as the folder for the heads' versions."""
    with started("--model", "toy", env={"XDG_STATE_HOME": str(state)}) as served:
        yield served


@contextmanager
def started(*options: str, env: dict[str, str] | None = None) -> Iterator[Served]:
    """``inward serve`` on a free port."""
    command = [sys.executable, "-m", "inward", "serve", "--port", "0"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TOKENIZERS_PARALLELISM": "false",
        **FRESH,
        **PATIENT,
        **(env or {}),
    }
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, env=environment)
    served, reader = Served(process, ""), None
    assert process.stderr is not None
    try:
        for line in process.stderr:
            served.log.append(line)
            if '"ready"' in line:
                served.url = json.loads(line)["url"]
                break
        else:
            raise AssertionError(f"the server did not start: {''.join(served.log)[-2000:]}")
        reader = threading.Thread(target=lambda: served.log.extend(process.stderr or ()), daemon=True)
        reader.start()
        yield served
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if reader is not None:
            reader.join()
        process.stderr.close()
