"""What ``inward annotate`` scores with where no service is named: the model, loaded in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import numpy as np

from inward.api.rows import score_rows, token_scores
from inward.offline.annotate.options import AnnotateOptions
from inward.offline.annotate.scorer import RowScorer, Scorer, TokenScores
from inward.offline.states.read import extract_pairs
from inward.processes.standalone import Standalone
from inward.settings import Settings
from inward.types import Floats
from inward.wire import ScoringOptions

ALONE = {
    "timeout": 1e6, "api_keys": frozenset[str](), "max_body_bytes": 2**30, "queue_tokens": 10**9, "sharing_window": 0.0,
}  # fmt: skip
"""In this process nobody is kept waiting by much work at once, and nobody calls."""


@asynccontextmanager
async def in_process(options: AnnotateOptions, settings: Settings) -> AsyncIterator[Scorer]:
    """The model of the settings, loaded here: each pair is scored as a row of a bulk job is."""
    house = await Standalone.open(settings.model_copy(update=ALONE))
    try:
        request = ScoringOptions(truncate=options.truncate)
        score = partial(score_rows, house.services, "margin", head=options.head, options=request)

        def fit_of(head: str) -> Mapping[str, Any]:
            fit: Mapping[str, Any] = house.services.heads.show(head).get("fit", {})
            return fit

        async def tokens_of(head: str, pairs: Sequence[Mapping[str, Any]]) -> list[TokenScores | None]:
            found = await token_scores(house.services, pairs, head=head, options=request)
            return [TokenScores(*both) if both else None for both in found]

        async def states_of(pairs: Sequence[Any]) -> Floats:
            middle = [round(house.backbone.info.layers / 2)]
            states = await extract_pairs(house.backbone, house.prompts, pairs, layers=middle, position="mean")
            both = [states.chosen_NLD[:, 0], states.rejected_NLD[:, 0]]
            return np.asarray(np.mean(both, axis=0), dtype=np.float32)

        yield RowScorer(score, house.info(), house.backbone.capacity.tokens, fit_of, tokens_of, states_of)
    finally:
        await house.close(timeout=5.0)
