"""A hundred keys at a time, one client.

With so many keys in one call it is the client that counts. memcached's is therefore measured twice:
pymemcache is pure Python; libmc, which is C++, is left out where it is not installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from itertools import cycle
from statistics import median
from subprocess import DEVNULL, run
from typing import Any

from tests.benchmarks.case import (
    KEYS,
    MEMCACHED,
    PGKV,
    PSYCOPG,
    RAW,
    REDIS,
    VALUE,
    Bench,
    Entrants,
    case,
    each,
    facts,
    spent,
    statements,
)
from tests.benchmarks.figures import Fact, Goal

SIZE = 100
TTL = 60
# Keys from all over the table, as a page of an application would name them.
BATCHES = [KEYS[start::SIZE] for start in range(100)]
PAIRS = [dict.fromkeys(batch, VALUE) for batch in BATCHES]

REDIS_SET = "redis-py pipeline of SET EX"
REDIS_MSET = "redis-py MSET, no ttl"
LIBMC, PIPE = "libmc", "redis-cli --pipe"


def libmc(bench: Bench) -> Any:
    """memcached's client in C++; None where it or memcached is not installed."""
    if bench.memcached_socket is None or importlib.util.find_spec("libmc") is None:
        return None
    module: Any = importlib.import_module("libmc")  # untyped
    client = module.Client([bench.memcached_socket])
    bench.closing(client.quit)
    return client


@case(
    f"get_many({SIZE})",
    {RAW: 1.3, PSYCOPG: None, REDIS: (2.5, 1.5), MEMCACHED: None, LIBMC: None},
)
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
    if memcached := bench.memcached():
        yield MEMCACHED, each(memcached.get_many, cycle(BATCHES))
    if fast := libmc(bench):
        yield LIBMC, each(fast.get_multi, cycle(BATCHES))


@case(
    f"set_many({SIZE}) with ttl",
    {
        RAW: 1.2,
        PSYCOPG: None,
        REDIS_SET: 0.45,
        REDIS_MSET: None,
        MEMCACHED: None,
        LIBMC: None,
    },
)
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
    if client := bench.redis():

        def set_each(pairs: dict[str, bytes]) -> None:
            with client.pipeline(transaction=False) as pipeline:
                for key, value in pairs.items():
                    pipeline.set(key, value, ex=TTL)
                pipeline.execute()

        yield REDIS_SET, each(set_each, cycle(PAIRS))
        yield REDIS_MSET, each(client.mset, cycle(PAIRS))
    if memcached := bench.memcached():
        yield MEMCACHED, each(lambda pairs: memcached.set_many(pairs, expire=TTL), cycle(PAIRS))
    if fast := libmc(bench):
        yield LIBMC, each(lambda pairs: fast.set_multi(pairs, TTL), cycle(PAIRS))


LOADED = b"v" * 100
LOAD_ROUNDS = 2


@facts("load")
def load(bench: Bench) -> Iterator[Fact]:
    """Keys of 100 bytes, in turns into an empty table and an empty Redis."""
    size = 20_000 if bench.quick else 1_000_000
    rows = [(f"load:{number:09}", LOADED) for number in range(size)]
    client, program = bench.redis(), shutil.which("redis-cli")
    with tempfile.NamedTemporaryFile() as commands, bench.store(table_name="loaded") as store:
        commands.writelines(
            b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n"
            % (len(key), key.encode(), len(value), value)
            for key, value in rows
        )
        commands.flush()
        taken: dict[str, list[float]] = {PGKV: [], PIPE: [], REDIS: []}
        for _ in range(1 if bench.quick else LOAD_ROUNDS):
            store.recreate_table()
            taken[PGKV].append(spent(lambda: store.load(rows)))
            if client is None or program is None:
                continue
            client.flushall()
            commands.seek(0)
            command = [program, "-s", str(bench.redis_socket), "--pipe"]
            by_program = partial(run, command, stdin=commands, stdout=DEVNULL, check=True)
            taken[PIPE].append(spent(by_program))
            client.flushall()
            taken[REDIS].append(spent(lambda: piped(client, rows)))
        store.recreate_table()
    rates = {name: median(size / each for each in found) for name, found in taken.items() if found}
    for name, rate in rates.items():
        yield Fact(f"load of {size:,} keys into an empty table: {name}", rate / 1e3, "thousand /s")
    if PIPE in rates:
        goal = Goal(1.5, at_least=True)
        yield Fact(f"load of {size:,} keys: rate, {PIPE} is 1", rates[PGKV] / rates[PIPE], "", goal)


def piped(client: Any, rows: list[tuple[str, bytes]]) -> None:
    """What Python programs do."""
    for first in range(0, len(rows), 1000):
        pipe = client.pipeline(transaction=False)
        for key, value in rows[first : first + 1000]:
            pipe.set(key, value)
        pipe.execute()
