"""Scene: a real data set goes in, in batches, from two threads."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from .. import console
from . import data
from .stage import Check, Report, Scene, Stage, rate

BATCH = 1000
LOADERS = 2
SAMPLE = 2000


def play(stage: Stage) -> Report:
    """Load everything, count it, and read a sample back."""
    stage.data = data.collect(stage.size.keys)
    pairs = iter(stage.data.items())
    batches = list(iter(lambda: list(islice(pairs, BATCH)), []))
    size = sum(len(key.encode()) + len(value.encode()) for key, value in stage.data.items())
    latencies: list[float] = []
    with stage.bar("loading", len(stage.data)) as advance, ThreadPoolExecutor(LOADERS) as threads:

        def load(batch: list[tuple[str, str]]) -> None:
            started = time.perf_counter()
            advance(stage.store.set_many(batch))
            latencies.append(time.perf_counter() - started)

        started = time.monotonic()
        try:
            list(threads.map(load, batches))
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
        seconds = time.monotonic() - started
    stage.store.vacuum()  # or autovacuum does it, while the next scene is timed
    found = stage.store.count()
    sample = random.sample(list(stage.data), min(SAMPLE, len(stage.data)))
    back = stage.store.get_many(sample)
    same = all(back.get(key) == stage.data[key].encode() for key in sample)
    kinds = [
        f"{count:,} {what}"
        for prefix, what in (
            (data.UNICODE, "names of characters"),
            (data.SOURCE, "lines of Python's own library"),
            (data.WORDS, "words of this machine's dictionary"),
        )
        if (count := sum(key.startswith(prefix) for key in stage.data))
    ]
    return Report(
        [
            f"{', '.join(kinds)}: {console.size(size)}",
            f"{len(stage.data):,} keys in {console.duration(seconds)}: "
            f"{len(stage.data) / seconds:,.0f} a second",
        ],
        [
            Check(f"the store counts {found:,} keys, and {len(stage.data):,} were written",
                  found == len(stage.data)),
            Check(f"{len(sample):,} keys drawn at random hold what was written", same),
        ],
        [rate(f"set_many of {BATCH:,}", LOADERS, latencies, seconds)],
    )  # fmt: skip


SCENE = Scene("Loading", "Loading real data in batches; every key must arrive.", play)
