"""Drawing responses, one token a step, for all callers at once.

Rows that share a cache are drawn in one forward pass (a ``Cohort``): the samples of one prompt, which is computed once
for all of them, and where the caches allow it those of several callers. What a model's caches allow is asked of the
model itself when it is loaded (``choose_caching``): some can't be repeated, some not even continued.

A step ends after every token. So whoever owns the device can do something else in between, and a drawing that nobody
waits for any more is dropped there.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache, DynamicLayer

from inward.backbones.base import OnEnded, OnTokens, stopped
from inward.backbones.generation import finished
from inward.backbones.readout import ReadPlace
from inward.backbones.transformers.capture import last_states
from inward.backbones.transformers.lora import Policy
from inward.backbones.transformers.model import Model
from inward.backbones.transformers.sampling import Choice, choose
from inward.backbones.transformers.selfcheck import TOLERANCE
from inward.backbones.transformers.watching import Watched
from inward.types import Ids, Sample, SamplingSpec, Stop

log = logging.getLogger(__name__)
ROWS = 64
"""Most responses that are drawn at once; further ones begin when some have ended."""
Caching = Literal["shared", "repeated", "alone", "none"]
"""What a model's caches allow: rows of several prompts in one, rows of one prompt, one row, or nothing: then the text
is computed again for each token."""
_CACHES = ("cache", "past_key_values", "cache_params", "state")
"""Names under which models give their cache, and take it back."""


@dataclass(slots=True, eq=False)
class Drawing:
    """What one caller asked for, and how far it is."""

    prompt: Ids
    spec: SamplingSpec
    policy: Policy
    watched: Watched | None = None
    on_tokens: OnTokens | None = None
    on_ended: OnEnded | None = None
    future: Future[list[Sample]] = field(default_factory=Future)
    started: int = 0
    drawn: dict[int, Sample] = field(default_factory=dict)
    stops: dict[int, Stop] = field(default_factory=dict)
    """Of responses that the watch ended, perhaps after they had ended by themselves."""
    told: dict[int, bool] = field(default_factory=dict)
    """Of whose end was told, and whether it was the watch's doing."""

    def finish(self, index: int, sample: Sample) -> None:
        """Response number ``index`` has ended by itself."""
        self.drawn[index] = sample
        if self.watched is not None:
            self._look(lambda watched: watched.ended([index]))

    def look(self, states: Mapping[ReadPlace, torch.Tensor], rows: Mapping[int, int]) -> None:
        """The tokens that its responses ``rows`` have fed are shown to its watch."""
        self._look(lambda watched: watched.look(states, rows))

    def _look(self, look: Callable[[Watched], dict[int, Stop]]) -> None:
        try:
            if self.watched is not None:
                self.stops |= look(self.watched)
        except torch.AcceleratorError:
            raise
        except Exception as error:  # its own watch's affair, not its neighbours'
            settle_error(self.future, error)

    def settle(self, decode: Callable[[Ids], str]) -> None:
        """Tells its caller of those that have ended, and once all have."""
        if self.on_ended is not None:
            for i in [i for i in self.drawn if self.told.get(i) != (i in self.stops)]:
                self.told[i] = i in self.stops
                self.on_ended(i, self._sample(i, decode))
        if len(self.drawn) == self.spec.n:
            settle(self.future, [self._sample(i, decode) for i in range(self.spec.n)])

    def _sample(self, i: int, decode: Callable[[Ids], str]) -> Sample:
        return stopped(self.drawn[i].ids, self.stops[i], decode) if i in self.stops else self.drawn[i]

    @property
    def over(self) -> bool:
        """Whether nobody waits for it any more: it is done, has failed, or its caller has gone."""
        return self.future.done()


@dataclass(slots=True, eq=False)
class Row:
    """One response while it is drawn. Its random numbers depend on seed and index alone, not on its neighbours."""

    drawing: Drawing
    index: int
    random: np.random.Generator
    ids: list[int] = field(default_factory=list)

    @property
    def text(self) -> Ids:
        return (*self.drawing.prompt, *self.ids)


