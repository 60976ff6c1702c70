"""What a head is: a manifest, a readout (its linear part, evaluated in the backbone) and what comes after it, in
numpy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from inward.heads.pooling import Pool
from inward.types import BackboneInfo, Detail, HeadRef, Kind, Position, Reading, Readout, Scores

FORMAT_VERSION = 1
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""What heads may be called."""


class BackboneRef(BaseModel):
    """The backbone that a head was fitted on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    revision: str = ""
    fingerprint: str

    @classmethod
    def of(cls, info: BackboneInfo) -> Self:
        """As manifests name it."""
        return cls(name=info.name, revision=info.revision, fingerprint=info.fingerprint)


class Manifest(BaseModel):
    """``head.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = FORMAT_VERSION
    name: str = Field(pattern=NAME)
    kind: Kind
    version: int = Field(ge=1)
    created: str
    """UTC, ISO 8601."""
    backbone: BackboneRef
    layers: tuple[int, ...]
    """Index k is the residual stream after k blocks."""
    position: Position = "last"
    final_norm: bool = False
    """The last layer is read after the model's final norm."""
    pool: Pool | None = None
    """How the scores of a response's tokens make its score; None: the score at ``position`` is its score."""
    template: str
    """What turned a conversation into text at fitting: ``prompts.Prompts.template``. Serving must use the same."""
    calibration: dict[str, Any] = {}
    fit: dict[str, Any] = {}
    """Data hash, seed, versions and metrics of the fit."""
    options: dict[str, Any] = {}
    """Hyper-parameters that scoring needs (gate function, temperature, confidence), by head kind."""


class Head(Protocol):
    """A loaded head. Pure: the same readings give the same scores; nothing is kept between calls."""

    manifest: Manifest
    readout: Readout

    @property
    def ref(self) -> HeadRef: ...

    def score(self, reading: Reading, *, details: frozenset[Detail] = frozenset(), pair: bool = False) -> Scores:
        """Scores the N responses of one group.

        Args:
            reading: of this head's own readout.
            details: which details are wanted; ``tokens`` needs ``reading.tokens_TK``, and so does a head that pools.
            pair: also fill ``Scores.pair`` (N is 2, chosen first).

        Raises:
            InvalidField: a detail that this kind of head does not have.
        """
        ...

    @property
    def pools(self) -> bool:
        """Whether its scores are made of those of every token, so that ``reading.tokens_TK`` is needed."""
        ...

    def tensors(self) -> Mapping[str, NDArray[np.float32]]:
        """What ``head.safetensors`` holds."""
        ...
