"""The reference backbone: any Hugging Face model, read through hooks, groups packed where the model allows it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from inward.backbones.base import Capacity, OnEnded, OnTokens, Watch, guarded, read_samples
from inward.backbones.configuration import max_tokens
from inward.backbones.decoding import Decoder
from inward.backbones.end_ids import end_ids, ending_configs
from inward.backbones.fingerprint import fingerprint
from inward.backbones.generation import sampling_of
from inward.backbones.peft_files import read_adapter
from inward.backbones.readout import Fusion, Span
from inward.backbones.tokenizer import load_tokenizer
from inward.backbones.transformers import packing
from inward.backbones.transformers.capture import DeviceProduct
from inward.backbones.transformers.forward import forward_packed, forward_padded
from inward.backbones.transformers.generate import Caching, Drawing, Sampler, choose_caching
from inward.backbones.transformers.lora import Policy
from inward.backbones.transformers.model import load_model
from inward.backbones.transformers.norms import fuse_norms
from inward.backbones.transformers.scheduler import Scheduler, Turns
from inward.backbones.transformers.selfcheck import choose_mode, is_causal
from inward.backbones.transformers.watching import Watched
from inward.batching import within
from inward.errors import Conflict, InvalidField
from inward.types import BackboneInfo, Floats, Group, GroupReading, Ids, Reading, Readout, Sample

log = logging.getLogger(__name__)
Read = tuple[tuple[Reading, ...], int, int]
"""One group's readings, and how many tokens were computed and not computed for them."""

TOKENS_CPU, TOKENS_GPU = 1024, 16384
"""Default budgets of one forward pass. On a CPU more is slower: activations leave the cache, and fresh pages are
asked of the system."""
DRAWINGS = 32
"""Jobs that may draw at once, beside those that are read."""


class _Fused(NamedTuple):
    """What the readouts of one call ask of a pass, their weights on the device."""

    fusion: Fusion
    products: list[DeviceProduct]
    eos_id: int | None
    """What follows every response, where something reads it."""


