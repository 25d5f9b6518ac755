"""guard(): the caller's transaction excludes every other holder until it ends.

It locks the lease's row FOR KEY SHARE in that transaction. UNIQUE (key, version) makes a renewal
pass and a takeover, which changes the version, wait.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
from psycopg import pq

from ..._ops.op import Flow, Op, call
from ...errors import PgkvError, TableNotFoundError, TransactionError
from .flows import Port, perform
from .lease import Hold
from .sql import Place


def check_guarded(conn: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> None:
    """Refuse a connection on which a guard would protect nothing.

    Raises:
        TransactionError: it is in autocommit and no transaction is open.
    """
    idle = conn.pgconn.transaction_status == pq.TransactionStatus.IDLE
    if conn.autocommit and idle:
        raise TransactionError(
            "guard() needs an open transaction: in autocommit it would end with its own "
            "statement; write `with conn.transaction(): lease.guard(conn); ...`"
        )


def guard(
    port: Port[Any],
    hold: Hold,
    theirs: Callable[[Op[Any]], Any],
    max_hold: float | None,
) -> Flow[None]:
    """Protect the caller's transaction.

    Args:
        port: over the store's own connections.
        hold: the lease.
        theirs: performs an operation in the caller's transaction.
        max_hold: seconds.
    """
    hold.check()
    terms = hold._terms
    if terms.place is None:
        terms.place = yield from perform(port, terms.sql.place(), None)
    place = terms.place
    if place is None:
        hold._lose("gone")
        raise hold._lost_error()
    op = terms.sql.guard(place.quoted, hold._key, hold._token, max_hold)
    try:
        found = yield from call(theirs, op)
    except TableNotFoundError as error:
        raise TransactionError(_elsewhere(place)) from error
    except PgkvError as error:
        if error._sqlstate == "40001":
            hold._lose("replaced")
            raise hold._lost_error() from error
        if error._sqlstate == "25006":
            raise TransactionError(
                "guard() needs a transaction that may write: a read-only one cannot lock the lease"
            ) from error
        raise
    if not found:
        yield from _explain(port, hold, theirs, place)


def _explain(
    port: Port[Any], hold: Hold, theirs: Callable[[Op[Any]], Any], place: Place
) -> Flow[None]:
    """Why the guard saw no such lease."""
    sql = hold._terms.sql
    there = yield from call(theirs, sql.place(place.quoted))
    here = yield from perform(port, sql.place(place.quoted), None)
    if there is None or (here is not None and there.identity != here.identity):
        raise TransactionError(_elsewhere(place))
    level = yield from call(theirs, sql.isolation())
    if level != "read committed":
        rows = yield from perform(port, sql.holder(hold._key), None)
        if rows and rows[0].token == hold._token:
            raise TransactionError(
                f"the lease on {hold.name!r} is held, but this {level} transaction's snapshot is "
                "older than its last renewal: call guard() first in the transaction"
            )
    hold._lose("replaced" if here is not None else "gone")
    raise hold._lost_error()


def _elsewhere(place: Place) -> str:
    return (
        f"guard() got a connection to another database than the lock's: {place.quoted} there is not "
        "the same table; guard with a connection to the database that the store uses"
    )
