"""Scene: how many calls are made in a second, by one caller and by many. Every answer is checked."""

from __future__ import annotations

import random
from collections.abc import Callable
from time import monotonic
from typing import Any

from .stage import WORKERS, Check, Report, Scene, Stage

KEYS = 10_000
BATCH = 100
COUNTERS = 100
WRITTEN, COUNTED = "demo:written:", "demo:counted:"  # the data set itself is not changed


def play(stage: Stage) -> Report:
    """Time each operation by one caller, then `get` by many."""
    store = stage.store
    drawn = random.sample(list(stage.data), min(KEYS, len(stage.data)))
    data = {key: stage.data[key].encode() for key in drawn}
    batches = [drawn[at : at + BATCH] for at in range(0, len(drawn) - BATCH + 1, BATCH)]
    counters = {key: f"{COUNTED}{number % COUNTERS}" for number, key in enumerate(drawn)}
    counted = 0

    def increment(key: str) -> bool:
        nonlocal counted
        counted += 1
        return store.increment(counters[key]) > 0

    def pipeline(batch: list[str]) -> bool:
        nonlocal counted
        with store.pipeline() as queue:
            found = [queue.get(key) for key in batch[: BATCH // 2]]
            for number in range(BATCH // 2):
                queue.increment(f"{COUNTED}{number}")
        counted += BATCH // 2
        return [each.result() for each in found] == [data[key] for key in batch[: BATCH // 2]]

    operations: dict[str, tuple[Callable[[Any], bool], list[Any]]] = {
        "get": (lambda key: store.get(key) == data[key], drawn),
        "set": (lambda key: bool(store.set(WRITTEN + key, data[key])), drawn),
        "increment": (increment, drawn),
        "get_many": (
            lambda batch: store.get_many(batch) == {key: data[key] for key in batch},
            batches,
        ),
        "set_many": (
            lambda batch: store.set_many({WRITTEN + key: data[key] for key in batch}) == BATCH,
            batches,
        ),
        "pipeline": (pipeline, batches),
    }
    figures: list[str] = []
    answers = wrong = 0
    with stage.bar("one caller", len(operations)) as advance:
        for name, (call, items) in operations.items():
            began, calls = monotonic(), 0
            while not calls or monotonic() < began + stage.size.seconds / 12:
                wrong += not call(items[calls % len(items)])
                calls += 1
            answers += calls
            figures.append(f"{name} {calls / (monotonic() - began):,.0f} a second")
            advance(1)
    read, misread = _many_callers(stage, data)
    total = sum(int(value) for _, value in store.scan(COUNTED))
    return Report(
        [
            f"one caller: {', '.join(figures[:3])}",
            f"{WORKERS} callers: get {read / (stage.size.seconds / 4):,.0f} a second",
        ],
        [
            Check(f"all {answers + read:,} answers are right: what is read is what was written",
                  wrong + misread == 0),
            Check(f"the counters add up to {total:,} after {counted:,} increments",
                  total == counted),
        ],
    )  # fmt: skip


def _many_callers(stage: Stage, data: dict[str, bytes]) -> tuple[int, int]:
    """How many values were read, and how many of them were wrong."""
    keys = list(data)
    read, wrong = [0] * WORKERS, [0] * WORKERS

    def work(number: int, go_on: Callable[[], bool]) -> None:
        while go_on():
            key = keys[(number + WORKERS * read[number]) % len(keys)]
            wrong[number] += stage.store.get(key) != data[key]
            read[number] += 1

    stage.together(f"{WORKERS} callers", work, seconds=stage.size.seconds / 4)
    return sum(read), sum(wrong)


SCENE = Scene(
    "Throughput",
    "How long a request waits: one caller, one call after the other. Then many at a time.",
    play,
)
