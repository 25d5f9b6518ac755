"""What the pools of both colours have in common: their patience, and what their callers hear when
there is no connection. Who gets which connection is `_pool`'s and `_aio_pool`'s.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

import psycopg
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from ..config import Config
from ..errors import (
    OperationTimeoutError,
    PgkvError,
    PoolTimeoutError,
    StoreUnavailableError,
    translate,
)

KEEP_TIME = 60.0  # seconds
POOL_NAME = "pgkv-"
# How long to listen for a new connection before asking whether the attempt has failed: the pool
# hides the reason behind its timeout.
OPENING_NAP = 0.05
FIRST_NAP = 0.001  # seconds between two looks whether a new pool has its first connection
# How long closing waits for the pool's threads: one may be connecting to a server that is silent.
CLOSE_TIMEOUT = 0.5


def closed(action: str) -> StoreUnavailableError:
    """What an operation hears after close()."""
    error = StoreUnavailableError(f"{action}: the store is closed")
    error.retryable = False
    return error


def busy(config: Config, action: str, *, by_pool: bool) -> PgkvError:
    """What a caller hears who waited in vain: for pool_timeout, or until its own deadline."""
    size = config.pool_max_size
    if by_pool:
        return PoolTimeoutError(
            f"{action}: all {size} connections stayed busy for {config.pool_timeout:g} s; raise "
            "pool_max_size, or look for transactions that stay open"
        )
    error = OperationTimeoutError(
        f"{action}: the time for the whole call passed while all {size} connections were busy; "
        "nothing was sent"
    )
    error.outcome_unknown = False
    return error


def no_connection(config: Config, action: str, seconds: float) -> StoreUnavailableError:
    """What a caller hears when connecting neither succeeds nor fails: for connect_timeout, or until
    its own deadline."""
    by_connecting = seconds > 0.95 * config.connect_timeout  # some of it may have passed before
    limit = "connect_timeout" if by_connecting else "the time for the call"
    return StoreUnavailableError(
        f"{action}: no connection to PostgreSQL within {seconds:.3g} s ({limit})"
    )


def still_opening(
    pool: ConnectionPool[Any] | AsyncConnectionPool[Any],
    failures: deque[tuple[float, psycopg.Error]],
) -> bool:
    """Whether a pool just opened has neither made its first connection nor failed to."""
    return bool(pool.min_size) and not failures and not pool.get_stats()["pool_available"]


def unreachable(error: psycopg.Error, action: str) -> PgkvError:
    """What a caller hears when connecting fails, with the reason."""
    failure = translate(error, action=action)
    if "startup parameter" in str(error):
        return StoreUnavailableError(
            f"{failure}; a pooler in front of PostgreSQL refuses session settings: "
            "set pooler=pgkv.Pooler.TRANSACTION"
        )
    return failure


class OwnConnection:
    """Marks the connections that pgkv opened for itself."""


class _AlreadyTold(logging.Filter):
    """Drops what psycopg_pool would say of pgkv's own pools: that a connection was returned
    closed (pgkv closed it) or could not be made (the caller gets that as an exception)."""

    def filter(self, record: logging.LogRecord) -> bool:
        subject = record.args[0] if isinstance(record.args, tuple) and record.args else None
        return not isinstance(subject, OwnConnection) and not str(subject).startswith(POOL_NAME)


logging.getLogger("psycopg.pool").addFilter(_AlreadyTold())