class Sampler:
    """Draws for all callers; ``step`` does the next forward pass. Used by one thread."""

    def __init__(self, model: Model, tokenizer: Any, end_ids: Ids, caching: Caching) -> None:
        self._model, self._tokenizer, self._end_ids, self._caching = model, tokenizer, end_ids, caching
        self._waiting: deque[Drawing] = deque()
        self._cohorts: deque[Cohort] = deque()

    def add(self, drawing: Drawing) -> None:
        """It begins with one of the next steps."""
        self._waiting.append(drawing)

    @property
    def busy(self) -> bool:
        """Whether there is something to draw."""
        return bool(self._waiting or self._cohorts)

    def step(self) -> None:
        """One forward pass: over a prompt whose drawing begins, or over the last token of each row of a cohort.

        What fails is told to the drawings concerned.
        """
        self._forget()
        if self._waiting and self._room():
            self._begin(self._waiting.popleft())
        elif self._cohorts:
            cohort = self._cohorts.popleft()
            self._guarded([row.drawing for row in cohort.rows], lambda: self._advance(cohort))

    def abort(self, error: Exception) -> None:
        """Everybody who waits gets this error."""
        for drawing in [*self._waiting, *(row.drawing for cohort in self._cohorts for row in cohort.rows)]:
            settle_error(drawing.future, error)
        self._waiting.clear()
        self._cohorts.clear()

    def _room(self) -> int:
        return ROWS - sum(len(cohort.rows) for cohort in self._cohorts)

    def _forget(self) -> None:
        """Drops the rows of drawings that are over, and those that a watch has ended."""
        self._waiting = deque(drawing for drawing in self._waiting if not drawing.over)
        for cohort in self._cohorts:
            self._drop(cohort)
            cohort.keep([i for i, row in enumerate(cohort.rows) if not row.drawing.over])
        self._cohorts = deque(cohort for cohort in self._cohorts if cohort.rows)

    def _begin(self, drawing: Drawing) -> None:
        together = self._caching in ("shared", "repeated")
        n = min(self._room(), drawing.spec.n - drawing.started) if together else 1
        rows = [Row(drawing, i, _random(drawing.spec, i)) for i in range(drawing.started, drawing.started + n)]
        drawing.started += n
        if drawing.started < drawing.spec.n:
            self._waiting.append(drawing)

        def begin() -> None:
            with drawing.policy.carried():
                cohort, logits_V = prefill(self._model, drawing.prompt, rows, cached=self._caching != "none")
            self._choose(cohort, logits_V.expand(n, -1))
            if together:
                cohort.spread()
            self._put(cohort)

        self._guarded([drawing], begin)

    def _advance(self, cohort: Cohort) -> None:
        watched = [row.drawing.watched for row in cohort.rows if row.drawing.watched is not None]
        places = {place for own in watched for place in own.places}
        policy = cohort.rows[0].drawing.policy
        with policy.carried(), last_states(self._model.base, self._model.blocks, places) as states:
            logits_BV = cohort.feed(self._model, [row.ids[-1] for row in cohort.rows])
        if watched:
            logits_BV = logits_BV[self._look(cohort, states)]
        if cohort.rows:
            self._choose(cohort, logits_BV)
        self._put(cohort)

    def _look(self, cohort: Cohort, states: Mapping[ReadPlace, torch.Tensor]) -> list[int]:
        """Shows the token that each row has fed to who watches it; rows that end leave the cohort. Which ones stay."""
        for drawing in dict.fromkeys(row.drawing for row in cohort.rows):
            drawing.look(states, {row.index: b for b, row in enumerate(cohort.rows) if row.drawing is drawing})
        return self._drop(cohort)

    def _drop(self, cohort: Cohort) -> list[int]:
        """Rows that were ended meanwhile leave the cohort. Which ones stay."""
        going = [row.index not in row.drawing.stops for row in cohort.rows]
        for row, goes_on in zip(cohort.rows, going, strict=True):
            if not goes_on:
                row.drawing.drawn.setdefault(row.index, Sample(tuple(row.ids), "", "length"))
                row.drawing.settle(self._decode)
        stay = [b for b, goes_on in enumerate(going) if goes_on]
        cohort.keep(stay)
        return stay

    def _decode(self, ids: Ids) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _put(self, cohort: Cohort) -> None:
        if not cohort.rows:
            return
        if self._caching == "shared":
            policy = cohort.rows[0].drawing.policy
            same = next((c for c in self._cohorts if c.rows[0].drawing.policy is policy), None)
            if same is not None:
                same.join(cohort)
                return
        self._cohorts.append(cohort)

    def _choose(self, cohort: Cohort, logits_BV: torch.Tensor) -> None:
        """Draws the next token of each row; rows that have ended leave the cohort."""
        choices = [Choice(row.drawing.spec, row.text, row.random) for row in cohort.rows]
        for row, token in zip(cohort.rows, choose(logits_BV.float(), choices), strict=True):
            row.ids.append(token)
        going = [not self._ended(row) for row in cohort.rows]
        for row, goes_on in zip(cohort.rows, going, strict=True):
            if not goes_on:
                row.drawing.finish(row.index, finished(row.ids, self._tokenizer, self._end_ids, row.drawing.spec))
                row.drawing.settle(self._decode)
            elif row.drawing.on_tokens is not None:
                row.drawing.on_tokens(tuple(row.ids))
        cohort.keep([i for i, goes_on in enumerate(going) if goes_on])

    def _ended(self, row: Row) -> bool:
        spec = row.drawing.spec
        if row.ids[-1] in self._end_ids or len(row.ids) >= spec.max_tokens:
            return True
        if not spec.stop:
            return False
        reach = 4 * max(map(len, spec.stop)) + 8  # tokens: one is at least one byte, and a character at most four
        tail = self._tokenizer.decode(row.ids[-reach:], skip_special_tokens=True)
        return any(stop in tail for stop in spec.stop)

    def _guarded(self, drawings: Sequence[Drawing], work: Callable[[], None]) -> None:
        try:
            work()
        except torch.AcceleratorError:  # a CUDA context does not survive these: the owner's affair
            self._waiting += drawings
            raise
        except Exception as error:
            for drawing in drawings:
                settle_error(drawing.future, error)


