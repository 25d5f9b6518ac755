"""README.md and docs/why.md: the few figures that a newcomer asks for, those of others that are better among them.

A latency has two figures: client and servers on one core, and on two.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from tests.benchmarks.case import PGKV
from tests.benchmarks.figures import LATENCY, THROUGHPUT, Result
from tests.benchmarks.placement import LINK
from tests.benchmarks.record import Record
from tests.benchmarks.table import amount


class Line(NamedTuple):
    """A row of the summary: whose figures of which case."""

    what: str
    case: str
    redis: str = ""
    other: str = ""
    called: str = ""
    ours: str = PGKV


LINES = (
    Line("get", "get", "redis-py", "pymemcache", "memcached"),
    Line("set with ttl", "set with ttl", "redis-py", "pymemcache", "memcached"),
    Line("increment", "increment", "redis-py", "pymemcache", "memcached"),
    Line("get, 8 threads", "get, 8 threads", "redis-py", "psycopg pool", "psycopg pool"),
    Line("get, 64 asyncio tasks, coalesced", "async get, 64 tasks", "redis.asyncio",
         "asyncpg pool", "asyncpg pool", ours="pgkv, coalescing"),
    Line("get_many, 100 keys", "get_many(100)", "redis-py", "libmc", "memcached"),
    Line("set_many with ttl, 100 keys (Redis: pipelined SET EX)", "set_many(100) with ttl", "redis-py pipeline of SET EX",
         "libmc", "memcached"),
    Line("pipeline of 100 operations", "pipeline of 100", "redis-py"),
    Line("rate limit, one hit", "hit, many keys", "limits, Redis"),
    Line("cached function, a hit", "cached hit, sync", "dogpile.cache", "diskcache", "diskcache"),
    Line("session, load and save", "session load + save of one field", "Flask-Session, Redis",
         "Django db sessions", "Django's, PostgreSQL"),
    Line("lock and unlock, survives a crash", "lock: acquire and release", ours=PGKV),
    Line("lock and unlock, does not", "lock: acquire and release", "redis-py",
         "advisory lock, psycopg", "advisory lock", ours="pgkv, durable=False"),
)  # fmt: skip
HEADINGS = ("pgkv", "Redis", "another")


def table(record: Record, lines: Iterable[Line] = LINES) -> str:
    """The summary as Markdown; the best figure of each row and placement is bold."""
    results: dict[str, list[Result]] = {}
    for result in record.results:
        if result.placement != LINK:
            results.setdefault(result.case, []).append(result)
    both = any(len(found) > 1 for found in results.values())
    headings = ("one core / two cores" if both else "", *HEADINGS)
    rows = (headings, (":---", "---:", "---:", "---:"), *_rows(results, lines))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _rows(results: dict[str, list[Result]], lines: Iterable[Line]) -> Iterator[tuple[str, ...]]:
    for line in lines:
        names = (line.ours, line.redis, line.other)
        parts = [_figures(result, names) for result in results[line.case]]
        unit = results[line.case][0].unit
        ours, redis, other = (
            " / ".join(filter(None, each)) + f" {'/s' if unit == THROUGHPUT else unit}"
            if any(each)
            else ""
            for each in zip(*parts, strict=True)
        )
        yield line.what, ours, redis, f"{other} ({line.called})" if other else ""


def _figures(result: Result, names: Iterable[str]) -> list[str]:
    """A figure for each name, the best one bold; empty for one that was not measured."""
    found = [result.entrants.get(name) for name in names]
    figures = [each.median for each in found if each is not None]
    best = (min if result.unit == LATENCY else max)(figures) if len(figures) > 1 else None
    texts = ["" if each is None else amount(each.median) for each in found]
    return [
        f"**{text}**" if each is not None and each.median == best else text
        for text, each in zip(texts, found, strict=True)
    ]


RATIOS = (
    ("get", PGKV, "redis-py"),
    ("set", PGKV, "redis-py"),
    ("increment", PGKV, "redis-py"),
    ("get_many(100)", PGKV, "redis-py"),
    ("pipeline of 100", PGKV, "redis-py"),
    ("set_many(100) with ttl", PGKV, "redis-py pipeline of SET EX"),
    ("cached hit, sync", PGKV, "dogpile.cache"),
    ("hit, hot key", PGKV, "limits, Redis"),
    ("session load", PGKV, "Flask-Session, Redis"),
    ("session load + save of one field", PGKV, "Flask-Session, Redis"),
    ("session rotate", PGKV, "Flask-Session, Redis"),
    ("lock: acquire and release", "pgkv, durable=False", "redis-py"),
    ("lock: acquire and release", PGKV, "redis-py"),
)


def ratios(record: Record) -> str:
    """Times of pgkv as multiples of another's, at each placement, as Markdown."""
    where = [each for each in dict.fromkeys(r.placement for r in record.results) if each]
    where = [each for each in where if each != LINK]
    found = {
        (result.case, result.placement, pair.ours, pair.against): pair.ratio.median
        for result in record.results
        for pair in result.comparisons
        if pair.ratio
    }
    lines = [("operation", "against", *where), (":---", ":---", *["---:"] * len(where))]
    for case, ours, against in RATIOS:
        cells = [found.get((case, each, ours, against)) for each in where]
        texts = ["" if each is None else f"{each:.2f}" for each in cells]
        lines.append((case + ours.removeprefix(PGKV), against, *texts))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
