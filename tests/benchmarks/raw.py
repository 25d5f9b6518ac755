"""The limit: a statement of the store's, sent by libpq's own blocking call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Self

import psycopg

from pgkv import Config
from pgkv._conninfo import build
from pgkv._op import BINARY, Op


class Raw:
    """A connection with the settings of a store's, and nothing around it.

    Args:
        dsn: the server.
    """

    def __init__(self, dsn: str) -> None:
        self.conn = psycopg.connect(build(Config(dsn), dsn), autocommit=True)
        self._prepared: set[bytes] = set()

    def sender(self, op: Op[Any]) -> Callable[[Any], Any]:
        """What sends parameters with that operation's statement: they are encoded beforehand, and
        the result is left as it comes."""
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
        """The same, reading the first column of the first row."""
        send = self.sender(op)

        def call(params: Any) -> bytes | None:
            result = send(params)
            value: bytes | None = result.get_value(0, 0)
            return value

        return call

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.conn.close()
