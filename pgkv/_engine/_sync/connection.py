"""The fast path: how one operation crosses one connection, and what its failure proves.

It drives libpq through psycopg's public `pq` objects: prepare once, send, wait with a deadline,
read the binary result. psycopg's cursors, adapters and per-call bookkeeping would cost more than
the server does. A `PgConnection` is owned by one caller at a time; pooling, retries and transactions are
others' business. Every failure leaves as a `PgkvError` that says whether the outcome is known:

* it is, when nothing was sent, or when the first result is an error with an SQLSTATE, also a
  FATAL one: CommandComplete precedes the commit, so an error in its place means no commit;
* it is not, when the connection broke or the deadline passed after sending.
"""

from __future__ import annotations

import selectors
from collections import deque
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from time import monotonic
from typing import Any, TypeVar

import psycopg
from psycopg import pq
from psycopg.pq.abc import PGresult

from ..._ops.drivers import drive
from ..._ops.op import BINARY, Op, Result, Statement
from ...errors import PgkvError
from ..pooling import PoolPlace
from ..results import (
    OK,
    PIPELINE,
    PIPELINE_SYNC,
    STATUS,
    PipelineReader,
    failed,
    is_fenced,
    past_deadline,
    refusal,
)
from ..wire import CANCEL_TIMEOUT, IDLE, SELECT_NAP, Conversation, Preparing, WireConnection

# Bytes can wait inside OpenSSL while the socket is silent: under TLS no sleep is longer.
TLS_NAP_MS = 50.0
# Not epoll: its file descriptor may be one too many.
BOTH_WAYS = getattr(selectors, "PollSelector", selectors.SelectSelector)
LONGEST_NAP_MS = 1e9  # poll() refuses what does not fit a C int

T = TypeVar("T")


