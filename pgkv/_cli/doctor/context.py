"""The input and the result of a check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import psycopg

from ...config import Config

Status: TypeAlias = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check.

    Attributes:
        check: the name of the check.
        status: "ok", "warn" (works, but needs attention) or "fail" (pgkv cannot work).
        detail: the result, in words.
        advice: how to fix it; empty if there is nothing to fix.
    """

    check: str
    status: Status
    detail: str
    advice: str = ""


@dataclass(slots=True)
class Context:
    """The input of the checks.

    Args:
        conn: a connection to the server.
        config: the store's settings.
        conninfo: the conninfo of `conn`.
        refuses_settings: a pooler refused the settings of a session.
        named: the table or its schema was asked for by name, so it must exist.
        table: what pg_class has about the table.
    """

    conn: psycopg.Connection[dict[str, Any]]
    config: Config
    conninfo: str
    refuses_settings: bool = False
    named: bool = False
    table: dict[str, Any] | None = None

    def row(self, query: str, *params: Any) -> dict[str, Any]:
        """Return the first row of a query; empty without one."""
        rows = self.rows(query, *params)
        return rows[0] if rows else {}

    def rows(self, query: str, *params: Any) -> list[dict[str, Any]]:
        """Return the rows of a query. A literal percent sign is written twice."""
        return self.conn.execute(query.encode(), params).fetchall()

    @property
    def version(self) -> int:
        """The server's version, such as 180003."""
        return self.conn.info.server_version

    @property
    def name(self) -> str:
        """The table's name, quoted."""
        return self.config.table.quoted


Check: TypeAlias = Callable[[Context], "Finding | None"]
