"""The backbone on vLLM: samples and readouts from one engine and one copy of the weights."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from inward.backbones.base import Capacity, OnEnded, OnTokens, Watch, first_alike, guarded, read_samples, spread
from inward.backbones.configuration import max_tokens
from inward.backbones.decoding import Decoder
from inward.backbones.device import choose_dtype
from inward.backbones.end_ids import end_ids, ending_configs
from inward.backbones.fingerprint import fingerprint
from inward.backbones.generation import sampling_of
from inward.backbones.peft_files import base_shapes, check_shapes, read_adapter
from inward.backbones.tokenizer import load_tokenizer
from inward.backbones.vllm.engine import Engine, HostedEngine, built_for
from inward.backbones.vllm.generation import Generation, Text, feed, lora_request
from inward.backbones.vllm.layout import Columns, ColumnTable, Policy, ReadRequest, Want, WideLayout, readings
from inward.backbones.vllm.protocol import INSTALL, INSTALL_WIDE, NORM, PLACE_COLUMNS, TABLE_COLUMNS, TAKE, plain
from inward.backbones.vllm.watching import GroupWatch, Told
from inward.errors import InternalError, InvalidField, SetupError
from inward.types import BackboneInfo, Floats, Group, GroupReading, Ids, Readout, Sample, SamplingSpec, Tap

if TYPE_CHECKING:
    from inward.backbones.vllm.internals import AsyncLLM

log = logging.getLogger(__name__)
T = TypeVar("T")
CALLS = 256
"""Calls in flight at once: vLLM makes its own batches of them."""
SPARE_TOKENS = 2
"""Of the model's length, which reading needs for itself: an EOS, and the one token that vLLM draws at least."""
READ_AGAIN = 4
"""Times that a text is fed anew whose rows are gone: what would have been read in one pass, were there more memory."""
NORM_TOLERANCE = 0.05
"""Wide enough for bfloat16; something else than the residual stream is off by 1."""
LORA = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 64}
"""Room for the version that is carried and for the former one, which requests in flight still need."""


