"""One call of a cached function as a value, the settings it runs under, and how calls are counted."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any, Concatenate, Literal, TypeAlias

from ..._engine.breaker import Breaker
from ..._fork import new_lock
from ...config import Seconds
from .._runtime.runtimes import AsyncRuntime, SyncRuntime, runtime_of
from .sql import CacheStatements

if TYPE_CHECKING:
    from ...aio import AsyncStore
    from ...store import Store
    from ...transforms import Transforms

MISSING: Any = object()
REPORT_EVERY = 60.0  # seconds between two reports of a process's counts, and before the first

# Strict type checkers know the parameters of a lambda by the first kind of function.
Ttl: TypeAlias = "Seconds | Callable[Concatenate[Any, ...], Seconds | None] | Callable[..., Seconds | None] | None"


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """The arguments of `cached`, checked."""

    key: Callable[..., Any] | None
    ignore: tuple[str, ...]
    name: str | None
    version: int | str
    namespace: str | None
    tags: tuple[str, ...]
    codec: Any
    l1: Any
    store: Any
    ttl: Ttl
    stale: float
    beta: float
    jitter: float
    lock: bool
    compute_timeout: float
    max_wait: float
    condition: Callable[[Any], bool] | None
    on_error: Literal["call", "raise"]
    store_timeout: float

    def facts(self) -> str:
        ttl: Any = self.ttl
        return f"ttl={'computed' if callable(ttl) else ttl if ttl is None else f'{ttl:g}'}"


_lock = new_lock(sys.modules[__name__])
_breakers: weakref.WeakKeyDictionary[Any, Breaker] = weakref.WeakKeyDictionary()
_contexts: weakref.WeakKeyDictionary[Any, StoreContext] = weakref.WeakKeyDictionary()


class StoreContext:
    """What all cached functions share on one store.

    Attributes:
        ref: a weak reference to the store.
        sql: the cache's statements on its table, under its namespace.
        breaker: one per pool of connections, shared by the views of a store.
        names: by function, what its entries' keys begin with, and its generation's key.
        counts: by function, for the report.
        report_at: the monotonic time of the next one.
        transforms: of the values inside the entries; None for plain ones.
        scope: names table and namespace in messages between processes and in first levels.
        runtime: the background's side of it; None for a view of a transaction.
    """

    def __init__(self, store: Store | AsyncStore) -> None:
        self.ref: Callable[[], Store | AsyncStore | None] = weakref.ref(store)
        self.sql: CacheStatements = CacheStatements(store._config, store._sql.prefix)
        self.breaker: Breaker = _breakers.setdefault(store._bare, Breaker())
        self.scope: str = f"{self.sql.t}\x1f{self.sql.prefix}"
        config = store._config
        self.transforms: Transforms | None = None
        if config.transforms:
            from ...transforms import Transforms

            self.transforms = Transforms(
                config.transforms, config.table_name, self.sql.value_size_max
            )
        self.table_known = False
        self.runtime: SyncRuntime | AsyncRuntime | None = runtime_of(store)
        self.names: dict[str, tuple[bytes, bytes]] = {}
        self.counts: dict[str, Counts] = {}
        self.report_at: float = monotonic() + REPORT_EVERY

    @property
    def store(self) -> Any:
        store = self.ref()
        assert store is not None  # each user of the context holds the store
        return store


def context_of(store: Store | AsyncStore) -> StoreContext:
    context = _contexts.get(store)
    if context is None:
        with _lock:
            context = _contexts.get(store)
            if context is None:
                context = _contexts[store] = StoreContext(store)
    return context


@dataclass(slots=True)
class CachedCall:
    """One call of a cached function.

    Attributes:
        keys: of the entry, of the function's generation, and of its tags' generations.
        positional: the arguments as they were passed, by position and by name.
        epoch: the first level's, before the store was asked.
        sent: the monotonic time at which the store was asked.
        counted: already among the calls that waited.
    """

    context: StoreContext
    keys: tuple[bytes, ...]
    digest: str
    positional: tuple[tuple[Any, ...], dict[str, Any]]
    epoch: int
    sent: float
    counted: bool = False

    @property
    def key(self) -> bytes:
        return self.keys[0]


class Counts:
    """How calls ended; see `CacheInfo`."""

    def __init__(self) -> None:
        self._lock = new_lock(self)
        self.hits = self.misses = self.stale_hits = self.waits = 0
        self.errors = self.fills = self.discarded_fills = 0

    def add(self, name: str) -> None:
        with self._lock:  # `+= 1` alone loses counts between threads
            setattr(self, name, getattr(self, name) + 1)
