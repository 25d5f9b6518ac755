"""What grows with use, and where it stops: sizes half-way and at the end, which differ where nothing
bounds them. They run where `--big` is given, by `make bench-growth`."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from typing import NamedTuple

import psycopg

import pgkv
from tests.benchmarks.case import VALUE, Bench, facts
from tests.benchmarks.cases.counter import statistics_of
from tests.benchmarks.cases.size import table_of
from tests.benchmarks.figures import Fact, Goal

CHURNED, BATCH, TTL = 6_000_000, 200, 2.0
CLIENTS = 1_000_000
LOCKS, KEYS_IN_TABLE = 200_000, 5_000_000
PROCESSES, INCREMENTS = 8, 100_000
HALF = 1.25  # how many times the size half-way the size at the end is, at most
SMALL = 16.0  # MiB; a smaller table only says how much was written in its last seconds
COUNTER = """
import sys, pgkv
with pgkv.Store.connect(sys.argv[1]).table("hot_growth") as store:
    for _ in range(int(sys.argv[2])):
        store.increment("counter")
"""


class Sizes(NamedTuple):
    """Of a table, in MiB, its rows, and what the server has counted: updates, those of them that were
    HOT, deleted rows, vacuums."""

    table: float
    indexes: float
    rows: int
    updates: int
    hot: int
    deleted: int
    vacuums: int


def sizes(dsn: str, table: str) -> Sizes:
    query = (
        "SELECT pg_table_size(relid) / 1048576.0, pg_indexes_size(relid) / 1048576.0,"
        f" (SELECT count(*) FROM {table}), n_tup_upd, n_tup_hot_upd, n_tup_del,"
        " vacuum_count + autovacuum_count"
        f" FROM pg_stat_user_tables WHERE relid = '{table}'::regclass"
    )
    with psycopg.connect(dsn) as conn:
        found = conn.execute(query.encode()).fetchone()
    assert found is not None
    return Sizes(float(found[0]), float(found[1]), *found[2:])


def amount(bench: Bench, full: int) -> int:
    return full // 1000 if bench.quick else full


def halves(
    bench: Bench, what: str, table: str, work: Callable[[int], object], n: int, *, ends: bool = True
) -> Iterator[Fact]:
    """Do the work with the first half of the numbers and with the second, and look after each; growth
    `ends` where it should."""
    found = []
    for first in (0, n // 2):
        for number in range(first, first + n // 2):
            work(number)
        found.append(sizes(bench.dsn, table))
    half, end = found
    yield Fact(f"{what}: left half-way", half.rows, "rows")
    yield Fact(f"{what}: left", end.rows, "rows")
    for name in ("table", "indexes"):
        yield Fact(f"{what}: {name} half-way", getattr(half, name), "MiB")
        limit = Goal(max(SMALL, HALF * getattr(half, name))) if ends and not bench.quick else None
        yield Fact(f"{what}: {name}", getattr(end, name), "MiB", limit)
    if end.updates:
        yield Fact(f"{what}: HOT updates", 100 * end.hot / end.updates, "%")
    yield Fact(f"{what}: swept", end.deleted, "rows")
    yield Fact(f"{what}: vacuums", end.vacuums, "times")


@facts("growth: new keys", only_big=True)
def churn(bench: Bench) -> Iterator[Fact]:
    """Random keys that live for a moment, each written twice."""
    store = bench.store().table("churned")
    store.create_table()
    count = amount(bench, CHURNED)

    def write(_: int) -> None:
        batch = {str(uuid.uuid4()): VALUE for _ in range(BATCH)}
        store.set_many(batch, ttl=TTL)
        store.set_many(batch, ttl=TTL)

    what = f"{count:,} new keys that live {TTL:g} s, each written twice"
    yield from halves(bench, what, "churned", write, max(2, count // BATCH))


@facts("growth: keys that stay", only_big=True)
def stay(bench: Bench) -> Iterator[Fact]:
    count = amount(bench, KEYS_IN_TABLE)
    table_of(bench, count)
    found = sizes(bench.dsn, f"sized_{count}")
    for name in ("table", "indexes"):
        yield Fact(f"{count:,} keys of 256 bytes: {name}", getattr(found, name), "MiB")


@facts("growth: hot key", only_big=True)
def hot_key(bench: Bench) -> Iterator[Fact]:
    store = bench.store().table("hot_growth")
    store.create_table()
    count = amount(bench, INCREMENTS)
    command = [sys.executable, "-c", COUNTER, bench.dsn, str(count)]
    running = [subprocess.Popen(command) for _ in range(PROCESSES)]
    assert not any(each.wait() for each in running)
    assert store.get("counter") == str(PROCESSES * count).encode()
    what = f"{PROCESSES} processes, {count:,} increments each of one key"
    yield Fact(f"{what}: table", sizes(bench.dsn, "hot_growth").table * 1024, "KiB", Goal(1024.0))
    hot = statistics_of(store).hot_update_ratio or 0.0
    yield Fact(f"{what}: HOT updates", 100 * hot, "%", Goal(95.0, at_least=True))


@facts("growth: locks", only_big=True)
def leases(bench: Bench) -> Iterator[Fact]:
    """A fleet that locks each job by a name of its own, and some names again and again."""
    store = bench.store()

    def work(number: int) -> None:
        name = f"job {number}" if number % 2 else f"shard {number % 64}"
        pgkv.Lock(store, name, ttl=5, durable=False).acquire().release()

    work(0)
    table = pgkv.Lock(store, "x", ttl=5, durable=False)._options.sql.t
    count = amount(bench, LOCKS)
    what = f"{count:,} short leases, half of them of new names"
    yield from halves(bench, what, table, work, count, ends=False)  # names stay for a week


@facts("growth: limiter", only_big=True)
def limiter(bench: Bench) -> Iterator[Fact]:
    """A client that comes once, a million times."""
    store = bench.store().table("limited")
    store.create_table()
    limiter = pgkv.RateLimiter(store, "10/s", name="growth", timeout=10)
    count = amount(bench, CLIENTS)
    yield from halves(
        bench, f"a hit of {count:,} clients", "limited", lambda n: limiter.hit(str(n)), count
    )
