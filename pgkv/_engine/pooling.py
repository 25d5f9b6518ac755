"""What the sync and the async pool have in common: their times, and the errors that callers get when
there is no connection.
"""

from __future__ import annotations

import contextlib
import logging
import re
import weakref
from collections import deque
from collections.abc import Iterator
from time import monotonic
from typing import Any

import psycopg
import psycopg_pool

from .. import _observe
from ..config import Config, Pooler
from ..errors import (
    OperationTimeoutError,
    PgkvError,
    PoolTimeoutError,
    StoreUnavailableError,
    translate,
)
from . import conninfo as _conninfo

KEEP_TIME = 60.0  # seconds
POOL_NAME = "pgkv-"
LOOK_AGAIN = 0.25  # seconds; a waiter whose wake-up was lost finds out by itself
PATIENCE = 0.002  # seconds; a thread that waits longer is given a connection, and need not be fast
SEARCH_AFTER = 1.0  # seconds; longer waits look for connections that an interrupt lost
SEARCH_AGAIN = 10.0  # seconds between two searches
GROW_AGAIN = 1.0  # seconds after a failure to connect, while the other connections work
# How long to listen for a new connection before asking whether the attempt has failed: the pool
# hides the reason behind its timeout.
OPENING_NAP = 0.05
FIRST_NAP = 0.001  # seconds between two looks whether a new pool has its first connection
# How long closing waits for the pool's threads: one may be connecting to a server that is silent.
CLOSE_TIMEOUT = 0.5


class Attempts:
    """What psycopg_pool does not tell of the connections that it makes.

    Attributes:
        running: attempts under way.
        made: connections, as long as they exist.
        failures: the last failure, with its time; a deque of one is replaced atomically.
    """

    def __init__(self) -> None:
        self.running: set[object] = set()
        self.made: weakref.WeakSet[Any] = weakref.WeakSet()
        self.failures: deque[tuple[float, psycopg.Error]] = deque(maxlen=1)

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        token = object()
        self.running.add(token)
        started = monotonic()
        try:
            yield
            _observe.event("pgkv.pool.opened", seconds=monotonic() - started)
        except psycopg.Error as error:
            self.failures.append((monotonic(), error))
            _observe.event("pgkv.pool.failed", error=type(error).__name__)
            raise
        finally:
            self.running.discard(token)

    def have_leaked(self, pool: psycopg_pool.ConnectionPool[Any]) -> bool:
        """Whether the pool counts connections that neither exist nor are being made."""
        return not self.running and pool.get_stats()["pool_size"] > len(self.made)


class PoolPlace:
    """One of ``pool_max_size`` places: of a connection, or of an attempt to open one."""

    __slots__ = ("__weakref__", "connected")

    def __init__(self) -> None:
        self.connected: bool = False


def finish_returned(pool: Any) -> None:
    """Close what a psycopg_pool that is closed will not take back.

    It may hand a connection to a caller in the moment in which that caller's wait times out. A task
    for its workers returns the connection, and a closed pool has no workers.
    """
    if pool.closed:
        name = "queue" if hasattr(pool._tasks, "queue") else "_queue"  # for threads, for asyncio
        for task in tuple(getattr(pool._tasks, name)):
            if (conn := getattr(task, "conn", None)) is not None:
                conn.pgconn.finish()


def closed(action: str) -> StoreUnavailableError:
    """The error of an operation after close()."""
    error = StoreUnavailableError(f"{action}: the store is closed")
    error.retryable = False
    return error


def busy(config: Config, action: str, *, by_pool: bool) -> PgkvError:
    """The error after waiting for a busy pool: for pool_timeout, or until the call's own deadline."""
    size = config.pool_max_size
    _observe.event("pgkv.pool.timeout", operation=action)
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
    """The error when connecting neither succeeds nor fails: for connect_timeout, or until the call's
    own deadline."""
    limit = "the time for the call"
    seconds = max(0.0, round(seconds, 3))  # some of it may have passed before, or all
    if seconds > 0.95 * config.connect_timeout:
        seconds, limit = config.connect_timeout, "connect_timeout"
    return StoreUnavailableError(
        f"{action}: no connection to PostgreSQL within {seconds:g} s ({limit})"
    )


