"""A LoRA adapter on the device: low-rank products beside the model's own, for as long as a ``with`` lasts.

They stay apart from the weights: merged into bfloat16 weights a step of training would be rounded away, and a switch
would have to wait for the batch that runs. So several versions may be in use at once, and the base model is never
touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn.functional import linear

from inward.backbones.peft_files import Adapter, LowRank, check_shapes, misfit
from inward.backbones.transformers.model import Model
from inward.errors import InvalidField
from inward.types import BASE


@dataclass(frozen=True, slots=True, eq=False)
class Delta:
    """What one linear module gives beside its own output; ``b_RO`` carries the scale."""

    module: torch.nn.Module
    a_RI: torch.Tensor
    b_RO: torch.Tensor

    def add(self, module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        """A forward hook. The sum is rounded once, as if the product were part of the module's own."""
        low_TR = linear(args[0], self.a_RI).flatten(0, -2)
        return output.flatten(0, -2).addmm(low_TR, self.b_RO).view_as(output)


@dataclass(frozen=True, slots=True, eq=False)
class Policy:
    """One version of the policy: the base model with these changes, or none."""

    version: str = BASE
    deltas: tuple[Delta, ...] = ()

    @classmethod
    def load(cls, version: str, adapter: Adapter, model: Model) -> Policy:
        """Brings an adapter onto the model's device, in the model's dtype.

        Raises:
            InvalidField: it does not fit the model, or has a number that is not finite.
        """
        tensors = load_file(adapter.tensors)
        found = {name: _find(model, name, adapter) for name in adapter.modules}
        check_shapes(adapter, {name: tuple(module.weight.shape) for name, module in found.items()})

        def delta(name: str, low_rank: LowRank) -> Delta:
            a_RI, b_OR = tensors[low_rank.a].float(), tensors[low_rank.b].float()
            if not (a_RI.isfinite().all() and b_OR.isfinite().all()):
                raise InvalidField(f"adapter {version!r} has numbers that are not finite, at {name!r}", param="version")
            b_RO = (low_rank.scale * b_OR).T.contiguous()
            return Delta(found[name], a_RI.to(model.device, model.dtype), b_RO.to(model.device, model.dtype))

        return cls(version, tuple(delta(name, low_rank) for name, low_rank in adapter.modules.items()))

    @contextmanager
    def carried(self) -> Iterator[None]:
        """The model computes with it inside; by one thread at a time."""
        hooks = [delta.module.register_forward_hook(delta.add) for delta in self.deltas]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _find(model: Model, name: str, adapter: Adapter) -> Any:
    """The linear module ``name``. An adapter may have been trained on the model with or without its LM head."""
    stem = f"{model.whole.base_model_prefix}."
    for root, path in ((model.whole, name), (model.base, name), (model.base, name.removeprefix(stem))):
        try:
            module = root.get_submodule(path)
        except AttributeError:
            continue
        # Conv1D is GPT-2's, which is a linear one with its weight transposed
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
            return module
        raise misfit(adapter, name, f"a {type(module).__name__} can't be adapted, only linear modules")
    raise misfit(adapter, name, "there is no such module")
