"""Scene: how many calls are made in a second, by one caller and by many. Every answer is checked."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from time import perf_counter
from typing import Any

from ...store import Store
from .stage import WORKERS, Check, Report, Scene, Speed, Stage, rate

KEYS = 10_000
BATCH = 100
COUNTERS = 100
WRITTEN, COUNTED = "demo:written:", "demo:counted:"  # the data set itself is not changed


@dataclass(frozen=True, slots=True)
class Operation:
    """One line of the table.

    Args:
        name: its name there.
        items: its arguments, one after the other.
        call: calls the store.
        is_right: whether the answer for an item is right.
        increments: how many increments one call makes.
    """

    name: str
    items: Sequence[Any]
    call: Callable[[Any], Any]
    is_right: Callable[[Any, Any], bool]
    increments: int = 0


def play(stage: Stage) -> Report:
    """Time each operation by one caller, then `get` by many."""
    drawn = random.sample(list(stage.data), min(KEYS, len(stage.data)))
    data = {key: stage.data[key].encode() for key in drawn}
    rates: list[Speed] = []
    answers = wrong = counted = 0
    operations = list(_operations(stage.store, data))
    with stage.bar("one caller", len(operations)) as advance:
        for operation in operations:
            latencies: list[float] = []
            items = cycle(operation.items)
            until = perf_counter() + stage.size.seconds / 2 / len(operations)
            while not latencies or perf_counter() < until:
                item = next(items)
                started = perf_counter()
                answer = operation.call(item)
                latencies.append(perf_counter() - started)
                wrong += not operation.is_right(item, answer)
            answers += len(latencies)
            counted += len(latencies) * operation.increments
            rates.append(rate(operation.name, 1, latencies))
            advance(1)
    many, misread = _many_callers(stage, data)
    answers += len(many)
    total = sum(int(value) for _, value in stage.store.scan(COUNTED))
    figures = (f"{each.operation} {each.per_second:,.0f} a second" for each in rates[:3])
    seconds = stage.size.seconds / 4
    return Report(
        [f"one caller: {', '.join(figures)}"],
        [
            Check(f"all {answers:,} answers are right: what is read is what was written",
                  wrong + misread == 0),
            Check(f"the counters add up to {total:,} after {counted:,} increments",
                  total == counted),
        ],
        [*rates, rate("get", WORKERS, many, seconds)],
    )  # fmt: skip


def _many_callers(stage: Stage, data: dict[str, bytes]) -> tuple[list[float], int]:
    keys = list(data)
    latencies: list[float] = []
    wrong: list[str] = []

    def work(number: int, go_on: Callable[[], bool]) -> None:
        chosen = cycle(keys[number::WORKERS])
        while go_on():
            key = next(chosen)
            started = perf_counter()
            value = stage.store.get(key)
            latencies.append(perf_counter() - started)
            if value != data[key]:
                wrong.append(key)

    stage.together(f"{WORKERS} callers", work, seconds=stage.size.seconds / 4)
    return latencies, len(wrong)


def _operations(store: Store, data: dict[str, bytes]) -> Iterator[Operation]:
    keys = list(data)
    batches = [keys[at : at + BATCH] for at in range(0, len(keys) - BATCH + 1, BATCH)]
    counters = [f"{COUNTED}{number}" for number in range(COUNTERS)]

    def write(pair: tuple[str, bytes]) -> int | None:
        return store.set(*pair)

    def pipeline(batch: list[str]) -> list[bytes | None]:
        with store.pipeline() as queue:
            found = [queue.get(key) for key in batch]
            for counter in random.sample(counters, BATCH // 2):
                queue.increment(counter)
        return [each.result() for each in found]

    pairs = [(WRITTEN + key, value) for key, value in data.items()]
    written = [{WRITTEN + key: data[key] for key in batch} for batch in batches]
    halves = [batch[: BATCH // 2] for batch in batches]
    yield Operation("get", keys, store.get, lambda key, value: bool(value == data[key]))
    yield Operation("set", pairs, write, lambda _, version: bool(version))
    yield Operation("increment", counters, store.increment, lambda _, count: count > 0, 1)
    yield Operation(
        f"get_many of {BATCH}", batches, store.get_many,
        lambda batch, values: bool(values == {key: data[key] for key in batch}),
    )  # fmt: skip
    yield Operation(
        f"set_many of {BATCH}", written, store.set_many, lambda batch, count: count == len(batch)
    )
    yield Operation(
        f"pipeline of {BATCH}", halves, pipeline,
        lambda batch, values: bool(values == [data[key] for key in batch]), BATCH // 2,
    )  # fmt: skip


SCENE = Scene(
    "Throughput",
    "How long a request waits: one caller, one call after the other. Then many at a time.",
    play,
)
