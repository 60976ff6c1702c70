"""``inward-train cdpo``: options → the parts of the loop, and the loop."""

from __future__ import annotations

import fcntl
import json
import logging
import math
import re
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig

from inward_trainer import metrics
from inward_trainer.annotate import Annotator, Recheck
from inward_trainer.confidence import Confidence
from inward_trainer.durable import write_text
from inward_trainer.errors import OptionsError
from inward_trainer.feed import Feed, Gatherer, fitting
from inward_trainer.held_out import HeldOut
from inward_trainer.journal import Journal
from inward_trainer.logs import Log
from inward_trainer.loop import Centre, Circle, FedTrainer, HeadUpdates, last_checkpoint, stopping_on_signals
from inward_trainer.models import arguments, checkpoints, load_tokenizer, lora, weights_dtype
from inward_trainer.options import CdpoOptions
from inward_trainer.pairs import ScoredPair
from inward_trainer.policy import Publisher, Versions
from inward_trainer.service import Service
from inward_trainer.sources import Source
from inward_trainer.sources.job import pairs_of_job
from inward_trainer.sources.rows import Rows, read_pairs, read_prompts
from inward_trainer.sources.samples import Samples
from inward_trainer.sources.stream import Stream
from inward_trainer.tokens import Tokeniser

LOG = logging.getLogger(__name__)
DEFAULT_HEAD = "hybrid"
PLACEHOLDER = {"prompt_ids": [0], "chosen_ids": [0], "rejected_ids": [0]}
"""TRL reads a row of its dataset while it is built; a row of ours may cost a round of sampling, and comes from the
feed."""


@dataclass(frozen=True, slots=True)
class Run:
    """What a run is called, and what must not change when it goes on; ``run.json``."""

    name: str
    rows: int
    """Pairs of one step."""
    head_sequence: int | None
    """Of the head when the run began: the update of step k has this number + k. None: a run that updates no head."""


def run(options: CdpoOptions) -> int:
    """Trains until the steps are done or the source ends; started again, it goes on.

    Raises:
        TrainerError: see the tree; the run can go on when that is mended.
    """
    check(options)
    config = DPOConfig(
        **arguments(
            options, beta=options.beta, loss_type=["sigmoid"], max_steps=1, save_strategy="no", ignore_data_skip=True
        )
    )
    main = config.process_index == 0
    rows = options.batch_size * options.accumulate * config.world_size
    tokeniser = Tokeniser(load_tokenizer(options), options.template)
    with ExitStack() as stack:
        parts = _Parts(options, rows, tokeniser, stack) if main else None
        config.max_steps, resume = _agreed((parts.steps, parts.checkpoint) if parts else None, config.world_size)
        feed = Feed(
            parts.centre.gatherer if parts else None,
            tokeniser,
            Confidence(options.confidence, options.gamma, options.scale, options.alpha, options.floor),
            rows=rows,
            batch=options.batch_size,
            rank=config.process_index,
            processes=config.world_size,
        )
        trainer = build_trainer(options, config, tokeniser, feed)
        every = options.publish_every if options.adapters else options.checkpoint_every
        circle = Circle(feed, parts.centre if parts else None, wait=trainer.accelerator.wait_for_everyone, every=every)
        trainer.add_callback(circle)
        if config.world_size == 1:
            stack.enter_context(stopping_on_signals(circle))
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model(str(options.out / "final"))
        if parts and circle.ended and options.metrics_port is not None:
            metrics.linger()
    return 0


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
    if problems:
        raise OptionsError("; ".join(problems))


def stream_key(options: CdpoOptions) -> str:
    """Where the service keeps the stream; its queue has the name of the model, of a folder the last part."""
    model = Path(options.model)
    queue = options.queue or (model.expanduser().resolve().name if model.expanduser().is_dir() else options.model)
    return f"inward:{{{queue}}}:scores:{options.stream}"


def build_trainer(options: CdpoOptions, config: DPOConfig, tokeniser: Tokeniser, feed: Feed) -> FedTrainer:
    """The model, its adapter and its reference, in TRL's trainer."""
    model = AutoModelForCausalLM.from_pretrained(options.model, revision=options.revision, dtype=weights_dtype(options))
    trainer = FedTrainer(
        model,
        config,
        processing_class=tokeniser.tokenizer,
        peft_config=lora(options, "CAUSAL_LM"),
        train_dataset=Dataset.from_list([PLACEHOLDER]),
    )
    trainer.feed = feed
    return trainer


