"""A backbone without a model, shipped: deterministic, instant, for tests of everything around it, load tests and
rehearsals.

A state is a pure function of the ids up to its token and of the layer (hashed to numbers of unit variance), so it obeys
what callers rely on: it depends on nothing to its right, and on no neighbour.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from inward.backbones.base import Capacity, OnEnded, OnTokens, Watch, asleep, guarded, read_samples, stopped
from inward.backbones.peft_files import read_adapter
from inward.backbones.readout import Fusion, ReadPlace
from inward.backbones.transformers.packing import Packed, Segment, pack
from inward.errors import EngineDead, InternalError
from inward.types import BASE, BackboneInfo, Floats, Group, GroupReading, Ids, Reading, Readout, Sample, Stop

_ODD = np.uint64(0x9E3779B97F4A7C15)


def _numbered(ids: Ids) -> str:
    return " ".join(str(i) for i in ids)


class FakeBackbone:
    """States and samples from hashes. ``calls`` counts calls to ``read``, ``computed`` holds the last groups that were
    read, in order.
    """

    def __init__(
        self,
        layers: int = 4,
        width: int = 16,
        delay_per_token: float = 0.0,
        max_tokens: int = 2048,
        *,
        tokens: int = 4096,
        vocabulary: int = 256,
        eos_id: int = 0,
        decode: Callable[[Ids], str] = _numbered,
        fingerprint: str | None = None,
    ) -> None:
        """``delay_per_token`` in seconds; ``tokens`` is the declared capacity; ``decode`` turns drawn ids into text.

        With a real model's ``fingerprint``, ``layers`` and ``width`` it stands in for that model, and the model's heads
        load.
        """
        own = hashlib.sha256(f"fake layers={layers} width={width}".encode()).hexdigest()[:32]
        self.info = BackboneInfo(
            "fake", "", fingerprint or f"sha256:{own}", layers, width, max_tokens, "float32", "cpu"
        )
        self.capacity = Capacity(tokens)
        self.policy_version = BASE
        self.delay_per_token = delay_per_token
        self.calls = 0
        self.computed: deque[Group] = deque(maxlen=4096)  # the last ones: under load it must not grow
        self._vocabulary, self._eos_id, self._decode = vocabulary, eos_id, decode
        self._fails: Callable[[Group], bool] = lambda group: False
        self._alive = True
        self.asleep = False
        self._device = asyncio.Lock()
        self._draws = 0

    def fail_on(self, predicate: Callable[[Group], bool]) -> None:
        """From now on a call that carries such a group raises InternalError, whatever else it carries."""
        self._fails = predicate

    def die(self) -> None:
        """From now on every call raises EngineDead."""
        self._alive = False

    async def load_adapter(self, version: str, folder: Path | None) -> None:
        if folder is not None:
            await asyncio.to_thread(read_adapter, folder)
        self.policy_version = version

    async def read(
        self, groups: Sequence[Group], readouts: Sequence[Readout], *, tokens: bool = False
    ) -> list[GroupReading]:
        return await self._read(groups, readouts, tokens, self.policy_version)

    async def _read(
        self, groups: Sequence[Group], readouts: Sequence[Readout], tokens: bool, version: str
    ) -> list[GroupReading]:
        fusion = Fusion(readouts, layers=self.info.layers, width=self.info.width, tokens=tokens)
        packed = pack(groups, self._eos_id if fusion.eos else None)
        async with self._device:
            self.calls += 1
            await self._work(len(packed.ids_T), groups)
            self.computed += groups
        return [
            GroupReading(reading, len(segment.rows), max(len(segment.responses) - 1, 0) * len(segment.prompt), version)
            for reading, segment in self._readings(groups, fusion, version)
        ]

    def _readings(
        self, groups: Sequence[Group], fusion: Fusion, version: str
    ) -> list[tuple[tuple[Reading, ...], Segment]]:
        packed = pack(groups, self._eos_id if fusion.eos else None)
        prefixes_T, salt = _prefixes(packed), np.uint64(_salt(version))
        readings = fusion.evaluate(lambda place, rows: self._states(place, prefixes_T[rows] ^ salt), packed.spans)
        return list(zip(readings, packed.segments, strict=True))

    async def sample(self, group: Group) -> list[Sample]:
        spec = group.sampling
        return await self._sample(group, spec.n * spec.max_tokens if spec else 0)

    async def _sample(self, group: Group, tokens: int) -> list[Sample]:
        """``tokens`` that are drawn at once."""
        version, spec = self.policy_version, group.sampling
        if spec is None:
            raise ValueError("the group carries no sampling spec")
        async with self._device:
            await self._work(len(group.prompt_ids) + tokens, [group])
            self._draws += 1
        seed = spec.seed if spec.seed is not None else self._draws
        rng = np.random.default_rng([seed ^ _salt(version), *group.prompt_ids])
        return [self._draw(rng, spec.max_tokens) for _ in range(spec.n)]

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
        version = self.policy_version
        told = on_tokens is not None or on_ended is not None
        samples = await (self._sample(group, 0) if told else self.sample(group))
        if watch is not None:
            samples = await self._watched(group.prompt_ids, samples, watch, version, on_tokens, on_ended)
        elif on_tokens is not None:
            for t in range(1, len(samples[0].ids)):
                await self._drawn(samples[0].ids[:t], on_tokens)
        elif on_ended is not None:
            for i, sample in sorted(enumerate(samples), key=lambda one: len(one[1].ids)):
                on_ended(i, sample)
                await self._work(1, ())
        wanted = [*readouts, *watch.readouts] if watch is not None and watch.guards else list(readouts)

        async def read(answered: Group) -> GroupReading:
            return (await self._read([answered], wanted, tokens or len(wanted) > len(readouts), version))[0]

        return guarded(*await read_samples(group.prompt_ids, samples, wanted, read, version), watch, self._decode)

    async def _drawn(self, ids: Ids, on_tokens: OnTokens | None) -> None:
        if on_tokens is not None:
            on_tokens(ids)
            await self._work(1, ())

    async def _watched(
        self,
        prompt: Ids,
        samples: Sequence[Sample],
        watch: Watch,
        version: str,
        on_tokens: OnTokens | None,
        on_ended: OnEnded | None,
    ) -> list[Sample]:
        """As if they were drawn token by token, all at one pace."""
        group = Group(prompt, tuple(sample.ids for sample in samples))
        ((reading, segment),) = self._readings([group], Fusion(
            watch.readouts, layers=self.info.layers, width=self.info.width, tokens=True
        ), version)  # fmt: skip
        stops: dict[int, tuple[Stop, int]] = {}
        for t in range(1 + max(map(len, segment.responses), default=0)):
            await self._drawn(samples[0].ids[: t + 1], None if stops else on_tokens)
            if on_ended is not None:
                await self._work(1, ())
            going = [i for i in range(len(samples)) if i not in stops]
            news = {
                i: [own.tokens_TK[i][t : t + 1] for own in reading if own.tokens_TK is not None]
                for i in going
                if t < len(samples[i].ids)
            }
            found = watch.look(news, [i for i in going if t >= len(samples[i].ids)])
            stops |= {i: (stop, min(t + 1, len(samples[i].ids))) for i, stop in found.items()}
            if on_ended is not None:
                for i in [i for i in going if i in found or t == len(samples[i].ids)]:
                    on_ended(i, self._stopped(samples[i], stops.get(i)))
        return [self._stopped(sample, stops.get(i)) for i, sample in enumerate(samples)]

    def _stopped(self, sample: Sample, by: tuple[Stop, int] | None) -> Sample:
        return stopped(sample.ids[: by[1]], by[0], self._decode) if by is not None else sample

    def certain(self, ids: Ids) -> str:
        return self._decode(ids)

    async def sleep(self) -> None:
        async with self._device:
            self.asleep = True

    async def wake(self) -> None:
        self.asleep = False

    def healthy(self) -> bool:
        return self._alive

    async def close(self) -> None:
        async with self._device:
            self._alive = False

    async def _work(self, tokens: int, groups: Sequence[Group]) -> None:
        if self._alive:
            await asyncio.sleep(self.delay_per_token * tokens)
        if not self._alive:
            raise EngineDead("the fake backbone is dead")
        if self.asleep:
            raise asleep()
        if any(self._fails(group) for group in groups):
            raise InternalError("the fake backbone was told to fail on this group")

    def _draw(self, rng: np.random.Generator, max_tokens: int) -> Sample:
        length = int(rng.integers(1, 2 * max_tokens + 1))
        ids = [
            i if i != self._eos_id else i + 1
            for i in rng.integers(0, self._vocabulary - 1, min(length, max_tokens)).tolist()
        ]
        return Sample(tuple(ids), self._decode(tuple(ids)), "stop" if length < max_tokens else "length")

    def _states(self, place: ReadPlace, prefixes_R: NDArray[np.uint64]) -> Floats:
        keys = (
            prefixes_R[:, None]
            + np.arange(self.info.width, dtype=np.uint64) * _ODD
            + np.uint64(place.layer) * _mix(_ODD)
        )
        uniform = _mix(keys).astype(np.float64) / 2.0**64
        states = ((2 * uniform - 1) * 3**0.5).astype(np.float32)
        if place.final_norm:
            states /= np.sqrt(np.mean(states**2, axis=1, keepdims=True))
        return states


def _salt(version: str) -> int:
    """What makes another policy of another version; the base has none."""
    return 0 if version == BASE else int.from_bytes(hashlib.sha256(version.encode()).digest()[:8])


def _mix(x: NDArray[np.uint64] | np.uint64) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele et al. 2014): neighbouring keys give unrelated numbers."""
    z = np.atleast_1d(np.asarray(x, dtype=np.uint64))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _prefixes(packed: Packed) -> NDArray[np.uint64]:
    """For each row a hash of the ids from the beginning of its own text to it."""
    hashes = np.zeros(len(packed.ids_T), dtype=np.uint64)
    for segment in packed.segments:
        before = 0
        for row in segment.prompt:
            before = hashes[row] = _chain(before, packed.ids_T[row])
        for response in segment.responses:
            prefix = before
            for row in response:
                prefix = hashes[row] = _chain(prefix, packed.ids_T[row])
    return hashes


def _chain(prefix: int, token: int) -> int:
    return ((int(prefix) ^ (int(token) + 1)) * 0x100000001B3 + 0x9E3779B9) & 0xFFFFFFFFFFFFFFFF
