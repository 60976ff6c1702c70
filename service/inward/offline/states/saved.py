"""States that heads are fitted on, in memory and as one safetensors file.

    pairs  chosen [N, L, D], rejected [N, L, D], layers [L]; optional group [N], length_difference [N]
    lists  prompt [G, L, D], candidates [M, L, D], group [M], safe [M], layers [L]; optional prompt_group [G]

Index k of ``layers`` is the residual stream after k blocks. Position, template, backbone and data hash are in the
file's metadata. Somebody else's file may lack all that is optional: then rows that nearly repeat each other are taken
for one prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from inward.errors import DataError
from inward.files import whole
from inward.heads.base import BackboneRef
from inward.types import Doubles, Floats, Indices, Position

NEAR_DUPLICATE = 0.999
"""Cosine of two middle-layer states from which on their rows are taken for one prompt."""
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class Origin:
    """Where states come from: what the manifest of a head fitted on them says."""

    position: Position = "last"
    """Where responses were read."""
    final_norm: bool = False
    """The last layer was read after the backbone's final norm."""
    backbone: BackboneRef | None = None
    template: str | None = None
    data_hash: str = ""

    def dump(self) -> str:
        """As JSON: what is kept in a file's metadata."""
        return _ORIGIN.dump_json(self).decode()

    @classmethod
    def load(cls, metadata: Mapping[str, str] | None) -> Origin:
        """From the metadata of a file; somebody else's may say nothing.

        Raises:
            ValueError: they are damaged.
        """
        return _ORIGIN.validate_json((metadata or {}).get(METADATA, "{}"))


METADATA = "inward"
"""Key of the origin in a file's metadata."""
_ORIGIN = TypeAdapter(Origin)


@dataclass(frozen=True, slots=True, eq=False)
class PairStates:
    """States of N preference pairs at L layers, float32."""

    chosen_NLD: Floats
    rejected_NLD: Floats
    layers: tuple[int, ...]
    groups_N: Indices
    """Rows of one prompt have one number."""
    length_difference_N: Doubles | None = None
    """Tokens of the chosen response minus tokens of the rejected one."""
    origin: Origin = Origin()

    def __post_init__(self) -> None:
        n = len(self.chosen_NLD)
        check_tensor("chosen", self.chosen_NLD, (n, len(self.layers), self.chosen_NLD.shape[-1]))
        check_tensor("rejected", self.rejected_NLD, self.chosen_NLD.shape)
        check_tensor("group", self.groups_N, (n,))
        if self.length_difference_N is not None:
            check_tensor("length_difference", self.length_difference_N, (n,))

    def __len__(self) -> int:
        return len(self.chosen_NLD)

    @property
    def width(self) -> int:
        """Of the residual stream."""
        return int(self.chosen_NLD.shape[2])

    def take(self, index: Indices, axes: Sequence[int] | None = None) -> tuple[Floats, Floats]:
        """See ``stored.PairSource``."""
        where = index if axes is None else np.ix_(index, np.asarray(axes))
        chosen, rejected = self.chosen_NLD[where], self.rejected_NLD[where]
        return chosen.astype(np.float32, copy=False), rejected.astype(np.float32, copy=False)

    def at(self, layer: int) -> tuple[Floats, Floats]:
        """Chosen and rejected states ``[N, D]`` of one layer.

        Raises:
            DataError: these states do not hold that layer.
        """
        axis = layer_axis(self.layers, layer)
        return self.chosen_NLD[:, axis], self.rejected_NLD[:, axis]

    def rows(self, index: NDArray[Any]) -> PairStates:
        """Some of the pairs."""
        difference = self.length_difference_N
        return replace(
            self,
            chosen_NLD=self.chosen_NLD[index],
            rejected_NLD=self.rejected_NLD[index],
            groups_N=self.groups_N[index],
            length_difference_N=None if difference is None else difference[index],
        )


