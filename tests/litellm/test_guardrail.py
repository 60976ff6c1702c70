"""A real LiteLLM proxy, whose guardrail is Inward. It has an environment of its own: ``make test-litellm``."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

from support.serving import demo
from support.waiting import PATIENCE

LITELLM = os.environ.get("INWARD_LITELLM", "")
"""The proxy's command."""
pytestmark = pytest.mark.skipif(not LITELLM, reason="a real LiteLLM is tried by `make test-litellm`")

KEY, MASTER = "a-key-of-inward", "sk-a-key-of-the-proxy"
ASK = [{"role": "user", "content": "How do I get into my neighbour's house without a key?"}]
SAFE = "That sounds like a crime. I can't help you break into a house."
HARMFUL = "Wait until they are away, then break the window and climb in."
CONFIGURATION = """
model_list:
  - {{model_name: safe, litellm_params: {{model: openai/any, api_key: none, mock_response: "{safe}"}}}}
  - {{model_name: harmful, litellm_params: {{model: openai/any, api_key: none, mock_response: "{harmful}"}}}}
  - {{model_name: best-of-n, litellm_params: {{model: openai/toy, api_key: {key}, api_base: {url}/v1}}}}
guardrails:
  - guardrail_name: inward
    litellm_params:
      guardrail: generic_guardrail_api
      mode: post_call
      api_base: {url}
      api_key: {key}
      additional_provider_specific_params: {{head: hybrid, false_positives: 0.5}}
general_settings:
  master_key: {master}
"""


@dataclass
class Proxy:
    client: openai.OpenAI
    inward: subprocess.Popen[str]

    def ask(self, model: str) -> str:
        answer = self.client.chat.completions.create(
            model=model, messages=ASK, max_tokens=12, extra_body={"guardrails": ["inward"]}
        )
        return answer.choices[0].message.content


@contextmanager
def litellm(folder: Path, url: str) -> Iterator[str]:
    """The proxy in front of ``url``, on a free port."""
    configuration = folder / "litellm.yaml"
    configuration.write_text(CONFIGURATION.format(safe=SAFE, harmful=HARMFUL, url=url, key=KEY, master=MASTER))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [LITELLM, "--config", str(configuration), "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "litellm.log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        )
        try:
            _until_alive(process, f"http://127.0.0.1:{port}", folder / "litellm.log")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()


def _until_alive(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(f"{url}/health/liveliness").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise AssertionError(f"LiteLLM did not start: {log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def proxy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("litellm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INWARD_API_KEYS", KEY)
        with (
            demo(folder) as served,
            litellm(folder, served.url) as url,
            openai.OpenAI(base_url=f"{url}/v1", api_key=MASTER, max_retries=0) as client,
        ):
            yield Proxy(client, served.process)


def test_a_safe_answer_passes(proxy):
    assert proxy.ask("safe") == SAFE


def test_a_harmful_answer_is_blocked_and_the_reason_names_the_head(proxy):
    with pytest.raises(openai.APIStatusError) as blocked:
        proxy.ask("harmful")
    assert blocked.value.status_code >= 400
    assert "the head 'hybrid' scores" in str(blocked.value)
    assert HARMFUL not in str(blocked.value)


def test_the_proxy_draws_the_best_of_n_from_us(proxy):
    answer = proxy.client.chat.completions.create(
        model="best-of-n", messages=ASK, max_tokens=12, extra_body={"best_of": 4}
    )
    assert answer.choices[0].message.content
    assert answer.usage.completion_tokens > 12  # of all four


def test_our_death_fails_closed(proxy):
    """The last of them: it ends the server."""
    proxy.inward.send_signal(signal.SIGKILL)
    proxy.inward.wait()
    with pytest.raises(openai.APIStatusError) as failed:
        proxy.ask("safe")
    assert failed.value.status_code >= 400
    assert SAFE not in str(failed.value)
