"""Storms: processes that work until they are killed, and what kills, pauses and cuts them off.

A worker is a module that is run as a process; it works with `work_until_killed`, or ends in `wait_to_be_killed`.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import psycopg
import pytest

import pgkv
from tests.servers import wait_until

ROOT = Path(__file__).resolve().parents[1]
WORKERS = 4
STORM_SECONDS = 400.0  # at most; it ends when enough was done
# What a fault may make of a piece of work, and what work raises that fails by itself.
EXPECTED = (pgkv.PgkvError, psycopg.Error, ZeroDivisionError)

Start = Callable[..., "subprocess.Popen[str]"]
Work = Callable[[psycopg.Connection, pgkv.Store, random.Random], None]


# -- in the worker


def work_until_killed(dsn: str, seed: str, work: Work) -> NoReturn:
    """Do it again and again, with a new connection after each failure."""
    rng = random.Random(int(seed))
    with pgkv.Store.connect(dsn) as store:
        print("begins", flush=True)
        while True:
            with contextlib.suppress(*EXPECTED), psycopg.connect(dsn) as conn:
                while True:
                    work(conn, store, rng)


def pause(seconds: float) -> None:
    """Stop the whole process for that long, as no thread of it could."""
    # The shell stops it too: were it stopped only after that time, nothing would let it go on.
    me = os.getpid()
    subprocess.run(["sh", "-c", f"kill -STOP {me}; sleep {seconds}; kill -CONT {me}"], check=False)


def wait_to_be_killed() -> None:
    """Say that it is done, and hold everything."""
    print("done", flush=True)
    sys.stdin.read()


# -- in the test


def starting(module: str) -> Any:
    """A fixture: `start("storm", dsn, 1)` runs that module as a process; none outlives the test."""

    @pytest.fixture
    def start() -> Iterator[Start]:
        made: list[subprocess.Popen[str]] = []

        def begin(*args: object) -> subprocess.Popen[str]:
            command = [sys.executable, "-m", module, *map(str, args)]
            pipe = subprocess.PIPE
            made.append(subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True))
            return made[-1]

        yield begin
        for each in made:
            each.kill()
            each.communicate()

    return start


def kill_when_done(worker: subprocess.Popen[str]) -> None:
    """Kill a worker that waits for it."""
    assert worker.stdout is not None
    assert worker.stdout.readline() == "done\n"
    worker.kill()
    worker.wait()


def count(conn: psycopg.Connection, query: str) -> int:
    """The only number of a query."""
    row = conn.execute(query.encode()).fetchone()
    assert row is not None
    return int(row[0])


class Storm:
    """Workers of which some are killed, paused past their leases, or cut off.

    Args:
        start: starts a worker; called with "storm", the arguments, and a seed.
        args: of each worker.
        conn: sees every connection.
        fates: of which each strike is one: kill, pause, cut.
        lease: seconds; a pause is longer.
    """

    def __init__(
        self,
        start: Start,
        args: tuple[str, ...],
        conn: psycopg.Connection,
        fates: str,
        lease: float,
    ) -> None:
        self.kills = 0
        self._start, self._args, self._conn = start, args, conn
        self._fates, self._lease = fates.split(), lease
        self._rng, self._seeds = random.Random(17), iter(range(100_000))
        self._begun: set[int] = set()
        self._workers = [self._begin() for _ in range(WORKERS)]
        self._until = time.monotonic() + STORM_SECONDS

    def _begin(self) -> subprocess.Popen[str]:
        return self._start("storm", *self._args, next(self._seeds))

    def strike(self) -> None:
        """Let all of them work for a moment, then harm one."""
        assert time.monotonic() < self._until, "the storm makes no progress"
        for worker in self._workers:
            if worker.pid not in self._begun:
                assert worker.stdout is not None
                assert worker.stdout.readline() == "begins\n"
                self._begun.add(worker.pid)
        time.sleep(self._rng.uniform(0.1, 0.4))
        fate, number = self._rng.choice(self._fates), self._rng.randrange(WORKERS)
        if fate == "cut":
            self._conn.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
                " AND backend_type = 'client backend' AND query ~ 'effects|kv_store_'"
                " ORDER BY random() LIMIT 1"
            )
        elif fate == "pause":
            worker = self._workers[number]
            worker.send_signal(signal.SIGSTOP)
            time.sleep(self._lease * 1.2)
            worker.send_signal(signal.SIGCONT)
        else:
            self._workers[number].kill()
            self.kills += 1
            self._workers[number] = self._begin()

    def wait_for_paused(self) -> None:
        """Wait until none is stopped, and what it does then is done."""
        pids = ",".join(str(worker.pid) for worker in self._workers)
        ask = ["ps", "-o", "state=", "-p", pids]

        def none_is_stopped() -> bool:
            return b"T" not in subprocess.run(ask, stdout=subprocess.PIPE, check=False).stdout

        wait_until(none_is_stopped, "all go on")
        time.sleep(0.3)

    def end(self) -> None:
        """Kill them, and wait until their transactions have ended."""
        for worker in self._workers:
            worker.kill()
            worker.wait()
        busy = "SELECT count(*) FROM pg_stat_activity WHERE state <> 'idle'"
        wait_until(lambda: count(self._conn, busy) == 1, "their transactions end")
