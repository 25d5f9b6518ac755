"""A hundred different operations in one round trip."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import pgkv
from tests.benchmarks.case import KEYS, PGKV, REDIS, VALUE, Bench, Entrants, case, each

SIZE = 100
BATCHES = [KEYS[start::SIZE] for start in range(100)]


if hasattr(pgkv.Store, "pipeline"):

    @case(f"pipeline of {SIZE}", {REDIS: 1.0})
    def pipeline(bench: Bench) -> Entrants:
        """Half of them reads, a quarter writes, a quarter counters."""
        store: Any = bench.store()

        def ours(keys: list[str]) -> None:
            with store.pipeline() as queue:
                handles = [
                    (
                        queue.increment(f"counter:{key}")
                        if n % 4 == 0
                        else queue.set(key, VALUE)
                        if n % 4 == 1
                        else queue.get(key)
                    )
                    for n, key in enumerate(keys)
                ]
            for handle in handles:
                handle.result()

        yield PGKV, each(ours, cycle(BATCHES))
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
