"""What a sync and an async connection share: libpq's functions, bound once, and the statements that are
prepared on the connection.

What has to wait for the server's answer is a flow. It yields the statement that was sent, and gets the
result; or operations to be sent as one transaction, and gets their results.
"""

from __future__ import annotations

import math
import select
from collections.abc import Callable, Generator, Sequence
from collections.abc import Set as AbstractSet
from time import monotonic
from typing import Any, TypeAlias, TypeVar

from psycopg import capabilities, pq
from psycopg.pq.abc import PGconn, PGresult

from .._ops.op import BINARY, Flow, Op, Result, Statement
from .._sql.control import PREPARE_TRIAL
from .._sql.table import read_int
from ..config import Pooler
from ..errors import PgkvError, from_result
from .results import OK, behind_fences, in_part, is_outdated, refusal, without_fences

T = TypeVar("T")

CANCEL_TIMEOUT = 1.0  # seconds that a cancel request may take
IDLE = pq.TransactionStatus.IDLE
HAS_POLL = hasattr(select, "poll")  # Windows has none
SELECT_NAP = 0.1  # seconds; no Ctrl-C ends a select() on Windows before its time
HAS_CLOSE_PREPARED = capabilities.has_send_close_prepared()  # as of libpq 17
TRIALS_MAX = 3  # connections that may be lost by a trial

Conversation: TypeAlias = "Generator[Statement[Any] | Sequence[Op[Any]], Any, T]"


class Preparing:
    """Whether statements may be prepared through a pooler in transaction mode.

    A pooler that keeps them (PgBouncer since 1.21) gives them other names on the server. So the
    first connection prepares `PREPARE_TRIAL`, which looks for its own name there. A pooler that
    passes the name on would lose the statement with the next transaction. After a refusal nothing
    is prepared any more.

    Attributes:
        allowed: None before the trial.
    """

    __slots__ = ("_lost", "allowed")

    def __init__(self) -> None:
        self.allowed: bool | None = None
        self._lost = 0

    @classmethod
    def through(cls, pooler: Pooler) -> Preparing | None:
        """None for a direct connection, where it is no question."""
        return None if pooler is Pooler.NONE else cls()

    def learn(self, result: Result) -> None:
        """Note how many statements of that name the trial saw."""
        self.allowed = not read_int(result)

    def learn_failure(self, *, is_usable: bool) -> None:
        """Note that the trial was refused, or that the connection was lost by it."""
        self._lost += not is_usable
        if is_usable or self._lost >= TRIALS_MAX:
            self.allowed = False