class OverCallerPool:
    """The caller's own psycopg_pool: one checkout per operation, nothing kept between, never closed
    or reconfigured. It has the interface of a store's own pool, with a stack that stays empty.

    Args:
        pool: open, and the caller's.
        config: whether statements may be prepared.
    """

    def __init__(self, pool: Any, config: Config) -> None:
        self._config = config
        self._caller_pool = pool
        self._prepares = config.pooler is Pooler.NONE
        self.idle: deque[Any] = deque()
        # What is prepared where: it dies with the connection.
        self._prepared: weakref.WeakKeyDictionary[Any, set[bytes]] = weakref.WeakKeyDictionary()

    def is_exhausted(self) -> bool:
        stats = self._caller_pool.get_stats()
        return not stats.get("pool_available") and stats["pool_size"] >= stats["pool_max"]

    def counts(self) -> tuple[int, int, int, int]:
        found = self._caller_pool.get_stats()
        names = ("pool_size", "pool_available", "requests_waiting", "pool_max")
        size, idle, waiting, most = (found.get(name, 0) for name in names)
        return size, idle, waiting, most

    def conninfo(self) -> str:
        """What reaches the same database without the caller's pool."""
        return _conninfo.build(self._config, self._config.dsn)


def pool_options(owner: object, config: Config, connection_class: type[Any]) -> dict[str, Any]:
    """What a store's psycopg_pool is made with, but for the conninfo."""
    return {
        "connection_class": connection_class,
        "kwargs": {"autocommit": True, "prepare_threshold": None},
        "min_size": config.pool_min_size,
        "max_size": config.pool_max_size,
        "timeout": config.pool_timeout,
        # Each operation that needs a connection tries at once; back-off is the retry policy's.
        "reconnect_timeout": 0.0,
        "name": f"{POOL_NAME}{id(owner):x}",
    }


def still_opening(
    pool: psycopg_pool.ConnectionPool[Any] | psycopg_pool.AsyncConnectionPool[Any],
    attempts: Attempts,
) -> bool:
    """Whether a pool just opened has neither made its first connection, nor failed to, nor been closed."""
    if not pool.min_size or pool.closed or attempts.failures:
        return False
    return not pool.get_stats()["pool_available"]


def unreachable(error: psycopg.Error, action: str) -> PgkvError:
    """The error when connecting fails, with the reason."""
    failure = translate(error, action=action)
    # libpq tells no SQLSTATE of a refused connection: the text has to do, where it is English.
    if _HOPELESS.search(str(error)):
        failure.retryable = False
    if refuses_settings(error):
        return StoreUnavailableError(
            f"{failure}; a pooler in front of PostgreSQL refuses session settings: "
            "set pooler=pgkv.Pooler.TRANSACTION"
        )
    return failure


def refuses_settings(error: psycopg.Error) -> bool:
    """Whether a pooler refused the session settings of a new connection. RDS Proxy calls them
    command-line options."""
    return re.search("startup parameter|command-line options", str(error)) is not None


_HOPELESS = re.compile(
    r'authentication failed|no password supplied|role ".*" does not exist|not permitted to log in'
    r'|database ".*" does not exist|no pg_hba\.conf entry|permission denied for database'
)


class OwnConnection:
    """Marks the connections that pgkv opened for itself."""


class _AlreadyTold(logging.Filter):
    """Drops what psycopg_pool would say of pgkv's own pools: that a connection was returned
    closed (pgkv closed it) or could not be made (the caller gets that as an exception)."""

    def filter(self, record: logging.LogRecord) -> bool:
        subject = record.args[0] if isinstance(record.args, tuple) and record.args else None
        return not isinstance(subject, OwnConnection) and not str(subject).startswith(POOL_NAME)


logging.getLogger("psycopg.pool").addFilter(_AlreadyTold())
