"""The input and the result of a check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import psycopg

from ...config import Config

Status: TypeAlias = Literal["ok", "warn", "fail"]
Result: TypeAlias = tuple[Status, str, str]  # status, detail, advice


class Finding(NamedTuple):
    """The result of one check, by its name. "warn" works, but needs attention; with "fail" pgkv
    cannot work. `advice` says how to fix it; it is empty if there is nothing to fix."""

    check: str
    status: Status
    detail: str
    advice: str = ""


def ok(detail: str) -> Result:
    return "ok", detail, ""


def warn(detail: str, advice: str) -> Result:
    return "warn", detail, advice


def fail(detail: str, advice: str) -> Result:
    return "fail", detail, advice


@dataclass(slots=True)
class Context:
    """The input of the checks."""

    conn: psycopg.Connection[dict[str, Any]]
    config: Config
    conninfo: str  # of `conn`
    refuses_settings: bool = False  # a pooler refused the settings of a session
    named: bool = False  # the table or its schema was asked for by name, so it must exist
    facts: dict[str, Any] = field(default_factory=dict)  # what the server has about the table

    def row(self, query: str, *params: Any) -> dict[str, Any]:
        """Return the first row of a query; empty without one."""
        return next(iter(self.rows(query, *params)), {})

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


Check: TypeAlias = Callable[[Context], Result | None]
