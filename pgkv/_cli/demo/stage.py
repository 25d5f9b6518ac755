"""What scenes work with, a store, threads and processes; and the reports that they return."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from ...store import Store
from .. import console
from .workers import WorkerGroup, running

WORKERS = 8


@dataclass(frozen=True, slots=True)
class Size:
    """How much a demo does.

    Args:
        keys: entries of the data set, at most.
        seconds: about how long a timed scene runs.
    """

    keys: int = 400_000
    seconds: float = 3.0


@dataclass(frozen=True, slots=True)
class Check:
    """A sentence about what was just done, and whether it holds."""

    text: str
    held: bool


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast an operation was: calls per second by that many callers, and seconds of one call."""

    operation: str
    callers: int
    per_second: float
    median: float
    p99: float


@dataclass(frozen=True, slots=True)
class Report:
    """What a scene did and found."""

    said: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    rates: list[Speed] = field(default_factory=list)


@dataclass(slots=True)
class Stage:
    """A store on an empty table, and what scenes leave for later ones.

    Args:
        store: the store.
        settings: what another process needs to open it too: fields of `Config`, as JSON has them.
        size: how much to do.
        server_version: as people read it.
        is_own: whether the server was made for this.
        quiet: show no progress.
    """

    store: Store
    settings: dict[str, Any]
    size: Size
    server_version: str
    is_own: bool
    quiet: bool
    data: dict[str, str] = field(default_factory=dict)

    @property
    def cores(self) -> int:
        """Processor cores this process may use."""
        affinity = getattr(os, "sched_getaffinity", None)
        return len(affinity(0)) if affinity else os.cpu_count() or 1

    def clock(self) -> datetime:
        """Return the server's clock at some time during this call."""
        self.store.set("demo:clock", b"")
        entry = self.store.get_entry("demo:clock")
        assert entry is not None
        return entry.updated_at

    @contextlib.contextmanager
    def bar(self, what: str, total: float) -> Iterator[Callable[[float], None]]:
        """Show a progress bar; give a function that advances it."""
        with console.progress(quiet=self.quiet) as progress:
            task = progress.add_task(what, total=total)
            yield lambda step: progress.advance(task, step)

    def workers(self, part: str, size: int, **terms: Any) -> AbstractContextManager[WorkerGroup]:
        """Start processes that run `work` of that scene's module, until the block ends."""
        return running(part, size, {"settings": self.settings, "terms": terms})

    def together(
        self,
        what: str,
        work: Callable[[int, Callable[[], bool]], None],
        *,
        seconds: float,
        workers: int = WORKERS,
    ) -> float:
        """Run ``work(number, go_on)`` in that many threads until the time is up.

        A worker looks at ``go_on()`` before each step. Returns the seconds it took. The first
        failure of a worker ends all of them and is raised here, as is Ctrl-C.
        """
        until = time.monotonic() + seconds
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
            with self.bar(what, round(seconds * 10)) as advance:
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


@dataclass(frozen=True, slots=True)
class Scene:
    """One part of the demo.

    Args:
        title: its heading.
        stake: a sentence about what is at stake.
        play: runs it.
    """

    title: str
    stake: str
    play: Callable[[Stage], Report]


def rate(
    operation: str, callers: int, latencies: list[float], seconds: float | None = None
) -> Speed:
    """Sum up what callers measured: seconds of each call, and from the first call to the last
    (None: one caller, whose calls add up to it)."""
    ordered = sorted(latencies) or [0.0]
    return Speed(
        operation,
        callers,
        len(latencies) / (sum(ordered) if seconds is None else seconds),
        ordered[len(ordered) // 2],
        ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)],
    )
