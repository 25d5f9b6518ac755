"""Timing: all entrants of a case take turns, in short rounds and in a new order each time, so that
whatever disturbs the machine disturbs all of them alike."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from random import Random
from time import perf_counter, process_time
from typing import TypeAlias

from tests.benchmarks.case import Bench, Case, Run
from tests.benchmarks.figures import Result, result
from tests.benchmarks.placement import cpu_clock, placed

ROUND_SECONDS = 0.012
ROUND_SECONDS_MANY = 0.06  # starting and ending many workers has to weigh little
ROUNDS_MIN = 15


Samples: TypeAlias = dict[str, list[float]]
CpuSamples: TypeAlias = dict[str, list[tuple[float, float]]]


def measure(case: Case, bench: Bench, rounds: int) -> Iterator[Result]:
    """Time one case, at each placement of client and servers if only one of both works at a time."""
    entrants = dict(case.make(bench))
    for run in entrants.values():
        run(case.workers)  # connects and prepares: the servers' processes are there now
    gc.collect()
    gc.freeze()  # what exists now is no business of the collections to come
    try:
        for placement in bench.placements if case.is_pinned else ("",):
            goals = case.goals_at(placement)
            pids = bench.server_pids()
            with placed(placement, pids), cpu_clock(pids) as clock:
                samples, cpu = _rounds(case, entrants, rounds, clock)
            yield result(case.name, case.unit, samples, goals, placement, cpu)
    finally:
        gc.unfreeze()


def _rounds(
    case: Case, entrants: dict[str, Run], rounds: int, clock: Callable[[], float] | None
) -> tuple[Samples, CpuSamples]:
    counts = {name: _calibrated(run, case.workers) for name, run in entrants.items()}
    samples: Samples = {name: [] for name in entrants}
    cpu: CpuSamples = {name: [] for name in entrants}
    order = list(entrants)
    random = Random(0)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            servers, client = clock() if clock else 0.0, process_time()
            samples[name].append(_timed(entrants[name], counts[name]) / counts[name])
            if clock:
                both = process_time() - client, clock() - servers
                cpu[name].append((both[0] / counts[name], both[1] / counts[name]))
    return samples, cpu


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
