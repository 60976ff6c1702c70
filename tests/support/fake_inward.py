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

WORDS = (
    "harbour boats morning quiet birds wire crows starlings lock canal step safer tallest tree redwood metres".split()
)


class FakeInward:
    """``updates`` are the pairs of each update of the head by its sequence number, ``policies`` the versions that it
    was switched to."""

    def __init__(self, *, adapters=None):
        self.adapters = adapters
        self.updates = {}
        self.policies = ["base"]
        self.drawn = []
        self.refuse_next = 0
        self._lock = threading.Lock()

    def answer(self, method, path, body):
        """Status and JSON."""
        with self._lock:
            if self.refuse_next:
                self.refuse_next -= 1
                return 503, {"error": {"message": "not now"}}
            parts = path.strip("/").split("/")
            if parts[0] == "policy":
                return self._policy(method, body)
            if parts[0] == "heads":
                return self._head(method, body)
            return 200, {
                "/rerank": self._rerank,
                "/reward": self._reward,
                "/score": self._score,
                "/margin": self._margin,
            }[path](body)

    @property
    def policy(self):
        return self.policies[-1]

    def _policy(self, method, body):
        if method == "POST" and body["version"] != self.policy:
            if (
                body["version"] != "base"
                and not (self.adapters / body["version"] / "adapter_model.safetensors").is_file()
            ):
                return 404, {"error": {"message": "no such adapter"}}
            self.policies.append(body["version"])
        return 200, {"policy_version": self.policy, "available": [], "history": []}

    def _head(self, method, body):
        if method == "POST":
            last = max(self.updates, default=0)
            if body["sequence"] not in (last, last + 1):
                return 409, {"error": {"message": f"expected {last + 1}"}}
            if body["sequence"] == last + 1:
                self.updates[last + 1] = body["pairs"]
        return 200, {"name": "hybrid", "sequence": max(self.updates, default=0)}

    def _rerank(self, body):
        step = self.policy.rpartition("-")[2]
        texts = [self._text(body["prompt"], body["sampling"]["seed"], step, i) for i in range(body["n"])]
        results = sorted(
            ({"text": t, "score": score(t), "finish_reason": "stop"} for t in texts), key=lambda r: -r["score"]
        )
        self.drawn.append(body["prompt"])
        pair = {"confidence": 0.9} if results[0]["score"] > results[-1]["score"] else None
        return {"results": results, "pair": pair, "policy_version": self.policy}

    def _reward(self, body):
        rewards = [
            {"chosen_score": score(pair["chosen"]), "rejected_score": score(pair["rejected"]), "confidence": 0.8}
            for pair in body["pairs"]
        ]
        return {"rewards": rewards, "policy_version": self.policy}

    def _score(self, body):
        return {"scores": [{"score": score(item["response"])} for item in body["items"]]}

    def _margin(self, body):
        margins = [score(pair["chosen"]) - score(pair["rejected"]) for pair in body["pairs"]]
        return {
            "margins": [
                {"margin": m, "margin_scaled": m, "bin": min(1.0, max(0.0, m)), "label_agrees": m > 0} for m in margins
            ]
        }

    @staticmethod
    def _text(*of):
        digest = hashlib.sha256(repr(of).encode()).digest()
        return " " + " ".join(WORDS[byte % len(WORDS)] for byte in digest[:6])


def score(text):
    return round(hashlib.sha256(text.encode()).digest()[0] / 64 - 2, 3)


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
