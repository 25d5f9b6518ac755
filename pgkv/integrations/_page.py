"""The dashboard's page: HTML of an `Overview`, whose every name is text and never markup."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

from .. import __version__
from .._observe import CONTROLS
from ..patterns.overview import (
    DEAD_ROWS,
    DEAD_SHARE,
    HOT_RATIO,
    HOT_UPDATES,
    OLD_TRANSACTION,
    OVER,
    Overview,
    Share,
    rates_between,
)
from ._tables import KINDS, FrameTable, count, share, size, span, tables_of

RELOAD = 5  # seconds
HISTORY = 600.0  # seconds that are drawn
HINTS = 12
NONE = "\N{EN DASH}"
NAME_MAX = 100  # characters of a name
BLOCKED, LATE_JOB = 1.0, 60.0  # seconds from which a wait is told
FULL, QUEUE_FULL = 0.9, 0.5  # of the connections, of the queue of notifications

_CONTROLS = re.compile(CONTROLS)
_STYLE = Path(__file__).with_name("dashboard.css").read_text("utf-8")


class Point(NamedTuple):
    """What is drawn of one frame. Rates are of the time since the frame before."""

    at: float  # monotonic
    connections: int
    held: int
    waiting: int
    commits: float | None = None
    changes: float | None = None
    hits: float | None = None


def point_of(before: Overview | None, frame: Overview, at: float) -> Point:
    waiting = sum(queue.waiting for queue in frame.queues)
    point = Point(at, frame.server.connections, frame.locks_held, waiting)
    if before is None:
        return point
    rates = rates_between(before, frame)
    changes = sum(each["changes"] for each in rates["tables"].values())
    return point._replace(commits=rates["commits"], changes=changes, hits=rates["hit_ratio"])


def _text(value: object) -> str:
    """Anything as text: escaped, on one line, isolated from what stands around it."""
    text = _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", str(value))
    if len(text) > NAME_MAX:
        text = f"{text[:NAME_MAX]}…"
    return f"<bdi>{escape(text)}</bdi>"


# -- parts ---------------------------------------------------------------------------------


def _section(table: FrameTable, above: str = "") -> str:
    """A table under its title, with its note and what stands above it."""
    names = table.head.split("|")
    kinds = ["n " * (">" in name) + "w" * ("~" in name) for name in names]

    def line(tag: str, cells: Iterable[str]) -> str:
        pairs = zip(kinds, cells, strict=True)
        return "<tr>" + "".join(f'<{tag} class="{kind}">{text}' for kind, text in pairs)

    body = "".join(
        line("td", [NONE if each is None else _text(each) for each in row]) for row in table.rows
    )
    top = line("th scope=col", [name.strip("~>") for name in names])
    shown = f"<div class=scroll><table><thead>{top}<tbody>{body}</table></div>"
    note = f"<p class=note>{table.note}</p>" if table.note else ""
    nothing = f"<p class=quiet>{table.nothing}</p>"
    return f"<section><h2>{table.title}</h2>{note}{above}{shown if body else nothing}</section>"


def _sparkline(values: Sequence[tuple[float, float]], label: str) -> str:
    """A line over time, from zero to a bit more than the largest value."""
    if len(values) < 2:
        return '<svg class=spark viewBox="0 0 120 30"><line x1=0 y1=29 x2=120 y2=29 /></svg>'
    first, last = values[0][0], values[-1][0]
    top = 1.2 * max(value for _, value in values) or 1
    points = " ".join(
        f"{(at - first) / (last - first or 1) * 120:.1f},{29 - value / top * 27:.1f}"
        for at, value in values
    )
    return (
        f'<svg class=spark viewBox="0 0 120 30" preserveAspectRatio=none role=img aria-label="{label}">'
        f'<polygon points="0,30 {points} 120,30" /><polyline points="{points}" /></svg>'
    )


def _cards(frame: Overview, points: Sequence[Point]) -> str:
    most = f"<small> of {frame.server.max_connections}</small>"
    cards: dict[str, tuple[str, Callable[[float], str]]] = {
        "Transactions": ("commits", lambda n: f"{count(n)}<small>/s</small>"),
        "Rows changed": ("changes", lambda n: f"{count(n)}<small>/s</small>"),
        "Connections": ("connections", lambda n: f"{n}{most}"),
        "Locks held": ("held", count),
        "Jobs waiting": ("waiting", count),
        "Found in memory": ("hits", lambda n: f"{n:.1%}"),
    }
    parts = []
    for title, (name, text) in cards.items():
        line = [(each.at, n) for each in points if (n := getattr(each, name)) is not None]
        value = text(line[-1][1]) if line else NONE
        parts.append(
            f"<div class=card><h2>{title}</h2><p>{value}</p>{_sparkline(line, title)}</div>"
        )
    return f"<div class=cards>{''.join(parts)}</div>"


def _attention(frame: Overview) -> Iterator[str]:
    """What needs a person, each as one sentence of markup."""
    server = frame.server
    if server.standby:
        yield "The server is a standby: it accepts no writes."
    if server.connections > FULL * server.max_connections:
        yield f"{server.connections} of {server.max_connections} connections are in use."
    if server.oldest_transaction > OLD_TRANSACTION:
        yield (
            f"A transaction has been open for {span(server.oldest_transaction)}: rows that died since "
            "cannot be reclaimed."
        )
    if server.notify_queue > QUEUE_FULL:
        yield f"The queue of notifications is {server.notify_queue:.0%} full: a listener does not read."
    for each in frame.blocked:
        if each.seconds < BLOCKED:
            continue
        yield (
            f"Process {each.pid} ({_text(each.application or 'no name')}) has waited for "
            f"{span(each.seconds)} for a lock of process {', '.join(map(str, each.blockers)) or '?'}."
        )
    for table in frame.tables:
        if table.dead > max(DEAD_ROWS, DEAD_SHARE * (table.rows + table.dead)):
            yield f"{_text(table.name)} has {count(table.dead)} dead rows: VACUUM it."
        if table.updated > HOT_UPDATES and table.hot_updated < HOT_RATIO * table.updated:
            yield (
                f"Only {share(table.hot_updated, table.updated)} of the updates of {_text(table.name)} "
                "are heap-only: see pgkv doctor."
            )
    for queue in frame.queues:
        if queue.dead:
            yield f"The queue {_text(queue.queue)} has {count(queue.dead)} dead job{'s' * (queue.dead > 1)}."
        if queue.oldest > LATE_JOB:
            yield f"A job of the queue {_text(queue.queue)} has waited for {span(queue.oldest)}."
    rows, octets = (sum(getattr(kind, of) for kind in frame.kinds) for of in ("rows", "bytes"))
    for have, most, text in (
        (rows, frame.max_entries, count),
        (octets, frame.max_bytes, size),
    ):
        if most and have > OVER * most:
            yield f"The store holds {text(have)}; its bound is {text(most)}."
    for kind, why in frame.refused.items():
        yield f"The server says nothing about {kind.replace('_', ', ')}: {_text(why)}."


def _bar(shares: Sequence[Share]) -> str:
    total = sum(each.bytes for each in shares) or 1
    x, parts, legend = 0.0, [], []
    for each in shares:
        width = 100 * each.bytes / total
        parts.append(f"<rect class={each.kind} x={x:.2f} y=0 width={width:.2f} height=10 />")
        legend.append(f"<li class={each.kind}>{KINDS[each.kind]} <b>{share(each.bytes, total)}</b>")
        x += width
    return (
        '<svg class=bar viewBox="0 0 100 10" preserveAspectRatio=none aria-hidden=true>'
        f"{''.join(parts)}</svg><ul class=legend>{''.join(legend)}</ul>"
    )


def _sections(frame: Overview, store: Any) -> Iterator[str]:
    for table in tables_of(frame, {}):
        above = ""
        if table.title == "Connections":
            pool = store.pool_stats()
            here = f"This process: {pool.size} of {pool.max_size} in its pool, {pool.idle} idle, "
            table = table._replace(note=f"{here}{pool.waiting} callers wait.")
        elif table.title == "Keys" and frame.kinds:
            above = _bar(frame.kinds)
        if table.title != "Kinds of rows" and (table.rows or table.nothing):
            yield _section(table, above)


def page(
    frame: Overview | None,
    points: Iterable[Point],
    failure: Exception | None,
    store: Any,
    nonce: str,
    paused: bool,
) -> str:
    """Return the page: the last frame, and above it why there is no newer one."""
    drawn = sorted(points)  # those of visitors at the same time come in any order
    drawn = [each for each in drawn if each.at > drawn[-1].at - HISTORY]
    table = _text(store._config.table_name)
    state, parts = "paused" if paused else "live", []
    if failure is not None:
        state = "no answer"
        last = f"The figures are {span(monotonic() - drawn[-1].at)} old. " if drawn else ""
        again = "" if paused else f"This page asks again every {RELOAD} s."
        why = _text(str(failure).partition(": ")[2] or failure)
        parts.append(
            "<section class=alert><h2>The database does not answer</h2>"
            f"<p>{last}{again}<p class=quiet>{why}</section>"
        )
    if frame is not None:
        if hints := [*_attention(frame)]:
            items = "".join(f"<li>{hint}" for hint in hints[:HINTS])
            parts.append(f"<section class=warn><h2>Needs attention</h2><ul>{items}</ul></section>")
        parts.append(_cards(frame, drawn))
        parts.append(f"<div class=grid>{''.join(_sections(frame, store))}</div>")
        server = frame.server
        about = (
            f"PostgreSQL {escape(server.version.split()[0])} · database {_text(server.database)} · role "
            f"{_text(server.role)} · up {span(server.uptime)}"
        )
        at = f"{datetime.fromtimestamp(server.now, UTC):%Y-%m-%d %H:%M:%S} UTC, in {span(frame.seconds)}"
    else:
        about, at = "", ""
    refresh = "" if paused else f"<meta http-equiv=refresh content={RELOAD}>"
    minutes = (
        f"Lines show the last {span(drawn[-1].at - drawn[0].at)} that this process saw. "
        if len(drawn) > 1
        else ""
    )
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        f'<title>{escape(store._config.table_name)} · pgkv</title><meta name=viewport content="width=device-width, initial-scale=1">'
        f'<meta name=color-scheme content="light dark">{refresh}'
        f"<meta name=robots content=noindex><style nonce={nonce}>{_STYLE}</style></head><body>"
        f"<header><h1>pgkv <span>{table}</span></h1><a class={'off' if failure else 'on'} href='?{'pause' * (not paused)}'>{state}</a>"
        f"<p>{about}</p></header><main{' class=stale' * bool(failure)}>{''.join(parts)}</main>"
        f"<footer>{at and f'As of {at}. '}{minutes}pgkv {escape(__version__)}, read only.</footer></body></html>"
    )
