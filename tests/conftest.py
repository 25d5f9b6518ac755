"""Fixtures of all tests: servers, a private schema per test, a movable clock, a store in both
variants.

Tests that ask for `server`, `dsn`, `clock`, `store` or `make_store` run once per PostgreSQL found
here (ids pg18, pg15, ...), on that of PGKV_TEST_POSTGRES only, or, with PGKV_TEST_DSN set, on the
server it names (its role needs CREATE on the database). Fault tests ask for `make_server` and get a
server that they may break.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import re
import secrets
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import hypothesis
import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

import pgkv
from pgkv import _observe
from pgkv.testing import ServerClock
from tests import FULL, servers
from tests.servers import Server, UserServer
from tests.variants import Variant, available, closing_all

# A loaded machine may take any time for one example, and for making one.
hypothesis.settings.register_profile(
    "tests", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("tests")
BY_SHELLS = ("SIGINT", "SIGQUIT", "SIGHUP")  # what a background job or nohup ignores
# What takes longest begins first, a file in each process: nothing of it is left when all else is done.
LONG = (
    *("test_soak.py", "test_documentation.py", "test_suites.py", "test_command_line.py"),
    *("test_wheel.py", "test_queue_storms.py", "test_demo.py", "test_types.py"),
)
# The newest, which the test extra brings in a wheel, and an old one from the system, where found.
WANTED = (18, 15)


def pytest_configure() -> None:
    """A shell that starts the tests in the background lets them ignore Ctrl-C, and nohup a hang-up;
    every process of theirs would inherit that: tests of signals need the defaults.
    """
    if os.name == "posix":
        servers.share_templates()
    for name in BY_SHELLS:
        number = getattr(signal, name, None)  # Windows has few
        if number is not None and signal.getsignal(number) is signal.SIG_IGN:
            default = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
            signal.signal(number, default)


def pytest_unconfigure() -> None:
    servers.remove_base_directory()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sync and async run the same flows and the same SQL. On the newest server each test runs in both; where it has
    three or more cells besides, each cell runs in one of them, by turns. On an older server, and through a pooler,
    each test runs in one of them, half of the tests in each: what is different there shows in either;
    likewise with two poolers. An older server gets one test in four, and every other one of the patterns with the
    most unusual SQL, and a third server only these; embedded, one cell of each test. PGKV_TESTS=full runs all.
    """
    if not FULL:
        _choose(config, items)
    _arrange(items)


