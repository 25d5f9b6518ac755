"""Scene: many workers on few counters."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

from .stage import WORKERS, Check, Report, Stage, rate

COUNTERS = 4


def play(stage: Stage) -> Report:
    """Increment shared counters; the sum must be the number of calls."""
    latencies: list[list[float]] = [[] for _ in range(WORKERS)]
    names = [f"demo:counter:{number}" for number in range(COUNTERS)]

    def work(number: int, go_on: Callable[[], bool]) -> None:
        took, increment = latencies[number].append, stage.store.increment
        turn = number
        while go_on():
            turn += 1
            started = perf_counter()
            increment(names[turn % COUNTERS])
            took(perf_counter() - started)

    seconds = stage.together("counting", work)
    every = [each for worker in latencies for each in worker]
    total = sum(int(value) for value in stage.store.get_many(names).values())
    return Report(
        f"Counting: {WORKERS} workers on {COUNTERS} shared counters",
        [],
        [Check(f"the counters add up to {total:,}, after {len(every):,} increments",
               total == len(every))],
        [rate("increment, contended", WORKERS, every, seconds)],
    )  # fmt: skip
