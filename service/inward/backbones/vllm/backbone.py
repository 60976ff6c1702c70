"""The backbone on vLLM: samples and readouts from one engine and one copy of the weights."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from inward.backbones.adapter import base_shapes, check_shapes, read_adapter
from inward.backbones.base import Capacity, first_alike, read_samples
from inward.backbones.configuration import max_tokens
from inward.backbones.device import choose_dtype
from inward.backbones.fingerprint import fingerprint
from inward.backbones.tokenizer import end_ids, ending_configs, load_tokenizer
from inward.backbones.vllm.engine import Engine, built_for
from inward.backbones.vllm.generation import Generation, Text, feeding, lora_request
from inward.backbones.vllm.layout import Policy, ReadoutLayout, ReadRequest, Want, succeeding
from inward.errors import InternalError, InvalidField, SetupError
from inward.types import BackboneInfo, Floats, Group, GroupReading, Ids, Readout, Sample, SamplingSpec, Tap

T = TypeVar("T")
CALLS = 256
"""Calls in flight at once: vLLM makes its own batches of them."""
SPARE = 2
"""Tokens of the model's length that reading needs for itself: an EOS, and the one token that vLLM draws at least."""
NORM_TOLERANCE = 0.05
"""Wide enough for bfloat16; something else than the residual stream is off by 1."""
LORA = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 64}
"""Room for the version that is carried and for the former one, which requests in flight still need."""
TABLE_BYTES = 8 * 2**30
"""Most memory for the rows of one edition."""


