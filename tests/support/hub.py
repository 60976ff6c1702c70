"""A hub of models: as much of its HTTP as the real ``huggingface_hub`` package asks for when it fetches and pushes."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """``repositories`` hold the files of their main branch; every request's method and path is in ``asked``."""

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def commit(self, name: str) -> str:
        """Of what is there now."""
        digest = hashlib.sha1()
        for file, content in sorted(self.repositories[name].items()):
            digest.update(file.encode() + b"\0" + content)
        return digest.hexdigest()


@contextmanager
def hub() -> Iterator[Hub]:
    """One that listens on a free port."""
    own = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            own.asked.append(f"{self.command} {self.path}")
            if match := re.match(r"/api/models/([^/]+/[^/]+)(?:/(?:revision|tree|paths-info)/.*)?$", self.path):
                name = match[1]
                if name not in own.repositories:
                    return self._none("RepoNotFound")
                if "/revision/" in self.path and self.path.rsplit("/", 1)[1] not in ("main", own.commit(name)):
                    return self._none("RevisionNotFound")
                if "/tree/" in self.path or "/paths-info/" in self.path:
                    return self._json(
                        [
                            {
                                "type": "file",
                                "path": file,
                                "size": len(content),
                                "oid": hashlib.sha1(content).hexdigest(),
                            }
                            for file, content in own.repositories[name].items()
                        ]
                    )
                files = [{"rfilename": file} for file in own.repositories[name]]
                return self._json({"id": name, "sha": own.commit(name), "siblings": files, "private": False})
            if match := re.match(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)$", self.path):
                name, file = match[1], match[2]
                if name not in own.repositories or file not in own.repositories[name]:
                    return self._none("EntryNotFound")
                content = own.repositories[name][file]
                tag = f'"{hashlib.sha1(content).hexdigest()}"'
                return self._send(200, content, {"x-repo-commit": own.commit(name), "etag": tag})
            return self._none("EntryNotFound")

        do_HEAD = do_GET

        def do_POST(self) -> None:
            own.asked.append(f"POST {self.path}")
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
                if name in own.repositories:
                    return self._json({"error": "exists", "url": f"{own.url}/{name}"}, 409)
                own.repositories[name] = {}
                return self._json({"url": f"{own.url}/{name}"})
            if "/preupload/" in self.path:
                paths = [one["path"] for one in json.loads(body)["files"]]
                return self._json(
                    {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
                )
            if match := re.match(r"/api/models/([^/]+/[^/]+)/commit/main", self.path):
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        own.repositories[match[1]][line["value"]["path"]] = content
                oid = own.commit(match[1])
                return self._json({"commitUrl": f"{own.url}/{match[1]}/commit/{oid}", "commitOid": oid})
            if self.path.startswith("/api/validate-yaml"):
                return self._json({"warnings": [], "errors": []})
            return self._none("EntryNotFound")

        def _none(self, code: str) -> None:
            self._send(404, b"{}", {"x-error-code": code})

        def _json(self, body: Any, status: int = 200) -> None:
            self._send(status, json.dumps(body).encode(), {"content-type": "application/json"})

        def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    own.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield own
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
