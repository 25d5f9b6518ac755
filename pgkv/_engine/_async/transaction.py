"""Operations inside a transaction, for asyncio. Tasks may share a transaction: one operation at a time uses the connection."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from time import monotonic
from typing import Any, TypeVar

import psycopg
from psycopg import IsolationLevel, pq

from ... import _observe
from ..._ops.drivers import drive_async
from ..._ops.op import Flow, Op, Pipelined, Raced, Transaction
from ..._sql import control
from ...config import Table
from ...errors import PgkvError, TransactionError
from ..base import InTransaction, accepted, settled
from ..caller import check_connection
from ..flows import RefusedError
from ..nesting import NESTED_NAP, never_free
from ..results import OK, is_fenced, refusal
from .connection import AsyncPgConnection, Watchdog

T = TypeVar("T")


class AsyncBoundChannel(InTransaction):
    _connection: AsyncPgConnection

    def __init__(
        self, connection: AsyncPgConnection, timeout: float, deadline: float | None = None
    ) -> None:
        super().__init__(timeout, deadline)
        self._connection = connection
        self._lock = AsyncReentrant(asyncio.Lock())

    async def execute(self, op: Op[T], timeout: float | None = None) -> T:
        if not _observe.hooks:
            return await self._execute(op, timeout)
        started = monotonic()
        try:
            answer = await self._execute(op, timeout)
        except BaseException as error:
            _observe.notify(op, started, error=error, channel=self)
            raise
        _observe.notify(op, started, answer, channel=self)
        return answer

    async def _execute(self, op: Op[T], timeout: float | None) -> T:
        if self._nesting.owner is not None:
            await self._free(op.statement.name)
        async with self._using():
            self._check(op.statement.name)
            if not op.statement.savepoint or not self._in_transaction():
                return await self._send(op, timeout)
            # A refused value is an expected outcome: it must not abort what the caller did.
            async with self._savepoint():
                return await self._send(op, timeout)

    def _using(self, *, failed: bool = False) -> contextlib.AbstractAsyncContextManager[Any]:  # noqa: ARG002  # a caller's connection differs
        """Hold the connection for one operation: tasks may share a transaction, which may have
        `failed` where it is rolled back to a savepoint."""
        return self._lock

    async def _free(self, action: str) -> None:
        """Wait while another task is in a nested transaction."""
        if not self._nesting.is_free(asyncio.current_task()):
            until = monotonic() + self._seconds(None)
            while not self._nesting.is_free(asyncio.current_task()):
                if monotonic() > until:
                    raise never_free(action, self._timeout)
                await asyncio.sleep(NESTED_NAP)

    async def _send(self, op: Op[T], timeout: float | None = None) -> T:
        answer: Any = None
        for _ in range(op.statement.repeats + 1):
            seconds = self._seconds(timeout)
            answer = op.decode(
                await self._connection.execute(op, seconds)
                if self._unbegun is None
                else await self._begin_with(op, self._unbegun, seconds)
            )
            if not isinstance(answer, Raced):
                break
        return settled(op, answer)  # type: ignore[no-any-return]  # decoded by op

    async def _begin_with(self, op: Op[Any], begin: Op[None], seconds: float) -> Any:
        """Open the transaction and perform its first operation, in one round trip if that is prepared."""
        until = monotonic() + seconds
        connection = self._connection
        try:
            self._unbegun = None
            # To prepare it belongs to the transaction; a fence is a statement of its own.
            if is_fenced((op,)) or not connection.knows(op.statement):
                await connection.execute(begin, seconds)
                return await connection.execute(op, until - monotonic())
            begun, result = await connection.begin_with(begin, op, seconds)
            if begun.status not in OK:
                raise refusal(begun, begin.statement)
            if result.status not in OK:
                raise refusal(result, op.statement)
            return result
        finally:
            if connection.pgconn.transaction_status == pq.TransactionStatus.IDLE:
                self._ended = "not begun"  # or what follows would be done outside of it

    async def create_missing_table(self, table: Table) -> None:
        """Nothing is created inside a transaction."""

    async def close(self) -> None:
        """The connection is not the store's to close."""

    async def run(self, flow: Flow[T], timeout: float | None = None) -> T:
        return await drive_async(flow, self.execute, timeout, self._together)

    async def _together(self, step: Transaction[Any] | Pipelined, timeout: float | None) -> Any:
        if isinstance(step, Pipelined):
            return await self._perform_batch(step, timeout)
        async with self.transaction() as inner:
            return await inner.run(step.flow(), timeout)

    async def _perform_batch(self, batch: Pipelined, timeout: float | None) -> list[Any]:
        if batch.deadline is not None:
            timeout = batch.deadline - monotonic()
        if batch.sync_each:
            return [await self._outcome(op, timeout) for op in batch.ops]
        try:
            async with self._aside(batch.name):
                seconds = self._seconds(timeout)
                results = await self._connection.execute_all(batch.ops, seconds, sync_each=False)
                return accepted(batch, results)
        except RefusedError as refused:
            return refused.answers

    async def _outcome(self, op: Op[Any], timeout: float | None) -> Any:
        try:
            async with self._aside(op.statement.name):
                return await self._send(op, timeout)
        except PgkvError as error:
            return error

    @contextlib.asynccontextmanager
    async def _aside(self, action: str) -> AsyncIterator[None]:
        await self._free(action)
        async with self._using():
            self._check(action)
            async with self._shielded():
                yield

    @contextlib.asynccontextmanager
    async def transaction(
        self, isolation: IsolationLevel | None = None
    ) -> AsyncIterator[AsyncBoundChannel]:
        if isolation is not None:
            raise TransactionError("the isolation level belongs to the outermost transaction")
        self._check("transaction")
        await self._free("transaction")
        self._nesting.enter(asyncio.current_task())
        try:
            async with self._savepoint():
                inner = AsyncBoundChannel(self._connection, self._timeout, self._deadline)
                inner._lock, inner._depth, inner._outer = self._lock, self._depth, self
                try:
                    yield inner
                    await inner._free("transaction")
                finally:
                    inner.end()
        finally:
            self._nesting.leave()
        inner._ended = "merged into the one around it"

    @contextlib.asynccontextmanager
    async def _savepoint(self) -> AsyncIterator[None]:
        self._depth += 1
        depth = self._depth
        try:
            async with self.span(
                control.savepoint(depth), control.release(depth), control.rollback_to(depth)
            ):
                yield
        finally:
            self._depth -= 1

    @contextlib.asynccontextmanager
    async def span(
        self, begin: Op[None], commit: Op[None], rollback: Op[None], *, at_once: bool = True
    ) -> AsyncIterator[None]:
        if not at_once:
            self._unbegun = begin
        else:
            try:
                async with self._using():
                    await self._send(begin)
            except PgkvError as error:
                error.outcome_unknown = False  # whether it began or not, nothing was done
                raise
        try:
            yield
            self._check_commit()
        except BaseException as error:
            if self._unbegun is None and not self._over() and self._connection.is_idle():
                with contextlib.suppress(PgkvError):
                    async with self._using(failed=True):
                        await self._connection.execute(rollback, self._timeout)
            if isinstance(error, PgkvError):
                # Nothing was committed, whatever became of the statement that failed.
                error.outcome_unknown = False
            raise
        if begin.statement.name == "begin":
            self._ended = "committed"
        if self._unbegun is None:
            async with self._using():
                await self._connection.execute(commit, self._seconds(None))


