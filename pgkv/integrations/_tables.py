"""What an `Overview` says, as tables of text: `pgkv top` and the dashboard show the same ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from ..patterns.cache.function import cached_functions
from ..patterns.overview import Overview, Share

ESTIMATES = "Estimates, by a sample of the table."
KINDS = {
    "key": "keys",
    "function": "cached results",
    "limiter": "rate limiter buckets",
    "cache": "cache tags",
}


class FrameTable(NamedTuple):
    """A table. In its head ``>`` is before a column of numbers, ``~`` before one that a phone leaves
    out. A cell of None has nothing to say."""

    title: str
    head: str
    rows: Sequence[Sequence[str | None]]
    nothing: str = ""  # said in place of a table without rows
    note: str = ""


# -- texts ---------------------------------------------------------------------------------


def count(number: float, about: bool = False) -> str:
    """Return a number with at most four digits, and a sign before an estimate."""
    text = f"{number:,.0f}"
    for unit, divisor in (("k", 1e3), ("M", 1e6), ("G", 1e9)):
        if number >= max(10_000, 0.9995 * divisor):
            text = f"{number / divisor:.3g} {unit}"
    return f"≈ {text}" if about and number else text


def size(octets: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if octets < 1000:
            return f"{octets:.3g} {unit}"
        octets /= 1024
    return f"{octets:.3g} TB"


def span(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    for most, length, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < most:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86_400:.0f} days"


def share(part: float | None, whole: float = 1.0) -> str | None:
    return None if part is None or not whole else f"{part / whole:.0%}"


# -- tables --------------------------------------------------------------------------------


def tables_of(frame: Overview, rates: dict[str, Any]) -> Iterator[FrameTable]:
    """Return the tables of a frame; those that only some have are left out where they are empty.

    Args:
        frame: what the server said.
        rates: the ``tables`` of `rates_between` the frame before and this one.
    """
    sampled = {table.kind for table in frame.tables if table.sampled}
    about = "store" in sampled

    def parts(title: str, head: str, of: Sequence[Share], name: Callable[[Share], str], nothing: str
    ) -> FrameTable:  # fmt: skip
        rows = [
            (name(each), count(each.rows, about), size(each.bytes), share(each.expired, each.rows))
            for each in of
        ]
        return FrameTable(title, f"{head}|>rows|>size|>~expired", rows, nothing, ESTIMATES * about)

    def named(each: Share) -> str:
        return each.name or "other keys"

    tables = [
        (
            each.name.strip('"') + " (unlogged)" * each.unlogged,
            count(each.rows, about=True),
            size(each.bytes),
            size(each.index_bytes),
            share(each.dead, each.dead + each.rows),
            f"{now['changes']:,.1f}" if (now := rates.get(each.kind)) else None,
            share(now["hot"]) if now else share(each.hot_updated, each.updated),
            "never" if each.vacuumed is None else f"{span(each.vacuumed)} ago",
        )
        for each in frame.tables
    ]
    head = "table|>rows|>size|>indexes|>~dead|>~writes/s|>~heap-only|>~vacuumed"
    yield FrameTable("Tables", head, tables, "The store has no table yet.")
    yield FrameTable("Not readable", "tables|why", [*frame.refused.items()])
    yield parts("Kinds of rows", "kind", frame.kinds, lambda each: KINDS[each.kind], "")
    yield parts("Keys", "begin with", frame.keys, named, "There are no keys.")
    queues = [
        (
            each.queue,
            *map(count, (each.waiting, each.delayed, each.running, each.dead)),
            span(each.oldest) if each.waiting else None,
        )
        for each in frame.queues
    ]
    head = "queue|>waiting|>~delayed|>running|>dead|>oldest"
    note = ESTIMATES * any(kind.startswith("jobs") for kind in sampled)
    yield FrameTable("Queues", head, queues, "No queue has jobs.", note)
    locks = [
        (
            each.name + ("" if each.slot is None else f" [{each.slot}]"),
            each.owner,
            span(each.age),
            span(max(0.0, each.remaining)),
            count(each.waiters),
        )
        for each in frame.locks
    ]
    head = "lock|~holder|>held for|>ends in|>waiting"
    more = f"The {len(locks)} oldest of {count(frame.locks_held)}."
    yield FrameTable(
        "Locks", head, locks, "No lock is held.", more * (frame.locks_held > len(locks))
    )
    blocked = [
        (str(each.pid), each.application, each.waits_for, span(each.seconds), str(each.blockers))
        for each in frame.blocked
    ]
    yield FrameTable("Waiting for the server", "pid|application|waits for|>for|blocked by", blocked)
    yield _functions(frame, about)
    nothing = "No limiter has a bucket that is not full."
    yield parts("Rate limiters", "limiter", frame.limiters, named, nothing)
    counts: list[Sequence[str | None]] = []
    if (some := frame.sessions) is not None:
        live, user, expired = map(count, (some.live, some.with_user, some.expired))
        counts.append(("sessions", live, user, None, expired))
    if (ids := frame.idempotency) is not None:
        done, running, expired = map(count, (ids.done, ids.running, ids.expired))
        counts.append(("idempotency keys", done, None, running, expired))
    note = ESTIMATES * bool(sampled & {"sessions", "idempotency"})
    title = "Sessions and idempotency keys"
    yield FrameTable(title, "|>live|>~with user|>running|>expired", counts, note=note)
    connections = [
        (each.application or "no name", each.state, count(each.count), span(each.longest))
        for each in frame.connections
    ]
    head, nothing = (
        "application|state|>connections|>~longest",
        "There is no other connection to this database.",
    )
    yield FrameTable("Connections", head, connections, nothing)


def _functions(frame: Overview, about: bool) -> FrameTable:
    """The cached functions, with the calls that this process has made."""
    entries = {str(each.name): each for each in frame.functions}
    calls = {each.name: each.cache_info() for each in cached_functions()}
    rows = []
    for name in sorted({*entries, *calls}):
        kept, info = entries.get(name), calls.get(name)
        hits = info.hits + info.stale_hits if info else 0
        rows.append(
            (
                name,
                count(kept.rows, about) if kept else None,
                size(kept.bytes) if kept else None,
                count(hits) if info else None,
                share(hits, hits + info.misses) if info else None,
            )
        )
    head = "function|>entries|>size|>~hits here|>ratio here"
    note = "Hits and their ratio are those of this process." * bool(calls)
    return FrameTable("Cached functions", head, rows, "There is none.", note)
