"""Renewal: one thread for each process and database, one task for each event loop and database.

All leases of all stores on a database are renewed by one statement, over a connection of its own
(an application that exhausts its pool must not lose its locks by that), each at a third of its own
ttl. A failure is repeated until the trust in a lease ends; then its holder is told, whether or not
the network has said anything: the watch never waits for a statement.

Threads are served by an event loop in a thread, so this is written once.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Coroutine
from random import uniform
from time import monotonic
from typing import Any, TypeVar

import psycopg

from ... import _observe
from ..._engine._async.connection import AsyncPgConnection, Watchdog
from ..._ops.op import Op
from ...errors import OperationTimeoutError, PgkvError, translate
from .lease import REASON_OF, LeaseState, clock, retry_pause
from .sql import CLEAN_PAGES, LOCKED, RENEWED, LockStatements

LOOK_MAX = 1.0  # seconds between looks at the clock: a suspended machine's timers are late
BATCH_MAX = 1000  # leases in one statement
CLEAN_PAUSE = 60.0  # seconds between two chunks of cleaning
CLEAN_TIME = 5.0  # seconds for one
SEND_MAX = 10.0  # seconds for one renewal, should every lease allow that much
SEND_MIN = 0.3  # seconds for one, if the leases have that much left
WARM_PAUSE = 1.0  # seconds between attempts to have a connection before it is needed
STOP_TIME = 5.0  # seconds for the thread to end

T = TypeVar("T")


class OwnLink:
    """A connection beside every pool, opened at first use and again when it breaks.

    Args:
        conninfo: for libpq.
        prepares: keep prepared statements on it.
    """

    def __init__(self, conninfo: str, *, prepares: bool) -> None:
        self._conninfo = conninfo
        self._prepares = prepares
        self._link: AsyncPgConnection | None = None

    async def execute(self, op: Op[T], seconds: float) -> T:
        """Perform one operation within that time, connecting included.

        Raises:
            PgkvError: it failed; the next call connects anew if need be.
        """
        name = op.statement.name
        until = monotonic() + seconds
        try:
            async with asyncio.timeout(seconds):
                link = await self._open()
            result = await link.execute(op, max(0.001, until - monotonic()))
        except TimeoutError as error:
            self._drop()
            if isinstance(error, PgkvError):
                raise
            raise OperationTimeoutError(f"{name}: no connection within {seconds:.3g} s") from None
        except psycopg.Error as error:
            self._drop()
            failure = translate(error, action=name)
        except PgkvError:
            if self._link is None or not self._link.is_usable():
                self._drop()
            raise
        except BaseException:
            self._drop()
            raise
        else:
            return op.decode(result)  # type: ignore[return-value]  # no statement here can race
        raise failure from failure.__cause__

    def is_ready(self) -> bool:
        """Whether it is open, as far as one can know without asking."""
        return self._link is not None and not self._link.is_stale()

    async def _open(self) -> AsyncPgConnection:
        if self._link is not None and self._link.is_stale():
            self._drop()
        if self._link is None:
            conn = await psycopg.AsyncConnection.connect(
                self._conninfo, autocommit=True, prepare_threshold=None
            )
            watchdog = Watchdog(asyncio.get_running_loop())
            self._link = AsyncPgConnection(conn, watchdog, prepares=self._prepares)
        return self._link

    def _drop(self) -> None:
        # At once and without a cancel request, which could take a second of somebody's trust: a
        # renewal that goes on without us does no harm.
        link, self._link = self._link, None
        if link is not None:
            link.close()

    close = _drop


class Renewer:
    """Renews and watches leases. Its loop does the work; `add` and `discard` are for any thread.

    Args:
        loop: whose task it is.
        link: its own connection.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, link: OwnLink) -> None:
        self._loop = loop
        self._link = link
        self._lock = threading.Lock()
        # Weak: a lease that nobody can release any more ends by its ttl.
        self._holds: dict[int, tuple[weakref.ref[LeaseState], str]] = {}
        self._next_look = float("inf")
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._sending: asyncio.Task[None] | None = None
        self._send_until = 0.0
        self._failing = False
        self._tables: dict[str, _Cleaning] = {}
        self._warm_at = 0.0
        self._clean_at = monotonic() + uniform(0.5, 1.0) * CLEAN_PAUSE  # noqa: S311  # a pause, no secret

    # -- from any thread

    def add(self, hold: LeaseState) -> None:
        """Renew and watch the lease from now on."""
        first = min(hold._due, hold._until)
        with self._lock:
            self._holds[id(hold)] = (weakref.ref(hold), hold.name)
            sleeps_past = self._next_look > first
            if sleeps_past:
                self._next_look = first
        if sleeps_past:
            self._loop.call_soon_threadsafe(self._nudge)

    def discard(self, hold: LeaseState) -> None:
        """Leave the lease alone."""
        with self._lock:
            self._holds.pop(id(hold), None)

    # -- in the loop

    def _nudge(self) -> None:
        self._wake.set()
        if self._task is None:
            self._task = self._loop.create_task(self._run())

    def _living(self) -> list[LeaseState]:
        with self._lock:
            entries = list(self._holds.items())
        living = []
        for key, (ref, name) in entries:
            hold = ref()
            if hold is None:
                with self._lock:
                    if self._holds.get(key, (None,))[0] is ref:
                        del self._holds[key]
                _observe.warning("pgkv.lock.abandoned", lock=name)
            else:
                living.append(hold)
        return living

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            with self._lock:
                # While we look, whatever is added has to wake us: it may be too late to be seen.
                self._next_look = float("inf")
            look = self._look_safely(clock())
            with self._lock:
                self._next_look = min(self._next_look, look)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, look - clock()) if look < 1e300 else None):
                    await self._wake.wait()

    def _look_safely(self, now: float) -> float:
        try:
            return self._look(now)
        except Exception as error:  # noqa: BLE001  # see there
            _broken(error)
            return now + LOOK_MAX

    def _look(self, now: float) -> float:
        """Tell of losses, start what is due; when to look again."""
        soonest = float("inf")
        due: list[LeaseState] = []
        for hold in self._living():
            if hold.is_lost:
                self.discard(hold)
                continue
            soonest = min(soonest, hold._until, now + LOOK_MAX)
            if hold._due <= now:
                due.append(hold)
                self._send_until = min(self._send_until, now + _share(hold._until - now))
            else:
                soonest = min(soonest, hold._due)
        if self._sending is not None:
            if now >= self._send_until:
                self._sending.cancel()
            else:
                soonest = min(soonest, self._send_until)
        elif due:
            limit = min(_share(hold._until - now) for hold in due)
            self._send_until = now + limit
            self._send(self._renew(due[:BATCH_MAX], limit))
        elif soonest < float("inf") and now >= self._warm_at and not self._link.is_ready():
            # Connecting takes several round trips: not out of a lease's time, if that can be.
            self._warm_at = now + WARM_PAUSE
            self._send_until = float("inf")
            self._send(self._warm(self._living()[0]._options.sql))
        elif soonest < float("inf") and monotonic() >= self._clean_at:
            self._clean_at = monotonic() + CLEAN_PAUSE
            self._send_until = float("inf")
            self._send(self._clean())
        return soonest

    def _send(self, work: Coroutine[Any, Any, None]) -> None:
        self._sending = self._loop.create_task(work)
        self._sending.add_done_callback(self._sent)

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._sending = None
        self._wake.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            _broken(error)

    async def _warm(self, sql: LockStatements) -> None:
        with contextlib.suppress(PgkvError):
            await self._link.execute(sql.renew([]), SEND_MAX)

    async def _renew(self, due: list[LeaseState], seconds: float) -> None:
        until = clock() + seconds
        mine = _take_turns(due)
        due.clear()
        try:
            # Locks made one by one have statements of their own, but mostly one table.
            for sql in {hold._options.sql.t: hold._options.sql for hold in mine}.values():
                self._tables.setdefault(sql.t, _Cleaning(sql))
                batch = [hold for hold in mine if hold._options.sql.t == sql.t]
                await self._renew_table(sql, batch, max(0.001, until - clock()))
        finally:
            _end_turns(mine)

    async def _renew_table(
        self, sql: LockStatements, batch: list[LeaseState], seconds: float
    ) -> None:
        sent_at = clock()
        op = sql.renew([(hold._key, hold._token, hold._ttl) for hold in batch])
        try:
            codes = await self._link.execute(op, seconds)
        except asyncio.CancelledError:
            self._failed(batch, OperationTimeoutError("no answer in the time the leases leave"))
            raise
        except PgkvError as error:
            self._failed(batch, error)
            return
        self._failing = False
        _note(batch, codes, sent_at)

    def _failed(self, batch: list[LeaseState], error: PgkvError) -> None:
        for hold in batch:
            hold._cause = error.with_traceback(None)
        if not self._failing:
            self._failing = True
            _observe.warning(
                "pgkv.lock.renewal_failed",
                leases=len(batch),
                error=type(error).__name__,
                detail=str(error),
            )
        batch.clear()

    # -- upkeep

    async def _clean(self) -> None:
        for table in tuple(self._tables.values()):
            with contextlib.suppress(PgkvError):
                await table.chunk(self._link)

    async def stop(self) -> None:
        """End it. Leases still held are lost."""
        for hold in self._living():
            hold._lose("closed")
        with self._lock:
            self._holds.clear()
            self._next_look = 0.0
        tasks = [task for task in (self._task, self._sending) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._link.close()


# A failed statement's traceback keeps the frames it passed through until the collector comes. So
# that abandoned leases are noticed, the frames that await hold none: lists are emptied, and loops
# over them are functions of their own.


def _broken(error: BaseException) -> None:
    """A mistake of ours must not end all renewal, nor pass in silence."""
    _observe.warning("pgkv.lock.renewal_broken", error=type(error).__name__, detail=str(error))


def _take_turns(due: list[LeaseState]) -> list[LeaseState]:
    """Those that nobody else is sending a statement about."""
    for hold in due:
        # Whatever becomes of this try: it is not due again before a while.
        hold._due = clock() + retry_pause(hold._ttl) / 2
    return [hold for hold in due if hold._turn.acquire(blocking=False)]


def _end_turns(mine: list[LeaseState]) -> None:
    for hold in mine:
        hold._turn.release()
    mine.clear()


def _note(batch: list[LeaseState], codes: dict[bytes, int], sent_at: float) -> None:
    """What the server said of each."""
    for hold in batch:
        code = codes.get(hold._key, LOCKED)
        if code == RENEWED:
            # A reply that comes after the trust has ended does not bring it back.
            if not hold.is_lost:
                hold._trust(sent_at, hold._ttl)
        elif code != LOCKED:
            hold._lose(REASON_OF[code])
    batch.clear()


def _share(left: float) -> float:
    """Seconds for one try: half of what is left, so that there is time for another, but not so
    little that a slow network never gets through."""
    return min(max(left / 2, min(left, SEND_MIN)), SEND_MAX)


class _Cleaning:
    """Goes round one lock table, chunk by chunk."""

    def __init__(self, sql: LockStatements) -> None:
        self._sql = sql
        self._page = self._ticket_page = 0

    async def chunk(self, link: OwnLink) -> None:
        pages = await link.execute(self._sql.clean(self._page), CLEAN_TIME)
        self._page = self._page + CLEAN_PAGES if self._page + CLEAN_PAGES < pages else 0
        # Fails where no lock was ever fair: the table is not there.
        pages = await link.execute(self._sql.clean_tickets(self._ticket_page), CLEAN_TIME)
        following = self._ticket_page + CLEAN_PAGES
        self._ticket_page = following if following < pages else 0


__all__ = ["OwnLink", "Renewer"]
