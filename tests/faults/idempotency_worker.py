"""A process that does work once for keys, for tests that kill it:
``python -m tests.faults.idempotency_worker``."""

from __future__ import annotations

import contextlib
import random
import sys
import time

import psycopg

import pgkv
from tests.hammer import pause, wait_to_be_killed, work_until_killed

LEASE = 1.0
KEYS_A_SECOND, SECONDS = 8, 5  # new keys, and for how long they are asked for


def inside(store: pgkv.Store, conn: psycopg.Connection, key: str, rng: random.Random) -> None:
    """The work in the transaction of its record."""
    with pgkv.Idempotency(store).using(conn).once(key, wait=5) as attempt:
        if not attempt.is_replay:
            conn.execute("INSERT INTO effects VALUES (%s)", [key])
            time.sleep(rng.uniform(0, 0.02))
            if rng.random() < 0.1:
                raise ZeroDivisionError
            attempt.result = b"done"


def lease(store: pgkv.Store, conn: psycopg.Connection, key: str, rng: random.Random) -> None:
    """The work by a lease, completed in its transaction, of which some commit past the lease; some processes
    are paused past it in between."""
    with pgkv.Idempotency(store, lease=LEASE).once(key) as attempt:
        if not attempt.is_replay:
            conn.execute("INSERT INTO effects VALUES (%s)", [key])
            time.sleep(rng.uniform(0, 0.02))
            if rng.random() < 0.1:
                raise ZeroDivisionError
            if rng.random() < 0.05:
                pause(LEASE * 2)
            attempt.complete(b"done", conn)
            time.sleep(LEASE * 1.3 if rng.random() < 0.02 else 0)
            conn.commit()


def storm(mode: str, dsn: str, seed: str) -> None:
    """Work on the keys of the last seconds until killed."""

    def work(conn: psycopg.Connection, store: pgkv.Store, rng: random.Random) -> None:
        if rng.random() < 1 / 3:
            conn.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        key = int(time.time() * KEYS_A_SECOND) - rng.randrange(SECONDS * KEYS_A_SECOND)
        {"inside": inside, "lease": lease}[mode](store, conn, str(key), rng)
        conn.commit()
        conn.isolation_level = None

    work_until_killed(dsn, seed, work)


def control(mode: str, dsn: str) -> None:
    """Do the work, and wait where its process will be killed: before the record, or with it."""
    connections = pgkv.Store.connect(dsn), psycopg.connect(dsn)
    with connections[0] as store, connections[1] as conn, contextlib.ExitStack() as stack:
        lease = 60 if mode == "together" else LEASE  # only the other one has to end
        attempt = stack.enter_context(pgkv.Idempotency(store, lease=lease).once("k"))
        conn.execute("INSERT INTO effects VALUES ('k')")
        if mode == "together":
            attempt.complete(b"done", conn)
        conn.commit()
        wait_to_be_killed()


if __name__ == "__main__":
    (storm if sys.argv[1] == "storm" else control)(*sys.argv[2:])
