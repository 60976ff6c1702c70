"""``inward-train cdpo``: options → the parts of the loop, and the loop."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer
from trl import DPOConfig

from inward_trainer import metrics
from inward_trainer.base_model import FoundModel, name_model
from inward_trainer.confidence import Confidence
from inward_trainer.errors import DataError, OptionsError, Stopped
from inward_trainer.evaluation import Evaluation
from inward_trainer.feed import Feed, rows_of
from inward_trainer.loop import FedTrainer, OnlineLoop
from inward_trainer.models import configuration, load_model, lora
from inward_trainer.options import CdpoOptions
from inward_trainer.pairs import ScoredPair
from inward_trainer.parts import Parts
from inward_trainer.policy import FILES
from inward_trainer.processes import agreed
from inward_trainer.runs import connected, until_stopped
from inward_trainer.stopping import Stopping
from inward_trainer.tokens import Tokeniser

LOG = logging.getLogger(__name__)
PLACEHOLDER = {"prompt_ids": [0], "chosen_ids": [0], "rejected_ids": [0]}
"""TRL reads a row of its dataset while it is built; a row of ours may cost a round of sampling, and comes from the
feed."""


def run(options: CdpoOptions) -> int:
    """Trains until the steps are done or the source ends; started again, it goes on. The exit status.

    Raises:
        TrainerError: see the tree; the run can go on when that is mended.
    """
    check(options)
    fixed = {"loss_type": ["sigmoid"], "save_strategy": "no", "ignore_data_skip": True}
    config = configuration(DPOConfig, options, beta=options.beta, **fixed)
    return until_stopped("cdpo", options, config, partial(_run, options, config))


def check(options: CdpoOptions) -> None:
    """Raises ``OptionsError`` where options lack something or contradict each other."""
    needs_service = {
        "--source job": options.source == "job",
        "--source samples": options.source == "samples",
        "--adapters": options.adapters is not None,
        "--update-head": options.update_head,
        "--monitor": options.monitor is not None,
        "--held-out": options.held_out is not None,
        "--lend-device": options.lend_device,
    }
    problems = [f"{option} needs --url" for option, given in needs_service.items() if given and not options.url]
    if options.job is not None and options.source != "job":
        problems.append("--job is for --source job")
    if options.prompts is not None and options.source != "samples":
        problems.append("--prompts is for --source samples")
    if options.source in ("file", "job") and options.pairs is None:
        problems.append(f"--source {options.source} needs --pairs")
    if options.source == "samples" and options.prompts is None:
        problems.append("--source samples needs --prompts")
    if options.source == "stream" and not (options.redis_url and options.steps):
        problems.append("--source stream needs --redis-url, and --steps, since it has no end")
    if options.stop_after is not None and options.eval_pairs is None:
        problems.append("--stop-after needs --eval-pairs")
    if options.update_head and "max_loss" in options.early_rejection:
        problems.append(
            "--update-head makes a new version of the head at every step, and max_loss is calibrated for one: give "
            "--early-rejection keep and at"
        )
    if options.held_out is not None and options.adapters is None:
        problems.append("--held-out needs --adapters: without, the service's policy does not move")
    if options.adapters is not None and options.full:
        problems.append("--adapters needs a LoRA adapter: the service can't load all weights anew, so leave out --full")
    if options.adapter is not None and options.full:
        problems.append("--adapter goes on with that adapter: leave out --full")
    if options.adapter is not None and options.adapters is not None:
        lost = [file for file in FILES if not (options.adapter / file).is_file()]
        problems += [f"--adapter: {options.adapter} has no {' and no '.join(lost)}"] if lost else []
    if problems:
        raise OptionsError("; ".join(problems))


def build_trainer(
    options: CdpoOptions, config: DPOConfig, folder: Path, tokeniser: Tokeniser, feed: Feed
) -> FedTrainer:
    """The model, its adapter and its reference, in TRL's trainer."""
    trainer = FedTrainer(
        load_model(AutoModelForCausalLM, folder, options),
        config,
        processing_class=tokeniser.tokenizer,
        peft_config=lora(options, "CAUSAL_LM"),
        train_dataset=Dataset.from_list([PLACEHOLDER]),
    )
    trainer.feed = feed
    return trainer


def _run(options: CdpoOptions, config: DPOConfig, stopping: Stopping, stack: ExitStack) -> int:
    is_main, processes = config.process_index == 0, config.world_size
    if options.lend_device and processes > 1:
        raise OptionsError("--lend-device is for one process that shares its GPU with the service")
    rows = options.batch_size * options.accumulate * processes
    service = connected(options, stopping, stack) if is_main else None
    info = service.info() if service else None
    name, revision = agreed(name_model(options.model, options.revision, info) if is_main else None, processes)
    model = FoundModel.find(name, revision, options.template)
    parts = Parts(options, rows, model, service, info, stopping, stack) if is_main else None
    plan = agreed((parts.steps, parts.checkpoint) if parts else None, processes)
    config.max_steps, resume = plan[0], str(plan[1]) if plan[1] else None
    confidence = Confidence(options.confidence, options.gamma, options.scale, options.alpha, options.floor)
    feed = Feed(
        parts.main.gatherer if parts else None,
        model.tokeniser,
        confidence,
        rows=rows,
        batch=options.batch_size,
        stopping=stopping,
        rank=config.process_index,
        processes=processes,
    )
    trainer = build_trainer(options, config, model.folder, model.tokeniser, feed)
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled

    def divergence(pairs: Sequence[ScoredPair]) -> list[float]:
        return trainer.divergence(rows_of(pairs, model.tokeniser, Confidence("plain")))

    loop = OnlineLoop(
        feed,
        parts.main if parts else None,
        stopping,
        wait=trainer.accelerator.wait_for_everyone,
        every=options.publish_every if options.adapters else options.checkpoint_every,
        evaluate=_evaluation(options, trainer, parts, model.tokeniser, confidence),
        measure=None if sharded else divergence,
    )
    trainer.add_callback(loop)
    if parts is not None and options.report_to:
        parts.main.log.report = partial(Trainer.log, trainer)  # TRL's own would add what the next step has to say
    trainer.train(resume_from_checkpoint=resume)
    if (signal := agreed(stopping.signal, processes)) is not None:
        raise Stopped(signal)
    if not trainer.state.global_step:
        raise DataError("the source ended before it had given the pairs of one step: nothing was trained")
    trainer.save_model(str(options.out / "final"))
    if parts is not None:
        LOG.info("done: %d steps, %s", trainer.state.global_step, options.out / "final")
        if options.metrics_port is not None:
            metrics.linger()
    return 0


def _evaluation(
    options: CdpoOptions, trainer: FedTrainer, parts: Parts | None, tokeniser: Tokeniser, confidence: Confidence
) -> Evaluation | None:
    if options.eval_pairs is None:
        return None
    processes = trainer.args.world_size
    pairs: Sequence[ScoredPair] = agreed(parts.main.eval_pairs if parts else None, processes)
    rows = rows_of(pairs, tokeniser, confidence)
    return Evaluation(
        lambda places: trainer.pair_losses([rows[place] for place in places]),
        len(rows),
        trainer.save_model,
        parts.main.log if parts else None,
        options.out / "best",
        stop_after=options.stop_after,
        rank=trainer.args.process_index,
        processes=processes,
    )
