"""Timing: all entrants of a case take turns, in short rounds and in a new order each time, so that
whatever disturbs the machine disturbs all of them alike."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from random import Random
from time import perf_counter

from tests.benchmarks.case import Bench, Case, Run
from tests.benchmarks.figures import Result, result
from tests.benchmarks.placement import on_one_core

ROUND_SECONDS = 0.012
ROUND_SECONDS_MANY = 0.06  # starting and ending many workers has to weigh little
ROUNDS_MIN = 15


def measure(case: Case, bench: Bench, rounds: int, server_pids: Callable[[], list[int]]) -> Result:
    """Time one case."""
    entrants = dict(case.make(bench))
    for run in entrants.values():
        run(case.workers)  # connects and prepares: the servers' processes are there now
    place = on_one_core(server_pids()) if case.is_pinned else nullcontext()
    gc.collect()
    gc.freeze()  # what exists now is no business of the collections to come
    try:
        with place:
            return result(case.name, case.unit, _rounds(case, entrants, rounds), case.goals)
    finally:
        gc.unfreeze()


def _rounds(case: Case, entrants: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    counts = {name: _calibrated(run, case.workers) for name, run in entrants.items()}
    samples: dict[str, list[float]] = {name: [] for name in entrants}
    order = list(entrants)
    random = Random(0)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            samples[name].append(_timed(entrants[name], counts[name]) / counts[name])
    return samples


def _calibrated(run: Run, workers: int) -> int:
    """How many operations fill a round."""
    enough = ROUND_SECONDS_MANY if workers > 1 else ROUND_SECONDS
    n = workers
    while (taken := _timed(run, n)) < enough / 2:
        n *= 2
    return max(workers, round(n * enough / taken / workers) * workers)


def _timed(run: Run, n: int) -> float:
    started = perf_counter()
    run(n)
    return perf_counter() - started
