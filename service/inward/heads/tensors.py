"""A head's options, and the names and shapes of its tensors, checked in one place for every kind of head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from inward.errors import HeadError
from inward.heads.base import Manifest
from inward.heads.pooling import Pooler
from inward.types import Floats

Options = TypeVar("Options", bound=BaseModel)


def options_of(manifest: Manifest, kind: type[Options], remedy: str = "correct it or fit the head again") -> Options:
    """``Manifest.options`` as those of a kind of head.

    Raises:
        HeadError: one can't be used; names it, and the ``remedy``.
    """
    try:
        return kind.model_validate(manifest.options)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, ("options", *first["loc"])))
        raise HeadError(f"head {manifest.name!r}: {field} in head.json: {first['msg']}; {remedy}") from None


def pooler_of(manifest: Manifest, tensors: Mapping[str, Floats]) -> Pooler | None:
    """The pool that the manifest names, if any.

    Raises:
        HeadError: a trained pool reads a layer that the head does not.
    """
    try:
        where: dict[str, Any] = {"position": manifest.position, "final_norm": manifest.final_norm}
        return Pooler.of(manifest.pool, tensors, layers=manifest.layers, **where)
    except HeadError as error:
        raise HeadError(f"head {manifest.name!r}: {error.message}") from None


def expect(
    manifest: Manifest, tensors: Mapping[str, Floats], shapes: Mapping[str, tuple[int | str, ...]]
) -> dict[str, int]:
    """Compares ``tensors`` with the ``shapes`` wanted; a letter stands for any size, the same wherever it is written.

    Returns:
        What the letters turned out to be.

    Raises:
        HeadError: a tensor that is missing, left over, or of another shape.
    """
    where = f"head {manifest.name!r} ({manifest.kind}, version {manifest.version})"
    if missing := sorted(shapes.keys() - tensors.keys()):
        raise HeadError(f"{where}: head.safetensors lacks {', '.join(missing)}; copy the head again or fit it again")
    if extra := sorted(tensors.keys() - shapes.keys()):
        raise HeadError(
            f"{where}: head.safetensors has tensors that a {manifest.kind} head does not: {', '.join(extra)}"
        )
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        actual = tensors[name].shape
        if len(actual) != len(shape) or any(
            size != (sizes.setdefault(want, size) if isinstance(want, str) else want)
            for want, size in zip(shape, actual, strict=True)
        ):
            wanted = [sizes.get(want, want) if isinstance(want, str) else want for want in shape]
            raise HeadError(
                f"{where}: tensor {name!r} has shape {list(actual)}, but {wanted} goes with the manifest and the other "
                "tensors; head.json and head.safetensors are of different heads"
            )
    return sizes
