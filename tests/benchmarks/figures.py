"""From samples to figures: medians, quartiles, ratios, and whether a goal is met.

Everything here can be written to docs/benchmarks.json and read back.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median, quantiles

import msgspec

LATENCY, THROUGHPUT = "µs", "op/s"


class Summary(msgspec.Struct, frozen=True, omit_defaults=True):
    """The middle of some samples, where the middle half of them lies, and the figure of the round
    that was disturbed least."""

    median: float
    low: float
    high: float
    quietest: float | None = None


class Cpu(msgspec.Struct, frozen=True):
    """Microseconds of processor time that a call takes."""

    client: float
    servers: float

    @property
    def total(self) -> float:
        return self.client + self.servers


class Goal(msgspec.Struct, frozen=True):
    """What a figure should be."""

    limit: float
    at_least: bool = False

    def is_met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


class Comparison(msgspec.Struct, frozen=True, omit_defaults=True):
    """One entrant against another, round by round. `ratio` is None where one did not run."""

    ours: str
    against: str
    ratio: Summary | None
    goal: Goal | None
    cpu: float | None = None

    @property
    def is_met(self) -> bool | None:
        """None where there is nothing to judge."""
        if self.ratio is None or self.goal is None:
            return None
        return self.goal.is_met(self.ratio.median)


class Result(msgspec.Struct, frozen=True, omit_defaults=True):
    """A case that was timed: each entrant's figure in `unit`, and the comparisons.

    `placement` says where client and servers ran, and is empty where the system chose.
    """

    case: str
    unit: str
    entrants: dict[str, Summary]
    comparisons: list[Comparison]
    placement: str = ""
    cpu: dict[str, Cpu] = {}


class Fact(msgspec.Struct, frozen=True):
    """A figure that is no time: a size, a share."""

    case: str
    value: float
    unit: str
    goal: Goal | None = None

    @property
    def is_met(self) -> bool | None:
        return None if self.goal is None else self.goal.is_met(self.value)


def summary(samples: Sequence[float], quietest: float | None = None) -> Summary:
    """Median and quartiles."""
    if len(samples) == 1:
        return Summary(samples[0], samples[0], samples[0], quietest)
    low, middle, high = quantiles(samples, n=4, method="inclusive")
    return Summary(middle, low, high, quietest)


def in_unit(seconds: Sequence[float], unit: str) -> list[float]:
    """Seconds per operation as a case's figures."""
    return (
        [1 / each for each in seconds] if unit == THROUGHPUT else [1e6 * each for each in seconds]
    )


def result(
    case: str,
    unit: str,
    samples: dict[str, list[float]],
    goals: dict[tuple[str, str], Goal | None],
    placement: str = "",
    cpu: dict[str, list[tuple[float, float]]] | None = None,
) -> Result:
    """Summarize a case.

    Args:
        case: its name.
        unit: LATENCY or THROUGHPUT.
        samples: per entrant, seconds per operation of each round.
        goals: what is compared with what, and the goal if there is one.
        placement: where client and servers ran.
        cpu: per entrant, the client's and the servers' processor time per operation of each round,
            in seconds, where the system tells it.
    """
    figures = {name: in_unit(seconds, unit) for name, seconds in samples.items()}
    best = min if unit == LATENCY else max
    entrants = {name: summary(each, best(each)) for name, each in figures.items()}
    used = {
        name: Cpu(*(1e6 * median(part) for part in zip(*rounds, strict=True)))
        for name, rounds in (cpu or {}).items()
        if rounds
    }
    comparisons = []
    for (ours, against), goal in goals.items():
        ratio, of_cpu = None, None
        if ours in figures and against in figures:
            # Of the same round: what disturbed the machine then disturbed both.
            pairs = zip(figures[ours], figures[against], strict=True)
            quietest = best(figures[ours]) / best(figures[against])
            ratio = summary([mine / theirs for mine, theirs in pairs], quietest)
            if ours in used and against in used and used[against].total:
                of_cpu = used[ours].total / used[against].total
        comparisons.append(Comparison(ours, against, ratio, goal, of_cpu))
    return Result(case, unit, entrants, comparisons, placement, used)
