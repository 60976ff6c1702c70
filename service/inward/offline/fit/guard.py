"""Thresholds of a guard: which running score so many of the acceptable responses never fall below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import RenderableType
from rich.table import Table

from inward.backbones.base import Backbone
from inward.errors import DataError, InwardError
from inward.heads import store
from inward.heads.base import Head
from inward.heads.guard import GuardThresholds
from inward.heads.pooling import Pool
from inward.heads.running import RunningScore, running_pool, token_scores
from inward.offline.states.model_pass import read_every_token
from inward.prompts import Prompts, Texts
from inward.types import Prompt, Reading


@dataclass(frozen=True, slots=True)
class GuardReport:
    """Printed after the fit."""

    responses: int
    thresholds: GuardThresholds

    def __rich__(self) -> RenderableType:
        table = Table("false stops", *(f"{rate:.0%}" for rate in self.thresholds.rates), box=None, pad_edge=False)
        table.add_row("below", *(f"{threshold:.3g}" for threshold in self.thresholds.thresholds))
        table.title = f"pool {self.thresholds.pool.name}, {self.responses} acceptable responses"
        return table


async def fit_guard(
    backbone: Backbone,
    prompts: Prompts,
    head: Head,
    texts: Sequence[tuple[Prompt, tuple[str, ...]]],
    *,
    name: str,
    pool: str = "",
) -> tuple[Head, GuardReport]:
    """The head with thresholds for one pool more. Responses that can't be read are left out.

    Args:
        texts: prompts with responses that are all acceptable.
        pool: as ``Pool.parse`` reads it; empty: the head's own, else ``max_ema``.

    Raises:
        DataError: too few responses.
        InvalidField: the head has no score at a token, or not this pool.
    """
    chosen = running_pool(head, pool, Pool(name="max_ema"), param="pool")
    grouped = await prompts.group_many([Texts(prompt, responses) for prompt, responses in texts])
    groups = [one.group for one in grouped if not isinstance(one, InwardError)]
    lowest: list[float] = []

    def deliver(_: int, readings: tuple[Reading, ...]) -> None:
        tokens = {n: values for n, values in enumerate(readings[0].tokens_TK or ()) if len(values)}
        for n, scores_T in token_scores(head, tokens).items():
            running = RunningScore(chosen)
            so_far = [running.push(float(s), v) for s, v in zip(scores_T, tokens[n], strict=True)]
            if np.isfinite(so_far).all():
                lowest.append(min(so_far))

    await read_every_token(backbone, groups, [head.readout], deliver)
    if not lowest:
        raise DataError("none of the responses can be read")
    thresholds = GuardThresholds.fit(chosen, lowest)
    others = [one for one in head.manifest.calibration.get("guard", ()) if Pool(**one["pool"]) != chosen]
    calibration = {**head.manifest.calibration, "guard": [*others, thresholds.dump()]}
    manifest = head.manifest.model_copy(update={"name": name, "calibration": calibration})
    return store.KINDS[manifest.kind].from_tensors(manifest, head.tensors()), GuardReport(len(lowest), thresholds)
