"""What ``serve``, ``api`` and ``worker`` share: a socket, a server on it, and an orderly end."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Mapping
from types import FrameType
from typing import Any, Protocol

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from inward import logs, tracing
from inward.errors import SetupError
from inward.settings import Settings, unknown_variables

LOG = logs.logger("processes")
BACKLOG = 2048
"""Connections that wait until they are accepted."""


class Served(Protocol):
    """What a process serves: an app, and what stands behind it."""

    app: Any
    draining: bool
    stuck: bool
    """There are threads that will never end, so that nobody may wait for them."""

    @property
    def ending(self) -> asyncio.Task[None] | None:
        """A task whose end is the end of the process."""
        ...

    def ready_fields(self) -> Mapping[str, Any]:
        """Of the event ``ready``."""
        ...

    async def close(self, timeout: float) -> bool:
        """Ends in an orderly way; True if nothing was left undone."""
        ...


Opening = Callable[[Settings], Awaitable[Served]]


def run(role: str, settings: Settings, opening: Opening, *, unnamed: int | None = None) -> int:
    """``serve`` as a whole process, with its logs and traces; ``role`` is its name there."""
    logs.configure(settings.log_level, settings.log_format == "json")
    for name, meant in unknown_variables(os.environ).items():
        logs.event(LOG, "unknown_variable", severity=logging.WARNING, variable=name, meant=meant)
    tracing.configure(settings.otlp_endpoint, role, evaluations=settings.otlp_evaluations)
    return asyncio.run(serve(settings, opening, unnamed=unnamed))


async def serve(settings: Settings, opening: Opening, *, unnamed: int | None = None) -> int:
    """Runs until SIGTERM, SIGINT or the end of ``Served.ending``; returns 0 if everything that was accepted was
    answered.

    Args:
        opening: opens what is served, after the port is ours (a taken one is known at once).
        unnamed: the port where the settings name none; a free one if it is taken.
    """
    named = unnamed is None or "port" in settings.model_fields_set
    listening = listen(settings.host, settings.port if named else unnamed or 0, or_free=not named)
    try:
        process = await opening(settings)
    except BaseException:
        listening.close()
        raise
    try:
        server = Server(process, settings)
        listening = _begin(listening, or_free=not named)  # who reads that we are ready may come at once
        host, port = listening.getsockname()[:2]
        logs.event(LOG, "ready", url=f"http://{host}:{port}", **process.ready_fields())
        if process.ending is not None:
            process.ending.add_done_callback(lambda _: server.stop())
        await server.serve(sockets=[listening])
    finally:
        clean = await process.close(settings.drain_timeout)
        if process.stuck:
            end_at_once(1)
    return 0 if clean else 1


def end_at_once(status: int) -> None:
    """Ends the process without waiting for its threads: one that hangs in the device would hold it for ever."""
    logs.event(LOG, "ended_at_once", severity=logging.ERROR, status=status)
    logging.shutdown()
    os._exit(status)


def check_reachability(settings: Settings) -> None:
    """Refuses to be open to others by accident.

    Raises:
        SetupError: no keys are set and the address is not a loopback address.
    """
    if settings.api_keys or settings.api_keys_file or settings.insecure:
        return
    try:
        loopback = settings.host == "localhost" or ipaddress.ip_address(settings.host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise SetupError(
            f"--host {settings.host} can be reached by others and no keys are set: set INWARD_API_KEYS or "
            "INWARD_API_KEYS_FILE, or say --insecure if that is meant"
        )


def listen(host: str, port: int, *, or_free: bool = False) -> socket.socket:
    """A bound socket; with ``or_free`` on a free port where this one is taken.

    Raises:
        SetupError: the address is taken or not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named, because asyncio switches Nagle's algorithm off only then; with it every answer takes 40 ms
    # longer.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if port:  # a free one could else be given to others who don't listen yet either
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        if or_free:
            return listen(host, 0)
        raise _taken(host, port, error) from None
    return bound


def _begin(bound: socket.socket, *, or_free: bool) -> socket.socket:
    """Listens. Of two that bound the same port before either listened, one learns only here that it is taken."""
    host, port = bound.getsockname()[:2]
    try:
        bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        if or_free:
            return _begin(listen(host, 0), or_free=False)
        raise _taken(host, port, error) from None
    return bound


def _taken(host: str, port: int, error: OSError) -> SetupError:
    return SetupError(f"cannot listen on {host}:{port}: {error.strerror}; choose another with --port or INWARD_PORT")


def connection(seconds: float) -> type[H11Protocol]:
    """uvicorn's connection, closed where the headers of a request take longer than ``seconds``; uvicorn itself would
    wait for ever.
    """

    class Impatient(H11Protocol):
        waiting: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._wait()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            begun = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
            if begun and self.waiting is None:
                self._wait()
            elif not begun:
                self._stop_waiting()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def _wait(self) -> None:
            self.waiting = self.loop.call_later(seconds, self.transport.close)

        def _stop_waiting(self) -> None:
            if self.waiting is not None:
                self.waiting.cancel()
                self.waiting = None

    return Impatient


class Server(uvicorn.Server):
    """uvicorn, unready from the moment it is told to stop, and with an exit status that says how it went."""

    def __init__(self, process: Served, settings: Settings) -> None:
        super().__init__(
            uvicorn.Config(
                process.app,
                log_config=None,
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=max(1, round(settings.drain_timeout)),
                timeout_keep_alive=75,
                http=connection(settings.header_timeout),
                h11_max_incomplete_event_size=64 * 1024,
                server_header=False,
            )
        )
        self._process = process
        # Until uvicorn listens to signals, we do. And once it has stopped it raises the signal again: the default
        # handler would then end us with -SIGTERM instead of 0.
        signal.signal(signal.SIGTERM, self.handle_exit)
        signal.signal(signal.SIGINT, self.handle_exit)

    def stop(self) -> None:
        """As the first signal does."""
        self.handle_exit(signal.SIGTERM, None)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the first signal (and the second, which does not wait any longer)."""
        self._process.draining = True
        super().handle_exit(sig, frame)
