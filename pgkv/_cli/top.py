"""``pgkv top``: what the server knows of a store and its patterns, drawn again and again."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from ..errors import PgkvError
from . import console
from .command import DONE, Invocation, flag, span

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..patterns.overview import Overview
    from ..store import Store

LOOK_TIME = 1.0  # seconds for a frame's answer; the first one connects, and has an operation's time
INTERVAL_MIN = 1.0  # seconds


class Reading(NamedTuple):
    """One look, and what happened per second since the one before; nothing after the first."""

    frame: Overview
    rates: dict[str, Any]


def top(
    call: Invocation,
    interval: float = span(
        "--interval", "The time between two looks. Default: 2s, at least 1s.", "2s"
    ),
    once: bool = flag("--once", "Show all views once, with the rates of one interval."),
) -> int:
    """Show live what the server knows: sizes, rates, keys, locks, queues, connections.

    Keys: 1 to 5 choose a view, q ends. A look is one read-only round trip that costs the same however
    large the tables are: of large ones it reads a sample, and counts are estimates. With --json each
    look is a document. Exit code 3: the server did not answer the first look.

    **Example:** `pgkv top`

    **Example:** `pgkv top --once --json`
    """
    if not (once or call.json or console.on_terminal()):
        raise typer.BadParameter("the output is no terminal: give --once or --json")
    interval = max(interval, INTERVAL_MIN)
    with call.store(pool_max_size=1) as store:
        look = _looker(store)
        reading = look(None)
        if not (once or call.json):
            _live(look, reading, interval)
            return DONE
        while True:
            if not once:
                _print(call, reading)
            time.sleep(interval)
            reading = look(LOOK_TIME)
            if once:
                _print(call, reading)
                return DONE


def _looker(store: Store) -> Callable[[float | None], Reading]:
    from ..patterns.overview import Overviews, rates_between

    overviews = Overviews(store)
    before: Overview | None = None

    def look(timeout: float | None) -> Reading:
        nonlocal before
        frame = store._run(overviews.look(), timeout)
        rates = {} if before is None else rates_between(before, frame)
        before = frame
        return Reading(frame, rates)

    return look


def _print(call: Invocation, reading: Reading) -> None:
    if call.json:
        import msgspec

        console.say_json({**msgspec.to_builtins(reading.frame), "rates": reading.rates})
        sys.stdout.flush()
        return
    console.say("  ".join(_facts(reading)))
    for key in VIEWS:
        for title, columns, rows in _tables(key, reading):
            console.show_table(columns, rows, title=title)


def _live(look: Callable[[float | None], Reading], reading: Reading, interval: float) -> None:
    from rich.live import Live

    shown, failure = "1", ""
    with (
        _keys() as key_within,
        Live(
            console=console.out(), screen=True, auto_refresh=False, vertical_overflow="crop"
        ) as live,
    ):
        due = time.monotonic() + interval
        while True:
            live.update(_screen(shown, reading, failure), refresh=True)
            key = key_within(due - time.monotonic())
            if key == "q":
                return
            if key in VIEWS:
                shown = key
            if time.monotonic() < due:
                continue
            try:
                reading = look(LOOK_TIME)
                failure = ""
            except PgkvError as error:
                failure = console.without_secrets(f"no answer: {error}")
            due = time.monotonic() + interval


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Read single keys without echo; gives a function that returns one pressed within a time, or
    an empty text."""
    import termios
    import tty

    def wait(seconds: float) -> str:
        time.sleep(max(0.0, seconds))
        return ""

    if not console.can_ask():
        yield wait
        return
    number = sys.stdin.fileno()

    def key_within(seconds: float) -> str:
        ready, _, _ = select.select([number], [], [], max(0.0, seconds))
        return (os.read(number, 1).decode("ascii", "replace") or "q") if ready else ""

    settings = termios.tcgetattr(number)
    tty.setcbreak(number)
    try:
        yield key_within
    finally:
        termios.tcsetattr(number, termios.TCSADRAIN, settings)


def _screen(shown: str, reading: Reading, failure: str) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    menu = Text()
    for key, (name, _) in VIEWS.items():
        menu.append(f" {key} {name} ", style="reverse" if key == shown else "")
        menu.append(" ")
    menu.append(" q quit")
    parts: list[RenderableType] = [Text("  ".join(_facts(reading))), menu]
    if failure:
        parts.append(Text(console.one_line(failure), style="bold red"))
    for title, columns, rows in _tables(shown, reading):
        parts.append(console.table(columns, rows, title=title))
    return Group(*parts)


# -- views ---------------------------------------------------------------------------------


def _facts(reading: Reading) -> list[str]:
    server, rates = reading.frame.server, reading.rates
    facts = [
        f"PostgreSQL {server.version.split()[0]}{' (standby)' if server.standby else ''}",
        f"{server.database} as {server.role}",
        f"up {console.duration(server.uptime)}",
        f"{server.connections}/{server.max_connections} connections",
        f"oldest transaction {console.duration(server.oldest_transaction)}",
    ]
    if rates:
        facts.append(f"{rates['commits']:,.1f} commits/s")
        if rates["hit_ratio"] is not None:
            facts.append(f"{rates['hit_ratio']:.1%} of blocks in memory")
    return [console.printable(each) for each in facts]


# By key: the view's name, and the titles of its tables.
VIEWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "1": ("tables", ("Tables", "Not readable")),
    "2": ("keys", ("Kinds of rows", "Keys", "Cached functions", "Rate limiters")),
    "3": ("locks", ("Locks", "Waiting for the server")),
    "4": ("work", ("Queues", "Sessions and idempotency keys")),
    "5": ("connections", ("Connections",)),
}


def _tables(key: str, reading: Reading) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """The tables of a view that have rows: title, columns, cells."""
    from ..integrations._tables import tables_of

    about = console.symbol("≈", "~")
    for table in tables_of(reading.frame, reading.rates.get("tables", {})):
        if table.rows and table.title in VIEWS[key][1]:
            columns = [name.strip("~>") for name in table.head.split("|")]
            cells = [
                [console.one_line(each or "").replace("≈", about) for each in row]
                for row in table.rows
            ]
            yield table.title, columns, cells
