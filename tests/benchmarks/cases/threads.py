"""Many threads, one store."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.case import (
    PGKV,
    PSYCOPG_POOL,
    REDIS,
    Bench,
    Entrants,
    case,
    statements,
)

THREADS, MANY = 8, 16
ENOUGH = f"pgkv, {MANY} connections"


@case(f"get, {THREADS} threads", {PSYCOPG_POOL: None, REDIS: 2.0}, workers=THREADS)
def get_in_threads(bench: Bench) -> Entrants:
    return get_by(bench, THREADS)


def get_by(bench: Bench, threads: int) -> Entrants:
    """Each entrant, called by so many."""
    store = bench.store()
    yield PGKV, bench.threads(threads, store.get)
    pool: Any = bench.psycopg_pool()
    sql = statements(store).get("k").statement.text(180000)

    def execute(key: str) -> None:
        with pool.connection() as conn:
            conn.execute(sql, [key], binary=True).fetchone()

    yield PSYCOPG_POOL, bench.threads(threads, execute)
    if client := bench.redis():
        yield REDIS, bench.threads(threads, client.get)


@case(f"get, {MANY} threads", {(PGKV, ENOUGH): 0.9, PSYCOPG_POOL: None, REDIS: None}, workers=MANY)
def more_threads_than_connections(bench: Bench) -> Entrants:
    """On the ten connections of the default."""
    yield from get_by(bench, MANY)
    yield ENOUGH, bench.threads(MANY, bench.store(pool_max_size=MANY).get)
