"""Tasks of one event loop: one for latency, many for throughput."""

from __future__ import annotations

from tests.benchmarks.case import (
    ASYNCPG,
    ASYNCPG_POOL,
    COALESCING,
    PGKV,
    REDIS_ASYNC,
    Bench,
    Entrants,
    Goals,
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


def goals(alone: float | None, together: float | None) -> Goals:
    """Of a store as it is, and of one that coalesces; the same against both peers."""
    return {
        ASYNCPG_POOL: alone,
        REDIS_ASYNC: alone,
        (COALESCING, ASYNCPG_POOL): together,
        (COALESCING, REDIS_ASYNC): together,
    }


def many_tasks(bench: Bench, count: int) -> Entrants:
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


@case("async get, 8 tasks", goals(None, None), workers=8)
def few(bench: Bench) -> Entrants:
    return many_tasks(bench, 8)


@case("async get, 64 tasks", goals(3.0, 7.0), workers=64)
def many(bench: Bench) -> Entrants:
    return many_tasks(bench, 64)


@case("async get, 512 tasks", goals(None, None), workers=512)
def very_many(bench: Bench) -> Entrants:
    return many_tasks(bench, 512)