class WireConnection:
    """One connection, as far as nothing has to wait.

    Args:
        conn: an open psycopg connection; no other caller uses it meanwhile.
        prepares: keep prepared statements on it: not on a connection that belongs to the caller.
        prepared: the names prepared on it already, kept up to date.
        preparing: through a pooler, whether it lets statements be prepared.

    Attributes:
        ready: the names that `PoolChannel.call` may send by itself, without `execute`.
    """

    __slots__ = (
        "_prepared", "conn", "consume", "flush", "get_result", "is_busy", "pgconn", "poll",
        "prepares", "preparing", "ready", "retire_at", "send_prepared",
    )  # fmt: skip

    def __init__(
        self,
        conn: Any,
        *,
        prepares: bool,
        prepared: set[bytes] | None = None,
        preparing: Preparing | None = None,
    ) -> None:
        self.conn: Any = conn
        self.preparing: Preparing | None = preparing
        self.pgconn: PGconn = conn.pgconn
        self.prepares: bool = prepares and (preparing is None or preparing.allowed is not False)
        self.retire_at: float = math.inf
        self._prepared = set() if prepared is None else prepared
        self.ready: AbstractSet[bytes] = self._prepared if self.prepares else frozenset()
        pgconn = self.pgconn
        # One poller for the connection's life; bound methods spare a look-up for each of some ten calls.
        self.poll: Callable[[float], Sequence[Any]] = poller(pgconn.socket)
        self.send_prepared: Callable[..., None] = pgconn.send_query_prepared
        self.flush: Callable[[], int] = pgconn.flush
        self.consume: Callable[[], None] = pgconn.consume_input
        self.is_busy: Callable[[], int] = pgconn.is_busy
        self.get_result: Callable[[], PGresult | None] = pgconn.get_result

    def is_usable(self) -> bool:
        """Whether another operation may follow."""
        pgconn = self.pgconn
        return pgconn.status == pq.ConnStatus.OK and pgconn.transaction_status == IDLE

    def knows(self, statement: Statement[Any]) -> bool:
        """Whether a statement is prepared."""
        return self.prepares and statement.prepared_name in self._prepared

    def _send_unprepared(self, op: Op[Any], *, script: bool = False) -> None:
        statement = op.statement
        sql = statement.text(self.pgconn.server_version)
        if script:
            self.pgconn.send_query(sql)
        else:
            self.pgconn.send_query_params(
                sql, op.params, param_formats=statement.formats, result_format=BINARY
            )

    def _send_pipeline(self, ops: Sequence[Op[Any]], *, sync_each: bool) -> None:
        """Send operations whose statements are prepared in one pipeline, but for what `flush` sends."""
        self.pgconn.enter_pipeline_mode()
        for op in ops:
            statement = op.statement
            if self.prepares and not statement.script:
                self.send_prepared(statement.prepared_name, op.params, statement.formats, BINARY)
            else:
                self._send_unprepared(op)
            if sync_each:
                self.pgconn.pipeline_sync()
        if not sync_each:
            self.pgconn.pipeline_sync()

    # -- statements on the server

    def _trial(self) -> Flow[None]:
        """Find out whether the pooler lets statements be prepared."""
        assert self.preparing is not None
        try:
            result: Result = yield PREPARE_TRIAL
            self.preparing.learn(result)
        except PgkvError:
            self.preparing.learn_failure(is_usable=self.is_usable())
            if not self.is_usable():
                raise
        if not self.preparing.allowed:
            self._stop_preparing(self.preparing)

    def _stop_preparing(self, preparing: Preparing) -> None:
        self.prepares = preparing.allowed = False
        self.ready = frozenset()

    def _preparation(self, statement: Statement[Any]) -> Conversation[None]:
        """Prepare a statement."""
        self.pgconn.send_prepare(
            statement.prepared_name, statement.text(self.pgconn.server_version)
        )
        try:
            result = yield statement
        except PgkvError as failure:
            failure.outcome_unknown = False  # preparing changes nothing
            raise
        # The name is a hash of the text: one that exists is the one we want.
        if result.status not in OK and from_result(result).sqlstate != "42P05":
            # PgBouncer keeps the name of a statement that the server refused, and closes the
            # connection of a client that prepares it again.
            if self.preparing is not None and HAS_CLOSE_PREPARED:
                self.pgconn.send_close_prepared(statement.prepared_name)
                yield statement
            elif self.preparing is not None:
                self._stop_preparing(self.preparing)
            raise from_result(result)
        self._prepared.add(statement.prepared_name)

    def _refused(self, statement: Statement[Any], result: PGresult) -> Conversation[bool]:
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
        self.pgconn.send_query(b"DEALLOCATE " + statement.prepared_name)
        yield statement
        self._prepared.discard(statement.prepared_name)
        return True

    def _all_refused(
        self, ops: Sequence[Op[Any]], answers: Sequence[PGresult]
    ) -> Conversation[None]:
        """Take note of what a pipeline's refusals say; its flow sends the operations again."""
        for op, answer in zip(ops, answers, strict=False):
            if answer.status not in OK:
                yield from self._refused(op.statement, answer)

    # -- tables that Citus may move: see `_shards.fences`

    def _fenced(self, op: Op[Any], plan: Any) -> Conversation[PGresult]:
        """Perform an operation behind its fence, and once more if its prepared statement was gone."""
        (result,) = yield from self._behind_fences((op,), sync_each=False)
        if result.status not in OK and (yield from self._refused(plan.statement, result)):
            (result,) = yield from self._behind_fences((op,), sync_each=False)
        if result.status not in OK:
            raise refusal(result, op.statement)
        return result

    def _behind_fences(
        self, ops: Sequence[Op[Any]], *, sync_each: bool
    ) -> Conversation[list[PGresult]]:
        """Perform operations behind their fences, in one transaction or each in its own."""
        if not sync_each:
            inside = self.pgconn.transaction_status != IDLE
            sent, behind = behind_fences(ops, inside=inside)
            return without_fences((yield sent), behind)
        done: list[PGresult] = []
        for op in ops:
            try:
                done += yield from self._behind_fences((op,), sync_each=False)
            except PgkvError as error:
                if not done:
                    raise
                raise in_part(error) from error
        return done


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
