"""Which connection a coroutine gets: `_pool` for asyncio.

One event loop runs everything here, so no lock is needed between two awaits. Taking a link back
never awaits: a task that is cancelled must not be able to leave one behind.
"""

from __future__ import annotations

import asyncio
import math
import weakref
from collections import deque
from collections.abc import Callable, Coroutine
from time import monotonic
from typing import Any

import psycopg
from psycopg_pool import AsyncConnectionPool, PoolClosed, PoolTimeout

from . import _conninfo
from ._aio_wire import AsyncLink, Watchdog
from ._caller import check_connection
from ._pool import (
    CLOSE_TIMEOUT,
    FIRST_NAP,
    LEASE_TIME,
    OPENING_NAP,
    POOL_NAME,
    OwnConnection,
    busy,
    closed,
    no_connection,
    still_opening,
    unreachable,
)
from ._wire import poller
from .config import Config, Pooler
from .errors import ConfigError, PgkvError, translate


class AsyncLeases:
    """The links of one store, and the loop they belong to.

    Args:
        config: sizes and time-outs.
        conninfo: returns what libpq is given; asked when the first connection is needed.
    """

    def __init__(self, config: Config, conninfo: Callable[[], str]) -> None:
        self._config = config
        self.conninfo = conninfo
        self._prepares = config.pooler is Pooler.NONE
        self.idle: deque[AsyncLink] = deque()
        self.waiters: deque[_Waiter] = deque()
        self.loop: asyncio.AbstractEventLoop | None = None
        self._size = 0
        self._closed = False
        self._pool: AsyncConnectionPool[Any] | None = None
        self._opening: asyncio.Lock | None = None
        self._watchdog: Watchdog | None = None
        self._failures: deque[tuple[float, psycopg.Error]] = deque(maxlen=1)
        self._prepared: weakref.WeakKeyDictionary[Any, set[bytes]] = weakref.WeakKeyDictionary()
        self._tasks: set[asyncio.Task[None]] = set()

    def enter_loop(self) -> Watchdog:
        """Belong to the running loop from now on.

        Raises:
            ConfigError: the store belongs to another one.
        """
        loop = asyncio.get_running_loop()
        if self.loop is not loop or self._watchdog is None:
            self.refuse_other(loop)
            self.loop = loop
            self._watchdog = Watchdog(loop)
            self._opening = asyncio.Lock()
        return self._watchdog

    def refuse_other(self, loop: asyncio.AbstractEventLoop) -> None:
        """Refuse a loop that is not the store's.

        Raises:
            ConfigError: the store belongs to another one.
        """
        if self.loop not in (None, loop):
            raise ConfigError(
                "this AsyncStore belongs to another event loop: its connections cannot be used "
                "or closed here; make one AsyncStore per loop, and close it there"
            )

    # -- taking and giving back

    async def acquire(self, deadline: float, action: str) -> AsyncLink:
        """Return a live link, waiting in order while all are busy; see `_pool.Leases.acquire`."""
        self.enter_loop()
        patience = monotonic() + self._config.pool_timeout
        while True:
            while self.idle:
                link = self.idle.pop()
                if not link.is_stale():
                    return link
                self.discard(link)
            if self._closed:
                raise closed(action)
            if self._size < self._config.pool_max_size:
                self._size += 1
                return await self._open(deadline, action)
            given = await self._await(min(deadline, patience), patience <= deadline, action)
            if given is not None:
                if not given.is_stale():
                    return given
                self.discard(given)

    async def _await(self, until: float, by_pool: bool, action: str) -> AsyncLink | None:
        watchdog = self.enter_loop()
        waiter = _Waiter(asyncio.get_running_loop().create_future(), until)
        self.waiters.append(waiter)
        watchdog.watch(waiter)
        if until < watchdog.next_look:
            watchdog.look_at(until)
        try:
            given = await waiter.given
        except asyncio.CancelledError:
            if waiter.given.cancelled():
                raise
            # Given in the same turn in which its taker went away.
            link = waiter.given.result()
            if isinstance(link, AsyncLink):
                self.release(link)
            else:
                self._wake(None)
            raise
        finally:
            watchdog.forget(waiter)
        if given is TOO_LATE:
            raise busy(self._config, action, by_pool=by_pool)
        assert given is None or isinstance(given, AsyncLink)
        return given

    def _wake(self, link: AsyncLink | None) -> bool:
        """Give a link (or, with None, leave to open one) to the first who still waits."""
        while self.waiters:
            given = self.waiters.popleft().given
            if not given.done():
                given.set_result(link)
                return True
        return False

    def release(self, link: AsyncLink) -> None:
        """Take a link back from an operation."""
        if self._closed or link.lease_end < monotonic():
            self._give_back(link)
        elif not self.waiters or not self._wake(link):
            self.idle.append(link)

    def settle(self, link: AsyncLink) -> None:
        """Take a link back from an operation that failed: keep it if it still works."""
        if link.is_usable():
            self.release(link)
        else:
            self.discard(link)

    def discard(self, link: AsyncLink) -> None:
        """Close a link; what still runs on it is cancelled first, in the background."""
        if link.is_running():
            self._spawn(self._cancel(link))
            return
        link.close()
        self._return(link)

    async def _cancel(self, link: AsyncLink) -> None:
        try:
            await link.cancel_and_close()
        finally:
            self._return(link)

    def _give_back(self, link: AsyncLink) -> None:
        link.detach()
        self._return(link)
        while self.idle and self.idle[0].lease_end < monotonic():
            oldest = self.idle.popleft()
            oldest.detach()
            self._return(oldest)

    def _return(self, link: AsyncLink) -> None:
        self._size -= 1
        if self._pool is None:
            link.close()
        else:
            self._spawn(self._pool.putconn(link.conn))
        self._wake(None)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- opening

    async def _open(self, deadline: float, action: str) -> AsyncLink:
        try:
            conn = await self._connect(deadline, action)
        except BaseException:
            self._size -= 1
            self._wake(None)
            raise
        prepared = self._prepared.setdefault(conn, set())
        link = AsyncLink(conn, self.enter_loop(), prepares=self._prepares, prepared=prepared)
        link.lease_end = monotonic() + LEASE_TIME
        return link

    async def _connect(self, deadline: float, action: str) -> psycopg.AsyncConnection[Any]:
        started = monotonic()
        pool, opened_now = await self._psycopg_pool(action)
        until = min(deadline, started + self._config.connect_timeout)
        while (  # noqa: ASYNC110  # the pool has no event to wait for
            opened_now and still_opening(pool, self._failures) and monotonic() < until
        ):
            # Asking at once would make the pool grow beyond the one it is opening already.
            await asyncio.sleep(FIRST_NAP)
        while True:
            nap = max(0.001, min(OPENING_NAP, until - monotonic()))
            try:
                conn: psycopg.AsyncConnection[Any] = await pool.getconn(timeout=nap)
            except PoolTimeout:
                failed = self._failures[0] if self._failures else None
                if failed is not None and failed[0] >= started:
                    raise unreachable(failed[1], action) from failed[1]
                if monotonic() >= until:
                    raise no_connection(self._config, action, until - started) from None
            except PoolClosed:
                raise closed(action) from None
            else:
                if not stale(conn):
                    return conn
                await conn.close()
                await pool.putconn(conn)

    async def _psycopg_pool(self, action: str) -> tuple[AsyncConnectionPool[Any], bool]:
        """The pool, and whether this call opened it."""
        assert self._opening is not None
        async with self._opening:
            if self._closed:
                raise closed(action)
            opened_now = self._pool is None
            if self._pool is None:
                config = self._config
                # In a thread: an embedded server may have to be started first.
                conninfo = await asyncio.to_thread(self.conninfo)
                pool = AsyncConnectionPool(
                    conninfo,
                    connection_class=_recording(self._failures),
                    kwargs={"autocommit": True, "prepare_threshold": None},
                    min_size=config.pool_min_size,
                    max_size=config.pool_max_size,
                    timeout=config.pool_timeout,
                    reconnect_timeout=0.0,  # each operation tries at once
                    name=f"{POOL_NAME}{id(self):x}",
                    open=False,
                )
                await pool.open()
                self._pool = pool
            return self._pool, opened_now

    async def close(self) -> None:
        """Close every connection; those in use as they come back."""
        self._closed = True
        while self._wake(None):
            pass
        while self.idle:
            link = self.idle.popleft()
            self._size -= 1
            link.close()
        if self._tasks:
            await asyncio.wait(self._tasks)
        pool, self._pool = self._pool, None
        if pool is not None:
            await pool.close(timeout=CLOSE_TIMEOUT)


