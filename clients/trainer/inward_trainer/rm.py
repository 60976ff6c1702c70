"""``inward-train rm``: TRL's RewardTrainer with LEGEND's margins (arXiv 2406.08124), loss ``-log sigmoid(r_c - r_r -
m)``.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, set_seed
from trl import RewardConfig, RewardTrainer

from inward_client import Margin
from inward_trainer.base_model import FoundModel, check_same, name_model
from inward_trainer.checkpoints import last_checkpoint, mark_complete, step_of
from inward_trainer.durable import write_text
from inward_trainer.errors import DataError, OptionsError, Stopped
from inward_trainer.evaluation import Evaluation
from inward_trainer.fingerprint import fingerprint
from inward_trainer.logs import Log
from inward_trainer.loop import refuse_divergence
from inward_trainer.models import checkpoints, configuration, load_model, lora
from inward_trainer.options import RewardOptions
from inward_trainer.pairs import ScoredPair, digest, number, read_row
from inward_trainer.processes import agreed
from inward_trainer.runs import connected, has_begun, locked, new_run, resumed, until_stopped
from inward_trainer.service import Service
from inward_trainer.sources.file import read_pairs, read_table
from inward_trainer.statistics import estimates
from inward_trainer.stopping import Stopping
from inward_trainer.tokens import Tokeniser

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MarginPair:
    """One pair as it is trained on."""

    id: str
    chosen_ids: list[int]
    rejected_ids: list[int]
    margin: float | None

    @property
    def longest(self) -> int:
        return max(len(self.chosen_ids), len(self.rejected_ids))

    def columns(self) -> dict[str, Any]:
        """As RewardTrainer takes them."""
        ids = {"chosen_ids": self.chosen_ids, "rejected_ids": self.rejected_ids}
        return ids if self.margin is None else ids | {"margin": self.margin}


def run(options: RewardOptions) -> int:
    """Trains a reward model and measures it on held-out pairs; started again, it goes on from its last checkpoint. The
    exit status.

    Raises:
        TrainerError: see the tree.
    """
    if options.pairs is None:
        raise OptionsError("--pairs: say what to train on")
    if options.stop_after is not None and options.eval_pairs is None:
        raise OptionsError("--stop-after needs --eval-pairs")
    length = {"max_steps": options.steps} if options.steps else {"num_train_epochs": options.epochs}
    saving = {"save_strategy": "steps", "save_steps": options.checkpoint_every}
    config = configuration(RewardConfig, options, **saving, **length)
    return until_stopped("rm", options, config, partial(_run, options, options.pairs, config))


@torch.no_grad()
def pair_losses(model: Any, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, float]]:
    """Loss (without a margin) and difference of rewards of each pair; one text at a time, so that no padding can
    matter.
    """
    was_training, found = model.training, []
    model.eval()
    for texts in pairs:
        chosen, rejected = (model(torch.tensor([ids], device=model.device)).logits.item() for ids in texts)
        found.append((math.log1p(math.exp(-abs(chosen - rejected))) + max(rejected - chosen, 0.0), chosen - rejected))
    model.train(was_training)
    return found


class EndingTrainer(RewardTrainer):  # type: ignore[misc]
    """A RewardTrainer that does no step where the end is asked for before the first one."""

    def get_batch_samples(self, *args: Any) -> Any:
        return ([], None) if self.control.should_training_stop else super().get_batch_samples(*args)


class RewardLoop(TrainerCallback):  # type: ignore[misc]
    """What happens between the steps: the log, whole checkpoints, the end if somebody asks for it."""

    def __init__(
        self, log: Log | None, stopping: Stopping, wait: Callable[[], None], evaluate: Callable[[int], bool] | None
    ) -> None:
        self._log, self._stopping, self._wait = log, stopping, wait
        self._evaluate = evaluate or (lambda step: False)
        self.signal: int | None = None
        """Of the main process, if it was asked for the end."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = self._evaluate(state.global_step) or state.global_step >= state.max_steps

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        refuse_divergence(model, state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.signal = agreed(self._stopping.signal, args.world_size)
        if self.signal is not None:
            control.should_save = control.should_training_stop = True
        if state.global_step >= state.max_steps:
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if self._log is not None and logs and "loss" in logs:
            self._log.write(state.global_step, logs)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._wait()
        if self._log is not None:
            mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        if self._evaluate(state.global_step):
            control.should_training_stop = True


def _run(options: RewardOptions, path: Path, config: RewardConfig, stopping: Stopping, stack: ExitStack) -> int:
    is_main, processes = config.process_index == 0, config.world_size
    service = connected(options, stopping, stack) if is_main else None
    info = service.info() if service else None
    name, revision = agreed(name_model(options.model, options.revision, info) if is_main else None, processes)
    model = FoundModel.find(name, revision, options.template)
    folder, tokeniser, tokenizer = model.folder, model.tokeniser, model.tokeniser.tokenizer
    log = rows = checkpoint = held_out = None
    if is_main:
        if info is not None:
            check_same(folder, tokeniser, info)
        stack.enter_context(locked(options.out))
        begun = options.batch_size * options.accumulate * processes, fingerprint(folder)
        current = resumed(options, *begun) or new_run(options, *begun)
        if options.held_out is not None:  # before anything is learnt
            held_out = [_texts(tokeniser, pair) for pair in read_pairs(options.held_out)]
        rows = read_rows(options, path, tokeniser, service)
        checkpoint = last_checkpoint(checkpoints(options))
        done = step_of(checkpoint) if checkpoint else 0
        log = Log(options.out, done, run=current.name, tensorboard=options.tensorboard)
        stack.callback(log.close)
    rows, checkpoint = agreed((rows, checkpoint), processes)
    trainer = build_trainer(options, config, folder, tokenizer, rows)
    evaluate = _evaluation(options, trainer, log, tokeniser)
    loop = RewardLoop(log, stopping, trainer.accelerator.wait_for_everyone, evaluate)
    trainer.add_callback(loop)
    if log is not None and options.report_to:
        log.report = partial(Trainer.log, trainer)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if loop.signal is not None:
        config.max_steps = trainer.state.max_steps
        raise Stopped(loop.signal)
    trainer.save_model(str(options.out / "final"))
    if is_main:
        tokenizer.save_pretrained(options.out / "final")
        _report(options, len(rows), trainer, held_out)
    return 0


def _report(
    options: RewardOptions, pairs: int, trainer: Any, held_out: Sequence[tuple[list[int], list[int]]] | None
) -> None:
    report: dict[str, Any] = {"pairs": pairs, "margins": options.margins}
    if held_out is not None:
        found = pair_losses(trainer.accelerator.unwrap_model(trainer.model), held_out)
        right = estimates("held_out", {"accuracy": [float(margin > 0) for _, margin in found]})
        report |= {"held_out_pairs": len(held_out)} | {name.replace("/", "_"): one for name, one in right.items()}
    write_text(options.out / "report.json", json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


def _evaluation(
    options: RewardOptions, trainer: Any, log: Log | None, tokeniser: Tokeniser
) -> Callable[[int], bool] | None:
    if options.eval_pairs is None:
        return None
    pairs = [_texts(tokeniser, pair) for pair in read_pairs(options.eval_pairs)]
    pairs = [texts for texts in pairs if max(map(len, texts)) <= options.max_length][: options.eval_most]
    if not pairs:
        raise DataError(f"--eval-pairs: {options.eval_pairs} has no pair that can be used")
    return Evaluation(
        lambda places: pair_losses(trainer.model, [pairs[place] for place in places]),
        len(pairs),
        trainer.save_model,
        log,
        options.out / "best",
        stop_after=options.stop_after,
        rank=trainer.args.process_index,
        processes=trainer.args.world_size,
    )


def read_rows(options: RewardOptions, path: Path, tokeniser: Tokeniser, service: Service | None) -> list[MarginPair]:
    """The pairs that are trained on, with their margins; ``dropped.jsonl`` has the ids of the others, and why.

    The service is asked once: a run that goes on has the margins that it began with, in ``margins.jsonl``.

    Raises:
        DataError: none is left.
    """
    table = read_table(path)
    pairs = [read_row(row, str(i)) for i, row in enumerate(table)]
    dropped: dict[str, str] = {}
    margins = _margins(options, pairs, table, service, dropped)
    rows = []
    for pair in pairs:
        if pair.id in dropped:
            continue
        try:
            row = MarginPair(pair.id, *_texts(tokeniser, pair), margins[pair.id])
        except DataError as error:
            dropped[pair.id] = str(error)
            continue
        if row.longest > options.max_length:
            dropped[pair.id] = f"{row.longest} tokens, more than --max-length {options.max_length}"
        else:
            rows.append(row)
    lines = (json.dumps({"id": id, "reason": reason}) + "\n" for id, reason in dropped.items())
    write_text(options.out / "dropped.jsonl", "".join(lines))
    if dropped:
        LOG.warning("%d of %d pairs are left out: %s says why", len(dropped), len(pairs), options.out / "dropped.jsonl")
    if not rows:
        raise DataError(f"no pair is left to train on; {options.out / 'dropped.jsonl'} says why")
    if options.margins == "constant":
        mean = fmean(row.margin for row in rows if row.margin is not None)
        rows = [replace(row, margin=mean) for row in rows]
    return rows


def build_trainer(
    options: RewardOptions, config: RewardConfig, folder: Path, tokenizer: Any, rows: Sequence[MarginPair]
) -> EndingTrainer:
    """The model with its score head, in TRL's trainer. The head is random: the same for every run of a seed, so that
    margins of different kinds begin alike.
    """
    set_seed(options.seed)
    return EndingTrainer(
        model=load_model(AutoModelForSequenceClassification, folder, options, num_labels=1),
        args=config,
        train_dataset=Dataset.from_list([row.columns() for row in rows]),
        processing_class=tokenizer,
        peft_config=lora(options, "SEQ_CLS"),
    )


def _margins(
    options: RewardOptions,
    pairs: Sequence[ScoredPair],
    table: Sequence[Mapping[str, Any]],
    service: Service | None,
    dropped: dict[str, str],
) -> Mapping[str, float | None]:
    """Margin of each pair by its id; ``dropped`` takes those that have none, or are not wanted.

    Raises:
        DataError: a row's own margin is wanted, and missing or no number, or the service gives none.
    """
    asked = options.margins in ("bin", "margin_scaled", "constant") or options.drop_disagreeing
    said = _said(options, pairs, service) if asked else {}
    for id, margin in said.items():
        if margin["error"]:
            dropped[id] = margin["error"]
        elif options.drop_disagreeing and margin["label_agrees"] is False:  # of a tie it is None
            dropped[id] = "the head disagrees with the label"
    if options.margins == "none":
        return dict.fromkeys((pair.id for pair in pairs), None)
    if options.margins == "column":
        column = {pair.id: number(row, "margin", pair.id) for pair, row in zip(pairs, table, strict=True)}
        if bare := [id for id, margin in column.items() if margin is None]:
            raise DataError(f"row {bare[0]}: `margin` is missing, and --margins column takes it from there")
        return column
    name = "bin" if options.margins == "constant" else options.margins
    if any(margin[name] is None for id, margin in said.items() if id not in dropped):
        raise DataError(
            f"--margins {options.margins}: the head has no scale of margins, so the service gives no {name}; fit it "
            "with `inward fit legend`, or take --margins none or column"
        )
    return {id: margin[name] for id, margin in said.items()}


def _said(options: RewardOptions, pairs: Sequence[ScoredPair], service: Service | None) -> dict[str, dict[str, Any]]:
    """What the LEGEND head says of each pair."""
    note = options.out / "margins.jsonl"
    known = _known(note)
    other = _other(note, known, options, pairs) if known else None
    if other and has_begun(options):
        raise DataError(f"{other}: choose another --out")
    if other or not known:
        if service is None:
            raise OptionsError(f"--margins {options.margins} asks the service: give --url")
        head = service.find_head(options.head, "--head", ("legend",)).name
        lines = [
            {"id": pair.id, "pair": digest([pair])[:16], "head": head, "error": _problem(found), "bin": found.bin,
             "margin_scaled": found.margin_scaled, "label_agrees": found.label_agrees}
            for pair, found in zip(pairs, service.margins(pairs, head), strict=True)
        ]  # fmt: skip
        write_text(note, "".join(json.dumps(line) + "\n" for line in lines))
        known = _known(note)
    return known


def _known(note: Path) -> dict[str, dict[str, Any]]:
    """What was written down, by the pairs' ids."""
    lines = note.read_text("utf-8").splitlines() if note.is_file() else []
    return {line["id"]: line for line in map(json.loads, lines)}


def _other(
    note: Path, known: Mapping[str, Mapping[str, Any]], options: RewardOptions, pairs: Sequence[ScoredPair]
) -> str | None:
    """What is wrong with what was written down, if it is not of these pairs or this head."""
    if {id: line.get("pair") for id, line in known.items()} != {pair.id: digest([pair])[:16] for pair in pairs}:
        return f"{note} is of {len(known)} other pairs than the {len(pairs)} of --pairs"
    heads = {line.get("head") for line in known.values()}
    if options.head and heads - {options.head}:
        return f"{note} has margins of {', '.join(map(str, heads))}, not of --head {options.head}"
    return None


def _problem(found: Margin) -> str | None:
    if found.error is not None:
        return found.error.message
    return "the service can't score it" if found.margin is None else None


def _texts(tokeniser: Tokeniser, pair: ScoredPair) -> tuple[list[int], list[int]]:
    tokens = tokeniser(pair)
    return tokens.prompt_ids + tokens.chosen_ids, tokens.prompt_ids + tokens.rejected_ids
