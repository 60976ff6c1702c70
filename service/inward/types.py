"""The values that pass from stage to stage, all frozen.

Shapes are part of names: ``values_NK`` is ``[N, K]``.

    N  responses of one group          K  numbers of one readout
    T  tokens                          D  width of the residual stream
    L  blocks of the backbone, or layers that a head reads (where ``h_k`` is the residual stream after k blocks)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Ids = tuple[int, ...]
Message = Mapping[str, str]
"""One turn of a conversation: ``role`` and ``content``."""
Prompt = str | Sequence[Message]
"""What stands before the answer: a string (one user turn) or chat messages, oldest first, that do not end with the
assistant."""
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Indices = NDArray[np.int64]
Position = Literal["prompt", "last", "eos", "mean"]
"""Where a state is read. ``prompt``: last token of the prompt with its template. ``last``: last token of prompt +
response. ``eos``: an end-of-sequence token appended after it. ``mean``: mean over the response's tokens (of an empty
response: ``last``)."""
Detail = Literal["layers", "tokens"]
Priority = Literal["interactive", "bulk"]
"""Interactive jobs go first, but never so that bulk jobs starve."""
Kind = Literal["legend", "hybrid", "srr", "ensemble", "value"]
BASE = "base"
"""The policy version of a backbone that carries no adapter."""


@dataclass(frozen=True, slots=True)
class EarlyRejection:
    """Which responses are not drawn to their end: at the decision points ``at`` the share ``keep`` of those that still
    run goes on; or, with ``max_loss``, those that can still win, by what a value head was calibrated to.
    """

    keep: float | None = None
    at: tuple[int, ...] = ()
    """Tokens after which it is decided, ascending."""
    max_loss: float | None = None
    """Share of what best-of-N gains over a single response that may be lost on average."""
    head: str | None = None
    """Whose scores decide; by default the value head of the one that ranks, else that one's own."""


@dataclass(frozen=True, slots=True)
class StopRule:
    """A response ends where its pooled score falls below a threshold, which is given in one of three ways."""

    head: str
    below: float | None = None
    """A score."""
    probability: float | None = None
    """A calibrated probability that the response is acceptable."""
    fpr: float | None = None
    """Share of the acceptable responses, at calibration, that would be stopped."""
    pool: str = ""
    """As ``heads.pooling.Pool.parse`` reads it; empty: the head's own, else ``max_ema``."""
    after: int = 0
    """Tokens that are drawn whatever they score."""


@dataclass(frozen=True, slots=True)
class SamplingSpec:
    """How the responses of a group are drawn; names and meanings are vLLM's."""

    n: int
    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    early_rejection: EarlyRejection | None = None
    stop_when: StopRule | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """The unit of work: one prompt and its responses, given or still to be sampled.

    ``prompt_ids`` holds the rendered template with exactly one BOS; each of ``responses_ids`` continues it, without an
    EOS.
    """

    prompt_ids: Ids
    responses_ids: tuple[Ids, ...] = ()
    sampling: SamplingSpec | None = None

    @property
    def tokens(self) -> int:
        """Tokens that the backbone has to compute: the prompt once, then every response (and one EOS each, if a head
        wants it).
        """
        drawn = self.sampling.n * self.sampling.max_tokens if self.sampling else 0
        return len(self.prompt_ids) + sum(len(ids) + 1 for ids in self.responses_ids) + drawn

    @property
    def longest(self) -> int:
        """Tokens of its longest sequence: the prompt, a response, and room for one EOS."""
        drawn = self.sampling.max_tokens if self.sampling else 0
        return len(self.prompt_ids) + max([drawn, *map(len, self.responses_ids)]) + 1


@dataclass(frozen=True, slots=True, eq=False)
class Tap:
    """One linear map at one layer and position: ``h @ weight_DK + bias_K``, evaluated in float32; no weight means
    the state itself.
    """

    layer: int
    position: Position
    weight_DK: Floats | None = None
    bias_K: Floats | None = None
    final_norm: bool = False
    """Only at the last layer: read after the model's final norm (Hugging Face's ``hidden_states[L]``) instead of
    before it."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Readout:
    """The linear part of a head: its taps, whose outputs stand side by side and make the K numbers of a response."""

    taps: tuple[Tap, ...]

    @property
    def depth(self) -> int:
        """How many blocks have to run."""
        return max(tap.layer for tap in self.taps)


@dataclass(frozen=True, slots=True)
class Reading:
    """What one readout gave for one group."""

    values_NK: Floats
    tokens_TK: tuple[Floats, ...] | None = None
    """For each response ``[T, K]``: the same map at every response token. ``prompt`` taps repeat; ``eos`` and
    ``mean`` read the token."""


@dataclass(frozen=True, slots=True)
class GroupReading:
    """One group's readings, in the order of the readouts asked for, and what they cost."""

    readings: tuple[Reading, ...]
    computed_tokens: int
    cached_tokens: int
    """Prompt tokens that were needed again by another response of the group, or found in a prefix cache, and not
    computed."""
    policy_version: str
    """Which adapter, if any, all of it was computed with."""


