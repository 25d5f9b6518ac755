"""The channels of a sharded store: each operation goes to the server that has its slot, by that
server's own channel. One class is for threads, one for event loops; `placement` has their flows.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from time import monotonic
from typing import Any, TypeVar

from psycopg import IsolationLevel

from .._engine._async.channel import AsyncPoolChannel
from .._engine._async.transaction import AsyncBoundChannel
from .._engine._sync.channel import PoolChannel
from .._engine._sync.transaction import BoundChannel
from .._engine.base import PooledOperations
from .._engine.schema import complete_columns
from .._engine.sweep import Collector, weakly
from .._fork import CONNECTIONS, survives_fork
from .._ops.drivers import drive, drive_async
from .._ops.op import Flow, Op, Param, Pipelined, Statement, Transaction, call
from .._sql.sweep import Sweep
from ..config import Config, Table
from ..errors import ConfigError, PgkvError, StoreUnavailableError, TableNotFoundError
from ..types import PoolStats
from .placement import Router, left
from .slots import ANY, schema_of, slot_of_schema
from .sql import InSlot, Spread

T = TypeVar("T")

THREADS_MAX = 1000  # of a store: each call needs as many as it asks servers, less one


class Sharding(PooledOperations):
    """What both channels share.

    Args:
        router: knows the map.
        slot: the one that a view is limited to; None for all.
    """

    router: Router
    slot: int | None
    _background: Any
    _drive: Callable[[Flow[Any]], Any]
    _in_slot: Callable[[IsolationLevel | None], Any]

    def _set_up(self, config: Config, router: Router, slot: int | None) -> None:
        PooledOperations.__init__(self, config, None)
        self.router = router
        self.slot = slot
        self._views: dict[int, Any] = {}
        self._watched: set[Table] = set()

    def of_slot(self, slot: int) -> Any:
        """The channel that is limited to that slot, over the same connections."""
        view = self._views.get(slot)
        if view is None:
            view = type(self)(self._config, self.router, slot)  # type: ignore[call-arg]  # as both have it
            view._collectors, view._on_close = self._collectors, self._on_close
            view._background = self._background
            view = self._views.setdefault(slot, view)
        return view

    @property
    def state(self) -> str:
        """Whether it was closed."""
        return "closed" if self.router.closed else ""

    def _channels(self) -> list[Any]:
        if self.slot is not None:
            return [self.router.channel(self.slot)]
        return [node.channel for node in self.router.nodes]

    def is_exhausted(self) -> bool:
        """Whether a pool has no connection left."""
        return any(channel.is_exhausted() for channel in self._channels())

    def pool_stats(self) -> PoolStats:
        """The connections and waiters of all servers."""
        counts = [channel._pool.counts() for channel in self._channels()]
        return PoolStats(*map(sum, zip(*counts, strict=True)))

    def ping(self, op: Op[Any], timeout: float | None) -> Flow[None]:
        """Make a round trip to every server, or to that of this view."""
        calls = [partial(channel.execute, op, timeout) for channel in self._channels()]
        for found in (yield from call(self.router.gather, calls)):
            if isinstance(found, PgkvError):
                raise found

    def conninfo(self) -> str:
        """What a connection to the slot's server is opened with.

        Raises:
            ConfigError: this is a channel to several servers.
        """
        return str(self._one("a connection of its own").conninfo())

    def _one(self, what: str) -> Any:
        if self.slot is None:
            raise ConfigError(
                f"a sharded store has several servers, and {what} is of one: use "
                "store.on(key), the store of that key's slot"
            )
        return self.router.channel(self.slot)

    def watch(self, sql: Sweep) -> None:
        """Collect the expired rows of a table in every slot, or in the one that it names."""
        if sql.table in self._watched:
            return
        parts: list[Any] = [sql]
        if sql.table.schema == ANY:
            parts = [InSlot(sql, slot) for slot in range(self.router.slots.count)]
        for each in parts:
            if each.table not in self._collectors:
                collector = Collector(each, weakly(self._background))
                self._collectors[each.table] = collector
                if any(channel._patrolling for channel in self._channels()):
                    collector.start_patrol()
        self._watched.add(sql.table)

    def pipeline(self, ops: Sequence[Op[Any]], *, atomic: bool) -> Flow[list[Any]]:
        """Send operations, those of one server together."""
        return self.router.pipeline(ops, atomic=atomic, own=self.slot or 0)

    def _missing(self, table: Table) -> Flow[None]:
        """Create a table in the view's slot, or in all."""
        slot = slot_of_schema(table.schema)
        return self.router.create([table], None if slot is None else [slot])

    def _elsewhere(self, op: Op[Any], timeout: float | None) -> Flow[Any]:
        """Perform an operation that is of several slots, or of none."""
        if op.statement.name == "create_table" and op.statement.table is not None:
            yield from self._missing(op.statement.table)
            return complete_columns()  # what the statement asks for
        return (yield from self.router.perform(op, timeout, self.slot or 0))

    def create_missing_table(self, table: Table, deadline: float | None = None) -> Any:
        """Create a table where it is missing."""
        del deadline
        return self._drive(self._missing(table))

    def _together(self, step: Transaction[Any] | Pipelined, timeout: float | None) -> Any:
        self._one("a transaction")
        return self._drive(self._followed(step, self.until(step, timeout)))

    def _followed(self, step: Transaction[Any] | Pipelined, deadline: float) -> Flow[Any]:
        """Perform a step of the slot; nothing of it has happened where a table was not met."""
        assert self.slot is not None
        missed: Counter[Any] = Counter()
        while True:
            channel = yield from self.router._find(self.slot, deadline)
            try:
                return (yield from call(channel._together, step, left(deadline)))
            except TableNotFoundError as error:
                settling = self.router._settled(self.slot, channel, step.table, deadline, missed)
                if not (yield from settling):
                    raise error from None

    def transaction(self, isolation: IsolationLevel | None = None) -> Any:
        """Open a transaction in the slot of this view.

        Raises:
            ConfigError: with a snapshot for all of it, on Citus.
        """
        self._one("a transaction")
        if self.router.fences is not None and (isolation or 0) > IsolationLevel.READ_COMMITTED:
            raise ConfigError(
                "no REPEATABLE READ on a Citus slot: its snapshot may be older than a move"
            )
        return self._in_slot(isolation)

    def _beforehand(self) -> Flow[None]:
        """Create the tables of the slot that are missing: inside a transaction it is too late."""
        assert self.slot is not None
        if self.router.creates:
            schema = schema_of(self.slot)
            tables = [t for t in self._collectors if t.schema == schema and t not in self._known]
            yield from self.router.create(tables, [self.slot])
            self._known.update(tables)

    def _moved(self, error: TableNotFoundError, channel: Any) -> Flow[None]:
        """Read the map after a transaction that met no table: it may be repeated elsewhere."""
        assert self.slot is not None
        settled = self.router._settled(self.slot, channel, None, self.until(), Counter())
        with contextlib.suppress(PgkvError):
            error.retryable = yield from settled

    def _away(self, channel: Any) -> Flow[None]:
        assert self.slot is not None
        yield from self.router.look_for_successor(self.slot, channel, self.until())


