"""What a ``Watch`` sees of the responses of one drawing: its readouts, at each token that enters the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from inward.backbones.base import Watch
from inward.backbones.readout import Fusion, ReadPlace, Selection, Span
from inward.backbones.transformers.capture import DeviceProduct
from inward.types import Floats, Readout, Stop


class Watched:
    """One drawing's ``Watch`` with its weights on the device."""

    def __init__(self, watch: Watch, *, layers: int, width: int, device: torch.device) -> None:
        """Raises InvalidField where a readout does not fit the backbone."""
        at_token = [Readout(tuple(replace(tap, position="last") for tap in own.taps)) for own in watch.readouts]
        self._watch = watch
        self._fusion = Fusion(at_token, layers=layers, width=width)
        self._products = [DeviceProduct.of(product, device) for product in self._fusion.products]
        self.places: set[ReadPlace] = self._fusion.places

    def look(self, states: Mapping[ReadPlace, torch.Tensor], rows: Mapping[int, int]) -> dict[int, Stop]:
        """The token that each response has just fed.

        Args:
            states: ``[B, D]`` at each of ``places``.
            rows: of each response, by index, the row of its state.
        """
        selection = Selection(np.array([*rows.values()], dtype=np.int64))
        outputs = [product.read(states[product.product.place], selection) for product in self._products]
        read = [output.cpu().numpy() for output in outputs]
        (readings,) = self._fusion.assemble(read, [[Span(0, range(1))] * len(rows)])
        news: dict[int, Sequence[Floats]] = {
            i: [reading.values_NK[n : n + 1] for reading in readings] for n, i in enumerate(rows)
        }
        return self._watch.look(news)

    def ended(self, responses: Iterable[int]) -> dict[int, Stop]:
        """These have no further tokens."""
        return self._watch.look({}, responses)
