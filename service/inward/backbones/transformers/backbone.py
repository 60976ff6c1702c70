"""The reference backbone: any Hugging Face model, read through hooks, groups packed where the model allows it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from transformers import GenerationConfig

from inward.backbones.adapter import read_adapter
from inward.backbones.base import Capacity, read_samples
from inward.backbones.fingerprint import fingerprint
from inward.backbones.readout import Fusion, Span
from inward.backbones.tokenizer import end_ids, ending_configs, load_tokenizer
from inward.backbones.transformers import generate, packing
from inward.backbones.transformers.capture import DeviceProduct
from inward.backbones.transformers.forward import forward_packed, forward_padded
from inward.backbones.transformers.lora import Policy
from inward.backbones.transformers.model import load_model, max_tokens
from inward.backbones.transformers.norms import fuse_norms
from inward.backbones.transformers.selfcheck import is_causal, packing_is_right
from inward.errors import EngineDead, InvalidField
from inward.types import BackboneInfo, Floats, Group, GroupReading, Reading, Readout, Sample

log = logging.getLogger(__name__)
R = TypeVar("R")
Read = tuple[tuple[Reading, ...], int, int]
"""One group's readings, and how many tokens were computed and not computed for them."""

TOKENS_CPU, TOKENS_GPU = 1024, 16384
"""Default budgets of one forward pass. On a CPU more is slower: activations leave the cache, and fresh pages are
asked of the system."""