class VllmBackbone:
    """One model in vLLM's engine. What is read at every token is kept beside its keys and values, see the package.

    The number of the table's columns salts the prefix cache: a cached token has been read for all columns that the
    request which finds it may ask for.
    """

    _engine: Engine
    _otherwise = "use --backbone transformers"
    """What helps where it can't be read."""

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
        """Loads the model, which takes a while. Where a compiled model can't be read it is opened again, eagerly, and
        the log says so.

        Args:
            folder: of a Hugging Face model, see ``loading.resolve``.
            name: under which it is served.
            dtype: see ``device.choose_dtype``.
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
        on = built_for(device)
        number_format = str(choose_dtype(dtype, on)).removeprefix("torch.")
        self._prepare(folder, adapters=adapters)
        given = {**(LORA if adapters else {}), **(options or {})}

        def start(more: Mapping[str, Any]) -> None:
            self._engine = Engine(folder, number_format, {**given, **more}, trust_remote_code=trust_remote_code)
            self._begin(name, revision, folder, number_format, str(on), token_budget)
            try:
                self._engine.wait(self._verify)
            except BaseException:
                self._engine.shut()
                raise

        try:
            start({})
        except SetupError as error:
            if "enforce_eager" in given:
                raise
            log.warning("%s can't be read as vLLM compiles it (%s): it is run eagerly, which is slower", name, error)
            start({"enforce_eager": True})

    @classmethod
    async def hosted(cls, llm: AsyncLLM, folder: Path, *, name: str, revision: str = "") -> Self:
        """One on somebody else's engine, of which ``folder`` holds the model, on the event loop that it is used on.

        Raises:
            SetupError: it can't be read.
        """
        backbone = cls.__new__(cls)
        backbone._otherwise = "serve the model with --enforce-eager, or with `inward serve --backbone transformers`"
        await asyncio.to_thread(backbone._prepare, folder, adapters=False)
        backbone._engine = HostedEngine(llm)
        dtype = str(backbone._engine.config.model_config.dtype).removeprefix("torch.")
        backbone._begin(name, revision, folder, dtype, str(built_for("auto")), None)
        await backbone._engine.call(backbone._verify)
        return backbone

    def _prepare(self, folder: Path, *, adapters: bool) -> None:
        self._tokenizer = load_tokenizer(folder)
        self._decoder = Decoder(self._tokenizer)
        self._end_ids = end_ids(self._tokenizer, *ending_configs(folder))
        self._policy = Policy()
        self._policies = itertools.count(1)
        self._shapes = base_shapes(folder) if adapters else {}
        self._keys = itertools.count()
        self._wide_numbers = itertools.count(1)

    def _begin(self, name: str, revision: str, folder: Path, dtype: str, device: str, token_budget: int | None) -> None:
        config = self._engine.config
        text = config.model_config.hf_text_config
        self.info = BackboneInfo(
            name=name,
            revision=revision,
            fingerprint=fingerprint(folder),
            layers=text.num_hidden_layers,
            width=config.model_config.get_hidden_size(),
            max_tokens=min(max_tokens(text, self._tokenizer), config.model_config.max_model_len - SPARE_TOKENS),
            dtype=dtype,
            device=device,
        )
        self.capacity = Capacity(token_budget or config.scheduler_config.max_num_batched_tokens, concurrency=CALLS)
        self._generation = Generation(self._engine, self._tokenizer, self._end_ids, sessions=device == "cpu")
        self._table = ColumnTable(layers=self.info.layers, width=self.info.width)
        self._changing = asyncio.Lock()
        self._forget: list[str] = []
        self._retire: list[int] = []
        self._asked: dict[tuple[int, ...], list[tuple[Sequence[str], asyncio.Future[list[Floats]]]]] = {}
        self._taking: asyncio.Task[None] | None = None

    async def _verify(self) -> None:
        """Whether every place is read, and whether the states there are the residual stream: the model's final norm of
        the last ones must be what is read after it.

        Raises:
            SetupError: it is not (some architectures pass something else from block to block), or nothing can be read.
        """
        L, D = self.info.layers, self.info.width
        places = [*((layer, False) for layer in range(L + 1)), (L, True)]
        weight_D1 = np.random.default_rng(0).normal(size=(D, 1)).astype(np.float32)
        mapped = Readout(tuple(Tap(layer, "last", weight_D1, final_norm=norm) for layer, norm in places))
        whole = Readout(tuple(Tap(layer, "last", final_norm=norm) for layer, norm in places))
        group = Group((1, 2, 3), ((4, 5),))
        drawing = Group((1, 2, 3), (), SamplingSpec(n=4, max_tokens=4, seed=0))
        try:
            ((numbers,),) = [reading.readings for reading in await self.read([group], [mapped])]
            ((states,),) = [reading.readings for reading in await self.read([group], [whole])]
            states_PD = states.values_NK.reshape(len(places), D)
            data = await self._engine.call(lambda: self._engine.rpc(NORM, states_PD[L].tobytes()))
            samples, drawn = await self.sample_and_read(drawing, [mapped])
            answered = Group(drawing.prompt_ids, tuple(sample.ids for sample in samples))
            (fed,) = await self.read([answered], [mapped])
        except Exception as error:
            raise SetupError(
                f"vLLM runs {self.info.name}, but its states cannot be read: {error}; {self._otherwise}"
            ) from error
        normed_D = np.frombuffer(data, np.float32)
        difference = np.linalg.norm(normed_D - states_PD[-1]) / np.linalg.norm(normed_D)
        if not difference < NORM_TOLERANCE:
            raise SetupError(
                f"what vLLM passes between the blocks of {self.info.name} is not its residual stream (its final norm "
                f"is off by {difference:.2g}); {self._otherwise}"
            )
        size = np.linalg.norm(states_PD, axis=1) * np.linalg.norm(weight_D1)
        off = np.abs(numbers.values_NK[0] - (states_PD @ weight_D1)[:, 0]) / size
        if not (off < NORM_TOLERANCE).all():
            raise SetupError(
                f"vLLM does not read {self.info.name} at layer {places[int(np.nanargmax(off))][0]} as it computes it"
            )
        apart_NK = np.abs(drawn.readings[0].values_NK - fed.readings[0].values_NK)
        if not (apart_NK / size < NORM_TOLERANCE).all():
            raise SetupError(f"vLLM does not read {self.info.name} while it draws as it reads it when it is given")

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
            async with self._requested(readouts, tokens, policy) as request:
                return await _all(self._read(group, request) for group in groups)

        return await self._engine.call(work)

    async def sample(self, group: Group) -> list[Sample]:
        spec, request = sampling_of(group), ReadRequest(self._policy, self._table.number)
        return await self._engine.call(lambda: self._sample(group.prompt_ids, spec, request))

    async def _sample(
        self,
        prompt: Ids,
        spec: SamplingSpec,
        request: ReadRequest,
        on_tokens: OnTokens | None = None,
        on_ended: OnEnded | None = None,
    ) -> list[Sample]:
        told = Told(on_tokens) if on_tokens is not None else None

        async def sample(i: int) -> Sample:
            drawn = await self._generation.sample(prompt, spec, i, request, told)
            if on_ended is not None:
                on_ended(i, drawn)
            return drawn

        return await _all(map(sample, range(spec.n)))

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
        spec, policy = sampling_of(group), self._policy
        checked = watch.readouts if watch is not None else ()
        wanted = [*readouts, *checked]

        async def work() -> tuple[list[Sample], GroupReading]:
            async with self._requested(wanted, tokens or bool(checked), policy) as request:
                if request.wide:
                    bare = ReadRequest(policy, request.layout)
                    samples = await self._sample(group.prompt_ids, spec, bare, on_tokens, on_ended)
                    return await read_samples(
                        group.prompt_ids,
                        samples,
                        wanted,
                        lambda answered: self._read(answered, request),
                        policy.version,
                    )
                drawn = await self._drawn(group.prompt_ids, spec, request, watch, on_tokens, on_ended)
                samples = [sample for sample, _ in drawn]
                texts = [text for _, text in drawn]
                kept = [i for i, text in enumerate(texts) if text is not None]
                answered = Group(group.prompt_ids, tuple(samples[i].ids for i in kept))
                rows = [kept.index(i) if i in kept else None for i in range(len(samples))]
                reading = await self._reading(answered, request, [texts[i] for i in kept])
                return samples, spread(reading, wanted, rows, policy.version)

        samples, reading = await self._engine.call(work)
        samples, reading = guarded(samples, reading, watch, self._decoder.text)
        return samples, replace(reading, readings=reading.readings[: len(readouts)])

    async def _drawn(
        self,
        prompt: Ids,
        spec: SamplingSpec,
        request: ReadRequest,
        watch: Watch | None,
        on_tokens: OnTokens | None,
        on_ended: OnEnded | None,
    ) -> list[tuple[Sample, Text | None]]:
        """Each response, and where its rows are, unless ``watch`` has ended it."""
        keys = [self._key(request) for _ in range(spec.n)]
        if watch is None:
            told = Told(on_tokens) if on_tokens is not None else None

            async def read(i: int) -> tuple[Sample, Text]:
                drawn = await self._generation.read(prompt, spec, i, request, keys[i], told)
                if on_ended is not None:
                    on_ended(i, drawn[0])
                return drawn

            return [*await _all(map(read, range(spec.n)))]
        # with stop strings a text is fed anew in the end, under a key of its own
        shown = [self._key(request) for _ in keys] if spec.stop and request.eos else keys
        watched = GroupWatch(self._engine, watch, request, 1 if prompt else 0, shown, on_tokens, on_ended)
        drawn = await watched.draw(
            lambda i, progress: self._generation.read(prompt, spec, i, request, keys[i], progress),
            self._decoder.text,
        )
        taken = {text.key for _, text in drawn if text is not None}
        self._forget += [key for key in request.keys if key not in taken]
        return drawn

    def certain(self, ids: Ids) -> str:
        return self._decoder.certain(ids)

    @property
    def asleep(self) -> bool:
        return self._engine.asleep

    async def sleep(self) -> None:
        await self._engine.sleep()

    async def wake(self) -> None:
        await self._engine.wake()

    def healthy(self) -> bool:
        return self._engine.dead is None

    async def close(self) -> None:
        await self._engine.close()

    async def _read(self, group: Group, request: ReadRequest) -> GroupReading:
        """Every distinct response is one request; vLLM computes their common prompt once."""
        distinct = sorted(set(first_alike(group.responses_ids)))
        texts = dict(zip(distinct, await _all(self._fed(group, i, request) for i in distinct), strict=True))
        return await self._reading(group, request, [texts.get(i) for i in range(len(group.responses_ids))])

    async def _fed(self, group: Group, i: int, request: ReadRequest) -> Text | None:
        ids = group.prompt_ids + group.responses_ids[i] + (self._end_ids[:1] if request.eos else ())
        if not ids:  # there is nothing to feed, and every position of it reads as NaN
            return None
        return await feed(self._engine, ids, request.want(group, i).start, request, self._key(request))

    async def _reading(self, group: Group, request: ReadRequest, texts: Sequence[Text | None]) -> GroupReading:
        """``texts``: of each response; equal responses take the rows of the first of their kind, and the others may
        be None.
        """
        needed, columns = request.selected()
        fed = {i: text for i, text in enumerate(texts) if text is not None}
        rows = await self._rows(group, request, fed, needed)
        for _ in range(READ_AGAIN):
            short = [i for i in fed if rows[i] is None]
            if not short:
                break
            again = dict(zip(short, await _all(self._fed(group, i, request) for i in short), strict=True))
            rows |= await self._rows(group, request, {i: text for i, text in again.items() if text}, needed)
        parts: list[tuple[Want, Floats]] = []
        for i, first in enumerate(first_alike(group.responses_ids)):
            own = rows.get(first, np.zeros((0, len(needed)), np.float32))
            if own is None:
                raise InternalError("vLLM did not read a text to its end")
            parts.append((request.want(group, i), own))
        return GroupReading(
            readings(columns, request.readouts, parts, tokens=request.tokens),
            sum(text.computed for text in fed.values()),
            sum(text.cached for text in fed.values()),
            request.policy.version,
        )

    async def _rows(
        self, group: Group, request: ReadRequest, texts: Mapping[int, Text], columns: list[int]
    ) -> dict[int, Floats | None]:
        """What is wanted of each of these responses; None where there are too few rows of it."""
        taken = await self._take([text.key for text in texts.values()], columns)
        rows: dict[int, Floats | None] = {}
        for (i, text), own in zip(texts.items(), taken, strict=True):
            wanted = request.want(group, i)
            own = own[wanted.start - text.start : wanted.stop - text.start]
            rows[i] = own if len(own) == wanted.stop - wanted.start else None
        return rows

    @asynccontextmanager
    async def _requested(self, readouts: Sequence[Readout], tokens: bool, policy: Policy) -> AsyncIterator[ReadRequest]:
        """What one call asks for; what it reads stays installed until the call is over."""
        async with self._changing:
            wide, columns = await self._installed(readouts)
            request = ReadRequest(policy, self._table.number, columns, tuple(readouts), tokens, wide)
        try:
            if request.eos and not self._end_ids:
                raise InvalidField(
                    f"{self.info.name} has no end-of-sequence token, so nothing can be read at position eos",
                    param="readouts",
                )
            yield request
        except BaseException:
            self._forget += request.keys
            raise
        finally:
            if wide:
                self._retire.append(wide)
            else:
                self._table.end(readouts)

    async def _installed(self, readouts: Sequence[Readout]) -> tuple[int, Columns]:
        """The number of a wide layout for this call, or 0 for the table, and where each tap's numbers stand."""
        new = [readout for readout in readouts if readout not in self._table]
        parts = self._table.place(readouts)
        if parts is None:
            if all(tap.weight_DK is not None for readout in readouts for tap in readout.taps):
                log.warning(
                    "the heads of one call need more numbers a token than are kept for cached tokens (%d, of one layer "
                    "%d): they are read without the prefix cache, which is slower",
                    TABLE_COLUMNS,
                    PLACE_COLUMNS,
                )
            layout = WideLayout(next(self._wide_numbers), readouts, layers=self.info.layers, width=self.info.width)
            try:
                await self._engine.rpc(INSTALL_WIDE, layout.number, layout.width, plain(layout.parts))
            except BaseException:
                self._retire.append(layout.number)  # so that nothing stays behind if the caller leaves meanwhile
                raise
            return layout.number, layout.columns
        if parts:
            try:
                await self._engine.rpc(INSTALL, plain(parts), self._table.live())
            except BaseException:
                self._table.forget(new)
                raise
        return 0, self._table.begin(readouts)

    async def _take(self, keys: Sequence[str], columns: list[int]) -> list[Floats]:
        """Rows of each key. What is asked for while an answer is on its way is asked for together, after it."""
        if not keys:
            return []
        future: asyncio.Future[list[Floats]] = asyncio.get_running_loop().create_future()
        self._asked.setdefault(tuple(columns), []).append((keys, future))
        if self._taking is None:
            self._taking = asyncio.create_task(self._take_all())
        return await future

    async def _take_all(self) -> None:
        try:
            while self._asked:
                asked, self._asked = self._asked, {}
                try:
                    await self._answer(asked)
                except Exception as error:
                    for _, future in (one for alike in asked.values() for one in alike):
                        if not future.done():
                            future.set_exception(error)
        finally:
            self._taking = None

    async def _answer(
        self, asked: Mapping[tuple[int, ...], Sequence[tuple[Sequence[str], asyncio.Future[list[Floats]]]]]
    ) -> None:
        forget, self._forget = self._forget, []
        retire, self._retire = self._retire, []
        live = {columns: [one for one in alike if not one[1].done()] for columns, alike in asked.items()}
        wanted = [([key for keys, _ in alike for key in keys], list(columns)) for columns, alike in live.items()]
        answers = await self._engine.rpc(TAKE, wanted, forget, retire)
        for (columns, alike), (data, counts) in zip(live.items(), answers, strict=True):
            rows = np.frombuffer(data, np.float32).reshape(sum(counts), len(columns))
            parts = iter(np.split(rows, np.cumsum(counts)[:-1]))
            for keys, future in alike:
                own = [next(parts) for _ in keys]
                if not future.done():
                    future.set_result(own)

    def _key(self, request: ReadRequest) -> str:
        request.keys.append(str(next(self._keys)))
        return request.keys[-1]


async def _all(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All of it at once; the first failure cancels the rest and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]
