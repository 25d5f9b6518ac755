"""What channels do without waiting, for sync and async alike."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

from psycopg import pq
from psycopg.pq.abc import PGresult

from .. import _observe
from .._ops.drivers import answer_of
from .._ops.lazy import cached_property
from .._ops.op import Expired, Flow, Noted, Op, Param, Pipelined, Raced, Statement, Transaction
from .._sql.sweep import Sweep
from ..config import Config, Table
from ..errors import ConflictError, PgkvError, TransactionError
from ..types import PoolStats
from .breaker import Misses
from .conninfo import server_of
from .flows import RefusedError
from .nesting import Nesting
from .results import outcomes
from .retry import may_repeat, recover
from .sweep import Collector

LAST_TIME = 2.0  # seconds for what is still to be sent when a store is closed
MANY = 1_000_000  # rows, at most, that a batch lets evict; it ends where the bound holds


class PooledOperations:
    """The part of a pool's channel that never waits.

    Args:
        config: timeouts and the retry policy.
        pool: where connections come from.
    """

    create_missing_table: Callable[..., Any]

    def __init__(self, config: Config, pool: Any) -> None:
        self._config = config
        self._pool = pool
        self._timeout = config.operation_timeout
        self._on_close: list[Callable[[], object]] = []
        self.last_flows: list[Callable[[], Flow[None]]] = []  # run before the pool is closed
        self._collectors: dict[Table, Collector] = {}
        self._known: set[Table] = set()
        self._patrolling = False
        self.misses: Misses = Misses()
        if pool is not None:  # a sharded store's channel has its servers' own
            _observe.pools.add(self)

    def on_close(self, fn: Callable[[], object]) -> None:
        """Call `fn` when the channel has been closed; an async one calls it in a thread."""
        self._on_close.append(fn)

    @property
    def state(self) -> str:
        return "closed" if getattr(self._pool, "_closed", False) else ""

    def is_exhausted(self) -> bool:
        """Whether all connections are in use, so that the next operation waits for one."""
        return bool(self._pool.is_exhausted())

    def pool_stats(self) -> PoolStats:
        """The pool's connections and waiters."""
        return PoolStats(*self._pool.counts())

    def conninfo(self) -> str:
        """What a connection outside the pool is opened with: for renewal and LISTEN."""
        return str(self._pool.conninfo())

    @cached_property
    def server(self) -> tuple[str | None, int | None, str | None]:
        """Host, port and database, for events. One of several hosts is not known."""
        return server_of(self.conninfo())

    def until(
        self, step: Transaction[Any] | Pipelined | None = None, timeout: float | None = None
    ) -> float:
        """The monotonic time at which a call ends that begins now, or the one of that step."""
        if step is not None and step.deadline is not None:
            return step.deadline
        return monotonic() + (self._timeout if timeout is None else timeout)

    def may_repeat(self, op: Op[Any] | Pipelined, error: PgkvError, /) -> bool:
        """Whether an operation that failed together with others may be repeated alone."""
        policy = self._config.retry
        return policy is not None and may_repeat(op, error, policy)

    def _start_patrols(self) -> None:
        if not self._patrolling:
            self._patrolling = True
            for collector in tuple(self._collectors.values()):
                collector.start_patrol()

    def _sweep(self, table: Table | None) -> None:
        collector = None if table is None else self._collectors.get(table)
        if collector is not None:
            collector.sweep()

    def _evict_after(self, step: Transaction[Any] | Pipelined) -> None:
        """Many rows may have been written, of which no answer told."""
        table = step.table
        if table is not None and table.bounded and step.writes and table in self._collectors:
            self._collectors[table].note(Noted(None, MANY), b"")

    def _recovering(
        self, op: Op[Any], started: float, deadline: float, outcome: PgkvError | Raced | None
    ) -> Flow[Any]:
        """Bring an operation to its end that the fast path could not."""
        missed = op.statement.missed
        if missed is not None and self.misses.hold(op.statement):
            return missed()  # as the operation's own
        try:
            answer = yield from self._settling(op, deadline, outcome)
        except BaseException as error:
            # Its context would be that no connection was idle, which concerns no caller.
            error.__suppress_context__ = True
            if _observe.hooks:
                _observe.notify(op, started, error=error, channel=self)
            if missed is not None and self.misses.excuse(op.statement, error):
                return missed()  # as above
            raise
        finally:
            del outcome  # an error's traceback holds this frame
        if missed is not None:
            self.misses.breaker.succeeded()
        return self._finished(op, answer, started)

    def _settling(
        self,
        step: Op[Any] | Transaction[Any] | Pipelined,
        deadline: float,
        outcome: PgkvError | Raced | None = None,
    ) -> Flow[Any]:
        """Attempt a step until it has an answer, or may not be repeated."""
        if outcome is None:
            self._start_patrols()
            try:
                answer = yield step
            except PgkvError as error:
                outcome = error
            else:
                if not isinstance(answer, Raced):
                    return answer
                outcome = answer

        def create(table: Table) -> Any:
            return self.create_missing_table(table, deadline)

        flow = recover(step, outcome, self._config.retry, deadline, create)
        del outcome  # an error's traceback holds this frame
        return (yield from flow)

    def _finished(self, op: Op[Any], answer: Any, started: float) -> Any:
        """What a few answers bring with them: expired rows, metrics."""
        answer = self._collected(op, answer)
        if _observe.hooks:
            _observe.notify(op, started, answer, channel=self)
        return answer

    def _answers(self, batch: Pipelined, results: Sequence[PGresult]) -> list[Any]:
        """The callers' parts of a batch's answers."""
        answers = outcomes(batch, results)
        for place, answer in enumerate(answers):
            if isinstance(answer, Expired):
                answers[place] = self._collected(batch.ops[place], answer)
        return answers

    def _collected(self, op: Op[Any], answer: Any) -> Any:
        """The caller's part of an answer; the expired keys in it are queued for deletion."""
        if not isinstance(answer, Expired):
            return answer
        collector = self._collectors.get(op.statement.table)  # type: ignore[arg-type]  # never None: it has rows
        if collector is not None:
            if isinstance(answer, Noted):
                collector.note(answer, answer.keys_of(op)[0])
            else:
                collector.collect(answer.keys_of(op))
        return answer.answer


