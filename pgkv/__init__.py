"""pgkv: a key-value store on PostgreSQL, and what distributed programs build on one.

Each name is loaded, with its module, when it is first used: a program that needs a `Store` does not
pay for what it does not use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from ._observe import OperationEvent as OperationEvent
    from ._observe import StateEvent as StateEvent
    from ._observe import on_event as on_event
    from ._observe import on_operation as on_operation
    from ._shards.placement import Shard as Shard
    from ._shards.store import AsyncShardedStore as AsyncShardedStore
    from ._shards.store import ShardedStore as ShardedStore
    from ._watch.api import AsyncWatch as AsyncWatch
    from ._watch.api import Event as Event
    from ._watch.api import Watch as Watch
    from ._watch.api import watch_sql as watch_sql
    from .aio import AsyncStore as AsyncStore
    from .config import Config as Config
    from .config import Pooler as Pooler
    from .config import RetryPolicy as RetryPolicy
    from .config import TableType as TableType
    from .config import TtlCleanupStrategy as TtlCleanupStrategy
    from .errors import ConfigError as ConfigError
    from .errors import ConflictError as ConflictError
    from .errors import DecodingError as DecodingError
    from .errors import IdempotencyError as IdempotencyError
    from .errors import InProgressError as InProgressError
    from .errors import InvalidKeyError as InvalidKeyError
    from .errors import InvalidValueError as InvalidValueError
    from .errors import KeyReusedError as KeyReusedError
    from .errors import LeaseLostError as LeaseLostError
    from .errors import LockError as LockError
    from .errors import LockTimeoutError as LockTimeoutError
    from .errors import NotFoundError as NotFoundError
    from .errors import OperationTimeoutError as OperationTimeoutError
    from .errors import PgkvError as PgkvError
    from .errors import PoolTimeoutError as PoolTimeoutError
    from .errors import QueryError as QueryError
    from .errors import RateLimitedError as RateLimitedError
    from .errors import SerializationError as SerializationError
    from .errors import SessionConflictError as SessionConflictError
    from .errors import SessionError as SessionError
    from .errors import SessionGoneError as SessionGoneError
    from .errors import StoreUnavailableError as StoreUnavailableError
    from .errors import TableNotFoundError as TableNotFoundError
    from .errors import TransactionError as TransactionError
    from .patterns.cache.decorator import cached as cached
    from .patterns.cache.decorator import invalidate_tag as invalidate_tag
    from .patterns.cache.envelope import SignedPickle as SignedPickle
    from .patterns.cache.function import AsyncCachedFunction as AsyncCachedFunction
    from .patterns.cache.function import CachedFunction as CachedFunction
    from .patterns.cache.function import CachedValue as CachedValue
    from .patterns.cache.function import CacheInfo as CacheInfo
    from .patterns.cache.function import cached_functions as cached_functions
    from .patterns.cache.l1 import L1 as L1
    from .patterns.defaults import configure as configure
    from .patterns.idempotency.api import AsyncAttempt as AsyncAttempt
    from .patterns.idempotency.api import AsyncIdempotency as AsyncIdempotency
    from .patterns.idempotency.api import Attempt as Attempt
    from .patterns.idempotency.api import Idempotency as Idempotency
    from .patterns.idempotency.api import IdempotencyRecord as IdempotencyRecord
    from .patterns.idempotency.api import idempotent as idempotent
    from .patterns.lock.api import AsyncLease as AsyncLease
    from .patterns.lock.api import AsyncLock as AsyncLock
    from .patterns.lock.api import AsyncSemaphore as AsyncSemaphore
    from .patterns.lock.api import Lease as Lease
    from .patterns.lock.api import Lock as Lock
    from .patterns.lock.api import Semaphore as Semaphore
    from .patterns.lock.leader import AsyncLeader as AsyncLeader
    from .patterns.lock.leader import Leader as Leader
    from .patterns.lock.locked import fence_sql as fence_sql
    from .patterns.lock.locked import locked as locked
    from .patterns.lock.many import AsyncLeases as AsyncLeases
    from .patterns.lock.many import Leases as Leases
    from .patterns.lock.sql import LockInfo as LockInfo
    from .patterns.queue.api import AsyncJob as AsyncJob
    from .patterns.queue.api import AsyncQueue as AsyncQueue
    from .patterns.queue.api import Job as Job
    from .patterns.queue.api import Queue as Queue
    from .patterns.queue.flows import Backoff as Backoff
    from .patterns.queue.flows import Bury as Bury
    from .patterns.queue.flows import Later as Later
    from .patterns.queue.flows import Put as Put
    from .patterns.queue.sql import JobInfo as JobInfo
    from .patterns.queue.sql import QueueStats as QueueStats
    from .patterns.queue.worker import AsyncWorker as AsyncWorker
    from .patterns.queue.worker import Worker as Worker
    from .patterns.rate_limit.api import AsyncRateLimiter as AsyncRateLimiter
    from .patterns.rate_limit.api import AsyncReservation as AsyncReservation
    from .patterns.rate_limit.api import RateLimiter as RateLimiter
    from .patterns.rate_limit.api import Reservation as Reservation
    from .patterns.rate_limit.local import LimiterCounts as LimiterCounts
    from .patterns.rate_limit.policy import Decision as Decision
    from .patterns.rate_limit.rate import Quota as Quota
    from .patterns.rate_limit.rate import Rate as Rate
    from .patterns.schema import schema_sql as schema_sql
    from .patterns.session.api import AsyncSessionStore as AsyncSessionStore
    from .patterns.session.api import SessionStore as SessionStore
    from .patterns.session.data import Session as Session
    from .patterns.session.data import SessionInfo as SessionInfo
    from .patterns.web.asgi import RateLimitMiddleware as RateLimitMiddleware
    from .patterns.web.asgi import SessionMiddleware as SessionMiddleware
    from .patterns.web.asgi import load_session as load_session
    from .patterns.web.client_ip import client_ip as client_ip
    from .patterns.web.idempotency import IdempotencyMiddleware as IdempotencyMiddleware
    from .patterns.web.idempotency import WSGIIdempotencyMiddleware as WSGIIdempotencyMiddleware
    from .patterns.web.idempotency import idempotent_attempt as idempotent_attempt
    from .patterns.web.wsgi import WSGIRateLimitMiddleware as WSGIRateLimitMiddleware
    from .patterns.web.wsgi import WSGISessionMiddleware as WSGISessionMiddleware
    from .pipeline import AsyncPipeline as AsyncPipeline
    from .pipeline import Handle as Handle
    from .pipeline import Pipeline as Pipeline
    from .store import Store as Store
    from .transforms import AesGcmSiv as AesGcmSiv
    from .transforms import Lz4 as Lz4
    from .transforms import Zstd as Zstd
    from .typed import AsyncTypedStore as AsyncTypedStore
    from .typed import TypedStore as TypedStore
    from .types import CasResult as CasResult
    from .types import CasStatus as CasStatus
    from .types import Entry as Entry
    from .types import IncrementResult as IncrementResult
    from .types import KeyValue as KeyValue
    from .types import PoolStats as PoolStats
    from .types import ScanOptions as ScanOptions
    from .types import Stats as Stats
    from .types import TypedCasResult as TypedCasResult


# The modules of the names above, which type checkers take from the imports.
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
    *("aio", "config", "embedded", "errors", "patterns"),
    *("pipeline", "store", "transforms", "typed", "types"),
)

if not TYPE_CHECKING:  # or checkers would take any name for one of pgkv's
    __all__ = list(_MODULE_OF)

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return import_module(f".{name}", __name__)
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = globals()[name] = getattr(import_module(_MODULE_OF[name], __name__), name)
        return found

    def __dir__() -> list[str]:
        return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
