"""The fast path: how one operation crosses one connection, and what its failure proves.

It drives libpq through psycopg's public `pq` objects: prepare once, send, wait with a deadline,
read the binary result. psycopg's cursors, adapters and per-call bookkeeping would cost more than
the server does. A `Link` is owned by one caller at a time; pooling, retries and transactions are
others' business. Every failure leaves as a `PgkvError` that says whether the outcome is known:

* it is, when nothing was sent, or when the first result is an error with an SQLSTATE, also a
  FATAL one: CommandComplete precedes the commit, so an error in its place means no commit;
* it is not, when the link broke or the deadline passed after sending.
"""

from __future__ import annotations

import contextlib
import math
import select
import socket
import threading
from time import monotonic
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import pq

from ._op import BINARY, Batch, Op, Result, Statement
from .errors import (
    OperationTimeoutError,
    PgkvError,
    TransactionError,
    from_result,
    translate,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from psycopg.pq.abc import PGconn, PGresult

OK = frozenset((int(pq.ExecStatus.COMMAND_OK), int(pq.ExecStatus.TUPLES_OK)))
IDLE = pq.TransactionStatus.IDLE
PIPELINE_SYNC = int(pq.ExecStatus.PIPELINE_SYNC)
PIPELINE_ABORTED = int(pq.ExecStatus.PIPELINE_ABORTED)
CANCEL_TIMEOUT = 1.0  # seconds that a cancel request may take
# Bytes can wait inside OpenSSL while the socket is silent: under TLS no sleep is longer.
TLS_NAP_MS = 50.0
LONGEST_NAP_MS = 1e9  # poll() refuses what does not fit a C int

# What an error that concerns a whole pipeline is called.
PIPELINE: Statement[Any] = Statement("pipeline", "", (), lambda result: result)

HAS_POLL = hasattr(select, "poll")


class Link:
    """One connection, and the operations that cross it.

    Args:
        conn: an open psycopg connection; nobody else may use it meanwhile.
        prepares: keep prepared statements on it. Not behind a transaction pooler, and not on a
            connection that belongs to the caller.
        prepared: the names prepared on it already, kept up to date.
    """

    __slots__ = (
        "_consume",
        "_flush",
        "_get_result",
        "_is_busy",
        "_nap_ms",
        "_prepared",
        "_send_prepared",
        "conn",
        "lease_end",
        "pgconn",
        "poll",
        "prepares",
    )
    takes_lock = False  # psycopg's, of the connection

    def __init__(
        self,
        conn: psycopg.Connection[Any],
        *,
        prepares: bool,
        prepared: set[bytes] | None = None,
    ) -> None:
        self.conn = conn
        self.pgconn: PGconn = conn.pgconn
        self.prepares = prepares
        self.lease_end = math.inf
        self._prepared = set() if prepared is None else prepared
        pgconn = self.pgconn
        # One poller for the link's life; bound methods spare a look-up for each of some ten calls.
        self.poll = poller(pgconn.socket)
        self._send_prepared = pgconn.send_query_prepared
        self._flush = pgconn.flush
        self._consume = pgconn.consume_input
        self._is_busy = pgconn.is_busy
        self._get_result = pgconn.get_result
        self._nap_ms = TLS_NAP_MS if pgconn.ssl_in_use else LONGEST_NAP_MS

    # -- the state of the link

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

    def abandon(self) -> None:
        """Stop what runs (one request, bounded) and close: a late cancel must hit nobody else."""
        try:
            if self.pgconn.transaction_status == pq.TransactionStatus.ACTIVE:
                self.conn.cancel_safe(timeout=CANCEL_TIMEOUT)
        except (psycopg.Error, OSError):
            pass  # the server is gone, or does not answer: closing is all that is left
        finally:
            self.pgconn.finish()  # close() may mean "give it back" to a caller's pool

    # -- one operation

    def execute(self, op: Op[Any], seconds: float, *, again: bool = True) -> Result:
        """Send one operation and return its result, within that time.

        Args:
            op: the operation.
            seconds: for the answer.
            again: send it once more if the server has forgotten the prepared statement.

        Raises:
            OperationTimeoutError: the time passed; the statement was cancelled, the link closed.
            PgkvError: the server refused it, or the link was lost.
        """
        statement = op.statement
        try:
            if not self.prepares or statement.script:
                self._send_unprepared(op)
            else:
                if statement.prepared_name not in self._prepared:
                    self._prepare(statement, seconds)
                self._send_prepared(statement.prepared_name, op.params, statement.formats, BINARY)
        except psycopg.Error as error:
            failure = failed(error, statement, sent=False)
        except PgkvError:
            raise
        except BaseException:
            self.abandon()
            raise
        else:
            result = self._receive(statement, seconds)
            if result.status in OK:
                return result
            if self._forget(statement, result) and again:
                return self.execute(op, seconds, again=False)
            failure = refusal(result, statement)
        raise failure  # outside the except: no context that quotes data

    def _receive(self, statement: Statement[Any], seconds: float) -> PGresult:
        """Wait for the whole answer; the first error in it, else its last result."""
        milliseconds = seconds * 1000.0
        deadline = monotonic() + seconds
        answer: PGresult | None = None
        try:
            if self._flush():
                self._finish_sending(deadline)
            if milliseconds <= self._nap_ms:
                if not self.poll(max(0.0, milliseconds)):
                    raise _PastDeadlineError
                self._consume()
                if self._is_busy():
                    self._wait(deadline)
            else:
                self._wait(deadline)
            while (result := self._get_result()) is not None:
                if answer is None or answer.status in OK:
                    answer = result
                # Never two results for one is_busy: the second might block beyond the deadline.
                if self._is_busy():
                    self._wait(deadline)
        except psycopg.Error as error:
            # After a FATAL message the server hangs up: the message is the answer.
            if answer is None or answer.status in OK:
                failure: PgkvError = failed(error, statement, sent=True)
            else:
                return answer
        except _PastDeadlineError:
            self.abandon()
            failure = past_deadline(statement.name, seconds)
        except BaseException:
            self.abandon()
            raise
        else:
            assert answer is not None
            return answer
        raise failure

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
        failure: PgkvError
        about = PIPELINE
        try:
            for op in ops:
                if self.prepares and op.statement.prepared_name not in self._prepared:
                    about = op.statement
                    self._prepare(about, seconds)
            about = PIPELINE
            reader = PipelineReader(self.pgconn, len(ops) if sync_each else 1)
            self.pgconn.enter_pipeline_mode()
            for op in ops:
                self.queue(op)
                if sync_each:
                    self.pgconn.pipeline_sync()
            if not sync_each:
                self.pgconn.pipeline_sync()
            deadline = monotonic() + seconds
            if self._flush():
                self._finish_sending(deadline)
            while not reader.advance():
                left = (deadline - monotonic()) * 1000.0
                if left <= 0:
                    raise _PastDeadlineError
                # Under TLS a silent socket proves nothing: see TLS_NAP_MS.
                if self.poll(min(left, self._nap_ms)) or self._nap_ms < LONGEST_NAP_MS:
                    self._consume()
            self.pgconn.exit_pipeline_mode()
            for op, answer in zip(ops, reader.answers, strict=False):
                if answer.status not in OK:
                    self._forget(op.statement, answer)  # the batch is sent again by its flow
        except psycopg.Error as error:
            failure = failed(error, about, sent=True)
        except _PastDeadlineError:
            self.abandon()
            failure = past_deadline(PIPELINE.name, seconds)
        except PgkvError:
            raise
        except BaseException:
            self.abandon()
            raise
        else:
            return reader.answers
        raise failure

    def _wait(self, deadline: float) -> None:
        """Read until libpq holds the next result."""
        nap, poll = self._nap_ms, self.poll
        while self._is_busy():
            if nap < LONGEST_NAP_MS:
                self._consume()
                if not self._is_busy():
                    return
            left = (deadline - monotonic()) * 1000.0
            if left <= 0:
                raise _PastDeadlineError
            if poll(min(left, nap)):
                self._consume()

    def _finish_sending(self, deadline: float) -> None:
        """Push out what the socket did not take at once, reading meanwhile: a server whose
        answers nobody reads stops reading questions."""
        both = select.poll()
        both.register(self.pgconn.socket, select.POLLIN | select.POLLOUT)
        while self._flush():
            left = (deadline - monotonic()) * 1000.0
            if left <= 0:
                raise _PastDeadlineError
            for _, events in both.poll(min(left, LONGEST_NAP_MS)):
                if events & ~select.POLLOUT:
                    self._consume()

    # -- statements on the server

    def queue(self, op: Op[Any]) -> None:
        """Send one operation of a pipeline."""
        statement = op.statement
        if self.prepares:
            self._send_prepared(statement.prepared_name, op.params, statement.formats, BINARY)
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

    def _prepare(self, statement: Statement[Any], seconds: float) -> None:
        self.pgconn.send_prepare(
            statement.prepared_name, statement.text(self.pgconn.server_version)
        )
        try:
            result = self._receive(statement, seconds)
        except PgkvError as failure:
            failure.outcome_unknown = False  # preparing changes nothing
            raise
        if result.status not in OK:
            error = from_result(result)
            # The name is a hash of the text: one that exists is the one we want.
            if error.sqlstate != "42P05":
                raise error
        self._prepared.add(statement.prepared_name)

    def _forget(self, statement: Statement[Any], result: PGresult) -> bool:
        """Whether a refusal only says that the prepared statement is gone (DISCARD ALL) or
        outdated (ALTER TABLE), so that it is prepared again and sent once more."""
        error = from_result(result)
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
    """What waits so many milliseconds for the socket to become readable; empty if it did not."""
    if HAS_POLL:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return poll.poll
    return lambda milliseconds: select.select([fd], [], [], milliseconds / 1000.0)[0]


class PipelineReader:
    """Takes the results of a pipeline as they arrive.

    Args:
        pgconn: in pipeline mode.
        syncs: how many synchronization points end it.
    """

    __slots__ = ("_current", "_pgconn", "_syncs", "answers")

    def __init__(self, pgconn: PGconn, syncs: int) -> None:
        self.answers: list[PGresult] = []
        self._pgconn = pgconn
        self._syncs = syncs
        self._current: PGresult | None = None

    def advance(self) -> bool:
        """Take what is there, without blocking; whether that was all."""
        pgconn = self._pgconn
        while not pgconn.is_busy():
            result = pgconn.get_result()
            if result is None:
                if self._current is not None:
                    self.answers.append(self._current)
                    self._current = None
            elif result.status == PIPELINE_SYNC:
                self._syncs -= 1
                if not self._syncs:
                    return True
            elif self._current is None:
                self._current = result
        return False


def forgotten(results: Sequence[PGresult]) -> bool:
    """Whether the server says that a prepared statement is gone (DISCARD ALL): then all are."""
    return any(
        result.status not in OK and result.error_field(pq.DiagnosticField.SQLSTATE) == b"26000"
        for result in results
    )


def outcomes(batch: Batch, results: Sequence[PGresult]) -> list[tuple[Op[Any], Any]]:
    """Each operation of a batch with its answer, or the exception by which it was refused."""
    return [(op, _outcome(op, result)) for op, result in zip(batch.ops, results, strict=True)]


def _outcome(op: Op[Any], result: PGresult) -> Any:
    if result.status in OK:
        return op.decode(result)
    if result.status == PIPELINE_ABORTED:
        return TransactionError(
            f"{op.statement.name}: not executed, because an earlier operation of the pipeline "
            "was refused"
        )
    return refusal(result, op.statement)


def is_outdated(error: psycopg.Error) -> bool:
    """Whether a prepared statement no longer fits its table (after an ALTER TABLE)."""
    return error.sqlstate == "0A000" and error.diag.source_function == "RevalidateCachedQuery"


def past_deadline(name: str, seconds: float) -> OperationTimeoutError:
    """What a caller hears whose time has passed after sending."""
    return OperationTimeoutError(
        f"{name}: no answer within {seconds:.3g} s; it was cancelled, but may still have happened"
    )


def refusal(result: PGresult, statement: Statement[Any]) -> PgkvError:
    """The exception for an error result: a known outcome, but for what poolers say."""
    return failed(from_result(result), statement, sent=True)


def failed(error: psycopg.Error, statement: Statement[Any], *, sent: bool) -> PgkvError:
    """The exception for a psycopg error during that statement."""
    return translate(
        error,
        action=statement.name,
        table=statement.table.quoted if statement.table else "",
        refused=statement.refused,
        sent=sent,
    )


# -- without poll() ------------------------------------------------------------------------


class CursorLink(Link):
    """The same over an ordinary cursor, where the platform has no ``poll()`` (Windows) or
    psycopg's internals have changed. Slower, the same promises."""

    __slots__ = ("_cursor", "_resets_autocommit")
    takes_lock = True

    def __init__(
        self,
        conn: psycopg.Connection[Any],
        *,
        prepares: bool,
        prepared: set[bytes] | None = None,  # noqa: ARG002  # psycopg keeps count itself
    ) -> None:
        self.conn = conn
        self.pgconn = conn.pgconn
        self.prepares = prepares
        self.lease_end = math.inf
        self.poll = poller(self.pgconn.socket)
        self._resets_autocommit = False
        self._cursor = psycopg.RawCursor(conn)
        self._cursor.adapters.register_dumper(_Text, _TextDumper)
        self._cursor.adapters.register_dumper(_Binary, _BinaryDumper)

    def execute(self, op: Op[Any], seconds: float, *, again: bool = True) -> Result:  # noqa: ARG002  # psycopg's statements are its own
        """Send one operation through a cursor."""
        result = self._ask(op, seconds)
        if result.status in OK:
            return result
        raise refusal(result, op.statement)

    def execute_all(
        self, ops: Sequence[Op[Any]], seconds: float, *, sync_each: bool
    ) -> list[PGresult]:
        """One after the other; without `sync_each` in a transaction, if none is open yet."""
        deadline = monotonic() + seconds
        whole = not sync_each and self.pgconn.transaction_status == IDLE
        answers: list[PGresult] = []
        if whole:
            self._ask(_BEGIN, seconds)
        refused = False
        for op in ops:
            if refused and not sync_each:
                answers.append(self.pgconn.make_empty_result(PIPELINE_ABORTED))
                continue
            answers.append(self._ask(op, deadline - monotonic()))
            refused = refused or answers[-1].status not in OK
        if whole:
            self._ask(_ROLLBACK if refused else _COMMIT, deadline - monotonic())
        return answers

    def _ask(self, op: Op[Any], seconds: float) -> PGresult:
        """The server's answer, refusals included."""
        statement = op.statement
        self._begin_nothing()
        alarm = threading.Lock()  # held by whoever decides how this ends
        timer = threading.Timer(max(0.0, seconds), self._expire, [alarm])
        timer.daemon = True
        timer.start()
        failure: PgkvError
        try:
            self._cursor.execute(
                statement.text(self.pgconn.server_version),
                None if statement.script else _adapted(op.params, statement.formats),
                prepare=self.prepares and not statement.script,
                binary=not statement.script,
            )
            result = self._cursor.pgresult
        except psycopg.Error as error:
            result = error.pgresult if error.sqlstate is not None else None
            failure = failed(error, statement, sent=True)
        except BaseException:
            timer.cancel()
            self.abandon()
            raise
        timer.cancel()
        if not alarm.acquire(blocking=False):
            # A cancel request is under way, and may come late: nothing may follow on this link.
            timer.join()
            self.abandon()
            if result is None or result.status not in OK:
                raise past_deadline(statement.name, seconds)
        elif self._resets_autocommit and self.pgconn.transaction_status == IDLE:
            self._resets_autocommit = False
            self.conn.autocommit = False
        if result is None:
            raise failure
        return result

    def _begin_nothing(self) -> None:
        """Keep psycopg from opening a transaction that nobody would commit."""
        if self.pgconn.transaction_status == IDLE and not self.conn.autocommit:
            self.conn.autocommit = True
            self._resets_autocommit = True

    def _expire(self, alarm: threading.Lock) -> None:
        if not alarm.acquire(blocking=False):
            return
        try:
            self.conn.cancel_safe(timeout=CANCEL_TIMEOUT)
        except (psycopg.Error, OSError):
            # Closing would not wake the thread that waits.
            with (
                contextlib.suppress(OSError),
                socket.fromfd(self.pgconn.socket, socket.AF_INET, socket.SOCK_STREAM) as wire,
            ):
                wire.shutdown(socket.SHUT_RDWR)


def _command(sql: str) -> Op[Any]:
    return Op(Statement(sql.lower(), sql, (), lambda result: result, script=True))


_BEGIN, _COMMIT, _ROLLBACK = _command("BEGIN"), _command("COMMIT"), _command("ROLLBACK")


class _Text(bytes):
    """A parameter in text format, its type left to the server."""


class _Binary(bytes):
    """A parameter in binary format, its type left to the server."""


class _TextDumper(psycopg.adapt.Dumper):
    oid = 0
    format = pq.Format.TEXT

    def dump(self, obj: Any) -> bytes:
        return bytes(obj)


class _BinaryDumper(_TextDumper):
    format = pq.Format.BINARY


def _adapted(params: Sequence[bytes | None], formats: Sequence[int]) -> list[bytes | None]:
    return [
        None if param is None else (_Binary if kind == BINARY else _Text)(param)
        for param, kind in zip(params, formats, strict=True)
    ]


link_class: type[Link] = Link if HAS_POLL else CursorLink
