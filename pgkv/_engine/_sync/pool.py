"""Which connection an operation gets.

psycopg_pool opens, replaces and closes connections. On top of it lies a stack of checked-out ones,
because its checkout costs as much as half an operation: an operation pops a connection and pushes
it back, two atomic deque operations.

An exception from a signal handler may interrupt any line here, so no line is relied on to undo
another:

* A connection's place in the pool is a `PoolPlace`, counted by weak references: where the connection
  is lost between two lines, the place is free again.
* A lost `PgConnection` puts its psycopg connection into `_lost`, and the next caller closes it.
* A waiter registers before it looks a second time, and who gives pushes and then looks for
  waiters, so no wake-up is lost. Where an interrupt cuts a wake-up off, the waiter looks by
  itself: it sleeps `LOOK_AGAIN` at most.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any

import psycopg
import psycopg_pool
from psycopg_pool import PoolClosed, PoolTimeout

from ... import _observe
from ...config import Config
from ...errors import PgkvError, translate
from .. import conninfo as _conninfo
from ..caller import check_connection
from ..pooling import (
    CLOSE_TIMEOUT,
    FIRST_NAP,
    GROW_AGAIN,
    KEEP_TIME,
    LOOK_AGAIN,
    OPENING_NAP,
    PATIENCE,
    SEARCH_AFTER,
    SEARCH_AGAIN,
    Attempts,
    OverCallerPool,
    OwnConnection,
    PoolPlace,
    busy,
    closed,
    finish_returned,
    no_connection,
    pool_options,
    still_opening,
    unreachable,
)
from ..wire import Preparing
from .connection import PgConnection

# What a waiter gets: a connection, or None, which means "look again".
_Turn = SimpleQueue["PgConnection | None"]
_Waiter = tuple[_Turn, float]  # and since when it waits


class StorePool:
    """The connections of one store.

    Args:
        config: sizes and timeouts.
        conninfo: returns what libpq is given; asked when the first connection is needed.
    """

    def __init__(self, config: Config, conninfo: Callable[[], str]) -> None:
        self._config = config
        self.conninfo = conninfo
        self._preparing = Preparing.through(config.pooler)
        self._begin()

    def after_fork(self) -> None:
        """In the child: start again, and never touch what belongs to the parent."""
        _inherited.append((self.idle, self._pool, self._lost))
        self._begin()

    def _begin(self) -> None:
        self.idle: deque[PgConnection] = deque()
        self.waiters: deque[_Waiter] = deque()
        self._told: _Waiter | None = None  # who is to look again and has not yet; since when
        # Reentrant, for signal handlers. A forked child calls this method and so has a new one.
        self._lock = threading.RLock()
        self._places: weakref.WeakSet[PoolPlace] = weakref.WeakSet()
        self._lost: deque[psycopg.Connection[Any]] = deque()
        self._closed = False
        self._connected = False
        self._search_at = 0.0
        self._grow_at = 0.0  # no attempt to open one more before that time
        # What is prepared where, across checkouts: it dies with the connection.
        self._prepared: weakref.WeakKeyDictionary[Any, set[bytes]] = weakref.WeakKeyDictionary()
        self._pool: psycopg_pool.ConnectionPool[Any] | None = None
        self._connect_time = self._config.connect_timeout
        self._attempts = Attempts()

    def is_exhausted(self) -> bool:
        return not self.idle and len(self._places) >= self._config.pool_max_size

    def counts(self) -> tuple[int, int, int, int]:
        size = self._config.pool_max_size
        return len(self._places), len(self.idle), len(self.waiters), size

    # -- checking out and in

    def check_out(self, deadline: float, action: str) -> PgConnection:
        """Return a live connection, waiting in order while all are busy.

        Raises:
            PoolTimeoutError: all were busy for ``pool_timeout``.
            OperationTimeoutError: the deadline passed first.
            StoreUnavailableError: no connection can be made, with the reason.
        """
        started = monotonic()
        give_up = started + self._config.pool_timeout
        until = min(deadline, give_up)
        waiter: _Waiter | None = None
        waited = False
        refusal: PgkvError | None = None  # why there are not more of them
        try:
            while True:
                conn = self._pop_live()
                if conn is not None:
                    if self.waiters and self.idle:
                        self.serve_waiters()  # the thread that gave a connection left that to this one
                    return conn
                place = self._new_place(action)
                if place is not None:
                    try:
                        conn = self._open(place, deadline, action)
                    except BaseException as error:
                        self._places.discard(place)
                        self._wake()
                        if not isinstance(error, PgkvError) or not self._has_others():
                            raise
                        # The server may be full while ours are only busy: wait for those.
                        self._grow_at = monotonic() + GROW_AGAIN
                        refusal = error.with_traceback(None)
                    if conn is not None:
                        return conn
                if waiter is None:
                    waiter = SimpleQueue(), monotonic()
                    self.waiters.append(waiter)
                    waited = True
                    continue  # look again, registered
                left = until - monotonic()
                if left <= 0:
                    if refusal is not None:
                        try:
                            raise refusal
                        finally:
                            del refusal  # its traceback holds this frame
                    raise busy(self._config, action, by_pool=give_up <= deadline)
                turn = waiter[0]
                try:
                    conn = turn.get(timeout=min(left, LOOK_AGAIN))
                except Empty:
                    self._search(started)
                    continue
                finally:
                    self._looks(turn)
                if conn is None:
                    self.waiters.appendleft(waiter)  # who said "look again" took it off
                elif conn.is_stale():
                    waiter = None
                    self.discard(conn)
                else:
                    waiter = None
                    return conn
        finally:
            if waiter is not None:
                self._leave(waiter)
            if waited:
                _observe.event("pgkv.pool.waited", operation=action, seconds=monotonic() - started)

    def _looks(self, turn: _Turn) -> None:
        """A waiter looks again from here: a connection that comes later is not left to it."""
        told = self._told
        if told is not None and told[0] is turn:
            self._told = None

    def _leave(self, waiter: _Waiter) -> None:
        """Leave the queue, and pass on what was given meanwhile."""
        turn, _ = waiter
        try:
            self.waiters.remove(waiter)
        except ValueError:  # who took it off gives to it, now or in a moment
            with contextlib.suppress(Empty):
                conn = turn.get(timeout=LOOK_AGAIN)
                self._looks(turn)
                if conn is None:
                    self._wake()
                    self.serve_waiters()
                else:
                    self.check_in(conn)

    def _new_place(self, action: str) -> PoolPlace | None:
        """Take a place for one more connection; None while there is none."""
        with self._lock:
            if self._closed:
                raise closed(action)
            if len(self._places) >= self._config.pool_max_size or (
                monotonic() < self._grow_at and self._has_others()
            ):
                return None
            place = PoolPlace()
            self._places.add(place)
            if len(self._places) > self._config.pool_max_size:
                self._places.discard(place)  # a signal handler took the last one
                return None
            return place

    def _has_others(self) -> bool:
        return any(place.connected for place in tuple(self._places))

    def _search(self, waited_since: float) -> None:
        """Find connections that an interrupted call lost, where an error's cycle holds them."""
        now = monotonic()
        if now >= max(waited_since + SEARCH_AFTER, self._search_at):
            self._search_at = now + SEARCH_AGAIN
            gc.collect()

    def _close_lost(self) -> None:
        """Close the connections that no caller holds any more."""
        while self._lost:
            with contextlib.suppress(IndexError):
                self._discard(self._lost.popleft())

    def _pop_live(self) -> PgConnection | None:
        while True:
            try:
                conn = self.idle.pop()
            except IndexError:
                return None
            if not conn.is_stale():
                return conn
            self.discard(conn)

    def put_idle(self, conn: PgConnection) -> None:
        """Take a connection back that works."""
        if conn.retire_at < monotonic() or self._closed:
            self.retire(conn)
            return
        self.idle.append(conn)
        if self.waiters:
            self.serve_waiters()

    def serve_waiters(self) -> None:
        """Give idle connections to waiters, in order.

        A thread that is given one has to wake up first, and until then the connection is idle. So
        one that has come just now is told to look, one at a time, and others may be faster; what it
        leaves it passes on. After `PATIENCE` it is given one. To take a waiter from the queue is
        the right to give to it, once.
        """
        if self._closed:
            self._close_idle()
        while self.idle:
            now, told = monotonic(), self._told
            try:
                gives = self.waiters[0][1] + PATIENCE < now
                if not gives and told is not None and now < told[1] + LOOK_AGAIN:
                    return
                turn, _ = self.waiters.popleft()
            except IndexError:
                return
            conn = None  # another caller may have taken it: then the waiter looks by itself
            if gives:
                with contextlib.suppress(IndexError):
                    conn = self.idle.pop()
            else:
                self._told = turn, now
            turn.put(conn)
            if not gives:
                return

    def _wake(self) -> None:
        """Tell the first waiter that there may be room to open a connection."""
        with contextlib.suppress(IndexError):
            self.waiters.popleft()[0].put(None)

    def check_in(self, conn: PgConnection) -> None:
        """Take a connection back, whatever became of it: kept if it still works."""
        if conn.is_usable():
            self.put_idle(conn)
        else:
            self.discard(conn)

    def discard(self, conn: PgConnection) -> None:
        """Close a connection and let the pool make another when one is needed."""
        _observe.event("pgkv.pool.dropped")
        self._places.discard(conn.place)
        self._discard(conn.release())

    def _discard(self, conn: psycopg.Connection[Any]) -> None:
        conn.close()
        self._return(conn)

    def retire(self, conn: PgConnection) -> None:
        """Give a connection back to psycopg_pool, which decides whether it lives on."""
        self._places.discard(conn.place)
        self._return(conn.release())
        # What lies at the bottom of the stack has not been needed for a while either.
        while self.idle:
            oldest = self.idle[0]
            if oldest.retire_at >= monotonic():
                break
            try:
                self.idle.remove(oldest)
            except ValueError:
                break
            self._places.discard(oldest.place)
            self._return(oldest.release())

    def _return(self, conn: psycopg.Connection[Any]) -> None:
        pool = self._pool
        if pool is None:
            conn.close()
        else:
            try:
                pool.putconn(conn)
            except ValueError:  # of a pool that was replaced
                conn.close()
        self._wake()

    # -- opening

    def _open(self, place: PoolPlace, deadline: float, action: str) -> PgConnection | None:
        """Open a connection; None where another one came back meanwhile."""
        self._close_lost()  # also the one whose place this is
        inner = self._connect(deadline, action)
        if inner is None:
            self._places.discard(place)
            return None
        prepared = self._prepared.setdefault(inner, set())
        preparing = self._preparing
        conn = PgConnection(inner, prepares=True, prepared=prepared, preparing=preparing)
        if preparing is not None and preparing.allowed is None:
            try:
                conn.try_preparing(deadline)
            except BaseException:
                self._discard(inner)
                raise
        conn.keep_place(place, self._lost)
        conn.retire_at = monotonic() + KEEP_TIME
        return conn

    def _connect(self, deadline: float, action: str) -> psycopg.Connection[Any] | None:
        started = monotonic()
        pool, opened_now = self._psycopg_pool()
        until = min(deadline, started + self._connect_time)
        while opened_now and not self._connected and still_opening(pool, self._attempts):
            # Asking at once would make the pool grow beyond the one it is opening already.
            if monotonic() >= until:
                break
            time.sleep(FIRST_NAP)
        leaks = False
        while True:
            try:
                conn: psycopg.Connection[Any] = pool.getconn(
                    timeout=max(0.001, min(OPENING_NAP, until - monotonic()))
                )
            except PoolTimeout:
                for at, failure in tuple(self._attempts.failures):
                    if at >= started:
                        raise unreachable(failure, action) from failure
                if self.idle:
                    return None
                leaked = self._attempts.have_leaked(pool)
                if leaked and leaks:
                    pool, _ = self._psycopg_pool(instead_of=pool)
                leaks = leaked
                if monotonic() >= until:
                    raise no_connection(self._config, action, until - started) from None
            except PoolClosed:
                raise closed(action) from None
            else:
                if not PgConnection(conn, prepares=False).is_stale():
                    self._connected = True
                    return conn
                # Another connection's loss makes all suspect, also those that lay in the pool.
                conn.close()
                pool.putconn(conn)
            finally:
                finish_returned(pool)

    def _psycopg_pool(
        self, instead_of: psycopg_pool.ConnectionPool[Any] | None = None
    ) -> tuple[psycopg_pool.ConnectionPool[Any], bool]:
        """The pool, and whether this call opened it.

        A pool that an interrupt made lose connections is replaced.
        """
        with self._lock:
            if self._closed:
                raise closed("connect")
            if instead_of is not None and self._pool is instead_of:
                self._pool = None
                instead_of.close(timeout=0)
            opened_now = self._pool is None
            if self._pool is None:
                config = self._config
                conninfo = self.conninfo()
                self._connect_time = _conninfo.connect_time(config, conninfo)
                options = pool_options(self, config, _recording(self._attempts))
                pool = PsycopgPool(conninfo, open=True, **options)
                self._pool = self._first(pool)
            return self._pool, opened_now

    def _first(self, made: psycopg_pool.ConnectionPool[Any]) -> psycopg_pool.ConnectionPool[Any]:
        """The pool just made, unless a signal handler has made one meanwhile."""
        if self._pool is None:
            return made
        made.close(timeout=0)
        return self._pool

    def close(self) -> None:
        """Close every connection; those in use as they come back."""
        with self._lock:
            self._closed = True
            pool, self._pool = self._pool, None
            waiters, self.waiters = self.waiters, ClosedQueue()
        self._close_idle()
        self._close_lost()
        if pool is not None:
            pool.close(timeout=CLOSE_TIMEOUT)
        while len(waiters):
            with contextlib.suppress(IndexError):
                waiters.popleft()[0].put(None)

    def _close_idle(self) -> None:
        while self.idle:
            with contextlib.suppress(IndexError):
                conn = self.idle.pop()
                conn.release()
                conn.pgconn.finish()


