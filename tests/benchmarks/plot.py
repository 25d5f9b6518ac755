"""docs/benchmarks.svg: the figures at a glance, drawn for the width of a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from tests.benchmarks.case import (
    ASYNCPG_POOL,
    COALESCING,
    MEMCACHED,
    PGKV,
    PSYCOPG,
    RAW,
    REDIS,
    REDIS_ASYNC,
)
from tests.benchmarks.cases.batch import LIBMC, REDIS_SET
from tests.benchmarks.cases.cached import DOGPILE
from tests.benchmarks.cases.limiter import LIMITS
from tests.benchmarks.cases.lock import ADVISORY, NOT_DURABLE
from tests.benchmarks.cases.session import FLASK
from tests.benchmarks.figures import THROUGHPUT, Result
from tests.benchmarks.record import Record

INCHES = (7.7, 7.4)  # 740 px: the text of the plot is as large as that of the page around it
STYLE: Any = {  # matplotlib's type for it names all of some hundred keys
    "svg.hashsalt": "pgkv",
    "svg.fonttype": "path",
    "font.size": 8.5,
    "axes.edgecolor": "#888888",
    "xtick.color": "#888888",
    "xtick.labelcolor": "#444444",
}

# Okabe and Ito's palette, told apart by every kind of eye; a system keeps its colour in all panels.
BLUE, SKY, GREY, YELLOW = "#0072B2", "#56B4E9", "#999999", "#E69F00"
GREEN, RED, PINK = "#009E73", "#D55E00", "#CC79A7"


class Bar(NamedTuple):
    """An entrant: the colour of its system, and what stands beside its figure."""

    colour: str
    note: str = ""


class Group(NamedTuple):
    """The bars of a case."""

    label: str
    case: str
    bars: dict[str, Bar]


SYSTEMS = {
    BLUE: "pgkv",
    GREY: "raw libpq",
    YELLOW: "psycopg",
    RED: "Redis",
    PINK: "memcached",
}
COMMON = {
    PGKV: Bar(BLUE),
    RAW: Bar(GREY),
    PSYCOPG: Bar(YELLOW),
    REDIS: Bar(RED),
    MEMCACHED: Bar(PINK),
}
BOTH_CLIENTS = {MEMCACHED: Bar(PINK, "pymemcache"), LIBMC: Bar(PINK, "libmc")}
ONE_KEY = [Group(case, case, COMMON) for case in ("get", "set", "increment")]
MANY_KEYS = [
    Group("get_many", "get_many(100)", {**COMMON, **BOTH_CLIENTS}),
    Group(
        "set_many\nwith ttl",
        "set_many(100) with ttl",
        {
            PGKV: Bar(BLUE),
            RAW: Bar(GREY),
            PSYCOPG: Bar(YELLOW),
            REDIS_SET: Bar(RED, "SET EX each"),
            **BOTH_CLIENTS,
        },
    ),
    Group("pipeline", "pipeline of 100", COMMON),
]
PATTERNS = [
    Group("cached\nhit", "cached hit, sync", {PGKV: Bar(BLUE), DOGPILE: Bar(RED, "dogpile.cache")}),
    Group("rate\nlimit", "hit, many keys", {PGKV: Bar(BLUE), LIMITS: Bar(RED, "limits")}),
    Group("session\nload", "session load", {PGKV: Bar(BLUE), FLASK: Bar(RED, "Flask-Session")}),
    Group(
        "session\nsave",
        "session load + save of one field",
        {PGKV: Bar(BLUE), FLASK: Bar(RED, "Flask-Session")},
    ),
    Group(
        "lock",
        "lock: acquire and release",
        {
            PGKV: Bar(BLUE, "durable"),
            NOT_DURABLE: Bar(BLUE, "not durable"),
            REDIS: Bar(RED, "redis-py"),
            ADVISORY: Bar(YELLOW, "advisory"),
        },
    ),
]
LOWEST = ASYNCPG_POOL  # of the tasks' lines: its name stands below it, where there is room
TASKS = {COALESCING: SKY, PGKV: BLUE, REDIS_ASYNC: RED, ASYNCPG_POOL: GREEN}


def draw(path: Path, record: Record) -> None:
    """Draw the record, as far as it has what the plot shows."""
    # Of several placements the first: one core.
    results = {result.case: result for result in reversed(record.results)}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=INCHES, layout="constrained")
        (one, many), (patterns, tasks) = figure.subplots(2, 2)
        drawn = (
            _bars(one, results, ONE_KEY, "One key: µs, less is better")
            | _bars(many, results, MANY_KEYS, "A hundred keys: µs, less is better")
            | _bars(patterns, results, PATTERNS, "Patterns: µs, less is better")
        )
        _lines(tasks, record.results, "asyncio get: calls a second, more is better")
        systems = {colour: name for colour, name in SYSTEMS.items() if colour in drawn}
        if systems:
            figure.legend(
                [Patch(color=colour) for colour in systems],
                list(systems.values()),
                loc="outside upper center",
                ncols=len(systems),
                frameon=False,
            )
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def _bars(axes: Any, results: dict[str, Result], groups: Sequence[Group], title: str) -> set[str]:
    """Groups of horizontal bars, the first on top, each with its figure beside it; their colours."""
    drawn: set[str] = set()
    ticks: dict[float, str] = {}
    y = 0.0
    for group in groups:
        found = results[group.case].entrants if group.case in results else {}
        present = [name for name in group.bars if name in found]
        if not present:
            continue
        ticks[y + (len(present) - 1) / 2] = group.label
        for name in present:
            median, bar = found[name].median, group.bars[name]
            axes.barh(y, median, height=0.84, color=bar.colour)
            drawn.add(bar.colour)
            axes.text(median, y, f" {median:,.0f} {bar.note}", va="center", fontsize=7.5)
            y += 1
        y += 0.8
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.margins(x=0.3, y=0.02)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _plain(axes, title, grid="x")
    return drawn


def _lines(axes: Any, results: list[Result], title: str) -> None:
    """Throughput over the number of tasks, each line with its name beside it."""
    tasks = dict(sorted(_by_tasks(results)))
    for name, colour in TASKS.items():
        points = [(n, each.entrants[name]) for n, each in tasks.items() if name in each.entrants]
        if points:
            xs = [n for n, _ in points]
            axes.plot(
                xs, [each.median for _, each in points], marker="o", markersize=4, color=colour
            )
            lows, highs = [each.low for _, each in points], [each.high for _, each in points]
            axes.fill_between(xs, lows, highs, color=colour, alpha=0.2, linewidth=0)
            x, middle = points[len(points) // 2]
            axes.annotate(
                name,
                (x, middle.median),
                (0, -13 if name == LOWEST else 7),
                textcoords="offset points",
                ha="center",
                fontsize=7.5,
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(tasks), [f"{n} tasks" for n in tasks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _plain(axes, title, grid="y")


def _by_tasks(results: list[Result]) -> Iterator[tuple[int, Result]]:
    for result in results:
        if result.unit == THROUGHPUT and result.case.startswith("async get, "):
            yield int(result.case.split()[2]), result


def _plain(axes: Any, title: str, *, grid: str) -> None:
    axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
