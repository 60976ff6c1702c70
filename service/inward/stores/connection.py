"""From a URL to a Redis that scripts run on. Its many errors end here: all that leaves this door is ``Unavailable``."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from ssl import SSLCertVerificationError
from typing import Any, Protocol, cast
from urllib.parse import parse_qsl, unquote, urlsplit, urlunsplit

from redis.asyncio import Redis
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    ClusterDownError,
    ConnectionError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import (
    TimeoutError as RedisTimeoutError,
)

from inward import logs
from inward.errors import SetupError, Unavailable

LOG = logs.logger("stores")
SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster")
PASSING = ("OOM", "LOADING", "MASTERDOWN", "CLUSTERDOWN", "NOREPLICAS", "READONLY", "UNBLOCKED")
"""What Redis says of states that pass; the last two to those who write to, or block on, a master that is demoted.
From scripts, and from those who block, these come as plain errors."""
RETRY_AFTER_S = 2.0
"""After which a caller may come back when Redis was away or full."""
COMMANDS = 64
"""At once, each on a connection of its own; more wait. redis-py refuses the 101st instead."""
LATE_S = 0.2
"""By which a timer may come late; where it is more this process itself stood still, which says nothing of Redis."""
LISTEN_S = 0.5
"""Between two questions to a Redis that has fallen silent."""


Arg = str | bytes | int | float
"""What a command or a script takes."""


class Full(Unavailable):
    """Redis holds as much as it may. It answers, and what frees memory is obeyed."""


class Refused(Unavailable):
    """Redis answers, and refuses: a password, a right, or a command of ours that is wrong. That does not pass by
    itself.
    """


class GroupLost(Unavailable):
    """The consumer group is not there; ``Connection.ensure_group`` makes it."""


class Client(Protocol):
    """The part of redis-py's clients that is used here; every command goes by its name."""

    async def execute_command(self, *args: Any) -> Any: ...
    async def aclose(self) -> None: ...


class KeyFinder:
    """Finds the key of a command in its words, in the place of redis-py's parser of commands.

    That one asks a node for its table of commands, and once more for the keys of every ``XREAD`` and ``XREADGROUP``:
    the default node, whichever that is. Nothing would go on where it is frozen or gone.
    """

    async def initialize(self, node: object = None) -> None:
        """Asks nobody."""

    async def get_keys(self, *command: Any) -> tuple[Any, ...]:
        """The first key alone: those of one command share a slot, or Redis refuses it."""
        match command[0]:
            case "XREAD":
                at = command.index("STREAMS") + 1
            case "XREADGROUP":
                at = command.index("STREAMS", 4) + 1  # a worker may be called so
            case "XGROUP":
                at = 2
            case _:
                at = 1
        return command[at : at + 1]


class Cluster(RedisCluster):
    """One of which a command needs no other node than that of its key."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        cast(Any, self).commands_parser = KeyFinder()

    async def execute_command(self, *command: Any, **options: Any) -> Any:
        """As redis-py's, which sends what comes before it knows the nodes to any of them."""
        await self.initialize()
        return await super().execute_command(*command, **options)


