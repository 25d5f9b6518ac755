"""Which connection a task gets: `_sync/pool` for asyncio.

One event loop runs everything here, so no lock is needed between two awaits. Taking a connection back
never awaits: a task that is cancelled must not be able to leave one behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import weakref
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from time import monotonic
from typing import Any

import psycopg
import psycopg_pool
from psycopg.pq.abc import PGresult
from psycopg_pool import PoolClosed, PoolTimeout

from ... import _observe
from ..._ops.op import Op
from ...config import Config
from ...errors import ConfigError, PgkvError, translate
from .. import conninfo as _conninfo
from ..caller import check_connection
from ..pooling import (
    CLOSE_TIMEOUT,
    FIRST_NAP,
    GROW_AGAIN,
    KEEP_TIME,
    OPENING_NAP,
    Attempts,
    OverCallerPool,
    OwnConnection,
    busy,
    closed,
    finish_returned,
    no_connection,
    pool_options,
    still_opening,
    unreachable,
)
from ..wire import Preparing, poller
from .connection import AsyncPgConnection, Watchdog, whole_or_none


class AsyncStorePool:
    """The connections of one store, and the loop they belong to."""

    def __init__(self, config: Config, conninfo: Callable[[], str]) -> None:
        self._config = config
        self.conninfo = conninfo
        self._preparing = Preparing.through(config.pooler)
        self.idle: deque[AsyncPgConnection] = deque()
        self.waiters: deque[TaskInQueue] = deque()
        self.loop: asyncio.AbstractEventLoop | None = None
        self._size = 0
        self._connecting = 0
        self._grow_at = 0.0  # no attempt to open one more before that time
        self._connect_time = config.connect_timeout
        self._closed = False
        self._connected = False
        self._pool: psycopg_pool.AsyncConnectionPool[Any] | None = None
        self._opening: asyncio.Lock | None = None
        self._watchdog: Watchdog | None = None
        self._attempts = Attempts()
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
            self._watchdog.watch(self)
            self._opening = asyncio.Lock()
        return self._watchdog

    def refuse_other(self, loop: asyncio.AbstractEventLoop) -> None:
        """Refuse a loop that is not the store's."""
        if self.loop not in (None, loop):
            raise ConfigError(
                "this AsyncStore belongs to another event loop: its connections cannot be used "
                "or closed here; make one AsyncStore per loop, and close it there"
            )

    def is_exhausted(self) -> bool:
        return not self.idle and self._size >= self._config.pool_max_size

    def counts(self) -> tuple[int, int, int, int]:
        waiting = sum(not each.turn.done() for each in self.waiters)
        return self._size, len(self.idle), waiting, self._config.pool_max_size

    # -- taking and giving back

    async def execute(self, op: Op[Any], deadline: float) -> PGresult:
        """Perform one operation. While all connections are busy it waits in the queue of `check_out`; the
        connection whose turn it is carries it at once, and its task wakes up only with the answer."""
        connection, result = await self._check_out(deadline, op.statement.name, op)
        if connection is None:
            assert result is not None
            return result
        try:
            return await connection.execute(op, deadline - monotonic(), result)
        finally:
            self.check_in(connection)

    async def check_out(self, deadline: float, action: str) -> AsyncPgConnection:
        connection, _ = await self._check_out(deadline, action)
        assert connection is not None
        return connection

    async def _check_out(
        self, deadline: float, action: str, op: Op[Any] | None = None
    ) -> tuple[AsyncPgConnection | None, PGresult | None]:
        """A connection, or the answer to `op`; both, where the server refused it on that connection."""
        watchdog = self.enter_loop()
        started = monotonic()
        patience = started + self._config.pool_timeout
        refusal: PgkvError | None = None  # why there are not more of them
        while True:
            while self.idle:
                connection = self.idle.pop()
                if not connection.is_stale():
                    return connection, None
                self.discard(connection)
            if self._closed:
                raise closed(action)
            if self._size < self._config.pool_max_size and (
                monotonic() >= self._grow_at or not self._has_others()
            ):
                self._size += 1
                try:
                    return await self._open(deadline, action), None
                except PgkvError as error:
                    if not self._has_others():
                        raise
                    # The server may be full while ours are only busy: wait for those.
                    self._grow_at = monotonic() + GROW_AGAIN
                    refusal = error.with_traceback(None)
                continue
            waiter = TaskInQueue(
                watchdog.loop.create_future(), op, min(deadline, patience), deadline
            )
            self.waiters.append(waiter)
            if waiter.deadline < watchdog.next_look:
                watchdog.look_at(waiter.deadline)
            try:
                answer = await waiter.turn
            except BaseException:
                self._leave(waiter)
                raise
            finally:
                if _observe.listeners:
                    seconds = (waiter.served_at or monotonic()) - started
                    _observe.event("pgkv.pool.waited", operation=action, seconds=seconds)
            if answer is TOO_LATE:
                if refusal is not None:
                    try:
                        raise refusal
                    finally:
                        del refusal  # its traceback holds this frame
                raise busy(self._config, action, by_pool=patience <= deadline)
            given = waiter.connection
            if answer is not None:
                return given, answer
            if given is not None:
                # It has been idle for a turn of the loop.
                if not given.is_stale():
                    return given, None
                self.discard(given)

    def _leave(self, waiter: TaskInQueue) -> None:
        """Its task was cancelled, or its operation failed."""
        waiter.op = None  # who was cancelled stays in the queue; the value need not
        waiter.turn.cancel()  # unless it was, or is done: a coroutine can be closed as well
        if waiter.connection is not None:
            self.check_in(waiter.connection)
        elif not waiter.turn.cancelled() and waiter.turn.result() is None:
            self._wake()  # told to look again in the very turn in which it went away

    def _wake(self) -> None:
        """Let the first who still waits open a connection, or see that the store is closed."""
        while self.waiters:
            waiter = self.waiters.popleft()
            if not waiter.turn.done():
                waiter.turn.set_result(None)
                return

    def put_idle(self, connection: AsyncPgConnection) -> None:
        """Take a connection back from an operation; the first who waits has it next."""
        now = monotonic()
        if self._closed or connection.retire_at < now:
            self._retire(connection)
            return
        # The next task sends at once: what a terminated backend said after its last answer
        # would be lost with the connection, and the outcome unknown.
        if self.waiters and connection.is_stale():
            self.discard(connection)
            return
        while self.waiters:
            if self.waiters.popleft().takes(connection, now):
                return
        self.idle.append(connection)

    def check_in(self, connection: AsyncPgConnection) -> None:
        """Take a connection back from an operation that failed: keep it if it still works."""
        if connection.is_usable():
            self.put_idle(connection)
        else:
            self.discard(connection)

    def discard(self, connection: AsyncPgConnection) -> None:
        """Close a connection; what still runs on it is cancelled first, in the background."""
        _observe.event("pgkv.pool.dropped")
        if connection.is_running():
            connection.detach()  # an answer that comes before the task starts must not free it
            self._spawn(self._cancel(connection))
            return
        connection.close()
        self._return(connection)

    async def _cancel(self, connection: AsyncPgConnection) -> None:
        try:
            await connection.cancel_and_close()
        finally:
            self._return(connection)

    def _retire(self, connection: AsyncPgConnection) -> None:
        connection.detach()
        self._return(connection)
        while self.idle and self.idle[0].retire_at < monotonic():
            oldest = self.idle.popleft()
            oldest.detach()
            self._return(oldest)

    def _return(self, connection: AsyncPgConnection) -> None:
        self._size -= 1
        self._drop_dead_pool()
        if self._pool is None or connection.conn._pool is not self._pool:
            connection.close()
        else:
            self._spawn(self._pool.putconn(connection.conn))
        self._wake()

    def _drop_dead_pool(self) -> None:
        """Give up a pool whose tasks were cancelled, by a program that cancels all tasks of its
        loop: it neither opens nor takes back connections any more."""
        pool = self._pool
        tasks = () if pool is None else (*pool._workers, pool._sched_runner)
        if pool is not None and any(task is not None and task.done() for task in tasks):
            self._pool = None
            while pool._pool:
                pool._pool.popleft().pgconn.finish()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _has_others(self) -> bool:
        """Whether other connections are open: those being opened do not count."""
        return self._size > self._connecting

    # -- deadlines of the queue, for the watchdog

    @property
    def deadline(self) -> float:
        """The first of all who wait."""
        return min(
            (each.deadline for each in self.waiters if not each.turn.done()), default=math.inf
        )

    def time_out(self) -> None:
        now = monotonic()
        for waiter in self.waiters:
            if waiter.deadline <= now:
                waiter.time_out()

    # -- opening

    async def _open(self, deadline: float, action: str) -> AsyncPgConnection:
        self._connecting += 1
        try:
            conn = await self._connect(deadline, action)
        except BaseException:
            self._size -= 1
            self._wake()
            raise
        finally:
            self._connecting -= 1
        prepared = self._prepared.setdefault(conn, set())
        preparing = self._preparing
        connection = AsyncPgConnection(
            conn, self.enter_loop(), prepares=True, prepared=prepared, preparing=preparing
        )
        if preparing is not None and preparing.allowed is None:
            try:
                await connection.try_preparing(deadline)
            except BaseException:
                self.discard(connection)
                raise
        connection.retire_at = monotonic() + KEEP_TIME
        connection.on_free = self.put_idle
        return connection

    async def _connect(self, deadline: float, action: str) -> psycopg.AsyncConnection[Any]:
        started = monotonic()
        pool, opened_now = await self._psycopg_pool(action)
        until = min(deadline, started + self._connect_time)
        while opened_now and not self._connected and still_opening(pool, self._attempts):
            # Asking at once would make the pool grow beyond the one it is opening already.
            if monotonic() >= until:
                break
            await asyncio.sleep(FIRST_NAP)
        while True:
            nap = max(0.001, min(OPENING_NAP, until - monotonic()))
            try:
                conn: psycopg.AsyncConnection[Any] = await pool.getconn(timeout=nap)
            except PoolTimeout:
                for at, failure in self._attempts.failures:
                    if at >= started:
                        raise unreachable(failure, action) from failure
                if monotonic() >= until:
                    raise no_connection(self._config, action, until - started) from None
            except PoolClosed:
                raise closed(action) from None
            else:
                if not stale(conn):
                    self._connected = True
                    return conn
                await conn.close()
                await pool.putconn(conn)
            finally:
                finish_returned(pool)

    async def _psycopg_pool(
        self, action: str
    ) -> tuple[psycopg_pool.AsyncConnectionPool[Any], bool]:
        """The pool, and whether this call opened it."""
        assert self._opening is not None
        async with self._opening:
            if self._closed:
                raise closed(action)
            self._drop_dead_pool()
            opened_now = self._pool is None
            if self._pool is None:
                config = self._config
                # In a thread: an embedded server may have to be started first.
                conninfo = await asyncio.to_thread(self.conninfo)
                self._connect_time = _conninfo.connect_time(config, conninfo)
                options = pool_options(self, config, _recording(self._attempts))
                pool = psycopg_pool.AsyncConnectionPool(conninfo, open=False, **options)
                await pool.open()
                self._pool = pool
            return self._pool, opened_now

    async def close(self) -> None:
        self._closed = True
        while self.waiters:
            self._wake()
        if self._watchdog is not None:
            self._watchdog.forget(self)
        while self.idle:
            connection = self.idle.popleft()
            self._size -= 1
            connection.close()
        if self._tasks:
            await asyncio.wait(self._tasks)
        async with self._opening or contextlib.nullcontext():  # it may be opened just now
            pool, self._pool = self._pool, None
        if pool is None:
            return
        idle = list(pool._pool)
        try:
            await pool.close(timeout=CLOSE_TIMEOUT)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # The pool's own tasks were cancelled, by the end of asyncio.run() for instance.
            for conn in idle:
                conn.pgconn.finish()


