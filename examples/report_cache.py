"""An expensive report, computed once for a fleet of processes, and never stale after a change.

A table of a quarter million orders is summed per country: some 20 ms a time. The report is cached
for all processes; whoever changes an order invalidates it in the same transaction. Then four
processes ask for the same cold report at once, and the database sums once.

    PGKV_DSN=postgresql://... python examples/report_cache.py
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any

import psycopg

import pgkv

DSN = os.environ.get("PGKV_DSN", "")
ORDERS = 250_000
REPORT = "SELECT sum(cents) FROM example_orders WHERE country = %s"


@pgkv.cached(ttl=600, tags=("country:{country}",), store_timeout=5)
def revenue(country: str) -> int:
    """Return a country's revenue in cents."""
    with psycopg.connect(DSN, autocommit=True) as conn:
        row = conn.execute(REPORT, [country]).fetchone()
        conn.execute("UPDATE example_runs SET n = n + 1")
    return int(row[0]) if row and row[0] is not None else 0


def timed(fn: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """Return what a call returned, and its milliseconds."""
    started = time.perf_counter()
    return fn(*args), (time.perf_counter() - started) * 1000


def change(conn: psycopg.Connection[Any], *, commit: bool) -> None:
    """Double the first order of country C1; the report is invalidated with it, or with it not."""
    conn.execute("UPDATE example_orders SET cents = cents * 2 WHERE id = 1")
    revenue.using(conn).invalidate("C1")
    conn.commit() if commit else conn.rollback()


def ask(country: str) -> int:
    """What another process does."""
    return revenue(country)


def main() -> None:
    """Show it."""
    with psycopg.connect(DSN) as conn:
        conn.execute("DROP TABLE IF EXISTS example_orders, example_runs")
        conn.execute(
            "CREATE TABLE example_orders AS SELECT id, 'C' || id %% 7 AS country, id %% 9000 AS cents "
            "FROM generate_series(1, %s) id",
            [ORDERS],
        )
        conn.execute("CREATE TABLE example_runs AS SELECT 0 AS n")
        conn.commit()
        revenue.cache_clear()

        value, before = timed(revenue.__wrapped__, "C1")
        revenue("C1")
        _, after = timed(revenue, "C1")
        print(
            f"computed: {before:.1f} ms; cached: {after:.2f} ms ({before / after:.0f} times faster)"
        )

        change(conn, commit=False)
        print(f"after a rollback: still {'cached' if revenue('C1') == value else 'wrong'}")
        change(conn, commit=True)
        changed = revenue("C1")
        print(f"after a commit: {changed - value:+d} cents, at once")

        runs = conn.execute("SELECT n FROM example_runs").fetchone()
        conn.commit()
        with multiprocessing.get_context("spawn").Pool(4) as pool:
            answers = pool.map(ask, ["C2"] * 4, chunksize=1)
        again = conn.execute("SELECT n FROM example_runs").fetchone()
        assert runs is not None
        assert again is not None
        print(
            f"4 processes, one answer: {len(set(answers)) == 1}; computed {again[0] - runs[0]} time"
        )
        conn.execute("DROP TABLE example_orders, example_runs")


if __name__ == "__main__":
    main()
