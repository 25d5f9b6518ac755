"""The fast path for asyncio: `_sync/connection` with an event loop doing the waiting.

A connection's socket has one reader, registered for as long as the connection is open: registering one around
every call would cost more than the call. The reader never lets libpq block: one `get_result` for
each `is_busy`. Deadlines are watched by one timer per store (`Watchdog`), because a timer of its
own would cost each operation a tenth of its time.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Coroutine, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import psycopg
from psycopg import pq
from psycopg.pq.abc import PGresult

from ..._ops.drivers import drive_async
from ..._ops.op import BINARY, Op, Statement
from ...errors import ConfigError, PgkvError
from ..results import (
    OK,
    PIPELINE,
    STATUS,
    PipelineReader,
    failed,
    is_fenced,
    past_deadline,
    refusal,
)
from ..wire import CANCEL_TIMEOUT, IDLE, Conversation, Preparing, WireConnection

if TYPE_CHECKING:
    from .pool import TaskInQueue

T = TypeVar("T")


async def whole_or_none(connecting: Coroutine[Any, Any, T]) -> T:
    """Await an attempt to connect that leaves nothing open when it is cancelled: its traceback, which may
    live as long as its task, would keep what the server has opened already."""
    try:
        return await connecting
    except asyncio.CancelledError as error:
        raise error.with_traceback(None) from None


class Watched(Protocol):
    @property
    def deadline(self) -> float:
        """When, in the time of `monotonic`."""
        ...

    def time_out(self) -> None:
        """The deadline has passed."""
        ...


class Watchdog:
    """One timer for the deadlines of many."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._watched: set[Watched] = set()
        self._timer: asyncio.TimerHandle | None = None
        self.next_look: float = math.inf

    def watch(self, one: Watched) -> None:
        """Mind its deadlines from now on."""
        self._watched.add(one)

    def forget(self, one: Watched) -> None:
        """It has no more of them."""
        self._watched.discard(one)
        if not self._watched and self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self.next_look = math.inf

    def look_at(self, deadline: float) -> None:
        """Be awake at that time. Called only when it comes before `next_look`."""
        if self._timer is not None:
            self._timer.cancel()
        self.next_look = deadline
        self._timer = self.loop.call_later(max(0.0, deadline - monotonic()), self._look)

    def _look(self) -> None:
        now = monotonic()
        self._timer = None
        self.next_look = math.inf
        for one in tuple(self._watched):
            if one.deadline <= now:
                one.time_out()
        soonest = min((one.deadline for one in self._watched), default=math.inf)
        if soonest < math.inf:
            self.look_at(soonest)


