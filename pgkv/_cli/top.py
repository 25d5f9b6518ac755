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
    rows = _rows_of(reading)
    for _, tables in VIEWS.values():
        for title, name, columns in tables:
            console.show_documents(rows[name], columns, title=title)


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
    rows = _rows_of(reading)
    for title, name, columns in VIEWS[shown][1]:
        if rows[name]:
            cells = console.cells_of(rows[name], columns)
            parts.append(console.table(list(columns), cells, title=title))
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


def _rows_of(reading: Reading) -> dict[str, list[dict[str, Any]]]:
    """The rows of each table that a view shows."""
    import msgspec

    frame, rates = msgspec.to_builtins(reading.frame), reading.rates.get("tables", {})
    for table in frame["tables"]:
        table |= {"changes": None, "hot": None} | rates.get(table["kind"], {})
    for lock in frame["locks"]:
        lock["name"] += "" if lock["slot"] is None else f" [{lock['slot']}]"
    frame["refused"] = [{"kind": kind, "why": why} for kind, why in frame["refused"].items()]
    for name in ("sessions", "idempotency"):
        frame[name] = [] if frame[name] is None else [frame[name]]
    return frame  # type: ignore[no-any-return]  # of what views name


_SHARES: console.Columns = {
    "rows": ("rows", console.number),
    "size": ("bytes", console.size),
    "expired": ("expired", console.number),
}
_NAMED: console.Columns = {
    "name": ("name", lambda name: console.one_line(name or "(no prefix)")),
    **_SHARES,
}
_TABLES: console.Columns = {
    "table": ("kind", str),
    **console.numbers("rows", "dead"),
    "size": ("bytes", console.size),
    "indexes": ("index_bytes", console.size),
    "writes/s": ("changes", console.unless_none("{:,.1f}".format)),
    "heap-only": ("hot", console.unless_none("{:.0%}".format)),
    "vacuum": (
        "vacuumed",
        console.unless_none(lambda ago: f"{console.duration(ago)} ago", "never"),
    ),
}
_LOCKS: console.Columns = {
    "name": ("name", console.one_line),
    "holder": ("owner", console.one_line),
    "age": ("age", console.duration),
    "remaining": ("remaining", console.duration),
    **console.numbers("waiters"),
}
_BLOCKED: console.Columns = {
    "pid": ("pid", str),
    "application": ("application", console.one_line),
    "waits for": ("waits_for", str),
    "for": ("seconds", console.duration),
    "blocked by": ("blockers", lambda pids: ", ".join(map(str, pids))),
}
_QUEUES: console.Columns = {
    "queue": ("queue", console.one_line),
    **console.numbers("waiting", "delayed", "running", "dead"),
    "oldest": ("oldest", console.duration),
}
_CONNECTIONS: console.Columns = {
    "application": ("application", console.one_line),
    "state": ("state", str),
    "connections": ("count", console.number),
    "longest": ("longest", console.duration),
}
_REFUSED: console.Columns = {"table": ("kind", str), "why": ("why", console.one_line)}
# By key: the view's name, and its tables: title, rows, columns.
VIEWS: dict[str, tuple[str, list[tuple[str, str, console.Columns]]]] = {
    "1": ("tables", [("Tables", "tables", _TABLES), ("Not readable", "refused", _REFUSED)]),
    "2": (
        "keys",
        [
            ("What the rows are", "kinds", {"kind": ("kind", str), **_SHARES}),
            ("Keys by prefix", "keys", _NAMED),
            ("Cached functions", "functions", _NAMED),
            ("Limiters", "limiters", _NAMED),
        ],
    ),
    "3": (
        "locks",
        [
            ("Locks held", "locks", _LOCKS),
            ("Waiting for a lock of the server", "blocked", _BLOCKED),
        ],
    ),
    "4": (
        "work",
        [
            ("Queues", "queues", _QUEUES),
            ("Sessions", "sessions", console.numbers("live", "with_user", "expired")),
            ("Idempotency keys", "idempotency", console.numbers("done", "running", "expired")),
        ],
    ),
    "5": ("connections", [("Connections", "connections", _CONNECTIONS)]),
}
