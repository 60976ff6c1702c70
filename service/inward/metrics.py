"""Every Prometheus series of the service; the comment above each block says where it is observed.

Base units (seconds, tokens), prefix ``inward_``. Labels hold names from the configuration, routes and codes: never ids,
never text. A process has one registry and is scraped by itself; what all processes of a queue see alike (its size, its
workers) says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import prometheus_client
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from inward.errors import DeadlineExceeded, InternalError

REGISTRY = CollectorRegistry()
"""Our own, so that a library that counts in the default registry doesn't appear in ours."""
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)
GCCollector(registry=REGISTRY)

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
TOKENS = tuple(float(2**k) for k in range(6, 18))
JOBS = tuple(float(2**k) for k in range(11))
SCORE = (-30.0, -10.0, -3.0, -1.0, -0.3, -0.1, 0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
PROBABILITY = tuple(k / 10 for k in range(1, 10))
KEPT_VERSIONS = 8
"""Versions of a head that have series of their own at a time: every online update makes a new one, and a Prometheus
can't hold them all."""

# processes.supervisor
TASK_FAILURES_TOTAL = Counter(
    "inward_task_failures",
    "Failures of tasks that should run as long as the process does; each was begun again.",
    ("task",),
    registry=REGISTRY,
)

# api.middleware
REQUESTS_TOTAL = Counter(
    "inward_requests",
    "HTTP requests answered, by route template and status code.",
    ("route", "code"),
    registry=REGISTRY,
)
REQUEST_SECONDS = Histogram(
    "inward_request_duration_seconds",
    "From the first byte of a request to the last byte of its answer.",
    ("route",),
    buckets=SECONDS,
    registry=REGISTRY,
)
REQUESTS_IN_FLIGHT = Gauge("inward_requests_in_flight", "HTTP requests being answered.", registry=REGISTRY)

# api.middleware, api.scoring
KEY_REQUESTS_TOTAL = Counter(
    "inward_key_requests",
    "HTTP requests answered, by name of the API key and status code; keys without a name are called plain.",
    ("key", "code"),
    registry=REGISTRY,
)
KEY_TOKENS_TOTAL = Counter(
    "inward_key_tokens",
    "Tokens that were let in, bulk jobs too, by name of the API key that asked for them.",
    ("key",),
    registry=REGISTRY,
)

# prompts
TOKENIZE_SECONDS = Histogram(
    "inward_tokenize_duration_seconds", "Templates and tokenisation, per request.", buckets=SECONDS, registry=REGISTRY
)

# intake and queues
REJECTIONS_TOTAL = Counter(
    "inward_admission_rejections",
    "Requests refused at the door of the queue, by reason.",
    ("reason",),
    registry=REGISTRY,
)
FIRST_TOKEN_SECONDS = Histogram(
    "inward_time_to_first_token_seconds",
    "From the admission of an answer that is told while it is drawn to the first of its text.",
    buckets=SECONDS,
    registry=REGISTRY,
)
EXPIRED_TOTAL = Counter("inward_expired", "Requests whose deadline passed before the answer.", registry=REGISTRY)
ABANDONED_TOTAL = Counter(
    "inward_abandoned_jobs", "Jobs whose caller left before they were computed.", registry=REGISTRY
)
QUEUE_JOBS = Gauge(
    "inward_queue_size",
    "Jobs that wait; with Redis, of all replicas, and those that are computed too.",
    registry=REGISTRY,
)
QUEUE_TOKENS = Gauge(
    "inward_queue_tokens", "Tokens admitted and not settled yet; with Redis, of all replicas.", registry=REGISTRY
)
SHARED_TOTAL = Counter(
    "inward_shared_jobs", "Items answered by the computation of an identical one.", registry=REGISTRY
)

# queues.redis
REDIS_UP = Gauge("inward_redis_up", "1 while Redis answers this process.", registry=REGISTRY)
WORKERS = Gauge("inward_workers", "Workers that take jobs from the queue, as this replica sees it.", registry=REGISTRY)
STREAM_LAG = Gauge("inward_stream_lag", "Jobs in Redis that no worker has taken yet.", ("stream",), registry=REGISTRY)
STREAM_PENDING = Gauge(
    "inward_stream_pending", "Jobs in Redis that a worker has taken and not settled.", ("stream",), registry=REGISTRY
)
DEAD_LETTERS_KEPT = Gauge(
    "inward_dead_letters_kept", "Dead letters that nobody has looked at and dropped yet.", registry=REGISTRY
)
CLAIMED_JOBS = Gauge("inward_claimed_jobs", "Jobs that this worker has taken and not settled.", registry=REGISTRY)
REDELIVERED_TOTAL = Counter(
    "inward_redelivered_jobs", "Jobs taken over from a worker that was not heard of any more.", registry=REGISTRY
)
CLAIMS_LOST_TOTAL = Counter("inward_claims_lost", "Jobs of this worker that another one took over.", registry=REGISTRY)
RESUBMITTED_TOTAL = Counter(
    "inward_resubmitted_jobs", "Jobs that Redis had lost and that were sent again.", registry=REGISTRY
)
DEAD_LETTERS_TOTAL = Counter(
    "inward_dead_letters", "Jobs given up because they ended several workers.", registry=REGISTRY
)

# worker
ENGINE_UP = Gauge("inward_engine_up", "1 while the engine can compute.", registry=REGISTRY)
IN_FLIGHT = Gauge("inward_in_flight_jobs", "Jobs in the batches that are being computed.", registry=REGISTRY)
QUEUE_SECONDS = Histogram(
    "inward_queue_duration_seconds", "Wait of a job in the queue.", buckets=SECONDS, registry=REGISTRY
)
FAILURES_TOTAL = Counter("inward_failures", "Jobs that could not be scored, by reason.", ("reason",), registry=REGISTRY)

# engine
INFERENCE_SECONDS = Histogram(
    "inward_inference_duration_seconds", "Backbone and heads, per batch.", buckets=SECONDS, registry=REGISTRY
)
BATCH_JOBS = Histogram("inward_batch_size", "Jobs of a batch.", buckets=JOBS, registry=REGISTRY)
BATCH_TOKENS = Histogram("inward_batch_tokens", "Tokens of a batch.", buckets=TOKENS, registry=REGISTRY)
COMPUTED_TOKENS_TOTAL = Counter("inward_computed_tokens", "Tokens that went through the backbone.", registry=REGISTRY)
PREFIX_TOKENS_SAVED_TOTAL = Counter(
    "inward_prefix_tokens_saved",
    "Prompt tokens not computed again, because a group shares its prompt or a cache had them.",
    registry=REGISTRY,
)
DRAWN_TOKENS_TOTAL = Counter("inward_drawn_tokens", "Tokens of drawn responses.", registry=REGISTRY)
NOT_DRAWN_TOKENS_TOTAL = Counter(
    "inward_not_drawn_tokens",
    "Tokens that responses which were rejected or ended by a guard would have had at most.",
    registry=REGISTRY,
)
EARLY_STOPS_TOTAL = Counter(
    "inward_early_stops", "Drawn responses that were not drawn to their end.", ["reason"], registry=REGISTRY
)
SCORES = Histogram(
    "inward_reward", "Scores given, by head and version.", ("head", "version"), buckets=SCORE, registry=REGISTRY
)
ABSTENTIONS_TOTAL = Counter("inward_abstentions", "Responses without a finite score.", ("head",), registry=REGISTRY)
LABEL_AGREEMENT_TOTAL = Counter(
    "inward_label_agreement",
    "Pairs, by whether the sign of the margin is the label's; best against worst of a ranking counts too.",
    ("head", "agrees"),
    registry=REGISTRY,
)
DECILES_TOTAL = Counter(
    "inward_reward_decile",
    "Scores by the tenth of the head's calibration set that they are like (1 the lowest): all ten alike as long as "
    "nothing drifts.",
    ("head", "version", "decile"),
    registry=REGISTRY,
)
MARGINS = Histogram(
    "inward_margin",
    "Signed margins of pairs, by head and version.",
    ("head", "version"),
    buckets=SCORE,
    registry=REGISTRY,
)
CONFIDENCES = Histogram(
    "inward_confidence",
    "Confidence (gamma of cDPO) of pairs, by head.",
    ("head",),
    buckets=PROBABILITY,
    registry=REGISTRY,
)
BEST_OF_N_GAIN = Histogram(
    "inward_best_of_n_gain",
    "Best score of the responses drawn to a prompt above their mean, in units of the head's score.",
    ("head",),
    buckets=(0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
    registry=REGISTRY,
)

# heads.registry
HEAD_INFO = Gauge(
    "inward_head_info",
    "1 for the active version of a head and its newest ones.",
    ("head", "kind", "version", "active"),
    registry=REGISTRY,
)
HEAD_UPDATES_TOTAL = Counter("inward_head_updates", "Online updates applied.", ("head",), registry=REGISTRY)

# control.heads
HEAD_FIT_COSINE = Gauge(
    "inward_head_fit_cosine",
    "How well a head that is updated online still fits: the Mahalanobis cosine of it and one refitted on the pairs of "
    "its last updates, that is the correlation of their scores. From 32 pairs on.",
    ("head",),
    registry=REGISTRY,
)

# wiring and halves
BUILD_INFO = Gauge(
    "inward_build_info",
    "1 for what runs: its version, and whether it is api, worker or serve.",
    ("version", "role"),
    registry=REGISTRY,
)

# policies
POLICY_SWITCHES_TOTAL = Counter(
    "inward_policy_switches", "Times that the backbone was given another policy version.", registry=REGISTRY
)
POLICY_INFO = Gauge(
    "inward_policy_info", "1 for the policy version that the backbone carries.", ("version",), registry=REGISTRY
)


for _reason in ("queue_full", "no_worker"):
    REJECTIONS_TOTAL.labels(reason=_reason)
for _reason in (DeadlineExceeded.code, InternalError.code):
    FAILURES_TOTAL.labels(reason=_reason)


@lru_cache(maxsize=256)
def deciles(head: str, version: str) -> tuple[Counter, ...]:
    """The counters of all ten tenths, so that an empty one is a zero and not a hole."""
    return tuple(DECILES_TOTAL.labels(head=head, version=version, decile=str(tenth)) for tenth in range(1, 11))


def begin(head: str) -> None:
    """The counters of a head that is loaded begin at zero: a counter that begins at one hides its first event from
    Prometheus.
    """
    for counter in (ABSTENTIONS_TOTAL, HEAD_UPDATES_TOTAL):
        counter.labels(head=head)
    for agrees in ("true", "false"):
        LABEL_AGREEMENT_TOTAL.labels(head=head, agrees=agrees)


def serving(head: str, version: str) -> None:
    """This version is served from now on, and its scores are counted from zero on; series of one that was served long
    before are given up.
    """
    SCORES.labels(head=head, version=version)
    served = _served.setdefault(head, [])
    if version in served:
        served.remove(version)
    served.append(version)
    while len(served) > KEPT_VERSIONS:
        old = served.pop(0)
        for metric in (SCORES, MARGINS, DECILES_TOTAL):
            metric.remove_by_labels({"head": head, "version": old})
        deciles.cache_clear()


_served: dict[str, list[str]] = {}
"""By head, the versions that have series, as they were served."""


def exposition() -> bytes:
    """What ``GET /metrics`` answers, as ``CONTENT_TYPE``."""
    return generate_latest(REGISTRY)


class _Ours(Collector):
    """The series of the service, without those of the process."""

    def collect(self) -> Iterator[Metric]:
        return (metric for metric in REGISTRY.collect() if metric.name.startswith("inward_"))

    def describe(self) -> Iterator[Metric]:
        return iter(())  # nobody needs to look for names that are taken: ours have a prefix


def show_elsewhere() -> None:
    """Shows the series of the service in the default registry, too: the one of a process that is somebody else's."""
    prometheus_client.REGISTRY.register(_Ours())