TOO_LATE = object()


class _Waiter:
    """A task in the queue. What it is given: a link, None ("look again"), or TOO_LATE."""

    __slots__ = ("deadline", "given")

    def __init__(self, given: asyncio.Future[object], deadline: float) -> None:
        self.given = given
        self.deadline = deadline

    def time_out(self) -> None:
        """The deadline has passed; the queue passes over who is done."""
        self.deadline = math.inf
        if not self.given.done():
            self.given.set_result(TOO_LATE)


class AsyncCallerPool:
    """The caller's own psycopg_pool: one checkout per operation, nothing kept between.

    Args:
        pool: open, and the caller's.
        config: whether statements may be prepared.
    """

    def __init__(self, pool: AsyncConnectionPool[Any], config: Config) -> None:
        self._config = config
        self._caller_pool = pool
        self._prepares = config.pooler is Pooler.NONE
        self.idle: deque[AsyncLink] = deque()
        self.waiters: deque[Any] = deque()
        self.loop: asyncio.AbstractEventLoop | None = None
        self._watchdog: Watchdog | None = None
        self._prepared: weakref.WeakKeyDictionary[Any, set[bytes]] = weakref.WeakKeyDictionary()
        self._tasks: set[asyncio.Task[None]] = set()

    def conninfo(self) -> str:
        """What reaches the same database without the caller's pool."""
        return _conninfo.build(self._config, self._config.dsn)

    async def acquire(self, deadline: float, action: str) -> AsyncLink:
        """Check out a live connection."""
        if self._watchdog is None:
            self._watchdog = Watchdog(asyncio.get_running_loop())
        pool = self._caller_pool
        while True:
            try:
                conn = await pool.getconn(timeout=min(pool.timeout, deadline - monotonic()))
            except (PoolTimeout, PoolClosed, psycopg.Error) as error:
                failure = translate(error, action=action)
            else:
                if stale(conn):
                    await conn.close()
                    await pool.putconn(conn)
                    continue
                try:
                    check_connection(conn, action)
                except PgkvError:
                    await pool.putconn(conn)
                    raise
                prepared = self._prepared.setdefault(conn, set())
                return AsyncLink(conn, self._watchdog, prepares=self._prepares, prepared=prepared)
            raise failure from failure.__cause__

    def settle(self, link: AsyncLink) -> None:
        """Check it in, whatever became of it."""
        task = asyncio.get_running_loop().create_task(self._check_in(link))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    release = discard = settle

    async def _check_in(self, link: AsyncLink) -> None:
        if link.is_running():
            await link.cancel_and_close()
        elif link.is_usable():
            link.detach()
        else:
            link.close()
        await self._caller_pool.putconn(link.conn)

    async def close(self) -> None:
        """The pool is the caller's to close; what is on its way back to it arrives first."""
        if self._tasks:
            await asyncio.wait(self._tasks)


def stale(conn: psycopg.AsyncConnection[Any]) -> bool:
    """Whether a connection that lay in a pool has something to say: it is dead then."""
    return conn.closed or bool(poller(conn.pgconn.socket)(0))


def _recording(failures: deque[tuple[float, psycopg.Error]]) -> type[psycopg.AsyncConnection[Any]]:
    """A connection class that remembers why connecting failed."""

    class RecordingConnection(psycopg.AsyncConnection[Any], OwnConnection):
        @classmethod
        async def connect(  # type: ignore[override]  # the pool passes keywords only
            cls, conninfo: str = "", **kwargs: Any
        ) -> psycopg.AsyncConnection[Any]:
            try:
                return await super().connect(conninfo, **kwargs)
            except psycopg.Error as error:
                failures.append((monotonic(), error))
                raise

    return RecordingConnection
