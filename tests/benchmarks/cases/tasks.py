"""Tasks of one event loop: one for latency, many for throughput."""

from __future__ import annotations

from functools import partial

from tests.benchmarks.case import (
    ASYNCPG,
    ASYNCPG_POOL,
    COALESCING,
    PGKV,
    REDIS_ASYNC,
    Bench,
    Entrants,
    case,
    statements,
)

CONNECTIONS = 10  # the default of both pools


@case("async get, 1 task", {ASYNCPG: 1.0, REDIS_ASYNC: 0.6, (COALESCING, REDIS_ASYNC): None})
def one_task(bench: Bench) -> Entrants:
    store = bench.async_store()
    yield PGKV, bench.tasks(1, store.get)
    yield COALESCING, bench.tasks(1, bench.async_store(coalesce=True).get)
    sql = statements(store).get("k").statement.text(180000).decode()
    connection = bench.asyncpg()

    async def fetch(key: str) -> None:
        await connection.fetchval(sql, key)

    yield ASYNCPG, bench.tasks(1, fetch)
    if client := bench.async_redis():
        yield REDIS_ASYNC, bench.tasks(1, client.get)


def many_tasks(bench: Bench, *, count: int) -> Entrants:
    store = bench.async_store()
    yield PGKV, bench.tasks(count, store.get)
    yield COALESCING, bench.tasks(count, bench.async_store(coalesce=True).get)
    sql = statements(store).get("k").statement.text(180000).decode()
    pool = bench.asyncpg_pool(CONNECTIONS)

    async def fetch(key: str) -> None:
        await pool.fetchval(sql, key)

    yield ASYNCPG_POOL, bench.tasks(count, fetch)
    if client := bench.async_redis():
        yield REDIS_ASYNC, bench.tasks(count, client.get)


for _count in (8, 64, 512):
    _alone, _together = (3.0, 6.0) if _count == 64 else (None, None)
    case(
        f"async get, {_count} tasks",
        {
            ASYNCPG_POOL: _alone,
            REDIS_ASYNC: _alone,
            (COALESCING, ASYNCPG_POOL): _together,
            (COALESCING, REDIS_ASYNC): _together,
        },
        workers=_count,
    )(partial(many_tasks, count=_count))
