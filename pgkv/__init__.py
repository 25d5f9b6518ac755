"""pgkv: a key-value store on PostgreSQL, and what distributed programs build on one.

Each name is loaded, with its module, when it is first used: a program that needs a `Store` does not
pay for what it does not use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from ._observe import OperationEvent, StateEvent, on_event, on_operation
    from ._shards.placement import Shard
    from ._shards.store import AsyncShardedStore, ShardedStore
    from ._watch.api import AsyncWatch, Event, Watch, watch_sql
    from .aio import AsyncStore
    from .config import Config, Pooler, RetryPolicy, TableType, TtlCleanupStrategy
    from .errors import (
        ConfigError,
        ConflictError,
        DecodingError,
        IdempotencyError,
        InProgressError,
        InvalidKeyError,
        InvalidValueError,
        KeyReusedError,
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
    from .patterns.cache.decorator import cached, invalidate_tag
    from .patterns.cache.envelope import SignedPickle
    from .patterns.cache.function import (
        AsyncCachedFunction,
        CachedFunction,
        CachedValue,
        CacheInfo,
        cached_functions,
    )
    from .patterns.cache.l1 import L1
    from .patterns.defaults import configure
    from .patterns.idempotency.api import (
        AsyncAttempt,
        AsyncIdempotency,
        Attempt,
        Idempotency,
        IdempotencyRecord,
        idempotent,
    )
    from .patterns.lock.api import AsyncLease, AsyncLock, AsyncSemaphore, Lease, Lock, Semaphore
    from .patterns.lock.leader import AsyncLeader, Leader
    from .patterns.lock.locked import fence_sql, locked
    from .patterns.lock.many import AsyncLeases, Leases
    from .patterns.lock.sql import LockInfo
    from .patterns.queue.api import AsyncJob, AsyncQueue, Job, Queue
    from .patterns.queue.flows import Backoff, Bury, Later, Put
    from .patterns.queue.sql import JobInfo, QueueStats
    from .patterns.queue.worker import AsyncWorker, Worker
    from .patterns.rate_limit.api import (
        AsyncRateLimiter,
        AsyncReservation,
        RateLimiter,
        Reservation,
    )
    from .patterns.rate_limit.local import LimiterCounts
    from .patterns.rate_limit.policy import Decision
    from .patterns.rate_limit.rate import Quota, Rate
    from .patterns.schema import schema_sql
    from .patterns.session.api import AsyncSessionStore, SessionStore
    from .patterns.session.data import Session, SessionInfo
    from .patterns.web.asgi import RateLimitMiddleware, SessionMiddleware, load_session
    from .patterns.web.client_ip import client_ip
    from .patterns.web.idempotency import (
        IdempotencyMiddleware,
        WSGIIdempotencyMiddleware,
        idempotent_attempt,
    )
    from .patterns.web.wsgi import WSGIRateLimitMiddleware, WSGISessionMiddleware
    from .pipeline import AsyncPipeline, Handle, Pipeline
    from .store import Store
    from .transforms import AesGcmSiv, Lz4, Zstd
    from .typed import AsyncTypedStore, TypedStore
    from .types import (
        CasResult,
        CasStatus,
        Entry,
        IncrementResult,
        KeyValue,
        PoolStats,
        ScanOptions,
        Stats,
        TypedCasResult,
    )

__all__ = [  # noqa: RUF022  # plain order: ruff would put L1 before the classes
    "AesGcmSiv",
    "AsyncAttempt",
    "AsyncCachedFunction",
    "AsyncIdempotency",
    "AsyncJob",
    "AsyncLeader",
    "AsyncLease",
    "AsyncLeases",
    "AsyncLock",
    "AsyncPipeline",
    "AsyncQueue",
    "AsyncRateLimiter",
    "AsyncReservation",
    "AsyncSemaphore",
    "AsyncSessionStore",
    "AsyncShardedStore",
    "AsyncStore",
    "AsyncTypedStore",
    "AsyncWatch",
    "AsyncWorker",
    "Attempt",
    "Backoff",
    "Bury",
    "CacheInfo",
    "CachedFunction",
    "CachedValue",
    "CasResult",
    "CasStatus",
    "Config",
    "ConfigError",
    "ConflictError",
    "Decision",
    "DecodingError",
    "Entry",
    "Event",
    "Handle",
    "Idempotency",
    "IdempotencyError",
    "IdempotencyMiddleware",
    "IdempotencyRecord",
    "InProgressError",
    "IncrementResult",
    "InvalidKeyError",
    "InvalidValueError",
    "Job",
    "JobInfo",
    "KeyReusedError",
    "KeyValue",
    "L1",
    "Later",
    "Leader",
    "Lease",
    "LeaseLostError",
    "Leases",
    "LimiterCounts",
    "Lock",
    "LockError",
    "LockInfo",
    "LockTimeoutError",
    "Lz4",
    "NotFoundError",
    "OperationEvent",
    "OperationTimeoutError",
    "PgkvError",
    "Pipeline",
    "PoolStats",
    "PoolTimeoutError",
    "Pooler",
    "Put",
    "QueryError",
    "Queue",
    "QueueStats",
    "Quota",
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
    "Shard",
    "ShardedStore",
    "SignedPickle",
    "StateEvent",
    "Stats",
    "Store",
    "StoreUnavailableError",
    "TableNotFoundError",
    "TableType",
    "TransactionError",
    "TtlCleanupStrategy",
    "TypedCasResult",
    "TypedStore",
    "WSGIIdempotencyMiddleware",
    "WSGIRateLimitMiddleware",
    "WSGISessionMiddleware",
    "Watch",
    "Worker",
    "Zstd",
    "cached",
    "cached_functions",
    "client_ip",
    "configure",
    "fence_sql",
    "idempotent",
    "idempotent_attempt",
    "invalidate_tag",
    "load_session",
    "locked",
    "on_event",
    "on_operation",
    "schema_sql",
    "watch_sql",
]

# The modules of the names above, as type checkers read them from the imports.
_NAMES_OF = {
    "._observe": "OperationEvent StateEvent on_event on_operation",
    "._shards.placement": "Shard",
    "._shards.store": "AsyncShardedStore ShardedStore",
    "._watch.api": "AsyncWatch Event Watch watch_sql",
    ".aio": "AsyncStore",
    ".config": "Config Pooler RetryPolicy TableType TtlCleanupStrategy",
    ".errors": "ConfigError ConflictError DecodingError IdempotencyError InProgressError InvalidKeyError InvalidValueError KeyReusedError LeaseLostError LockError LockTimeoutError NotFoundError OperationTimeoutError PgkvError PoolTimeoutError QueryError RateLimitedError SerializationError SessionConflictError SessionError SessionGoneError StoreUnavailableError TableNotFoundError TransactionError",
    ".patterns.cache.decorator": "cached invalidate_tag",
    ".patterns.cache.envelope": "SignedPickle",
    ".patterns.cache.function": "AsyncCachedFunction CachedFunction CachedValue CacheInfo cached_functions",
    ".patterns.cache.l1": "L1",
    ".patterns.defaults": "configure",
    ".patterns.idempotency.api": "AsyncAttempt AsyncIdempotency Attempt Idempotency IdempotencyRecord idempotent",
    ".patterns.lock.api": "AsyncLease AsyncLock AsyncSemaphore Lease Lock Semaphore",
    ".patterns.lock.leader": "AsyncLeader Leader",
    ".patterns.lock.locked": "fence_sql locked",
    ".patterns.lock.many": "AsyncLeases Leases",
    ".patterns.lock.sql": "LockInfo",
    ".patterns.queue.api": "AsyncJob AsyncQueue Job Queue",
    ".patterns.queue.flows": "Backoff Bury Later Put",
    ".patterns.queue.sql": "JobInfo QueueStats",
    ".patterns.queue.worker": "AsyncWorker Worker",
    ".patterns.rate_limit.api": "AsyncRateLimiter AsyncReservation RateLimiter Reservation",
    ".patterns.rate_limit.local": "LimiterCounts",
    ".patterns.rate_limit.policy": "Decision",
    ".patterns.rate_limit.rate": "Quota Rate",
    ".patterns.schema": "schema_sql",
    ".patterns.session.api": "AsyncSessionStore SessionStore",
    ".patterns.session.data": "Session SessionInfo",
    ".patterns.web.asgi": "RateLimitMiddleware SessionMiddleware load_session",
    ".patterns.web.client_ip": "client_ip",
    ".patterns.web.idempotency": "IdempotencyMiddleware WSGIIdempotencyMiddleware idempotent_attempt",
    ".patterns.web.wsgi": "WSGIRateLimitMiddleware WSGISessionMiddleware",
    ".pipeline": "AsyncPipeline Handle Pipeline",
    ".store": "Store",
    ".transforms": "AesGcmSiv Lz4 Zstd",
    ".typed": "AsyncTypedStore TypedStore",
    ".types": "CasResult CasStatus Entry IncrementResult KeyValue PoolStats ScanOptions Stats TypedCasResult",
}
_MODULE_OF = {name: module for module, names in _NAMES_OF.items() for name in names.split()}
_MODULES = (
    "aio",
    "config",
    "embedded",
    "errors",
    "patterns",
    "pipeline",
    "store",
    "transforms",
    "typed",
    "types",
)

if not TYPE_CHECKING:  # or checkers would take any name for one of pgkv's

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return import_module(f".{name}", __name__)
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = globals()[name] = getattr(import_module(_MODULE_OF[name], __name__), name)
        return found

    def __dir__() -> list[str]:
        return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
