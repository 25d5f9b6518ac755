"""`pgkv demo`: a real data set and concurrent workers on a server made for the occasion.

A scene is a function in a module of its own: it works on a `Stage`, measures what it does, checks
what must be exact, and returns a `Report`. Nothing shown is known beforehand.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from .. import _console as console
from . import counters, expiry, loading, reads, scans, swaps
from .stage import Report, Size, Stage, open_stage

Scene = Callable[[Stage], Report]

SCENES: tuple[Scene, ...] = (
    loading.play,
    reads.play,
    counters.play,
    swaps.play,
    expiry.play,
    scans.play,
)


def run(dsn: str | None, options: dict[str, Any], size: Size, *, as_json: bool = False) -> bool:
    """Play all scenes and clean up, also after Ctrl-C.

    Args:
        dsn: another server to use; None starts a temporary one.
        options: fields of `Config`, for the connection.
        size: how much and how long.
        as_json: one document at the end instead of text.

    Returns:
        Whether every check held.
    """
    say: Callable[[str], None] = (lambda _: None) if as_json else console.say
    started = time.monotonic()
    reports: list[Report] = []
    say("Starting a temporary PostgreSQL ..." if dsn is None else "Connecting ...")
    with open_stage(dsn, options, size, quiet=as_json) as stage:
        took = console.duration(time.monotonic() - started)
        say(
            f"PostgreSQL {stage.server_version} is ready after {took}; "
            f"Python {platform.python_version()}, {stage.cores} cores for both.\n"
        )
        for scene in SCENES:
            try:
                report = scene(stage)
            except KeyboardInterrupt:
                say("Interrupted: cleaning up ...")
                raise
            reports.append(report)
            if not as_json:
                _show(report)
    checks = [check for report in reports for check in report.checks]
    held = sum(check.held for check in checks)
    seconds = time.monotonic() - started
    if as_json:
        scenes = [asdict(report) for report in reports]
        console.say_json({"held": held == len(checks), "seconds": seconds, "scenes": scenes})
        return held == len(checks)
    _summary(reports)
    gone = "The server is stopped and removed." if dsn is None else "The table is dropped."
    say(f"\n{held} of {len(checks)} checks held, in {console.duration(seconds)}. {gone}")
    return held == len(checks)


def _show(report: Report) -> None:
    console.say(report.title)
    for line in report.said:
        console.say(f"  {line}")
    for check in report.checks:
        console.say(f"  {'exact' if check.held else 'WRONG'}: {check.text}")
    console.say("")


def _summary(reports: list[Report]) -> None:
    columns = ("operation", "workers", "per second", "median", "99 %")
    rows = [
        (
            rate.operation,
            str(rate.workers),
            f"{rate.per_second:,.0f}",
            console.duration(rate.median),
            console.duration(rate.p99),
        )
        for report in reports
        for rate in report.rates
    ]
    if console.on_terminal():
        console.out().print(console.table(columns, rows))
        return
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    for row in [columns, *rows]:
        cells = [
            row[0].ljust(widths[0]),
            *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
        ]
        console.say("  ".join(cells))


__all__ = ["SCENES", "Scene", "Size", "run"]
