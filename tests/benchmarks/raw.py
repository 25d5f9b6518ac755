"""The limit: a statement of the store's, sent by libpq's own blocking call. Parameters are encoded
beforehand; what comes back is read and not decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import psycopg

from pgkv import Config
from pgkv._engine.conninfo import build
from pgkv._ops.op import BINARY, Op


class Raw:
    """A connection with the settings of a store's, and nothing around it.

    Args:
        dsn: the server.
    """

    def __init__(self, dsn: str) -> None:
        self.conn = psycopg.connect(build(Config(dsn), dsn), autocommit=True)
        self._prepared: set[bytes] = set()

    def sender(self, op: Op[Any]) -> Callable[[Any], Any]:
        """What sends parameters with that operation's statement; the result is left unread."""
        statement, pgconn = op.statement, self.conn.pgconn
        if statement.prepared_name not in self._prepared:
            self._prepared.add(statement.prepared_name)
            pgconn.prepare(statement.prepared_name, statement.text(pgconn.server_version))
        return partial(
            pgconn.exec_prepared,
            statement.prepared_name,
            param_formats=statement.formats,
            result_format=BINARY,
        )

    def caller(self, op: Op[Any]) -> Callable[[Any], bytes | None]:
        """The same, and reads the first column of the first row."""
        send = self.sender(op)

        def call(params: Any) -> bytes | None:
            result = send(params)
            value: bytes | None = result.get_value(0, 0)
            return value

        return call

    def pair_caller(self, op: Op[Any]) -> Callable[[Any], dict[bytes, bytes]]:
        """The same, and reads the first two columns of all rows."""
        send = self.sender(op)

        def call(params: Any) -> dict[bytes, bytes]:
            result = send(params)
            column = result.get_value
            return {column(row, 0): column(row, 1) for row in range(result.ntuples)}

        return call

    def pipeline(self, ops: Sequence[Op[Any]]) -> list[bytes | None]:
        """Send operations with one Sync and read the first column of each one's first row."""
        pgconn = self.conn.pgconn
        pgconn.enter_pipeline_mode()
        for op in ops:
            statement = op.statement
            pgconn.send_query_prepared(
                statement.prepared_name, op.params, statement.formats, BINARY
            )
        pgconn.pipeline_sync()
        values: list[bytes | None] = []
        for _ in ops:
            result = pgconn.get_result()
            assert result is not None
            values.append(result.get_value(0, 0))
            pgconn.get_result()  # the end of this one
        pgconn.get_result()  # the Sync
        pgconn.exit_pipeline_mode()
        return values

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.conn.close()
