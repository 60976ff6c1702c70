"""What only the main process of ``inward-train cdpo`` has: options → source, service, journal, log, and what they are
told.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from inward_trainer import metrics
from inward_trainer.annotate import Annotator, Judges
from inward_trainer.base_model import FoundModel, check_same
from inward_trainer.checkpoints import last_checkpoint, step_of
from inward_trainer.errors import DataError, OptionsError
from inward_trainer.feed import Gatherer, fitting
from inward_trainer.fingerprint import fingerprint
from inward_trainer.held_out import HeldOut
from inward_trainer.journal import Journal
from inward_trainer.logs import Log
from inward_trainer.loop import HeadUpdates, MainProcess
from inward_trainer.models import checkpoints
from inward_trainer.options import CdpoOptions
from inward_trainer.pairs import ScoredPair
from inward_trainer.policy import Publisher
from inward_trainer.runs import Run, has_begun, locked, new_run, resumed
from inward_trainer.service import POINTWISE, Info, Service
from inward_trainer.sources import Source
from inward_trainer.sources.file import FilePairs, read_pairs, read_prompts
from inward_trainer.sources.job import pairs_of_job
from inward_trainer.sources.samples import SampledPairs
from inward_trainer.sources.stream import StreamedPairs
from inward_trainer.stopping import Stopping

LOG = logging.getLogger(__name__)
PROMPT_AND_END = 2
"""Tokens that an answer leaves to the shortest prompt and to what ends a text."""


def stream_key(options: CdpoOptions, served: str | None = None) -> str:
    """Where the service keeps the stream; its queue has the name of the model that it serves, which is of a folder the
    last part.
    """
    model = Path(options.model).expanduser()
    queue = options.queue or served or (model.resolve().name if model.is_dir() else options.model)
    return f"inward:{{{queue}}}:scores:{options.stream}"


def check_room(options: CdpoOptions, info: Info) -> None:
    """Raises ``OptionsError`` where samples may become longer than the model takes, whatever the prompt is."""
    most, asked = info.most_tokens, options.sampling.get("max_tokens")
    draws = options.source == "samples" or options.held_out is not None
    if draws and isinstance(most, int) and isinstance(asked, int) and asked > most - PROMPT_AND_END:
        raise OptionsError(
            f"--sampling: max_tokens is {asked}, and the service's model takes {most} tokens of prompt and answer "
            "together: give fewer"
        )


class Parts:
    """What only the main process has. ``stack`` closes it all."""

    def __init__(
        self,
        options: CdpoOptions,
        rows: int,
        model: FoundModel,
        service: Service | None,
        info: Info | None,
        stopping: Stopping,
        stack: ExitStack,
    ) -> None:
        stack.enter_context(locked(options.out))
        if info is not None:
            check_same(model.folder, model.tokeniser, info)
            check_room(options, info)
        if service and options.lend_device:
            service.wake()  # a run that was killed may have left it asleep
            stack.callback(service.wake)
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
            lender=service if options.lend_device else None,
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
        if (found := resumed(options, rows, print_)) is not None:
            return found
        sequence = None
        if options.update_head and self._service:
            head = self._service.find_head(self._named_head(), "--head")
            if head.pool is not None:
                raise OptionsError(
                    f"--update-head: head {head.name!r} pools the scores of its tokens, and only one that was fitted "
                    "without --pool learns online"
                )
            sequence = int(head.sequence or 0)
        return new_run(options, rows, print_, sequence)

    def _publisher(self, done: int) -> Publisher | None:
        if self._options.adapters is None or self._service is None:
            return None
        keep = max(self._options.keep_adapters, (self._options.max_lag or 0) + 2)
        publisher = Publisher(self._options.adapters, self.run.name, self._service, keep=keep)
        publisher.check()
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
        assert self.run.head_sequence is not None
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
                early_rejection=options.early_rejection,
                seed=options.seed,
            )
            return samples, len(prompts)
        assert options.pairs is not None
        if options.source == "job":
            assert self._service is not None
            pairs = pairs_of_job(
                self._service, options.pairs, options.out,
                id=options.job, head=options.head, begun=has_begun(options), stopping=self._stopping,
            )  # fmt: skip
        else:
            pairs = read_pairs(options.pairs)
        pairs = fitting(pairs, self._model.tokeniser, options.max_length)
        return FilePairs(pairs, seed=options.seed), len(pairs)