def _choose(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what tests again what is alike."""
    others = [*servers.installed()][1:]  # than the newest
    alike: dict[str, list[pytest.Item]] = {}
    cells: dict[str, dict[str, list[pytest.Item]]] = {}
    left_out: set[pytest.Item] = set()
    embedded: set[tuple[int, str]] = set()
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        server, file = params.get("server"), item.path.name
        binaries, test = params.get("binaries"), item.nodeid.partition("[")[0]
        if binaries is not None and binaries.major in others:
            if (binaries.major, test) in embedded:
                left_out.add(item)
            embedded.add((binaries.major, test))
        name = re.sub(r"\b(a?sync|older|newer)\b", "", item.nodeid)
        dice = crc32(name.encode()) >> 16
        if server in others and dice % (2 if _is_unusual(file) else 4):
            left_out.add(item)
        elif "variant" not in params:
            continue
        elif server in others or file == "test_poolers.py":
            alike.setdefault(name, []).append(item)
        else:
            cells.setdefault(test, {}).setdefault(name, []).append(item)
    for name, each in alike.items():
        left_out |= set(each) - {each[crc32(name.encode()) % len(each)]}
    for each_test in cells.values():
        if len(each_test) >= 3:
            for number, each in enumerate(each_test.values()):
                left_out |= set(each) - {each[number % len(each)]}
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))


def _arrange(items: list[pytest.Item]) -> None:
    """Each process gets an equal part to begin with: the longest files go to the heads of these parts."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    heads: list[list[pytest.Item]] = [[] for _ in range(processes)]
    rest: list[pytest.Item] = []
    for item in items:
        name = item.path.name
        (heads[LONG.index(name) % processes] if name in LONG else rest).append(item)
    left = len(items)
    items.clear()
    for number, head in enumerate(heads):
        head.sort(key=lambda item: LONG.index(item.path.name))
        size = left // (processes - number)
        left -= size
        others = max(0, size - len(head))
        items += [*head, *rest[:others]]
        del rest[:others]
    items += rest


def _is_unusual(file: str) -> bool:
    return file.startswith(("test_idempotency", "test_queue"))


def pytest_collectstart() -> None:
    """Until all is collected nothing of it is garbage."""
    gc.disable()


def pytest_collection_finish() -> None:
    """A gc.collect() in a test does not go through the thousands of tests that were collected."""
    gc.collect()
    gc.freeze()
    gc.enable()


_seconds: defaultdict[str, float] = defaultdict(float)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up for the summary."""
    _seconds["/".join(report.nodeid.split("/")[:2])] += report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How long the tests of each folder took, waiting included."""
    terminalreporter.section("seconds by folder")
    for folder, seconds in sorted(_seconds.items(), key=lambda each: -each[1]):
        terminalreporter.line(f"{seconds:8.1f}  {folder}")


def _server_params() -> list[Any]:
    if os.environ.get("PGKV_TEST_DSN"):
        return [pytest.param("dsn", id="dsn")]
    if os.name != "posix":
        return [
            pytest.param(
                "dsn",
                id="dsn",
                marks=pytest.mark.skip("set PGKV_TEST_DSN: no embedded server here"),
            )
        ]
    params = [pytest.param(major, id=f"pg{major}") for major in servers.installed() if major >= 14]
    for major in WANTED:
        if major not in servers.installed() and not servers.ONLY:
            reason = f"no PostgreSQL {major} here (18: the extra `embedded`; others: the system's)"
            params.append(pytest.param(major, id=f"pg{major}", marks=pytest.mark.skip(reason)))
    return params


@pytest.fixture(autouse=True)
def _every_warning() -> None:
    """What earlier tests logged does not count towards the warnings that are logged in a while."""
    _observe._windows.clear()


@pytest.fixture(autouse=True)
def _nothing_by_chance(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a server nothing comes by chance after one operation in 256, the removal of old rows: it uses a
    connection of its own, and may come before the test has looked at them.
    """
    with pytest.MonkeyPatch.context() as patched:
        if "server" in request.fixturenames:
            for module in (
                "_engine._sync.channel.SWEEP",
                "_engine._async.channel.SWEEP",
                "patterns.lock.flows.CLEAN",
            ):
                patched.setattr(f"pgkv.{module}_CHANCE", 0.0)
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests run on each server, those of sharded stores on the newest, and on a third one those with the most
    unusual SQL. What is left out here costs nothing: each process makes all the tests that there are.
    """
    marked = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "server" not in metafunc.fixturenames or "server" in marked:
        return
    file = metafunc.module.__name__.rpartition(".")[2]
    most = None if FULL or _is_unusual(file) else 1 if file.startswith("test_sharded") else 2
    left_out = [*servers.installed()][most:] if most else []
    params = [each for each in _server_params() if each.values[0] not in left_out]
    metafunc.parametrize("server", params, indirect=True, scope="session")


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Iterator[Server | UserServer]:
    """The server of the test, shared with all others: to be used, not broken. Each version starts
    once.
    """
    if request.param == "dsn":
        yield UserServer(os.environ["PGKV_TEST_DSN"])
        return
    shared = Server(servers.installed()[request.param])
    yield shared
    shared.remove()


@pytest.fixture
def make_server(server: Server | UserServer) -> Iterator[Callable[..., Server]]:
    """make_server(durable=False, settings={}) starts a server of the test's own, of the same
    version as `server`.
    """
    if isinstance(server, UserServer):
        pytest.skip("this test stops and kills servers: not the one of PGKV_TEST_DSN")
    made: list[Server] = []

    def make(**options: Any) -> Server:
        made.append(Server(server.binaries, **options))
        return made[-1]

    yield make
    for each in made:
        each.remove()


@pytest.fixture(scope="session")
def _admin(server: Server | UserServer) -> Iterator[psycopg.Connection]:
    with psycopg.connect(server.dsn, autocommit=True, application_name="tests") as conn:
        yield conn


@dataclass(frozen=True, slots=True)
class _Sandbox:
    dsn: str
    clock: ServerClock | None


@pytest.fixture
def _sandbox(
    request: pytest.FixtureRequest, server: Server | UserServer, _admin: psycopg.Connection
) -> Iterator[_Sandbox]:
    schema = f"t_{secrets.token_hex(6)}"
    name = sql.Identifier(schema)
    before = set(_clients(_admin, server, schema))
    _admin.execute(sql.SQL("CREATE SCHEMA {}").format(name))
    # The clock's functions must be there before the first table and the first prepared statement:
    # not left to the order in which a test happens to name its fixtures.
    clock = ServerClock(server.dsn, schema=schema) if "clock" in request.fixturenames else None
    options = (
        f"{conninfo_to_dict(server.dsn).get('options') or ''} -c search_path={schema},pg_catalog"
    )
    yield _Sandbox(
        make_conninfo(server.dsn, options=options.strip(), application_name=schema), clock
    )
    if clock is not None:
        clock.close()
    leaked: dict[int, str] = {}

    def all_gone() -> bool:
        leaked.clear()
        leaked.update(
            {
                pid: text
                for pid, text in _clients(_admin, server, schema).items()
                if pid not in before
            }
        )
        return not leaked

    try:
        servers.wait_until(all_gone, "connections end", seconds=120)
    except TimeoutError:
        for pid in leaked:
            _admin.execute("SELECT pg_terminate_backend(%s)", [pid])
        pytest.fail("the test left connections open: " + "; ".join(leaked.values()))
    finally:
        _admin.execute(sql.SQL("DROP SCHEMA {} CASCADE").format(name))


def _clients(admin: psycopg.Connection, server: Server | UserServer, schema: str) -> dict[int, str]:
    """Connections that may be a test's. Stores may name themselves; only a server with other users
    goes by the name.
    """
    rows = admin.execute(
        "SELECT pid, application_name, state, left(query, 200) FROM pg_stat_activity"
        " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        " AND (%s OR application_name = %s)",
        [server.is_ours, schema],
    )
    return {pid: f"{name or 'unnamed'} ({state}): {query}" for pid, name, state, query in rows}


@pytest.fixture
def dsn(_sandbox: _Sandbox) -> str:
    """A conninfo whose connections work in a schema of the test's own; afterwards none of them may
    be left.
    """
    return _sandbox.dsn


@pytest.fixture
def clock(_sandbox: _Sandbox) -> ServerClock:
    """The server's clock as connections of `dsn` see it: clock.advance(seconds),
    clock.set_offset(seconds).
    """
    assert _sandbox.clock is not None, "ask for `clock` by name, not through getfixturevalue"
    return _sandbox.clock


@pytest.fixture(params=available())
def variant(request: pytest.FixtureRequest) -> Variant:
    """The blocking and the asynchronous variant, used alike: see tests/variants.py."""
    return Variant(request.param)


@pytest.fixture
def make_store(
    dsn: str, variant: Variant, event_loop_runner: asyncio.Runner
) -> Iterator[Callable[..., Coroutine[Any, Any, Any]]]:
    """`await make_store(table_name=...)` connects a store, closed after the test; used as an
    AsyncStore.
    """
    with closing_all(event_loop_runner) as made:

        async def make(**config: Any) -> Any:
            config.setdefault("pool_timeout", 60)  # a busy machine is no full pool
            made.append(await variant.connect(config.pop("dsn", dsn), **config))
            return made[-1]

        yield make


@pytest.fixture
def store(
    make_store: Callable[..., Coroutine[Any, Any, Any]], event_loop_runner: asyncio.Runner
) -> Any:
    """A store with the default settings, but for a patient pool; used as an AsyncStore."""
    return event_loop_runner.run(make_store())


@pytest.fixture
def patience() -> Iterator[None]:
    """What ends early in a program has time enough on a loaded machine: the statement of a wait that is nearly
    over, what takes back a call that was interrupted, and the trial of a connection that listens.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("pgkv.patterns.lock.flows.ANSWER_TIME", 20.0)
        patched.setattr("pgkv.patterns.lock.flows.CLEAN_UP_TIME", 30.0)
        patched.setattr("pgkv._background.listener.TRIAL_TIME", 30.0)
        patched.setattr("pgkv._watch.source.LISTEN_TIME", 30.0)
        for pattern in ("lock", "queue", "idempotency"):
            patched.setattr(f"pgkv.patterns.{pattern}.flows.CLEAN_UP", (30.0, 60.0))
        yield


@pytest.fixture
def operations() -> Iterator[list[tuple[str, str, int]]]:
    """Every operation of every store during the test: name, outcome, retries."""
    seen: list[tuple[str, str, int]] = []
    remove = pgkv.on_operation(
        lambda name, _seconds, outcome, retries: seen.append((name, outcome, retries))
    )
    yield seen
    remove()


# --- `async def` tests ----------------------------------------------------------------------------


# Windows' usual loop cannot wait for the sockets of libpq.
LOOP = asyncio.SelectorEventLoop if sys.platform == "win32" else None


def _run(test: Coroutine[Any, Any, Any]) -> Any:
    with asyncio.Runner(loop_factory=LOOP) as runner:
        return runner.run(test)


@pytest.fixture
def event_loop_runner() -> Iterator[asyncio.Runner]:
    """The loop that the test and its fixtures share."""
    with asyncio.Runner(loop_factory=LOOP) as runner:
        yield runner


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run `async def` tests, those under hypothesis' @given included, on the loop of their
    fixtures.
    """
    runner = pyfuncitem.funcargs.get("event_loop_runner")
    run = runner.run if isinstance(runner, asyncio.Runner) else _run
    test = pyfuncitem.obj
    if hypothesis := getattr(test, "hypothesis", None):
        # Kept aside: with other parameters the same function comes again.
        inner = hypothesis.async_test = getattr(hypothesis, "async_test", hypothesis.inner_test)
        if inspect.iscoroutinefunction(inner):
            hypothesis.inner_test = lambda *args, **kwargs: run(inner(*args, **kwargs))
        return None
    if not inspect.iscoroutinefunction(test):
        return None
    run(test(**{name: pyfuncitem.funcargs[name] for name in inspect.signature(test).parameters}))
    return True
