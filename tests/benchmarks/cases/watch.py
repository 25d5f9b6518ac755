"""What a write costs that tells watchers, and how soon they know."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from statistics import median
from time import perf_counter

import pgkv
from tests.benchmarks.case import KEYS, PGKV, VALUE, Bench, Entrants, case, each, facts
from tests.benchmarks.figures import Fact, Goal

TOLD = "pgkv, notify=True"
SOON = 15.0  # milliseconds, of which the writer waits 10


@case("set that is told", {(TOLD, PGKV): 1.1})
def told(bench: Bench) -> Entrants:
    for name in (PGKV, TOLD):
        store = bench.store(notify=name == TOLD)

        def write(key: str, store: pgkv.Store = store) -> None:
            store.set(key, VALUE)

        yield name, each(write, cycle(KEYS))


@facts("write to event")
def heard(bench: Bench) -> Iterator[Fact]:
    store = bench.store(notify=True)
    times: list[float] = []
    with store.watch("watched", poll=None) as events:
        for _ in range(20 if bench.quick else 200):
            started = perf_counter()
            store.set("watched", VALUE)
            assert events.next(timeout=60) is not None
            times.append(1000 * (perf_counter() - started))
    yield Fact("from a write to its event, median", median(times), "ms", Goal(SOON))