@dataclass(slots=True, eq=False)
class Cohort:
    """Rows with one cache, whose last token is yet to be fed. Shorter texts have room on the left."""

    rows: list[Row]
    caches: dict[str, Any]
    """By the name under which the model takes it; empty where the text is computed again for each token."""
    mask_BT: torch.Tensor
    """Which places of the cache hold a token of the row."""

    def feed(self, model: Model, tokens: Sequence[int]) -> torch.Tensor:
        """Logits ``[B, V]`` after these tokens, the next one of each row."""
        if not self.caches:
            (row,) = self.rows
            return _logits(model, [row.text])[0]
        self.mask_BT = pad(self.mask_BT, (0, 1), value=True)
        options: dict[str, Any] = dict(self.caches)
        if not self.mask_BT.all():
            options["attention_mask"] = self.mask_BT.long()
            options["position_ids"] = self.mask_BT.sum(dim=1, keepdim=True) - 1
        logits_BV, self.caches = _logits(model, [[token] for token in tokens], use_cache=True, **options)
        return logits_BV

    def keep(self, indices: list[int]) -> None:
        """Only these rows go on."""
        if len(indices) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in indices]
        if not self.rows or not self.caches or len(self.mask_BT) == 1:
            return
        chosen = torch.tensor(indices, device=self.mask_BT.device)
        self.mask_BT = self.mask_BT[chosen]
        (cache,) = self.caches.values()
        cache.batch_select_indices(chosen)
        unused = int(self.mask_BT.int().argmax(dim=1).min())
        if unused:
            self.mask_BT = self.mask_BT[:, unused:]
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[:, :, unused:], layer.values[:, :, unused:]

    def spread(self) -> None:
        """One row of cache becomes one for each row that is to be drawn."""
        if len(self.rows) > 1:
            (cache,) = self.caches.values()
            cache.batch_repeat_interleave(len(self.rows))
            self.mask_BT = self.mask_BT.expand(len(self.rows), -1)

    def join(self, other: Cohort) -> None:
        """Takes in the rows of another one.

        Raises:
            TypeError: its cache is no plain list of keys and values.
        """
        (cache,), (others,) = self.caches.values(), other.caches.values()
        T = max(self.mask_BT.shape[1], other.mask_BT.shape[1])
        for mine, theirs in zip(_layers(cache), _layers(others), strict=True):
            mine.keys = torch.cat([_left(mine.keys, T), _left(theirs.keys, T)])
            mine.values = torch.cat([_left(mine.values, T), _left(theirs.values, T)])
        masks = [pad(mask, (T - mask.shape[1], 0), value=False) for mask in (self.mask_BT, other.mask_BT)]
        self.mask_BT = torch.cat(masks)
        self.rows += other.rows


