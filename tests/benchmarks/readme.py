"""README.md: the few figures that a newcomer asks for, those of others that are better among them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from tests.benchmarks.case import PGKV
from tests.benchmarks.figures import LATENCY, Result
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
HEADINGS = ("", "pgkv", "Redis", "another")


def table(record: Record, lines: Iterable[Line] = LINES) -> str:
    """The summary as Markdown; the best figure of each row is bold."""
    results = {result.case: result for result in record.results}
    rows = (HEADINGS, (":---", "---:", "---:", "---:"), *_rows(results, lines))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _rows(results: dict[str, Result], lines: Iterable[Line]) -> Iterator[tuple[str, ...]]:
    for line in lines:
        result = results[line.case]
        names = (line.ours, line.redis, line.other)
        figures = [
            result.entrants[name].median if name in result.entrants else None for name in names
        ]
        measured = [figure for figure in figures if figure is not None]
        best = min(measured) if result.unit == LATENCY else max(measured)
        cells = (
            _cell(each, result.unit, best=each == best and len(measured) > 1) for each in figures
        )
        ours, redis, other = cells
        yield line.what, ours, redis, f"{other} ({line.called})" if other else ""


def _cell(figure: float | None, unit: str, *, best: bool) -> str:
    if figure is None:
        return ""
    text = f"{amount(figure)} {unit}" if unit == LATENCY else f"{amount(figure)} /s"
    return f"**{text}**" if best else text