FinishReason = Literal["stop", "length", "guard", "rejected"]
"""Why a drawn response ends: by itself (or at a stop string), at its length limit, by a ``StopRule``, or by an
``EarlyRejection``."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One drawn response; ``ids`` has no EOS."""

    ids: Ids
    text: str
    finish_reason: FinishReason
    stop_score: float | None = None
    """Of one that was ended by a guard or rejected: the score that ended it; it has no other."""
    held_back: int = 0
    """Tokens of such a one that were drawn and are not given."""

    @property
    def finished(self) -> bool:
        """Whether it was drawn to its end."""
        return self.finish_reason in ("stop", "length")


@dataclass(frozen=True, slots=True)
class Stop:
    """The end of a response that is still drawn."""

    reason: Literal["guard", "rejected"]
    given: int
    """Tokens of it that may be given."""
    score: float
    """That ended it."""


@dataclass(frozen=True, slots=True)
class BackboneInfo:
    """Who the backbone is. ``fingerprint`` covers configuration, tokenizer and weights; a head is fitted for exactly
    one.
    """

    name: str
    revision: str
    fingerprint: str
    layers: int
    width: int
    max_tokens: int
    dtype: str
    device: str
    folder: str = ""
    """Of its files, on the machine that computes."""
    concurrency: int = 1
    """Calls that it computes at once."""
    final_norm: bool = True
    """Whether the last layer can also be read after the model's final norm."""

    @property
    def identity(self) -> str:
        """What numbers depend on: backbones that differ in it never answer as one service."""
        return f"{self.fingerprint}:{self.dtype}"


@dataclass(frozen=True, slots=True)
class Job:
    """A group that somebody waits for.

    ``heads`` are names: the worker resolves them, all of a batch from one snapshot of the loaded heads. ``deadline`` is
    Unix time in seconds. With ``pair`` the group has two responses, chosen first, and pair fields are wanted as well.
    """

    id: str
    group: Group
    heads: tuple[str, ...]
    details: frozenset[Detail] = frozenset()
    pair: bool = False
    deadline: float = float("inf")
    enqueued: float = 0.0
    """Unix time at which it was admitted."""
    reply_to: str = ""
    priority: Priority = "interactive"
    deliveries: int = 1
    """How many workers it was given to; those before this one ended while they had it."""
    alone: bool = False
    """It may be what ended them, so it is run by itself."""
    trace: str = ""
    """W3C ``traceparent`` of the request that it belongs to; empty where nobody traces."""
    told: bool = False
    """Whoever waits for it wants the text of its one response while it is drawn, as ``Piece``, or each of several as
    it ends, as ``Ended``."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of the response of a job that is ``told``, before its outcome. Pieces come in order, and some may be
    missing: the outcome has all of the text. A worker that takes a job over begins from the start again.
    """

    job_id: str
    start: int
    """Characters of the response before it."""
    text: str


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of one of several responses of a job that is ``told``, before its outcome. Some may be missing, and
    come in any order: the outcome has all of them. It is what the outcome says of it, but for a score's last digits.
    """

    job_id: str
    index: int
    sample: Sample
    score: float | None = None
    """By the job's first head, of one that was drawn to its end; None with a listwise head."""
    probability: float | None = None


News = Piece | Ended
"""What is told of a job before its outcome."""


@dataclass(frozen=True, slots=True)
class HeadRef:
    """Which head gave an answer."""

    name: str
    kind: Kind
    version: int


@dataclass(frozen=True, slots=True)
class LayerScores:
    """Each layer's part of one response's score; ``None`` where it is not finite."""

    layers: tuple[int, ...]
    """Index k is the residual stream after k blocks."""
    values: tuple[float | None, ...]
    gates: tuple[float | None, ...] | None = None
    """Of a hybrid head: what each value is multiplied by."""