def prefill(model: Model, prompt: Ids, rows: list[Row], *, cached: bool = True) -> tuple[Cohort, torch.Tensor]:
    """The prompt computed once: a cohort whose cache has one row, and the logits ``[V]`` after it."""
    mask_BT = torch.ones((1, len(prompt)), dtype=torch.bool, device=model.device)
    logits_BV, caches = _logits(model, [prompt], **({"use_cache": True} if cached else {}))
    if cached and not caches:
        raise TypeError(f"{type(model.whole).__name__} gives no cache")
    return Cohort(rows, caches if cached else {}, mask_BT), logits_BV[0]


@torch.inference_mode()
def choose_caching(model: Model) -> Caching:
    """What this model's caches allow without a change of its logits, the most first."""
    levels: tuple[Caching, ...] = ("shared", "repeated", "alone")
    for caching in levels:
        try:
            reason = _differs(model, caching)
        except Exception as error:  # a model may stumble over anything here; slower ways remain
            reason = f"{type(error).__name__}: {error}"
        if reason is None:
            return caching
        log.info("caches are not %s: %s", caching, reason)
    return "none"


def _differs(model: Model, caching: Caching) -> str | None:
    """Draws made-up tokens this way, and compares the logits with those of whole texts."""
    draw = np.random.default_rng(0)
    vocabulary = int(model.config.vocab_size)
    spec = SamplingSpec(1)

    def rows(prompt: Ids, n: int) -> list[Row]:
        return [Row(Drawing(prompt, spec, Policy()), i, draw) for i in range(n)]

    first, second = (tuple(draw.integers(0, vocabulary, length).tolist()) for length in (9, 4))
    cohort, logits_V = prefill(model, first, rows(first, 1 if caching == "alone" else 2))
    compared = [(logits_V, first)]
    if caching != "alone":
        cohort.spread()
    if caching == "shared":
        other, _ = prefill(model, second, rows(second, 1))
        cohort.join(other)
    for step in range(3):
        if step:  # the first row leaves, until the last one, a shorter text, is alone
            cohort.keep(list(range(len(cohort.rows)))[1:] or [0])
        for row in cohort.rows:
            row.ids.append(int(draw.integers(0, vocabulary)))
        logits_BV = cohort.feed(model, [row.ids[-1] for row in cohort.rows])
        compared += [(logits_BV[i], row.text) for i, row in enumerate(cohort.rows)]
    for i, (own_V, text) in enumerate(compared):
        truth_V = _logits(model, [text])[0][0].float()
        error = float(((own_V.float() - truth_V) / truth_V.std()).square().mean().sqrt())
        if not error <= TOLERANCE[model.dtype]:
            return f"logits {i} differ by {error:.2g} standard deviations"
    return None


def _logits(model: Model, ids: Sequence[Sequence[int]], **options: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """After the last token of each row, ``[B, V]``, and the cache by its name."""
    known = signature(model.whole.forward).parameters
    if "logits_to_keep" in known:
        options["logits_to_keep"] = 1
    if "use_cache" in known:
        options.setdefault("use_cache", False)
    output = model.whole(input_ids=torch.tensor(ids, device=model.device), **options)
    return output.logits[:, -1], _given(output, known)


def _given(output: Any, known: Collection[str]) -> dict[str, Any]:
    """The cache, by the name under which ``forward`` takes it back; outputs have others for the same."""
    caches: dict[str, Any] = {}
    for name in _CACHES:
        cache = getattr(output, name, None) if name in known else None
        if cache is not None and all(cache is not other for other in caches.values()):
            caches[name] = cache
    return caches


def _layers(cache: Any) -> list[DynamicLayer]:
    if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise TypeError("its cache is no plain list of keys and values")
    return list(cache.layers)


def _left(states: torch.Tensor, T: int) -> torch.Tensor:
    return pad(states, (0, 0, T - states.shape[2], 0))


def _random(spec: SamplingSpec, index: int) -> np.random.Generator:
    """Sample i of seed s is sample 0 of seed s + i, as in vLLM, whether they are drawn as one list or apart."""
    return np.random.default_rng(None if spec.seed is None else (spec.seed + index) % 2**32)


def settle(future: Future[Any], result: Any) -> None:
    """Its result, unless its caller has gone."""
    with suppress(InvalidStateError):
        future.set_result(result)


def settle_error(future: Future[Any], error: Exception) -> None:
    """Its failure, unless its caller has gone."""
    with suppress(InvalidStateError):
        future.set_exception(error)