TOO_LATE = object()


@dataclass(slots=True, eq=False)
class TaskInQueue:
    """A task in the queue. It wants an operation performed or, without one, a connection for itself.

    Args:
        turn: what the task waits for: the operation's answer, TOO_LATE, or None, which means "it is
            yours" with a connection and "look again" without.
        op: the operation.
        deadline: of the wait.
        until: the deadline of the answer.

    Attributes:
        connection: what the task has to give back, if anything.
        served_at: when it was given a connection; 0.0 before.
    """

    turn: asyncio.Future[Any]
    op: Op[Any] | None
    deadline: float
    until: float
    connection: AsyncPgConnection | None = None
    served_at: float = 0.0

    def takes(self, connection: AsyncPgConnection, now: float) -> bool:
        """Whether it still wants a connection; it has this one then."""
        if self.deadline <= now:
            self.time_out()
        if self.turn.done():
            return False
        self.connection, self.served_at = connection, now
        if self.op is None or not connection.send_pending(self.op, self, self.until - now):
            self.turn.set_result(None)
        return True

    def time_out(self) -> None:
        """The deadline has passed; the queue passes over who is done."""
        self.op = None
        if not self.turn.done():
            self.turn.set_result(TOO_LATE)


class AsyncCallerPool(OverCallerPool):
    def __init__(self, pool: psycopg_pool.AsyncConnectionPool[Any], config: Config) -> None:
        super().__init__(pool, config)
        self.loop: asyncio.AbstractEventLoop | None = None
        self._watchdog: Watchdog | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def check_out(self, deadline: float, action: str) -> AsyncPgConnection:
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
                return AsyncPgConnection(
                    conn, self._watchdog, prepares=self._prepares, prepared=prepared
                )
            try:
                raise failure from failure.__cause__
            finally:
                del failure  # its traceback holds this frame

    async def execute(self, op: Op[Any], deadline: float) -> PGresult:
        """Perform one operation on a connection of its own."""
        connection = await self.check_out(deadline, op.statement.name)
        try:
            return await connection.execute(op, deadline - monotonic())
        finally:
            self.check_in(connection)

    def check_in(self, connection: AsyncPgConnection) -> None:
        task = asyncio.get_running_loop().create_task(self._check_in(connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    put_idle = check_in
    discard = check_in

    async def _check_in(self, connection: AsyncPgConnection) -> None:
        if connection.is_running():
            await connection.cancel_and_close()
        elif connection.is_usable():
            connection.detach()
        else:
            connection.close()
        await self._caller_pool.putconn(connection.conn)

    async def close(self) -> None:
        """The pool is the caller's to close; what is on its way back to it arrives first."""
        if self._tasks:
            await asyncio.wait(self._tasks)


def stale(conn: psycopg.AsyncConnection[Any]) -> bool:
    """Whether a connection that lay in a pool has something to say: it is dead then."""
    return conn.closed or bool(poller(conn.pgconn.socket)(0))


def _recording(attempts: Attempts) -> type[psycopg.AsyncConnection[Any]]:

    class AsyncRecordingConnection(psycopg.AsyncConnection[Any], OwnConnection):
        @classmethod
        async def connect(  # type: ignore[override]  # the pool passes keywords only
            cls, conninfo: str = "", **kwargs: Any
        ) -> psycopg.AsyncConnection[Any]:
            with attempts.attempt():
                return await whole_or_none(super().connect(conninfo, **kwargs))

    return AsyncRecordingConnection
