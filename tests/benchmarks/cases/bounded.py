"""A table with a bound on its size: what it hits beside Redis, what a set costs, how far it overshoots.

Every trace is of a tenth of the keys' room, and a miss writes the key, as a cache would.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate, count, cycle
from random import Random
from typing import Any

import pgkv
from tests.benchmarks.case import KEYS, PGKV, VALUE, Bench, Entrants, case, each, facts
from tests.benchmarks.figures import Fact, Goal
from tests.benchmarks.redis_server import open_redis

ROWS, ROWS_QUICK = 9_113, 1_000
REQUESTS = 22  # per row
NO_BOUND = "pgkv, no bound"
OVERSHOOT = 110.0  # percent of the bound, in a storm of so many
PROCESSES = 8
WRITER = """
import sys, pgkv
with pgkv.Store.connect(sys.argv[1], table_name="storm", max_entries=int(sys.argv[3])) as store:
    for n in range(int(sys.argv[4])):
        store.set(f"{sys.argv[2]}:{n}", "v" * 100)
"""


def zipf(keys: int, exponent: float, random: Random) -> Iterator[int]:
    """Keys by Zipf's law, without end."""
    weights = list(accumulate(1 / n**exponent for n in range(1, keys + 1)))
    while True:
        yield from random.choices(range(keys), cum_weights=weights, k=1000)


def traces(rows: int) -> dict[str, Callable[[], Iterator[int]]]:
    """Names and makers of the traces."""
    keys = 10 * rows

    def plain() -> Iterator[int]:
        return zipf(keys, 0.9, Random(1))

    def scans() -> Iterator[int]:
        new, source = count(keys), plain()
        while True:  # a tenth of the requests are runs of keys that are read once
            yield from (next(source) for _ in range(9 * rows // 10))
            yield from (next(new) for _ in range(rows // 10))

    def once() -> Iterator[int]:
        new, source, random = count(keys), plain(), Random(2)
        while True:
            yield next(new if random.random() < 0.35 else source)

    def drifting() -> Iterator[int]:
        for n, key in enumerate(zipf(keys, 1.0, Random(3))):
            yield (key + n // 20) % keys

    return {
        "Zipf 0.9": plain, "Zipf 0.9 with scans": scans, "35 % seen once": once,
        "drifting Zipf 1.0": drifting,
    }  # fmt: skip


def hits(
    get: Callable[[str], Any], put: Callable[[str], Any], trace: Iterator[int], n: int
) -> float:
    """The share of hits of the second half of so many requests."""
    found = 0
    for number in range(n):
        key = f"key:{next(trace):08}"
        if get(key) is None:
            put(key)
        elif number >= n // 2:
            found += 1
    return found / (n - n // 2)


@facts("bounded table: hit ratio")
def ratios(bench: Bench) -> Iterator[Fact]:
    rows = ROWS_QUICK if bench.quick else ROWS
    requests = REQUESTS * rows
    value = VALUE.decode()
    for name, make in traces(rows).items():
        with pgkv.Store.connect(bench.dsn, table_name="hits", max_entries=rows) as store:
            store.recreate_table()
            ours = hits(store.get, lambda key: store.set(key, value), make(), requests)
        goal = None
        for policy in ("lru", "lfu"):
            with open_redis() as (client, _):
                if client is None:
                    continue
                client.mset({f"key:{n:08}": value for n in range(rows)})
                client.config_set("maxmemory", client.info("memory")["used_memory"])
                client.config_set("maxmemory-policy", f"allkeys-{policy}")
                theirs = hits(client.get, lambda key: client.set(key, value), make(), requests)
            if policy == "lru":
                goal = Goal(100 * theirs - 1, at_least=True)
            yield Fact(f"{name}: hit ratio of Redis allkeys-{policy}", 100 * theirs, "%")
        yield Fact(f"{name}: hit ratio of pgkv", 100 * ours, "%", goal)


@facts("bounded table: overshoot")
def storm(bench: Bench) -> Iterator[Fact]:
    rows = ROWS_QUICK if bench.quick else ROWS
    with pgkv.Store.connect(bench.dsn, table_name="storm", max_entries=rows) as store:
        store.recreate_table()
        command = [sys.executable, "-c", WRITER, bench.dsn]
        running = [
            subprocess.Popen([*command, str(n), str(rows), str(rows)]) for n in range(PROCESSES)
        ]
        highest = 0
        while any(each.poll() is None for each in running):
            highest = max(highest, store.count())
        assert not any(each.wait() for each in running)
    what = f"{PROCESSES} processes write {PROCESSES} times the bound of {rows:,}: most rows"
    yield Fact(what, 100 * highest / rows, "%", None if bench.quick else Goal(OVERSHOOT))


def _write(store: pgkv.Store, number: int) -> None:
    store.set(f"new:{number}", VALUE)


@case("set of new keys, a table at its bound", {NO_BOUND: 1 / 0.85})
def new_keys(bench: Bench) -> Entrants:
    for name, bound in ((PGKV, {"max_entries": ROWS}), (NO_BOUND, {})):
        store = bench.store(table_name=f"new_{len(bound)}", **bound)
        yield name, each(partial(_write, store), count())


@case("get, a table with a bound", {NO_BOUND: 1.02})
def reads(bench: Bench) -> Entrants:
    for name, bound in ((PGKV, {"max_entries": 20_000}), (NO_BOUND, {})):
        store = bench.store(table_name=f"read_{len(bound)}", **bound)
        yield name, each(store.get, cycle(KEYS))
