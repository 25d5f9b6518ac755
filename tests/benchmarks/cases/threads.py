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

THREADS = 8


@case(f"get, {THREADS} threads", {PSYCOPG_POOL: None, REDIS: 2.0}, workers=THREADS)
def get_in_threads(bench: Bench) -> Entrants:
    store = bench.store()
    yield PGKV, bench.threads(THREADS, store.get)
    pool: Any = bench.psycopg_pool()
    sql = statements(store).get("k").statement.text(180000)

    def execute(key: str) -> None:
        with pool.connection() as conn:
            conn.execute(sql, [key], binary=True).fetchone()

    yield PSYCOPG_POOL, bench.threads(THREADS, execute)
    if client := bench.redis():
        yield REDIS, bench.threads(THREADS, client.get)
