"""Where heads are looked up, switched and updated: the registry, with a backbone at hand to read the pairs of an
update.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np

from inward import metrics
from inward.backbones.base import Backbone
from inward.batching import within
from inward.errors import InvalidField, InwardError, Unavailable
from inward.heads.hybrid import HybridHead
from inward.heads.online import online_step
from inward.heads.recent import RecentPairs
from inward.heads.registry import Registry
from inward.prompts import Prompts, Texts
from inward.types import Floats, Group, HeadRef, Kind, Readout, Tap


class LocalHeadControl:
    """See the module; one for each process that owns a backbone."""

    def __init__(self, registry: Registry, backbone: Backbone, prompts: Prompts) -> None:
        self._registry, self._backbone, self._prompts = registry, backbone, prompts
        self._one_update_at_a_time = asyncio.Lock()
        self._recent: dict[str, RecentPairs] = {}
        """Of every head that is updated."""

    def resolve(self, name: str | None, kinds: Sequence[Kind]) -> HeadRef:
        """The active version of the head ``name``, or of the first one of the first of ``kinds`` that is loaded.

        Raises:
            NotFound: there is none; the message lists what is loaded.
        """
        return self._registry.snapshot().resolve(name, kinds).ref

    async def refresh(self) -> None:
        """It always knows."""

    def listing(self) -> list[dict[str, Any]]:
        """What ``GET /heads`` answers."""
        return self._registry.listing()

    def show(self, name: str) -> dict[str, Any]:
        """What ``GET /heads/{name}`` answers.

        Raises:
            NotFound: no such head.
        """
        return self._registry.show(name)

    async def activate(self, name: str, version: int) -> HeadRef:
        """Switches to a version, for every batch that begins from now on.

        Raises:
            NotFound: no such head or version.
        """
        async with self._one_update_at_a_time:  # one that is computed now would come after it, and undo it
            return (await asyncio.to_thread(self._registry.activate, name, version)).ref

    async def update(self, name: str, sequence: int, pairs: Sequence[Texts], *, lr: float) -> HeadRef:
        """One online step of a hybrid head on labelled pairs (chosen first), as a new version that is active at once.

        The pairs' states are read with the policy as it is now. A repeat of the last ``sequence`` changes nothing.

        Raises:
            NotFound: no such head.
            Conflict: ``sequence`` is neither the last one nor the next.
            InvalidField: the head has nothing to train online, or a pair can't be used.
            Unavailable: the policy was switched meanwhile.
        """
        async with self._one_update_at_a_time:
            if (done := self._registry.applied(name, sequence)) is not None:
                return done.ref
            head = self._registry.snapshot().resolve(name)
            if not isinstance(head, HybridHead):
                raise InvalidField(
                    f"head {name!r} is of kind {head.manifest.kind}; only hybrid heads are updated online", param="name"
                )
            if head.pools:
                raise InvalidField(
                    f"head {name!r} pools the scores of its tokens, and a step would teach it another score than the "
                    "one it gives; update one that was fitted without --pool",
                    param="name",
                )
            chosen_NLD, rejected_NLD = await self._states(head, pairs)
            new = await asyncio.to_thread(online_step, head, chosen_NLD, rejected_NLD, lr=lr)
            added = await asyncio.to_thread(lambda: self._registry.add_version(new, sequence=sequence))
            await asyncio.to_thread(self._watch, name, new, chosen_NLD, rejected_NLD)
            return added.ref

    def _watch(self, name: str, head: HybridHead, chosen_NLD: Floats, rejected_NLD: Floats) -> None:
        """Says how well the head fits the pairs of its last updates."""
        recent = self._recent.setdefault(name, RecentPairs())
        recent.add(chosen_NLD, rejected_NLD)
        if (cosine := recent.cosine(head)) is not None:
            metrics.HEAD_FIT_COSINE.labels(head=name).set(cosine)

    async def _states(self, head: HybridHead, pairs: Sequence[Texts]) -> tuple[Floats, Floats]:
        """The pairs' states at the head's layers, ``[N, L, D]`` each, in batches that the backbone takes."""
        groups: list[Group] = []
        for i, grouped in enumerate(await self._prompts.group_many(pairs)):
            if isinstance(grouped, InwardError):
                raise InvalidField(f"pair {i}: {grouped.message}", param=f"pairs.{i}")
            groups.append(grouped.group)
        manifest = head.manifest
        last = self._backbone.info.layers
        taps = tuple(Tap(k, manifest.position, final_norm=manifest.final_norm and k == last) for k in manifest.layers)
        states: list[Floats] = []
        versions: set[str] = set()
        for batch in within(groups, self._backbone.capacity.tokens, lambda group: group.tokens):
            for reading in await self._backbone.read(batch, [Readout(taps)]):
                states.append(reading.readings[0].values_NK.reshape(2, len(taps), -1))
                versions.add(reading.policy_version)
        if len(versions) > 1:
            raise Unavailable(
                "the policy was switched during this update, and nothing has changed; send it again", retry_after=1.0
            )
        both_N2LD = np.stack(states)
        return both_N2LD[:, 0], both_N2LD[:, 1]
