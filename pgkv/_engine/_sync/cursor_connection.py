"""The fallback of the fast path: a connection used through an ordinary psycopg cursor.

Where the platform has no ``poll()`` (Windows). Slower, the same promises.
"""

from __future__ import annotations

import contextlib
import math
import socket
import threading
from time import monotonic
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import pq

from ..._ops.op import BINARY, Op, Result, Statement
from ...errors import PgkvError
from ..pooling import PoolPlace, Preparing
from ..results import OK, PIPELINE_ABORTED, failed, past_deadline, refusal
from .connection import CANCEL_TIMEOUT, HAS_POLL, IDLE, PgConnection, poller

if TYPE_CHECKING:
    from collections.abc import Sequence

    from psycopg.pq.abc import PGresult


class CursorConnection(PgConnection):
    """The same over an ordinary cursor, where the platform has no ``poll()`` (Windows) or
    psycopg's internals have changed. Slower, the same promises."""

    __slots__ = ("_cursor", "_resets_autocommit")
    takes_lock = True
    ready: frozenset[bytes] = frozenset()  # nothing is sent past `execute`

    def __init__(
        self,
        conn: psycopg.Connection[Any],
        *,
        prepares: bool,
        prepared: set[bytes] | None = None,  # noqa: ARG002  # psycopg keeps count itself
        preparing: Preparing | None = None,
    ) -> None:
        self.conn = conn
        self.pgconn = conn.pgconn
        self.preparing: Preparing | None = preparing
        self.prepares = prepares and preparing is None  # a trial goes by pgkv's own names
        self.retire_at = math.inf
        self.place = PoolPlace()
        self._lost = None
        self.poll = poller(self.pgconn.socket)
        self._resets_autocommit = False
        self._cursor = psycopg.RawCursor(conn)
        self._cursor.adapters.register_dumper(_Text, _TextDumper)
        self._cursor.adapters.register_dumper(_Binary, _BinaryDumper)

    def execute(
        self,
        op: Op[Any],
        seconds: float,
        _sent: Any = None,
        *,
        again: bool = True,  # noqa: ARG002  # psycopg's statements are its own
    ) -> Result:
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
        alarm = threading.Lock()  # held by the side that decides how this ends
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
            # A cancel request is under way, and may come late: nothing may follow on this connection.
            timer.join()
            self.abandon()
            if result is None or result.status not in OK:
                raise past_deadline(statement.name, seconds)
        elif self._resets_autocommit and self.pgconn.transaction_status == IDLE:
            self._resets_autocommit = False
            self.conn.autocommit = False
        if result is None:
            try:
                raise failure
            finally:
                del failure  # its traceback holds this frame, and the callers'
        return result

    def _begin_nothing(self) -> None:
        """Keep psycopg from opening a transaction that is never committed."""
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


connection_class: type[PgConnection] = PgConnection if HAS_POLL else CursorConnection
