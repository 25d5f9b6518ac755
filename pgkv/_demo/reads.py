"""Scene: random reads of the data set."""

from __future__ import annotations

import random
from collections.abc import Callable
from time import perf_counter

from .stage import WORKERS, Check, Report, Stage, rate


def play(stage: Stage) -> Report:
    """Read keys drawn at random and compare each value."""
    keys = list(stage.data)
    latencies: list[list[float]] = [[] for _ in range(WORKERS)]
    wrong: list[str] = []

    def work(number: int, go_on: Callable[[], bool]) -> None:
        draw, get, took = random.Random(number).choice, stage.store.get, latencies[number].append  # noqa: S311  # which keys is no secret
        while go_on():
            key = draw(keys)
            started = perf_counter()
            value = get(key)
            took(perf_counter() - started)
            if value != stage.data[key].encode():
                wrong.append(key)

    seconds = stage.together("reading", work)
    one: list[float] = []
    for key in random.sample(keys, min(2000, len(keys))):
        started = perf_counter()
        stage.store.get(key)
        one.append(perf_counter() - started)
    every = [each for worker in latencies for each in worker]
    return Report(
        "Reading: get, keys drawn at random",
        [],
        [Check(f"all {len(every):,} reads returned what was written", not wrong)],
        [rate("get", 1, one, sum(one)), rate("get", WORKERS, every, seconds)],
    )
