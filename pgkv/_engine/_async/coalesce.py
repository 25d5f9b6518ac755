"""Automatic batching for asyncio: the operations of one turn of the event loop travel together.

Hundreds of tasks that each want one key would otherwise queue for ten connections, one round trip
each. Here a turn's reads of one table become one ``get_many`` and everything else of that turn follows
in the same pipeline. A single operation goes out as ever.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

from ..._ops.op import Op
from ..._sql import Statements
from ...errors import PgkvError
from .. import flows as _flows

if TYPE_CHECKING:
    from ..._sql.sweep import Sweep
    from ...config import Table
    from .channel import AsyncPoolChannel

T = TypeVar("T")

Waiting = tuple[Op[Any], "asyncio.Future[Any]"]
ALONE = object()  # tells a caller that nobody else asked in this turn


class CoalescingChannel:
    """A pool's channel that sends each turn's operations together.

    Flows and transactions pass through as they are.

    Args:
        inner: performs them.
    """

    def __init__(self, inner: AsyncPoolChannel) -> None:
        self._inner = inner
        self._turn: list[Waiting] = []
        self._sql: dict[Table, Statements] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.run = inner.run
        self.transaction = inner.transaction
        self.create_missing_table = inner.create_missing_table
        self.may_repeat = inner.may_repeat

    @property
    def state(self) -> str:
        """As the inner one's."""
        return self._inner.state

    def watch(self, sql: Sweep) -> None:
        """Learn the statements of a table."""
        if isinstance(sql, Statements):
            self._sql.setdefault(sql.table, sql)
        self._inner.watch(sql)

    async def close(self) -> None:
        """Send what was asked for, then close."""
        # This turn's operations go out in the next, one that is alone in the one after.
        for _ in range(2):
            await asyncio.sleep(0)
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._inner.close()

    async def execute(self, op: Op[T], timeout: float | None = None) -> T:
        """Perform one operation, together with the others of this turn."""
        if op.statement.script or timeout is not None:
            return await self._inner.execute(op, timeout)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        if not self._turn:
            loop.call_soon(self._send)
        self._turn.append((op, future))
        answer = await future
        return await self._inner.execute(op) if answer is ALONE else answer

    def _send(self) -> None:
        turn, self._turn = self._turn, []
        tables: dict[Table | None, list[Waiting]] = {}
        for op, future in turn:
            # A caller that was cancelled before anything was sent wants nothing sent.
            if not future.done():
                tables.setdefault(op.statement.table, []).append((op, future))
        for table, waiting in tables.items():
            if len(waiting) == 1:
                waiting[0][1].set_result(ALONE)
                continue
            task = asyncio.get_running_loop().create_task(self._together(table, waiting))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _together(self, table: Table | None, turn: list[Waiting]) -> None:
        gets, others = _split(turn)
        pieces = _without_deadlocks(others)
        if gets and table is not None:
            merged = self._merged(table, gets)
            first = pieces.pop(0) if pieces else []
            found, *answers = await self._answers([merged, *(op for op, _ in first)])
            for op, future in gets:
                failed = isinstance(found, BaseException)
                _settle(future, found if failed else found.get(op.params[0]))
            _settle_all(first, answers)
        for piece in pieces:
            _settle_all(piece, await self._answers([op for op, _ in piece]))

    async def _answers(self, ops: list[Op[Any]]) -> list[Any]:
        try:
            flow = _flows.pipeline(ops, atomic=False, engine=self._inner)
            return await self._inner.run(flow)
        except BaseException as error:  # noqa: BLE001  # it belongs to the callers who wait
            return [error] * len(ops)

    def _merged(self, table: Table, waiting: list[Waiting]) -> Op[Any]:
        keys = {key for op, _ in waiting if (key := op.params[0]) is not None}
        return self._sql[table].get_raw(keys)


def _split(turn: list[Waiting]) -> tuple[list[Waiting], list[Waiting]]:
    """The reads of one table that may go first, and all the rest in order.

    A read goes first only if nothing before it in the turn touches its key: what one key's
    operations return depends on their order.
    """
    gets: list[Waiting] = []
    others: list[Waiting] = []
    touched: set[Any] = set()
    everything = False
    for op, future in turn:
        key = op.params[0] if op.params else None
        if op.statement.name == "get":
            if not everything and key not in touched:
                gets.append((op, future))
                continue
        elif op.statement.writes:
            if op.statement.one_key:
                touched.add(key)
            else:
                everything = True  # a batch, a range: it may touch any key
        others.append((op, future))
    return gets, others


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


def _settle_all(turn: list[Waiting], answers: list[Any]) -> None:
    for (_, future), answer in zip(turn, answers, strict=True):
        _settle(future, answer)


def _settle(future: asyncio.Future[Any], answer: Any) -> None:
    if future.done():
        return  # its caller was cancelled meanwhile; the others' answers are not
    if isinstance(answer, PgkvError):
        # An exception of its own: a shared one would collect every caller's traceback.
        future.set_exception(_copy(answer))
    elif isinstance(answer, BaseException):
        future.set_exception(answer)
    else:
        future.set_result(answer)


def _copy(error: PgkvError) -> PgkvError:
    twin = type(error)(*error.args)
    twin.__dict__.update(error.__dict__)
    twin.__cause__ = error.__cause__
    return twin
