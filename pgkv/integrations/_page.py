"""The dashboard's page: HTML of an `Overview`, whose every name is text and never markup."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from html import escape
from time import monotonic
from typing import Any, NamedTuple, TypeAlias

from .. import __version__
from .._observe import CONTROLS
from ..patterns.cache.decorator import cached_functions
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

RELOAD = 5  # seconds
HISTORY = 600.0  # seconds that are drawn
HINTS = 12
NONE = "\N{EN DASH}"
NAME_MAX = 100  # characters of a name
BLOCKED, LATE_JOB = 1.0, 60.0  # seconds from which a wait is told
FULL, QUEUE_FULL = 0.9, 0.5  # of the connections, of the queue of notifications

_CONTROLS = re.compile(CONTROLS)
KINDS = {
    "key": "keys",
    "function": "cached results",
    "limiter": "rate limiter buckets",
    "cache": "cache tags",
}


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
    """Return what is drawn of a frame."""
    waiting = sum(queue.waiting for queue in frame.queues)
    point = Point(at, frame.server.connections, frame.locks_held, waiting)
    if before is None:
        return point
    rates = rates_between(before, frame)
    changes = sum(each["changes"] for each in rates["tables"].values())
    return point._replace(commits=rates["commits"], changes=changes, hits=rates["hit_ratio"])


# -- texts ---------------------------------------------------------------------------------


def _count(number: float, about: bool = False) -> str:
    """A number with at most four digits, and a sign before an estimate."""
    text = f"{number:,.0f}"
    for unit, divisor in (("k", 1e3), ("M", 1e6), ("G", 1e9)):
        if number >= max(10_000, 0.9995 * divisor):
            text = f"{number / divisor:.3g} {unit}"
    return f"≈ {text}" if about and number else text


def _size(octets: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if octets < 1000:
            return f"{octets:.3g} {unit}"
        octets /= 1024
    return f"{octets:.3g} TB"


def _span(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    for most, length, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < most:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86_400:.0f} days"


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else NONE


def _text(value: object) -> str:
    """Anything as text: escaped, on one line, isolated from what stands around it."""
    text = _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", str(value))
    if len(text) > NAME_MAX:
        text = f"{text[:NAME_MAX]}…"
    return f"<bdi>{escape(text)}</bdi>"


# -- parts ---------------------------------------------------------------------------------


Cell: TypeAlias = "str | int | None"  # markup, a count, or nothing to say


def _table(head: str, rows: Iterable[Sequence[Cell]], nothing: str = "") -> str:
    """A table. In its head ``>`` is before a column of numbers, ``~`` before one that a phone leaves
    out."""
    kinds = ["n " * (">" in name) + "w" * ("~" in name) for name in head.split("|")]

    def line(tag: str, cells: Iterable[Cell]) -> str:
        texts = (
            NONE if each is None else each if isinstance(each, str) else _count(each)
            for each in cells
        )
        pairs = zip(kinds, texts, strict=True)
        return "<tr>" + "".join(f'<{tag} class="{kind}">{text}' for kind, text in pairs)

    body = "".join(line("td", row) for row in rows)
    if not body:
        return f"<p class=quiet>{nothing}</p>"
    top = line("th scope=col", re.sub("[>~]", "", head).split("|"))
    return f"<div class=scroll><table><thead>{top}<tbody>{body}</table></div>"


def _section(title: str, body: str, note: str = "") -> str:
    note = f"<p class=note>{note}</p>" if note else ""
    return f"<section><h2>{title}</h2>{note}{body}</section>"


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
        "Transactions": ("commits", lambda n: f"{_count(n)}<small>/s</small>"),
        "Rows changed": ("changes", lambda n: f"{_count(n)}<small>/s</small>"),
        "Connections": ("connections", lambda n: f"{n}{most}"),
        "Locks held": ("held", _count),
        "Jobs waiting": ("waiting", _count),
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
            f"A transaction has been open for {_span(server.oldest_transaction)}: rows that died since "
            "cannot be reclaimed."
        )
    if server.notify_queue > QUEUE_FULL:
        yield f"The queue of notifications is {server.notify_queue:.0%} full: a listener does not read."
    for each in frame.blocked:
        if each.seconds < BLOCKED:
            continue
        yield (
            f"Process {each.pid} ({_text(each.application or 'no name')}) has waited for "
            f"{_span(each.seconds)} for a lock of process {', '.join(map(str, each.blockers)) or '?'}."
        )
    for table in frame.tables:
        if table.dead > max(DEAD_ROWS, DEAD_SHARE * (table.rows + table.dead)):
            yield f"{_text(table.name)} has {_count(table.dead)} dead rows: VACUUM it."
        if table.updated > HOT_UPDATES and table.hot_updated < HOT_RATIO * table.updated:
            yield (
                f"Only {_share(table.hot_updated, table.updated)} of the updates of {_text(table.name)} "
                "are heap-only: see pgkv doctor."
            )
    for queue in frame.queues:
        if queue.dead:
            yield f"The queue {_text(queue.queue)} has {_count(queue.dead)} dead job{'s' * (queue.dead > 1)}."
        if queue.oldest > LATE_JOB:
            yield f"A job of the queue {_text(queue.queue)} has waited for {_span(queue.oldest)}."
    rows, size = (sum(getattr(kind, of) for kind in frame.kinds) for of in ("rows", "bytes"))
    for have, most, text in (
        (rows, frame.max_entries, _count),
        (size, frame.max_bytes, _size),
    ):
        if most and have > OVER * most:
            yield f"The store holds {text(have)}; its bound is {text(most)}."
    for kind, why in frame.refused.items():
        yield f"The server says nothing about {kind.replace('_', ', ')}: {_text(why)}."


def _bar(shares: Sequence[Share]) -> str:
    """What the store's table holds, as parts of one bar by their bytes, with its legend."""
    total = sum(each.bytes for each in shares) or 1
    x, parts, legend = 0.0, [], []
    for each in shares:
        width = 100 * each.bytes / total
        parts.append(f"<rect class={each.kind} x={x:.2f} y=0 width={width:.2f} height=10 />")
        legend.append(
            f"<li class={each.kind}>{KINDS[each.kind]} <b>{_share(each.bytes, total)}</b>"
        )
        x += width
    return (
        '<svg class=bar viewBox="0 0 100 10" preserveAspectRatio=none aria-hidden=true>'
        f"{''.join(parts)}</svg><ul class=legend>{''.join(legend)}</ul>"
    )


