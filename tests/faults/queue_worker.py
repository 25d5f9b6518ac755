"""A process that does jobs, for tests that kill it: ``python -m tests.faults.queue_worker``."""

from __future__ import annotations

import random
import sys
import time

import psycopg

import pgkv
from tests.hammer import pause, wait_to_be_killed, work_until_killed

LEASE = 1.0


def orders(store: pgkv.Store, lease: float = LEASE) -> pgkv.Queue[bytes]:
    """The queue of the storms: failures are tried again at once, and never too often."""
    return pgkv.Queue(
        store, "orders", lease=lease, max_attempts=10_000, backoff=pgkv.Backoff(0), wakeup="notify"
    )


def ship(conn: psycopg.Connection, store: pgkv.Store, rng: random.Random) -> None:
    """An order's effect and its ack in one transaction. Some commit past the lease, and some processes are
    paused past it between the two."""
    queue = orders(store)
    job = queue.take(timeout=1)
    if job is None:
        return
    with job:
        conn.execute("INSERT INTO effects VALUES (%s)", [job.payload.decode()])
        time.sleep(rng.uniform(0, 0.02))
        if rng.random() < 0.1:
            raise ZeroDivisionError
        if job.attempt == 1 and int(job.payload) % 16 == 0:
            pause(LEASE * 3)
        queue.using(conn).ack(job)
        time.sleep(LEASE * 1.3 if rng.random() < 0.02 else 0)
        conn.commit()


def index(conn: psycopg.Connection, store: pgkv.Store, rng: random.Random) -> None:
    """Copy a document's version; note where two do that at once."""
    # The lease is long: a stalled worker, or a killed one's connection that ends late, must not look like a
    # second one.
    job = orders(store, LEASE * 5).take(timeout=1)
    if job is None:
        return
    with job:
        conn.autocommit = True
        key = int(job.dedupe or 0)
        row = conn.execute("SELECT pg_try_advisory_lock(%s)", [key]).fetchone()
        if row is None or not row[0]:
            conn.execute("INSERT INTO meetings VALUES (%s)", [key])
        read = "SELECT version FROM documents WHERE id = %s"
        (version,) = conn.execute(read, [key]).fetchone() or (0,)
        time.sleep(rng.uniform(0, 0.04))
        write = "UPDATE documents SET indexed = greatest(indexed, %s) WHERE id = %s"
        conn.execute(write, [version, key])
        conn.execute("SELECT pg_advisory_unlock(%s)", [key])


def storm(mode: str, dsn: str, seed: str) -> None:
    """Work until killed."""
    work_until_killed(dsn, seed, {"ship": ship, "index": index}[mode])


def control(mode: str, dsn: str) -> None:
    """Do a job, and wait where the process will be killed: between effect and ack, or after both."""
    with pgkv.Store.connect(dsn) as store, psycopg.connect(dsn) as conn:
        queue = orders(store, 60 if mode == "together" else LEASE)  # only the other one has to end
        job = queue.take(timeout=60)
        assert job is not None
        conn.execute("INSERT INTO effects VALUES (%s)", [job.payload.decode()])
        if mode == "together":
            queue.using(conn).ack(job)
        conn.commit()
        wait_to_be_killed()


if __name__ == "__main__":
    (storm if sys.argv[1] == "storm" else control)(*sys.argv[2:])
