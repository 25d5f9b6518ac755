"""The caller's own connection: finding it inside other libraries' wrappers, and refusing one that
cannot carry our statements."""

from __future__ import annotations

import threading
from typing import Any, TypeVar

import psycopg
from psycopg import pq

from ..errors import ConfigError, TransactionError

C = TypeVar("C", bound="psycopg.Connection[Any] | psycopg.AsyncConnection[Any]")


def unwrap(conn: object, wanted: type[C], call: str = "using()") -> C:
    """Return the psycopg connection inside what the caller gave to that call.

    Knows Django's ``connection``, SQLAlchemy's ``Connection`` and ``Session`` (and the async
    ones' sync halves), where their driver is psycopg 3.

    Raises:
        ConfigError: it holds no such connection; says what it is.
        TransactionError: it is closed.
    """
    inner = conn
    if hasattr(inner, "ensure_connection"):  # Django: opened at first use
        inner.ensure_connection()
        inner = inner.connection  # type: ignore[attr-defined]  # Django's wrapper has it
    elif not isinstance(inner, psycopg.Connection | psycopg.AsyncConnection):
        if hasattr(inner, "sync_connection"):  # SQLAlchemy: AsyncConnection
            inner = inner.sync_connection
        elif hasattr(inner, "sync_session"):  # SQLAlchemy: AsyncSession
            inner = inner.sync_session
        if hasattr(inner, "get_bind") and hasattr(inner, "connection"):  # SQLAlchemy: Session
            inner = inner.connection()
        inner = getattr(inner, "connection", inner)
        inner = getattr(inner, "driver_connection", inner)
        inner = getattr(inner, "_connection", inner)  # SQLAlchemy's own async adapter
    if isinstance(inner, wanted):
        if inner.closed:
            raise TransactionError(f"the connection given to {call} is closed")
        return inner
    module = type(inner).__module__.partition(".")[0]
    name = "" if module == "builtins" else f"{module}."
    name += type(inner).__qualname__
    if isinstance(inner, psycopg.Connection | psycopg.AsyncConnection):
        other = "an AsyncStore" if wanted is psycopg.Connection else "a Store"
        raise ConfigError(f"{call} got a {name}; that is for {other} and what is made with one")
    raise ConfigError(
        f"{call} needs a psycopg 3 connection, not {name}"
        + ("" if inner is conn else "; switch that engine to the psycopg 3 driver")
    )


def check_connection(
    conn: psycopg.Connection[Any] | psycopg.AsyncConnection[Any], action: str
) -> None:
    """Refuse a connection on which a statement of ours could not run.

    Raises:
        TransactionError: it is closed, in pipeline mode, or its transaction has failed.
        ConfigError: its client encoding is not UTF-8.
    """
    pgconn = conn.pgconn
    if conn.closed:
        raise TransactionError(f"{action}: the connection given to using() is closed")
    if pgconn.pipeline_status != pq.PipelineStatus.OFF:
        raise TransactionError(f"{action}: the connection given to using() is in pipeline mode")
    if pgconn.transaction_status == pq.TransactionStatus.INERROR:
        raise TransactionError(
            f"{action}: the transaction of the connection given to using() has failed; "
            "roll it back first"
        )
    encoding = pgconn.parameter_status(b"client_encoding")
    if encoding not in (b"UTF8", b"UNICODE"):
        raise ConfigError(
            "using() needs a connection with client_encoding UTF8, not "
            f"{(encoding or b'unknown').decode()}"
        )


def check_inside(conn: psycopg.Connection[Any] | psycopg.AsyncConnection[Any], action: str) -> None:
    """Refuse a connection that is not in a transaction, and will not open one."""
    if conn.autocommit and conn.pgconn.transaction_status == pq.TransactionStatus.IDLE:
        raise TransactionError(
            f"{action} needs a transaction: the connection is in autocommit; write "
            "`with conn.transaction():` around it"
        )


class Reentrant:
    """A lock that its holder may take again, around one that does not allow it (psycopg's)."""

    def __init__(self, lock: threading.Lock) -> None:
        self._inner = lock
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        me = threading.get_ident()
        if self._owner != me:
            self._inner.acquire()
            self._owner = me
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None
            self._inner.release()
