"""`examine` connects and runs the checks.

Each check is a small function that examines one thing and returns a `Finding`, with advice. None of
them changes anything. Each runs in a transaction of its own with a time limit, so checks work behind
a pooler and on a standby, and one that fails hides no other. The connection is made in the same way
as the store's, because that is checked too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeAlias

import psycopg
from psycopg.rows import dict_row

from ..._engine import conninfo as _conninfo
from ..._engine.pooling import refuses_settings
from ..._settings import Target
from ...config import Config, Pooler
from ...errors import translate

CHECK_TIMEOUT = "5s"  # for one check
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
        return self.conn.info.server_version

    @property
    def name(self) -> str:
        return self.config.table.quoted


Check: TypeAlias = Callable[[Context], Result | None]


def examine(config: Config, *, named: bool = False) -> list[Finding]:
    """Connect and run every check that applies. With `named` the table or its schema was asked for
    by name, so it must exist."""
    with contextlib.closing(Target(config)) as target:
        where = target.conninfo()
        try:
            conn, refused = _connect(config, where)
        except psycopg.Error as error:
            failure = translate(error, action="doctor")
            raise failure from failure.__cause__
        with contextlib.closing(conn):
            context = Context(conn, config, where, refused, named)
            return list(_findings(context))


def _connect(config: Config, conninfo: str) -> tuple[psycopg.Connection[dict[str, Any]], bool]:
    """Connect as the store does; if a pooler refuses the settings, without them."""
    options: dict[str, Any] = {
        "autocommit": True,
        "prepare_threshold": None,
        "row_factory": dict_row,
    }
    try:
        return psycopg.connect(conninfo, **options), False
    except psycopg.OperationalError as error:
        if not refuses_settings(error):
            raise
    plain = replace(config, pooler=Pooler.TRANSACTION)
    return psycopg.connect(_conninfo.build(plain, config.dsn), **options), True


def _findings(context: Context) -> Iterator[Finding]:
    from . import server, table

    for name, check in server.CHECKS.items():
        yield from _made(name, check, context)
    context.facts = table.describe(context)
    there = context.facts.get("relkind") in ("r", "p")
    for name, check in (table.CHECKS if there else {"table": table.missing}).items():
        yield from _made(name, check, context)


def _made(name: str, check: Check, context: Context) -> Iterator[Finding]:
    found: Result | None
    try:
        if name == "pooler":
            found = check(context)  # it examines what happens between transactions
        else:
            with context.conn.transaction():
                context.conn.execute(f"SET LOCAL statement_timeout = '{CHECK_TIMEOUT}'")
                found = check(context)
    except psycopg.Error as error:
        if isinstance(error, psycopg.OperationalError) and context.conn.closed:
            failure = translate(error, action="doctor")
            raise failure from failure.__cause__
        why = error.diag.message_primary or type(error).__name__
        found = "warn", f"could not be checked: {why}", ""
    if found is not None:
        yield Finding(name, *found)
