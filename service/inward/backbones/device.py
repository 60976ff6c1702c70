"""Which device a model runs on, and in which format its numbers are there."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from inward.backbones.cpus import CHOSEN, available_cpus
from inward.errors import SetupError


def choose_device(device: str) -> torch.device:
    """torch's device of that name; ``auto`` is a CUDA GPU if there is one.

    Raises:
        SetupError: there is no such device here, or this torch can't use it.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        on = torch.device(device)
        if on.type == "cuda":  # not tried as others are: that takes memory, which vLLM's own process may want
            there = torch.cuda.is_available() and (on.index or 0) < torch.cuda.device_count()
        else:
            there = torch.zeros(1, device=on).item() == 0
    except (RuntimeError, AssertionError, ImportError):
        there = False
    if not there:
        raise SetupError(
            f"--device {device}: there is no such device here, or torch {torch.__version__} can't use it: take auto, "
            "cpu, or with a GPU and a torch for it cuda or cuda:1 …"
        )
    return on


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """torch's dtype of that name; ``auto`` is bfloat16 where the processor multiplies it natively, else float32.

    Raises:
        SetupError: it is no floating dtype.
    """
    if dtype == "auto":
        native = (
            torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else cpu_has_bfloat16()
        )
        return torch.bfloat16 if native else torch.float32
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise SetupError(f"{dtype!r} is no dtype for a model: use auto, float32, bfloat16 or float16")
    return found


def cpu_has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this processor multiplies bfloat16 natively: AVX512-BF16 or AMX (400-480 GFLOP/s a core against 105 in
    float32).
    """
    try:
        flags = next(line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")).split()
    except (OSError, StopIteration):
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def use_available_cpus() -> int:
    """Has torch use as many threads as there are processors for this process, unless somebody has chosen already; says
    how many it uses.
    """
    if CHOSEN not in os.environ:
        torch.set_num_threads(available_cpus())
    return torch.get_num_threads()
