"""``inward serve --backbone vllm`` whose engine is killed while it is busy, and which is started again."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
import transformers

from support import parity
from support import tiny_tokenizer as tiny
from support.parity import EAGER, LAYERS, WIDTH
from support.serving import serve
from support.waiting import PATIENCE, wait_until

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm does it", exc_type=ImportError)

from inward.backbones.fingerprint import fingerprint
from inward.offline.bench.workload import write_random_heads
from inward.prompts import Prompts
from inward.types import BackboneInfo

SERVE = ("--backbone", "vllm", "--dtype", "float32", "--vllm-options", json.dumps(EAGER))
ASK = {"prompt": "Which way?", "n": 64, "sampling": {"max_tokens": 500}}
"""More than the engine has done before somebody looks."""


def test_callers_get_a_503_livez_turns_red_and_a_restart_serves(tmp_path: Path) -> None:
    model = parity.save(transformers.LlamaConfig, tmp_path / "model")
    info = BackboneInfo("model", "", fingerprint(model), LAYERS, WIDTH, 640, "float32", "cpu")
    write_random_heads(info, Prompts(tiny.tokenizer(), max_tokens=640).template, tmp_path / "heads", 1)
    with serve(tmp_path, *SERVE) as server, httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
        assert client.get("/livez").status_code == 200
        with ThreadPoolExecutor(6) as callers:
            calls = [callers.submit(client.post, "/rerank", json=ASK) for _ in range(6)]
            wait_until(lambda: "inward_in_flight_jobs 6.0" in client.get("/metrics").text)
            below = psutil.Process(server.process.pid).children()
            next(p for p in below if "EngineCore" in " ".join([p.name(), *p.cmdline()])).kill()
            assert {call.result().status_code for call in calls} == {503}
        for path in ("/livez", "/readyz"):
            red = client.get(path)
            assert (red.status_code, red.json()["error"]["code"]) == (503, "engine_dead")
        assert server.stop(timeout=PATIENCE) != 0
    with serve(tmp_path, *SERVE) as server:
        answer = httpx.post(
            server.url + "/rerank", json=ASK | {"n": 8, "sampling": {"max_tokens": 8}}, timeout=PATIENCE
        )
        assert answer.status_code == 200
        assert len(answer.json()["results"]) == 8
