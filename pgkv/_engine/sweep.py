"""Collecting rows whose time has passed. It frees space and changes no answer: reads and writes
judge expiry by themselves.

The work is a flow, run in the background by a thread or a task; it never waits for
locks, and its failures are only logged. Chunks are ranges of row addresses,
because any index on ``expires_at`` would end heap-only updates.
"""

from __future__ import annotations

import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

from .. import _observe
from .._fork import new_lock
from .._ops.codec import whole
from .._ops.op import Flow, Noted, do, pause
from .._sql.evict import EvictStatements
from .._sql.sweep import SWEEP_PAGES, Sweep
from ..config import TtlCleanupStrategy
from ..errors import PgkvError
from .evict import Evictor

SWEEP_CHANCE = 1 / 256  # of a write being followed by a sweep of one chunk
QUEUE_MAX = 10_000  # keys remembered for deletion; beyond them the oldest are left to sweeps
BATCH_KEYS = 500
QUIET_TIME = 0.1  # seconds without sweeps after a chunk that held nothing expired
BATCH_DELAY = 0.02  # seconds for which a first key waits for company
PATROL_PAUSE = 1.0  # seconds between chunks while few rows are expired
PATROL_HURRY = 0.01  # seconds between chunks while more than a quarter are
PATROL_RETRY = 10.0  # seconds after a failure
EXPIRED_SHARE = 0.25
PATROL_EVICTS = 1_000  # rows after each chunk, where the table exceeds its bound


class Collector:
    """What one process knows of one table's expired rows, and the flows that remove them.

    Args:
        sql: the table's statements.
        background: starts a flow that nothing waits for, and calls a function when it has ended
            in any way, also where it never began.
    """

    def __init__(
        self, sql: Sweep, background: Callable[[Flow[None], Callable[[], None]], None]
    ) -> None:
        self._sql = sql
        self._background = background
        self._lock = new_lock(self)
        self.evictor: Evictor | None = None
        if isinstance(sql, EvictStatements) and sql.config.bounded:
            self.evictor = Evictor(sql)
        self.reset()

    def reset(self) -> None:
        """Forget everything, as a forked child must."""
        self._keys: deque[bytes] = deque(maxlen=QUEUE_MAX)
        self._sweeps = 0
        self._page = 0
        self._quiet_until = 0.0
        self._working: object | None = None
        self._patrolling = False
        if self.evictor is not None:
            self.evictor.reset()

    def note(self, noted: Noted, key: bytes) -> None:
        """Hear of what was read or written in a bounded table."""
        strategy = self._sql.config.ttl_cleanup_strategy
        if self.evictor is None or strategy is TtlCleanupStrategy.MANUAL:
            return
        self.evictor.note(noted, key)
        if self.evictor.is_due:
            self._start()

    def collect(self, keys: Sequence[bytes]) -> None:
        """Have those keys deleted soon, if they are still expired then."""
        self._keys.extend(keys)
        self._start()

    def sweep(self) -> None:
        """Have the next chunk swept soon, where the strategy is ON_READ."""
        if not self._sql.collects or monotonic() < self._quiet_until:
            return
        self._sweeps = 1  # sweeps asked for while one waits are one
        self._start()

    def start_patrol(self) -> None:
        """Begin to sweep for ever, where the strategy is BACKGROUND."""
        if self._sql.config.ttl_cleanup_strategy is not TtlCleanupStrategy.BACKGROUND:
            return
        with self._lock:
            if self._patrolling:
                return
            self._patrolling = True
        self._background(self._patrol(), self._patrol_ended)

    def _patrol_ended(self) -> None:
        self._patrolling = False

    def _start(self) -> None:
        with self._lock:
            if self._working:
                return
            self._working = work = object()
        self._background(self._work(), lambda: self._work_ended(work))

    def _work_ended(self, work: object) -> None:
        with self._lock:
            if self._working is work:
                self._working = None

    def _work(self) -> Flow[None]:
        try:
            if self.evictor is None or not self.evictor.is_due:
                yield from pause(BATCH_DELAY)
            while True:
                while self._keys:
                    self._swept((yield from do(self._sql.collect(self._take()))))
                if self._sweeps:
                    # Batches write faster than sweeps are asked for.
                    self._sweeps = 0
                    if (yield from self._chunk(alone=False)) > EXPIRED_SHARE:
                        self._sweeps = 1
                        yield from pause(PATROL_HURRY)
                while self.evictor is not None and self.evictor.is_due:
                    yield from self.evictor.work()
                with self._lock:
                    if not (self._keys or self._sweeps or (self.evictor and self.evictor.is_due)):
                        self._working = None
                        return
        except PgkvError as error:
            _observe.debug("pgkv.sweep.failed", table=self._sql.t, error=type(error).__name__)

    def _swept(self, rows: int) -> None:
        if rows:
            _observe.event("pgkv.sweep.swept", table=self._sql.table.name, rows=rows)

    def _take(self) -> list[bytes]:
        keys: list[bytes] = []
        while self._keys and len(keys) < BATCH_KEYS:
            keys.append(self._keys.popleft())
        return keys

    def _chunk(self, *, alone: bool) -> Flow[float]:
        """Sweep the next chunk; the share of its rows that were expired."""
        page = self._page
        op = self._sql.sweep_alone(page) if alone else self._sql.sweep(page)
        deleted, seen, pages = yield from do(op)
        self._swept(deleted)
        following = page + SWEEP_PAGES
        self._page = following if following < pages else 0
        if not deleted:
            # A busy table without expired rows would otherwise be read over and over.
            self._quiet_until = monotonic() + QUIET_TIME
        return deleted / seen if seen else 0.0

    def _patrol(self) -> Flow[None]:
        """Sweep for ever: slowly, and faster while it pays. Ended by its driver."""
        while True:
            try:
                share = yield from self._chunk(alone=True)
                if self.evictor is not None:
                    yield from self.evictor.evict(PATROL_EVICTS)
            except PgkvError as error:
                _observe.debug("pgkv.sweep.failed", table=self._sql.t, error=type(error).__name__)
                yield from pause(PATROL_RETRY)
                continue
            yield from pause(PATROL_HURRY if share > EXPIRED_SHARE else PATROL_PAUSE)


def weakly(method: Callable[..., None]) -> Callable[..., None]:
    """Return a function that calls the method for as long as its object lives."""
    ref = weakref.WeakMethod(method)

    def call(*args: Any) -> None:
        bound = ref()
        if bound is not None:
            bound(*args)

    return call


def warn_dropped() -> None:
    """Warn of a store that was dropped while its sweeps went on."""
    warnings.warn(
        "a store was dropped without close(); its background work was stopped",
        ResourceWarning,
        stacklevel=2,
    )


def sweep_all(
    sql: Sweep, limit: int | None, progress: Callable[[int, int], object] | None = None
) -> Flow[int]:
    """Sweep the whole table once, chunk by chunk, or until `limit` rows are gone.

    `progress` gets the pages done and the total pages after each chunk.
    """
    limit = None if limit is None else whole("limit", limit, 0)
    pages = yield from do(sql.pages())
    removed = 0
    for page in range(0, pages, SWEEP_PAGES):
        left = None if limit is None else limit - removed
        if left is not None and left <= 0:
            break
        deleted, _, _ = yield from do(sql.sweep(page, left))
        removed += deleted
        if progress is not None:
            progress(min(page + SWEEP_PAGES, pages), pages)
    return removed
