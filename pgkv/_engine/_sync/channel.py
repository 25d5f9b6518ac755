"""Where a store's operations go: a store is a set of statements and a channel that performs them.

`PoolChannel` sends each operation over a pooled connection, by itself, and retries, creates missing
tables and collects; `transaction` has the channels of transactions, which do none of that.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from random import random
from time import monotonic
from typing import Any, TypeAlias, TypeVar

import psycopg
from psycopg import IsolationLevel

from ... import _observe
from ..._fork import CONNECTIONS, survives_fork
from ..._ops.drivers import drive
from ..._ops.op import (
    BINARY,
    Flow,
    Op,
    Param,
    Pipelined,
    Raced,
    Signal,
    Statement,
    Transaction,
)
from ..._sql import control
from ..._sql.sweep import Sweep
from ...config import Config, Table
from ...errors import PgkvError
from .. import schema as _schema
from ..base import LAST_TIME, PooledOperations
from ..results import OK, failed
from ..sweep import SWEEP_CHANCE, Collector, warn_dropped, weakly
from .pool import CallerPool, StorePool, disown
from .transaction import BoundChannel

T = TypeVar("T")

POLL_MAX = 1e6  # seconds; poll() refuses what does not fit a C int


class PoolChannel(PooledOperations):
    """Operations over pooled connections, each by itself."""

    _pool: StorePool | CallerPool

    def __init__(self, config: Config, pool: StorePool | CallerPool) -> None:
        super().__init__(config, pool)
        self._begin()
        survives_fork(self, CONNECTIONS)

    def _begin(self) -> None:
        self._patrolling = False
        self._closing = threading.Event()

    def after_fork(self) -> None:
        """Start again in the child, with connections and threads of its own."""
        self._pool.after_fork()
        self._begin()
        for collector in self._collectors.values():
            collector.reset()

    # -- one operation

    def execute(self, op: Op[T], timeout: float | None = None) -> T:
        return self.call(op.statement, op.params, timeout, op)  # type: ignore[no-any-return]  # decoded by op

    def call(
        self,
        statement: Statement[T],
        params: Sequence[Param],
        timeout: float | None = None,
        op: Op[T] | None = None,
    ) -> T:
        """Perform one statement, with all that is usual in one frame. The rest is left to `execute`
        and `receive` of the connection, which call libpq in the same order, and to `_recover`."""
        started = monotonic()
        pool = self._pool
        try:
            connection = pool.idle.pop()
        except IndexError:
            return self._recover(op or Op(statement, params), started, timeout, None)
        if connection.is_stale():
            pool.discard(connection)
            return self._recover(op or Op(statement, params), started, timeout, None)
        seconds = self._timeout if timeout is None else timeout
        sent = False
        try:
            if statement.prepared_name in connection.ready:
                connection.send_prepared(statement.prepared_name, params, statement.formats, BINARY)
                sent = True
                result: Any = None
                is_whole = False
                if (
                    not connection.flush()
                    and 0 < seconds < POLL_MAX
                    and connection.poll(seconds * 1000.0)
                ):
                    connection.consume()
                    if not connection.is_busy():
                        result = connection.get_result()
                        # Never two results for one is_busy: the second might block.
                        if not connection.is_busy():
                            more = connection.get_result()
                            is_whole = more is None
                            if more is not None and result.status in OK:
                                result = more
                if not is_whole:
                    until = started + seconds
                    result = connection.receive(statement, seconds, until, result, begun=True)
                if result.status not in OK:
                    left = started + seconds - monotonic()
                    result = connection.execute(Op(statement, params), left, result)
            else:
                result = connection.execute(Op(statement, params), seconds)
        except PgkvError as error:
            pool.check_in(connection)
            return self._recover(op or Op(statement, params), started, timeout, error)
        except psycopg.Error as error:
            pool.check_in(connection)
            failure = failed(error, statement, sent=sent)
            try:
                return self._recover(op or Op(statement, params), started, timeout, failure)
            finally:
                del failure  # its traceback holds this frame
        except BaseException:
            connection.abandon()
            pool.check_in(connection)
            raise
        if connection.retire_at > started:
            pool.idle.append(connection)
            if pool.waiters:
                pool.serve_waiters()
        else:
            pool.put_idle(connection)
        answer = (op or statement).decode(result)
        if statement.writes and random() < SWEEP_CHANCE:  # noqa: S311  # a sample, no secret
            self._sweep(statement.table)
        if isinstance(answer, Signal) or _observe.hooks:
            op = op or Op(statement, params)
            if isinstance(answer, Raced):
                return self._recover(op, started, timeout, answer)
            return self._finished(op, answer, started)  # type: ignore[no-any-return]  # decoded by op
        return answer

    def _recover(
        self, op: Op[T], started: float, timeout: float | None, outcome: PgkvError | Raced | None
    ) -> T:
        """Bring an operation to its end that `call` could not."""
        deadline = started + (self._timeout if timeout is None else timeout)
        flow = self._recovering(op, started, deadline, outcome)
        del outcome  # an error's traceback holds this frame
        return drive(flow, self._attempt, deadline, self._attempt)  # type: ignore[no-any-return]  # decoded by op

    def _attempt(self, step: Op[Any] | Transaction[Any] | Pipelined, deadline: float | None) -> Any:
        assert deadline is not None
        if isinstance(step, Transaction):
            with self._bound(deadline=deadline) as bound:
                return bound.run(step.flow())
        if isinstance(step, Pipelined):
            return self._attempt_batch(step, deadline)
        connection = self._pool.check_out(deadline, step.statement.name)
        try:
            result = connection.execute(step, deadline - monotonic())
        finally:
            self._pool.check_in(connection)
        return step.decode(result)

    def _attempt_batch(self, batch: Pipelined, deadline: float) -> list[Any]:
        connection = self._pool.check_out(deadline, batch.name)
        try:
            seconds = deadline - monotonic()
            results = connection.execute_all(batch.ops, seconds, sync_each=batch.sync_each)
        finally:
            self._pool.check_in(connection)
        return self._answers(batch, results)

    # -- flows

    def run(self, flow: Flow[T], timeout: float | None = None) -> T:
        """Run a flow, each of its operations by itself and within that time."""
        return drive(flow, self.execute, timeout, self._together)

    def _together(self, step: Transaction[Any] | Pipelined, timeout: float | None) -> Any:
        until = self.until(step, timeout)
        self._start_patrols()
        answer: Any = None
        settling: Flow[Any] | None = None
        try:
            answer = self._attempt(step, until)
        except PgkvError as error:
            settling = self._settling(step, until, error)
        if settling is not None:  # outside of the handler: its error is no other one's context
            answer = drive(settling, self._attempt, until, self._attempt)
        self._evict_after(step)
        return answer

    def transaction(
        self, isolation: IsolationLevel | None = None
    ) -> contextlib.AbstractContextManager[BoundChannel]:
        """Open a transaction on a connection of its own, its tables made beforehand."""
        return self._bound(isolation, ensure=True)

    @contextlib.contextmanager
    def _bound(
        self,
        isolation: IsolationLevel | None = None,
        *,
        deadline: float | None = None,
        ensure: bool = False,
    ) -> Iterator[BoundChannel]:
        if ensure:
            # Inside, a missing table would fail the caller's transaction.
            for table in tuple(self._collectors):
                if table not in self._known and table.auto_create:
                    self.create_missing_table(table)
        until = monotonic() + self._timeout if deadline is None else deadline
        # Said each time: behind a pooler the connection's own default is the server's.
        begin = control.begin(isolation or IsolationLevel.READ_COMMITTED)
        connection = self._pool.check_out(until, "transaction")
        if isinstance(self._pool, CallerPool):
            # Its `reset` may forget our statements, which a transaction would not survive.
            connection.prepares = False
        bound = BoundChannel(connection, self._timeout, deadline)
        try:
            with bound.span(begin, control.commit(), control.rollback(), at_once=False):
                yield bound
                bound._close()
        finally:
            if bound.is_inherited():
                bound.end()
                disown(connection)
            else:
                with bound._lock:  # what another thread sends just now ends before
                    bound.end()
                self._pool.check_in(connection)

    def create_missing_table(self, table: Table, deadline: float | None = None) -> None:
        """Create a table that the server says is missing."""
        until = monotonic() + self._timeout if deadline is None else deadline

        def execute(op: Op[Any], _: float | None) -> Any:
            return self.execute(op, max(0.001, until - monotonic()))

        drive(_schema.ensure(table), execute)
        self._known.add(table)

    # -- the background

    def watch(self, sql: Sweep) -> None:
        """Collect that table's expired rows by its strategy."""
        if sql.table not in self._collectors:
            collector = self._collectors[sql.table] = Collector(sql, weakly(self._background))
            if self._patrolling:
                collector.start_patrol()

    def _background(self, flow: Flow[None], done: Callable[[], None]) -> None:
        threading.Thread(
            target=_run_quietly,
            args=(weakref.ref(self), self._closing, flow, done),
            name="pgkv-sweep",
            daemon=True,
        ).start()

    def close(self) -> None:
        """Close every connection. What is under way ends first or fails."""
        self._closing.set()
        while self.last_flows:
            self.run(self.last_flows.pop()(), LAST_TIME)
        self._pool.close()
        while self._on_close:
            self._on_close.pop()()


Channel: TypeAlias = PoolChannel | BoundChannel


def _run_quietly(
    ref: weakref.ref[PoolChannel],
    closing: threading.Event,
    flow: Flow[None],
    done: Callable[[], None],
) -> None:
    """Run a flow in a thread of its own, until it ends or the channel is closed or dropped."""

    def execute(op: Op[Any], timeout: float | None) -> Any:
        channel = ref()
        if channel is None:
            raise GeneratorExit
        return channel.execute(op, timeout)

    def sleep(seconds: float) -> None:
        if closing.wait(seconds):
            raise GeneratorExit

    try:
        drive(flow, execute, sleep=sleep)
    except (GeneratorExit, PgkvError):
        pass
    except Exception as error:  # noqa: BLE001  # a defect of ours must not pass in silence
        _observe.warning("pgkv.sweep.broken", error=type(error).__name__)
    finally:
        done()
        channel = ref()
        if channel is None and not closing.is_set():
            warn_dropped()
        elif channel is not None:
            channel._patrolling = False  # the next call that connects starts them again
