"""Runs the scenes of the demo on a server and a table of its own, and shows what they yield.

A scene is a generator: it works on a `Stage`, and yields lines, and checks of what must be exact.
Nothing shown is known beforehand.
"""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table as Grid
from rich.text import Text

from ... import embedded
from ..._ops.op import Op
from ..._sql.table import command
from ...config import EMBEDDED_SCHEME
from ...patterns.schema import tables
from ...store import Store
from .. import console
from . import dataset, fleet, keys, patterns
from .stage import WORKERS, Check, Scene, Size, Stage, config_of

SCENES: tuple[Scene, ...] = (
    dataset.loading,
    keys.throughput,
    keys.races,
    keys.expiry,
    dataset.scanning,
    patterns.stampede,
    patterns.rate_limit,
    fleet.fleet,
    patterns.visitors,
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
    """Run all scenes and clean up, also after Ctrl-C. Returns whether every check held.

    Without a DSN a temporary server is started. `options` are schema and pooler, as `Config` has
    them. With `as_json` one document at the end takes the place of the text.
    """
    say: Callable[..., None] = (lambda *_, **__: None) if as_json else _say
    started = time.monotonic()
    played: list[dict[str, Any]] = []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = f"Python {platform.python_version()}, {cores} cores for both."
    say("Starting a temporary PostgreSQL ..." if dsn is None else "Connecting ...")
    with contextlib.ExitStack() as cleanup:
        try:
            stage = _open_stage(cleanup, dsn, options, size, quiet=as_json)
            took = console.duration(time.monotonic() - started)
            say(f"PostgreSQL is ready after {took}. {machine}\n")
            for title, stake, play in scenes:
                say(title, "bold cyan")
                say(stake, "dim", mark="")
                seen: dict[type, list[Any]] = {str: [], Check: []}
                for each in play(stage):
                    seen[type(each)].append(each)
                    if not as_json:
                        show(each)
                say("")
                checks = [each._asdict() for each in seen[Check]]
                played.append({"title": title, "stake": stake, "said": seen[str], "checks": checks})
        except KeyboardInterrupt:
            say("Interrupted: cleaning up ...")
            raise
    held = [check["held"] for scene in played for check in scene["checks"]]
    seconds = time.monotonic() - started
    if as_json:
        console.say_json({"held": all(held), "seconds": seconds, "scenes": played})
    gone = "The server is stopped and removed." if dsn is None else "The tables are dropped."
    say(
        f"{sum(held)} of {len(held)} checks held, in {console.duration(seconds)}. {gone}",
        "bold green" if all(held) else "bold red",
    )
    if (Path(__file__).parents[3] / QUICKSTART).is_file():
        say(f"Next: {QUICKSTART} takes five minutes, and examples/ has complete programs.")
    else:
        say("Next: pgkv --help, and help(pgkv) in Python.")
    return all(held)


# -- on the screen -------------------------------------------------------------------------


def show(line: str | Check) -> None:
    """Show what a scene yields: in colour on a terminal, as plain lines elsewhere."""
    if isinstance(line, str):
        _say(line, mark="")
    else:
        word = "ok" if line.held else "WRONG"
        mark = f"{word}:"
        if console.on_terminal():
            mark = console.symbol("✓" if line.held else "✗", word)
        _say(line.text, "green" if line.held else "bold red", mark=mark)


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


# -- the server and the table --------------------------------------------------------------


def _open_stage(
    cleanup: contextlib.ExitStack,
    dsn: str | None,
    options: dict[str, Any],
    size: Size,
    *,
    quiet: bool,
) -> Stage:
    """Create a table for the demo, on a temporary server if no DSN is given.

    Both are removed by the cleanup, except after a SIGKILL. SIGTERM and SIGHUP end the demo as
    Ctrl-C does.
    """
    names = ("SIGINT", "SIGTERM", "SIGHUP")  # no SIGHUP on Windows
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    for number in numbers:
        before = signal.signal(number, signal.default_int_handler)
        cleanup.callback(signal.signal, number, before)
    if dsn is None:
        directory = tempfile.TemporaryDirectory(prefix="pgkv-demo-", ignore_cleanup_errors=True)
        dsn = cleanup.enter_context(embedded.start(cleanup.enter_context(directory))).dsn
    elif dsn.startswith(EMBEDDED_SCHEME):
        dsn = cleanup.enter_context(embedded.start(embedded.parse(dsn))).dsn
    table = f"pgkv_demo_{secrets.token_hex(4)}"
    settings = {**options, "dsn": dsn, "table_name": table}
    store = cleanup.enter_context(Store(config_of(settings, WORKERS + 2)))
    store.create_table()
    cleanup.callback(_drop, store)
    for number in numbers:  # a second Ctrl-C must not interrupt the cleaning up
        cleanup.callback(signal.signal, number, signal.SIG_IGN)
    return Stage(store, settings, size, quiet)


def _drop(store: Store) -> None:
    """Drop the store's table, and those of locks and sessions that scenes created."""
    names = ", ".join(table.quoted for table in tables(store._config))
    drop = command("drop", f"DROP TABLE IF EXISTS {names}")
    store._execute(Op(drop))
