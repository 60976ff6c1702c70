"""Requests to vLLM: a text that is only fed, and a response that is drawn, so fed that every token of it has been read.

In the pass that generates, every token enters the model except the last one drawn. So one token more than wanted is
drawn: then the last wanted one has entered. Position ``eos`` needs an EOS in the model as well. On a GPU, where vLLM
begins a step before it knows how the last one ended, an EOS that was drawn has entered the model, too; a response that
has none (it met the limit) is submitted again with one, and all but the last block of it comes from the cache. On a
CPU, whose blocks are larger, the EOS follows, while the request's keys and values are still there, as the next input
of vLLM's streaming session. Sessions take no stop strings: then prompt, response and EOS are submitted again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from inward.backbones.generation import finished
from inward.backbones.vllm.engine import Engine
from inward.backbones.vllm.internals import (
    LoRARequest,
    RequestOutputKind,
    SamplingParams,
    StreamingInput,
    has,
    tokens_input,
)
from inward.backbones.vllm.layout import Policy, ReadRequest
from inward.backbones.vllm.protocol import EXTRA_ARG, Wish
from inward.types import Ids, Sample, SamplingSpec

AT_THE_END = 1 << 30
"""Stream interval: say nothing before a request ends. Older versions of vLLM tell of every token."""


@dataclass(frozen=True, slots=True)
class Text:
    """A request that has ended, and whose rows from position ``start`` on wait to be taken under ``key``."""

    key: str
    start: int
    computed: int
    cached: int


class Progress(Protocol):
    """Who follows a response while it is drawn."""

    @property
    def key(self) -> str | None:
        """Under which its tokens' rows can be seen meanwhile, if somebody wants to see them."""
        ...

    def tell(self, drawn: Sequence[int]) -> None:
        """All of its tokens that were drawn so far."""
        ...


async def feed(engine: Engine, ids: Ids, start: int, request: ReadRequest, key: str) -> Text:
    """Feeds a text. vLLM draws a token at least; nobody looks at it."""
    params = SamplingParams(
        max_tokens=1,
        temperature=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=_extra_args(key, request, start),
        skip_reading_prefix_cache=bool(request.wide),
    )
    output = await engine.final(_prompt(ids, request), params, _lora(request))
    return Text(key, start, len(ids) - output.num_cached_tokens, output.num_cached_tokens)


