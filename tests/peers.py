"""The other side of a test: a plain connection beside the store's, and the caller's own for
`using()`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg

from tests.servers import PATIENCE
from tests.variants import Threaded, Variant, in_thread


async def until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> None:
    """`servers.wait_until` for `async def` tests: the loop runs on meanwhile."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        await asyncio.sleep(0.005)


class Peer:
    """Another client of the test's schema, blocking and in autocommit."""

    def __init__(self, dsn: str) -> None:
        self.conn = psycopg.connect(dsn, autocommit=True)

    def run(self, query: str, *params: Any) -> list[tuple[Any, ...]]:
        """Run a statement and return its rows."""
        cursor = self.conn.execute(query.encode(), params)
        return cursor.fetchall() if cursor.description else []

    def one(self, query: str, *params: Any) -> Any:
        """The first column of the only row."""
        rows = self.run(query, *params)
        assert len(rows) == 1
        return rows[0][0]

    def keys(self, table: str = "kv_store") -> set[str]:
        """Every key in the table, those whose time has passed included."""
        return {row[0] for row in self.run(f'SELECT key FROM "{table}"')}

    def waiting(self) -> int:
        """How many connections to this database wait for a lock."""
        count: int = self.one(
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            " AND datname = current_database()"
        )
        return count

    def count_all(self) -> None:
        """End the other connections of the test, each of which tells the server its counts then: by
        itself it does so seconds later."""
        self.run(
            "SELECT pg_terminate_backend(pid, 30000) FROM pg_stat_activity"
            " WHERE pid <> pg_backend_pid() AND backend_type = 'client backend' AND"
            " application_name = (SELECT application_name FROM pg_stat_activity"
            " WHERE pid = pg_backend_pid())"
        )

    async def until_waiting(self, count: int = 1) -> None:
        """Wait until so many connections wait for a lock. Not inside a transaction of the peer,
        which sees the statistics as they were: `with another`."""
        await until(lambda: self.waiting() >= count, "a statement waits for a lock")


async def caller_connection(variant: Variant, dsn: str, **options: Any) -> Any:
    """The caller's own connection in the test's variant; awaited in both."""
    if variant.name == "async":
        return await psycopg.AsyncConnection.connect(dsn, **options)
    return Threaded(await in_thread(psycopg.Connection.connect, dsn, **options))


async def fetch(conn: Any, query: str, *params: Any) -> list[tuple[Any, ...]]:
    """The rows of a query on `caller_connection`'s."""
    cursor = await conn.execute(query, params or None)
    if isinstance(cursor, psycopg.Cursor):
        return cursor.fetchall()
    rows: list[tuple[Any, ...]] = await cursor.fetchall()
    return rows


async def gather(*calls: Awaitable[Any]) -> list[Any]:
    """All results, failures among them."""
    return await asyncio.gather(*calls, return_exceptions=True)
