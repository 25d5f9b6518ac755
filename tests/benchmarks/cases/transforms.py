"""Values compressed and encrypted at rest, beside plain ones in the same store."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import cycle
from typing import Any

import pgkv
from tests.benchmarks.case import KEYS, Bench, Entrants, Goals, case, each

PLAIN, ZSTD, SIV, BOTH = "pgkv, plain", "pgkv, Zstd", "pgkv, AesGcmSiv", "pgkv, both"
GOALS: dict[int, Goals] = {  # to what a compressed value saves in sending, and what a cipher costs
    256: {(ZSTD, PLAIN): 1.15, (SIV, PLAIN): 1.35, (BOTH, PLAIN): None},
    8192: {(ZSTD, PLAIN): 1.0, (SIV, PLAIN): None, (BOTH, PLAIN): None},
}


def document(size: int) -> bytes:
    """JSON of about that size, as an application would cache it."""
    rows = ({"id": n * 7919, "name": f"user {n}", "active": n % 3 > 0} for n in range(size))
    return json.dumps(list(rows)).encode()[:size]


def _entrants(bench: Bench, size: int, operation: Callable[[pgkv.Store, bytes], Any]) -> Entrants:
    value = document(size)
    zstd, cipher = pgkv.Zstd(), pgkv.AesGcmSiv({1: bytes(range(32))})
    for number, (name, transforms) in enumerate(
        {PLAIN: [], ZSTD: [zstd], SIV: [cipher], BOTH: [zstd, cipher]}.items()
    ):
        store = bench.store(table_name=f"form_{number}", transforms=transforms)
        store.set_many(dict.fromkeys(KEYS[:500], value))
        yield name, each(operation(store, value), cycle(KEYS[:500]))


def _register(size: int, goals: Goals) -> None:
    @case(f"get of {size:,} bytes", goals)
    def get(bench: Bench) -> Entrants:
        return _entrants(bench, size, lambda store, _: store.get)

    @case(f"set of {size:,} bytes", goals)
    def write(bench: Bench) -> Entrants:
        return _entrants(bench, size, lambda store, value: lambda key: store.set(key, value))


for _size, _goals in GOALS.items():
    _register(_size, _goals)
