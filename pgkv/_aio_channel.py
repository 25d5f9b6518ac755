"""Where an AsyncStore's operations go: `_channel` with ``await``. The algorithms are the same
flows; only the waiting differs."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from random import random
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import psycopg
from psycopg import pq

from . import _observe, _schema
from ._aio_pool import AsyncCallerPool, AsyncLeases
from ._aio_wire import AsyncLink, Watchdog
from ._caller import check_connection
from ._channel import answer_of
from ._flows import RefusedError
from ._op import Batch, Call, Expired, Flow, Op, Raced, Signal, Sleep, Transaction
from ._retry import may_repeat, recover
from ._sql import Statements, control
from ._sweep import SWEEP_CHANCE, Collector
from ._wire import outcomes
from .config import Config, Table
from .errors import ConflictError, PgkvError, TransactionError

if TYPE_CHECKING:
    from psycopg import IsolationLevel

T = TypeVar("T")


class AsyncChannel(Protocol):
    """What an AsyncStore needs of whatever carries its operations."""

    async def execute(self, op: Op[T], timeout: float | None = None) -> T:
        """Perform one operation."""
        ...

    async def run(self, flow: Flow[T]) -> T:
        """Perform an algorithm."""
        ...

    def transaction(
        self, isolation: IsolationLevel | None = None
    ) -> contextlib.AbstractAsyncContextManager[AsyncBoundChannel]:
        """Open a transaction, or a savepoint in one."""
        ...

    async def heal(self, table: Table) -> None:
        """Create a missing table, where that is this channel's business."""
        ...

    def may_repeat(self, op: Op[Any], error: PgkvError, /) -> bool:
        """Whether an operation that failed together with others may be repeated alone."""
        ...

    def watch(self, sql: Statements) -> None:
        """Collect that table's expired rows, if this channel does such things."""
        ...

    async def close(self) -> None:
        """End it."""
        ...


async def drive(flow: Flow[T], perform: Callable[[Any], Awaitable[Any]]) -> T:
    """Run a flow to its end; see `_channel.drive`. A cancellation is thrown into it as well."""
    outcome: Any = None
    failure: BaseException | None = None
    while True:
        try:
            step = flow.send(outcome) if failure is None else flow.throw(failure)
        except StopIteration as end:
            failure = None  # its traceback holds this frame, and the callers' with all they hold
            return end.value  # type: ignore[no-any-return]  # what the generator returns
        outcome = failure = None
        try:
            outcome = await perform(step)
        except BaseException as error:  # noqa: BLE001  # thrown into the flow, which lets it out
            failure = error


async def call(step: Call[Any]) -> Any:
    """Perform a call step."""
    answer = step.fn(*step.args)
    return await answer if inspect.isawaitable(answer) else answer