class AsyncCallerChannel(AsyncBoundChannel):
    def __init__(self, conn: psycopg.AsyncConnection[Any], timeout: float) -> None:
        InTransaction.__init__(self, timeout)  # its connection is attached for each operation
        self._conn = conn
        self._lock = AsyncReentrant(conn.lock)

    @property
    def state(self) -> str:
        return super().state if self._ended else "on a caller's connection"

    def _using(self, *, failed: bool = False) -> contextlib.AbstractAsyncContextManager[Any]:
        return self._attached(failed)

    @contextlib.asynccontextmanager
    async def _attached(self, failed: bool) -> AsyncIterator[None]:
        """Listen on the caller's socket for as long as an operation takes, and no longer."""
        if self._lock.is_mine():
            yield
            return
        conn = self._conn
        if not failed:
            check_connection(conn, "using")
        if not conn.autocommit and conn.pgconn.transaction_status == pq.TransactionStatus.IDLE:
            # psycopg opens the transaction, with the caller's isolation level, as it would
            # for the caller's own first statement.
            await conn.execute("")
        async with self._lock:
            watchdog = Watchdog(asyncio.get_running_loop())
            self._connection = connection = AsyncPgConnection(conn, watchdog, prepares=False)
            try:
                yield
            finally:
                if connection.is_running():
                    await connection.cancel_and_close()
                else:
                    connection.detach()

    @contextlib.asynccontextmanager
    async def transaction(
        self, isolation: IsolationLevel | None = None
    ) -> AsyncIterator[AsyncBoundChannel]:
        async with self._using():
            self._check("transaction")
            inside = self._in_transaction()
        if inside and isolation is not None:
            raise TransactionError("the isolation level belongs to the outermost transaction")
        inner = AsyncCallerChannel(self._conn, self._timeout)
        inner._lock, inner._depth, inner._outer = self._lock, self._depth, self
        await self._free("transaction")
        self._nesting.enter(asyncio.current_task())
        try:
            async with (
                inner._savepoint()
                if inside
                else inner.span(control.begin(isolation), control.commit(), control.rollback())
            ):
                yield inner
                await inner._free("transaction")
        finally:
            self._nesting.leave()
            inner.end()
        if inside:
            inner._ended = "merged into the one around it"


class AsyncReentrant:
    """An asyncio lock that the task which holds it may take again."""

    def __init__(self, lock: asyncio.Lock) -> None:
        self._inner = lock
        self._owner: asyncio.Task[Any] | None = None
        self._depth = 0

    def is_mine(self) -> bool:
        return self._owner is not None and self._owner is asyncio.current_task()

    async def __aenter__(self) -> None:
        if not self.is_mine():
            await self._inner.acquire()
            self._owner = asyncio.current_task()
        self._depth += 1

    async def __aexit__(self, *exc: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None
            self._inner.release()