class Generation:
    """Draws responses.

    Args:
        end_ids: what ends a text; the first is the one that is appended for position ``eos``.
        sessions: whether that one follows in a session.
    """

    def __init__(self, engine: Engine, tokenizer: Any, end_ids: Ids, *, sessions: bool) -> None:
        self.end_ids = end_ids
        self.sessions = sessions
        self._engine, self._tokenizer = engine, tokenizer

    async def sample(
        self, prompt: Ids, spec: SamplingSpec, index: int, request: ReadRequest, progress: Progress | None = None
    ) -> Sample:
        """The response number ``index`` of ``spec.n``, not read; ``progress`` is told of its tokens meanwhile."""
        params = self._params(spec, index, deltas=progress is not None)
        drawn: list[int] = []
        async for output in self._engine.generate(_prompt(prompt, request), params, _lora(request)):
            drawn += output.outputs[0].token_ids
            if progress is not None:
                progress.tell(self._own(drawn, spec))
        return self._finished(drawn, spec)

    async def read(
        self,
        prompt: Ids,
        spec: SamplingSpec,
        index: int,
        request: ReadRequest,
        key: str,
        progress: Progress | None = None,
    ) -> tuple[Sample, Text]:
        """The same, and read in the pass that draws it; ``progress`` is told of its tokens meanwhile, and they can be
        seen under ``progress.key``. Of an EOS that was drawn there may be no row.
        """
        in_flight = request.eos and not spec.stop
        if in_flight and self.sessions:
            return await self._session(prompt, spec, index, request, key, progress)
        start = max(len(prompt) - 1, 0)
        shown = key if in_flight or not request.eos else progress and progress.key
        extra_args = _extra_args(shown, request, start) if shown else None
        more = 0 if request.eos else 1
        params = self._params(spec, index, more=more, extra_args=extra_args, deltas=progress is not None)
        drawn: list[int] = []
        async for output in self._engine.generate(_prompt(prompt, request), params, _lora(request)):
            drawn += output.outputs[0].token_ids
            if progress is not None:
                progress.tell(self._own(drawn, spec))
        sample, cached = self._finished(drawn, spec), output.num_cached_tokens
        computed = len(prompt) + len(drawn) - 1 - cached
        if in_flight and drawn[-1] == self.end_ids[0]:
            return sample, Text(key, start, computed + 1, cached)
        if request.eos or sample.ids != tuple(drawn[: len(sample.ids)]):
            text = prompt + sample.ids + (self.end_ids[:1] if request.eos else ())
            fed = await feed(self._engine, text, start, request, key)
            computed, cached = computed + fed.computed, cached + fed.cached
        return sample, Text(key, start, computed, cached)

    async def _session(
        self,
        prompt: Ids,
        spec: SamplingSpec,
        index: int,
        request: ReadRequest,
        key: str,
        progress: Progress | None,
    ) -> tuple[Sample, Text]:
        start = max(len(prompt) - 1, 0)
        extra_args = _extra_args(key, request, start)
        rest: asyncio.Future[Ids] = asyncio.get_running_loop().create_future()

        async def inputs() -> AsyncGenerator[StreamingInput, None]:
            yield StreamingInput(_prompt(prompt, request), params)
            yield StreamingInput(_prompt(await rest, request), last)

        params = self._params(spec, index, extra_args=extra_args, deltas=True, interval=1 if progress else AT_THE_END)
        last = SamplingParams(
            max_tokens=1, temperature=0, detokenize=False, output_kind=RequestOutputKind.DELTA, extra_args=extra_args
        )
        drawn: list[int] = []
        cached = 0
        async for output in self._engine.generate(inputs(), params, _lora(request)):
            if rest.done():
                continue
            cached = max(cached, output.num_cached_tokens or 0)
            drawn += output.outputs[0].token_ids
            if progress is not None:
                progress.tell(self._own(drawn, spec))
            if output.outputs[0].finish_reason is not None:
                # vLLM drops the last token drawn, which has not entered the model
                rest.set_result(self._finished(drawn, spec).ids[len(drawn) - 1 :] + self.end_ids[:1])
        sample = self._finished(drawn, spec)
        return sample, Text(key, start, len(prompt) + len(sample.ids) + 1 - cached, cached)

    def _params(
        self,
        spec: SamplingSpec,
        index: int,
        *,
        more: int = 0,
        extra_args: dict[str, Any] | None = None,
        deltas: bool = False,
        interval: int = 1,
    ) -> SamplingParams:
        """``deltas``: say what was drawn since the last time, every ``interval`` tokens, not all in the end."""
        return SamplingParams(
            max_tokens=spec.max_tokens + more,
            temperature=spec.temperature,
            top_p=spec.top_p,
            top_k=spec.top_k,
            min_p=spec.min_p,
            repetition_penalty=spec.repetition_penalty,
            seed=None if spec.seed is None else spec.seed + index,
            stop=list(spec.stop) or None,
            stop_token_ids=list(self.end_ids),
            detokenize=bool(spec.stop),
            output_kind=RequestOutputKind.DELTA if deltas else RequestOutputKind.FINAL_ONLY,
            extra_args=extra_args,
            **({"stream_interval": interval} if deltas and has("SamplingParams", "stream_interval") else {}),
        )

    def _own(self, drawn: Sequence[int], spec: SamplingSpec) -> Sequence[int]:
        """Without the end of the text, or what is drawn beyond the limit."""
        return drawn[:-1] if drawn and drawn[-1] in self.end_ids else drawn[: spec.max_tokens]

    def _finished(self, drawn: Sequence[int], spec: SamplingSpec) -> Sample:
        return finished(drawn[: spec.max_tokens], self._tokenizer, self.end_ids, spec)


def _prompt(ids: Ids, request: ReadRequest) -> Any:
    return tokens_input(list(ids), cache_salt=request.salt)


def _lora(request: ReadRequest) -> LoRARequest | None:
    return lora_request(request.policy)


def lora_request(policy: Policy) -> LoRARequest | None:
    """How vLLM is told of a policy; the base needs no telling."""
    return LoRARequest(f"{policy.version}-{policy.number}", policy.number, policy.folder) if policy.folder else None


def _extra_args(key: str, request: ReadRequest, start: int) -> dict[str, Any]:
    return {EXTRA_ARG: list(Wish(key, request.wide, start))}