def _sections(frame: Overview, store: Any) -> Iterator[str]:
    sampled = {table.kind for table in frame.tables if table.sampled}
    about = "store" in sampled
    note = "Estimates, by a sample of the table." * about

    def shares(of: Sequence[Share], head: str, nothing: str) -> str:
        rows = (
            (
                _text(each.name) if each.name else "<i>other keys</i>",
                _count(each.rows, about),
                _size(each.bytes),
                _share(each.expired, each.rows),
            )
            for each in of
        )
        return _table(f"{head}|>rows|>size|>~expired", rows, nothing)

    tables = (
        (
            _text(each.name.strip('"')) + " <small>unlogged</small>" * each.unlogged,
            _count(each.rows, about=True),
            _size(each.bytes),
            _size(each.index_bytes),
            _share(each.dead, each.dead + each.rows),
            _share(each.hot_updated, each.updated),
            "never" if each.vacuumed is None else f"{_span(each.vacuumed)} ago",
        )
        for each in frame.tables
    )
    head = "table|>rows|>size|>indexes|>~dead|>~heap-only|>~vacuumed"
    yield _section("Tables", _table(head, tables, "The store has no table yet."))
    if frame.kinds:
        keys = shares(frame.keys, "begin with", "There are no keys.")
        yield _section("Keys", _bar(frame.kinds) + keys, note)
    queues = (
        (
            _text(each.queue),
            each.waiting,
            each.delayed,
            each.running,
            f"<b class=bad>{_count(each.dead)}</b>" if each.dead else 0,
            _span(each.oldest) if each.waiting else None,
        )
        for each in frame.queues
    )
    head = "queue|>waiting|>~delayed|>running|>dead|>oldest"
    yield _section(
        "Queues",
        _table(head, queues, "No queue has jobs."),
        "Estimates, by a sample of the table." * any(kind.startswith("jobs") for kind in sampled),
    )
    locks = (
        (
            _text(each.name) + ("" if each.slot is None else f" <small>slot {each.slot}</small>"),
            _text(each.owner),
            _span(each.age),
            _span(max(0.0, each.remaining)),
            each.waiters,
        )
        for each in frame.locks
    )
    head = "lock|~holder|>held for|>ends in|>waiting"
    more = f"The {len(frame.locks)} oldest of {_count(frame.locks_held)}."
    yield _section(
        "Locks",
        _table(head, locks, "No lock is held."),
        more * (frame.locks_held > len(frame.locks)),
    )
    entries = {str(each.name): each for each in frame.functions}
    calls = {each.name: each.cache_info() for each in cached_functions()}
    functions: list[tuple[Cell, ...]] = []
    for name in sorted({*entries, *calls}):
        kept, info = entries.get(name), calls.get(name)
        hits = info.hits + info.stale_hits if info else 0
        functions.append(
            (
                _text(name),
                _count(kept.rows, about) if kept else None,
                _size(kept.bytes) if kept else None,
                hits if info else None,
                _share(hits, hits + info.misses) if info else None,
            )
        )
    yield _section(
        "Cached functions",
        _table("function|>entries|>size|>~hits here|>ratio here", functions, "There is none."),
        "Hits and their ratio are those of this process." * bool(calls),
    )
    limiters = shares(frame.limiters, "limiter", "No limiter has a bucket that is not full.")
    yield _section("Rate limiters", limiters, note)
    counts: list[tuple[Cell, ...]] = []
    if (some := frame.sessions) is not None:
        counts.append(("sessions", some.live, some.with_user, None, some.expired))
    if (ids := frame.idempotency) is not None:
        counts.append(("idempotency keys", ids.done, None, ids.running, ids.expired))
    if counts:
        title = "Sessions and idempotency keys"
        body = _table("|>live|>~with user|>running|>expired", counts)
        estimates = "Estimates, by a sample." * bool(sampled & {"sessions", "idempotency"})
        yield _section(title, body, estimates)
    connections = (
        (_text(each.application or "no name"), _text(each.state), each.count, _span(each.longest))
        for each in frame.connections
    )
    head = "application|state|>connections|>~longest"
    pool = store.pool_stats()
    yield _section(
        "Connections",
        _table(head, connections, "There is no other connection to this database."),
        f"This process: {pool.size} of {pool.max_size} in its pool, {pool.idle} idle, {pool.waiting} "
        "callers wait.",
    )


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
        last = f"The figures are {_span(monotonic() - drawn[-1].at)} old. " if drawn else ""
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
            f"{_text(server.role)} · up {_span(server.uptime)}"
        )
        at = f"{datetime.fromtimestamp(server.now, UTC):%Y-%m-%d %H:%M:%S} UTC, in {_span(frame.seconds)}"
    else:
        about, at = "", ""
    refresh = "" if paused else f"<meta http-equiv=refresh content={RELOAD}>"
    minutes = (
        f"Lines show the last {_span(drawn[-1].at - drawn[0].at)} that this process saw. "
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


_STYLE = """
:root{--bg:#f6f7f9;--card:#fff;--ink:#1b2430;--soft:#5d6b7c;--line:#e3e7ec;--blue:#2563c9;--fill:#2563c91f;
--green:#1a7f4b;--red:#b3261e;--amber:#8a5a00;--key:#2563c9;--function:#12946f;--limiter:#c77700;--cache:#8a63d2}
@media(prefers-color-scheme:dark){:root{--bg:#10151c;--card:#18202a;--ink:#e6ebf1;--soft:#93a1b2;--line:#283342;
--blue:#6ea8ff;--fill:#6ea8ff26;--green:#5ccb94;--red:#ff8a80;--amber:#f0b95a;--key:#6ea8ff;--function:#42c9a0;
--limiter:#f0a94a;--cache:#b196f0}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:88rem;padding:1.25rem clamp(.75rem,3vw,2rem);background:var(--bg);color:var(--ink);
font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
header{display:flex;flex-wrap:wrap;align-items:baseline;gap:.25rem .75rem;margin-bottom:1rem}
h1{font-size:1.35rem;margin:0}h1 span{font-weight:400;color:var(--soft)}
header p{margin:0 0 0 auto;color:var(--soft);font-size:.87rem}
header a{text-decoration:none;font-size:.8rem;font-weight:600;padding:.05rem .6rem;border-radius:1rem;border:1px solid currentColor}
.on{color:var(--green)}.off,.bad{color:var(--red)}
h2{font-size:1rem;margin:0 0 .5rem}.card h2{font-size:.8rem;font-weight:500;margin:0;color:var(--soft)}
section,.card{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.9rem 1rem;min-width:0}
.alert,.warn{margin-bottom:1rem;border-left:.3rem solid var(--red)}.warn{border-left-color:var(--amber)}
.alert p,.warn ul{margin:.2rem 0 0}.warn ul{padding-left:1.1rem}
.stale>:not(.alert){opacity:.65}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(10rem,1fr));gap:.75rem;margin-bottom:.75rem}
.card p{font-size:1.5rem;font-weight:600;margin:.1rem 0 .3rem;font-variant-numeric:tabular-nums;white-space:nowrap}
small{font-size:.8rem;font-weight:400;color:var(--soft)}
.spark{display:block;width:100%;height:30px;overflow:visible}
.spark polyline,.spark line{fill:none;stroke:var(--blue);stroke-width:1.5;vector-effect:non-scaling-stroke}
.spark line{stroke:var(--line)}.spark polygon{fill:var(--fill)}
.grid{columns:2 34rem;column-gap:.75rem}.grid section{break-inside:avoid;margin-bottom:.75rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th{text-align:left;font-weight:500;font-size:.8rem;color:var(--soft);padding:.2rem .6rem .3rem 0;white-space:nowrap}
td{padding:.28rem .6rem .28rem 0;border-top:1px solid var(--line);overflow-wrap:anywhere;vertical-align:top}
.n{text-align:right;white-space:nowrap}th:last-child,td:last-child{padding-right:0}td:first-child{min-width:6.5rem}
.note,.quiet,footer{color:var(--soft);font-size:.87rem}.note{margin:-.3rem 0 .5rem}.quiet{margin:0}
.bar{display:block;width:100%;height:10px;border-radius:5px;margin-bottom:.5rem}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1rem;list-style:none;margin:0 0 .5rem;padding:0;font-size:.87rem}
.legend li::before{content:"";display:inline-block;width:.65rem;height:.65rem;border-radius:.2rem;margin-right:.4rem;
background:currentColor}.legend li::before{background:var(--c)}
.key{--c:var(--key);fill:var(--key)}.function{--c:var(--function);fill:var(--function)}
.limiter{--c:var(--limiter);fill:var(--limiter)}.cache{--c:var(--cache);fill:var(--cache)}
footer{margin-top:.5rem}
@media(max-width:40rem){.w{display:none}header p{margin-left:0;width:100%}
.cards{grid-template-columns:1fr 1fr}.card p{font-size:1.25rem}section,.card{padding:.7rem .8rem}}
"""
