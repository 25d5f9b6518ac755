"""A hundred keys at a time, one client."""

from __future__ import annotations

from datetime import timedelta
from itertools import cycle
from typing import Any

from tests.benchmarks.case import (
    KEYS,
    PGKV,
    PSYCOPG,
    RAW,
    REDIS,
    VALUE,
    Bench,
    Entrants,
    case,
    each,
    statements,
)

SIZE = 100
TTL = 60
# Keys from all over the table, as a page of an application would name them.
BATCHES = [KEYS[start::SIZE] for start in range(100)]
PAIRS = [dict.fromkeys(batch, VALUE) for batch in BATCHES]

REDIS_SET = "redis-py pipeline of SET EX"
REDIS_MSET = "redis-py MSET, no ttl"


@case(f"get_many({SIZE})", {RAW: 1.15, PSYCOPG: None, REDIS: 2.2})
def get_many(bench: Bench) -> Entrants:
    store = bench.store()
    yield PGKV, each(store.get_many, cycle(BATCHES))
    ops = [op for batch in BATCHES if (op := statements(store).get_many(batch))]
    yield RAW, each(bench.raw().pair_caller(ops[0]), cycle([op.params for op in ops]))
    conn, sql = bench.psycopg(), ops[0].statement.text(180000)

    def execute(batch: list[str]) -> None:
        conn.execute(sql, [batch], binary=True).fetchall()

    yield PSYCOPG, each(execute, cycle(BATCHES))
    if client := bench.redis():
        yield REDIS, each(client.mget, cycle(BATCHES))


@case(f"set_many({SIZE}) with ttl", {RAW: 1.2, PSYCOPG: None, REDIS_SET: 0.6, REDIS_MSET: None})
def set_many(bench: Bench) -> Entrants:
    store = bench.store()
    yield PGKV, each(lambda pairs: store.set_many(pairs, ttl=TTL), cycle(PAIRS))
    ops = [statements(store).set_many(pairs, TTL)[1][0] for pairs in PAIRS]
    yield RAW, each(bench.raw().sender(ops[0]), cycle([op.params for op in ops]))
    conn, sql = bench.psycopg(), ops[0].statement.text(180000)
    lists: list[list[Any]] = [
        [sorted(pairs), [pairs[key] for key in sorted(pairs)], timedelta(seconds=TTL)]
        for pairs in PAIRS
    ]

    def execute(params: list[Any]) -> None:
        conn.execute(sql, params, binary=True)

    yield PSYCOPG, each(execute, cycle(lists))
    client = bench.redis()
    if client is None:
        return

    def set_each(pairs: dict[str, bytes]) -> None:
        with client.pipeline(transaction=False) as pipeline:
            for key, value in pairs.items():
                pipeline.set(key, value, ex=TTL)
            pipeline.execute()

    yield REDIS_SET, each(set_each, cycle(PAIRS))
    yield REDIS_MSET, each(client.mset, cycle(PAIRS))