class ShardedChannel(Sharding, PoolChannel):
    """Operations of a sharded `Store`.

    Args:
        config: timeouts.
        router: knows the map.
        slot: the one that a view is limited to; None for all.
    """

    _drive = staticmethod(drive)

    def __init__(self, config: Config, router: Router, slot: int | None = None) -> None:
        self._set_up(config, router, slot)
        self._begin()
        survives_fork(self, CONNECTIONS)

    def after_fork(self) -> None:
        """Start again in the child: the servers' channels do so themselves."""
        self._begin()
        self.router._reading.clear()  # who reads the map is in the parent
        for collector in self._collectors.values():
            collector.reset()

    def execute(self, op: Op[T], timeout: float | None = None) -> T:
        """Perform one operation."""
        if type(op) is Spread:
            return drive(self.router.perform(op, timeout, 0))  # type: ignore[no-any-return]  # joined by op
        return self.call(op.statement, op.params, timeout, op)  # type: ignore[no-any-return]  # decoded by op

    def call(
        self,
        statement: Statement[T],
        params: Sequence[Param],
        timeout: float | None = None,
        op: Op[T] | None = None,
    ) -> T:
        """Perform one statement where its slot is."""
        router = self.router
        route = router.routes.get(statement) or router.route(statement)
        if route is None:
            return drive(self._elsewhere(op or Op(statement, params), timeout))  # type: ignore[no-any-return]  # decoded by op
        slot = route.find(params)
        channel = router.channels[slot]
        there = route.at(slot)
        if op is not None:
            op.statement = there
        if channel is not None:
            started = monotonic()
            try:
                return channel.call(there, params, timeout, op)  # type: ignore[no-any-return]  # decoded by op
            except router.strays as error:
                deadline = started + (self._timeout if timeout is None else timeout)
                flow = router.follow(op or Op(there, params), slot, channel, error, deadline)
            return drive(flow)  # type: ignore[no-any-return]  # decoded by op
        return drive(router.perform(op or Op(there, params), timeout, slot))  # type: ignore[no-any-return]  # as above

    @contextlib.contextmanager
    def _in_slot(self, isolation: IsolationLevel | None) -> Iterator[BoundChannel]:
        drive(self._beforehand())
        channel = self._one("a transaction")
        try:
            with channel._bound(isolation) as bound:
                yield bound
        except TableNotFoundError as error:
            drive(self._moved(error, channel))
            raise
        except StoreUnavailableError:
            drive(self._away(channel))
            raise

    def close(self) -> None:
        """Close the connections to all servers."""
        self.router.closed = True
        self._closing.set()
        for node in self.router.nodes:
            node.channel.close()
        while self._on_close:
            self._on_close.pop()()


