"""The model, opened for as long as somebody reads it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import TypeVar

from inward.backbones.base import Backbone
from inward.prompts import Prompts

T = TypeVar("T")
OpenModel = Callable[[], AbstractAsyncContextManager[tuple[Backbone, Prompts]]]
"""Opens the model, here or in another process: it can be pickled."""


def with_model(opened: OpenModel, use: Callable[[Backbone, Prompts], Awaitable[T]]) -> T:
    """What ``use`` makes of the model, which is loaded for it and closed again."""

    async def used() -> T:
        async with opened() as (backbone, prompts):
            return await use(backbone, prompts)

    return asyncio.run(used())
