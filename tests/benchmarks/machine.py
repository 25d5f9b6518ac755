"""What the machine itself costs, which decides how a ratio comes out.

A statement waits for another process, so its time holds system calls, switches between processes and
code that runs with cold caches. Where these are dear, a client with more of them looks worse.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import pgkv
from tests.benchmarks.case import KEYS, statements
from tests.benchmarks.placement import placed, placements
from tests.benchmarks.raw import Raw
from tests.benchmarks.services import Services

SYSTEM_CALL, COLD_FACTOR, PRESSURE = "system call", "cold factor", "pressure"
DISTURBED = 5.0  # percent of the time that a process waited for a processor while the bench slept
PSI, PSI_SECONDS = Path("/proc/pressure/cpu"), 2.1  # the kernel adds up every two seconds
TURNS, TRIES = 200, 60


def costs(running: Services) -> dict[str, float]:
    """Microseconds of a system call and of a message to another process and back, at each placement;
    and how many times its time code takes after an answer."""
    found = {SYSTEM_CALL: _least(os.getppid) - _least(int)}
    for placement in placements():
        if placement:
            found[f"ping-pong, {placement}"] = _ping_pong(placement)
    found[COLD_FACTOR] = _cold_factor(running.dsn)
    return found


def pressure() -> float:
    """Percent of a moment in which this process sleeps and another one waits for a processor."""
    if not PSI.exists():
        return 0.0
    before = _waited()
    time.sleep(PSI_SECONDS)
    return (_waited() - before) / PSI_SECONDS / 1e4


def _waited() -> int:
    return int(PSI.read_text("ascii").split("total=")[1].split()[0])


def _least(call: Callable[[], object]) -> float:
    """Microseconds of a call, at the best of some tries."""
    best = float("inf")
    for _ in range(TRIES):
        started = perf_counter()
        for _ in range(TURNS):
            call()
        best = min(best, perf_counter() - started)
    return 1e6 * best / TURNS


def _ping_pong(placement: str) -> float:
    ours, theirs = socket.socketpair()
    other = multiprocessing.get_context("fork").Process(target=_echo, args=(ours, theirs))
    other.start()
    theirs.close()
    assert other.pid is not None

    def turn() -> None:
        ours.send(b"x")
        ours.recv(1)

    try:
        with placed(placement, [other.pid]):
            return _least(turn)
    finally:
        ours.close()
        other.join()


def _echo(ours: socket.socket, theirs: socket.socket) -> None:
    ours.close()
    while part := theirs.recv(1):
        theirs.send(part)


def _cold_factor(dsn: str) -> float:
    """The time in which an operation is made after an answer, divided by that in a loop."""
    with pgkv.Store.connect(dsn) as store, Raw(dsn) as raw:
        store.set(KEYS[0], b"")
        sql = statements(store)
        ask = raw.sender(sql.get(KEYS[0]))

        def after(wait: Callable[[], object]) -> float:
            taken = []
            for _ in range(TURNS * 10):
                wait()
                started = perf_counter()
                sql.increment(KEYS[0])
                taken.append(perf_counter() - started)
            return sorted(taken)[len(taken) // 2]

        params = sql.get(KEYS[0]).params
        return after(lambda: ask(params)) / after(int)