class VllmBackbone:
    """See the package.

    An edition's number salts the prefix cache: a cached token has been read for all columns that the request which
    finds it may ask for.
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
        options: Mapping[str, Any] | None = None,
        adapters: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        """Loads the model, which takes a while.

        Args:
            folder: of a Hugging Face model, see ``loading.resolve``.
            name: under which it is served.
            dtype: see ``model.load_model``.
            device: ``auto``, or the kind of device that this vLLM is built for; CUDA_VISIBLE_DEVICES says which of
                several.
            token_budget: tokens of the jobs of one call; vLLM cuts them into steps by its own
                ``max_num_batched_tokens``.
            adapters: whether LoRA adapters may be loaded later; the engine keeps room for them.
            options: vLLM's engine arguments, such as ``tensor_parallel_size``, ``quantization``,
                ``gpu_memory_utilization``.

        Raises:
            SetupError: vLLM refuses the model or an option.
        """
        self._tokenizer = load_tokenizer(folder)
        on = built_for(device)
        number_format = str(choose_dtype(dtype, on)).removeprefix("torch.")
        self._engine = Engine(
            folder,
            number_format,
            {**(LORA if adapters else {}), **(options or {})},
            trust_remote_code=trust_remote_code,
        )
        config = self._engine.config
        text = config.model_config.hf_text_config
        self.info = BackboneInfo(
            name=name,
            revision=revision,
            fingerprint=fingerprint(folder),
            layers=text.num_hidden_layers,
            width=config.model_config.get_hidden_size(),
            max_tokens=min(max_tokens(text, self._tokenizer), config.model_config.max_model_len - SPARE),
            dtype=number_format,
            device=str(on),
        )
        self.capacity = Capacity(token_budget or config.scheduler_config.max_num_batched_tokens, concurrency=CALLS)
        self._policy = Policy()
        self._policies = itertools.count(1)
        self._shapes = base_shapes(folder) if adapters else {}
        self._drawing = Generation(self._engine, self._tokenizer, end_ids(self._tokenizer, *ending_configs(folder)))
        self._slots = config.cache_config.num_gpu_blocks * config.cache_config.block_size
        self._edition = ReadoutLayout(0, (), layers=self.info.layers, width=self.info.width)
        self._numbers = 0
        self._calls: dict[int, int] = {}  # in flight, by edition
        self._superseded: list[int] = []
        self._changing = asyncio.Lock()
        self._keys = itertools.count()
        self._forget: list[str] = []
        try:
            self._engine.wait(self._verify)
        except BaseException:
            self._engine.shut()
            raise

    async def _verify(self) -> None:
        """Whether the states that are read are the residual stream: the model's final norm of them must be what is read
        after it.

        Raises:
            SetupError: it is not (some architectures pass something else from block to block), or nothing can be read.
        """
        L = self.info.layers
        readouts = [Readout((Tap(L, "last"),)), Readout((Tap(L, "last", final_norm=True),))]
        group = Group((1, 2, 3), ((4, 5),))
        try:
            ((before, after),) = [reading.readings for reading in await self.read([group], readouts)]
            data = await self._engine.call(lambda: self._engine.rpc("inward_norm", before.values_NK.tobytes()))
        except Exception as error:
            raise SetupError(
                f"vLLM runs {self.info.name}, but its states cannot be read: {error}; use --backbone transformers"
            ) from error
        normed_ND = np.frombuffer(data, np.float32).reshape(1, -1)
        difference = np.linalg.norm(normed_ND - after.values_NK) / np.linalg.norm(normed_ND)
        if not difference < NORM_TOLERANCE:
            raise SetupError(
                f"what vLLM passes between the blocks of {self.info.name} is not its residual stream (its final norm is off by "
                f"{difference:.2g}); use --backbone transformers"
            )

    @property
    def policy_version(self) -> str:
        return self._policy.version

    async def load_adapter(self, version: str, folder: Path | None) -> None:
        policy = Policy(version, next(self._policies), str(folder or ""))
        if folder is not None and (lora := lora_request(policy)):
            adapter = await asyncio.to_thread(read_adapter, folder)
            check_shapes(adapter, self._shapes)  # vLLM takes a smaller matrix without a word, and dies of a larger one
            await self._engine.call(lambda: self._engine.add_lora(lora))
        self._policy = policy

    async def read(
        self, groups: Sequence[Group], readouts: Sequence[Readout], *, tokens: bool = False
    ) -> list[GroupReading]:
        policy = self._policy

        async def work() -> list[GroupReading]:
            async with self._asking(readouts, tokens, policy) as asked:
                return await _all(self._read(group, asked) for group in groups)

        return await self._engine.call(work)

    async def sample(self, group: Group) -> list[Sample]:
        spec, asked = _spec(group), ReadRequest(self._edition, self._policy)
        return await self._engine.call(lambda: self._sample(group.prompt_ids, spec, asked))

    async def _sample(self, prompt: Ids, spec: SamplingSpec, asked: ReadRequest) -> list[Sample]:
        return await _all(self._drawing.sample(prompt, spec, i, asked) for i in range(spec.n))

    async def sample_and_read(
        self, group: Group, readouts: Sequence[Readout], *, tokens: bool = False
    ) -> tuple[list[Sample], GroupReading]:
        spec, policy = _spec(group), self._policy

        async def work() -> tuple[list[Sample], GroupReading]:
            async with self._asking(readouts, tokens, policy) as asked:
                if asked.edition.wide:
                    drawing = await self._sample(group.prompt_ids, spec, ReadRequest(self._edition, policy))
                    return await read_samples(group.prompt_ids, drawing, lambda answered: self._read(answered, asked))
                drawn = await _all(
                    self._drawing.read(group.prompt_ids, spec, i, asked, self._key(asked)) for i in range(spec.n)
                )
                samples = [sample for sample, _ in drawn]
                answered = Group(group.prompt_ids, tuple(sample.ids for sample in samples))
                return samples, await self._reading(answered, asked, [text for _, text in drawn])

        return await self._engine.call(work)

    def healthy(self) -> bool:
        return self._engine.dead is None

    async def close(self) -> None:
        await self._engine.close()

    async def _read(self, group: Group, asked: ReadRequest) -> GroupReading:
        """Every distinct response is one request; vLLM computes their common prompt once."""
        end = self._drawing.eos_ids[:1] if asked.eos else ()

        async def text(i: int) -> Text | None:
            ids = group.prompt_ids + group.responses_ids[i] + end
            if not ids:  # there is nothing to feed, and every position of it reads as NaN
                return None
            return await feeding(self._engine, ids, asked.want(group, i).start, asked, self._key(asked))

        distinct = sorted(set(first_alike(group.responses_ids)))
        texts = dict(zip(distinct, await _all(text(i) for i in distinct), strict=True))
        return await self._reading(group, asked, [texts.get(i) for i in range(len(group.responses_ids))])

    async def _reading(self, group: Group, asked: ReadRequest, texts: Sequence[Text | None]) -> GroupReading:
        """``texts``: of each response; equal responses take the rows of the first of their kind, and the others may
        be None.
        """
        fed = [text for text in texts if text is not None]
        rows = dict(zip((text.key for text in fed), await self._take(asked, [text.key for text in fed]), strict=True))
        parts: list[tuple[Want, Floats]] = []
        for i, first in enumerate(first_alike(group.responses_ids)):
            text, wanted = texts[first], asked.want(group, i)
            own = np.zeros((0, asked.edition.width), np.float32)
            if text is not None:
                own = rows[text.key][wanted.start - text.start : wanted.stop - text.start]
            if len(own) < wanted.stop - wanted.start:
                raise InternalError(f"vLLM read {len(own)} of {wanted.stop - wanted.start} tokens of a text")
            parts.append((wanted, own))
        return GroupReading(
            asked.edition.readings(asked.readouts, parts, tokens=asked.tokens),
            sum(text.computed for text in fed),
            sum(text.cached for text in fed),
            asked.policy.version,
        )

    @asynccontextmanager
    async def _asking(self, readouts: Sequence[Readout], tokens: bool, policy: Policy) -> AsyncIterator[ReadRequest]:
        """What one call asks for; its edition stays installed until the call is over."""
        edition = await self._installed(readouts)
        self._calls[edition.number] = self._calls.get(edition.number, 0) + 1
        asked = ReadRequest(edition, policy, tuple(readouts), tokens)
        try:
            if asked.eos and not self._drawing.eos_ids:
                raise InvalidField(
                    f"{self.info.name} has no end-of-sequence token, so nothing can be read at position eos",
                    param="readouts",
                )
            yield asked
        except BaseException:
            self._forget += asked.keys
            raise
        finally:
            self._calls[edition.number] -= 1
            if edition.wide:
                self._superseded.append(edition.number)

    async def _installed(self, readouts: Sequence[Readout]) -> ReadoutLayout:
        async with self._changing:
            await self._retire()
            number = self._numbers + 1
            edition = succeeding(self._edition, readouts, number, layers=self.info.layers, width=self.info.width)
            if edition is self._edition:
                return edition
            if not edition.wide and self._slots * edition.width * 4 > TABLE_BYTES:
                raise InvalidField(
                    f"{edition.width} numbers for each of {self._slots} cached tokens are too many to keep: load fewer heads, or give vLLM "
                    "a smaller cache (vllm_options.kv_cache_memory_bytes)",
                    param="readouts",
                )
            self._numbers = number
            self._superseded.append(number)  # so that nothing stays behind if the caller leaves meanwhile
            await self._engine.rpc("inward_install", number, edition.width, edition.wide, edition.encoded())
            self._superseded.remove(number)
            if not edition.wide:
                self._superseded.append(self._edition.number)
                self._edition = edition
            return edition

    async def _retire(self) -> None:
        """Superseded editions go once the last call that reads them is over."""
        for number in [number for number in self._superseded if not self._calls.get(number)]:
            await self._engine.rpc("inward_retire", number)
            self._superseded.remove(number)
            self._calls.pop(number, None)

    async def _take(self, asked: ReadRequest, keys: Sequence[str]) -> list[Floats]:
        if not keys:
            return []
        forget, self._forget = self._forget, []
        data, counts = await self._engine.rpc("inward_take", list(keys), forget)
        rows = np.frombuffer(data, np.float32).reshape(-1, asked.edition.width)
        return np.split(rows, np.cumsum(counts)[:-1])

    def _key(self, asked: ReadRequest) -> str:
        asked.keys.append(str(next(self._keys)))
        return asked.keys[-1]


async def _all(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All of it at once; the first failure cancels the rest and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def _spec(group: Group) -> SamplingSpec:
    if group.sampling is None:
        raise InvalidField("the group carries no sampling spec", param="sampling")
    return group.sampling