class TransformersBackbone:
    """One model on one device; all its work runs on one thread of its own, so the event loop never waits for it.

    Groups are packed: laid end to end in one row, each prompt computed once (``packing``, ``attention``). A model for
    which a check at loading finds that packing changes its numbers (recurrent, ALiBi, bidirectional ...) is read in
    padded batches instead.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        revision: str = "",
        dtype: str = "auto",
        device: str = "auto",
        token_budget: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Loads the model, which takes a while.

        Args:
            folder: of a Hugging Face model, see ``loading.resolve``.
            name: under which it is served.
            dtype: see ``model.load_model``; so is ``device``.
            token_budget: tokens of one forward pass; by default what is fastest on this kind of device.

        Raises:
            SetupError: the folder does not hold a model that can be read.
        """
        self._model = load_model(folder, dtype, device, trust_remote_code=trust_remote_code)
        self._tokenizer = load_tokenizer(folder)
        on = self._model.device
        self.info = BackboneInfo(
            name=name,
            revision=revision,
            fingerprint=fingerprint(folder),
            layers=len(self._model.blocks),
            width=self._model.width,
            max_tokens=max_tokens(self._model.config, self._tokenizer),
            dtype=str(self._model.dtype).removeprefix("torch."),
            device=str(on),
        )
        budget = token_budget or (TOKENS_GPU if on.type == "cuda" else TOKENS_CPU)
        self.capacity = Capacity(budget)
        self._policy = Policy()
        self._eos_ids = end_ids(self._tokenizer, *ending_configs(folder))
        self._model.whole.generation_config = (
            GenerationConfig()
        )  # the sampling spec says everything: no defaults of the model's maker
        self._fused = lru_cache(maxsize=16)(
            self._fuse
        )  # readouts hash by identity, so these are the weights on the device, once
        self._failure: str | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="backbone")
        fuse_norms(self._model.base)
        self.packs = self._thread.submit(packing_is_right, self._model).result()
        self._causal = self.packs or self._thread.submit(is_causal, self._model).result()
        if not self.packs:
            log.warning(
                "%s cannot be packed: reading padded batches, in which a prompt is computed again for every response",
                name,
            )

    @property
    def policy_version(self) -> str:
        return self._policy.version

    async def load_adapter(self, version: str, folder: Path | None) -> None:
        def load() -> Policy:
            return Policy(version) if folder is None else Policy.load(version, read_adapter(folder), self._model)

        self._policy = await asyncio.to_thread(load)

    async def read(
        self, groups: Sequence[Group], readouts: Sequence[Readout], *, tokens: bool = False
    ) -> list[GroupReading]:
        return await self._read_with(self._policy, groups, readouts, tokens)

    async def _read_with(
        self, policy: Policy, groups: Sequence[Group], readouts: Sequence[Readout], tokens: bool
    ) -> list[GroupReading]:
        return await self._on_device(lambda: self._read(groups, tuple(readouts), tokens, policy))

    async def sample(self, group: Group) -> list[Sample]:
        policy, spec = self._policy, group.sampling
        if spec is None:
            raise InvalidField("the group carries no sampling spec", param="sampling")
        if not self._model.generates:
            raise InvalidField(
                f"{self.info.name} has no language-model head: it scores given texts but cannot write any", param="n"
            )

        def draw() -> list[Sample]:
            with policy.carried():
                return generate.draw(self._model, self._tokenizer, self._eos_ids, group, spec)

        return await self._on_device(draw)

    async def sample_and_read(
        self, group: Group, readouts: Sequence[Readout], *, tokens: bool = False
    ) -> tuple[list[Sample], GroupReading]:
        policy = self._policy  # also of ``sample``, which begins at once

        async def read(answered: Group) -> GroupReading:
            return (await self._read_with(policy, [answered], readouts, tokens))[0]

        return await read_samples(group.prompt_ids, await self.sample(group), read)

    def healthy(self) -> bool:
        return self._failure is None

    async def close(self) -> None:
        self._failure = self._failure or "it was closed"
        await asyncio.to_thread(self._thread.shutdown, wait=True)

    async def _on_device(self, work: Callable[[], R]) -> R:
        if self._failure:
            raise EngineDead(f"the backbone cannot compute any more: {self._failure}")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except torch.AcceleratorError as error:  # a CUDA context does not survive these
            self._failure = str(error)
            raise EngineDead(f"the device failed: {error}") from error

    def _fuse(self, readouts: tuple[Readout, ...], tokens: bool) -> tuple[Fusion, list[DeviceProduct]]:
        fusion = Fusion(readouts, layers=self.info.layers, width=self.info.width, tokens=tokens)
        if fusion.eos and not self._eos_ids:
            raise InvalidField(
                f"{self.info.name} has no end-of-sequence token, so nothing can be read at position eos",
                param="readouts",
            )
        if fusion.eos and not self._causal:  # it would change every other state of the text
            raise InvalidField(
                f"{self.info.name} reads in both directions: an appended EOS would change the text, read last instead",
                param="readouts",
            )
        return fusion, [DeviceProduct.of(product, self._model.device) for product in fusion.products]

    @torch.inference_mode()
    def _read(
        self, groups: Sequence[Group], readouts: tuple[Readout, ...], tokens: bool, policy: Policy
    ) -> list[GroupReading]:
        fusion, products = self._fused(readouts, tokens)
        eos_id = self._eos_ids[0] if fusion.eos else None
        read = self._read_packed if self.packs else self._read_padded
        with policy.carried():
            return [
                GroupReading(reading, computed, cached, policy.version)
                for reading, computed, cached in read(groups, fusion, products, eos_id)
            ]

    def _read_packed(
        self, groups: Sequence[Group], fusion: Fusion, products: Sequence[DeviceProduct], eos_id: int | None
    ) -> list[Read]:
        results: list[Read] = []
        costs = [packing.cost(group, eos_id) for group in groups]
        for run in packing.within(costs, self.capacity.tokens):
            packed = packing.pack([groups[i] for i in run], eos_id)
            readings = fusion.assemble(forward_packed(self._model, packed, products), packed.spans)
            results += [
                (reading, costs[i], len(groups[i].prompt_ids) * max(len(groups[i].responses_ids) - 1, 0))
                for i, reading in zip(run, readings, strict=True)
            ]
        return results

    def _read_padded(
        self, groups: Sequence[Group], fusion: Fusion, products: Sequence[DeviceProduct], eos_id: int | None
    ) -> list[Read]:
        texts = [(group.prompt_ids, response) for group in groups for response in group.responses_ids]
        outputs: list[list[Floats]] = [[] for _ in texts]
        spans: list[Span] = [Span(0, range(0))] * len(texts)
        for batch in packing.rectangles(
            [len(p) + len(r) + (eos_id is not None) for p, r in texts], self.capacity.tokens
        ):
            padded = packing.pad([texts[i] for i in batch], eos_id)
            for i, span, output in zip(batch, padded.spans, forward_padded(self._model, padded, products), strict=True):
                spans[i], outputs[i] = span, output
        joined = [np.concatenate([output[k] for output in outputs]) for k in range(len(products))]
        remaining = iter(spans)
        own = [[next(remaining) for _ in group.responses_ids] for group in groups]
        readings = fusion.assemble(joined, own)
        costs = [sum(len(g.prompt_ids) + len(r) + (eos_id is not None) for r in g.responses_ids) for g in groups]
        return [(reading, cost, 0) for reading, cost in zip(readings, costs, strict=True)]
