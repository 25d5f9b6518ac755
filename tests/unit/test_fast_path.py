"""`PoolChannel.call` sends by itself what `PgConnection.execute` sends: they ask libpq for the same
things in the same order, and what comes of it is the same. So they cannot drift apart."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg import pq

from pgkv import Config
from pgkv._engine._sync.channel import PoolChannel
from pgkv._engine._sync.connection import PgConnection
from pgkv._engine._sync.pool import StorePool
from pgkv._ops.op import TEXT, Op, Result, Statement
from pgkv.errors import PgkvError


class Answer:
    """A result."""

    ntuples = 1
    command_tuples = 1

    def __init__(self, sqlstate: str = "") -> None:
        self.sqlstate = sqlstate
        self.status = int(pq.ExecStatus.FATAL_ERROR if sqlstate else pq.ExecStatus.TUPLES_OK)

    def get_value(self, _row: int, _column: int, /) -> bytes:
        return b"v"

    def error_field(self, field: pq.DiagnosticField) -> bytes | None:
        words = {pq.DiagnosticField.SQLSTATE: self.sqlstate, pq.DiagnosticField.SEVERITY: "ERROR"}
        return words.get(field, "text").encode()

    error_message = b"text"

    def get_error_message(self, _encoding: str = "") -> str:
        return "text"


passed = [0.0]  # seconds; they go on where a call waits, and only there


class Libpq:
    """Notes what it is asked for, and answers from lists; an exception in one is raised.

    Args:
        fd: a socket's.
        script: what calls return in turn; then False, and None of `get_result`.
    """

    ssl_in_use = False
    status = pq.ConnStatus.OK
    server_version = 180000

    def __init__(self, fd: int, script: dict[str, list[Any]]) -> None:
        self.socket = fd
        self.script = {name: list(answers) for name, answers in script.items()}
        self.asked: list[Any] = []
        self.transaction_status = pq.TransactionStatus.IDLE

    def essence(self) -> list[Any]:
        """What was asked for, but for looks whether there is something to do."""
        return [each for each in self.asked if each[0] not in ("poll", "flush", "is_busy")]

    def finish(self) -> None:
        self.asked.append(("finish",))
        self.status = pq.ConnStatus.BAD

    def poll(self, milliseconds: float) -> Any:
        answer = self._ask("poll", milliseconds > 0)
        if not answer:
            passed[0] += milliseconds / 1000
        return answer

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self._ask(name, *args)

    def _ask(self, name: str, *args: Any) -> Any:
        if name == "get_result":
            assert self.asked[-1][0] == "is_busy"  # or it might block beyond the deadline
        self.asked.append((name, *args))
        answers = self.script.get(name)
        answer = answers.pop(0) if answers else None if name == "get_result" else False
        if isinstance(answer, BaseException):
            raise answer
        return answer


class Conn:
    """psycopg's connection, as far as it is asked."""

    def __init__(self, pgconn: Libpq) -> None:
        self.pgconn = pgconn

    def cancel_safe(self, timeout: float) -> None:
        self.pgconn.asked.append(("cancel",))

    def close(self) -> None:
        pass


def read(result: Result) -> bytes | None:
    return result.get_value(0, 0)


GET: Statement[bytes | None] = Statement("get", "SELECT $1", (TEXT,), read)
SECONDS = 0.5
OK, LOST = Answer(), psycopg.OperationalError("lost")
SCRIPTS: dict[str, dict[str, list[Any]]] = {
    "an answer": {"poll": [1], "get_result": [OK]},
    "a refusal": {"poll": [1], "get_result": [Answer("22P02")]},
    "a refusal after an answer": {"poll": [1], "get_result": [OK, Answer("57P01")]},
    "an answer after a refusal": {"poll": [1], "get_result": [Answer("57P01"), OK]},
    "no answer in time": {"poll": [0], "is_busy": [1] * 9},
    "an answer in two parts": {"poll": [1, 1], "is_busy": [1, 1, 0], "get_result": [OK]},
    "a late end": {"poll": [1, 1], "is_busy": [0, 1, 1, 0], "get_result": [OK]},
    "a forgotten statement": {"poll": [1, 1, 1], "get_result": [Answer("26000"), None, OK, None, OK]},
    "not sent": {"send_query_prepared": [LOST]},
    "not flushed": {"flush": [LOST]},
    "lost while waiting": {"poll": [1], "consume_input": [LOST]},
    "lost after an answer": {"poll": [1], "is_busy": [0, LOST], "get_result": [OK]},
    "interrupted": {"poll": [KeyboardInterrupt()]},
    "interrupted while reading": {"poll": [1], "get_result": [KeyboardInterrupt()]},
}  # fmt: skip


@pytest.fixture
def fd() -> Iterator[int]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours.fileno()


def _connection(fd: int, script: dict[str, list[Any]]) -> tuple[PgConnection, Libpq]:
    libpq = Libpq(fd, script)
    connection = PgConnection(Conn(libpq), prepares=True, prepared={GET.prepared_name})  # type: ignore[arg-type]  # as far as it is asked
    connection.poll = libpq.poll
    return connection, libpq


def _outcome(call: Any) -> Any:
    try:
        return call()
    except PgkvError as error:
        return type(error), str(error), error.outcome_unknown
    except KeyboardInterrupt:
        return "interrupted"


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_the_fast_path_does_what_execute_does(
    fd: int, script: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever libpq answers."""
    for module in ("channel", "connection", "pool"):
        monkeypatch.setattr(f"pgkv._engine._sync.{module}.monotonic", lambda: passed[0])
    slow, theirs = _connection(fd, script)
    expected = _outcome(lambda: read(slow.execute(Op(GET, (b"k",)), SECONDS)))
    fast, ours = _connection(fd, {**script, "poll": [0, *script.get("poll", [])]})
    config = Config("postgresql://nowhere", retry=None, operation_timeout=SECONDS)
    pool = StorePool(config, lambda: config.dsn)
    pool.idle.append(fast)
    assert _outcome(lambda: PoolChannel(config, pool).call(GET, (b"k",))) == expected
    assert ours.asked[0] == ("poll", False)  # whether it is stale
    shared = len(theirs.essence())
    assert ours.essence()[:shared] == theirs.essence()
    # All that follows is the pool's, of a connection that it does not keep.
    assert set(ours.essence()[shared:]) <= {("finish",), ("cancel",)}
    pool.idle.clear()  # or metrics would count it for as long as a traceback keeps the channel