class AsyncPoolChannel:
    """Operations over pooled links, each by itself.

    Args:
        config: time-outs and the retry policy.
        leases: where links come from.
    """

    def __init__(self, config: Config, leases: AsyncLeases | AsyncCallerPool) -> None:
        self._config = config
        self._leases = leases
        self._timeout = config.operation_timeout
        self._on_close: list[Callable[[], object]] = []
        self._collectors: dict[Table, Collector] = {}
        self._known: set[Table] = set()
        self._patrolling = False
        self._tasks: set[asyncio.Task[None]] = set()

    def on_close(self, fn: Callable[[], object]) -> None:
        """Call `fn`, in a thread, when the channel has been closed."""
        self._on_close.append(fn)

    def conninfo(self) -> str:
        """What a connection outside the pool is opened with: for renewal and LISTEN."""
        return self._leases.conninfo()

    # -- one operation

    async def execute(self, op: Op[T], timeout: float | None = None) -> T:
        """Perform one operation. Anything unusual is left to `_recover` and `_aftermath`."""
        started = monotonic()
        seconds = self._timeout if timeout is None else timeout
        leases = self._leases
        if leases.idle and leases.loop is asyncio.get_running_loop():
            link = leases.idle.pop()
            if link.is_stale():
                leases.discard(link)
                return await self._recover(op, started, timeout, None)
        else:
            # With more tasks than links this is the usual way, so it is short as well.
            self._start_patrols()
            try:
                link = await leases.acquire(started + seconds, op.statement.name)
            except PgkvError as error:
                return await self._recover(op, started, timeout, error)
            seconds += started - monotonic()
        try:
            result = await link.execute(op, seconds)
        except PgkvError as error:
            leases.settle(link)
            return await self._recover(op, started, timeout, error)
        except BaseException:
            leases.discard(link)
            raise
        leases.release(link)
        answer = op.decode(result)
        if op.statement.writes and random() < SWEEP_CHANCE:  # noqa: S311  # a sample, no secret
            self._sweep(op.statement.table)
        if isinstance(answer, Signal) or _observe.hooks:
            return await self._aftermath(op, answer, started, timeout)
        return answer

    async def _aftermath(self, op: Op[T], answer: Any, started: float, timeout: float | None) -> T:
        """What a few answers bring with them: races, expired rows, metrics."""
        if isinstance(answer, Raced):
            return await self._recover(op, started, timeout, answer)
        answer = self._collected(op, answer)
        if _observe.hooks:
            _observe.notify(op.statement.name, started, "ok", getattr(op, "retries", 0))
        return answer  # type: ignore[no-any-return]  # decoded by op

    async def _recover(
        self, op: Op[T], started: float, timeout: float | None, outcome: PgkvError | Raced | None
    ) -> T:
        """Bring an operation to its end that the fast path could not."""
        deadline = started + (self._timeout if timeout is None else timeout)
        try:
            answer = await self._settle(op, deadline, outcome)
        except BaseException as error:
            if _observe.hooks:
                name, retries = op.statement.name, getattr(op, "retries", 0)
                _observe.notify(name, started, type(error).__name__, retries)
            raise
        return await self._aftermath(op, answer, started, timeout)

    async def _settle(
        self,
        step: Op[Any] | Transaction[Any] | Batch,
        deadline: float,
        outcome: PgkvError | Raced | None = None,
    ) -> Any:
        """Attempt a step until it has an answer, or may not be repeated."""

        async def perform(each: Any) -> Any:
            if isinstance(each, Sleep | Call):
                return await self._perform(each)
            return await self._attempt(each, deadline)

        answer: Any = None
        if outcome is None:
            self._start_patrols()
            try:
                answer = await self._attempt(step, deadline)
            except PgkvError as error:
                answer = error
            if not isinstance(answer, PgkvError | Raced):
                return answer
            outcome = answer
        flow = recover(step, outcome, self._config.retry, deadline, self.heal)
        # An error's traceback holds this frame: a cycle that would keep the callers' frames.
        del answer, outcome
        return await drive(flow, perform)

    async def _attempt(self, step: Op[Any] | Transaction[Any] | Batch, deadline: float) -> Any:
        if isinstance(step, Transaction):
            async with self._bound(deadline=deadline) as bound:
                return await bound.run(step.flow())
        if isinstance(step, Batch):
            return await self._attempt_batch(step, deadline)
        link = await self._leases.acquire(deadline, step.statement.name)
        try:
            result = await link.execute(step, deadline - monotonic())
        finally:
            self._leases.settle(link)
        return step.decode(result)

    async def _attempt_batch(self, batch: Batch, deadline: float) -> list[Any]:
        link = await self._leases.acquire(deadline, batch.name)
        try:
            seconds = deadline - monotonic()
            results = await link.execute_all(batch.ops, seconds, sync_each=batch.sync_each)
        finally:
            self._leases.settle(link)
        return [self._collected(*each) for each in outcomes(batch, results)]

    # -- flows

    async def run(self, flow: Flow[T]) -> T:
        """Perform an algorithm; each of its operations is one of the pool's."""
        return await drive(flow, self._perform)

    async def _perform(self, step: Any) -> Any:
        if isinstance(step, Op):
            return await self.execute(step)
        if isinstance(step, Sleep):
            return await asyncio.sleep(step.seconds)
        if isinstance(step, Call):
            return await call(step)
        return await self._settle(step, monotonic() + self._timeout)

    def transaction(
        self, isolation: IsolationLevel | None = None
    ) -> contextlib.AbstractAsyncContextManager[AsyncBoundChannel]:
        """Open a transaction on a link of its own, its tables made beforehand."""
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
                    await self.heal(table)
        until = monotonic() + self._timeout if deadline is None else deadline
        link = await self._leases.acquire(until, "transaction")
        if isinstance(self._leases, AsyncCallerPool):
            link.prepares = False  # as in `_channel`
        bound = AsyncBoundChannel(link, self._timeout, deadline)
        try:
            async with bound.span(control.begin(isolation), control.commit(), control.rollback()):
                yield bound
        finally:
            bound.end()
            self._leases.settle(link)

    async def heal(self, table: Table) -> None:
        """Create a table that the server says is missing."""
        _observe.info("pgkv.table.create", table=table.quoted)
        await self.run(_schema.ensure(table))
        self._known.add(table)

    def may_repeat(self, op: Op[Any], error: PgkvError, /) -> bool:
        """Whether an operation that failed together with others may be repeated alone."""
        policy = self._config.retry
        return policy is not None and may_repeat(op, error, policy)

    # -- the background

    def watch(self, sql: Statements) -> None:
        """Collect that table's expired rows by its strategy."""
        if sql.table not in self._collectors:
            collector = self._collectors[sql.table] = Collector(sql, self._background)
            try:
                asyncio.get_running_loop()
            except RuntimeError:
                self._patrolling = False  # the next slow path starts it
            else:
                if self._patrolling:
                    collector.start_patrol()

    def _start_patrols(self) -> None:
        if not self._patrolling:
            self._patrolling = True
            for collector in tuple(self._collectors.values()):
                collector.start_patrol()

    def _sweep(self, table: Table | None) -> None:
        collector = None if table is None else self._collectors.get(table)
        if collector is not None:
            collector.sweep()

    def _collected(self, op: Op[Any], answer: Any) -> Any:
        """The caller's part of an answer; the expired keys in it are queued for deletion."""
        if not isinstance(answer, Expired):
            return answer
        collector = self._collectors.get(op.statement.table)  # type: ignore[arg-type]  # never None: it has rows
        if collector is not None:
            collector.collect(answer.keys_of(op))
        return answer.answer

    def _background(self, flow: Flow[None]) -> None:
        task = asyncio.get_running_loop().create_task(self._run_quietly(flow))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run_quietly(self, flow: Flow[None]) -> None:
        with contextlib.suppress(PgkvError):
            await drive(flow, self._perform)

    async def close(self) -> None:
        """Close every connection. What is under way ends first or fails."""
        for task in tuple(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._leases.close()
        while self._on_close:
            await asyncio.to_thread(self._on_close.pop())


class AsyncBoundChannel:
    """Operations inside one open transaction. Nothing is retried, healed or collected.

    Args:
        link: the transaction's connection, nobody else's until `end`.
        timeout: seconds for one operation.
        deadline: the monotonic time at which the whole must end; None for no such time.
    """

    def __init__(self, link: AsyncLink, timeout: float, deadline: float | None = None) -> None:
        self._link = link
        self._timeout = timeout
        self._deadline = deadline
        self._depth = 0
        self._ended = ""
        self._lock = AsyncReentrant(asyncio.Lock())

    async def execute(self, op: Op[T], timeout: float | None = None) -> T:
        """Perform one operation of the transaction."""
        async with self._using():
            await self._check(op.statement.name)
            if not op.statement.savepoint or not self._in_transaction():
                return await self._send(op, timeout)
            # A refused value is an expected outcome: it must not abort what the caller did.
            async with self._savepoint():
                return await self._send(op, timeout)

    def _using(self) -> contextlib.AbstractAsyncContextManager[Any]:
        """Hold the connection for one operation: tasks may share a transaction."""
        return self._lock

    async def _send(self, op: Op[T], timeout: float | None = None) -> T:
        answer: Any = None
        for _ in range(op.statement.repeats + 1):
            answer = op.decode(await self._link.execute(op, self._seconds(timeout)))
            if not isinstance(answer, Raced):
                break
        if isinstance(answer, Raced):
            if answer.fallback is None:
                raise ConflictError(f"{op.statement.name}: every attempt met concurrent changes")
            answer = answer.fallback
        return answer_of(answer)  # type: ignore[no-any-return]  # decoded by op

    def _seconds(self, timeout: float | None) -> float:
        seconds = self._timeout if timeout is None else timeout
        return seconds if self._deadline is None else min(seconds, self._deadline - monotonic())

    async def _check(self, action: str) -> None:
        if self._ended:
            raise TransactionError(f"{action}: the transaction was {self._ended}")

    def _in_transaction(self) -> bool:
        return self._link.pgconn.transaction_status == pq.TransactionStatus.INTRANS

    def end(self) -> None:
        """Refuse whatever comes after."""
        self._ended = self._ended or "rolled back"

    async def heal(self, table: Table) -> None:
        """Nothing is created in somebody's transaction."""

    def watch(self, sql: Statements) -> None:
        """Nothing is collected in somebody's transaction."""

    async def close(self) -> None:
        """The connection is not the store's to close."""

    async def run(self, flow: Flow[T]) -> T:
        """Perform an algorithm inside the transaction."""
        return await drive(flow, self._perform)

    async def _perform(self, step: Any) -> Any:
        if isinstance(step, Op):
            return await self.execute(step)
        if isinstance(step, Sleep):
            return await asyncio.sleep(step.seconds)
        if isinstance(step, Call):
            return await call(step)
        if isinstance(step, Batch):
            return await self._perform_batch(step)
        async with self.transaction() as inner:
            return await inner.run(step.flow())

    async def _perform_batch(self, batch: Batch) -> list[Any]:
        if batch.sync_each:
            return [await self._outcome(op) for op in batch.ops]
        try:
            async with self._using():
                await self._check(batch.name)
                async with self._shielded():
                    seconds = self._seconds(None)
                    results = await self._link.execute_all(batch.ops, seconds, sync_each=False)
                    answers = [answer_of(answer) for _, answer in outcomes(batch, results)]
                    if any(isinstance(answer, PgkvError) for answer in answers):
                        raise RefusedError(answers)
        except RefusedError as refused:
            return refused.answers
        return answers

    async def _outcome(self, op: Op[Any]) -> Any:
        try:
            async with self._using():
                await self._check(op.statement.name)
                async with self._shielded():
                    return await self._send(op)
        except PgkvError as error:
            return error

    def _shielded(self) -> contextlib.AbstractAsyncContextManager[None]:
        """Keep what is refused from aborting what the caller did before, if there is such."""
        return self._savepoint() if self._in_transaction() else contextlib.nullcontext()

    def may_repeat(self, _op: Op[Any], _error: PgkvError, /) -> bool:
        """Nothing is repeated in somebody's transaction."""
        return False

    @contextlib.asynccontextmanager
    async def transaction(
        self, isolation: IsolationLevel | None = None
    ) -> AsyncIterator[AsyncBoundChannel]:
        """Open a savepoint."""
        if isolation is not None:
            raise TransactionError("the isolation level belongs to the outermost transaction")
        await self._check("transaction")
        async with self._savepoint():
            inner = AsyncBoundChannel(self._link, self._timeout, self._deadline)
            inner._lock, inner._depth = self._lock, self._depth
            try:
                yield inner
            finally:
                inner.end()

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
        self, begin: Op[None], commit: Op[None], rollback: Op[None]
    ) -> AsyncIterator[None]:
        """Open and close a transaction or savepoint around a body."""
        async with self._using():
            await self._send(begin)
        try:
            yield
            if self._link.pgconn.transaction_status == pq.TransactionStatus.INERROR:
                # COMMIT would answer ROLLBACK without an error, and the caller believe it.
                raise TransactionError(
                    "a statement failed inside the transaction, so it was rolled back"
                )
        except BaseException as error:
            if self._link.is_idle():
                with contextlib.suppress(PgkvError):
                    async with self._using():
                        await self._link.execute(rollback, self._timeout)
            if isinstance(error, PgkvError) and not isinstance(error, TransactionError):
                # Nothing was committed, whatever became of the statement that failed.
                error.outcome_unknown = False
            raise
        if begin.statement.name == "begin":
            self._ended = "committed"
        async with self._using():
            await self._link.execute(commit, self._seconds(None))


