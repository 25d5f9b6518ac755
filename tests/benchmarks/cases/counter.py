"""One counter that everybody increments: does its table grow, and do its updates stay HOT?"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pgkv
from tests.benchmarks.case import Bench, facts
from tests.benchmarks.figures import Fact, Goal

INCREMENTS, INCREMENTS_QUICK = 200_000, 10_000
# Until the server's statistics have it: its processes send them once a second.
PATIENCE = 10.0


@facts("hot counter")
def hot_counter(bench: Bench) -> Iterator[Fact]:
    store = bench.store().table("hot_counter")
    count = INCREMENTS_QUICK if bench.quick else INCREMENTS
    for _ in range(count):
        store.increment("counter")
    stats = statistics_of(store)
    what = f"{count:,} increments of one key"
    hot = Fact(f"{what}: HOT updates", 100 * (stats.hot_update_ratio or 0.0), "%", Goal(95.0, True))
    yield hot
    yield Fact(f"{what}: table size", stats.table_size_bytes / 1024, "KiB", Goal(1024.0))


def statistics_of(store: pgkv.Store) -> pgkv.Stats:
    deadline = time.monotonic() + PATIENCE
    while True:
        stats = store.stats()
        if stats.hot_update_ratio is not None or time.monotonic() > deadline:
            return stats
        time.sleep(0.2)
