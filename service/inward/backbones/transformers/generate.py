"""Drawing responses: transformers' own ``generate``, with the prompt computed once for all of a group's samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from inward.backbones.transformers.model import Model
from inward.types import Group, Ids, Sample, SamplingSpec


def draw(model: Model, tokenizer: Any, eos_ids: Ids, group: Group, spec: SamplingSpec) -> list[Sample]:
    """Draws ``spec.n`` responses to the group's prompt. The same seed gives the same samples on the same machine and
    library.
    """
    prompt = torch.tensor([group.prompt_ids], device=model.device)
    ids = prompt.expand(spec.n, -1)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.inference_mode(), torch.random.fork_rng(devices, enabled=spec.seed is not None):
        if spec.seed is not None:
            torch.manual_seed(spec.seed)
        drawn = model.whole.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=_prompt_cache(model, prompt, spec.n),
            stopping_criteria=StoppingCriteriaList([_Stop(tokenizer, spec.stop, prompt.shape[1])] if spec.stop else []),
            **_settings(spec, eos_ids),
        )
    return [finished(row, tokenizer, eos_ids, spec) for row in drawn[:, prompt.shape[1] :].tolist()]


def _settings(spec: SamplingSpec, eos_ids: Ids) -> dict[str, Any]:
    """Everything that shapes the distribution is given, since ``generate`` has defaults of its own (``top_k=50``)."""
    chosen = {
        "temperature": spec.temperature,
        "top_k": max(spec.top_k, 0),
        "top_p": spec.top_p,
        "min_p": spec.min_p or None,
    }
    return {
        "do_sample": spec.temperature > 0,
        **(chosen if spec.temperature > 0 else {}),
        "repetition_penalty": spec.repetition_penalty,
        "max_new_tokens": spec.max_tokens,
        "eos_token_id": list(eos_ids) or None,
        "pad_token_id": eos_ids[0] if eos_ids else 0,
    }


def _prompt_cache(model: Model, prompt: torch.Tensor, n: int) -> Any:
    """Keys and values of the prompt, n times, but for its last token, which ``generate`` feeds itself; None where a
    model has none.
    """
    if prompt.shape[1] < 2 or n == 1 or getattr(model.whole, "_is_stateful", False):
        return None
    cache = model.base(prompt[:, :-1], use_cache=True).past_key_values
    if not hasattr(cache, "batch_repeat_interleave"):
        return None
    cache.batch_repeat_interleave(n)
    return cache


class _Stop(StoppingCriteria):  # type: ignore[misc]
    """Ends the rows that have written a stop string. transformers' own goes through the whole vocabulary first, and
    some break it.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...], start: int) -> None:
        self._tokenizer, self._stop, self._start = tokenizer, stop, start
        self._reach = (
            4 * max(map(len, stop)) + 8
        )  # tokens: one is at least one byte, and a character at most four of them

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        tails = self._tokenizer.batch_decode(
            input_ids[:, self._start :][:, -self._reach :].tolist(), skip_special_tokens=True
        )
        return torch.tensor([any(stop in tail for stop in self._stop) for tail in tails], device=input_ids.device)


def finished(row: Sequence[int], tokenizer: Any, eos_ids: Ids, spec: SamplingSpec) -> Sample:
    """The drawn ids ``row``, cut where they end: before an EOS, or before a stop string. Whatever follows is
    padding.
    """
    end = next((i for i, token in enumerate(row) if token in eos_ids), None)
    ids = list(row[:end])
    text = tokenizer.decode(ids, skip_special_tokens=True)
    cut = min((at for stop in spec.stop if (at := text.find(stop)) >= 0), default=None)
    if cut is None:
        return Sample(tuple(ids), text, "length" if end is None and len(ids) >= spec.max_tokens else "stop")
    while ids and len(tokenizer.decode(ids, skip_special_tokens=True)) > cut:
        ids = ids[
            :-1
            # a stop string is no part of the answer, as in vLLM: the ids end with the last token that is wholly before it
        ]
    return Sample(tuple(ids), text[:cut], "stop")
