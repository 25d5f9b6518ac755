"""A process that uses locks, for tests that stop and kill it: ``python -m tests.faults.lock_worker``."""

from __future__ import annotations

import fcntl
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psycopg

import pgkv
from tests.faults.lock_history import Event, line


def say(*words: object) -> None:
    print(*words, flush=True)


def storm(dsn: str, path: str, seed: str, seconds: str) -> None:
    """Random acquire, extend, release and forgetting on three locks; every call is recorded."""
    rng = random.Random(int(seed))
    process = os.getpid()
    end, grants = time.monotonic() + float(seconds), 0
    with pgkv.Store.connect(dsn) as store, Path(path).open("w", encoding="utf-8") as log:

        def note(
            lock: str, kind: str, start: float, ok: bool | None, token: int, ttl: float
        ) -> None:
            log.write(line(Event(process, lock, kind, start, time.monotonic(), ok, token, ttl)))
            log.flush()

        while time.monotonic() < end or grants < 6:
            name, ttl = rng.choice("abc"), rng.choice((0.1, 0.2, 0.4))
            lock = pgkv.Lock(store, name, ttl=ttl, renew=False)
            start = time.monotonic()
            try:
                lease = lock.acquire(timeout=rng.choice((0, 0.05, 0.3)))
            except pgkv.LockTimeoutError:
                note(name, "acquire", start, False, 0, ttl)
                continue
            note(name, "acquire", start, True, lease.token, ttl)
            grants += 1
            for _ in range(rng.randrange(3)):
                time.sleep(rng.uniform(0, ttl))
                start, more = time.monotonic(), rng.choice((0.1, 0.3))
                try:
                    lease.extend(more)
                except pgkv.LeaseLostError:
                    note(name, "extend", start, False, lease.token, more)
                    break
                except pgkv.PgkvError:
                    note(name, "extend", start, None, lease.token, more)
                else:
                    note(name, "extend", start, True, lease.token, more)
            if rng.random() < 0.7:
                start = time.monotonic()
                try:
                    ok: bool | None = lease.release()
                except pgkv.PgkvError:
                    ok = None
                note(name, "release", start, ok, lease.token, 0.0)


def holder(dsn: str, name: str, ttl: str) -> None:
    """Acquire, say the token, hold until killed."""
    with pgkv.Store.connect(dsn) as store:
        lease = pgkv.Lock(store, name, ttl=float(ttl)).acquire()
        say(lease.token)
        time.sleep(600)


def leader(dsn: str, name: str, ttl: str) -> None:
    """Campaign, say the term when elected."""
    with pgkv.Store.connect(dsn) as store:
        pgkv.Leader(store, name, ttl=float(ttl), on_elected=lambda lease: say(lease.token)).run()


def writer(dsn: str, resource: str, path: str) -> None:
    """For each line of input: acquire, read, say so, wait for another line, write n + 1."""
    with pgkv.Store.connect(dsn) as store, psycopg.connect(dsn) as conn:
        lock = pgkv.Lock(store, "writer", ttl=0.8)
        for _ in sys.stdin:
            lease = _hold(lock, conn, resource == "table")
            try:
                n = _read(conn, resource, path)
                say("holding")
                sys.stdin.readline()
                done = _write(conn, resource, path, n + 1, lease.token)
                lease.release()
            except (pgkv.LeaseLostError, psycopg.Error):
                conn.rollback()
                done = False
            say("written" if done else "refused")


def _hold(lock: pgkv.Lock, conn: psycopg.Connection, guarded: bool) -> pgkv.Lease:
    """Acquire; again where the machine was so slow that the lease had ended before its guard."""
    while True:
        lease = lock.acquire()
        try:
            if guarded:
                lease.guard(conn)
        except pgkv.LeaseLostError:
            conn.rollback()
        else:
            return lease


def _read(conn: psycopg.Connection, resource: str, path: str) -> int:
    if resource.startswith("file"):
        return int(Path(path).read_text("utf-8").split()[0])
    row = conn.execute("SELECT n FROM resource").fetchone()
    if resource == "fenced-table":
        conn.rollback()
    assert row is not None
    return int(row[0])


def _write(conn: psycopg.Connection, resource: str, path: str, n: int, token: int) -> bool:
    if resource == "file":
        Path(path).write_text(f"{n} {token}", "utf-8")
        return True
    if resource == "file-fenced":
        with Path(path).open("r+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if int(file.read().split()[1]) > token:
                return False
            file.seek(0)
            file.write(f"{n} {token}")
            return True
    conn.execute("UPDATE resource SET n = %s, fence = %s", [n, token])
    conn.commit()
    return True


if __name__ == "__main__":
    mode, *rest = sys.argv[1:]
    programs: dict[str, Callable[..., None]] = {
        "storm": storm, "holder": holder, "leader": leader, "writer": writer,
    }  # fmt: skip
    programs[mode](*rest)
