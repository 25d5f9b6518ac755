"""Operations inside a transaction: the store's own, or one on the caller's connection.

Nothing is retried, created or collected here: what is done belongs to a transaction, and only who
opened it can begin it again.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from time import monotonic
from typing import Any, TypeVar

import psycopg
from psycopg import IsolationLevel, pq

from ... import _observe
from ..._ops.drivers import drive
from ..._ops.op import Flow, Op, Pipelined, Raced, Transaction
from ..._sql import control
from ...config import Table
from ...errors import PgkvError, TransactionError
from ..base import InTransaction, accepted, settled
from ..caller import Reentrant, check_connection
from ..flows import RefusedError
from ..nesting import NESTED_NAP, never_free
from ..results import OK, is_fenced, refusal
from .connection import PgConnection

T = TypeVar("T")


class BoundChannel(InTransaction):
    """Operations inside one open transaction; see `InTransaction`.

    Args:
        connection: the transaction's, and no other caller's until `end`.
    """

    _connection: PgConnection

    def __init__(
        self, connection: PgConnection, timeout: float, deadline: float | None = None
    ) -> None:
        super().__init__(timeout, deadline)
        self._connection = connection
        self._pid = os.getpid()
        self._lock: contextlib.AbstractContextManager[Any] = threading.RLock()

    def execute(self, op: Op[T], timeout: float | None = None) -> T:
        """Perform one operation of the transaction."""
        if not _observe.hooks:
            return self._execute(op, timeout)
        started = monotonic()
        try:
            answer = self._execute(op, timeout)
        except BaseException as error:
            _observe.notify(op, started, error=error, channel=self)
            raise
        _observe.notify(op, started, answer, channel=self)
        return answer

    def _execute(self, op: Op[T], timeout: float | None) -> T:
        self._check(op.statement.name)
        if not op.statement.savepoint:
            with self._lock:
                if self._nesting.owner is None:  # the usual case, without more ado
                    return self._send(op, timeout)
        with self._using(op.statement.name):
            if not op.statement.savepoint or not self._in_transaction():
                return self._send(op, timeout)
            # A refused value is an expected outcome: it must not abort what the caller did.
            with self._savepoint():
                return self._send(op, timeout)

    @contextlib.contextmanager
    def _using(self, action: str) -> Iterator[None]:
        """Hold the connection, while no other thread is in a nested transaction."""
        until = monotonic() + self._seconds(None)
        me = threading.get_ident()
        while True:
            with self._lock:
                if self._nesting.is_free(me):
                    yield
                    return
            if monotonic() > until:
                raise never_free(action, self._timeout)
            time.sleep(NESTED_NAP)

    def _send(self, op: Op[T], timeout: float | None = None) -> T:
        answer: Any = None
        InTransaction._check(self, op.statement.name)  # it may have ended while this waited
        for _ in range(op.statement.repeats + 1):
            seconds = self._seconds(timeout)
            answer = op.decode(
                self._connection.execute(op, seconds)
                if self._unbegun is None
                else self._begin_with(op, self._unbegun, seconds)
            )
            if not isinstance(answer, Raced):
                break
        return settled(op, answer)  # type: ignore[no-any-return]  # decoded by op

    def is_inherited(self) -> bool:
        """Whether this is a forked child, and the transaction its parent's."""
        return os.getpid() != self._pid

    def _check(self, action: str) -> None:
        super()._check(action)
        if self.is_inherited():
            raise TransactionError(f"{action}: the transaction belongs to the parent process")

    def _begin_with(self, op: Op[Any], begin: Op[None], seconds: float) -> Any:
        """Open the transaction and perform its first operation, in one round trip if that is prepared."""
        until = monotonic() + seconds
        connection = self._connection
        try:
            self._unbegun = None
            # To prepare it belongs to the transaction; a fence is a statement of its own.
            if is_fenced((op,)) or not connection.knows(op.statement):
                connection.execute(begin, seconds)
                return connection.execute(op, until - monotonic())
            begun, result = connection.begin_with(begin, op, seconds)
            if begun.status not in OK:
                raise refusal(begun, begin.statement)
            if result.status not in OK:
                raise refusal(result, op.statement)
            return result
        finally:
            if connection.pgconn.transaction_status == pq.TransactionStatus.IDLE:
                self._ended = "not begun"  # or what follows would be done outside of it

    def create_missing_table(self, table: Table) -> None:
        """Nothing is created inside a transaction."""

    def close(self) -> None:
        """The connection is not the store's to close."""

    def run(self, flow: Flow[T], timeout: float | None = None) -> T:
        """Run a flow inside the transaction, each of its operations within that time."""
        return drive(flow, self.execute, timeout, self._together)

    def _together(self, step: Transaction[Any] | Pipelined, timeout: float | None) -> Any:
        if isinstance(step, Pipelined):
            return self._perform_batch(step, timeout)
        with self.transaction() as inner:
            return inner.run(step.flow(), timeout)

    def _perform_batch(self, batch: Pipelined, timeout: float | None) -> list[Any]:
        if batch.deadline is not None:
            timeout = batch.deadline - monotonic()
        if batch.sync_each:
            return [self._outcome(op, timeout) for op in batch.ops]
        try:
            with self._aside(batch.name):
                seconds = self._seconds(timeout)
                results = self._connection.execute_all(batch.ops, seconds, sync_each=False)
                return accepted(batch, results)
        except RefusedError as refused:
            return refused.answers

    def _outcome(self, op: Op[Any], timeout: float | None) -> Any:
        try:
            with self._aside(op.statement.name):
                return self._send(op, timeout)
        except PgkvError as error:
            return error

    @contextlib.contextmanager
    def _aside(self, action: str) -> Iterator[None]:
        """Hold the connection for what may be refused without harm to what the caller did."""
        self._check(action)
        with self._using(action), self._shielded():
            InTransaction._check(self, action)
            yield

    @contextlib.contextmanager
    def transaction(self, isolation: IsolationLevel | None = None) -> Iterator[BoundChannel]:
        """Open a savepoint."""
        if isolation is not None:
            raise TransactionError("the isolation level belongs to the outermost transaction")
        self._check("transaction")
        with self._using("transaction"):
            self._nesting.enter(threading.get_ident())
        try:
            with self._savepoint():
                inner = BoundChannel(self._connection, self._timeout, self._deadline)
                inner._lock, inner._depth, inner._outer = self._lock, self._depth, self
                try:
                    yield inner
                    inner._close()
                finally:
                    inner.end()
        finally:
            self._nesting.leave()
        inner._ended = "merged into the one around it"

    def _close(self) -> None:
        """Wait for what is nested in it."""
        with self._lock:
            if self._nesting.owner is None:
                return
        with self._using("transaction"):
            pass

    @contextlib.contextmanager
    def _savepoint(self) -> Iterator[None]:
        self._depth += 1
        depth = self._depth
        try:
            with self.span(
                control.savepoint(depth), control.release(depth), control.rollback_to(depth)
            ):
                yield
        finally:
            self._depth -= 1

    @contextlib.contextmanager
    def span(
        self, begin: Op[None], commit: Op[None], rollback: Op[None], *, at_once: bool = True
    ) -> Iterator[None]:
        """Open and close a transaction or savepoint around a body; unless `at_once`, it opens with its
        first operation."""
        if not at_once:
            self._unbegun = begin
        else:
            try:
                with self._lock:
                    self._send(begin)
            except PgkvError as error:
                error.outcome_unknown = False  # whether it began or not, nothing was done
                raise
        try:
            yield
            self._check_commit()
        except BaseException as error:
            self._undo(rollback)
            if isinstance(error, PgkvError):
                # Nothing was committed, whatever became of the statement that failed.
                error.outcome_unknown = False
            raise
        if begin.statement.name == "begin":
            self._ended = "committed"
        with self._lock:
            self._check_process()
            if self._unbegun is None:
                self._connection.execute(commit, self._seconds(None))

    def _check_process(self) -> None:
        if self.is_inherited():
            raise TransactionError("the transaction belongs to the parent process")

    def _undo(self, rollback: Op[None]) -> None:
        # In a forked child, or on a broken connection, there is nothing to say to the server.
        if (
            self._unbegun is None
            and not self._over()
            and not self.is_inherited()
            and self._connection.pgconn.status == pq.ConnStatus.OK
        ):
            with self._lock, contextlib.suppress(PgkvError):
                self._connection.execute(rollback, self._timeout)


