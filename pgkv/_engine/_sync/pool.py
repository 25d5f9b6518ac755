"""Which connection an operation gets.

psycopg_pool opens, heals and closes connections. On top of it lies a LIFO of leased ones, because
its checkout costs as much as half an operation: an operation pops a link and pushes it back, two
atomic deque operations. A lease ends after a minute, so that the pool's own lifetimes keep their
meaning. A waiter registers BEFORE it looks a second time; whoever releases pushes and THEN looks
for waiters. In the other order a wake-up would be lost.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any

import psycopg
import psycopg_pool
from psycopg_pool import PoolClosed, PoolTimeout

from ...config import Config, Pooler
from ...errors import PgkvError, translate
from .. import conninfo as _conninfo
from ..caller import check_connection
from ..pooling import (
    CLOSE_TIMEOUT,
    FIRST_NAP,
    KEEP_TIME,
    OPENING_NAP,
    POOL_NAME,
    OwnConnection,
    busy,
    closed,
    no_connection,
    still_opening,
    unreachable,
)
from .connection import PgConnection
from .cursor_connection import connection_class


class StorePool:
    """The links of one store.

    Args:
        config: sizes and timeouts.
        conninfo: returns what libpq is given; asked when the first connection is needed.
    """

    def __init__(self, config: Config, conninfo: Callable[[], str]) -> None:
        self._config = config
        self.conninfo = conninfo
        self._prepares = config.pooler is Pooler.NONE
        self._begin()

    def after_fork(self) -> None:
        """In the child: begin anew, and never touch what belongs to the parent."""
        _inherited.append((self.idle, self._pool))
        self._begin()

    def _begin(self) -> None:
        self.idle: deque[PgConnection] = deque()
        self.waiters: deque[ThreadInQueue] = deque()
        self._lock = threading.Lock()
        self._size = 0
        self._closed = False
        self._connected = False
        # What is prepared where, across leases: it dies with the connection.
        self._prepared: weakref.WeakKeyDictionary[Any, set[bytes]] = weakref.WeakKeyDictionary()
        self._pool: psycopg_pool.ConnectionPool[Any] | None = None
        # The last failure to connect, with its time; a deque of one is replaced atomically.
        self._failures: deque[tuple[float, psycopg.Error]] = deque(maxlen=1)

    def is_exhausted(self) -> bool:
        """Whether all connections are in use."""
        return not self.idle and self._size >= self._config.pool_max_size

    # -- taking and giving back

    def check_out(self, deadline: float, action: str) -> PgConnection:
        """Return a live link, waiting in order while all are busy.

        Raises:
            PoolTimeoutError: all were busy for ``pool_timeout``.
            OperationTimeoutError: the deadline passed first.
            StoreUnavailableError: no connection can be made, with the reason.
        """
        patience = monotonic() + self._config.pool_timeout
        while True:
            link = self._pop_live()
            if link is not None:
                return link
            waiter = self._queue_up(action)
            if waiter is None:
                return self._open(deadline, action)
            if self.idle:
                self.serve_waiters()
            self._await(waiter, min(deadline, patience), patience <= deadline, action)
            if waiter.link is not None:
                if not waiter.link.is_stale():
                    return waiter.link
                self.discard(waiter.link)

    def _queue_up(self, action: str) -> ThreadInQueue | None:
        """Take a place in the queue; None where there is room for one more link."""
        with self._lock:
            if self._closed:
                raise closed(action)
            if self._size < self._config.pool_max_size:
                self._size += 1
                return None
            waiter = ThreadInQueue()
            self.waiters.append(waiter)
            return waiter

    def _pop_live(self) -> PgConnection | None:
        while True:
            try:
                link = self.idle.pop()
            except IndexError:
                return None
            if not link.is_stale():
                return link
            self.discard(link)

    def _await(self, waiter: ThreadInQueue, until: float, by_pool: bool, action: str) -> None:
        try:
            given = waiter.given.acquire(timeout=max(0.0, until - monotonic()))
        except BaseException:  # Ctrl-C: what somebody gives must not be lost with us
            if not self._leave_queue(waiter):
                self._pass_on(waiter.link)
            raise
        if not given and self._leave_queue(waiter):
            raise busy(self._config, action, by_pool=by_pool)

    def _leave_queue(self, waiter: ThreadInQueue) -> bool:
        """Stop waiting; False where somebody was quicker and has given."""
        while not waiter.done:
            try:
                self.waiters.remove(waiter)
            except ValueError:
                # Taken off the queue: they are about to give, or to put us back.
                waiter.given.acquire(timeout=0.001)
            else:
                return True
        return False

    def _pass_on(self, link: PgConnection | None) -> None:
        if link is not None:
            self.check_in(link)
        else:
            self._wake()

    def put_idle(self, link: PgConnection) -> None:
        """Take a link back from an operation."""
        if link.retire_at < monotonic() or self._closed:
            self.retire(link)
            return
        self.idle.append(link)
        if self.waiters:
            self.serve_waiters()

    def serve_waiters(self) -> None:
        """Give idle links to waiters."""
        if self._closed:
            self._close_idle()
        while self.idle:
            try:
                waiter = self.waiters.popleft()
            except IndexError:
                return
            try:
                waiter.give(self.idle.pop())
            except IndexError:
                # Somebody was quicker. Back to the head of the queue, and look again: they may
                # have released between our two pops, and seen no waiter.
                self.waiters.appendleft(waiter)

    def check_in(self, link: PgConnection) -> None:
        """Take a link back from an operation that failed: keep it if it still works."""
        if link.is_usable():
            self.put_idle(link)
        else:
            self.discard(link)

    def discard(self, link: PgConnection) -> None:
        """Close a link and let the pool make another when one is needed."""
        link.conn.close()
        self._return(link)

    def retire(self, link: PgConnection) -> None:
        """End a lease: the pool decides whether the connection lives on."""
        self._return(link)
        # What lies at the bottom of the stack has not been needed for a while either.
        while self.idle:
            oldest = self.idle[0]
            if oldest.retire_at >= monotonic():
                break
            try:
                self.idle.remove(oldest)
            except ValueError:
                break
            self._return(oldest)

    def _return(self, link: PgConnection) -> None:
        pool = self._pool
        if pool is None:
            link.conn.close()
        else:
            pool.putconn(link.conn)
        self._shrink()

    def _shrink(self) -> None:
        with self._lock:
            self._size -= 1
        self._wake()

    def _wake(self) -> None:
        """Tell a waiter that there is room to open a link."""
        with contextlib.suppress(IndexError):
            self.waiters.popleft().give(None)

    # -- opening

    def _open(self, deadline: float, action: str) -> PgConnection:
        try:
            conn = self._connect(deadline, action)
        except BaseException:
            self._shrink()
            raise
        prepared = self._prepared.setdefault(conn, set())
        link = connection_class(conn, prepares=self._prepares, prepared=prepared)
        link.retire_at = monotonic() + KEEP_TIME
        return link

    def _connect(self, deadline: float, action: str) -> psycopg.Connection[Any]:
        started = monotonic()
        pool, opened_now = self._psycopg_pool()
        until = min(deadline, started + self._config.connect_timeout)
        while opened_now and not self._connected and still_opening(pool, self._failures):
            # Asking at once would make the pool grow beyond the one it is opening already.
            if monotonic() >= until:
                break
            time.sleep(FIRST_NAP)
        while True:
            try:
                conn: psycopg.Connection[Any] = pool.getconn(
                    timeout=max(0.001, min(OPENING_NAP, until - monotonic()))
                )
            except PoolTimeout:
                failed = self._failures[0] if self._failures else None
                if failed is not None and failed[0] >= started:
                    raise unreachable(failed[1], action) from failed[1]
                if monotonic() >= until:
                    raise no_connection(self._config, action, until - started) from None
            except PoolClosed:
                raise closed(action) from None
            else:
                if not connection_class(conn, prepares=False).is_stale():
                    self._connected = True
                    return conn
                # Another link's loss makes all suspect, also those that lay in the pool.
                conn.close()
                pool.putconn(conn)

    def _psycopg_pool(self) -> tuple[psycopg_pool.ConnectionPool[Any], bool]:
        """The pool, and whether this call opened it."""
        with self._lock:
            if self._closed:
                raise closed("connect")
            opened_now = self._pool is None
            if self._pool is None:
                config = self._config
                self._pool = psycopg_pool.ConnectionPool(
                    self.conninfo(),
                    connection_class=_recording(self._failures),
                    kwargs={"autocommit": True, "prepare_threshold": None},
                    min_size=config.pool_min_size,
                    max_size=config.pool_max_size,
                    timeout=config.pool_timeout,
                    # Each operation that needs a connection tries at once; back-off is the
                    # retry policy's, not the pool's.
                    reconnect_timeout=0.0,
                    name=f"{POOL_NAME}{id(self):x}",
                    open=True,
                )
            return self._pool, opened_now

    def close(self) -> None:
        """Close every connection; those in use as they come back."""
        with self._lock:
            self._closed = True
            pool, self._pool = self._pool, None
            waiters, self.waiters = self.waiters, ClosedQueue()
        self._close_idle()
        if pool is not None:
            pool.close(timeout=CLOSE_TIMEOUT)
        while len(waiters):
            with contextlib.suppress(IndexError):
                waiters.popleft().give(None)

    def _close_idle(self) -> None:
        while self.idle:
            with contextlib.suppress(IndexError):
                self.idle.pop().pgconn.finish()


class CallerPool:
    """The caller's own psycopg_pool: one checkout per operation, nothing kept between, never
    closed or reconfigured. It has the interface of `StorePool`, with a stack that stays empty.

    Args:
        pool: open, and the caller's.
        config: whether statements may be prepared.
    """

    def __init__(self, pool: psycopg_pool.ConnectionPool[Any], config: Config) -> None:
        self._config = config
        self._caller_pool = pool
        self._prepares = config.pooler is Pooler.NONE
        self.idle: deque[PgConnection] = deque()
        self.waiters: deque[ThreadInQueue] = deque()
        # What is prepared where: it dies with the connection.
        self._prepared: weakref.WeakKeyDictionary[Any, set[bytes]] = weakref.WeakKeyDictionary()

    def is_exhausted(self) -> bool:
        """Whether all connections are in use."""
        stats = self._caller_pool.get_stats()
        return not stats.get("pool_available") and stats["pool_size"] >= stats["pool_max"]

    def conninfo(self) -> str:
        """What reaches the same database without the caller's pool."""
        return _conninfo.build(self._config, self._config.dsn)

    def check_out(self, deadline: float, action: str) -> PgConnection:
        """Check out a live connection."""
        pool = self._caller_pool
        while True:
            try:
                conn = pool.getconn(timeout=min(pool.timeout, deadline - monotonic()))
            except (PoolTimeout, PoolClosed, psycopg.Error) as error:
                failure = translate(error, action=action)
            else:
                prepared = self._prepared.setdefault(conn, set())
                link = connection_class(conn, prepares=self._prepares, prepared=prepared)
                if not link.is_stale():
                    return self._checked(link, action)
                self.discard(link)
                continue
            raise failure from failure.__cause__

    def _checked(self, link: PgConnection, action: str) -> PgConnection:
        try:
            check_connection(link.conn, action)
        except PgkvError:
            self._caller_pool.putconn(link.conn)
            raise
        return link

    def check_in(self, link: PgConnection) -> None:
        """Check it in, whatever became of it."""
        self._caller_pool.putconn(link.conn)

    put_idle = check_in

    def discard(self, link: PgConnection) -> None:
        """Close it and check it in: the pool makes another."""
        link.pgconn.finish()  # close() may mean "give it back" to a caller's pool
        self._caller_pool.putconn(link.conn)

    def serve_waiters(self) -> None:
        """Nobody waits here: the pool has its own queue."""

    def after_fork(self) -> None:
        """A forked child needs a pool of its own: what the caller's does then is the caller's."""

    def close(self) -> None:
        """The pool is the caller's to close."""


