"""Locks: what one costs alone, how long a hand-over takes, what waiting costs the server, and how
many connections it takes to hold some."""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import repeat
from typing import Any

import psycopg

import pgkv
from tests.benchmarks.case import PGKV, REDIS, Bench, Entrants, case, each, facts
from tests.benchmarks.figures import Fact

# Redis keeps its locks as safe as pgkv does with durable=False: a crash may lose them.
NOT_DURABLE = "pgkv, durable=False"
REDIS_LOCK = "python-redis-lock"
ADVISORY = "advisory lock, psycopg"
TRY, UNLOCK = b"SELECT pg_try_advisory_lock($1)", b"SELECT pg_advisory_unlock($1)"
NUMBER = 0x706B_6776_6C6F_636B  # an advisory lock has no name
TTL = 30
WAITERS, HAND_OVERS = 20, 40
IDLE = 100
HOLDERS = 20
CYCLES = 30_000  # before it is measured: a table of locks is all change


@case(
    "lock: acquire and release",
    {
        REDIS: None,
        REDIS_LOCK: None,
        ADVISORY: None,
        (NOT_DURABLE, REDIS): (0.9, 1.0),
        (NOT_DURABLE, REDIS_LOCK): None,
        (NOT_DURABLE, ADVISORY): None,
    },
)
def acquire_and_release(bench: Bench) -> Entrants:
    store = bench.store()
    worn = pgkv.Lock(store, "bench", ttl=TTL, durable=False)
    bench.vacuum()
    for _ in range(1 if bench.quick else CYCLES):
        worn.acquire().release()

    def pair(lock: Any) -> Any:
        def once(_: None) -> None:
            lock.acquire().release()

        return each(once, repeat(None))

    yield PGKV, pair(pgkv.Lock(store, "bench", ttl=TTL))
    yield NOT_DURABLE, pair(pgkv.Lock(store, "bench", ttl=TTL, durable=False))
    connection = bench.psycopg()

    def advisory_once(_: None) -> None:
        assert connection.execute(TRY, [NUMBER]).fetchone() == (True,)
        assert connection.execute(UNLOCK, [NUMBER]).fetchone() == (True,)

    yield ADVISORY, each(advisory_once, repeat(None))
    if client := bench.redis():
        theirs = client.lock("bench", timeout=TTL)

        def redis_once(_: None) -> None:
            theirs.acquire()
            theirs.release()

        yield REDIS, each(redis_once, repeat(None))
        # By name: it has no types, and is compared with where it is installed.
        if importlib.util.find_spec("redis_lock") is None:
            return
        redis_lock: Any = importlib.import_module("redis_lock")
        other = redis_lock.Lock(client, "bench", expire=TTL)

        def other_once(_: None) -> None:
            other.acquire()
            other.release()

        yield REDIS_LOCK, each(other_once, repeat(None))


@facts("lock: connections")
def connections(bench: Bench) -> Iterator[Fact]:
    """Of holders that have a lock each and do nothing else with the database."""
    with psycopg.connect(bench.dsn, autocommit=True) as conn, ExitStack() as held:

        def count() -> int:
            found = conn.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
            ).fetchone()
            assert found is not None
            return int(found[0])

        what = f"connections per lock held, with {HOLDERS} of them: "
        before = count()
        store = bench.store()
        for n in range(HOLDERS):
            held.enter_context(pgkv.Lock(store, f"held {n}", ttl=TTL).acquire())
        yield Fact(what + PGKV, (count() - before) / HOLDERS, "")
        before = count()
        for n in range(HOLDERS):
            # One that two holders share would give both the same lock.
            assert bench.psycopg().execute(TRY, [NUMBER + n]).fetchone() == (True,)
        yield Fact(what + "advisory locks", (count() - before) / HOLDERS, "")


@facts("lock: waiting")
def waiting(bench: Bench) -> Iterator[Fact]:
    store = bench.store(pool_max_size=WAITERS)
    count = 10 if bench.quick else HAND_OVERS
    for name, options in (
        ("poll", {}),
        ("notify", {"wakeup": "notify"}),
        ("notify, fair", {"wakeup": "notify", "fair": True}),
    ):
        gaps = hand_overs(
            pgkv.Lock(store, f"hand {name}", ttl=TTL, durable=False, **options), count
        )
        what = f"hand-over to one of {WAITERS} waiters, {name}: "
        yield Fact(what + "median", statistics.median(gaps) * 1000, "ms")
        yield Fact(what + "worst", max(gaps) * 1000, "ms")
    yield Fact(f"{IDLE} idle waiters: statements", idle_statements(store, 5.0), "/s")


def hand_overs(lock: pgkv.Lock, count: int) -> list[float]:
    """Seconds from each release to the next grant."""
    gaps: list[float] = []
    released = [0.0]
    left = [count]

    def work() -> None:
        while left[0] > 0:
            with lock.acquire():
                if released[0]:
                    gaps.append(time.monotonic() - released[0])
                left[0] -= 1
                time.sleep(0.01)
                lock_released = time.monotonic()
                released[0] = lock_released

    with lock.acquire():
        threads = [threading.Thread(target=work) for _ in range(WAITERS)]
        for thread in threads:
            thread.start()
        time.sleep(1.0)
    for thread in threads:
        thread.join()
    return gaps


def idle_statements(store: pgkv.Store, seconds: float) -> float:
    """How many statements a second waiters send who are not granted anything."""
    seen = [0]
    lock = pgkv.Lock(store, "idle", ttl=TTL, durable=False)

    def count(name: str, _seconds: float, _outcome: str, _retries: int) -> None:
        seen[0] += name in ("lock_look", "lock_take", "lock_grant")

    def wait() -> None:
        try:
            lock.acquire(timeout=seconds + 2.0).release()
        except pgkv.LockTimeoutError:
            pass

    with lock.acquire():
        threads = [threading.Thread(target=wait) for _ in range(IDLE)]
        for thread in threads:
            thread.start()
        time.sleep(2.0)
        remove = pgkv.on_operation(count)
        time.sleep(seconds)
        remove()
        for thread in threads:
            thread.join()
    return seen[0] / seconds
