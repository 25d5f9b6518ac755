"""What iterating over a large table costs in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pgkv
from tests.benchmarks.case import Bench, facts
from tests.benchmarks.cases.size import table_of
from tests.benchmarks.figures import Fact, Goal

ROWS, ROWS_QUICK = 1_000_000, 50_000
EVERY = 10_000  # rows between two looks
STATM = Path("/proc/self/statm")


def resident() -> int:
    """Bytes of memory that this process occupies."""
    return int(STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def grown(dsn: str, table: str) -> int:
    """By how many bytes a process grows that iterates over a table."""
    with pgkv.Store.connect(dsn) as connected:
        store = connected.table(table)
        next(store.iter_items())  # what the first page brings into being is no growth
        before = highest = resident()
        for n, _ in enumerate(store.iter_items()):
            if n % EVERY == 0:
                highest = max(highest, resident())
    return highest - before


if STATM.exists():

    @facts("iter_items")
    def growth(bench: Bench) -> Iterator[Fact]:
        rows = ROWS_QUICK if bench.quick else ROWS
        table_of(bench, rows)
        # A process of its own: this one has room left over from the cases before.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            size = fresh.submit(grown, bench.dsn, f"sized_{rows}").result()
        what = f"iter_items over {rows:,} keys: memory growth"
        yield Fact(what, size / 1024**2, "MiB", Goal(20.0))
