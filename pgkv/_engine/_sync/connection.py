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

import math
import select
import selectors
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import pq

from ..._ops.op import BINARY, Op, Result, Statement
from ..._sql.control import PREPARE_TRIAL
from ...errors import PgkvError, from_result
from ..pooling import HAS_CLOSE_PREPARED, PoolPlace, Preparing
from ..results import (
    OK,
    PIPELINE,
    PipelineReader,
    behind_fences,
    failed,
    is_fenced,
    is_outdated,
    past_deadline,
    refusal,
    without_fences,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from collections.abc import Set as AbstractSet

    from psycopg.pq.abc import PGconn, PGresult

IDLE = pq.TransactionStatus.IDLE
CANCEL_TIMEOUT = 1.0  # seconds that a cancel request may take
# Bytes can wait inside OpenSSL while the socket is silent: under TLS no sleep is longer.
TLS_NAP_MS = 50.0
LONGEST_NAP_MS = 1e9  # poll() refuses what does not fit a C int

HAS_POLL = hasattr(select, "poll")  # Windows has none
SELECT_NAP = 0.1  # seconds; no Ctrl-C ends a select() on Windows before its time


class PgConnection:
    """One connection, and the operations that cross it.

    Args:
        conn: an open psycopg connection; no other caller uses it meanwhile.
        prepares: keep prepared statements on it. Not behind a transaction pooler, and not on a
            connection that belongs to the caller.
        prepared: the names prepared on it already, kept up to date.
        preparing: through a pooler, whether it lets statements be prepared.

    Attributes:
        ready: the names that `PoolChannel.call` may send by itself, without `execute`.
    """

    __slots__ = (
        "_lost",
        "_nap_ms",
        "_prepared",
        "conn",
        "consume",
        "flush",
        "get_result",
        "is_busy",
        "pgconn",
        "place",
        "poll",
        "prepares",
        "preparing",
        "ready",
        "retire_at",
        "send_prepared",
    )

    def __init__(
        self,
        conn: psycopg.Connection[Any],
        *,
        prepares: bool,
        prepared: set[bytes] | None = None,
        preparing: Preparing | None = None,
    ) -> None:
        self.conn: psycopg.Connection[Any] = conn
        self.preparing: Preparing | None = preparing
        self.pgconn: PGconn = conn.pgconn
        self.prepares: bool = prepares
        self.retire_at: float = math.inf
        self.place: PoolPlace = PoolPlace()
        self._lost: deque[Any] | None = None
        self._prepared = set() if prepared is None else prepared
        pgconn = self.pgconn
        # One poller for the connection's life; bound methods spare a look-up for each of some ten calls.
        self.poll: Callable[[float], Sequence[Any]] = poller(pgconn.socket)
        self.send_prepared: Callable[..., None] = pgconn.send_query_prepared
        self.flush: Callable[[], int] = pgconn.flush
        self.consume: Callable[[], None] = pgconn.consume_input
        self.is_busy: Callable[[], int] = pgconn.is_busy
        self.get_result: Callable[[], PGresult | None] = pgconn.get_result
        self._nap_ms = TLS_NAP_MS if pgconn.ssl_in_use else LONGEST_NAP_MS
        self.ready: AbstractSet[bytes] = (
            self._prepared if prepares and not pgconn.ssl_in_use else frozenset()
        )

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

    def is_usable(self) -> bool:
        """Whether another operation may follow."""
        pgconn = self.pgconn
        return pgconn.status == pq.ConnStatus.OK and pgconn.transaction_status == IDLE

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
                return self._execute_fenced(op, plan, seconds)
        try:
            if result is not None:
                pass
            elif not self.prepares or statement.script:
                self._send_unprepared(op)
            else:
                if statement.prepared_name not in self._prepared:
                    self._prepare(statement, seconds, deadline)
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
            if self._forget(statement, result) and again:
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

    def _execute_fenced(self, op: Op[Any], plan: Any, seconds: float) -> Result:
        """Send one operation behind the fence of its slot."""
        until = monotonic() + seconds
        (result,) = self.execute_all((op,), seconds, sync_each=False)
        if result.status not in OK and self._forget(plan.statement, result):
            (result,) = self.execute_all((op,), until - monotonic(), sync_each=False)
        if result.status in OK:
            return result
        raise refusal(result, op.statement)

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
        if sync_each:
            until = monotonic() + seconds
            return [self.execute_all((op,), until - monotonic(), sync_each=False)[0] for op in ops]
        inside = self.pgconn.transaction_status != IDLE
        sent, fences = behind_fences(ops, inside=inside)
        return without_fences(self._send_all(sent, seconds, sync_each=False), fences)

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
                    self._prepare(about, seconds, deadline)
            about = PIPELINE
            reader = PipelineReader(self.pgconn, len(ops) if sync_each else 1)
            self.pgconn.enter_pipeline_mode()
            for op in ops:
                self.queue(op)
                if sync_each:
                    self.pgconn.pipeline_sync()
            if not sync_each:
                self.pgconn.pipeline_sync()
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
            for op, answer in zip(ops, reader.answers, strict=False):
                if answer.status not in OK:
                    self._forget(op.statement, answer)  # the batch is sent again by its flow
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
        with selectors.DefaultSelector() as both:
            both.register(self.pgconn.socket, selectors.EVENT_READ | selectors.EVENT_WRITE)
            while self.flush():
                left = deadline - monotonic()
                if left <= 0:
                    raise _PastDeadlineError
                for _, events in both.select(min(left, SELECT_NAP)):
                    if events & selectors.EVENT_READ:
                        self.consume()

    # -- statements on the server

    def try_preparing(self, deadline: float) -> None:
        """Find out whether the pooler lets statements be prepared."""
        assert self.preparing is not None
        try:
            self.preparing.learn(self.execute(PREPARE_TRIAL, deadline - monotonic()))
        except PgkvError:
            self.preparing.learn_failure(is_usable=self.is_usable())
            if not self.is_usable():
                raise
        if not self.preparing.allowed:
            self._stop_preparing(self.preparing)

    def _stop_preparing(self, preparing: Preparing) -> None:
        self.prepares = preparing.allowed = False
        self.ready = frozenset()

    def queue(self, op: Op[Any]) -> None:
        """Send one operation of a pipeline."""
        statement = op.statement
        if self.prepares:
            self.send_prepared(statement.prepared_name, op.params, statement.formats, BINARY)
        else:
            self._send_unprepared(op)

    def _send_unprepared(self, op: Op[Any]) -> None:
        statement = op.statement
        sql = statement.text(self.pgconn.server_version)
        if statement.script:
            self.pgconn.send_query(sql)
        else:
            self.pgconn.send_query_params(
                sql, op.params, param_formats=statement.formats, result_format=BINARY
            )

    def _prepare(self, statement: Statement[Any], seconds: float, deadline: float) -> None:
        self.pgconn.send_prepare(
            statement.prepared_name, statement.text(self.pgconn.server_version)
        )
        try:
            result = self.receive(statement, seconds, deadline)
        except PgkvError as failure:
            failure.outcome_unknown = False  # preparing changes nothing
            raise
        # The name is a hash of the text: one that exists is the one we want.
        if result.status not in OK and from_result(result).sqlstate != "42P05":
            if self.preparing is not None:
                self._give_name_back(self.preparing, statement, seconds, deadline)
            raise from_result(result)
        self._prepared.add(statement.prepared_name)

    def _give_name_back(
        self, preparing: Preparing, statement: Statement[Any], seconds: float, deadline: float
    ) -> None:
        """PgBouncer keeps the name of a statement that the server refused, and closes the connection
        of a client that prepares it again."""
        if HAS_CLOSE_PREPARED:
            self.pgconn.send_close_prepared(statement.prepared_name)
            self.receive(statement, seconds, deadline)
        else:
            self._stop_preparing(preparing)

    def _forget(self, statement: Statement[Any], result: PGresult) -> bool:
        """Whether a refusal only says that the prepared statement is gone (DISCARD ALL) or
        outdated (ALTER TABLE), so that it is prepared again and sent once more."""
        error = from_result(result)
        if self.preparing is not None and (error.sqlstate == "26000" or is_outdated(error)):
            self._stop_preparing(self.preparing)
            return self.is_usable()
        if error.sqlstate == "26000":
            # What forgot one forgot them all; preparing one that is still there does no harm.
            self._prepared.clear()
            return self.is_usable()
        if not is_outdated(error) or not self.is_usable():
            return False
        # Under another name the old one would stay behind for the connection's life.
        self.pgconn.exec_(b"DEALLOCATE " + statement.prepared_name)
        self._prepared.discard(statement.prepared_name)
        return True


class _PastDeadlineError(Exception):
    """The deadline passed while waiting: turned into an OperationTimeoutError at once."""


def poller(fd: int) -> Callable[[float], Sequence[Any]]:
    """Return a function that waits some milliseconds for the socket to become readable, and
    returns an empty sequence if it did not."""
    if HAS_POLL:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return poll.poll

    def wait(milliseconds: float) -> Sequence[Any]:
        until = monotonic() + milliseconds / 1000.0
        while True:
            left = until - monotonic()
            ready = select.select([fd], [], [], max(0.0, min(left, SELECT_NAP)))[0]
            if ready or left <= SELECT_NAP:
                return ready

    return wait
