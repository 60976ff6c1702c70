"""A causal language model that draws, is read, and is asked for probabilities, all in batches on its device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, LogitsProcessorList

from inward.backbones.device import choose_dtype
from inward.backbones.transformers.packing import rectangles
from inward.types import Doubles, Floats
from inward_trainer.paper.batches import most_tokens, most_trained, padded
from inward_trainer.paper.texts import Ids, Text
from inward_trainer.sources.samples import SAMPLING
from inward_trainer.tokens import Tokeniser

Position = Literal["prompt", "last", "eos"]
CUDA_ROWS, CPU_ROWS = 1536, 64
"""Answers that are drawn at once."""


class Drawn(NamedTuple):
    """One drawn answer, without what ended it; a list in JSON."""

    text: str
    ids: Ids
    finished: bool


class Sampling(LogitsProcessor):  # type: ignore[misc]
    """The hybrid paper's sampling (arXiv 2503.10093): repetition penalty, temperature, top-k, then top-p among these.

    One pass over the vocabulary instead of transformers' sort of it, which costs more than the model.
    """

    def __init__(self) -> None:
        self._penalty, self._temperature = float(SAMPLING["repetition_penalty"]), float(SAMPLING["temperature"])
        self._k, self._p = int(SAMPLING["top_k"]), float(SAMPLING["top_p"])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float()
        seen = scores.gather(1, input_ids)
        seen = torch.where(seen < 0, seen * self._penalty, seen / self._penalty)
        scores = scores.scatter(1, input_ids, seen) / self._temperature
        best, index = scores.topk(min(self._k, scores.shape[1]))
        probability = best.softmax(dim=1)
        best = best.masked_fill(probability.cumsum(dim=1) - probability >= self._p, -torch.inf)
        return torch.full_like(scores, -torch.inf).scatter(1, index, best)


class LanguageModel:
    """For reading and drawing: in bfloat16 where the device multiplies it natively, in float32 elsewhere."""

    def __init__(self, model: Any, tokeniser: Tokeniser) -> None:
        self.model, self.tokeniser = model.eval(), tokeniser
        self.device = torch.device(model.device)
        self.layers = int(model.config.num_hidden_layers)
        pad = tokeniser.tokenizer.pad_token_id
        self.pad = tokeniser.eos_id if pad is None else int(pad)

    @classmethod
    def load(cls, folder: Path, tokeniser: Tokeniser, device: torch.device) -> LanguageModel:
        """From a folder."""
        return cls(load_causal(folder, reading_dtype(device), device), tokeniser)

    @torch.inference_mode()
    def draw(
        self, prompts: Sequence[Ids], n: int, tokens: int, seed: int, *, greedy: bool = False
    ) -> list[list[Drawn]]:
        """``n`` answers of each prompt. The same seed draws the same answers of the same model on the same device."""
        rows = [place for place in range(len(prompts)) for _ in range(n)]
        order = sorted(range(len(rows)), key=lambda i: len(prompts[rows[i]]))
        at_once = CUDA_ROWS if self.device.type == "cuda" else CPU_ROWS
        found: dict[int, Drawn] = {}
        torch.manual_seed(seed)
        config = GenerationConfig(
            max_new_tokens=tokens, do_sample=not greedy, top_k=None if greedy else 0,
            eos_token_id=self.tokeniser.eos_id, pad_token_id=self.pad,
            bos_token_id=self.tokeniser.tokenizer.bos_token_id,
        )  # fmt: skip
        processors = LogitsProcessorList([] if greedy else [Sampling()])
        for start in range(0, len(order), at_once):
            part = order[start : start + at_once]
            ids, mask = padded([prompts[rows[i]] for i in part], self.pad, self.device, left=True)
            out = self.model.generate(
                input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=processors
            )
            found |= zip(part, map(self._drawn, out[:, ids.shape[1] :].tolist()), strict=True)
        return [[found[place * n + i] for i in range(n)] for place in range(len(prompts))]

    @torch.inference_mode()
    def states(self, texts: Sequence[Text], position: Position = "eos") -> Floats:
        """``[M, L, D]``: the residual stream after each block (1 to L, before the final norm), at the last token of the
        answer, at an end-of-sequence token appended to it, or at the last token of the prompt.
        """
        rows = [[*text.ids, self.tokeniser.eos_id] for text in texts]
        places = [
            len(text.prompt_ids) - 1 if position == "prompt" else len(row) - (1 if position == "eos" else 2)
            for text, row in zip(texts, rows, strict=True)
        ]
        found = np.empty((len(texts), self.layers, int(self.model.config.hidden_size)), dtype=np.float32)
        for part in rectangles([len(row) for row in rows], most_tokens(self.device)):
            ids, mask = padded([rows[i] for i in part], self.pad, self.device)
            wanted = torch.tensor([places[i] for i in part], device=self.device)
            with residuals(self.model, wanted) as kept:
                self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
            found[part] = torch.stack(kept, dim=1).float().cpu().numpy()
        return found

    @torch.inference_mode()
    def log_probs(self, texts: Sequence[Text]) -> Doubles:
        """``[M]``: log-probability of each answer, in nats."""
        found = np.empty(len(texts))
        for part in rectangles([len(text.ids) for text in texts], most_trained(self.device)):  # logits are large
            found[part] = answer_log_probs(self.model, [texts[i] for i in part], self.pad).double().cpu().numpy()
        return found

    def _drawn(self, row: Ids) -> Drawn:
        eos = self.tokeniser.eos_id
        finished = eos in row
        ids = row[: row.index(eos)] if finished else row
        return Drawn(self.tokeniser.tokenizer.decode(ids, skip_special_tokens=True), ids, finished)


def answer_log_probs(model: Any, texts: Sequence[Text], pad: int) -> Tensor:
    """``[B]``: log-probability of each answer given its prompt. Logits are made for the answers' tokens only."""
    ids, mask = padded([text.ids for text in texts], pad, torch.device(model.device))
    answer = torch.zeros_like(mask, dtype=torch.bool)
    for i, text in enumerate(texts):
        answer[i, len(text.prompt_ids) - 1 : len(text.ids) - 1] = True  # what foretells the answer's tokens
    hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    with torch.autocast(ids.device.type, enabled=False):  # bfloat16 would round log-probabilities to hundredths
        logits = head(hidden[answer].to(head.weight.dtype)).float()
    target = ids[:, 1:][answer[:, :-1]]
    log_probs = logits.log_softmax(dim=-1).gather(1, target[:, None])[:, 0]
    row = answer.nonzero()[:, 0]
    return torch.zeros(len(texts), device=log_probs.device).index_add(0, row, log_probs)


@contextmanager
def residuals(model: Any, wanted: Tensor) -> Iterator[list[Tensor]]:
    """While it is open, what each block passes on at one position of each row, ``[B, D]`` a block."""
    kept: list[Tensor] = []
    rows = torch.arange(len(wanted), device=wanted.device)

    def keep(module: Any, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        kept.append(hidden[rows, wanted])

    with ExitStack() as hooks:
        for block in model.base_model.layers:
            hooks.enter_context(block.register_forward_hook(keep))
        yield kept


def load_causal(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The model of a folder, on a device."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)


def reading_dtype(device: torch.device) -> torch.dtype:
    """What is drawn and read with: bfloat16 where the device multiplies it natively."""
    return choose_dtype("auto", device)
