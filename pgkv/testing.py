"""What users need to test their own code that uses pgkv: a server clock that a test can move, and a
switch that turns cached functions and limiters off. `_pytest` makes fixtures of it.

Nothing in pgkv imports this module, and nothing here is meant for production.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import LiteralString, Self

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from .errors import ConfigError
from .patterns._runtime import switch as _switch

__all__ = ["ServerClock", "disabled"]

_SCHEMA_NAME = re.compile(r"[a-z_][a-z0-9_]{0,62}")

# The offset, in microseconds, lives in a sequence and not in a table: setval() is seen at once by
# every connection, also by one in a REPEATABLE READ transaction, and leaves no dead row behind.
# pg_catalog is named throughout because these functions stand before it in the search_path and
# would call themselves.
_INSTALL: LiteralString = """
CREATE SCHEMA IF NOT EXISTS {schema};
CREATE SEQUENCE IF NOT EXISTS {offset} MINVALUE -9223372036854775808 START 0;
CREATE OR REPLACE FUNCTION {schema}.clock_timestamp() RETURNS timestamptz
    LANGUAGE sql VOLATILE PARALLEL SAFE AS '
        SELECT pg_catalog.clock_timestamp() + pg_catalog.make_interval(secs => last_value / 1e6)
        FROM {offset}';
CREATE OR REPLACE FUNCTION {schema}.statement_timestamp() RETURNS timestamptz
    LANGUAGE sql STABLE PARALLEL SAFE AS '
        SELECT pg_catalog.statement_timestamp() + pg_catalog.make_interval(secs => last_value / 1e6)
        FROM {offset}';
"""


class ServerClock:
    """A clock of the PostgreSQL server that a test can move, for every connection made with `dsn`
    and no other.

    pgkv takes the time from the server's functions clock_timestamp() and statement_timestamp() and
    names them without a schema; `dsn` has a search_path whose first schema holds functions of these
    names that add an offset. So a key expires when the test says so::

        with ServerClock("postgresql://...") as clock, pgkv.Store.connect(clock.dsn) as store:
            store.set("k", "v", ttl=60)
            clock.advance(61)
            assert store.get("k") is None

    Tables that pgkv makes go into the same schema. Without `schema` it has a random name and is
    dropped, with its tables, by `close()`; a named schema is kept. A move is seen
    by the next statement of every connection. Local waiting (heartbeats, timeouts, what a client
    counts on from an answer) does not move with it.

    Make the clock before the tables: defaults of columns keep the functions they were made with.

    Args:
        dsn: of the server whose clock is moved; the role needs CREATE on the database.
        schema: a plain lower-case name; None for a schema of its own.

    Raises:
        ConfigError: `schema` is not such a name.
    """

    def __init__(self, dsn: str, *, schema: str | None = None) -> None:
        if schema is not None and not _SCHEMA_NAME.fullmatch(schema):
            raise ConfigError(
                f"schema must be a plain lower-case name, not {schema!r}"
            )  # used in `options` without quotes
        self.schema: str = schema or f"pgkv_test_{secrets.token_hex(6)}"
        self._drop = schema is None
        options = conninfo_to_dict(dsn).get("options") or ""
        self.dsn: str = make_conninfo(
            dsn, options=f"{options} -c search_path={self.schema},pg_catalog".strip()
        )
        self._offset = sql.Identifier(self.schema, "pgkv_clock_offset")
        self._conn = psycopg.connect(dsn, autocommit=True)
        self._conn.execute(
            sql.SQL(_INSTALL).format(schema=sql.Identifier(self.schema), offset=self._offset)
        )

    def __repr__(self) -> str:
        return f"<ServerClock schema={self.schema!r}>"

    @property
    def offset(self) -> float:
        """Seconds by which this clock is ahead of the real one; negative when it is behind."""
        row = self._conn.execute(
            sql.SQL("SELECT last_value FROM {}").format(self._offset)
        ).fetchone()
        assert row is not None
        return float(row[0]) / 1e6

    def set_offset(self, seconds: float | timedelta) -> None:
        """Set the clock `seconds` ahead of the real one, or behind it if negative; 0 removes the offset."""
        self._set("SELECT setval({}, %s)", seconds)

    def advance(self, seconds: float | timedelta) -> None:
        """Move the clock forward by `seconds`, or back if negative."""
        self._set("SELECT setval({0}, last_value + %s) FROM {1}", seconds)

    def now(self) -> datetime:
        """Return the moment this clock shows, in UTC."""
        function = sql.Identifier(self.schema, "clock_timestamp")
        row = self._conn.execute(
            sql.SQL("SELECT extract(epoch FROM {}())::text").format(function)
        ).fetchone()
        assert row is not None
        return datetime.fromisoformat("1970-01-01T00:00:00+00:00") + timedelta(
            seconds=float(row[0])
        )

    def close(self) -> None:
        """Drop the schema, unless it was named at the start, and disconnect. Idempotent."""
        if not self._conn.closed:
            if self._drop:
                self._conn.execute(
                    sql.SQL("DROP SCHEMA {} CASCADE").format(sql.Identifier(self.schema))
                )
            self._conn.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _set(self, query: LiteralString, seconds: float | timedelta) -> None:
        seconds = seconds.total_seconds() if isinstance(seconds, timedelta) else seconds
        sequence = sql.Literal(self._offset.as_string(self._conn))
        self._conn.execute(sql.SQL(query).format(sequence, self._offset), [round(seconds * 1e6)])


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Turn `pgkv.cached` and rate limiters off, in the whole process, for a ``with`` block (or as a
    decorator). Blocks nest, and no store is needed.

    Cached functions are then the functions themselves: nothing is stored, ``invalidate`` and
    ``cache_clear`` do nothing and ``peek`` finds nothing. A limiter admits every call at once and
    counts none; its decisions are `degraded`. Bad arguments are still refused.
    """
    _switch.add(1)
    try:
        yield
    finally:
        _switch.add(-1)
