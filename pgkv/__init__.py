"""pgkv: a key-value store on PostgreSQL, and what distributed programs build on one."""

from ._engine.schema import schema_sql
from ._observe import on_operation
from .aio import AsyncStore
from .config import Config, Pooler, RetryPolicy, TableType, TtlCleanupStrategy
from .errors import (
    ConfigError,
    ConflictError,
    InvalidKeyError,
    InvalidValueError,
    LeaseLostError,
    LockError,
    LockTimeoutError,
    NotFoundError,
    OperationTimeoutError,
    PgkvError,
    PoolTimeoutError,
    QueryError,
    RateLimitedError,
    SerializationError,
    SessionConflictError,
    SessionError,
    SessionGoneError,
    StoreUnavailableError,
    TableNotFoundError,
    TransactionError,
)
from .patterns.cache.decorator import (
    L1,
    AsyncCachedFunction,
    CachedFunction,
    CachedValue,
    CacheInfo,
    SignedPickle,
    cached,
    cached_functions,
    invalidate_tag,
)
from .patterns.defaults import configure
from .patterns.lock.api import AsyncLease, AsyncLock, Lease, Lock, LockInfo
from .patterns.lock.leader import AsyncLeader, Leader
from .patterns.lock.locked import fence_sql, locked
from .patterns.lock.semaphore import AsyncSemaphore, Semaphore
from .patterns.rate_limit.api import (
    AsyncRateLimiter,
    AsyncReservation,
    Decision,
    LimiterCounts,
    Rate,
    RateLimiter,
    Reservation,
)
from .patterns.session.api import AsyncSessionStore, Session, SessionInfo, SessionStore
from .patterns.web.asgi import RateLimitMiddleware, SessionMiddleware, load_session
from .patterns.web.client_ip import client_ip
from .patterns.web.wsgi import WSGIRateLimitMiddleware, WSGISessionMiddleware
from .pipeline import AsyncPipeline, Handle, Pipeline
from .store import Store
from .typed import AsyncTypedStore, TypedCasResult, TypedStore
from .types import CasResult, CasStatus, Entry, KeyValue, ScanOptions, Stats

__all__ = [  # noqa: RUF022  # plain order: ruff would put L1 before the classes
    "AsyncCachedFunction",
    "AsyncLeader",
    "AsyncLease",
    "AsyncLock",
    "AsyncPipeline",
    "AsyncRateLimiter",
    "AsyncReservation",
    "AsyncSemaphore",
    "AsyncSessionStore",
    "AsyncStore",
    "AsyncTypedStore",
    "CacheInfo",
    "CachedFunction",
    "CachedValue",
    "CasResult",
    "CasStatus",
    "Config",
    "ConfigError",
    "ConflictError",
    "Decision",
    "Entry",
    "Handle",
    "InvalidKeyError",
    "InvalidValueError",
    "KeyValue",
    "L1",
    "Leader",
    "Lease",
    "LeaseLostError",
    "LimiterCounts",
    "Lock",
    "LockError",
    "LockInfo",
    "LockTimeoutError",
    "NotFoundError",
    "OperationTimeoutError",
    "PgkvError",
    "Pipeline",
    "PoolTimeoutError",
    "Pooler",
    "QueryError",
    "Rate",
    "RateLimitMiddleware",
    "RateLimitedError",
    "RateLimiter",
    "Reservation",
    "RetryPolicy",
    "ScanOptions",
    "Semaphore",
    "SerializationError",
    "Session",
    "SessionConflictError",
    "SessionError",
    "SessionGoneError",
    "SessionInfo",
    "SessionMiddleware",
    "SessionStore",
    "SignedPickle",
    "Stats",
    "Store",
    "StoreUnavailableError",
    "TableNotFoundError",
    "TableType",
    "TransactionError",
    "TtlCleanupStrategy",
    "TypedCasResult",
    "TypedStore",
    "WSGIRateLimitMiddleware",
    "WSGISessionMiddleware",
    "cached",
    "cached_functions",
    "client_ip",
    "configure",
    "fence_sql",
    "invalidate_tag",
    "load_session",
    "locked",
    "on_operation",
    "schema_sql",
]