class CallerChannel(BoundChannel):
    """Operations over the caller's own psycopg connection, inside its transaction.

    Args:
        conn: the caller's. Its lock is taken for each operation; nothing is prepared on it.
        timeout: seconds for one operation.
    """

    def __init__(self, conn: psycopg.Connection[Any], timeout: float) -> None:
        super().__init__(PgConnection(conn, prepares=False), timeout)
        self._conn = conn
        self._lock = Reentrant(conn.lock)

    @property
    def state(self) -> str:
        """That its connection is the caller's, or how its own transaction ended."""
        return super().state if self._ended else "on a caller's connection"

    def _check(self, action: str) -> None:
        self._check_process()
        with self._lock:  # or another thread's savepoint might look like a failed transaction
            check_connection(self._conn, action)
        if not self._conn.autocommit and not self._in_transaction():
            # psycopg opens the transaction, with the caller's isolation level, as it would
            # for the caller's own first statement.
            self._conn.execute("")

    @contextlib.contextmanager
    def transaction(self, isolation: IsolationLevel | None = None) -> Iterator[BoundChannel]:
        """Open a savepoint, or a transaction on a connection in autocommit."""
        self._check("transaction")
        if self._in_transaction():
            with super().transaction(isolation) as inner:
                yield inner
            return
        inner = BoundChannel(self._connection, self._timeout)
        inner._lock = self._lock
        try:
            with inner.span(control.begin(isolation), control.commit(), control.rollback()):
                yield inner
                inner._close()
        finally:
            inner.end()
