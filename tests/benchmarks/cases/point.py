"""One key, one client."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import Any

from pgkv._ops.op import Op
from tests.benchmarks.case import (
    KEYS,
    MEMCACHED,
    PGKV,
    PSYCOPG,
    PSYCOPG_POOL,
    RAW,
    REDIS,
    VALUE,
    Bench,
    Entrants,
    case,
    each,
    statements,
    stored,
)


def peers(
    bench: Bench,
    make_op: Callable[[str], Op[Any]],
    psycopg_params: Callable[[str], list[Any]],
    keys: list[str] = KEYS,
) -> Entrants:
    """The same statement, by the other ways to PostgreSQL."""
    op = make_op(keys[0])
    sql = op.statement.text(180000)
    yield RAW, each(bench.raw().caller(op), cycle([make_op(key).params for key in keys]))

    params = [psycopg_params(key) for key in keys]
    conn = bench.psycopg()

    def execute(item: list[Any]) -> None:
        conn.execute(sql, item, binary=True).fetchone()

    yield PSYCOPG, each(execute, cycle(params))
    pool = bench.psycopg_pool()

    def check_out(item: list[Any]) -> None:
        with pool.connection() as conn:
            conn.execute(sql, item, binary=True).fetchone()

    yield PSYCOPG_POOL, each(check_out, cycle(params))


@case(
    "get",
    {RAW: (1.22, 1.05), PSYCOPG: None, PSYCOPG_POOL: None, REDIS: (0.8, 0.85), MEMCACHED: None},
)
def get(bench: Bench) -> Entrants:
    store = bench.store()
    yield PGKV, each(store.get, cycle(KEYS))
    yield from peers(bench, statements(store).get, lambda key: [key])
    if client := bench.redis():
        yield REDIS, each(client.get, cycle(KEYS))
    if memcached := bench.memcached():
        yield MEMCACHED, each(memcached.get, cycle(KEYS))


@case("get, no such key", {RAW: (1.22, 1.05), REDIS: (0.8, 0.85), MEMCACHED: None})
def get_missing(bench: Bench) -> Entrants:
    store = bench.store()
    missing = [f"missing:{key}" for key in KEYS]
    yield PGKV, each(store.get, cycle(missing))
    op = statements(store).get
    sender = bench.raw().sender(op(missing[0]))
    yield RAW, each(sender, cycle([op(key).params for key in missing]))
    if client := bench.redis():
        yield REDIS, each(client.get, cycle(missing))
    if memcached := bench.memcached():
        yield MEMCACHED, each(memcached.get, cycle(missing))


@case(
    "set",
    {RAW: 1.3, PSYCOPG: None, PSYCOPG_POOL: None, REDIS: (1.15, 1.0), MEMCACHED: None},
)
def write(bench: Bench) -> Entrants:
    store = bench.store()
    yield PGKV, each(lambda key: store.set(key, VALUE), cycle(KEYS))
    sql = statements(store)
    yield from peers(bench, lambda key: sql.set(key, VALUE), lambda key: [key, VALUE])
    if client := bench.redis():
        yield REDIS, each(lambda key: client.set(key, VALUE), cycle(KEYS))
    if memcached := bench.memcached():
        yield MEMCACHED, each(lambda key: memcached.set(key, VALUE), cycle(KEYS))


@case("set with ttl", {RAW: 1.3, REDIS: (1.15, 1.0), MEMCACHED: None})
def write_ttl(bench: Bench) -> Entrants:
    store = bench.store()
    yield PGKV, each(lambda key: store.set(key, VALUE, ttl=60), cycle(KEYS))
    sql = statements(store)
    ops = [sql.set(key, VALUE, ttl=60) for key in KEYS]
    yield RAW, each(bench.raw().caller(ops[0]), cycle([op.params for op in ops]))
    if client := bench.redis():
        yield REDIS, each(lambda key: client.set(key, VALUE, ex=60), cycle(KEYS))
    if memcached := bench.memcached():
        yield MEMCACHED, each(lambda key: memcached.set(key, VALUE, expire=60), cycle(KEYS))


@case(
    "increment",
    {RAW: 1.3, PSYCOPG: None, PSYCOPG_POOL: None, REDIS: (1.4, 1.15), MEMCACHED: None},
)
def increment(bench: Bench) -> Entrants:
    store = bench.store()
    counters = [f"counter:{key}" for key in KEYS]
    store.increment_many(dict.fromkeys(counters, 1))
    store.vacuum()
    yield PGKV, each(store.increment, cycle(counters))
    yield from peers(bench, statements(store).increment, lambda key: [key, b"1"], counters)
    if client := bench.redis():
        yield REDIS, each(client.incr, cycle(counters))
    if memcached := bench.memcached():
        stored(memcached, dict.fromkeys(counters, b"1"))  # it increments only what is there
        yield MEMCACHED, each(lambda key: memcached.incr(key, 1), cycle(counters))
