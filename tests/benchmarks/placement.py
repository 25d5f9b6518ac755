"""Where processes run while one caller is timed.

A client and a server that wait for each other take 13 µs per turn when the scheduler keeps them on
one core and 50 µs across two; it decides per connection and sticks to it. Unless that is the same
for the store and for Redis, it is all that a comparison shows. So both are measured.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psycopg

ONE_CORE, TWO_CORES, LINK = "one core", "two cores", "a link of 0.2 ms"


def placements() -> tuple[str, ...]:
    """Those that this machine has; an empty name where nothing can be placed (not Linux)."""
    if sys.platform != "linux":
        return ("",)
    return (ONE_CORE, TWO_CORES) if len(os.sched_getaffinity(0)) > 1 else (ONE_CORE,)


@contextlib.contextmanager
def placed(placement: str, pids: Iterable[int]) -> Iterator[None]:
    """Keep this process on the last core, and those on the same or on the first."""
    if sys.platform != "linux" or not placement:
        yield
        return
    servers, cores = list(pids), os.sched_getaffinity(0)
    _place([os.getpid()], {max(cores)})
    _place(servers, {min(cores) if placement == TWO_CORES else max(cores)})
    try:
        yield
    finally:
        _place([os.getpid(), *servers], cores)


def _place(pids: Iterable[int], cores: set[int]) -> None:
    assert sys.platform == "linux"
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended, or is not ours to place
            for thread in Path(f"/proc/{pid}/task").iterdir():
                os.sched_setaffinity(int(thread.name), cores)


def parents() -> dict[int, int]:
    """Who started each process; nothing where there is no /proc."""
    found: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            # The name before it, in brackets, may hold anything.
            parent = status.read_text("utf-8", "replace").rpartition(")")[2].split()[1]
            found[int(status.parent.name)] = int(parent)
    return found


def children() -> set[int]:
    """The processes that this one started."""
    return {pid for pid, parent in parents().items() if parent == os.getpid()}


def server_pids(dsn: str) -> list[int]:
    """The processes of a PostgreSQL on this machine; none where there is no /proc."""
    with psycopg.connect(dsn) as conn:
        found = parents()
        postmaster = found.get(conn.info.backend_pid)
    if postmaster is None:
        return []
    return [postmaster, *(pid for pid, parent in found.items() if parent == postmaster)]


@contextlib.contextmanager
def cpu_clock(pids: Iterable[int]) -> Iterator[Callable[[], float] | None]:
    """A clock of the seconds that those processes, and what they start, have run; None where the
    system has none. A store replaces its connections after a while, and so servers their processes.
    """
    with contextlib.ExitStack() as opened:
        last: dict[int, int] = {}  # of each file
        known: set[int] = set()

        def add(pid: int) -> None:
            known.add(pid)
            with contextlib.suppress(OSError):  # it has ended
                for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
                    file = os.open(path, os.O_RDONLY)
                    opened.callback(os.close, file)
                    last[file] = 0

        def clock() -> float:
            for pid in tuple(known):
                with contextlib.suppress(OSError):
                    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                        if int(child) not in known:
                            add(int(child))
            for file in last:
                with contextlib.suppress(OSError):  # what it has used stays
                    last[file] = int(os.pread(file, 64, 0).split()[0])
            return sum(last.values()) / 1e9

        for each in pids:
            add(each)
        yield clock if last else None
