"""A LoRA adapter of the policy as PEFT saves it: which matrices it brings, for which modules, and that it is nothing
more than that.

Read without torch. What PEFT can write beside plain LoRA (DoRA, trained biases, whole modules …) changes the forward
pass; an adapter that has any of it is refused, because leaving it out would give another policy than the one that was
trained.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from inward.errors import InvalidField

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before the names of the model's modules."""
PLAIN = frozenset(
    "base_model_name_or_path revision task_type auto_mapping inference_mode peft_type peft_version r lora_alpha "
    "lora_dropout target_modules exclude_modules fan_in_fan_out use_rslora rank_pattern alpha_pattern "
    "layers_to_transform layers_pattern megatron_core qalora_group_size runtime_config ensure_weight_tying".split()
)
"""Fields of the configuration that say where the matrices are and how they are scaled, or that mean nothing after
training."""
LONGEST_PATTERN, MOST_REPEATS, MOST_GROUPS = 256, 2, 3
"""Of an ``alpha_pattern``: regular expressions with more may take for ever."""
SIMPLE = re.compile(r"\^?(?:(?:[\w-]|\\?\.|\\d|\[\w+(?:-\w+)?\])[*+?]?|\((?:\?:)?[\w.]+(?:\|[\w.]+)*\)|\|)+\$?")
"""Names of modules, any character, digits, one of some characters, each repeated or not; one of some names."""
REPEAT = re.compile(r"[*+?](?!:)")
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq")
"""Ways of ``init_lora_weights`` that subtract from the base weights what the adapter begins with: alone it fits no
base model."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """The change of one linear module: its output grows by ``scale * B @ A @ input``."""

    a: str
    """Name of A ``[rank, inputs]`` in the file; ``b`` of B ``[outputs, rank]``."""
    b: str
    rank: int
    inputs: int
    outputs: int
    scale: float


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that is wholly understood."""

    folder: Path
    modules: Mapping[str, LowRank]
    """By the name that the module has in the model."""

    @property
    def rank(self) -> int:
        """The largest."""
        return max(module.rank for module in self.modules.values())

    @property
    def tensors(self) -> Path:
        """The file with the matrices."""
        return self.folder / TENSORS


def read_adapter(folder: Path) -> Adapter:
    """Reads the configuration and the names and shapes of the matrices.

    Raises:
        InvalidField: it is incomplete, damaged, in pickled form, or no plain LoRA; says what is wrong.
    """
    if not (folder / TENSORS).is_file():
        there = (folder / "adapter_model.bin").exists()
        pickled = " (an adapter_model.bin is in pickled form and is not read)" if there else ""
        raise _broken(folder, f"it holds no {TENSORS}{pickled}; save it with save_pretrained, which writes one")
    config = _config(folder)
    try:
        with safe_open(folder / TENSORS, "np") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (SafetensorError, OSError) as error:
        raise _broken(folder, f"{TENSORS} is damaged: {error}") from error
    return Adapter(folder, _modules(folder, config, shapes))


def base_shapes(model: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's weights, by the names of its modules, as its safetensors files state them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            names = [name for name in file.keys() if name.endswith(".weight")]  # noqa: SIM118
            shapes |= {name.removesuffix(".weight"): tuple(file.get_slice(name).get_shape()) for name in names}
    return shapes


def check_shapes(adapter: Adapter, shapes: Mapping[str, Sequence[int]]) -> None:
    """Whether the matrices go with the base weights ``[outputs, inputs]`` (or transposed, as in GPT-2) of the modules
    in ``shapes``.

    Raises:
        InvalidField: a module of the adapter has another size there: it was trained on another model.
    """
    for name, module in adapter.modules.items():
        shape = tuple(shapes.get(name, ()))
        if shape and (module.outputs, module.inputs) not in (shape, shape[::-1]):
            raise misfit(
                adapter,
                name,
                f"it is made for {module.inputs} inputs and {module.outputs} outputs, the weight is {list(shape)}",
            )


def misfit(adapter: Adapter, module: str, why: str) -> InvalidField:
    """An adapter that does not go with the backbone."""
    return InvalidField(
        f"adapter {adapter.folder.name!r} does not fit this model at {module!r}: {why}", param="version"
    )


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _broken(folder, f"{CONFIG} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise _broken(folder, f"it is no LoRA adapter (peft_type {kind!r})")
    if config.get("bias", "none") != "none":
        raise _broken(folder, f"it brings biases (bias {config['bias']!r}); train with bias 'none'")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith(CHANGES_THE_BASE):
        raise _broken(
            folder, f"it was begun with {start!r}, which changes the base weights; convert it to plain LoRA when saving"
        )
    more = sorted(name for name in config.keys() - PLAIN - {"bias", "init_lora_weights", "eva_config"} if config[name])
    if more:
        raise _broken(folder, f"its configuration sets {', '.join(more)}; only plain LoRA is supported")
    return config


def _modules(folder: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LowRank]:
    pairs: dict[str, dict[str, str]] = {}
    for name in shapes:
        found = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", name)
        if not found:
            raise _broken(folder, f"tensor {name!r} is none of a LoRA on a linear module")
        pairs.setdefault(found[1], {})[found[2]] = name
    if not pairs:
        raise _broken(folder, "it holds no matrices")
    modules = {}
    for module, names in pairs.items():
        if names.keys() != {"A", "B"}:
            raise _broken(folder, f"of module {module!r} it holds only matrix {next(iter(names))}")
        a, b = shapes[names["A"]], shapes[names["B"]]
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] < 1:
            raise _broken(folder, f"of module {module!r} the matrices {list(a)} and {list(b)} do not go together")
        modules[module] = LowRank(names["A"], names["B"], a[0], a[1], b[0], _scale(folder, config, module, a[0]))
    return modules


def _scale(folder: Path, config: Mapping[str, Any], module: str, rank: int) -> float:
    """``alpha / rank``, or by its root for rank-stabilised LoRA; ``alpha_pattern`` is matched as PEFT does."""
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise _broken(folder, "alpha_pattern is no object of patterns and numbers")
    if (unknown := next((pattern for pattern in patterns if not _is_simple(pattern)), None)) is not None:
        raise _broken(folder, f"alpha_pattern has {unknown[:LONGEST_PATTERN]!r}, which is no simple pattern of names")
    matching = next((alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)), None)
    alpha = config.get("lora_alpha") if matching is None else matching
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise _broken(folder, f"lora_alpha is {alpha!r}, not a number")
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def _is_simple(pattern: str) -> bool:
    """Whether a regular expression is one, and found or not in next to no time whatever it is matched with."""
    if len(pattern) > LONGEST_PATTERN or not SIMPLE.fullmatch(pattern):
        return False
    if len(REPEAT.findall(pattern)) > MOST_REPEATS or pattern.count("(") > MOST_GROUPS:
        return False
    try:
        re.compile(pattern)
    except re.error:  # a range that goes backwards
        return False
    return True


def _broken(folder: Path, why: str) -> InvalidField:
    return InvalidField(f"adapter {folder.name!r} cannot be used: {why}", param="version")