class AsyncPgConnection(WireConnection):
    """One connection of an event loop, and the operations that cross it.

    Args:
        conn, prepares, prepared, preparing: as of a `WireConnection`.
        watchdog: minds its deadlines.

    Attributes:
        on_free: called when the answer to the connection's operation has arrived.
    """

    __slots__ = (
        "_loop", "_pending", "_pipeline", "_result", "_seconds", "_socket", "_statement", "_tls",
        "_waiter", "_watchdog", "_writing", "deadline", "lost", "on_free",
    )  # fmt: skip

    def __init__(
        self,
        conn: psycopg.AsyncConnection[Any],
        watchdog: Watchdog,
        *,
        prepares: bool,
        prepared: set[bytes] | None = None,
        preparing: Preparing | None = None,
    ) -> None:
        super().__init__(conn, prepares=prepares, prepared=prepared, preparing=preparing)
        self.deadline: float = math.inf
        self.lost: bool = False
        self.on_free: Callable[[AsyncPgConnection], None] | None = None
        self._watchdog = watchdog
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[Any] | None = None
        self._pending: TaskInQueue | None = None
        self._statement: Statement[Any] = PIPELINE
        self._seconds = 0.0
        self._result: PGresult | None = None
        self._pipeline: PipelineReader | None = None
        self._writing = False
        self._socket = self.pgconn.socket
        self._tls = bool(self.pgconn.ssl_in_use)
        watchdog.watch(self)
        try:
            self._loop.add_reader(self._socket, self._on_readable)
        except NotImplementedError:
            raise ConfigError(
                "this event loop cannot watch sockets; on Windows use a selector loop: "
                "asyncio.run(main(), loop_factory=asyncio.SelectorEventLoop)"
            ) from None

    # -- the state of the connection

    def is_usable(self) -> bool:
        """Whether another operation may follow."""
        return not self.lost and self._waiter is None and super().is_usable()

    def is_stale(self) -> bool:
        return self.lost or bool(self.poll(0))

    def is_running(self) -> bool:
        """Whether the server still works on something that no task waits for any more."""
        pgconn = self.pgconn
        return pgconn.status == pq.ConnStatus.OK and (
            self._waiter is not None or pgconn.transaction_status == pq.TransactionStatus.ACTIVE
        )

    def is_idle(self) -> bool:
        """Whether the connection is whole and nothing is under way on it, a transaction or not."""
        return not self.lost and self.pgconn.status == pq.ConnStatus.OK and not self.is_running()

    def detach(self) -> None:
        """Stop listening. Before the socket is closed, or a new connection that gets the same
        descriptor would never be heard."""
        self._loop.remove_reader(self._socket)
        self._stop_writing()
        self._watchdog.forget(self)

    def _stop_writing(self) -> None:
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._socket)

    def close(self) -> None:
        self.detach()
        self.lost = True
        self.conn.pgconn.finish()

    async def cancel_and_close(self) -> None:
        """Stop what runs (one request, bounded) and close: a late cancel must not hit another caller."""
        self.detach()
        self.lost = True
        try:
            with contextlib.suppress(psycopg.Error, OSError):
                await self.conn.cancel_safe(timeout=CANCEL_TIMEOUT)
        finally:  # also when the loop ends first
            self.conn.pgconn.finish()

    # -- one operation

    def _check_alive(self) -> None:
        if self.lost:  # nothing is read from it any more
            raise psycopg.OperationalError("the connection was lost")

    def send(
        self, op: Op[Any], seconds: float, waiter: asyncio.Future[Any] | None = None
    ) -> asyncio.Future[PGresult] | None:
        """Send an operation whose statement is prepared here; the future of its result.

        None when it is not prepared yet (see `_prepare`). The future, `waiter` if there is one,
        fails with a `PgkvError` when the connection is lost or the time passes; a refusal is a result
        like any other.
        """
        deadline = monotonic() + seconds
        statement = op.statement
        self._check_alive()
        if waiter is not None and statement.table is not None and statement.table.fences:
            return None  # its task sends the fence as well
        if self.prepares and not statement.script:
            if statement.prepared_name not in self._prepared:
                return None
            self.send_prepared(statement.prepared_name, op.params, statement.formats, BINARY)
        else:
            self._send_unprepared(op, script=statement.script)
        return self.expect(statement, seconds, deadline, waiter)

    def send_pending(self, op: Op[Any], pending: TaskInQueue, seconds: float) -> bool:
        """Send a pending's operation; False if its task has to.

        `turn` gets the result, or fails, as the future of `send` does. After a good answer the
        connection is free before the task wakes up; else it stays the request's.
        """
        try:
            if self.send(op, seconds, pending.turn) is None:
                return False
        except Exception:  # noqa: BLE001  # the task gets it, not the caller that freed the connection
            return False
        self._pending = pending
        return True

    def expect(
        self,
        statement: Statement[Any],
        seconds: float,
        deadline: float,
        waiter: asyncio.Future[Any] | None = None,
    ) -> asyncio.Future[Any]:
        """Send what is queued; the future of the answer."""
        self._statement = statement
        self._seconds = seconds
        if waiter is None:
            waiter = self._loop.create_future()
        self._waiter = waiter
        self.deadline = deadline
        if deadline < self._watchdog.next_look:
            self._watchdog.look_at(deadline)
        if self.flush():
            self._writing = True
            self._loop.add_writer(self._socket, self._on_writable)
        return waiter

    async def execute(
        self,
        op: Op[Any],
        seconds: float,
        result: PGresult | None = None,
        *,
        again: bool = True,
    ) -> PGresult:
        """Send one operation, prepared first if need be, and return its result.

        With a `result` it was sent already, by `send_pending`.

        Raises:
            PgkvError: the server refused it, the connection was lost, or the time passed.
        """
        statement = op.statement
        table = statement.table
        if table is not None and table.fences is not None:
            plan = table.fences.plan(statement)
            if plan is not None and not (plan.plain and self.pgconn.transaction_status == IDLE):
                return await self._converse(self._fenced(op, plan), seconds, monotonic() + seconds)
        deadline = monotonic() + seconds
        sent = False
        failure: PgkvError
        try:
            if result is None:
                waiter = self.send(op, seconds)
                if waiter is None:
                    await self._prepare(statement, seconds, deadline)
                    waiter = self.send(op, deadline - monotonic())
                    assert waiter is not None
                sent = True
                result = await waiter
            if result.status in OK:
                return result
            if await self._converse(self._refused(statement, result), seconds, deadline) and again:
                return await self.execute(op, deadline - monotonic(), again=False)
            failure = refusal(result, statement)
        except psycopg.Error as error:
            failure = failed(error, statement, sent=sent)
        try:
            raise failure
        finally:
            del failure  # its traceback holds this frame, and the callers'

    async def begin_with(self, begin: Op[None], op: Op[Any], seconds: float) -> list[PGresult]:
        return await self._send_all((begin, op), seconds, sync_each=False, about=op.statement)

    async def execute_all(
        self, ops: Sequence[Op[Any]], seconds: float, *, sync_each: bool
    ) -> list[PGresult]:
        if not is_fenced(ops):
            return await self._send_all(ops, seconds, sync_each=sync_each)
        flow = self._behind_fences(ops, sync_each=sync_each)
        return await self._converse(flow, seconds, monotonic() + seconds)

    async def _send_all(
        self,
        ops: Sequence[Op[Any]],
        seconds: float,
        *,
        sync_each: bool,
        about: Statement[Any] = PIPELINE,
    ) -> list[PGresult]:
        failure: PgkvError
        asked = about
        deadline = monotonic() + seconds
        try:
            self._check_alive()
            for op in ops:
                if self.prepares and not (self.knows(op.statement) or op.statement.script):
                    asked = op.statement
                    await self._prepare(asked, seconds, deadline)
            asked = about
            self._pipeline = PipelineReader(self.pgconn, len(ops) if sync_each else 1)
            self._send_pipeline(ops, sync_each=sync_each)
            answers: list[PGresult] = await self.expect(about, seconds, deadline)
            if not OK.issuperset(map(STATUS, answers)):
                await self._converse(self._all_refused(ops, answers), seconds, deadline)
        except psycopg.Error as error:
            failure = failed(error, asked, sent=True)
        else:
            return answers
        try:
            raise failure
        finally:
            del failure  # its traceback holds this frame, and the callers'

    # -- callbacks of the loop

    def _on_readable(self) -> None:
        try:
            self.consume()
            if self._tls and self.is_busy():
                self.consume()  # what OpenSSL holds back, the loop will never hear of
            if self._waiter is None:
                # Nothing was asked: this is the end, or a notice, which costs a reconnect at worst.
                self.lost = True
                self._loop.remove_reader(self._socket)
                return
            if self._pipeline is not None:
                if self._pipeline.advance():
                    answers, self._pipeline = self._pipeline.answers, None
                    # Here, not by the waiter: one that is cancelled in this turn never wakes.
                    self.pgconn.exit_pipeline_mode()
                    self._resolve(answers)
                return
            while not self.is_busy():
                result = self.get_result()
                if result is None:
                    answer, self._result = self._result, None
                    self._resolve(answer)
                    return
                if self._result is None or self._result.status in OK:
                    self._result = result
        except psycopg.Error as error:
            self._break(error)

    def _on_writable(self) -> None:
        try:
            if not self.flush():
                self._stop_writing()
        except psycopg.Error as error:
            self._break(error)
        # libpq may have read answers while it wrote: for those the socket is not readable again.
        if self._waiter is not None:
            self._on_readable()

    def _resolve(self, answer: Any) -> None:
        waiter, self._waiter = self._waiter, None
        self.deadline = math.inf
        if waiter is not None and not waiter.done():
            waiter.set_result(answer)
        pending = self._pending
        if pending is not None:
            self._pending = None
            if answer.status in OK and self.on_free is not None:
                pending.connection = None
                self.on_free(self)

    def _break(self, error: psycopg.Error) -> None:
        """The connection is lost. After a FATAL message the server hangs up: the message is the answer."""
        self._loop.remove_reader(self._socket)
        self._stop_writing()
        answer, self._result = self._result, None
        self.lost = True
        if answer is not None and answer.status not in OK:
            self._resolve(answer)
        else:
            self._fail(failed(error, self._statement, sent=True))

    def _fail(self, failure: PgkvError) -> None:
        waiter, self._waiter = self._waiter, None
        self._pending = None
        self.deadline = math.inf
        if waiter is not None and not waiter.done():
            waiter.set_exception(failure)

    def time_out(self) -> None:
        """The deadline has passed."""
        self.lost = True
        self._fail(past_deadline(self._statement.name, self._seconds))

    # -- statements on the server

    async def _converse(self, flow: Conversation[T], seconds: float, deadline: float) -> T:
        def answer_to(step: Any, _: object) -> Any:
            if isinstance(step, Statement):
                return self.expect(step, seconds, deadline)
            return self._send_all(step, deadline - monotonic(), sync_each=False)

        return await drive_async(flow, together=answer_to)

    async def _prepare(self, statement: Statement[Any], seconds: float, deadline: float) -> None:
        try:
            await self._converse(self._preparation(statement), seconds, deadline)
        except asyncio.CancelledError:
            # It may be prepared: a transaction that prepared it again would be refused.
            self.lost = True
            raise

    async def try_preparing(self, deadline: float) -> None:
        await drive_async(self._trial(), lambda op, _: self.execute(op, deadline - monotonic()))
