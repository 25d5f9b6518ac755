"""Scene: many threads change few keys, by increment, compare-and-swap and set_nx."""

from __future__ import annotations

import threading
from collections.abc import Callable

from .stage import WORKERS, Check, Report, Scene, Stage

SHARED = 4  # counters, and accounts
OPENING = 1_000_000
CLAIMS = 300


def play(stage: Stage) -> Report:
    """Count, draw money, and race for names; the totals must be exact."""
    store = stage.store
    counters = [f"demo:counter:{number}" for number in range(SHARED)]
    accounts = [f"demo:account:{number}" for number in range(SHARED)]
    store.set_many({name: str(OPENING) for name in accounts})
    booked: list[str] = []  # one entry for each successful swap

    def count(name: str) -> None:
        store.increment(name)

    def draw(name: str) -> None:
        seen = store.get(name) or b""
        if store.compare_and_swap(name, seen, str(int(seen) - 1)):
            booked.append(name)

    counting = _counted(stage, "increment", count, counters)
    swapping = _counted(stage, "get, compare_and_swap", draw, accounts)
    total = sum(int(value) for value in store.get_many(counters).values())
    balance = sum(int(value) for value in store.get_many(accounts).values())
    debited = SHARED * OPENING - balance
    winners = _race(stage)
    repeated = swapping - len(booked)
    return Report(
        [f"{repeated:,} of {swapping:,} swaps met another thread's change and were repeated"],
        [
            Check(f"{WORKERS} threads on {SHARED} counters: they add up to {total:,} after "
                  f"{counting:,} increments", total == counting),
            Check(f"{SHARED} accounts were debited {debited:,} in total by {len(booked):,} "
                  "successful swaps of 1: none lost", debited == len(booked)),
            Check(f"of {WORKERS} threads racing for each of {CLAIMS} names by set_nx, one won each: "
                  f"{sum(winners)} winners", winners == [1] * CLAIMS),
        ],
    )  # fmt: skip


def _counted(stage: Stage, what: str, call: Callable[[str], None], names: list[str]) -> int:
    """Call it for those names from all threads until the time is up; how often that was."""
    calls = [0] * WORKERS

    def work(number: int, go_on: Callable[[], bool]) -> None:
        while go_on():
            calls[number] += 1
            call(names[(number + calls[number]) % SHARED])

    stage.together(what, work, seconds=stage.size.seconds / 3)
    return sum(calls)


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