class PsycopgPool(psycopg_pool.ConnectionPool[Any]):
    """One that is still open when the interpreter ends is left alone. psycopg_pool would wait for its
    threads, five seconds for each: from Python 3.12 on they are stopped for good by then."""

    def __del__(self, is_ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_ending():
            super().__del__()


class CallerPool(OverCallerPool):
    def __init__(self, pool: psycopg_pool.ConnectionPool[Any], config: Config) -> None:
        super().__init__(pool, config)
        self.waiters: deque[_Waiter] = deque()
        self._lost: deque[psycopg.Connection[Any]] = deque()

    def check_out(self, deadline: float, action: str) -> PgConnection:
        pool = self._caller_pool
        while self._lost:  # see `StorePool`: an interrupted call may lose one
            with contextlib.suppress(IndexError):
                inner = self._lost.popleft()
                inner.pgconn.finish()
                pool.putconn(inner)
        while True:
            try:
                conn = pool.getconn(timeout=min(pool.timeout, deadline - monotonic()))
            except (PoolTimeout, PoolClosed, psycopg.Error) as error:
                failure = translate(error, action=action)
            else:
                prepared = self._prepared.setdefault(conn, set())
                connection = PgConnection(conn, prepares=self._prepares, prepared=prepared)
                connection.keep_place(PoolPlace(), self._lost)
                if not connection.is_stale():
                    return self._checked(connection, action)
                self.discard(connection)
                continue
            try:
                raise failure from failure.__cause__
            finally:
                del failure  # its traceback holds this frame

    def _checked(self, connection: PgConnection, action: str) -> PgConnection:
        try:
            check_connection(connection.conn, action)
        except PgkvError:
            self._caller_pool.putconn(connection.release())
            raise
        return connection

    def check_in(self, connection: PgConnection) -> None:
        """Check it in, whatever became of it."""
        self._caller_pool.putconn(connection.release())

    put_idle = check_in

    def discard(self, connection: PgConnection) -> None:
        """Close it and check it in: the pool makes another."""
        connection.pgconn.finish()  # close() may mean "give it back" to a caller's pool
        self._caller_pool.putconn(connection.release())

    def serve_waiters(self) -> None:
        """Nothing waits here: the caller's pool has its own queue."""

    def after_fork(self) -> None:
        """A forked child needs a pool of its own: what the caller's does then is the caller's."""

    def close(self) -> None:
        """The pool is the caller's to close."""


# What a forked child got from its parent: kept, so that no destructor says goodbye in its name.
_inherited: list[object] = []


def disown(connection: PgConnection) -> None:
    """Leave a connection to the parent process it was inherited from."""
    _inherited.append(connection)


class ClosedQueue(deque[_Waiter]):
    """The queue of a closed store. It looks occupied, so that a caller who pushes a connection
    calls `serve_waiters`, which closes it; the fast path need not ask."""

    def __bool__(self) -> bool:
        return True


def _recording(attempts: Attempts) -> type[psycopg.Connection[Any]]:
    """A connection class that tells how connecting goes."""

    class RecordingConnection(psycopg.Connection[Any], OwnConnection):
        @classmethod
        def connect(cls, conninfo: str = "", **kwargs: Any) -> psycopg.Connection[Any]:  # type: ignore[override]  # the pool passes keywords only
            with attempts.attempt():
                conn = super().connect(conninfo, **kwargs)
                attempts.made.add(conn)
                return conn

    return RecordingConnection