class TransformersBackbone:
    """One model on one device; all its work runs on one thread of its own, so the event loop never waits for it.

    Groups are packed: laid end to end in one row, each prompt computed once (``packing``, ``attention``). A model for
    which a check at loading finds that packing changes its numbers (recurrent, ALiBi, bidirectional ...) is read in
    padded batches instead, or one text at a time.
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
            dtype: see ``device.choose_dtype``; for ``device`` see ``device.choose_device``.
            token_budget: tokens of one forward pass; by default what is fastest on this kind of device.

        Raises:
            SetupError: the folder does not hold a model that can be read.
        """
        self._model = load_model(folder, dtype, device, trust_remote_code=trust_remote_code)
        self._tokenizer = load_tokenizer(folder)
        self._decoder = Decoder(self._tokenizer)
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
            final_norm=self._model.final_norm,
        )
        budget = token_budget or (TOKENS_GPU if on.type == "cuda" else TOKENS_CPU)
        self.capacity = Capacity(budget, drawings=DRAWINGS)
        self._policy = Policy()
        self._end_ids = end_ids(self._tokenizer, *ending_configs(folder))
        # readouts hash by identity, so these are the weights on the device, once
        self._fused = lru_cache(maxsize=16)(self._fuse)
        fuse_norms(self._model.base)
        self.mode = choose_mode(self._model)
        self._causal = self.mode == "packed" or is_causal(self._model)
        self.caching: Caching = choose_caching(self._model) if self._draws else "none"
        self._scheduler = Scheduler(Sampler(self._model, self._tokenizer, self._end_ids, self.caching))
        if self.mode != "packed":
            batches = "padded batches" if self.mode == "padded" else "one text at a time"
            log.warning(
                "%s cannot be packed: reading %s, in which a prompt is computed again for every response", name, batches
            )
        if self._draws and self.caching in ("alone", "none"):
            cost = "each with a cache of its own" if self.caching == "alone" else "without a cache, which is slow"
            log.warning("%s cannot repeat its caches: responses are drawn one by one, %s", name, cost)

    @property
    def _draws(self) -> bool:
        return self._model.generates and self._causal

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
        return await self._scheduler.read(self._read(groups, tuple(readouts), tokens, policy))

    async def sample(self, group: Group) -> list[Sample]:
        return await self._sample_with(self._policy, group)

    async def _sample_with(
        self,
        policy: Policy,
        group: Group,
        watch: Watch | None = None,
        on_tokens: OnTokens | None = None,
        on_ended: OnEnded | None = None,
    ) -> list[Sample]:
        spec = sampling_of(group)
        if not self._draws:
            why = "reads in both directions" if self._model.generates else "has no language-model head"
            raise InvalidField(f"{self.info.name} {why}: it scores given texts but cannot write any", param="n")
        if not group.prompt_ids:
            raise InvalidField("the prompt is empty: there is nothing that a response could continue", param="prompt")
        size = {"layers": self.info.layers, "width": self.info.width}
        watched = Watched(watch, **size, device=self._model.device) if watch is not None else None
        return await self._scheduler.draw(Drawing(group.prompt_ids, spec, policy, watched, on_tokens, on_ended))

    async def sample_and_read(
        self,
        group: Group,
        readouts: Sequence[Readout],
        *,
        tokens: bool = False,
        watch: Watch | None = None,
        on_tokens: OnTokens | None = None,
        on_ended: OnEnded | None = None,
    ) -> tuple[list[Sample], GroupReading]:
        policy = self._policy
        checked = watch.readouts if watch is not None and watch.guards else ()
        wanted = [*readouts, *checked]

        async def read(answered: Group) -> GroupReading:
            return (await self._read_with(policy, [answered], wanted, tokens or bool(checked)))[0]

        samples = await self._sample_with(policy, group, watch, on_tokens, on_ended)
        drawn = await read_samples(group.prompt_ids, samples, wanted, read, policy.version)
        return guarded(*drawn, watch, self._decoder.text)

    def certain(self, ids: Ids) -> str:
        return self._decoder.certain(ids)

    @property
    def asleep(self) -> bool:
        return False

    async def sleep(self) -> None:
        raise Conflict("the transformers backbone does not sleep: serve with --backbone vllm, or stop the service")

    async def wake(self) -> None:
        return None

    def healthy(self) -> bool:
        return self._scheduler.dead is None

    async def close(self) -> None:
        await self._scheduler.close()

    def _fuse(self, readouts: tuple[Readout, ...], tokens: bool) -> _Fused:
        fusion = Fusion(readouts, layers=self.info.layers, width=self.info.width, tokens=tokens)
        if fusion.eos and not self._end_ids:
            raise InvalidField(
                f"{self.info.name} has no end-of-sequence token, so nothing can be read at position eos",
                param="readouts",
            )
        if not self.info.final_norm and any(place.final_norm for place in fusion.places):
            raise InvalidField(
                f"{self.info.name} gives nothing of its stream's width after its final norm: read its last layer "
                "before it",
                param="readouts",
            )
        if fusion.eos and not self._causal:  # it would change every other state of the text
            raise InvalidField(
                f"{self.info.name} reads in both directions: an appended EOS would change the text, read last instead",
                param="readouts",
            )
        products = [DeviceProduct.of(product, self._model.device) for product in fusion.products]
        return _Fused(fusion, products, self._end_ids[0] if fusion.eos else None)

    def _read(
        self, groups: Sequence[Group], readouts: tuple[Readout, ...], tokens: bool, policy: Policy
    ) -> Turns[list[GroupReading]]:
        read = self._read_packed if self.mode == "packed" else self._read_padded
        results = yield from read(groups, self._fused(readouts, tokens), policy)
        return [GroupReading(reading, computed, cached, policy.version) for reading, computed, cached in results]

    def _read_packed(self, groups: Sequence[Group], fused: _Fused, policy: Policy) -> Turns[list[Read]]:
        results: list[Read] = []
        costs = [packing.cost(group, fused.eos_id) for group in groups]
        for run in within(range(len(groups)), self.capacity.tokens, costs.__getitem__):
            if results:
                yield
            packed = packing.pack([groups[i] for i in run], fused.eos_id)
            with policy.carried():
                outputs = forward_packed(self._model, packed, fused.products)
            results += [
                (reading, costs[i], len(groups[i].prompt_ids) * max(len(groups[i].responses_ids) - 1, 0))
                for i, reading in zip(run, fused.fusion.assemble(outputs, packed.spans), strict=True)
            ]
        return results

    def _read_padded(self, groups: Sequence[Group], fused: _Fused, policy: Policy) -> Turns[list[Read]]:
        texts = [(group.prompt_ids, response) for group in groups for response in group.responses_ids]
        outputs: list[list[Floats]] = [[] for _ in texts]
        spans: list[Span] = [Span(0, range(0))] * len(texts)
        lengths = [len(prompt) + len(response) + (fused.eos_id is not None) for prompt, response in texts]
        budget = self.capacity.tokens if self.mode == "padded" else 0
        for turn, batch in enumerate(packing.rectangles(lengths, budget)):
            if turn:
                yield
            padded = packing.pad([texts[i] for i in batch], fused.eos_id)
            with policy.carried():
                read = forward_padded(self._model, padded, fused.products)
            for i, span, output in zip(batch, padded.spans, read, strict=True):
                spans[i], outputs[i] = span, output
        joined = [np.concatenate([output[k] for output in outputs]) for k in range(len(fused.products))]
        places = iter(range(len(texts)))
        own = [[next(places) for _ in group.responses_ids] for group in groups]
        readings = fused.fusion.assemble(joined, [[spans[i] for i in group] for group in own])
        return [(reading, sum(lengths[i] for i in group), 0) for reading, group in zip(readings, own, strict=True)]
