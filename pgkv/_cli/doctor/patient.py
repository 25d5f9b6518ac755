"""What a check is given, and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import psycopg

from ...config import Config

Status: TypeAlias = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    Attributes:
        check: what was looked at.
        status: "ok", "warn" (works, but see to it) or "fail" (pgkv cannot do its work).
        detail: what was seen.
        advice: what to do; empty where nothing is.
    """

    check: str
    status: Status
    detail: str
    advice: str = ""


@dataclass(slots=True)
class Patient:
    """What the checks look at: a connection, the settings, and what pg_class says of the table."""

    conn: psycopg.Connection[dict[str, Any]]
    config: Config
    conninfo: str
    refuses_settings: bool = False
    table: dict[str, Any] | None = None

    def row(self, query: str, *params: Any) -> dict[str, Any]:
        """The first row of a query; empty without one."""
        rows = self.rows(query, *params)
        return rows[0] if rows else {}

    def rows(self, query: str, *params: Any) -> list[dict[str, Any]]:
        """The rows of a query. A literal percent sign is written twice."""
        return self.conn.execute(query.encode(), params).fetchall()

    @property
    def version(self) -> int:
        """The server's version, such as 180003."""
        return self.conn.info.server_version

    @property
    def name(self) -> str:
        """The table's name, quoted."""
        return self.config.table.quoted


Check: TypeAlias = Callable[[Patient], "Finding | None"]