# What a forked child got from its parent: kept, so that no destructor says goodbye in its name.
_inherited: list[object] = []


def disown(link: PgConnection) -> None:
    """Leave a link to the parent process it was inherited from."""
    _inherited.append(link)


class ThreadInQueue:
    """A caller in the queue. Being taken off the queue is what decides who may give to it."""

    __slots__ = ("done", "given", "link")

    def __init__(self) -> None:
        self.link: PgConnection | None = None
        self.done = False
        self.given = threading.Lock()
        self.given.acquire()

    def give(self, link: PgConnection | None) -> None:
        """Wake the caller with a link, or with None: "look again"."""
        self.link = link
        self.done = True
        self.given.release()


class ClosedQueue(deque[ThreadInQueue]):
    """The queue of a closed store. It looks occupied, so that whoever pushes a link comes to
    `serve_waiters`, which closes it; the fast path need not ask."""

    def __bool__(self) -> bool:
        return True


def _recording(failures: deque[tuple[float, psycopg.Error]]) -> type[psycopg.Connection[Any]]:
    """A connection class that remembers why connecting failed."""

    class RecordingConnection(psycopg.Connection[Any], OwnConnection):
        @classmethod
        def connect(cls, conninfo: str = "", **kwargs: Any) -> psycopg.Connection[Any]:  # type: ignore[override]  # the pool passes keywords only
            try:
                return super().connect(conninfo, **kwargs)
            except psycopg.Error as error:
                failures.append((monotonic(), error))
                raise

    return RecordingConnection