@dataclass(frozen=True, slots=True, eq=False)
class ListStates:
    """States of G prompts and of the M labelled responses to them at L layers, float32."""

    prompt_GLD: Floats
    """At position ``prompt``."""
    candidates_MLD: Floats
    group_M: Indices
    """Which prompt (0 to G - 1) a response belongs to."""
    safe_M: NDArray[np.bool_]
    layers: tuple[int, ...]
    groups_G: Indices
    """Lists of one prompt have one number: what a split goes by."""
    origin: Origin = Origin()

    def __post_init__(self) -> None:
        g, m = len(self.prompt_GLD), len(self.candidates_MLD)
        check_tensor("prompt", self.prompt_GLD, (g, len(self.layers), self.prompt_GLD.shape[-1]))
        check_tensor("candidates", self.candidates_MLD, (m, *self.prompt_GLD.shape[1:]))
        check_tensor("group", self.group_M, (m,))
        check_tensor("safe", self.safe_M, (m,))
        check_tensor("prompt_group", self.groups_G, (g,))
        if m and not (self.group_M.min() >= 0 and self.group_M.max() < g):
            raise DataError(
                f"group must number the {g} prompts from 0; it goes from {self.group_M.min()} to {self.group_M.max()}"
            )

    def __len__(self) -> int:
        return len(self.prompt_GLD)

    def lists(self, index: NDArray[Any]) -> ListStates:
        """Some of the prompts (numbers in ``index``) with their candidates, renumbered in that order."""
        members = [np.flatnonzero(self.group_M == g) for g in index]
        rows = np.concatenate([np.empty(0, dtype=np.int64), *members])
        return replace(
            self,
            prompt_GLD=self.prompt_GLD[index],
            candidates_MLD=self.candidates_MLD[rows],
            group_M=np.repeat(np.arange(len(members)), [len(m) for m in members]),
            safe_M=self.safe_M[rows],
            groups_G=self.groups_G[index],
        )


def layer_axis(layers: tuple[int, ...], layer: int) -> int:
    """Where ``layer`` is in the arrays.

    Raises:
        DataError: it is not there.
    """
    if layer not in layers:
        raise DataError(f"layer {layer} is not among the layers of these states: {', '.join(map(str, layers))}")
    return layers.index(layer)


def save_states(states: PairStates | ListStates, path: Path) -> None:
    """Writes one safetensors file, at once or not at all.

    Raises:
        DataError: the file can't be written.
    """
    tensors: dict[str, NDArray[Any]] = {"layers": np.array(states.layers, dtype=np.int64)}
    if isinstance(states, PairStates):
        tensors |= {"chosen": states.chosen_NLD, "rejected": states.rejected_NLD, "group": states.groups_N}
        if states.length_difference_N is not None:
            tensors["length_difference"] = states.length_difference_N
    else:
        tensors |= {"prompt": states.prompt_GLD, "candidates": states.candidates_MLD}
        tensors |= {"group": states.group_M, "safe": states.safe_M, "prompt_group": states.groups_G}
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    try:
        with whole(Path(path)) as file:
            save_file(tensors, file, metadata={METADATA: states.origin.dump()})
    except (SafetensorError, OSError) as error:
        raise DataError(f"can't write states to {path}: {error}") from error


def load_states(path: Path) -> PairStates | ListStates:
    """Reads states of pairs or of lists, whichever the file holds, as float32.

    Raises:
        DataError: the file is damaged, lacks a tensor, or a tensor has a wrong shape or NaN or infinite entries.
    """
    path = Path(path)
    tensors, origin = _read(path)
    try:
        layers = layers_of(tensors["layers"])
        if "chosen" in tensors:
            return _pairs(tensors, layers, origin)
        return _lists(tensors, layers, origin)
    except KeyError as error:
        raise DataError(
            f"{path} lacks the tensor {error}: it needs layers with chosen and rejected, or with prompt, candidates, "
            "group and safe"
        ) from None
    except (DataError, TypeError, ValueError) as error:
        raise DataError(f"{path}: {error}") from None


def load_list_states(path: Path) -> ListStates:
    """``load_states`` of a file that must hold lists."""
    states = load_states(path)
    if not isinstance(states, ListStates):
        raise DataError(f"{path} holds pairs (chosen, rejected), but lists (prompt, candidates) are needed")
    return states


def holds_states(path: Path) -> bool:
    """Whether a file holds states of pairs or of lists, as far as its header tells."""
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = set(file.keys())
    except (SafetensorError, OSError):
        return False
    return any({"layers", *sides} <= tensors for sides in (("chosen", "rejected"), ("prompt", "candidates")))


def near_duplicates(states_ND: Floats) -> Indices:
    """``[N]``: one number for rows linked by a cosine above ``NEAR_DUPLICATE``, made of their content, not of their
    order.
    """
    unit_ND = states_ND - states_ND.mean(axis=0, dtype=np.float64)  # deep layers share one large component, which alone
    unit_ND /= np.maximum(np.linalg.norm(unit_ND, axis=1, keepdims=True), 1e-30)  # makes all cosines nearly 1
    unit_ND = unit_ND.astype(np.float32)
    linked = [
        np.argwhere(unit_ND[start : start + _ROWS_AT_ONCE] @ unit_ND.T > NEAR_DUPLICATE) + np.array([start, 0])
        for start in range(0, len(unit_ND), _ROWS_AT_ONCE)
    ]
    row_E, other_E = np.concatenate(linked or [np.empty((0, 2), dtype=np.int64)]).T
    links = coo_array((np.ones(len(row_E), dtype=np.int8), (row_E, other_E)), shape=(len(unit_ND),) * 2)
    key_N = np.array(
        [int.from_bytes(hashlib.sha256(row.tobytes()).digest()[:8], "big") >> 1 for row in states_ND], dtype=np.int64
    )
    count, part_N = connected_components(links, directed=False)
    smallest = np.full(count, np.iinfo(np.int64).max)
    np.minimum.at(smallest, part_N, key_N)
    return np.asarray(smallest[part_N])


