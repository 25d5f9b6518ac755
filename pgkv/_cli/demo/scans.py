"""Scene: ordered scans by prefix."""

from __future__ import annotations

import random
import time
from time import perf_counter

from .. import console
from . import data
from .stage import Check, Report, Scene, Stage, rate

SHORT_SCANS = 500
FAVOURITE = "asyncio/tasks.py"


def play(stage: Stage) -> Report:
    """Read one module back line by line, everything in order, and many short ranges."""
    store = stage.store
    said: list[str] = []
    checks: list[Check] = []
    names = sorted({key[len(data.SOURCE) :].rpartition(":")[0]
                    for key in stage.data if key.startswith(data.SOURCE)})  # fmt: skip
    names = names[:-1]  # of the last one only a part may have been loaded
    if names:
        name = FAVOURITE if FAVOURITE in names else max(names[:50], key=len)
        text = dict(data.source_files(name.rpartition("/")[0]))[name]
        wanted = list(data.lines_of(name, text))
        found = [(key, value.decode()) for key, value in store.scan(f"{data.SOURCE}{name}:")]
        checks.append(
            Check(
                f"a scan puts {name} together again, {len(found):,} lines in order", found == wanted
            )
        )
    kept = sorted((key for key in stage.data), key=str.encode)
    started = time.monotonic()
    keys: list[str] = []
    with stage.bar("scanning", len(kept)) as advance:
        for prefix in (data.SOURCE, data.UNICODE, data.WORDS):
            for key in store.iter_keys(prefix, page_size=5000):
                keys.append(key)
                if len(keys) % 5000 == 0:
                    advance(5000)
    seconds = time.monotonic() - started
    said.append(
        f"{len(keys):,} keys in order in {console.duration(seconds)}: {len(keys) / seconds:,.0f} a second"
    )
    checks.append(Check("all keys came once, in the order of their bytes", keys == kept))
    latencies: list[float] = []
    for key in random.sample(kept, min(SHORT_SCANS, len(kept))):
        begun = perf_counter()
        store.scan(key[:-2], limit=20)
        latencies.append(perf_counter() - begun)
    return Report(
        said,
        checks,
        [rate("scan of 20 rows", 1, latencies, sum(latencies))],
    )


SCENE = Scene("Scanning", "A prefix or a range comes in the order of its bytes, complete.", play)