class Connection:
    """One Redis, standalone, behind Sentinels or a cluster.

    One that falls silent (frozen, or cut off) is noticed once: as soon as one command was not answered in time, and no
    other since it was sent, all that wait are given up with it, and others fail at once until it answers a question of
    ours again. Of a cluster that is one node, since all keys of a queue live in one slot: the one that scripts run on.

    Args:
        url: ``redis://[user:password@]host:port/db``, ``rediss://`` for TLS, ``unix://path``,
            ``redis+sentinel://[user:password@]host:port,host:port/service[/db]``,
            ``redis+cluster://[user:password@]host:port,host:port``, any of which tells of the other nodes; with TLS
            also ``?ssl_ca_certs=…``, ``ssl_certfile``, ``ssl_keyfile`` and the like, as redis-py names them.
        timeout: seconds after which a command that is not answered counts as lost.
        name: where the URL was given, as errors about it say.

    Raises:
        SetupError: not such a URL.
    """

    def __init__(self, url: str, *, timeout: float = 5.0, name: str = "--redis-url") -> None:
        self.timeout, self._name = timeout, name
        self.answered = -math.inf
        """Monotonic seconds at which a command was answered last."""
        self._client, self._sentinels = _clients(url, timeout, name)
        self._question: tuple[str, ...] = () if isinstance(self._client, RedisCluster) else ("PING",)
        """Which a Redis that fell silent is asked. Any node of a cluster answers a PING, and only that of the slot
        answers for a key: none is known until a script has named one.
        """
        self._shas: dict[str, str] = {}
        self._room = asyncio.Semaphore(COMMANDS)
        self._waiting: set[asyncio.Timeout] = set()
        self._listening: asyncio.Task[None] | None = None

    def block_ms(self, wanted_ms: float) -> int:
        """``BLOCK`` of a command that waits: at most half of ``timeout``, or an answer that Redis only holds back would
        count as lost, and with it what it brings.
        """
        return max(1, math.ceil(min(wanted_ms, 500 * self.timeout)))

    async def __call__(self, *command: Any) -> Any:
        """One command, such as ``await connection("XLEN", key)``. Its first argument is a key, by which its node of a
        cluster is found; ``XREAD``, ``XREADGROUP`` and ``XGROUP`` have theirs further back.

        Raises:
            Unavailable: it could not be done, or it is not known whether it was; see its kinds above.
        """
        with _door():
            return await self._send(*command)

    async def script(self, source: str, keys: Sequence[str], args: Sequence[Arg]) -> Any:
        """Runs a Lua script; Redis keeps its text, so that it is sent once. Raises as a command does."""
        sha = self._shas.get(source) or self._shas.setdefault(
            source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()
        )
        if isinstance(self._client, RedisCluster):
            self._question = ("EXISTS", keys[0])
        with _door():
            try:
                return await self._send("EVALSHA", sha, len(keys), *keys, *args)
            except NoScriptError:
                return await self._send("EVAL", source, len(keys), *keys, *args)

    async def ensure_group(self, stream: str, group: str) -> None:
        """The consumer group is there, from the beginning of the stream on. Raises as a command does."""
        with _door():
            try:
                await self._send("XGROUP", "CREATE", stream, group, "0", "MKSTREAM")
            except ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise

    async def _send(self, *command: Any) -> Any:
        if self._listening is not None:
            raise TimeoutError
        asked = time.monotonic()
        task = asyncio.current_task()
        cancelled = task.cancelling() if task is not None else 0
        try:
            async with asyncio.timeout(self.timeout) as limit:
                self._waiting.add(limit)
                try:
                    async with self._room:
                        answer = await self._client.execute_command(*command)
                finally:
                    self._waiting.discard(limit)
        except (TimeoutError, RedisTimeoutError):  # ours, and redis-py's where there is no connection to be had
            if self._question and self.answered < asked and time.monotonic() - asked < self.timeout + LATE_S:
                self._fall_silent()
            raise
        self.answered = time.monotonic()
        if task is not None and task.cancelling() > cancelled:
            # redis-py writes to sentinels in asyncio.wait_for, which on Python 3.11 may swallow it: a loop that is
            # to end would go on for ever
            raise asyncio.CancelledError
        return answer

    def _fall_silent(self) -> None:
        if self._listening is None:
            self._listening = asyncio.create_task(self._listen())
        now = asyncio.get_running_loop().time()
        for limit in self._waiting:
            if not limit.expired():
                limit.reschedule(now)

    async def _listen(self) -> None:
        """Until it answers, or is gone, which commands find out by themselves."""
        try:
            while True:
                with suppress(TimeoutError, RedisTimeoutError):
                    async with asyncio.timeout(self.timeout):
                        await self._client.execute_command(*self._question)
                    self.answered = time.monotonic()
                    return
                if isinstance(self._client, RedisCluster):
                    await self._client.aclose()  # another node may have its slot by now: the next question finds out
                await asyncio.sleep(LISTEN_S)
        except (RedisError, OSError):
            pass
        finally:
            self._listening = None

    async def check(self) -> None:
        """Asks Redis who it is. One that is away is none of our business yet; one that would not do is.

        Raises:
            SetupError: it refuses us, or is too old.
        """
        try:
            with _door():
                async with asyncio.timeout(self.timeout):  # not by _send: any node of a cluster answers this
                    info = await self._client.execute_command("INFO")
        except Unavailable as error:
            cause = error.__cause__
            if cause is not None and isinstance(cause.__cause__ or cause.__context__, SSLCertVerificationError):
                raise SetupError(
                    "Redis is not to be trusted: its certificate is vouched for by nobody whom we know; name its "
                    f"authority with ?ssl_ca_certs=… in {self._name}"
                ) from error
            if isinstance(error, Refused):
                raise SetupError(
                    f"Redis refuses us: {cause}; look at the user and the password in {self._name}"
                ) from error
            return
        version = str(info.get("redis_version", "0"))
        if tuple(int(part) for part in version.split(".")[:2]) < (6, 2):
            raise SetupError(f"Redis {version} is too old: 6.2 or newer, or Valkey, is needed ({self._name})")
        if info.get("maxmemory_policy", "noeviction") != "noeviction":
            logs.event(
                LOG, "redis_may_evict", severity=logging.WARNING, policy=info["maxmemory_policy"], wanted="noeviction",
                redis=self._name,
            )  # fmt: skip

    async def close(self) -> None:
        """Closes the sockets."""
        if self._listening is not None:
            self._listening.cancel()
        for client in (self._client, *self._sentinels):
            await client.aclose()


@contextmanager
def _door() -> Iterator[None]:
    try:
        yield
    except (RedisError, OSError) as error:
        raise _unavailable(error) from error