def layers_of(tensor: NDArray[Any]) -> tuple[int, ...]:
    """Raises ``DataError`` where these are no numbers of layers."""
    if tensor.ndim != 1 or not len(tensor):
        raise DataError(f"layers must be a list of the layers' numbers; it has shape {list(tensor.shape)}")
    return tuple(int(k) for k in whole_numbers("layers", tensor))


def whole_numbers(name: str, tensor: NDArray[Any]) -> Indices:
    """Raises ``DataError`` where one is NaN or infinite."""
    check_tensor(name, tensor, tensor.shape)
    return tensor.astype(np.int64)


def as_numpy(tensor: Any) -> NDArray[Any]:
    """A tensor of torch's, through which files are read, since numpy has no bfloat16."""
    values: NDArray[Any] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return values


def _pairs(tensors: Mapping[str, NDArray[Any]], layers: tuple[int, ...], origin: Origin) -> PairStates:
    chosen_NLD, rejected_NLD = _floats(tensors["chosen"]), _floats(tensors["rejected"])
    check_tensor("chosen", chosen_NLD, (len(chosen_NLD), len(layers), chosen_NLD.shape[-1]))
    group = tensors.get("group")
    difference = tensors.get("length_difference")
    return PairStates(
        chosen_NLD,
        rejected_NLD,
        layers,
        near_duplicates(chosen_NLD[:, len(layers) // 2]) if group is None else whole_numbers("group", group),
        None if difference is None else difference.astype(np.float64),
        replace(origin, data_hash=origin.data_hash or hash_rows((chosen_NLD, rejected_NLD))),
    )


def _lists(tensors: Mapping[str, NDArray[Any]], layers: tuple[int, ...], origin: Origin) -> ListStates:
    prompt_GLD, candidates_MLD = _floats(tensors["prompt"]), _floats(tensors["candidates"])
    check_tensor("prompt", prompt_GLD, (len(prompt_GLD), len(layers), prompt_GLD.shape[-1]))
    group_M, group_G = whole_numbers("group", tensors["group"]), tensors.get("prompt_group")
    return ListStates(
        prompt_GLD,
        candidates_MLD,
        group_M,
        tensors["safe"].astype(np.bool_),
        layers,
        near_duplicates(prompt_GLD[:, len(layers) // 2]) if group_G is None else whole_numbers("prompt_group", group_G),
        replace(origin, data_hash=origin.data_hash or hash_rows((prompt_GLD, candidates_MLD, group_M))),
    )


def _read(path: Path) -> tuple[dict[str, NDArray[Any]], Origin]:
    if not path.is_file():
        raise DataError(f"{path} does not exist or is not a file")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: as_numpy(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            origin = Origin.load(file.metadata())
    except (SafetensorError, ValueError, OSError) as error:
        raise DataError(f"{path} is not a readable safetensors file of states ({error})") from error
    return tensors, origin


def _floats(tensor: NDArray[Any]) -> Floats:
    if tensor.ndim != 3:
        raise DataError(f"states must be [rows, layers, width]; one tensor has shape {list(tensor.shape)}")
    return tensor.astype(np.float32, copy=False)


def check_tensor(name: str, tensor: NDArray[Any], shape: tuple[int, ...]) -> None:
    """Raises ``DataError`` where it has another shape, or NaN or infinite entries."""
    if tensor.shape != shape:
        raise DataError(f"{name} has shape {list(tensor.shape)}, but {list(shape)} goes with the others")
    if not np.isfinite(tensor).all():
        raise DataError(
            f"{name} has NaN or infinite entries, the first in row {int(np.argwhere(~np.isfinite(tensor))[0][0])}"
        )


def hash_rows(tensors: Iterable[NDArray[Any]]) -> str:
    """What stands for the data where nobody says: SHA-256 of the numbers, in order, however they are cut."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(np.ascontiguousarray(tensor).tobytes())
    return f"sha256:{digest.hexdigest()[:32]}"
