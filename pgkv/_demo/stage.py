"""What scenes work with: a store, workers, a stopwatch, and the reports they return."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import psycopg

from .. import _conninfo, embedded
from .. import _console as console
from .._op import Op, Statement
from .._sql.table import read_nothing
from ..config import EMBEDDED_SCHEME, Config, TtlCleanupStrategy
from ..errors import StoreUnavailableError
from ..store import Store

WORKERS = 8


@dataclass(frozen=True, slots=True)
class Size:
    """How much a demo does.

    Args:
        keys: entries of the data set, at most.
        seconds: how long each timed scene runs.
    """

    keys: int = 400_000
    seconds: float = 3.0


@dataclass(frozen=True, slots=True)
class Check:
    """A sentence about what was just done, and whether it holds."""

    text: str
    held: bool


@dataclass(frozen=True, slots=True)
class Rate:
    """How fast an operation was: calls per second, and seconds for one."""

    operation: str
    workers: int
    per_second: float
    median: float
    p99: float


@dataclass(frozen=True, slots=True)
class Report:
    """What a scene did and saw."""

    title: str
    said: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    rates: list[Rate] = field(default_factory=list)


@dataclass(slots=True)
class Stage:
    """A store on an empty table, and what the scenes leave for each other."""

    store: Store
    size: Size
    server_version: str
    quiet: bool
    data: dict[str, str] = field(default_factory=dict)

    @property
    def cores(self) -> int:
        """Processor cores this process may use."""
        affinity = getattr(os, "sched_getaffinity", None)
        return len(affinity(0)) if affinity else os.cpu_count() or 1

    @contextlib.contextmanager
    def bar(self, what: str, total: float) -> Iterator[Callable[[float], None]]:
        """Show a progress bar; give a function that advances it."""
        with console.progress(quiet=self.quiet) as progress:
            task = progress.add_task(what, total=total)
            yield lambda step: progress.advance(task, step)

    def together(
        self, what: str, work: Callable[[int, Callable[[], bool]], None], workers: int = WORKERS
    ) -> float:
        """Run ``work(number, go_on)`` in that many threads until the time is up.

        A worker looks at ``go_on()`` before each step. Returns the seconds it took. The first
        failure of a worker ends all of them and is raised here, as is Ctrl-C.
        """
        until = time.monotonic() + self.size.seconds
        stop = threading.Event()
        failures: list[BaseException] = []

        def go_on() -> bool:
            return not stop.is_set() and time.monotonic() < until

        def guarded(number: int) -> None:
            try:
                work(number, go_on)
            except BaseException as error:  # noqa: BLE001  # raised by the thread that waits
                failures.append(error)
                stop.set()

        threads = [
            threading.Thread(target=guarded, args=(number,), daemon=True)
            for number in range(workers)
        ]
        started = time.monotonic()
        try:
            with self.bar(what, round(self.size.seconds * 10)) as advance:
                for thread in threads:
                    thread.start()
                shown = started
                while any(thread.is_alive() for thread in threads):
                    time.sleep(0.05)
                    now = time.monotonic()
                    advance(10 * (now - shown))
                    shown = now
        finally:
            stop.set()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
        if failures:
            raise failures[0]
        return time.monotonic() - started


def rate(operation: str, workers: int, latencies: list[float], seconds: float) -> Rate:
    """Sum up what workers measured."""
    ordered = sorted(latencies) or [0.0]
    return Rate(
        operation,
        workers,
        len(latencies) / seconds,
        ordered[len(ordered) // 2],
        ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)],
    )


@contextlib.contextmanager
def open_stage(
    dsn: str | None, options: dict[str, Any], size: Size, *, quiet: bool
) -> Iterator[Stage]:
    """Make a table of the demo's own, on a server of its own where no DSN is given.

    Both are gone afterwards, whatever happened, but for a SIGKILL.
    """
    with contextlib.ExitStack() as cleanup:
        cleanup.enter_context(_terminated_as_interrupted())
        if dsn is None or dsn.startswith(EMBEDDED_SCHEME):
            server = cleanup.enter_context(
                _temporary_server() if dsn is None else embedded.start(embedded.parse(dsn))
            )
            dsn = server.dsn
        config = Config(
            dsn,
            table_name=f"pgkv_demo_{secrets.token_hex(4)}",
            application_name="pgkv demo",
            pool_max_size=WORKERS + 2,
            # Scenes say themselves when expired rows are collected, and count them.
            ttl_cleanup_strategy=TtlCleanupStrategy.MANUAL,
            **options,
        )
        store = cleanup.enter_context(Store(config))
        store.create_table()
        cleanup.callback(_drop, store)
        yield Stage(store, size, _server_version(config), quiet)


@contextlib.contextmanager
def _temporary_server() -> Iterator[embedded.EmbeddedServer]:
    path = tempfile.mkdtemp(prefix="pgkv-demo-")
    try:
        with embedded.start(path) as server:
            yield server
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the demo as Ctrl-C does, so that it cleans up."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        names = []
    before = [(name, signal.signal(getattr(signal, name), interrupt)) for name in names]
    try:
        yield
    finally:
        for name, handler in before:
            signal.signal(getattr(signal, name), handler)


def _drop(store: Store) -> None:
    table = store._config.table.quoted
    drop = Statement(
        "drop", f"DROP TABLE IF EXISTS {table}", (), read_nothing, script=True, writes=False
    )
    store._execute(Op(drop))


def _server_version(config: Config) -> str:
    try:
        with psycopg.connect(_conninfo.build(config, config.dsn)) as conn:
            number = conn.info.server_version
    except psycopg.Error as error:
        raise StoreUnavailableError(f"demo: {error}") from error
    return f"{number // 10_000}.{number % 10_000}"
