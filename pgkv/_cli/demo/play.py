"""`run` plays the scenes of the demo and shows their reports.

A scene is a module of its own: it works on a `Stage`, measures what it does, checks what must be
exact, and returns a `Report`. Nothing shown is known beforehand.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import console
from . import dataset, expiry, fleet, limiting, races, sessions, stampede, throughput
from .screen import Screen
from .setting import open_stage
from .stage import Report, Scene, Size

SCENES: tuple[Scene, ...] = (
    dataset.LOADING,
    throughput.SCENE,
    races.SCENE,
    expiry.SCENE,
    dataset.SCANNING,
    stampede.SCENE,
    limiting.SCENE,
    fleet.SCENE,
    sessions.SCENE,
)
QUICKSTART = "docs/quickstart.md"


def run(
    dsn: str | None,
    options: dict[str, Any],
    size: Size,
    *,
    as_json: bool = False,
    scenes: Sequence[Scene] = SCENES,
) -> bool:
    """Run all scenes and clean up, also after Ctrl-C.

    Args:
        dsn: another server to use; None starts a temporary one.
        options: schema and pooler, as `Config` has them.
        size: how much and how long.
        as_json: one document at the end instead of text.
        scenes: what is run.

    Returns:
        Whether every check held.
    """
    screen = Screen(quiet=as_json)
    started = time.monotonic()
    reports: list[Report] = []
    screen.say("Starting a temporary PostgreSQL ..." if dsn is None else "Connecting ...")
    with open_stage(dsn, options, size, quiet=as_json) as stage:
        took = console.duration(time.monotonic() - started)
        screen.say(
            f"PostgreSQL {stage.server_version} is ready after {took}; "
            f"Python {platform.python_version()}, {stage.cores} cores for both.\n"
        )
        for scene in scenes:
            screen.begin(scene)
            try:
                report = scene.play(stage)
            except KeyboardInterrupt:
                screen.say("Interrupted: cleaning up ...")
                raise
            reports.append(report)
            screen.show(report)
    checks = [check for report in reports for check in report.checks]
    held = sum(check.held for check in checks)
    seconds = time.monotonic() - started
    if as_json:
        played = [
            {"title": scene.title, "stake": scene.stake, **asdict(report)}
            for scene, report in zip(scenes, reports, strict=True)
        ]
        console.say_json({"held": held == len(checks), "seconds": seconds, "scenes": played})
        return held == len(checks)
    screen.sum_up(reports)
    gone = "The server is stopped and removed." if dsn is None else "The tables are dropped."
    screen.say(
        f"\n{held} of {len(checks)} checks held, in {console.duration(seconds)}. {gone}",
        "bold green" if held == len(checks) else "bold red",
    )
    screen.say(_what_next())
    return held == len(checks)


def _what_next() -> str:
    if (Path(__file__).parents[2] / QUICKSTART).is_file():
        return f"Continue with {QUICKSTART}, five minutes, and the programs in examples/."
    return "Continue with pgkv --help, and help(pgkv) in Python."


__all__ = ["SCENES", "Scene", "Size", "run"]