class PgConnection(WireConnection):
    """One connection of a thread, and the operations that cross it."""

    __slots__ = ("_lost", "_nap_ms", "place")

    def __init__(
        self,
        conn: psycopg.Connection[Any],
        *,
        prepares: bool,
        prepared: set[bytes] | None = None,
        preparing: Preparing | None = None,
    ) -> None:
        super().__init__(conn, prepares=prepares, prepared=prepared, preparing=preparing)
        self.place: PoolPlace = PoolPlace()
        self._lost: deque[Any] | None = None
        self._nap_ms = LONGEST_NAP_MS
        if self.pgconn.ssl_in_use:
            self._nap_ms = TLS_NAP_MS
            self.ready: AbstractSet[bytes] = frozenset()

    # -- whose it is

    def keep_place(self, place: PoolPlace, lost: deque[Any]) -> None:
        """Occupy a place in a pool until `release`. Dropped before that, it enters `lost`."""
        self.place = place
        place.connected = True
        self._lost = lost

    def release(self) -> Any:
        """Leave the pool; the psycopg connection."""
        self._lost = None
        return self.conn

    def __del__(self) -> None:
        lost = getattr(self, "_lost", None)  # an interrupt may have come before it was set
        if lost is not None:
            lost.append(self.conn)

    # -- its state

    def is_stale(self) -> bool:
        """Whether anything is readable while nothing was asked: a FATAL message, or the end."""
        try:
            return bool(self.poll(0))
        except OSError:
            return True

    def abandon(self, seconds: float = CANCEL_TIMEOUT) -> None:
        """Stop what runs (one request, bounded) and close: a late cancel must not hit another caller.

        A server that is silent answers no cancel request either: who had little time for the call
        has little for this.
        """
        try:
            if self.pgconn.transaction_status == pq.TransactionStatus.ACTIVE:
                self.conn.cancel_safe(timeout=max(0.05, min(CANCEL_TIMEOUT, seconds)))
        except (psycopg.Error, OSError):
            pass  # the server is gone, or does not answer: closing is all that is left
        finally:
            self.pgconn.finish()  # close() may mean "give it back" to a caller's pool

    # -- one operation

    def execute(
        self, op: Op[Any], seconds: float, result: PGresult | None = None, *, again: bool = True
    ) -> Result:
        """Send one operation and return its result, within that time.

        Args:
            op: the operation.
            seconds: for preparing, sending and the answer together.
            result: of an operation that was sent already.
            again: send it once more if the server has forgotten the prepared statement.

        Raises:
            OperationTimeoutError: the time passed; the statement was cancelled, the connection closed.
            PgkvError: the server refused it, or the connection was lost.
        """
        deadline = monotonic() + seconds
        statement = op.statement
        table = statement.table
        if table is not None and table.fences is not None:
            plan = table.fences.plan(statement)
            if plan is not None and not (plan.plain and self.pgconn.transaction_status == IDLE):
                return self._converse(self._fenced(op, plan), seconds, monotonic() + seconds)
        try:
            if result is not None:
                pass
            elif not self.prepares or statement.script:
                self._send_unprepared(op, script=statement.script)
            else:
                if statement.prepared_name not in self._prepared:
                    self._converse(self._preparation(statement), seconds, deadline)
                    seconds = deadline - monotonic()
                self.send_prepared(statement.prepared_name, op.params, statement.formats, BINARY)
        except psycopg.Error as error:
            failure = failed(error, statement, sent=False)
        except PgkvError:
            raise
        except BaseException:
            self.abandon()
            raise
        else:
            if result is None:
                result = self.receive(statement, seconds, deadline)
            if result.status in OK:
                return result
            if self._converse(self._refused(statement, result), seconds, deadline) and again:
                return self.execute(op, max(0.0, deadline - monotonic()), again=False)
            failure = refusal(result, statement)
        try:
            raise failure  # outside the except: no context that quotes data
        finally:
            del failure  # its traceback holds this frame, and the callers'

    def receive(
        self,
        statement: Statement[Any],
        seconds: float,
        deadline: float,
        answer: PGresult | None = None,
        *,
        begun: bool = False,
    ) -> PGresult:
        """Wait for the whole answer; the first error in it, else its last result.

        Waiting may have `begun` before, and `answer` be a part of it.
        """
        try:
            milliseconds = seconds * 1000.0
            if self.flush():
                self._finish_sending(deadline)
                begun = True  # it may have read all of the answer
            if begun or milliseconds > self._nap_ms:
                self._wait(deadline)
            else:
                if not self.poll(max(0.0, milliseconds)):
                    raise _PastDeadlineError
                self.consume()
                if self.is_busy():
                    self._wait(deadline)
            while (result := self.get_result()) is not None:
                if answer is None or answer.status in OK:
                    answer = result
                # Never two results for one is_busy: the second might block beyond the deadline.
                if self.is_busy():
                    self._wait(deadline)
        except psycopg.Error as error:
            # After a FATAL message the server hangs up: the message is the answer.
            if answer is None or answer.status in OK:
                failure: PgkvError = failed(error, statement, sent=True)
            else:
                return answer
        except _PastDeadlineError:
            self.abandon(seconds)
            failure = past_deadline(statement.name, seconds)
        except BaseException:
            self.abandon()
            raise
        else:
            assert answer is not None
            return answer
        try:
            raise failure
        finally:
            del failure  # its traceback holds this frame, and the callers'

    def begin_with(self, begin: Op[None], op: Op[Any], seconds: float) -> list[PGresult]:
        """Open a transaction and send its first operation, which is prepared, in one round trip; the
        results of both."""
        deadline = monotonic() + seconds
        statement, pgconn, is_busy = op.statement, self.pgconn, self.is_busy
        results: list[PGresult] = []
        try:
            pgconn.enter_pipeline_mode()
            pgconn.send_query_params(begin.statement.text(0), None)
            self.send_prepared(statement.prepared_name, op.params, statement.formats, BINARY)
            pgconn.pipeline_sync()
            if self.flush():
                self._finish_sending(deadline)
            elif self.poll(max(0.0, min(seconds * 1000.0, self._nap_ms))):
                self.consume()
            while True:
                if is_busy():
                    self._wait(deadline)
                result = self.get_result()
                if result is not None:
                    if result.status == PIPELINE_SYNC:
                        break
                    results.append(result)
            pgconn.exit_pipeline_mode()
            if results[-1].status not in OK:  # its prepared statement may be gone
                self._converse(self._all_refused((begin, op), results), seconds, deadline)
        except psycopg.Error as error:
            # After a FATAL message the server hangs up: the message is the answer.
            refused = [each for each in results if each.status not in OK]
            failure = (
                refusal(refused[0], statement) if refused else failed(error, statement, sent=True)
            )
        except _PastDeadlineError:
            self.abandon(seconds)
            failure = past_deadline(statement.name, seconds)
        except BaseException:
            self.abandon()
            raise
        else:
            return results
        try:
            raise failure
        finally:
            del failure  # its traceback holds this frame, and the callers'

    def execute_all(
        self, ops: Sequence[Op[Any]], seconds: float, *, sync_each: bool
    ) -> list[PGresult]:
        """Send many operations in one round trip; their results, refused ones included.

        Args:
            ops: none of them a script.
            seconds: for all of them together.
            sync_each: each stands for itself. Otherwise they are one implicit transaction: after
                a refusal none has happened.

        Raises:
            OperationTimeoutError, StoreUnavailableError: as of `execute`, for all of them.
        """
        if not is_fenced(ops):
            return self._send_all(ops, seconds, sync_each=sync_each)
        flow = self._behind_fences(ops, sync_each=sync_each)
        return self._converse(flow, seconds, monotonic() + seconds)

    def _send_all(
        self, ops: Sequence[Op[Any]], seconds: float, *, sync_each: bool
    ) -> list[PGresult]:
        failure: PgkvError
        about = PIPELINE
        deadline = monotonic() + seconds
        try:
            for op in ops:
                if self.prepares and op.statement.prepared_name not in self._prepared:
                    about = op.statement
                    self._converse(self._preparation(about), seconds, deadline)
            about = PIPELINE
            reader = PipelineReader(self.pgconn, len(ops) if sync_each else 1)
            self._send_pipeline(ops, sync_each=sync_each)
            if self.flush():
                self._finish_sending(deadline)
            while not reader.advance():
                left = (deadline - monotonic()) * 1000.0
                if left <= 0:
                    raise _PastDeadlineError
                # Under TLS a silent socket proves nothing: see TLS_NAP_MS.
                if self.poll(min(left, self._nap_ms)) or self._nap_ms < LONGEST_NAP_MS:
                    self.consume()
            self.pgconn.exit_pipeline_mode()
            if not OK.issuperset(map(STATUS, reader.answers)):
                self._converse(self._all_refused(ops, reader.answers), seconds, deadline)
        except psycopg.Error as error:
            failure = failed(error, about, sent=True)
        except _PastDeadlineError:
            self.abandon(seconds)
            failure = past_deadline(PIPELINE.name, seconds)
        except PgkvError:
            raise
        except BaseException:
            self.abandon()
            raise
        else:
            return reader.answers
        try:
            raise failure
        finally:
            del failure  # its traceback holds this frame, and the callers'

    def _wait(self, deadline: float) -> None:
        """Read until libpq holds the next result."""
        nap, poll = self._nap_ms, self.poll
        while self.is_busy():
            if nap < LONGEST_NAP_MS:
                self.consume()
                if not self.is_busy():
                    return
            left = (deadline - monotonic()) * 1000.0
            if left <= 0:
                raise _PastDeadlineError
            if poll(min(left, nap)):
                self.consume()

    def _finish_sending(self, deadline: float) -> None:
        """Push out what the socket did not take at once, reading meanwhile: a server whose
        answers are not read stops reading questions."""
        with BOTH_WAYS() as both:
            both.register(self.pgconn.socket, selectors.EVENT_READ | selectors.EVENT_WRITE)
            while self.flush():
                left = deadline - monotonic()
                if left <= 0:
                    raise _PastDeadlineError
                for _, events in both.select(min(left, SELECT_NAP)):
                    if events & selectors.EVENT_READ:
                        self.consume()

    # -- statements on the server

    def _converse(self, flow: Conversation[T], seconds: float, deadline: float) -> T:
        def answer_to(step: Any, _: object) -> Any:
            if isinstance(step, Statement):
                return self.receive(step, seconds, deadline, begun=True)
            return self._send_all(step, deadline - monotonic(), sync_each=False)

        return drive(flow, together=answer_to)

    def try_preparing(self, deadline: float) -> None:
        drive(self._trial(), lambda op, _: self.execute(op, deadline - monotonic()))


class _PastDeadlineError(Exception):
    """The deadline passed while waiting: turned into an OperationTimeoutError at once."""