@dataclass(frozen=True, slots=True)
class PairScores:
    """What one head says of chosen against rejected. All of it is ``None`` where one of the two has no finite score."""

    margin: float | None = None
    """Score of chosen minus score of rejected, raw."""
    margin_scaled: float | None = None
    """``margin`` over the standard deviation of margins at calibration, where the head has one."""
    bin: float | None = None
    """Quantile of ``margin`` as a value in [0, 1], where the head has bins."""
    label_agrees: bool | None = None
    """Whether the sign of ``margin`` is the label's; ``None`` for a tie."""
    label_probability: float | None = None
    """Probability that the label is right, calibrated on held-out pairs, where the head is calibrated for it; 0.5 for a
    tie."""
    confidence: float | None = None
    """Gamma of cDPO, where the head offers one."""


@dataclass(frozen=True, slots=True)
class Gamma:
    """How the confidence of a pair follows from the rewards of its two answers, see ``heads.hybrid.confidence``."""

    alpha: float
    squash: bool
    floor: float | None


@dataclass(frozen=True, slots=True)
class Scores:
    """What one head says of the N responses of a group. ``None`` marks a response that has no finite score."""

    scores_N: tuple[float | None, ...]
    probability_N: tuple[float | None, ...] | None = None
    """Calibrated probability that the response is acceptable, where the head is calibrated for it."""
    layers_N: tuple[LayerScores, ...] | None = None
    """Detail ``layers``, per response."""
    tokens_N: tuple[tuple[float, ...], ...] | None = None
    """Detail ``tokens``: per response, the score at every token."""
    map_N: tuple[tuple[tuple[float, ...], ...], ...] | None = None
    """Details ``tokens`` and ``layers`` of a head with several layers: per response and token, each layer's part."""
    pair: PairScores | None = None
    """Of a job with ``pair``."""
    listwise: bool = False
    """Whether a score depends on the other responses of its list (SRR, by design)."""
    gamma: Gamma | None = None
    """Of a head that states confidences: any two of ``scores_N`` give one."""
    share_N: tuple[float | None, ...] | None = None
    """Of a listwise head: softmax over the list, where it has several responses with a score."""

    def probability(self, n: int) -> float | None:
        """Of response number ``n``, where the head is calibrated for it."""
        if self.listwise:  # older workers send the share of the list here
            return None
        return self.probability_N[n] if self.probability_N else None

    def share(self, n: int) -> float | None:
        """Of response number ``n`` in its list, where the head is listwise."""
        return self.share_N[n] if self.share_N else None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one job. A prompt counts once for each response that continues it; ``cached_tokens`` are those not
    computed again.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    drawn_tokens: int = 0
    """Of drawn responses, those that were not given included."""
    not_drawn_tokens: int = 0
    """At most so many more would have been drawn of the responses that were rejected or ended by a guard."""

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cached_tokens + other.cached_tokens,
            self.drawn_tokens + other.drawn_tokens,
            self.not_drawn_tokens + other.not_drawn_tokens,
        )


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds that a job waited in the queue and was computed."""

    queued: float = 0.0
    inference: float = 0.0


@dataclass(frozen=True, slots=True)
class Scored:
    """The good outcome of a job: one ``Scores`` for each head asked for, in that order."""

    job_id: str
    heads: tuple[HeadRef, ...]
    scores: tuple[Scores, ...]
    policy_version: str
    usage: Usage
    samples: tuple[Sample, ...] = ()
    timing: Timing = field(default_factory=Timing)
    fingerprint: str = ""
    """Of the backbone that computed it."""
    dtype: str = ""
    """In which."""

    @property
    def version(self) -> tuple[tuple[HeadRef, ...], str, str, str]:
        """What all parts of one answer have in common: heads, policy, fingerprint and dtype."""
        return self.heads, self.policy_version, self.fingerprint, self.dtype


def slowest(scored: Iterable[Scored]) -> Timing:
    """Of what took longest, which is what the caller of all of them waited for."""
    return max((one.timing for one in scored), key=lambda timing: timing.queued + timing.inference)


@dataclass(frozen=True, slots=True)
class Failed:
    """The other outcome: ``code`` names a class of ``errors``, so that it can be raised again where somebody waits."""

    job_id: str
    code: str
    message: str
    timing: Timing = field(default_factory=Timing)
    param: str | None = None
    """Field of the request to blame, where that is not the whole job."""


Outcome = Scored | Failed
