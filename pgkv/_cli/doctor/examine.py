"""`examine` connects and runs the checks.

Each check is a small function that examines one thing and returns a `Finding`, with advice. None of
them changes anything. Each runs in a transaction of its own with a time limit, so checks work behind
a pooler and on a standby, and one that fails hides no other. The connection is made in the same way
as the store's, because that is checked too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import psycopg
from psycopg.rows import dict_row

from ..._engine import conninfo as _conninfo
from ..._settings import Target
from ...config import Config, Pooler
from ...errors import translate
from . import server, table
from .context import Check, Context, Finding

CHECK_TIMEOUT = "5s"  # for one check


def examine(config: Config, *, named: bool = False) -> list[Finding]:
    """Connect and run every check that applies.

    Args:
        config: the store's settings.
        named: the table or its schema was asked for by name, so it must exist.

    Raises:
        StoreUnavailableError: there is no connection.
    """
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
        if "startup parameter" not in str(error):
            raise
    plain = replace(config, pooler=Pooler.TRANSACTION)
    return psycopg.connect(_conninfo.build(plain, config.dsn), **options), True


def _findings(context: Context) -> Iterator[Finding]:
    for check in server.CHECKS:
        yield from _made(check, context)
    context.table = table.describe(context)
    if context.table is None or context.table["relkind"] not in ("r", "p"):
        yield from _made(table.missing, context)
        return
    for check in table.CHECKS:
        yield from _made(check, context)


def _made(check: Check, context: Context) -> Iterator[Finding]:
    found: Finding | None
    try:
        if check is server.pooler:
            found = check(context)  # it examines what happens between transactions
        else:
            with context.conn.transaction():
                context.conn.execute(f"SET LOCAL statement_timeout = '{CHECK_TIMEOUT}'")
                found = check(context)
    except psycopg.OperationalError as error:
        if context.conn.closed:
            failure = translate(error, action="doctor")
            raise failure from failure.__cause__
        yield _unknown(check, error)
    except psycopg.Error as error:
        yield _unknown(check, error)
    else:
        if found is not None:
            yield found


def _unknown(check: Check, error: psycopg.Error) -> Finding:
    why = error.diag.message_primary or type(error).__name__
    return Finding(check.__name__.replace("_", " "), "warn", f"could not be checked: {why}")
