"""Scenes about single keys: how fast calls are, how threads change the same keys, and expiry."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from time import monotonic

from .. import console
from .stage import WORKERS, Check, Stage, scene

KEYS = 10_000
WRITTEN, COUNTED = "demo:written:", "demo:counted:"  # the data set itself is not changed
SHARED, OPENING, CLAIMS = 4, 1_000_000, 300
SHORT, SHORT_KEYS, TTL = "demo:short:", 20_000, 1.0


@scene("Throughput", f"{WORKERS} threads at a time. Every answer is checked.")
def throughput(stage: Stage) -> Iterator[str | Check]:
    store, seconds = stage.store, stage.size.seconds / 6
    drawn = random.sample(list(stage.data), min(KEYS, len(stage.data)))
    data = {key: stage.data[key].encode() for key in drawn}
    wrong: list[str] = []

    def pipeline(key: str) -> bool:
        with store.pipeline() as queue:
            found = queue.get(key)
            queue.increment(COUNTED + key)
        return found.result() == data[key]

    operations: dict[str, Callable[[str], bool]] = {
        "get": lambda key: store.get(key) == data[key],
        "set": lambda key: bool(store.set(WRITTEN + key, data[key])),
        "increment": lambda key: store.increment(COUNTED + key) > 0,
        "pipeline": pipeline,
    }

    def check(name: str, number: int) -> None:
        key = drawn[number % len(drawn)]
        if not operations[name](key):
            wrong.append(key)

    calls = {name: stage.together(name, partial(check, name), seconds) for name in operations}
    counted = calls["increment"] + calls["pipeline"]
    total = sum(int(value) for _, value in store.scan(COUNTED))
    yield "calls a second: " + ", ".join(f"{name} {n / seconds:,.0f}" for name, n in calls.items())
    made = sum(calls.values())
    text = f"{made - len(wrong):,} of {made:,} answers are right: reads return what was written"
    yield Check(text, not wrong)
    yield Check(f"the counters add up to {total:,} after {counted:,} increments", total == counted)


@scene("Races", "Threads change the same keys. Every change must count once.")
def races(stage: Stage) -> Iterator[str | Check]:
    store, seconds = stage.store, stage.size.seconds / 3
    counters = [f"demo:counter:{number}" for number in range(SHARED)]
    accounts = [f"demo:account:{number}" for number in range(SHARED)]
    store.set_many(dict.fromkeys(accounts, str(OPENING)))
    booked: list[str] = []  # one entry for each successful swap
    won: list[int] = []  # the names that a thread won
    gate = Barrier(WORKERS)

    def draw(number: int) -> None:
        name = accounts[number % SHARED]
        seen = store.get(name) or b""
        if store.compare_and_swap(name, seen, str(int(seen) - 1)):
            booked.append(name)

    def claim(number: int) -> None:
        gate.wait(timeout=30)
        won.extend(n for n in range(CLAIMS) if store.set_nx(f"demo:claim:{n}", str(number)))

    def count(number: int) -> None:
        store.increment(counters[number % SHARED])

    counting = stage.together("increment", count, seconds)
    swapping = stage.together("get, compare_and_swap", draw, seconds)
    with ThreadPoolExecutor(WORKERS) as threads:
        list(threads.map(claim, range(WORKERS)))
    total = sum(map(int, store.get_many(counters).values()))
    debited = SHARED * OPENING - sum(map(int, store.get_many(accounts).values()))
    retried = swapping - len(booked)
    yield f"{retried:,} of {swapping:,} swaps met another thread's change and were tried again"
    text = (
        f"{SHARED} counters add up to {total:,} after {counting:,} increments by {WORKERS} threads"
    )
    yield Check(text, total == counting)
    text = f"{SHARED} accounts were debited {debited:,} in total by {len(booked):,} swaps of 1"
    yield Check(text, debited == len(booked))
    text = f"each of {CLAIMS} names had one winner among {WORKERS} threads: {len(won)} set_nx won"
    yield Check(text, sorted(won) == list(range(CLAIMS)))


@scene(
    "Expiry", "An expired key must be gone for every reader at once, and its row from the table."
)
def expiry(stage: Stage) -> Iterator[str | Check]:
    store = stage.store
    keys = [f"{SHORT}{number:06}" for number in range(min(SHORT_KEYS, stage.size.keys))]
    # The first batch's time runs while the last is written: all count from one statement's clock.
    before = monotonic()
    store.set_many(dict.fromkeys(keys, "soon gone"), ttl=TTL)
    there = store.count(SHORT)
    early = monotonic() - before < TTL
    stage.wait("waiting for expiry", TTL, lambda: not store.exists(keys[-1]))
    gone = len(keys) - store.count(SHORT) if not store.get_many(keys[:1000]) else 0
    rows = store.count(SHORT, include_expired=True)
    started = monotonic()
    removed = store.cleanup_expired()
    took = monotonic() - started
    left = store.count(SHORT, include_expired=True)
    yield f"{len(keys):,} keys with a ttl of {TTL:g} s"
    if early:
        yield Check(f"all {there:,} keys were readable before expiry", there == len(keys))
    yield Check(f"after expiry {gone:,} of {len(keys):,} keys are gone", gone == len(keys))
    text = f"cleanup_expired deleted {removed:,} of {rows:,} rows in {console.duration(took)}"
    yield Check(text, removed == rows == len(keys) and left == 0)