class InTransaction:
    """The part of a transaction's channel that never waits.

    Args:
        timeout: seconds for one operation.
        deadline: the monotonic time at which the whole must end; None for no such time.
    """

    _connection: Any
    _savepoint: Callable[[], Any]
    execute: Callable[[Op[Any]], Any]

    def __init__(self, timeout: float, deadline: float | None = None) -> None:
        self._timeout = timeout
        self._deadline = deadline
        self._depth = 0
        self._ended = ""
        # What opens the transaction, until it is sent with the first operation.
        self._unbegun: Op[None] | None = None
        self._nesting = Nesting()
        self._outer: InTransaction | None = None

    def _seconds(self, timeout: float | None) -> float:
        seconds = self._timeout if timeout is None else timeout
        return seconds if self._deadline is None else min(seconds, self._deadline - monotonic())

    def _over(self) -> str:
        """How it ended, or one around it."""
        channel: InTransaction | None = self
        while channel is not None and not channel._ended:
            channel = channel._outer
        return "" if channel is None else channel._ended

    def _in_transaction(self) -> bool:
        return self._unbegun is not None or bool(
            self._connection.pgconn.transaction_status == pq.TransactionStatus.INTRANS
        )

    def _check(self, action: str) -> None:
        if (self._ended or self._outer is not None) and (ended := self._over()):
            raise TransactionError(f"{action}: the transaction was {ended}")

    def _check_commit(self) -> None:
        if ended := self._over():  # the connection may be another caller's by now
            raise TransactionError(f"the transaction around it was {ended}")
        if self._connection.pgconn.transaction_status == pq.TransactionStatus.INERROR:
            # COMMIT would answer ROLLBACK without an error, and the caller believe it.
            raise TransactionError(
                "a statement failed inside the transaction, so it was rolled back"
            )

    def _shielded(self) -> Any:
        """Keep what is refused from aborting what the caller did before, if there is such."""
        return self._savepoint() if self._in_transaction() else contextlib.nullcontext()

    def watch(self, sql: Sweep) -> None:
        """Nothing is collected inside a transaction."""

    def pool_stats(self) -> PoolStats:
        """A transaction has one connection."""
        raise TransactionError("pool_stats: a transaction has no pool; ask the store it came from")

    @property
    def state(self) -> str:
        """Whose transaction it is in, or how that ended."""
        return f"its transaction was {self._ended}" if self._ended else "in a transaction"

    @property
    def server(self) -> tuple[str | None, int | None, str | None]:
        """Host, port and database, for events."""
        pgconn = self._connection.pgconn
        host, port, name = (each.decode() or None for each in (pgconn.host, pgconn.port, pgconn.db))
        return host, None if port is None else int(port), name

    def call(self, statement: Statement[Any], params: Sequence[Param]) -> Any:
        return self.execute(Op(statement, params))

    def end(self) -> None:
        """Refuse what comes after."""
        self._ended = self._ended or "rolled back"

    def until(self) -> float:
        """The monotonic time at which a call ends that begins now."""
        return monotonic() + self._seconds(None)

    def may_repeat(self, _op: Op[Any] | Pipelined, _error: PgkvError, /) -> bool:
        """Nothing is repeated inside a transaction."""
        return False


def settled(op: Op[Any], answer: Any) -> Any:
    """The caller's part of the last answer inside a transaction."""
    if isinstance(answer, Raced):
        if answer.fallback is None:
            raise ConflictError(f"{op.statement.name}: every attempt met concurrent changes")
        answer = answer.fallback
    return answer_of(answer)


def accepted(batch: Pipelined, results: Sequence[PGresult]) -> list[Any]:
    """The answers of a batch that is one transaction or savepoint.

    Raises:
        RefusedError: one of its operations was refused.
    """
    answers = [answer_of(answer) for answer in outcomes(batch, results)]
    if any(isinstance(answer, PgkvError) for answer in answers):
        raise RefusedError(answers)
    return answers
