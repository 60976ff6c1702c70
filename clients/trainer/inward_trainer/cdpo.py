"""``inward-train cdpo``: options → the parts of the loop, and the loop."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer
from trl import DPOConfig

from inward_trainer import metrics
from inward_trainer.annotate import Annotator, Judges
from inward_trainer.base_model import check_same, eos_ids, find_model, name_model
from inward_trainer.checkpoints import last_checkpoint, step_of
from inward_trainer.confidence import Confidence
from inward_trainer.errors import DataError, OptionsError, Stopped
from inward_trainer.evaluation import Evaluation
from inward_trainer.feed import Feed, Gatherer, fitting, rows_of
from inward_trainer.fingerprint import fingerprint
from inward_trainer.held_out import HeldOut
from inward_trainer.journal import Journal
from inward_trainer.logs import Log
from inward_trainer.loop import FedTrainer, HeadUpdates, MainProcess, OnlineLoop
from inward_trainer.models import checkpoints, configuration, load_model, load_tokenizer, lora
from inward_trainer.options import CdpoOptions
from inward_trainer.pairs import ScoredPair
from inward_trainer.policy import Publisher
from inward_trainer.processes import agreed
from inward_trainer.runs import Run, find_run, go_on, locked, new_run, say_stopped
from inward_trainer.service import POINTWISE, Info, Service
from inward_trainer.sources import Source
from inward_trainer.sources.file import FilePairs, read_pairs, read_prompts
from inward_trainer.sources.job import pairs_of_job
from inward_trainer.sources.samples import SampledPairs
from inward_trainer.sources.stream import StreamedPairs
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
    config = configuration(
        DPOConfig,
        options,
        beta=options.beta,
        loss_type=["sigmoid"],
        max_steps=1,
        save_strategy="no",
        ignore_data_skip=True,
    )
    stopping = Stopping()
    with ExitStack() as stack:
        stack.enter_context(stopping.on_signals())
        try:
            return _run(options, config, stopping, stack)
        except Stopped as stop:
            return say_stopped("cdpo", options, stop, config.max_steps)


def check(options: CdpoOptions) -> None:
    """Raises ``OptionsError`` where options lack something or contradict each other."""
    needs_service = {
        "--source job": options.source == "job",
        "--source samples": options.source == "samples",
        "--adapters": options.adapters is not None,
        "--update-head": options.update_head,
        "--monitor": options.monitor is not None,
        "--held-out": options.held_out is not None,
    }
    problems = [f"{option} needs --url" for option, given in needs_service.items() if given and not options.url]
    if options.source in ("file", "job") and options.pairs is None:
        problems.append(f"--source {options.source} needs --pairs")
    if options.source == "samples" and options.prompts is None:
        problems.append("--source samples needs --prompts")
    if options.source == "stream" and not (options.redis_url and options.steps):
        problems.append("--source stream needs --redis-url, and --steps, since it has no end")
    if options.held_out is not None and options.adapters is None:
        problems.append("--held-out needs --adapters: without, the service's policy does not move")
    if options.adapters is not None and options.full:
        problems.append("--adapters needs a LoRA adapter: the service can't load all weights anew, so leave out --full")
    if options.adapter is not None and options.full:
        problems.append("--adapter goes on with that adapter: leave out --full")
    if problems:
        raise OptionsError("; ".join(problems))


def stream_key(options: CdpoOptions, served: str | None = None) -> str:
    """Where the service keeps the stream; its queue has the name of the model that it serves, which is of a folder the
    last part.
    """
    model = Path(options.model).expanduser()
    queue = options.queue or served or (model.resolve().name if model.is_dir() else options.model)
    return f"inward:{{{queue}}}:scores:{options.stream}"


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
    rows = options.batch_size * options.accumulate * processes
    service = _service(options, stopping, stack) if is_main else None
    info = service.info() if service else None
    name, revision = agreed(name_model(options.model, options.revision, info) if is_main else None, processes)
    model = _Model.find(name, revision, options.template)
    parts = _Parts(options, rows, model, service, info, stopping, stack) if is_main else None
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
    every = options.publish_every if options.adapters else options.checkpoint_every
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled

    def divergence(pairs: Sequence[ScoredPair]) -> list[float]:
        return trainer.divergence(rows_of(pairs, model.tokeniser, Confidence("plain")))

    loop = OnlineLoop(
        feed,
        parts.main if parts else None,
        stopping,
        wait=trainer.accelerator.wait_for_everyone,
        every=every,
        evaluate=_evaluation(options, trainer, parts, model.tokeniser, confidence),
        measure=None
        if sharded
        else lambda pairs: trainer.divergence(rows_of(pairs, model.tokeniser, Confidence("plain"))),
    )
    trainer.add_callback(loop)
    if parts is not None and options.report_to:
        parts.main.log.report = partial(Trainer.log, trainer)  # TRL's own would add what the next step has to say
    trainer.train(resume_from_checkpoint=resume)
    if (signal := agreed(stopping.signal, processes)) is not None:
        raise Stopped(signal)
    trainer.save_model(str(options.out / "final"))
    if parts is not None:
        LOG.info("done: %d steps, %s", trainer.state.global_step, options.out / "final")
        if options.metrics_port is not None:
            metrics.linger()
    return 0


def _evaluation(
    options: CdpoOptions, trainer: FedTrainer, parts: _Parts | None, tokeniser: Tokeniser, confidence: Confidence
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


@dataclass(frozen=True, slots=True)
class _Model:
    """What is trained, before its weights are loaded."""

    folder: Path
    tokeniser: Tokeniser

    @classmethod
    def find(cls, name: str, revision: str | None, template: str | None) -> _Model:
        folder = find_model(name, revision)
        tokenizer = load_tokenizer(folder)
        return cls(folder, Tokeniser(tokenizer, template, eos_ids(folder, tokenizer)))


class _Parts:
    """What only the main process has. ``stack`` closes it all."""

    def __init__(
        self,
        options: CdpoOptions,
        rows: int,
        model: _Model,
        service: Service | None,
        info: Info | None,
        stopping: Stopping,
        stack: ExitStack,
    ) -> None:
        stack.enter_context(locked(options.out))
        if info is not None:
            check_same(model.folder, model.tokeniser, info)
        if options.metrics_port is not None:
            stack.callback(metrics.serve(options.metrics_host, options.metrics_port))
        self.checkpoint = last_checkpoint(checkpoints(options))
        done = step_of(self.checkpoint) if self.checkpoint else 0
        self._options, self._model, self._service, self._stopping = options, model, service, stopping
        self._served = info.model if info else None
        self.head = service.find_head(options.head, "--head").name if service and self._needs_head() else options.head
        if service and options.monitor:
            service.find_head(options.monitor, "--monitor", POINTWISE)
        self.run = self._begin(rows)
        self.publisher = self._publisher(done)
        source, pairs = self._source(stack)
        self.steps = options.steps or math.ceil(options.epochs * pairs / rows)
        log = Log(options.out, done, run=self.run.name, tensorboard=options.tensorboard)
        stack.callback(log.close)
        annotator = self._annotator()
        self.main = MainProcess(
            self._gatherer(source, annotator, rows),
            log,
            publisher=self.publisher,
            update_head=self._head_updates(),
            judges=Judges(service, self._named_head(), options.monitor) if service and self.publisher else None,
            held_out=self._held_out(),
            eval_pairs=self._eval_pairs(annotator),
        )

    def _needs_head(self) -> bool:
        options = self._options
        return options.source == "samples" or options.update_head or options.adapters is not None or bool(options.head)

    def _named_head(self) -> str:
        assert self.head is not None
        return self.head

    def _begin(self, rows: int) -> Run:
        """The run of this folder, or a new one.

        Raises:
            OptionsError: the folder's run has other options, which can't change.
        """
        options, print_ = self._options, fingerprint(self._model.folder)
        found = find_run(options)
        if found is not None:
            go_on(found, options, rows, print_)
            return found
        sequence = None
        if options.update_head and self._service:
            head = self._service.find_head(self._named_head(), "--head")
            sequence = int(head.sequence or 0)
        return new_run(options, rows, print_, sequence)

    def _publisher(self, done: int) -> Publisher | None:
        if self._options.adapters is None or self._service is None:
            return None
        keep = max(self._options.keep_adapters, (self._options.max_lag or 0) + 2)
        publisher = Publisher(self._options.adapters, self.run.name, self._service, keep=keep)
        if self._options.adapter is not None and not done:
            publisher.publish(0, self._options.adapter)
        return publisher

    def _annotator(self) -> Annotator:
        options = self._options
        hybrid = options.confidence in ("pair", "batch") or options.monitor is not None
        return Annotator(self._service, head=self.head, monitor=options.monitor, hybrid=hybrid)

    def _eval_pairs(self, annotator: Annotator) -> list[ScoredPair]:
        """Those that fit the model, with what their confidence is made from.

        Raises:
            DataError: there are none.
        """
        options = self._options
        if options.eval_pairs is None:
            return []
        pairs = fitting(read_pairs(options.eval_pairs), self._model.tokeniser, options.max_length)[: options.eval_most]
        if not (known := annotator(pairs)):
            raise DataError(f"--eval-pairs: {options.eval_pairs} has no pair that can be used")
        return known

    def _gatherer(self, source: Source, annotator: Annotator, rows: int) -> Gatherer:
        return Gatherer(
            source,
            annotator,
            Journal(self._options.out / "journal"),
            rows=rows,
            usable=self._usable if source.live else lambda pairs, done: list(pairs),
            before=self.publisher.enforce if self.publisher else lambda done: None,
        )

    def _usable(self, pairs: Sequence[ScoredPair], done: int) -> list[ScoredPair]:
        """Of a live source: pairs that fit the model and are fresh. What can't be told to be fresh is not."""
        fit = fitting(pairs, self._model.tokeniser, self._options.max_length)
        most = self._options.max_lag
        if self.publisher is None or most is None:
            return fit
        ages = [(pair, self.publisher.age(pair.policy_version, done)) for pair in fit]
        fresh = [pair for pair, age in ages if age is not None and age <= most]
        if len(fresh) < len(fit):
            metrics.REFUSED_TOTAL.labels(reason="too_old").inc(len(fit) - len(fresh))
            LOG.warning(
                "%d pairs are refused at step %d: scored by a policy that is too old", len(fit) - len(fresh), done
            )
        return fresh

    def _head_updates(self) -> HeadUpdates | None:
        if not self._options.update_head or self._service is None:
            return None
        if self.run.head_sequence is None:
            raise OptionsError(
                f"the run in {self._options.out} began without --update-head: go on without, or choose another --out"
            )
        return HeadUpdates(self._service, self._named_head(), lr=self._options.update_lr, first=self.run.head_sequence)

    def _held_out(self) -> HeldOut | None:
        options = self._options
        if options.held_out is None or self._service is None:
            return None
        prompts = read_prompts(options.held_out)[: options.held_out_prompts]
        return HeldOut(
            self._service, prompts, options.sampling,
            head=self._named_head(), monitor=options.monitor, seed=options.seed,
        )  # fmt: skip

    def _source(self, stack: ExitStack) -> tuple[Source, int]:
        """The source, and how many pairs one epoch of it has at most; 0 where it has no end."""
        options = self._options
        if options.source == "stream":
            stream = StreamedPairs(
                str(options.redis_url),
                stream_key(options, self._served),
                group=options.group,
                consumer=options.consumer or self.run.name,
                run=self.run.name,
                idle=options.idle,
                patience=options.patience,
                stopping=self._stopping,
            )
            stack.callback(stream.close)
            return stream, 0
        if options.source == "samples":
            assert self._service is not None and options.prompts is not None
            prompts = read_prompts(options.prompts)
            samples = SampledPairs(
                self._service,
                prompts,
                n=options.samples,
                sampling=options.sampling,
                head=self._named_head(),
                epochs=None if options.steps else options.epochs,
                seed=options.seed,
            )
            return samples, len(prompts)
        assert options.pairs is not None
        if options.source == "job":
            assert self._service is not None
            pairs = pairs_of_job(
                self._service, options.pairs, options.out, id=options.job, head=options.head, stopping=self._stopping
            )
        else:
            pairs = read_pairs(options.pairs)
        pairs = fitting(pairs, self._model.tokeniser, options.max_length)
        return FilePairs(pairs, seed=options.seed), len(pairs)


def _service(options: CdpoOptions, stopping: Stopping, stack: ExitStack) -> Service | None:
    if options.url is None:
        return None
    key = options.api_key.get_secret_value() if options.api_key else None
    service = Service(options.url, api_key=key, patience=options.patience, at_once=options.at_once, stopping=stopping)
    return stack.enter_context(service)
