"""Where an AsyncStore's operations go: `_sync/channel` with ``await``. The algorithms are the same
flows; only the waiting differs."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from random import random
from time import monotonic
from typing import Any, TypeVar

import psycopg
from psycopg import IsolationLevel

from ... import _observe
from ..._ops.drivers import drive_async
from ..._ops.op import (
    BINARY,
    Flow,
    Op,
    Param,
    Pipelined,
    Raced,
    Signal,
    Statement,
    Transaction,
)
from ..._sql import control
from ..._sql.sweep import Sweep
from ...config import Config, Table
from ...errors import PgkvError
from .. import schema as _schema
from ..base import LAST_TIME, PooledOperations
from ..results import OK, failed
from ..sweep import PATROL_PAUSE, SWEEP_CHANCE, Collector, warn_dropped, weakly
from .pool import AsyncCallerPool, AsyncStorePool
from .transaction import AsyncBoundChannel

T = TypeVar("T")


class AsyncPoolChannel(PooledOperations):
    _pool: AsyncStorePool | AsyncCallerPool

    def __init__(self, config: Config, pool: AsyncStorePool | AsyncCallerPool) -> None:
        super().__init__(config, pool)
        self._tasks: set[asyncio.Task[None]] = set()

    # -- one operation

    async def execute(self, op: Op[T], timeout: float | None = None) -> T:
        return await self.call(op.statement, op.params, timeout, op)

    async def call(
        self,
        statement: Statement[T],
        params: Sequence[Param],
        timeout: float | None = None,
        op: Op[T] | None = None,
    ) -> T:
        started = monotonic()
        seconds = self._timeout if timeout is None else timeout
        pool = self._pool
        if pool.idle and pool.loop is asyncio.get_running_loop():
            connection = pool.idle.pop()
            if connection.is_stale():
                pool.discard(connection)
                return await self._recover(op or Op(statement, params), started, timeout, None)
            sent = False
            try:
                result = None
                if statement.prepared_name in connection.ready:
                    connection.send_prepared(
                        statement.prepared_name, params, statement.formats, BINARY
                    )
                    sent = True
                    result = await connection.expect(statement, seconds, started + seconds)
                if result is None or result.status not in OK:
                    left = started + seconds - monotonic()
                    result = await connection.execute(Op(statement, params), left, result)
            except PgkvError as error:
                pool.check_in(connection)
                return await self._recover(op or Op(statement, params), started, timeout, error)
            except psycopg.Error as error:
                pool.check_in(connection)
                failure = failed(error, statement, sent=sent)
                try:
                    return await self._recover(
                        op or Op(statement, params), started, timeout, failure
                    )
                finally:
                    del failure  # its traceback holds this frame
            except BaseException:
                pool.discard(connection)
                raise
            pool.put_idle(connection)
        else:
            # With more tasks than connections this is the usual way, so it is short as well.
            self._start_patrols()
            try:
                result = await pool.execute(op or Op(statement, params), started + seconds)
            except PgkvError as error:
                return await self._recover(op or Op(statement, params), started, timeout, error)
        answer = (op or statement).decode(result)
        if statement.writes and random() < SWEEP_CHANCE:  # noqa: S311  # a sample, no secret
            self._sweep(statement.table)
        if isinstance(answer, Signal) or _observe.hooks:
            op = op or Op(statement, params)
            if isinstance(answer, Raced):
                return await self._recover(op, started, timeout, answer)
            return self._finished(op, answer, started)  # type: ignore[no-any-return]  # decoded by op
        return answer

    async def _recover(
        self, op: Op[T], started: float, timeout: float | None, outcome: PgkvError | Raced | None
    ) -> T:
        deadline = started + (self._timeout if timeout is None else timeout)
        flow = self._recovering(op, started, deadline, outcome)
        del outcome  # an error's traceback holds this frame
        return await drive_async(flow, self._attempt, deadline, self._attempt)

    async def _attempt(
        self, step: Op[Any] | Transaction[Any] | Pipelined, deadline: float | None
    ) -> Any:
        assert deadline is not None
        if isinstance(step, Transaction):
            async with self._bound(deadline=deadline) as bound:
                return await bound.run(step.flow())
        if isinstance(step, Pipelined):
            return await self._attempt_batch(step, deadline)
        return step.decode(await self._pool.execute(step, deadline))

    async def _attempt_batch(self, batch: Pipelined, deadline: float) -> list[Any]:
        connection = await self._pool.check_out(deadline, batch.name)
        try:
            seconds = deadline - monotonic()
            results = await connection.execute_all(batch.ops, seconds, sync_each=batch.sync_each)
        finally:
            self._pool.check_in(connection)
        return self._answers(batch, results)

    # -- flows

    async def run(self, flow: Flow[T], timeout: float | None = None) -> T:
        return await drive_async(flow, self.execute, timeout, self._together)

    async def _together(self, step: Transaction[Any] | Pipelined, timeout: float | None) -> Any:
        until = self.until(step, timeout)
        flow = self._settling(step, until)
        answer = await drive_async(flow, self._attempt, until, self._attempt)
        self._evict_after(step)
        return answer

    def transaction(
        self, isolation: IsolationLevel | None = None
    ) -> contextlib.AbstractAsyncContextManager[AsyncBoundChannel]:
        return self._bound(isolation, ensure=True)

    @contextlib.asynccontextmanager
    async def _bound(
        self,
        isolation: IsolationLevel | None = None,
        *,
        deadline: float | None = None,
        ensure: bool = False,
    ) -> AsyncIterator[AsyncBoundChannel]:
        if ensure:
            # Inside, a missing table would fail the caller's transaction.
            for table in tuple(self._collectors):
                if table not in self._known and table.auto_create:
                    await self.create_missing_table(table)
        until = monotonic() + self._timeout if deadline is None else deadline
        # Said each time: behind a pooler the connection's own default is the server's.
        begin = control.begin(isolation or IsolationLevel.READ_COMMITTED)
        connection = await self._pool.check_out(until, "transaction")
        if isinstance(self._pool, AsyncCallerPool):
            connection.prepares = False  # as in `_sync/channel`
        bound = AsyncBoundChannel(connection, self._timeout, deadline)
        try:
            async with bound.span(begin, control.commit(), control.rollback(), at_once=False):
                yield bound
                await bound._free("transaction")
        finally:
            bound.end()
            self._pool.check_in(connection)

    async def create_missing_table(self, table: Table, deadline: float | None = None) -> None:
        until = monotonic() + self._timeout if deadline is None else deadline

        async def execute(op: Op[Any], _: float | None) -> Any:
            return await self.execute(op, max(0.001, until - monotonic()))

        await drive_async(_schema.ensure(table), execute)
        self._known.add(table)

    # -- the background

    def watch(self, sql: Sweep) -> None:
        if sql.table not in self._collectors:
            collector = self._collectors[sql.table] = Collector(sql, weakly(self._background))
            try:
                asyncio.get_running_loop()
            except RuntimeError:
                self._patrolling = False  # the next slow path starts it
            else:
                if self._patrolling:
                    collector.start_patrol()

    def _background(self, flow: Flow[None], done: Callable[[], None]) -> None:
        ref, tasks, loop = weakref.ref(self), self._tasks, asyncio.get_running_loop()
        task = loop.create_task(_run_quietly(ref, flow))
        tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            tasks.discard(task)
            done()
            if task.cancelled() or task.exception() is not None:
                # By a timer: cancelling all tasks of the loop does not end the patrols.
                loop.call_later(PATROL_PAUSE, _start_again, ref)

        task.add_done_callback(ended)

    async def close(self) -> None:
        if isinstance(self._pool, AsyncStorePool):
            self._pool.refuse_other(asyncio.get_running_loop())
        for task in tuple(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        while self.last_flows:
            await self.run(self.last_flows.pop()(), LAST_TIME)
        await self._pool.close()
        while self._on_close:
            await asyncio.to_thread(self._on_close.pop())


async def _run_quietly(ref: weakref.ref[AsyncPoolChannel], flow: Flow[None]) -> None:
    """Run a flow until it ends or the channel is dropped."""

    async def execute(op: Op[Any], timeout: float | None) -> Any:
        channel = ref()
        if channel is None:
            raise GeneratorExit
        return await channel.execute(op, timeout)

    try:
        await drive_async(flow, execute)
    except GeneratorExit:
        warn_dropped()
    except PgkvError:
        pass
    except Exception as error:  # a defect of ours must not pass in silence
        _observe.warning("pgkv.sweep.broken", error=type(error).__name__)
        raise


def _start_again(ref: weakref.ref[AsyncPoolChannel]) -> None:
    channel = ref()
    if channel is not None and not channel.state:
        channel._patrolling = False
        channel._start_patrols()
