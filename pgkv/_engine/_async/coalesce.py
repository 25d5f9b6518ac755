"""Automatic batching for asyncio: the operations of one turn of the event loop travel together.

Hundreds of tasks that each want one key would otherwise queue for ten connections, one round trip
each. A turn's reads go out in one pipeline, its writes at the same time in another, and its
``get`` calls are one ``get_many``. A single operation is sent as without batching.

A pipeline of writes is one transaction. A row that another client has locked would make all of it
wait, and a task could wait for a lock of its own. So it waits for `LOCK_WAIT` at most; the write
that was blocked, or refused, then goes alone, and the others are sent again together.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Sequence
from contextvars import copy_context
from time import monotonic
from typing import Any, TypeAlias, TypeVar

from ... import _observe
from ..._ops.op import Op, Param, Pipelined, Raced, Statement, Undecoded, send
from ..._sql import GETS, Statements, control
from ..._sql.sweep import Sweep
from ...config import Table
from ...errors import PgkvError, TableNotFoundError
from .. import flows as _flows
from ..merging import merge, parted
from .channel import AsyncPoolChannel
from .transaction import AsyncBoundChannel

T = TypeVar("T")

Waiting = tuple[Op[Any], "asyncio.Future[Any]"]
ALONE = object()  # tells a caller to send its operation by itself
LOCK_WAIT = 20  # milliseconds
ROUNDS = 3  # in which blocked writes are sorted out; then each is sent alone
_LIMIT = control.lock_timeout(LOCK_WAIT)


class CoalescingChannel:
    """A pool's channel that sends each turn's operations together.

    Flows and transactions pass through as they are.

    Args:
        inner: performs them.
    """

    def __init__(self, inner: AsyncPoolChannel) -> None:
        self._inner = inner
        self._turn: list[Waiting] = []
        self._deadline = 0.0  # of the turn
        self._sql: dict[Table, Statements] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.run = inner.run
        self.transaction = inner.transaction
        self.create_missing_table = inner.create_missing_table
        self.until = inner.until
        self.may_repeat = inner.may_repeat
        self.pool_stats = inner.pool_stats

    @property
    def state(self) -> str:
        return self._inner.state

    @property
    def server(self) -> tuple[str | None, int | None, str | None]:
        return self._inner.server

    def watch(self, sql: Sweep) -> None:
        """Learn the statements of a table."""
        if isinstance(sql, Statements):
            self._sql.setdefault(sql.table, sql)
        self._inner.watch(sql)

    async def close(self) -> None:
        """Send what was asked for, then close."""
        # This turn's operations go out in the next, one that is sent alone in the one after.
        for _ in range(2):
            await asyncio.sleep(0)
        while self._tasks:
            await asyncio.wait(self._tasks)
            await asyncio.sleep(0)
        await self._inner.close()

    def call(
        self, statement: Statement[T], params: Sequence[Param], timeout: float | None = None
    ) -> Coroutine[Any, Any, T]:
        """Perform one statement, together with the operations of this turn."""
        return self.execute(Op(statement, params), timeout)

    async def execute(self, op: Op[T], timeout: float | None = None) -> T:
        """Perform one operation, together with the others of this turn."""
        missed = op.statement.missed
        if op.statement.script or timeout is not None:
            return await self._inner.execute(op, timeout)
        if missed is not None and self._inner.misses.hold(op.statement, probes=False):
            return missed()  # type: ignore[no-any-return]  # as the operation's own
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        if not self._turn:
            loop.call_soon(self._send)
            self._deadline = self.until()
        deadline = self._deadline
        if _observe.hooks:
            op.context = copy_context()
        self._turn.append((op, future))
        try:
            answer = await future
        except PgkvError as error:
            if missed is not None and self._inner.misses.excuse(op.statement, error):
                return missed()  # type: ignore[no-any-return]  # as above
            raise
        if missed is not None and answer is not ALONE:
            self._inner.misses.breaker.succeeded()
        if answer is ALONE:
            return await self._inner.execute(op, max(0.001, deadline - monotonic()))
        return answer  # type: ignore[no-any-return]  # decoded by op

    def _send(self) -> None:
        turn, self._turn, deadline = self._turn, [], self._deadline
        tables: dict[Table | None, list[Waiting]] = {}
        for each in turn:
            # A caller that was cancelled before anything was sent wants nothing sent.
            if not each[1].done():
                tables.setdefault(each[0].statement.table, []).append(each)
        for table, waiting in tables.items():
            if len(waiting) == 1:
                waiting[0][1].set_result(ALONE)
                continue
            reads, others = _split(waiting)
            if _overlap(reads, others):
                self._start(self._one_after_another(table, reads, others, deadline))
                continue
            for part, work in ((reads, self._reads), (others, self._writes)):
                if len(part) == 1:
                    part[0][1].set_result(ALONE)
                elif part:
                    self._start(work(table, part, deadline))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _one_after_another(
        self, table: Table | None, reads: list[Waiting], others: list[Waiting], deadline: float
    ) -> None:
        await self._reads(table, reads, deadline)
        await self._writes(table, others, deadline)

    async def _reads(self, table: Table | None, turn: list[Waiting], deadline: float) -> None:
        kinds = {} if table is None else self._sql[table].mergeable
        gets = [each for each in turn if kinds.get(each[0].statement.prepared_name) == GETS]
        if table is None or len(gets) < 2:
            await self._together(table, turn, deadline)
            return
        found: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        merged = self._sql[table].get_raw({key for op, _ in gets if (key := op.params[0])})
        if _observe.hooks and (
            found_in := [op.context for op, _ in gets if hasattr(op, "context")]
        ):
            merged.context, merged.contexts = found_in[0], found_in
        if len(gets) < len(turn):
            rest = [each for each in turn if kinds.get(each[0].statement.prepared_name) != GETS]
            await self._together(table, [(merged, found), *rest], deadline)
        else:
            found.set_result(ALONE)
        try:
            values = await found
            if values is ALONE:
                values = await self._inner.execute(merged, max(0.001, deadline - monotonic()))
        except BaseException as error:  # noqa: BLE001  # it belongs to the callers who wait
            for _, future in gets:
                _settle(future, error)
        else:
            for op, future in gets:
                if not future.done():
                    future.set_result(values.get(op.params[0]))

    async def _writes(self, table: Table | None, turn: list[Waiting], deadline: float) -> None:
        for piece in _without_deadlocks(turn):
            await self._together(table, piece, deadline, [_LIMIT])

    async def _together(
        self,
        table: Table | None,
        turn: list[Waiting],
        deadline: float,
        before: Sequence[Op[Any]] = (),
    ) -> None:
        """Send operations in one transaction. Who is refused or blocked is sent alone."""
        for chunk in _flows.chunks([op for op, _ in turn]):
            piece, turn = turn[: len(chunk)], turn[len(chunk) :]
            for attempt in range(ROUNDS):
                if len(piece) < 1 + (attempt > 0):
                    break
                sql = None if attempt else self._sql.get(table)  # type: ignore[arg-type]  # None: no table
                piece = await self._round(table, sql, piece, deadline, before)
            for _, future in piece:
                _settle(future, ALONE)

    async def _round(
        self,
        table: Table | None,
        sql: Statements | None,
        turn: list[Waiting],
        deadline: float,
        before: Sequence[Op[Any]],
    ) -> list[Waiting]:
        """Send them once, merged where `sql` is given; those that are to be sent again."""
        started = monotonic()
        ops = [op for op, _ in turn]
        sent, places = merge(sql, ops)
        # Two batches of writes would not lock their rows in the order of the keys.
        if sum(op.statement.writes for op in sent) > 1:
            sent, places = ops, None
        batch = Pipelined([*before, *sent], sync_each=False, deadline=deadline)
        try:
            answers = (await self._inner.run(send(batch)))[len(before) :]
            answers = parted(places, ops, answers)
        except BaseException as error:  # noqa: BLE001  # it belongs to the callers who wait
            for op, future in turn:
                again = isinstance(error, PgkvError) and self._inner.may_repeat(op, error)
                _settle(future, ALONE if again else error)
                if _observe.hooks and not again:
                    _observe.notify(op, started, error=error, channel=self)
            return []
        refused = next((i for i, each in enumerate(answers) if isinstance(each, PgkvError)), None)
        if refused is None:
            for (op, future), answer in zip(turn, answers, strict=True):
                again = isinstance(answer, Raced)
                _settle(future, ALONE if again else answer)
                if _observe.hooks and not again:
                    _observe.notify(op, started, answer, channel=self)
            return []
        if isinstance(answers[refused], TableNotFoundError) and table and table.auto_create:
            with contextlib.suppress(PgkvError):  # the next round says so
                await self._inner.create_missing_table(table)
            return turn
        if len(sent) < len(ops):
            return turn  # singly they tell which one it is
        _settle(turn[refused][1], ALONE)
        return turn[:refused] + turn[refused + 1 :]


AsyncChannel: TypeAlias = "AsyncPoolChannel | CoalescingChannel | AsyncBoundChannel"


def _split(turn: list[Waiting]) -> tuple[list[Waiting], list[Waiting]]:
    """The reads of one table that depend on no write of the turn, and all the rest in order.

    What one key's operations return depends on their order: a read depends on what was written
    before it in the turn to its key, or, if it reads many keys, to any.
    """
    reads: list[Waiting] = []
    others: list[Waiting] = []
    written: set[Any] = set()
    everything = False  # a batch, a range: it may write any key
    for each in turn:
        op = each[0]
        key = op.params[0] if op.params else None
        if op.statement.writes:
            written.add(key)
            everything = everything or not op.statement.one_key
        elif not written or (op.statement.one_key and not everything and key not in written):
            reads.append(each)
            continue
        others.append(each)
    return reads, others


def _overlap(reads: list[Waiting], others: list[Waiting]) -> bool:
    """Whether what the reads return may be changed by what comes after them in the turn."""
    if not others:
        return False
    keys = {op.params[0] if op.statement.one_key else None for op, _ in reads}
    return None in keys or any(
        op.statement.writes and (not op.statement.one_key or op.params[0] in keys)
        for op, _ in others
    )


def _without_deadlocks(turn: list[Waiting]) -> list[list[Waiting]]:
    """One table's operations as pieces, each a transaction that locks its rows in the order of
    their keys.

    A pipeline holds its row locks to its end. Two clients whose tasks write the same keys in
    another order would wait for each other, which their single operations never do. The order of
    one key's operations, and around those of many keys, stays.
    """
    pieces: list[list[Waiting]] = []
    piece: list[Waiting] = []
    tail: list[Waiting] = []  # follows what is sorted: reads of many keys, and what came after
    for each in turn:
        statement = each[0].statement
        if statement.writes and (tail or not statement.one_key):
            pieces.append(_by_key(piece) + tail)
            piece, tail = [], []
        if statement.writes and not statement.one_key:
            pieces.append([each])
        elif tail or not statement.one_key:
            tail.append(each)
        else:
            piece.append(each)
    pieces.append(_by_key(piece) + tail)
    return [each for each in pieces if each]


def _by_key(turn: list[Waiting]) -> list[Waiting]:
    return sorted(turn, key=lambda each: each[0].params[0] or b"")


def _settle(future: asyncio.Future[Any], answer: Any) -> None:
    if future.done():
        return  # its caller was cancelled meanwhile; the others' answers are not
    if isinstance(answer, PgkvError):
        # An exception of its own: a shared one would collect every caller's traceback.
        future.set_exception(_copy(answer))
    elif isinstance(answer, Undecoded):
        future.set_exception(answer.error)
    elif isinstance(answer, BaseException):
        future.set_exception(answer)
    else:
        future.set_result(answer)


def _copy(error: PgkvError) -> PgkvError:
    twin = type(error)(*error.args)
    twin.__dict__.update(error.__dict__)
    twin.__cause__ = error.__cause__
    return twin
