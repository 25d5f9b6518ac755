"""Keeping a table within its bound: which keys were read, how full the table is, and when to evict.

No caller waits for it: the collector runs these flows in the background, and `evict_all` in the caller's
own time. The bound is on an estimate; see `_sql.evict`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import Any

from .. import _observe
from .._ops.op import Flow, Noted, do
from .._sql.evict import PLACE_PAGES, PLACE_PAGES_MAX, PLACES, EvictStatements
from ..errors import QueryError
from ..types import Stats
from . import schema as _schema

MARKS = 100  # keys written together, at most
RECENT = 512  # keys of this process that need no second mark
ROUND_ROWS = 2_000
QUOTA_MAX = 1_000_000  # rows
SAMPLE_ROWS = 1_000  # below this the places of a sample grow
VACUUM_AGAIN = 2.0  # seconds
PAGE_BYTES = 8192
KEPT_AGAIN = 60.0  # seconds between two warnings


class Evictor:
    """What one process knows of one bounded table."""

    def __init__(self, sql: EvictStatements) -> None:
        self._sql = sql
        most = sql.config.max_entries or 100 * MARKS
        # Of a small table few rows are marked before they go: they are written sooner.
        self._batch, self._recent_max = min(MARKS, most // 50), min(RECENT, most // 10)
        self.reset()

    def reset(self) -> None:
        """Forget everything, as a forked child must."""
        self.evicted: int = 0  # rows, in this process's life
        self._used: deque[bytes] = deque(maxlen=10 * MARKS)
        self._recent: dict[bytes, None] = {}
        self._quota = 0  # rows to evict
        self._pages: int | None = None
        self._width = PLACE_PAGES
        self._density: tuple[float, float] | None = None  # rows and bytes on a page
        self._vacuum_at = self._warn_at = 0.0

    @property
    def is_due(self) -> bool:
        """Whether there is something to do."""
        return self._quota > 0 or len(self._used) >= self._batch

    @property
    def estimate(self) -> int | None:
        """How many rows the table has by the last samples; None before the first."""
        return None if self._density is None else round(self._density[0] * (self._pages or 0))

    def note(self, noted: Noted, key: bytes) -> None:
        """Hear of rows that were written, or of a key that was read."""
        if noted.rows:
            self._quota = min(self._quota + noted.rows, QUOTA_MAX)
        elif key not in self._recent:
            self._recent[key] = None
            self._used.append(key)
            if len(self._recent) > self._recent_max:
                self._recent.pop(next(iter(self._recent)), None)

    def work(self) -> Flow[None]:
        """Write marks and evict, as far as it is due."""
        if len(self._used) >= self._batch:
            keys = [self._used.popleft() for _ in range(self._batch)]
            yield from self._with_column(lambda: do(self._sql.mark(keys)))
        if self._quota > 0:
            quota, self._quota = self._quota, 0
            yield from self.evict(quota)

    def evict(self, quota: int) -> Flow[int]:
        """Evict at most that many rows, and stop where the bound holds; how many were evicted."""
        evicted = 0
        while evicted < quota:
            rows = min(ROUND_ROWS, quota - evicted)
            deleted = yield from self._with_column(partial(self._round, rows))
            if deleted:
                _observe.event("pgkv.evict.evicted", table=self._sql.table.name, rows=deleted)
            evicted += deleted
            self.evicted += deleted
            if not deleted:
                break
        return evicted

    def _round(self, quota: int) -> Flow[int]:
        sql = self._sql
        if self._pages is None:
            self._pages = yield from do(sql.pages())
        pages, width = self._pages, self._width
        rows, size = self._density or (None, None)
        sample = yield from do(sql.evict(pages, width, quota, rows, size))
        sampled = PLACES * width if pages > PLACES * width else max(1, sample.pages)
        seen = sample.rows / sampled, sample.bytes / sampled
        if self._density is not None and pages > PLACES * width and sample.pages >= pages // 2:
            old = self._density
            seen = (3 * old[0] + seen[0]) / 4, (3 * old[1] + seen[1]) / 4
        self._density = seen
        self._pages = sample.pages
        if sample.rows < SAMPLE_ROWS and pages > PLACES * width:
            self._width = min(PLACE_PAGES_MAX, width * 2)
        elif sample.rows > 4 * SAMPLE_ROWS:
            self._width = max(PLACE_PAGES, width // 2)
        now = monotonic()
        if sample.kept > sample.rows / 2 and now >= self._warn_at:
            self._warn_at = now + KEPT_AGAIN
            _observe.warning("pgkv.evict.kept", table=sql.t, kept=sample.kept, rows=sample.rows)
        needed = seen[1] * sample.pages / PAGE_BYTES
        if sample.deleted and sample.pages > 2 * needed + PLACES and now >= self._vacuum_at:
            self._vacuum_at = now + VACUUM_AGAIN
            yield from do(sql.vacuum_idle())
        return sample.deleted

    def _with_column(self, flow: Callable[[], Flow[int]]) -> Flow[int]:
        """Run a flow; a table that was made without a bound gets its column first."""
        try:
            return (yield from flow())
        except QueryError as error:
            if error.sqlstate != "42703":
                raise
        yield from _schema.ensure(self._sql.table)
        return (yield from flow())


def evictor_of(channel: Any, sql: EvictStatements) -> Evictor | None:
    """What this process's collector knows of the table; None inside a transaction."""
    collector = getattr(channel, "_collectors", {}).get(sql.table)
    return None if collector is None else collector.evictor


def evict_all(sql: EvictStatements, channel: Any) -> Flow[int]:
    """Evict until the bound holds; how many rows. It starts from no estimate of before."""
    evictor = Evictor(sql)
    while (yield from evictor.evict(QUOTA_MAX)):
        pass
    if (own := evictor_of(channel, sql)) is not None:
        own.evicted += evictor.evicted
        own._density, own._pages = evictor._density, evictor._pages
    return evictor.evicted


def bounded(stats: Stats, sql: EvictStatements, channel: Any) -> Stats:
    """Add what is known of the bound."""
    own = evictor_of(channel, sql)
    return replace(
        stats,
        max_entries=sql.config.max_entries,
        max_bytes=sql.config.max_bytes,
        estimated_keys=None if own is None else own.estimate,
        evicted_keys=0 if own is None else own.evicted,
    )
