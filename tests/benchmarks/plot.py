"""docs/benchmarks.svg: the figures at a glance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from tests.benchmarks.case import (
    ASYNCPG_POOL,
    COALESCING,
    PGKV,
    PSYCOPG,
    PSYCOPG_POOL,
    RAW,
    REDIS,
    REDIS_ASYNC,
)
from tests.benchmarks.cases.batch import REDIS_SET
from tests.benchmarks.figures import THROUGHPUT, Result
from tests.benchmarks.record import Record

# Okabe and Ito's palette, told apart by every kind of eye; a system keeps its colour in all panels.
COLOURS = {
    PGKV: "#0072B2",
    COALESCING: "#56B4E9",
    RAW: "#999999",
    PSYCOPG: "#E69F00",
    PSYCOPG_POOL: "#F0C878",
    ASYNCPG_POOL: "#009E73",
    REDIS: "#D55E00",
    REDIS_SET: "#D55E00",
    REDIS_ASYNC: "#D55E00",
}
ONE_KEY = ("get", "set", "increment")
MANY_KEYS = ("get_many(100)", "set_many(100) with ttl", "pipeline of 100")


def draw(path: Path, record: Record) -> None:
    """Draw the record; nothing for a run that left out what the plot shows."""
    by_name = {result.case: result for result in record.results}
    tasks = {
        int(result.case.split()[2]): result
        for result in record.results
        if result.unit == THROUGHPUT and result.case.startswith("async get, ")
    }
    one_key = [by_name[name] for name in ONE_KEY if name in by_name]
    many_keys = [by_name[name] for name in MANY_KEYS if name in by_name]
    with mpl.rc_context({"svg.hashsalt": "pgkv", "svg.fonttype": "path", "font.size": 9}):
        figure = Figure(figsize=(12, 4.2), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        _bars(left, one_key, (PGKV, RAW, PSYCOPG, PSYCOPG_POOL, REDIS), "One key")
        _bars(
            middle,
            many_keys,
            (PGKV, RAW, PSYCOPG, REDIS_SET, REDIS),
            "A hundred keys or operations",
        )
        _lines(right, tasks, (COALESCING, PGKV, REDIS_ASYNC, ASYNCPG_POOL))
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def _bars(axes: Any, results: list[Result], entrants: tuple[str, ...], title: str) -> None:
    """Groups of horizontal bars, the first on top, each with its figure beside it."""
    axes.set_title(f"{title}: µs, less is better", loc="left", fontsize=10)
    ticks: list[float] = []
    labels: set[str] = set()
    y = 0.0
    for result in results:
        present = [name for name in entrants if name in result.entrants]
        ticks.append(y + (len(present) - 1) / 2)
        for name in present:
            figure = result.entrants[name]
            label = REDIS if name == REDIS_SET else name
            axes.barh(
                y,
                figure.median,
                height=0.82,
                color=COLOURS[name],
                label=None if label in labels else label,
            )
            labels.add(label)
            note = f" {figure.median:,.0f}" + (", SET EX each" if name == REDIS_SET else "")
            axes.text(figure.median, y, note, va="center", fontsize=8)
            y += 1
        y += 0.8
    axes.set_yticks(ticks, [result.case.replace(" with", "\nwith") for result in results])
    axes.invert_yaxis()
    axes.margins(x=0.22)
    axes.set_xlim(left=0)
    _plain(axes, grid="x")


def _lines(axes: Any, tasks: dict[int, Result], entrants: tuple[str, ...]) -> None:
    """Throughput over the number of tasks."""
    axes.set_title("asyncio get: calls per second, more is better", loc="left", fontsize=10)
    counts = sorted(tasks)
    for name in entrants:
        points = [(n, tasks[n].entrants[name]) for n in counts if name in tasks[n].entrants]
        if points:
            xs = [n for n, _ in points]
            medians = [figure.median for _, figure in points]
            axes.plot(xs, medians, marker="o", color=COLOURS[name], label=name)
            lows, highs = [f.low for _, f in points], [f.high for _, f in points]
            axes.fill_between(xs, lows, highs, color=COLOURS[name], alpha=0.2, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(counts, [f"{n} tasks" for n in counts])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _plain(axes, grid="both")


def _plain(axes: Any, *, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3
        )