class _Parts:
    """What only the main process has. ``stack`` closes it all."""

    def __init__(self, options: CdpoOptions, rows: int, tokeniser: Tokeniser, stack: ExitStack) -> None:
        stack.enter_context(locked(options))
        if options.metrics_port is not None:
            stack.callback(metrics.serve(options.metrics_host, options.metrics_port))
        self.checkpoint = last_checkpoint(checkpoints(options))
        done = int(self.checkpoint.name.rpartition("-")[2]) if self.checkpoint else 0
        self.service = _service(options, stack)
        self.run = begin(options, rows, self.service)
        self._tokeniser, self._max_length, self._max_lag = tokeniser, options.max_length, options.max_lag
        self.publisher = self._publisher(options)
        source, pairs = self._source(options, stack)
        self.steps = options.steps or math.ceil(options.epochs * pairs / rows)
        log = Log(options.out, done, run=self.run.name, tensorboard=options.tensorboard)
        stack.callback(log.close)
        self.centre = Centre(
            self._gatherer(options, source, rows),
            log,
            publisher=self.publisher,
            update_head=self._head_updates(options),
            recheck=Recheck(self.service, self.head(options), options.monitor)
            if self.service and self.publisher
            else None,
            held_out=self._held_out(options),
        )

    def _gatherer(self, options: CdpoOptions, source: Source, rows: int) -> Gatherer:
        head = self.head(options) if options.source == "samples" else options.head
        hybrid = options.confidence in ("pair", "batch") or options.monitor is not None
        return Gatherer(
            source,
            Annotator(self.service, head=head, monitor=options.monitor, hybrid=hybrid),
            Journal(options.out / "journal"),
            rows=rows,
            usable=self._usable if source.live else lambda pairs, done: list(pairs),
            before=self.publisher.enforce if self.publisher else lambda done: None,
        )

    @staticmethod
    def head(options: CdpoOptions) -> str:
        """The hybrid head, where one must be named."""
        return options.head or DEFAULT_HEAD

    def _usable(self, pairs: Sequence[ScoredPair], done: int) -> list[ScoredPair]:
        """Of a live source: pairs that fit the model and are fresh. What can't be told to be fresh is not."""
        fit = fitting(pairs, self._tokeniser, self._max_length)
        if self.publisher is None or self._max_lag is None:
            return fit
        ages = [(pair, self.publisher.versions.age(pair.policy_version, done)) for pair in fit]
        fresh = [pair for pair, age in ages if age is not None and age <= self._max_lag]
        if len(fresh) < len(fit):
            metrics.REFUSED_TOTAL.labels(reason="too_old").inc(len(fit) - len(fresh))
            LOG.warning(
                "%d pairs are refused at step %d: scored by a policy that is too old", len(fit) - len(fresh), done
            )
        return fresh

    def _publisher(self, options: CdpoOptions) -> Publisher | None:
        if options.adapters is None or self.service is None:
            return None
        return Publisher(options.adapters, Versions(self.run.name, options.publish_every), self.service)

    def _head_updates(self, options: CdpoOptions) -> HeadUpdates | None:
        if not options.update_head or self.service is None:
            return None
        if self.run.head_sequence is None:
            raise OptionsError(
                f"the run in {options.out} began without --update-head: go on without, or choose another --out"
            )
        return HeadUpdates(self.service, self.head(options), lr=options.update_lr, first=self.run.head_sequence)

    def _held_out(self, options: CdpoOptions) -> HeldOut | None:
        if options.held_out is None or self.service is None:
            return None
        prompts = read_prompts(options.held_out)[: options.held_out_prompts]
        return HeldOut(
            self.service, prompts, options.sampling, head=self.head(options), monitor=options.monitor, seed=options.seed
        )

    def _source(self, options: CdpoOptions, stack: ExitStack) -> tuple[Source, int]:
        """The source, and how many pairs one epoch of it has at most; 0 where it has no end."""
        if options.source == "stream":
            stream = Stream(
                str(options.redis_url),
                stream_key(options),
                group=options.group,
                consumer=options.consumer,
                idle=options.idle,
                patience=options.patience,
            )
            stack.callback(stream.close)
            return stream, 0
        if options.source == "samples":
            assert self.service is not None and options.prompts is not None
            prompts = read_prompts(options.prompts)
            epochs = None if options.steps else options.epochs
            samples = Samples(
                self.service,
                prompts,
                n=options.samples,
                sampling=options.sampling,
                head=self.head(options),
                epochs=epochs,
                seed=options.seed,
            )
            return samples, len(prompts)
        assert options.pairs is not None
        if options.source == "job":
            assert self.service is not None
            pairs = pairs_of_job(self.service, options.pairs, options.out, id=options.job, head=options.head)
        else:
            pairs = read_pairs(options.pairs)
        pairs = fitting(pairs, self._tokeniser, self._max_length)
        return Rows(pairs, seed=options.seed), len(pairs)


def _service(options: CdpoOptions, stack: ExitStack) -> Service | None:
    if options.url is None:
        return None
    key = options.api_key.get_secret_value() if options.api_key else None
    return stack.enter_context(Service(options.url, api_key=key, patience=options.patience, at_once=options.at_once))


def begin(options: CdpoOptions, rows: int, service: Service | None) -> Run:
    """The run of this folder, or a new one.

    Raises:
        OptionsError: the folder's run has steps of another size.
    """
    path = options.out / "run.json"
    if path.is_file():
        found = Run(**json.loads(path.read_text("utf-8")))
        if found.rows != rows:
            raise OptionsError(
                f"the run in {options.out} has {found.rows} pairs a step, these options {rows}: choose another --out"
            )
        return found
    sequence = int(service.head(_Parts.head(options))["sequence"]) if options.update_head and service else None
    called = re.sub(r"[^A-Za-z0-9._-]+", "-", options.out.resolve().name).lstrip("._-")[
        :64
    ]  # what the service takes as a version
    begun = Run(f"{called or 'run'}-{uuid.uuid4().hex[:8]}", rows, sequence)
    write_text(path, json.dumps(asdict(begun)))
    return begun


@contextmanager
def locked(options: CdpoOptions) -> Iterator[None]:
    """Raises ``OptionsError`` if another trainer works in the folder."""
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OptionsError(f"another trainer works in {options.out}") from None
        yield


def _agreed(value: Any, processes: int) -> tuple[int, str | None]:
    """Steps and checkpoint, as the main process found them."""
    found = [value]
    if processes > 1:
        broadcast_object_list(found, from_process=0)
    steps, checkpoint = found[0]
    return steps, str(checkpoint) if checkpoint else None