def _unavailable(error: RedisError | OSError) -> Unavailable:
    """What a caller is told about an error of Redis: a 503. Addresses, passwords and texts stay out of it."""
    if isinstance(error, OutOfMemoryError) or "OOM" in str(error):
        return Full("Redis is full: it holds as much as its maxmemory allows", retry_after=RETRY_AFTER_S)
    if "NOGROUP" in str(error):
        return GroupLost("Redis has lost the queue's consumer group", retry_after=RETRY_AFTER_S)
    kind = type(error).__name__
    if _passes(error):
        return Unavailable(f"Redis can't be reached ({kind})", retry_after=RETRY_AFTER_S)
    return Refused(f"Redis refuses us ({kind})", retry_after=RETRY_AFTER_S)


def _passes(error: RedisError | OSError) -> bool:
    """Whether it may be otherwise later, without anybody changing us: Redis away, starting or failing over."""
    if isinstance(error, AuthenticationError | NoPermissionError):
        return False
    if isinstance(
        error, ConnectionError | RedisTimeoutError | ReadOnlyError | ClusterDownError | TryAgainError | OSError
    ):
        return True
    return any(word in str(error) for word in PASSING)


def _clients(url: str, timeout: float, name: str) -> tuple[Client, Sequence[Client]]:
    """The client of the Redis, and those of the sentinels that it asks where that is."""
    if url.partition("://")[0] not in SCHEMES:  # never a part of it in a message: it may be a password
        raise SetupError(
            f"the Redis URL begins otherwise than {', '.join(f'{scheme}://' for scheme in SCHEMES)} ({name})"
        )
    options: dict[str, Any] = {
        # ours is in Connection: redis-py's own swallows cancellations on Python 3.11 (asyncio.wait_for)
        "socket_timeout": None,
        "socket_connect_timeout": min(timeout, 2.0), "socket_keepalive": True, "protocol": 2,
        # once: an idle connection may have been cut
        "retry": Retry(NoBackoff(), 1, supported_errors=(ConnectionError,)),
    }  # fmt: skip
    if url.startswith("unix://"):
        del options["socket_keepalive"]
    try:
        if "+sentinel" in url.partition("://")[0]:
            return _behind_sentinels(url, options)
        if "+cluster" in url.partition("://")[0]:
            return _cluster(url.replace("+cluster", "", 1), options), ()
        client = Redis.from_url(url, **options)
        client.connection_pool.make_connection()  # type: ignore[no-untyped-call]  # an option that there is not is found here
        return cast(Client, client), ()
    except (TypeError, ValueError, RedisError):
        raise SetupError(
            "the Redis URL can't be used: it needs a form such as redis://user:password@host:6379/0, or "
            "redis+sentinel://host1:26379,host2:26379/mymaster/0; in a password, write / # ? @ : % as %2F %23 %3F %40 "
            f"%3A %25 ({name})"
        ) from None


def _behind_sentinels(url: str, options: dict[str, Any]) -> tuple[Client, Sequence[Client]]:
    parts = urlsplit(url)
    credentials, _, hosts = parts.netloc.rpartition("@")
    service, _, db = parts.path.strip("/").partition("/")
    if not hosts or not service:
        raise ValueError("it needs sentinels and the name of a service")
    user, _, password = credentials.partition(":")
    options |= {"username": unquote(user) or None, "password": unquote(password) or None, "db": int(db or 0)}
    own: dict[str, Any] = dict(parse_qsl(parts.query))  # ?username=…&password=… of the sentinels themselves
    ssl = {name: own.pop(name) for name in list(own) if name.startswith("ssl_")} | (
        {"ssl": True} if parts.scheme.startswith("rediss") else {}
    )
    if "ssl_check_hostname" in ssl:
        ssl["ssl_check_hostname"] = ssl["ssl_check_hostname"].lower() not in ("0", "false", "no")
    sentinel_kwargs = {**own, **ssl, "socket_connect_timeout": options["socket_connect_timeout"], "protocol": 2}
    open_manager: Callable[..., Any] = Sentinel  # redis-py leaves its constructor untyped
    addresses = [_address(one, 26379) for one in hosts.split(",")]
    manager = open_manager(addresses, sentinel_kwargs=sentinel_kwargs, **options, **ssl)
    return cast(Client, manager.master_for(service)), manager.sentinels


def _cluster(url: str, options: dict[str, Any]) -> Client:
    """redis-py's URLs have one host."""
    parts = urlsplit(url)
    credentials, at, hosts = parts.netloc.rpartition("@")
    first, *others = hosts.split(",")
    nodes = [ClusterNode(*_address(one, 6379)) for one in others]
    one = urlunsplit(parts._replace(netloc=credentials + at + first))
    return cast(Client, Cluster.from_url(one, startup_nodes=nodes, **options))


def _address(text: str, port: int) -> tuple[str, int]:
    """Of ``host``, ``host:port`` or ``[::1]:port``."""
    parts = urlsplit(f"//{text.strip()}")
    if not parts.hostname:
        raise ValueError("a host is missing")
    return parts.hostname, parts.port or port
