"""What scenes work with (a store, threads, processes), and what they report."""

from __future__ import annotations

import contextlib
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
    """How much a demo does: entries of the data set at most, and seconds of a timed scene."""

    keys: int = 400_000
    seconds: float = 3.0


@dataclass(frozen=True, slots=True)
class Check:
    """A sentence about what was just done, and whether it holds."""

    text: str
    held: bool


@dataclass(frozen=True, slots=True)
class Report:
    """What a scene did and found."""

    said: list[str]
    checks: list[Check]


@dataclass(frozen=True, slots=True)
class Scene:
    """One part of the demo: its heading, a sentence about what is at stake, and what runs it."""

    title: str
    stake: str
    play: Callable[[Stage], Report]


@dataclass(slots=True)
class Stage:
    """A store on an empty table, and what scenes leave for later ones.

    Args:
        store: the store.
        settings: what another process needs to open it too: fields of `Config`, as JSON has them.
        size: how much to do.
        quiet: show no progress.
    """

    store: Store
    settings: dict[str, Any]
    size: Size
    quiet: bool
    data: dict[str, str] = field(default_factory=dict)

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

    def wait(self, what: str, seconds: float, is_over: Callable[[], bool] = lambda: True) -> None:
        """Show a progress bar for that long, and longer while it is not over."""
        until, latest = time.monotonic() + seconds, time.monotonic() + seconds + 30.0
        with self.bar(what, round(seconds * 10)) as advance:
            while time.monotonic() < until or (not is_over() and time.monotonic() < latest):
                time.sleep(0.1)
                advance(1)

    def workers(self, scene: str, size: int, **terms: Any) -> AbstractContextManager[WorkerGroup]:
        """Start processes that run `work` of that scene's module, until the block ends."""
        return running(scene, size, {"settings": self.settings, "terms": terms})

    def together(
        self, what: str, work: Callable[[int, Callable[[], bool]], None], *, seconds: float
    ) -> None:
        """Run ``work(number, go_on)`` in threads until the time is up.

        A worker looks at ``go_on()`` before each step. The first failure of a worker ends all of
        them and is raised here, as is Ctrl-C.
        """
        until = time.monotonic() + seconds
        stop = threading.Event()

        def go_on() -> bool:
            return not stop.is_set() and time.monotonic() < until

        with ThreadPoolExecutor(WORKERS) as pool, self.bar(what, round(seconds * 10)) as advance:
            futures = [pool.submit(work, number, go_on) for number in range(WORKERS)]
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
