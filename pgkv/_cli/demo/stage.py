"""What scenes work with, a store, threads and processes; and the reports that they return."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
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
        started = time.monotonic()
        stop = threading.Event()

        def go_on() -> bool:
            return not stop.is_set() and time.monotonic() < started + seconds

        with ThreadPoolExecutor(workers) as pool, self.bar(what, round(seconds * 10)) as advance:
            futures = [pool.submit(work, number, go_on) for number in range(workers)]
            try:
                while True:
                    done, rest = wait(futures, timeout=0.05, return_when=FIRST_EXCEPTION)
                    if not rest or any(each.exception() for each in done):
                        break
                    advance(0.5)
            finally:
                stop.set()
        for future in futures:
            future.result()
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
