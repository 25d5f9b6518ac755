"""Runs the scenes of the demo on a server and a table of its own, and shows their reports.

A scene is a module: it works on a `Stage`, checks what must be exact, and returns a `Report`. Nothing
shown is known beforehand.
"""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from rich.table import Table as Grid
from rich.text import Text

from ... import embedded
from ..._ops.op import Op, Statement
from ..._sql.table import read_nothing
from ...config import EMBEDDED_SCHEME, Config, Pooler, TtlCleanupStrategy
from ...patterns.schema import tables
from ...store import Store
from .. import console
from . import dataset, expiry, fleet, limiting, races, sessions, stampede, throughput
from .stage import WORKERS, Report, Scene, Size, Stage

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
HELD, WRONG = "ok", "WRONG"


def run(
    dsn: str | None,
    options: dict[str, Any],
    size: Size,
    *,
    as_json: bool = False,
    scenes: Sequence[Scene] = SCENES,
) -> bool:
    """Run all scenes and clean up, also after Ctrl-C. Returns whether every check held.

    Args:
        dsn: another server to use; None starts a temporary one.
        options: schema and pooler, as `Config` has them.
        size: how much and how long.
        as_json: one document at the end instead of text.
        scenes: what is run.
    """
    say = _nothing if as_json else _say
    started = time.monotonic()
    reports: list[Report] = []
    say("Starting a temporary PostgreSQL ..." if dsn is None else "Connecting ...")
    with open_stage(dsn, options, size, quiet=as_json) as stage:
        took = console.duration(time.monotonic() - started)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        say(
            f"PostgreSQL is ready after {took}; Python {platform.python_version()}, "
            f"{cores} cores for both.\n"
        )
        for scene in scenes:
            say(scene.title, "bold cyan")
            say(scene.stake, "dim", mark="")
            try:
                report = scene.play(stage)
            except KeyboardInterrupt:
                say("Interrupted: cleaning up ...")
                raise
            reports.append(report)
            if not as_json:
                show(report)
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
    gone = "The server is stopped and removed." if dsn is None else "The tables are dropped."
    say(
        f"{held} of {len(checks)} checks held, in {console.duration(seconds)}. {gone}",
        "bold green" if held == len(checks) else "bold red",
    )
    if (Path(__file__).parents[3] / QUICKSTART).is_file():
        say(f"Continue with {QUICKSTART}, five minutes, and the programs in examples/.")
    else:
        say("Continue with pgkv --help, and help(pgkv) in Python.")
    return held == len(checks)


# -- on the screen -------------------------------------------------------------------------


def show(report: Report) -> None:
    """Show what a scene has done: in colour on a terminal, as plain lines elsewhere."""
    for line in report.said:
        _say(line, mark="")
    for check in report.checks:
        word = HELD if check.held else WRONG
        sign = console.symbol("✓" if check.held else "✗", word)
        mark = sign if console.on_terminal() else f"{word}:"
        _say(check.text, "green" if check.held else "bold red", mark=mark)
    _say("")


def _say(text: str, style: str = "", *, mark: str | None = None) -> None:
    """Show a line; with a mark it is indented, and its continuation lies below its beginning."""
    if not console.on_terminal():
        console.say(text if mark is None else "  " + f"{mark} {text}".lstrip())
    elif mark is None:
        console.out().print(Text(text, style))
    else:
        grid = Grid.grid(padding=(0, 1, 0, 0))
        marks = [Text(mark, style)] if mark else []
        grid.add_row("", *marks, Text(text, "" if mark else style))
        console.out().print(grid)


def _nothing(text: str, style: str = "", *, mark: str | None = None) -> None:
    """Show nothing: the document at the end has it all."""


# -- the server and the table --------------------------------------------------------------


@contextlib.contextmanager
def open_stage(
    dsn: str | None, options: dict[str, Any], size: Size, *, quiet: bool
) -> Iterator[Stage]:
    """Create a table for the demo, on a temporary server if no DSN is given.

    Both are removed afterwards, except after a SIGKILL.
    """
    with _interrupts() as ignore_further, contextlib.ExitStack() as cleanup:
        if dsn is None:
            dsn = cleanup.enter_context(_temporary_server()).dsn
        elif dsn.startswith(EMBEDDED_SCHEME):
            dsn = cleanup.enter_context(embedded.start(embedded.parse(dsn))).dsn
        table = f"pgkv_demo_{secrets.token_hex(4)}"
        settings = {**options, "dsn": dsn, "table_name": table, "pooler": options["pooler"].value}
        store = cleanup.enter_context(Store(config_of(settings, WORKERS + 2)))
        store.create_table()
        cleanup.callback(_drop, store)
        cleanup.callback(ignore_further)
        yield Stage(store, settings, size, quiet)


def config_of(settings: dict[str, Any], connections: int) -> Config:
    """Return the `Config` of `Stage.settings`, for a process with that many connections."""
    return Config(
        **{**settings, "pooler": Pooler(settings["pooler"])},
        application_name="pgkv demo",
        pool_max_size=connections,
        # Scenes collect expired rows themselves, and count them.
        ttl_cleanup_strategy=TtlCleanupStrategy.MANUAL,
    )


@contextlib.contextmanager
def _temporary_server() -> Iterator[embedded.EmbeddedServer]:
    path = tempfile.mkdtemp(prefix="pgkv-demo-")
    try:
        with embedded.start(path) as server:
            yield server
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _interrupts() -> Iterator[Any]:
    """SIGTERM and SIGHUP end the demo as Ctrl-C does, so that it cleans up. Gives what ignores all
    three: a second Ctrl-C must not interrupt the cleaning up."""
    is_main = threading.current_thread() is threading.main_thread()
    names = ("SIGINT", "SIGTERM", "SIGHUP") if is_main else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    def ignore_further() -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)

    before = [(number, signal.signal(number, interrupt)) for number in numbers]
    try:
        yield ignore_further
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _drop(store: Store) -> None:
    """Drop the store's table, and those of locks and sessions that scenes created."""
    names = ", ".join(table.quoted for table in tables(store._config))
    drop = Statement(
        "drop", f"DROP TABLE IF EXISTS {names}", (), read_nothing, script=True, writes=False
    )
    store._execute(Op(drop))