class AsyncShardedChannel(Sharding, AsyncPoolChannel):
    """Operations of a sharded `AsyncStore`; see `ShardedChannel`."""

    _drive = staticmethod(drive_async)

    def __init__(self, config: Config, router: Router, slot: int | None = None) -> None:
        self._set_up(config, router, slot)
        self._tasks: set[asyncio.Task[None]] = set()

    async def execute(self, op: Op[T], timeout: float | None = None) -> T:
        """Perform one operation."""
        if type(op) is Spread:
            return await drive_async(self.router.perform(op, timeout, 0))
        return await self.call(op.statement, op.params, timeout, op)

    async def call(
        self,
        statement: Statement[T],
        params: Sequence[Param],
        timeout: float | None = None,
        op: Op[T] | None = None,
    ) -> T:
        """Perform one statement where its slot is."""
        router = self.router
        route = router.routes.get(statement) or router.route(statement)
        if route is None:
            return await drive_async(self._elsewhere(op or Op(statement, params), timeout))
        slot = route.find(params)
        channel = router.channels[slot]
        there = route.at(slot)
        if op is not None:
            op.statement = there
        if channel is not None:
            started = monotonic()
            try:
                return await channel.call(there, params, timeout, op)  # type: ignore[no-any-return]  # decoded by op
            except router.strays as error:
                deadline = started + (self._timeout if timeout is None else timeout)
                flow = router.follow(op or Op(there, params), slot, channel, error, deadline)
            return await drive_async(flow)
        return await drive_async(router.perform(op or Op(there, params), timeout, slot))

    @contextlib.asynccontextmanager
    async def _in_slot(self, isolation: IsolationLevel | None) -> AsyncIterator[AsyncBoundChannel]:
        await drive_async(self._beforehand())
        channel = self._one("a transaction")
        try:
            async with channel._bound(isolation) as bound:
                yield bound
        except TableNotFoundError as error:
            await drive_async(self._moved(error, channel))
            raise
        except StoreUnavailableError:
            await drive_async(self._away(channel))
            raise

    async def close(self) -> None:
        """Close the connections to all servers."""
        self.router.closed = True
        for task in tuple(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await asyncio.gather(*(node.channel.close() for node in self.router.nodes))
        while self._on_close:
            await asyncio.to_thread(self._on_close.pop())


class InThreads:
    """Calls functions at the same time; of each what it returned, or its `PgkvError`."""

    def __init__(self) -> None:
        self.after_fork()
        survives_fork(self)

    def after_fork(self) -> None:
        """Forget the threads; the next call starts some."""
        self._threads = ThreadPoolExecutor(THREADS_MAX, "pgkv-shards")

    def __call__(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """Call each: the last one here, the others in threads."""
        given = [(Future[Any](), each) for each in calls[:-1]]
        for future, each in given:
            # It may be queued even where no thread could be started: who begins it, performs it.
            with contextlib.suppress(RuntimeError):
                self._threads.submit(copy_context().run, _perform, future, each)
        here = [_outcome(each) for each in calls[-1:]]
        return [
            _outcome(each) if future.cancel() else future.result() for future, each in given
        ] + here

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False)


def _outcome(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except PgkvError as error:
        return error


def _perform(future: Future[Any], function: Callable[[], Any]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(_outcome(function))
        except BaseException as error:  # noqa: BLE001  # it is for the caller
            future.set_exception(error)


async def at_once(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """The same for functions that return awaitables, at the same time."""
    found = await asyncio.gather(*(each() for each in calls), return_exceptions=True)
    for each in found:
        if isinstance(each, BaseException) and not isinstance(each, PgkvError):
            raise each
    return found
