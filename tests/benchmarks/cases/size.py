"""A small table against a large one."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import psycopg
from psycopg import sql

import pgkv
from tests.benchmarks.case import PGKV, VALUE, Bench, Entrants, case, each

SMALL = 10_000
AMONG_FEW = "pgkv, 10 thousand keys"


def table_of(bench: Bench, rows: int) -> pgkv.Store:
    """A store whose table holds so many keys, written by the server itself."""
    store = bench.store().table(f"sized_{rows}")
    store.create_table()
    name = sql.Identifier(f"sized_{rows}")

    def run(query: str, *params: object) -> None:
        with psycopg.connect(bench.dsn, autocommit=True) as conn:
            conn.execute(sql.SQL(query).format(name), params)

    run(
        "INSERT INTO {} (key, value) SELECT 'bench:' || n, %s FROM generate_series(1, %s) n",
        VALUE,
        rows,
    )
    run("VACUUM ANALYZE {}")
    run("CHECKPOINT")  # or it writes these pages while they are measured, on the same core
    bench.closing(lambda: run("DROP TABLE {}"))
    return store


def at_random(rows: int) -> Iterator[str]:
    random = Random(0)
    while True:
        yield f"bench:{random.randrange(rows) + 1}"


def compare(bench: Bench, rows: int) -> Entrants:
    yield PGKV, each(table_of(bench, rows).get, at_random(rows))
    yield AMONG_FEW, each(table_of(bench, SMALL).get, at_random(SMALL))


@case("get among 500 thousand keys", {AMONG_FEW: 1.25})
def among_many(bench: Bench) -> Entrants:
    return compare(bench, 20_000 if bench.quick else 500_000)


@case("get among 5 million keys", {AMONG_FEW: 1.25}, only_big=True)
def among_millions(bench: Bench) -> Entrants:
    return compare(bench, 5_000_000)
