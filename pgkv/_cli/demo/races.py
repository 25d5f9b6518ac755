"""Scene: many threads change few keys, by increment, compare-and-swap and set_nx."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import perf_counter

from .stage import WORKERS, Check, Report, Scene, Speed, Stage, rate

SHARED = 4  # counters, and accounts
OPENING = 1_000_000
CLAIMS = 300


def play(stage: Stage) -> Report:
    """Count, draw money, and race for names; the totals must be exact."""
    counting, counted = _count(stage)
    swapping, drawn, said = _draw(stage)
    winners = _race(stage)
    only_one = Check(
        f"of {WORKERS} threads racing for each of {CLAIMS} names by set_nx, one won each: "
        f"{sum(winners)} winners",
        winners == [1] * CLAIMS,
    )
    return Report([said], [counted, drawn, only_one], [counting, swapping])


def _count(stage: Stage) -> tuple[Speed, Check]:
    names = [f"demo:counter:{number}" for number in range(SHARED)]
    latencies: list[list[float]] = [[] for _ in range(WORKERS)]

    def work(number: int, go_on: Callable[[], bool]) -> None:
        took, increment = latencies[number].append, stage.store.increment
        turn = number
        while go_on():
            turn += 1
            started = perf_counter()
            increment(names[turn % SHARED])
            took(perf_counter() - started)

    seconds = stage.together("counting", work, seconds=stage.size.seconds / 3)
    every = [each for worker in latencies for each in worker]
    total = sum(int(value) for value in stage.store.get_many(names).values())
    return (
        rate("increment", WORKERS, every, seconds),
        Check(
            f"{WORKERS} threads on {SHARED} counters: they add up to {total:,} after "
            f"{len(every):,} increments",
            total == len(every),
        ),
    )


def _draw(stage: Stage) -> tuple[Speed, Check, str]:
    store = stage.store
    names = [f"demo:account:{number}" for number in range(SHARED)]
    store.set_many({name: str(OPENING) for name in names})
    latencies: list[list[float]] = [[] for _ in range(WORKERS)]
    booked = [0] * WORKERS

    def work(number: int, go_on: Callable[[], bool]) -> None:
        turn = number
        while go_on():
            turn += 1
            name = names[turn % SHARED]
            seen = store.get(name) or b""
            while go_on():
                started = perf_counter()
                result = store.compare_and_swap(name, seen, str(int(seen) - 1))
                latencies[number].append(perf_counter() - started)
                if result:
                    booked[number] += 1
                    break
                seen = result.current or b""

    seconds = stage.together("swapping", work, seconds=stage.size.seconds / 3)
    every = [each for worker in latencies for each in worker]
    done = sum(booked)
    missing = SHARED * OPENING - sum(int(value) for value in store.get_many(names).values())
    return (
        rate("compare_and_swap", WORKERS, every, seconds),
        Check(
            f"{SHARED} accounts were debited {missing:,} in total by {done:,} successful swaps of 1: "
            "none lost",
            missing == done,
        ),
        f"{len(every) - done:,} of {len(every):,} swaps met another thread's change and tried again",
    )


def _race(stage: Stage) -> list[int]:
    wins: list[list[int]] = [[0] * CLAIMS for _ in range(WORKERS)]
    gate = threading.Barrier(WORKERS)

    def claim(number: int, _: Callable[[], bool]) -> None:
        gate.wait(timeout=30)
        for name in range(CLAIMS):
            wins[number][name] += stage.store.set_nx(f"demo:claim:{name}", str(number))

    stage.together("racing", claim, seconds=stage.size.seconds)
    return [sum(column) for column in zip(*wins, strict=True)]


SCENE = Scene(
    "Races",
    "Threads change the same keys: reading, adding and writing back would lose counts.",
    play,
)
