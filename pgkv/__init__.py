"""pgkv: a key-value store on PostgreSQL, and what distributed programs build on one."""

from ._observe import on_operation
from ._schema import schema_sql
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
from .patterns.client_ip import client_ip
from .patterns.leader import AsyncLeader, Leader
from .patterns.lock import AsyncLease, AsyncLock, Lease, Lock, LockInfo
from .patterns.locked import fence_sql, locked
from .patterns.middleware.asgi import RateLimitMiddleware
from .patterns.middleware.wsgi import WSGIRateLimitMiddleware
from .patterns.rate_limit import (
    AsyncRateLimiter,
    AsyncReservation,
    Decision,
    LimiterCounts,
    Rate,
    RateLimiter,
    Reservation,
)
from .patterns.semaphore import AsyncSemaphore, Semaphore
from .pipeline import AsyncPipeline, Handle, Pipeline
from .store import Store
from .typed import AsyncTypedStore, TypedCasResult, TypedStore
from .types import CasResult, CasStatus, Entry, KeyValue, ScanOptions, Stats

__all__ = [
    "AsyncLeader",
    "AsyncLease",
    "AsyncLock",
    "AsyncPipeline",
    "AsyncRateLimiter",
    "AsyncReservation",
    "AsyncSemaphore",
    "AsyncStore",
    "AsyncTypedStore",
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
    "SessionConflictError",
    "SessionError",
    "SessionGoneError",
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
    "client_ip",
    "fence_sql",
    "locked",
    "on_operation",
    "schema_sql",
]
