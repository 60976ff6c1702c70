"""Every knob of the trainer. A field is an option, an environment variable ``INWARD_TRAIN_<NAME>`` and a key of a
recipe; its docstring is the help text. Options win over the environment, the environment over the recipe, the recipe
over the defaults.
"""

from __future__ import annotations

import argparse
import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from inward_trainer.confidence import Mode, Scale
from inward_trainer.errors import OptionsError
from inward_trainer.sources.samples import SAMPLING

PREFIX = "INWARD_TRAIN_"
RECIPES = Path(__file__).parent / "recipes"


def _object(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _names(value: Any) -> Any:
    if isinstance(value, str):
        value = value.split(",")
    return [name for name in map(str.strip, value) if name and name != "none"] if isinstance(value, list) else value


def _numbers(value: Any) -> Any:
    return [part for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _counts(value: Any) -> Any:
    return dict(part.partition("=")[::2] for part in _names(value)) if isinstance(value, str) else value


def _folder(path: Path) -> Path:
    above = next((one for one in (path, *path.parents) if os.path.lexists(one)), path)
    if os.path.lexists(above) and not above.is_dir():
        raise PydanticCustomError("no_folder", "{above} is there and is no folder: name another", {"above": str(above)})
    return path


Folder = Annotated[Path, AfterValidator(_folder)]
"""That is there or can be made."""
JsonObject = Annotated[dict[str, Any], BeforeValidator(_object)]
Names = Annotated[list[str], BeforeValidator(_names)]
Counts = Annotated[dict[str, Annotated[int, Field(ge=1)]], BeforeValidator(_counts)]


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class RunOptions(_Options):
    """the run"""

    out: Folder = Path("out")
    """Folder of checkpoints, logs and the result. A run that finds its own folder goes on where it was stopped."""
    model: str = ""
    """The policy to start from: Hugging Face id or folder. `service`: the one that the service of --url serves."""
    revision: str | None = None
    """Branch, tag or commit of a model from the hub."""
    template: str | None = None
    """Format string with {prompt} that ends with {response}, if the service has one instead of the chat template."""
    seed: int = Field(0, ge=0)
    """Of everything that is drawn or shuffled."""
    tensorboard: bool = True
    """Write TensorBoard files beside log.jsonl."""
    report_to: Names = Field(default_factory=list)
    """Trackers that are told as well, comma-separated: wandb, trackio, mlflow …"""


class ServiceOptions(_Options):
    """the service"""

    url: str | None = None
    """Where the service is, such as http://127.0.0.1:8080."""
    api_key: SecretStr | None = None
    """Its key; better given as INWARD_TRAIN_API_KEY, which no list of processes shows."""
    patience: float = Field(600.0, gt=0)
    """Seconds for which a service or a Redis that does not answer is waited for."""
    at_once: int = Field(8, ge=1)
    """Most requests in flight; never more than the service says that it computes at once."""


class SourceOptions(_Options):
    """where pairs come from"""

    source: Literal["file", "job", "stream", "samples"] = "file"
    """file: --pairs. job: --pairs, scored by a bulk job. stream: the service's, in Redis. samples: the policy's own,
    for --prompts."""
    pairs: Path | None = None
    """Pairs in any layout (JSON lines, JSON, CSV, Parquet, a folder; also gzipped), with confidence, chosen_score,
    rejected_score where they are known already. Scores of a row without `head` are taken for a hybrid head's."""
    job: str | None = None
    """Id of a bulk job that scored --pairs; without it one is made."""
    epochs: int = Field(1, ge=1)
    """How often each pair or prompt is used; a last step is filled up from the next epoch."""
    redis_url: str | None = None
    """The service's Redis, such as redis://:password@host:6379/0."""
    queue: str | None = None
    """The service's queue; by default the model's name (a folder's last part), as for the service. Of the
    bundled toy: toy."""
    stream: str = "pairs"
    """Name of the stream, as given to the service as `append_to`."""
    group: str = "trainer"
    """Consumer group: trainers of one group share a stream."""
    consumer: str | None = None
    """This trainer in its group; by default the run's own name, under which a run that goes on finds what it did not
    finish."""
    idle: float | None = Field(None, gt=0)
    """Seconds without a new pair after which a stream counts as ended; by default never. A stream that nobody writes
    is an error after as long, or after --patience."""
    prompts: Path | None = None
    """Prompts to sample from, in any file of rows."""
    samples: int = Field(8, ge=2)
    """Samples of each prompt, of which the best and the worst make a pair."""
    sampling: Annotated[JsonObject, AfterValidator(lambda given: SAMPLING | given)] = Field(
        default_factory=lambda: dict(SAMPLING)
    )
    """How samples are drawn, as JSON; what it doesn't name stays as it is."""
    early_rejection: JsonObject = Field(default_factory=dict)
    """Which samples are not drawn to their end, as JSON: {"keep": 0.5, "at": [16, 32]}, or {"max_loss": 0.1} where the
    service has a value head for the one that ranks. They are in no pair; ask for more --samples instead."""


class ConfidenceOptions(_Options):
    """confidence"""

    confidence: Mode = "pair"
    """plain: DPO. fixed: --gamma for all. pair: each pair's own. batch: the mean over a step, as in the authors'
    code."""
    gamma: float = Field(0.9, ge=0, le=1)
    """Confidence of --confidence fixed."""
    scale: Scale = "service"
    """service: the confidence that the service gives. squashed, raw: worked out here from the rewards, squashed to
    (0, 1) first or not."""
    alpha: float = Field(7.5, gt=0)
    """Steepness of --scale squashed and raw."""
    floor: float = Field(0.5, ge=0, le=1)
    """Least confidence; 0 lets it say that a label is wrong."""
    head: str | None = None
    """Hybrid head that ranks and gives confidence; by default the service's first one."""
    monitor: str | None = None
    """A second head, never updated, whose accuracy is logged as well: a head that is trained against can be fooled."""


class TrainOptions(_Options):
    """training"""

    steps: int | None = Field(None, ge=1)
    """Optimiser steps; by default what --epochs come to. A stream needs it."""
    batch_size: int = Field(4, ge=1)
    """Pairs in one forward pass of one process."""
    accumulate: int = Field(1, ge=1)
    """Forward passes of one process in one optimiser step."""
    learning_rate: float = Field(1e-5, gt=0)
    """Peak learning rate; for cDPO the paper's are 1e-6 to 1e-5."""
    schedule: str = "cosine"
    """How it falls after the warm-up: cosine, linear, constant_with_warmup …"""
    warmup: float = Field(0.03, ge=0)
    """Share of the steps, or number of steps, in which it rises."""
    weight_decay: float = Field(0.0, ge=0)
    """Of AdamW."""
    max_length: int = Field(1024, ge=8)
    """Pairs with more tokens in prompt and answer are left out."""
    full: bool = False
    """Train all weights instead of a LoRA adapter."""
    lora_rank: int = Field(16, ge=1)
    """Rank of the adapter."""
    lora_alpha: int = Field(32, ge=1)
    """Scale of the adapter."""
    lora_targets: str = "all-linear"
    """Modules that get an adapter, comma-separated."""
    adapter: Path | None = None
    """Folder of an adapter to go on from; it is also the reference then."""
    quantize: Literal["4bit", "8bit"] | None = None
    """Keep the frozen weights quantised (QLoRA); needs bitsandbytes and a GPU."""
    attn_implementation: str | None = None
    """How the model computes attention: eager, sdpa, flash_attention_2 …; by default its own choice."""
    bf16: bool | None = None
    """Multiply in bfloat16; by default on a GPU that can."""
    gradient_checkpointing: bool | None = None
    """Save memory by computing activations twice; by default on a GPU."""
    checkpoint_every: int = Field(100, ge=1)
    """Steps between two checkpoints (where the policy is published, that decides)."""
    keep_checkpoints: int = Field(2, ge=2)
    """So many stay, the newest; older ones are removed."""
    log_every: int = Field(1, ge=1)
    """Steps between two lines in the log."""
    training: JsonObject = Field(default_factory=dict)
    """Any other argument of Hugging Face's trainer, as JSON, such as {"optim": "adamw_8bit", "deepspeed":
    "zero3.json"}."""


class ModelOptions(RunOptions, TrainOptions):
    """What both commands have."""


class OnlineOptions(_Options):
    """the policy that moves"""

    adapters: Folder | None = None
    """The service's --adapters folder. Given, every new version of the policy is published there and loaded by the
    service."""
    publish_every: int = Field(10, ge=1)
    """Steps between two versions; the last step makes one in any case."""
    keep_adapters: int = Field(10, ge=2)
    """So many versions of this run stay in the folder, the newest; older ones are removed."""
    max_lag: int | None = Field(1, ge=0)
    """Versions by which the policy that a live pair was scored with may be behind; older pairs are refused."""
    lend_device: bool = False
    """The service sleeps while a step is computed and wakes for the next samples, so that both fit one GPU; for vLLM
    with --vllm-options '{"enable_sleep_mode": true}'."""
    update_head: bool = False
    """Update the hybrid head, one without a pool, online with the pairs of every step."""
    update_lr: float = Field(1e-3, gt=0, le=1)
    """Its learning rate."""
    held_out: Path | None = None
    """Prompts of which every version draws one sample each, to be scored by both heads."""
    held_out_prompts: int = Field(64, ge=1)
    """How many of them."""


class EvalOptions(_Options):
    """evaluation"""

    eval_pairs: Path | None = None
    """Pairs, in any form that --pairs may have, on which every checkpoint is judged: loss, accuracy, and what heads say
    of them. The checkpoint with the least loss is kept in OUT/best."""
    eval_most: int = Field(256, ge=1)
    """How many of them."""
    stop_after: int | None = Field(None, ge=1)
    """End the run after so many evaluations without a lower loss; by default never."""


class WatchOptions(_Options):
    """Prometheus"""

    metrics_port: int | None = Field(None, ge=1, le=65535)
    """Port on which /metrics is served while the run lives; by default none."""
    metrics_host: str = "127.0.0.1"
    """Address of that port; 0.0.0.0 lets other machines see numbers and names of versions, never texts."""


class CdpoOptions(
    ModelOptions, SourceOptions, ServiceOptions, ConfidenceOptions, OnlineOptions, EvalOptions, WatchOptions
):
    """the method"""

    beta: float = Field(0.15, gt=0)
    """Strength of the pull to the reference: the authors' code has 0.15, their appendix 1.5."""


class MarginOptions(_Options):
    """pairs and margins"""

    pairs: Path | None = None
    """Pairs in any layout (JSON lines, JSON, CSV, Parquet, a folder; also gzipped), and perhaps their margin."""
    margins: Literal["bin", "margin_scaled", "constant", "none", "column"] = "bin"
    """bin (0 to 1), margin_scaled: of the service. constant: the mean of the bins for all. column: the rows' own
    `margin`."""
    drop_disagreeing: bool = False
    """Leave out pairs whose label the LEGEND head disagrees with."""
    head: str | None = None
    """LEGEND head; by default the service's choice."""
    epochs: int = Field(1, ge=1)
    """How often each pair is used."""
    held_out: Path | None = None
    """Pairs on which the reward model's accuracy is measured in the end."""


class RewardOptions(ModelOptions, MarginOptions, EvalOptions, ServiceOptions):
    """All options of ``inward-train rm``."""


class ExportOptions(_Options):
    """what is exported"""

    adapter: Path | None = None
    """Folder of the adapter, such as OUT/final or OUT/best of a run."""
    model: str = ""
    """Its base model; by default the one that the adapter names."""
    revision: str | None = None
    """Branch, tag or commit of a base model from the hub."""
    out: Folder | None = None
    """Folder to write to."""
    merge: bool = True
    """Write the whole model, with the adapter merged into its weights; else the adapter alone."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the weights that are written."""
    push_to: str | None = None
    """Upload it to this repository of the hub as well; needs HF_TOKEN."""
    private: bool = True
    """Make that repository private, if it is new."""


class PaperOptions(_Options):
    """what is measured"""

    out: Folder = Path("runs/paper")
    """Folder of tables, cells and the report. What is there is not made again; the same command, started several times,
    shares the work."""
    data: Path | None = None
    """Folder of the data sets; an error names the files."""
    model: str = "smollm2"
    """The model that is read, drawn from, and aligned: a folder, a Hugging Face id, smollm2 or toy."""
    device: str = "auto"
    """auto: the GPU if there is one. cpu, cuda, cuda:1 …"""
    tables: Names = Field(default_factory=lambda: ["all"])
    """Which tables, comma-separated: judge, alignment, topk, probes, legend, srr, cost; hybrid: the second to fourth;
    report: none anew."""
    seeds: Annotated[list[int], BeforeValidator(_numbers)] = Field(default_factory=lambda: [0], min_length=1)
    """Of trainings and draws, comma-separated: 0,1,2."""
    quick: bool = False
    """Next to nothing of everything, to try it out; with the toy in minutes on two cores."""
    scale: float | None = Field(None, gt=0)
    """Share of the rows and prompts; else all, and on a processor 0.1."""
    sizes: Counts = Field(default_factory=dict)
    """Single counts, which the scale leaves alone: steps=24,margin_pairs=2000. setting.json names them all; steps are
    48, 16 on a processor, where they take most of the time, and 4 with --quick."""
    minutes: float | None = Field(None, gt=0)
    """After so many minutes nothing new is begun; rows that are missing say so."""
    workers: int = Field(1, ge=1)
    """Processes that share the work on the one device; what it costs is measured when they are done."""
    learning_rate: float = Field(1e-5, gt=0)
    """Of policies, all of whose weights are trained; the hybrid paper's are 1e-6 to 1e-5."""


O = TypeVar("O", bound=BaseModel)


def add_options(parser: argparse.ArgumentParser, options: type[BaseModel]) -> None:
    """An option for every field, in groups as the classes are."""
    parser.add_argument(
        "--recipe", metavar="NAME|FILE", help=f"TOML file of these options, or a bundled one: {', '.join(recipes())}"
    )
    for group in (kind for kind in options.__mro__ if issubclass(kind, _Options)):
        names = [name for name in vars(group).get("__annotations__", {}) if name in options.model_fields]
        if names:
            _add_group(parser.add_argument_group(group.__doc__), options, names)


def _add_group(section: argparse._ArgumentGroup, options: type[BaseModel], names: list[str]) -> None:
    for name in names:
        field = options.model_fields[name]
        option: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": _help(field)}
        if field.annotation in (bool, bool | None):
            option["action"] = argparse.BooleanOptionalAction
        elif choices := _choices(field.annotation):
            option["metavar"] = "|".join(choices)
        else:
            option["metavar"] = name.rsplit("_", 1)[-1].upper()
        section.add_argument(f"--{name.replace('_', '-')}", **option)


def _choices(annotation: Any) -> list[str]:
    """What a field of fixed words takes, perhaps besides None."""
    kinds = [annotation, *get_args(annotation)]
    return [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]


def read_options(options: type[O], args: argparse.Namespace, environment: Mapping[str, str] | None = None) -> O:
    """The options: command line before environment before recipe before defaults.

    Raises:
        OptionsError: a value that an option does not take, or no such recipe.
    """
    environment = os.environ if environment is None else environment
    named = args.recipe or environment.get(f"{PREFIX}RECIPE")
    recipe = read_recipe(named) if named else {}
    from_env = {name: value for name in options.model_fields if (value := environment.get(PREFIX + name.upper()))}
    given = {name: value for name, value in vars(args).items() if name in options.model_fields}
    try:
        return options.model_validate({**recipe, **from_env, **given})
    except ValidationError as error:
        problems = [_problem(one, given, from_env, named) for one in error.errors()]
        raise OptionsError("; ".join(problems)) from None


def _problem(error: ErrorDetails, given: Mapping[str, Any], from_env: Mapping[str, Any], recipe: str | None) -> str:
    """One line about a value, with where it was given."""
    name, *inner = map(str, error["loc"])
    if name in given:
        return f"--{'-'.join((name, *inner)).replace('_', '-')}: {error['msg']}"
    if name in from_env:
        return f"{'.'.join((PREFIX + name.upper(), *inner))}: {error['msg']}"
    if error["type"] == "extra_forbidden":
        return f"--recipe {recipe}: {name} is no option of this command"
    return f"--recipe {recipe}: {'.'.join((name, *inner))}: {error['msg']}"


def recipes() -> list[str]:
    """Names of the bundled recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def read_recipe(name: str) -> dict[str, Any]:
    """The options in a bundled recipe, or in a TOML file.

    Raises:
        OptionsError: neither is there, or it is no TOML.
    """
    path = RECIPES / f"{name}.toml" if name in recipes() else Path(name)
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise OptionsError(f"there is no recipe {name!r}: give a TOML file, or one of {', '.join(recipes())}") from None
    except OSError as error:
        raise OptionsError(f"--recipe {path} can't be read: {error.strerror}") from None
    except ValueError as error:  # tomllib's, and that of text that is not UTF-8
        raise OptionsError(f"--recipe {path} is no TOML: {error}") from None


def _help(field: Any) -> str:
    default = field.get_default(call_default_factory=True)
    shown = "" if default is None or isinstance(default, bool) or default in ("", {}, []) else f" (default: {default})"
    return f"{field.description}{shown}".replace("%", "%%").replace("`", "")
