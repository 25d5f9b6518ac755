"""A scene, and what it works with: a store, threads, processes."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from ...store import Store
from .. import console
from .workers import WorkerGroup, running

WORKERS = 8


class Size(NamedTuple):
    """How much a demo does: entries of the data set at most, and seconds of a timed scene."""

    keys: int = 400_000
    seconds: float = 3.0


class Check(NamedTuple):
    """A sentence about what was just done, and whether it holds."""

    text: str
    held: bool


Play: TypeAlias = "Callable[[Stage], Iterator[str | Check]]"


class Scene(NamedTuple):
    """One part of the demo: its heading, what is at stake, and what yields its lines and checks."""

    title: str
    stake: str
    play: Play


def scene(title: str, stake: str) -> Callable[[Play], Scene]:
    """Make a scene of the decorated function."""
    return lambda play: Scene(title, stake, play)


@dataclass(slots=True)
class Stage:
    """A store on an empty table, and what scenes leave for later ones."""

    store: Store
    settings: dict[str, Any]  # for other processes: fields of `Config`, as JSON has them
    size: Size
    quiet: bool  # show no progress
    data: dict[str, str] = field(default_factory=dict)

    @contextlib.contextmanager
    def bar(self, what: str, total: float) -> Iterator[Callable[[float], None]]:
        """Show a progress bar; give a function that advances it. It is full at the end."""
        with console.progress(quiet=self.quiet) as progress:
            task = progress.add_task(what, total=total)
            yield lambda step: progress.advance(task, step)
            progress.update(task, completed=total)

    def wait(self, what: str, seconds: float, is_over: Callable[[], bool] = lambda: True) -> None:
        """Show a progress bar for that long, and longer while it is not over."""
        until, latest = time.monotonic() + seconds, time.monotonic() + seconds + 30.0
        with self.bar(what, round(seconds * 10)) as advance:
            while time.monotonic() < until or (not is_over() and time.monotonic() < latest):
                time.sleep(0.1)
                advance(1)

    def workers(
        self, work: Callable[..., None], size: int, **terms: Any
    ) -> AbstractContextManager[WorkerGroup]:
        """Start processes that run ``work(store, orders, **terms)``, until the block ends."""
        name = f"{work.__module__}:{work.__name__}"
        return running(name, size, {"settings": self.settings, "terms": terms})

    def together(self, what: str, step: Callable[[int], object], seconds: float) -> int:
        """Call `step` with growing numbers from all threads until the time is up; return how often.

        The first failure ends all of them and is raised here, as is Ctrl-C.
        """
        until, stop = time.monotonic() + seconds, threading.Event()

        def work(number: int) -> int:
            calls = 0
            while not stop.is_set() and time.monotonic() < until:
                step(number + calls)
                calls += 1
            return calls

        with ThreadPoolExecutor(WORKERS) as pool, self.bar(what, round(seconds * 10)) as advance:
            started = rest = {pool.submit(work, number) for number in range(WORKERS)}
            try:
                while rest:
                    done, rest = wait(rest, timeout=0.05, return_when=FIRST_EXCEPTION)
                    [future.result() for future in done]
                    advance(0.5)
            finally:
                stop.set()
        return sum(future.result() for future in started)
