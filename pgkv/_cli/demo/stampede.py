"""Scene: many threads in several processes call a function whose result is not cached yet."""

from __future__ import annotations

import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from time import monotonic

from ...patterns.cache.decorator import cached
from ...store import Store
from .. import console
from . import dataset
from .stage import Check, Report, Scene, Stage
from .workers import Orders, answer

PROCESSES, THREADS = 4, 16
CALLERS = PROCESSES * THREADS
LIBRARY = ("asyncio", "email", "multiprocessing")  # whose words are counted: some 50 ms of work
COMPUTED = "demo:computed"
TIMEOUT = 60.0  # seconds: the result must not depend on a busy machine


def play(stage: Stage) -> Report:
    """Let all threads call a function at once, without and with `cached`."""
    share = min(1.0, stage.size.seconds / 3)
    with (
        stage.workers("stampede", PROCESSES, share=share) as workers,
        stage.bar("calling", 2) as advance,
    ):
        seconds, computed, results = [], [], []
        for how in ("uncached", "cached"):
            before = stage.store.increment(COMPUTED, 0)
            started = monotonic()
            workers.tell(how)
            answers = workers.answer_of_each()
            seconds.append(monotonic() - started)
            computed.append(stage.store.increment(COMPUTED, 0) - before)
            results.append([each for answer in answers for each in answer])
            advance(1)
    alike = sum(result == results[0][0] for result in results[1])
    return Report(
        [
            f"without a cache: computed {computed[0]} times; all callers have the result after "
            f"{console.duration(seconds[0])}",
            f"with @pgkv.cached: all have it after {console.duration(seconds[1])}",
        ],
        [
            Check(f"{CALLERS} cold calls at once computed it "
                  f"{'once' if computed[1] == 1 else f'{computed[1]} times'}", computed[1] == 1),
            Check(f"{alike} of {CALLERS} callers got the right result",
                  alike == len(results[1]) == CALLERS),
        ],
    )  # fmt: skip


def work(store: Store, orders: Orders, *, share: float) -> None:
    """Call the function from all threads at once, as each order says."""
    text = "".join(text for folder in LIBRARY for _, text in dataset.source_files(folder))
    text = text[: round(len(text) * share)]

    @cached(ttl=60, store=store, store_timeout=TIMEOUT, max_wait=TIMEOUT, on_error="raise")
    def most_used() -> str:
        store.increment(COMPUTED)
        words = Counter(re.findall(r"[^\W\d_]{5,}", text))
        return " ".join(f"{word} {count}" for word, count in words.most_common(10))

    gate = Barrier(THREADS)

    def call_at_once(how: str) -> str:
        gate.wait(TIMEOUT)
        return most_used() if how == "cached" else most_used.__wrapped__()

    with ThreadPoolExecutor(THREADS) as threads:
        while (how := orders.next()) is not None:
            answer(list(threads.map(call_at_once, [how] * THREADS)))


SCENE = Scene(
    "Stampede",
    f"{PROCESSES} processes of {THREADS} threads need the same new result at once. Each of them "
    "computes it, unless one does and the others wait.",
    play,
)
