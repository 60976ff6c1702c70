"""A stand-in for the service, as the trainer sees it: what it says is a function of the prompt, the seed and the
policy's step.

Its state outlives any trainer, as a real service's would. ``python`` that is killed can't take it along.
"""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

from inward_trainer.service import Service

WORDS = (
    "harbour boats morning quiet birds wire crows starlings lock canal step safer tallest tree redwood metres".split()
)


HEADS = (
    {"name": "hybrid", "kind": "hybrid"},
    {"name": "legend", "kind": "legend"},
    {"name": "monitor", "kind": "legend"},
)
SLOW = {"error": {"message": "not done within 95 s", "code": "deadline_exceeded"}}


class FakeInward:
    """``updates`` are the pairs of each update of the head by its sequence number, ``policies`` the versions that it
    was switched to, ``asked`` every request's path and body.

    Args:
        about: more of what ``GET /info`` says.
        heads: what is loaded, in this order.
        most_at_once: samples that it draws within its deadline.
    """

    def __init__(self, *, adapters=None, about=None, heads=HEADS, most_at_once=10**6):
        self.adapters = adapters
        self.about = about or {}
        self.heads = heads
        self.most_at_once = most_at_once
        self.updates = {}
        self.policies = ["base"]
        self.drawn = []
        self.asked = []
        self.refuse_next = 0
        self.asleep = False
        self._lock = threading.Lock()

    def answer(self, method, path, body):
        """Status and JSON."""
        with self._lock:
            self.asked.append((path, body))
            if self.refuse_next:
                self.refuse_next -= 1
                return 503, {"error": {"message": "not now"}}
            if path in ("/sleep", "/wake"):
                self.asleep = path == "/sleep"
                return 200, {"asleep": self.asleep}
            if self.asleep and method == "POST":
                return 409, {"error": {"message": "it sleeps, and should not have been asked"}}
            parts = path.strip("/").split("/")
            if parts[0] == "info":
                return 200, {"model": "tiny", "limits": {"timeout_seconds": 95, "candidates": 64}, **self.about}
            if parts[0] == "policy":
                return self._policy(method, body)
            if parts[0] == "heads":
                return self._head(method, parts[1:], body)
            if path == "/rerank" and body["n"] > self.most_at_once:
                return 504, SLOW
            routes = {"/rerank": self._rerank, "/reward": self._reward, "/score": self._score, "/margin": self._margin}
            return 200, self._envelope(body) | routes[path](body)

    @property
    def policy(self):
        return self.policies[-1]

    def _envelope(self, body):
        head = next(head for head in self.heads if head["name"] == body.get("head", head["name"]))
        return {"model": "tiny", "policy_version": self.policy, "head": head | {"version": 1}}

    def _policy(self, method, body):
        if method == "POST" and body["version"] != self.policy:
            if body["version"] != "base":
                if self.adapters is None:
                    return 409, {"error": {"message": "there is no adapters folder", "param": "version"}}
                if not (folder := self.adapters / body["version"]).is_dir():
                    return 404, {"error": {"message": "no such adapter", "param": "version"}}
                if not (folder / "adapter_model.safetensors").is_file():
                    return 422, {"error": {"message": "it holds no matrices", "param": "version"}}
            self.policies.append(body["version"])
        return 200, {"policy_version": self.policy, "available": [], "history": []}

    def _head(self, method, name, body):
        last = max(self.updates, default=0)
        if method == "POST":
            if body["sequence"] not in (last, last + 1):
                return 409, {"error": {"message": f"expected {last + 1}"}}
            self.updates.setdefault(body["sequence"], body["pairs"])
        last = max(self.updates, default=0)
        listed = [head | {"version": 1, "sequence": last if head["kind"] == "hybrid" else 0} for head in self.heads]
        return 200, next((head for head in listed if head["name"] in name), None) if name else {"heads": listed}

    def _rerank(self, body):
        step = self.policy.rpartition("-")[2]
        texts = [self._text(body["prompt"], body["sampling"]["seed"], step, i) for i in range(body["n"])]
        results = sorted(
            (
                {"index": i, "text": t, "score": score(t), "finish_reason": "stop", "completion_tokens": 6}
                for i, t in enumerate(texts)
            ),
            key=lambda r: -r["score"],
        )
        self.drawn.append(body["prompt"])
        best, worst = results[0], results[-1]
        pair = {"prompt": body["prompt"], "chosen": best["text"], "rejected": worst["text"], "margin": 1.0}
        return {
            "results": results,
            "best": best,
            "pair": pair | {"confidence": 0.9} if best["score"] > worst["score"] else None,
        }

    def _reward(self, body):
        return {
            "rewards": [
                {"chosen_score": score(pair["chosen"]), "rejected_score": score(pair["rejected"]), "confidence": 0.8}
                for pair in body["pairs"]
            ]
        }

    def _score(self, body):
        return {"scores": [{"score": score(item["response"])} for item in body["items"]]}

    def _margin(self, body):
        margins = [score(pair["chosen"]) - score(pair["rejected"]) for pair in body["pairs"]]
        return {
            "margins": [
                {"margin": m, "margin_scaled": m, "bin": min(1.0, max(0.0, m)), "label_agrees": m > 0 if m else None}
                for m in margins
            ]
        }

    @staticmethod
    def _text(*of):
        digest = hashlib.sha256(repr(of).encode()).digest()
        return " " + " ".join(WORDS[byte % len(WORDS)] for byte in digest[:6])


def score(text):
    return round(hashlib.sha256(text.encode()).digest()[0] / 64 - 2, 3)


def service_of(answer, **options):
    """A Service whose requests a function answers."""
    return Service("http://inward", http=httpx.AsyncClient(transport=httpx.MockTransport(answer)), **options)


def service(fake, **options):
    """Talks to a stand-in without a network."""

    def answer(request):
        body = json.loads(request.content) if request.content else None
        status, content = fake.answer(request.method, request.url.path, body)
        return httpx.Response(status, json=content)

    return service_of(answer, **options)


@contextmanager
def served(fake):
    """Its address, as long as it is wanted."""

    class Handler(BaseHTTPRequestHandler):
        def handle_one(self, method):
            length = int(self.headers.get("content-length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            status, content = fake.answer(method, self.path, body)
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            self.handle_one("GET")

        def do_POST(self):
            self.handle_one("POST")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
