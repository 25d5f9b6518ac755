"""What iterating over a large table costs in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.case import Bench, facts
from tests.benchmarks.cases.size import table_of
from tests.benchmarks.figures import Fact, Goal

ROWS, ROWS_QUICK = 1_000_000, 50_000
EVERY = 10_000  # rows between two looks
STATM = Path("/proc/self/statm")


def resident() -> int:
    """Bytes of memory that this process occupies."""
    return int(STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


if STATM.exists():

    @facts("iter_items")
    def growth(bench: Bench) -> Iterator[Fact]:
        rows = ROWS_QUICK if bench.quick else ROWS
        store = table_of(bench, rows)
        next(store.iter_items())  # what the first page brings into being is no growth
        before = highest = resident()
        for n, _ in enumerate(store.iter_items()):
            if n % EVERY == 0:
                highest = max(highest, resident())
        grown = (highest - before) / 1024**2
        yield Fact(f"iter_items over {rows:,} keys: memory growth", grown, "MiB", Goal(20.0))
