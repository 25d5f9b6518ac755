"""Automatic batching for asyncio: the operations of one turn of the event loop travel together.

Hundreds of tasks that each want one key would otherwise queue for ten connections, one round trip
each. Here a turn's reads become one ``get_many`` and everything else of that turn follows in the
same pipeline. A single operation goes out as ever.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

from . import _flows
from ._op import Op
from .errors import PgkvError

if TYPE_CHECKING:
    from ._aio_channel import AsyncPoolChannel
    from ._sql import Statements
    from .config import Table

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
        self.heal = inner.heal
        self.may_repeat = inner.may_repeat

    def watch(self, sql: Statements) -> None:
        """Learn the statements of a table."""
        self._sql.setdefault(sql.table, sql)
        self._inner.watch(sql)

    async def close(self) -> None:
        """Send what was asked for, then close."""
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
        # A caller that was cancelled before anything was sent wants nothing sent.
        turn = [(op, future) for op, future in turn if not future.done()]
        if len(turn) == 1:
            turn[0][1].set_result(ALONE)
        elif turn:
            task = asyncio.get_running_loop().create_task(self._together(turn))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _together(self, turn: list[Waiting]) -> None:
        gets, others = self._split(turn)
        ops = [self._merged(table, waiting) for table, waiting in gets.items()]
        merged = len(ops)
        ops += [op for op, _ in others]
        try:
            flow = _flows.pipeline(ops, atomic=False, engine=self._inner)
            answers: list[Any] = await self._inner.run(flow)
        except BaseException as error:  # noqa: BLE001  # it belongs to the callers who wait
            answers = [error] * len(ops)
        for waiting, found in zip(gets.values(), answers[:merged], strict=True):
            for op, future in waiting:
                failed = isinstance(found, BaseException)
                _settle(future, found if failed else found.get(op.params[0]))
        for (_, future), answer in zip(others, answers[merged:], strict=True):
            _settle(future, answer)

    def _split(self, turn: list[Waiting]) -> tuple[dict[Table, list[Waiting]], list[Waiting]]:
        """The reads that may go first, by table, and all the rest in order.

        A read goes first only if nothing before it in the turn touches its key: what one key's
        operations return depends on their order.
        """
        gets: dict[Table, list[Waiting]] = {}
        others: list[Waiting] = []
        touched: set[tuple[Table, bytes]] = set()
        everything = False
        for op, future in turn:
            table = op.statement.table
            key = op.params[0] if op.params else None
            simple = op.statement.name == "get" and table in self._sql
            if simple and table is not None and key is not None:
                if not everything and (table, key) not in touched:
                    gets.setdefault(table, []).append((op, future))
                    continue
            elif op.statement.writes and table is not None:
                if op.statement.one_key and key is not None:
                    touched.add((table, key))
                else:
                    everything = True  # a batch, a range: it may touch any key
            others.append((op, future))
        return gets, others

    def _merged(self, table: Table, waiting: list[Waiting]) -> Op[Any]:
        keys = {key for op, _ in waiting if (key := op.params[0]) is not None}
        return self._sql[table].get_raw(keys)


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