class AsyncCallerChannel(AsyncBoundChannel):
    """Operations over the caller's own psycopg connection, inside its transaction.

    Args:
        conn: the caller's. Its lock is taken for each operation; nothing is prepared on it.
        timeout: seconds for one operation.
    """

    def __init__(self, conn: psycopg.AsyncConnection[Any], timeout: float) -> None:
        self._conn = conn
        self._timeout = timeout
        self._deadline = None
        self._depth = 0
        self._ended = ""
        self._lock = AsyncReentrant(conn.lock)

    def _using(self) -> contextlib.AbstractAsyncContextManager[Any]:
        return self._attached()

    @contextlib.asynccontextmanager
    async def _attached(self) -> AsyncIterator[None]:
        """Listen on the caller's socket for as long as an operation takes, and no longer."""
        if self._lock.is_mine():
            yield
            return
        conn = self._conn
        check_connection(conn, "using")
        if not conn.autocommit and conn.pgconn.transaction_status == pq.TransactionStatus.IDLE:
            # psycopg opens the transaction, with the caller's isolation level, as it would
            # for the caller's own first statement.
            await conn.execute("")
        async with self._lock:
            watchdog = Watchdog(asyncio.get_running_loop())
            self._link = link = AsyncLink(conn, watchdog, prepares=False)
            try:
                yield
            finally:
                if link.is_running():
                    await link.cancel_and_close()
                else:
                    link.detach()

    @contextlib.asynccontextmanager
    async def transaction(
        self, isolation: IsolationLevel | None = None
    ) -> AsyncIterator[AsyncBoundChannel]:
        """Open a savepoint, or a transaction on a connection in autocommit."""
        async with self._using():
            await self._check("transaction")
            inside = self._in_transaction()
        if inside and isolation is not None:
            raise TransactionError("the isolation level belongs to the outermost transaction")
        inner = AsyncCallerChannel(self._conn, self._timeout)
        inner._lock, inner._depth = self._lock, self._depth
        try:
            async with (
                inner._savepoint()
                if inside
                else inner.span(control.begin(isolation), control.commit(), control.rollback())
            ):
                yield inner
        finally:
            inner.end()


class AsyncReentrant:
    """An asyncio lock that the task which holds it may take again."""

    def __init__(self, lock: asyncio.Lock) -> None:
        self._inner = lock
        self._owner: asyncio.Task[Any] | None = None
        self._depth = 0

    def is_mine(self) -> bool:
        """Whether the running task holds it."""
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
