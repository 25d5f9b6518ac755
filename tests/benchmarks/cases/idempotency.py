"""Idempotency keys: a transaction with one insert, alone, with its record in it, by a lease, and replayed;
against a key in Redis that is set before the work and again after it."""

from __future__ import annotations

import secrets
from itertools import count
from typing import Any

import psycopg

import pgkv
from tests.benchmarks.case import PGKV, REDIS, Bench, Entrants, case

ALONE = "the transaction alone"
INSERT = "INSERT INTO bench_effects VALUES (1)"
DAY = 86400


def effects(bench: Bench) -> psycopg.Connection[Any]:
    """A connection with a table of effects."""
    conn = psycopg.connect(bench.dsn, autocommit=True)
    bench.closing(conn.close)
    conn.execute("CREATE TABLE IF NOT EXISTS bench_effects (n int)")
    return conn


def repeated(work: Any) -> Any:
    """Do the work of that many new keys."""
    numbers, run_of = count(), secrets.token_hex(4)

    def run(calls: int) -> None:
        for _ in range(calls):
            work(f"{run_of} {next(numbers)}")

    return run


def entrants(bench: Bench, work: Any, conn: psycopg.Connection[Any]) -> Entrants:
    """The work with its record, the transaction alone, and Redis around it."""

    def alone(_key: str) -> None:
        with conn.transaction():
            conn.execute(INSERT)

    yield PGKV, repeated(work)
    yield ALONE, repeated(alone)
    if client := bench.redis():

        def by_redis(key: str) -> None:
            if client.set(f"idem {key}", b"", nx=True, ex=30):
                alone(key)
                client.set(f"idem {key}", b"done", ex=DAY)

        yield REDIS, repeated(by_redis)


@case("once, in the transaction", {ALONE: 2})
def once_inside(bench: Bench) -> Entrants:
    """The record commits with the effect."""
    idem, conn = pgkv.Idempotency(bench.store()), effects(bench)

    def work(key: str) -> None:
        with conn.transaction(), idem.using(conn).once(key) as attempt:
            conn.execute(INSERT)
            attempt.result = b"done"

    yield from entrants(bench, work, conn)


@case("once, by a lease", {ALONE: 2.6})
def once_by_lease(bench: Bench) -> Entrants:
    """The claim is on disk first; the attempt is completed in the effect's transaction."""
    idem, conn = pgkv.Idempotency(bench.store()), effects(bench)

    def work(key: str) -> None:
        with idem.once(key) as attempt, conn.transaction():
            conn.execute(INSERT)
            attempt.complete(b"done", conn)

    yield from entrants(bench, work, conn)


@case("once, replayed", {"get": 1.5})
def once_replayed(bench: Bench) -> Entrants:
    """A retry of what is done, against the read of a key."""
    store = bench.store()
    idem = pgkv.Idempotency(store)
    with idem.once("done") as attempt:
        attempt.result = b"done"
    store.set("done", b"done")

    def replay(_key: str) -> None:
        with idem.once("done") as attempt:
            assert attempt.is_replay

    yield PGKV, repeated(replay)
    yield "get", repeated(lambda _key: store.get("done"))
