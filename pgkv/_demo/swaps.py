"""Scene: compare-and-swap under contention, and set_nx as a race with one winner."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import perf_counter

from .stage import WORKERS, Check, Report, Stage, rate

ACCOUNTS = 4
OPENING = 1_000_000
CLAIMS = 300


def play(stage: Stage) -> Report:
    """Book into shared accounts by compare-and-swap, then race for names."""
    store = stage.store
    names = [f"demo:account:{number}" for number in range(ACCOUNTS)]
    store.set_many({name: str(OPENING) for name in names})
    latencies: list[list[float]] = [[] for _ in range(WORKERS)]
    booked = [0] * WORKERS
    lost = [0] * WORKERS

    def book(number: int, go_on: Callable[[], bool]) -> None:
        turn = number
        while go_on():
            turn += 1
            name = names[turn % ACCOUNTS]
            seen = store.get(name) or b""
            while go_on():
                started = perf_counter()
                result = store.compare_and_swap(name, seen, str(int(seen) - 1))
                latencies[number].append(perf_counter() - started)
                if result:
                    booked[number] += 1
                    break
                lost[number] += 1
                seen = result.current or b""

    seconds = stage.together("swapping", book)
    every = [each for worker in latencies for each in worker]
    left = sum(int(value) for value in store.get_many(names).values())
    winners = _race(stage)
    return Report(
        f"Compare-and-swap: {WORKERS} workers draw on {ACCOUNTS} accounts",
        [f"{sum(lost):,} of {len(every):,} swaps met somebody else's change and tried again"],
        [
            Check(
                f"{ACCOUNTS * OPENING - left:,} is missing from the accounts, after "
                f"{sum(booked):,} successful swaps of 1 each",
                ACCOUNTS * OPENING - left == sum(booked),
            ),
            Check(
                f"of {WORKERS} workers racing for each of {CLAIMS} names by set_nx, one won each: "
                f"{sum(winners)} winners",
                winners == [1] * CLAIMS,
            ),
        ],
        [rate("compare_and_swap, contended", WORKERS, every, seconds)],
    )


def _race(stage: Stage) -> list[int]:
    wins: list[list[int]] = [[0] * CLAIMS for _ in range(WORKERS)]
    gate = threading.Barrier(WORKERS)

    def claim(number: int, _: Callable[[], bool]) -> None:
        gate.wait(timeout=30)
        for name in range(CLAIMS):
            wins[number][name] += stage.store.set_nx(f"demo:claim:{name}", str(number))

    stage.together("racing", claim)
    return [sum(column) for column in zip(*wins, strict=True)]
