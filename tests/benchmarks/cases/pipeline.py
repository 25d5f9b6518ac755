"""A hundred different operations in one round trip."""

from __future__ import annotations

from itertools import cycle
from typing import Any

from pgkv import Handle
from tests.benchmarks.case import (
    KEYS,
    PGKV,
    RAW,
    REDIS,
    VALUE,
    Bench,
    Entrants,
    case,
    each,
    statements,
)

SIZE = 100
BATCHES = [KEYS[start::SIZE] for start in range(100)]


@case(f"pipeline of {SIZE}", {RAW: None, REDIS: (1.05, 1.2)})
def pipeline(bench: Bench) -> Entrants:
    store = bench.store()

    def ours(keys: list[str]) -> None:
        handles: list[Handle[Any]] = []
        with store.pipeline() as queue:
            for n, key in enumerate(keys):
                if n % 4 == 0:
                    handles.append(queue.increment(f"counter:{key}"))
                elif n % 4 == 1:
                    handles.append(queue.set(key, VALUE))
                else:
                    handles.append(queue.get(key))
        for handle in handles:
            handle.result()

    yield PGKV, each(ours, cycle(BATCHES))

    sql, raw = statements(store), bench.raw()
    encoded = [
        [
            sql.increment(f"counter:{key}")
            if n % 4 == 0
            else sql.set(key, VALUE)
            if n % 4 == 1
            else sql.get(key)
            for n, key in enumerate(keys)
        ]
        for keys in BATCHES
    ]
    for op in encoded[0][:3]:
        raw.sender(op)  # prepares it
    yield RAW, each(raw.pipeline, cycle(encoded))

    client = bench.redis()
    if client is None:
        return

    def theirs(keys: list[str]) -> None:
        with client.pipeline(transaction=False) as queue:
            for n, key in enumerate(keys):
                if n % 4 == 0:
                    queue.incr(f"counter:{key}")
                elif n % 4 == 1:
                    queue.set(key, VALUE)
                else:
                    queue.get(key)
            queue.execute()

    yield REDIS, each(theirs, cycle(BATCHES))
