"""Where processes run while one caller is timed.

A client and a server that wait for each other take 13 µs per turn when the scheduler keeps them on
one core and 50 µs across two; it decides per connection and sticks to it. Unless that is the same
for the store and for Redis, it is all that a comparison shows.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import psycopg

CAN_PLACE = sys.platform == "linux"


@contextlib.contextmanager
def on_one_core(pids: Iterable[int]) -> Iterator[None]:
    """Keep this process and those on one core, where that can be said (Linux)."""
    if sys.platform != "linux":
        yield
        return
    everybody = [os.getpid(), *pids]
    cores = os.sched_getaffinity(0)
    _place(everybody, {max(cores)})
    try:
        yield
    finally:
        _place(everybody, cores)


def _place(pids: Iterable[int], cores: set[int]) -> None:
    assert sys.platform == "linux"
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended, or is not ours to place
            for thread in Path(f"/proc/{pid}/task").iterdir():
                os.sched_setaffinity(int(thread.name), cores)


def server_pids(dsn: str) -> list[int]:
    """The processes of a PostgreSQL on this machine; none where there is no /proc."""
    parents: dict[int, int] = {}
    with psycopg.connect(dsn) as conn:
        for status in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has ended
                # The name before it, in brackets, may hold anything.
                parent = status.read_text("utf-8", "replace").rpartition(")")[2].split()[1]
                parents[int(status.parent.name)] = int(parent)
        postmaster = parents.get(conn.info.backend_pid)
    if postmaster is None:
        return []
    return [postmaster, *(pid for pid, parent in parents.items() if parent == postmaster)]
