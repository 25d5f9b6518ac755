"""For Prometheus: `install`, metrics of pgkv in a registry of ``prometheus_client`` (extra
``prometheus``). docs/monitoring.md lists them.

Labels are names written in code. Should one grow without bound all the same (a table per tenant),
names beyond the first hundred of a label become ``other``. They are right under several gunicorn
workers: with ``PROMETHEUS_MULTIPROC_DIR`` each worker's counters are added up.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, cast

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.registry import Collector

from .. import _observe
from .._fork import new_lock, survives_fork
from .._observe import KINDS, OperationEvent, StateEvent, on_event
from ..errors import ConfigError, PgkvError
from ..patterns._runtime.checks import require
from ..patterns.cache.function import cached_functions
from ..patterns.overview import Overview, Overviews
from ..patterns.queue.sql import STATES
from ..store import Store

__all__ = ["install"]

BUCKETS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.25, 1, 5, 30)
LOCK_BUCKETS = (0.001, 0.005, 0.02, 0.1, 0.5, 1, 5, 30, 120, 600, 3600)
LABELS_MAX = 100
OTHER = "other"
TAKERS_MAX = 10_000  # kinds of operations by table and outcome
RESULTS = {  # the fields of CacheInfo, as labels
    "hits": "hit",
    "misses": "miss",
    "stale_hits": "stale",
    "waits": "wait",
    "errors": "error",
    "fills": "fill",
    "discarded_fills": "discarded",
}
DECISIONS = {name: name for name in ("allowed", "denied", "degraded")}
OPERATIONS, LOCKS = {"buckets": BUCKETS}, {"buckets": LOCK_BUCKETS}
WORKERS, SERVERS = {"multiprocess_mode": "livesum"}, {"multiprocess_mode": "mostrecent"}
_Metric: TypeAlias = "tuple[type[Any], str, tuple[str, ...], dict[str, Any]]"
OF_PROCESS: dict[str, _Metric] = {
    "operation_duration_seconds": (
        Histogram, "Time of one operation with its repeats.", ("operation", "table", "outcome"), OPERATIONS),
    "operation_retries": (Counter, "Attempts beyond the first.", ("operation",), {}),
    "keys": (Counter, "Keys that reads named.", ("table", "result"), {}),
    "cached_calls": (Counter, "Calls of cached functions.", ("function", "result"), {}),
    "limiter_decisions": (Counter, "Hits of limiters.", ("limiter", "decision"), {}),
    "lock_wait_seconds": (Histogram, "From acquire() to the grant.", ("lock",), LOCKS),
    "lock_hold_seconds": (Histogram, "From the grant to release().", ("lock",), LOCKS),
    "lock_lost": (Counter, "Leases that ended early.", ("lock", "reason"), {}),
    "pool_connections": (Gauge, "Connections of all stores.", ("state",), WORKERS),
    "pool_waiting": (Gauge, "Calls that wait for a connection.", (), WORKERS),
    "pool_wait_seconds": (Histogram, "Waits for a connection.", (), OPERATIONS),
    "pool_timeouts": (Counter, "Calls that no connection became free for.", (), {}),
    "swept_rows": (Counter, "Expired rows deleted.", ("table",), {}),
    "evicted_rows": (Counter, "Rows evicted by a bound.", ("table",), {}),
    "events": (Counter, "Changes of state.", ("event",), {}),
}  # fmt: skip
OF_SERVER: dict[str, _Metric] = {
    "up": (Gauge, "Whether the server answered.", (), SERVERS),
    "locks_held": (Gauge, "Locks and slots that are held.", (), SERVERS),
    "table_rows": (Gauge, "Rows, estimated.", ("table",), SERVERS),
    "table_dead_rows": (Gauge, "Row versions to vacuum, estimated.", ("table",), SERVERS),
    "table_bytes": (Gauge, "Size on disk with indexes.", ("table",), SERVERS),
    "queue_jobs": (Gauge, "Jobs, estimated.", ("queue", "state"), SERVERS),
    "queue_oldest_seconds": (Gauge, "Since when a waiting job is due.", ("queue",), SERVERS),
}
# Of an event: a metric, the fields that are its labels, and the field that it takes (None: it counts).
MEASURES: dict[str, tuple[str, tuple[str, ...], str | None]] = {
    "pgkv.pool.waited": ("pool_wait_seconds", (), "seconds"),
    "pgkv.pool.timeout": ("pool_timeouts", (), None),
    "pgkv.lock.acquired": ("lock_wait_seconds", ("lock",), "seconds"),
    "pgkv.lock.released": ("lock_hold_seconds", ("lock",), "seconds"),
    "pgkv.lock.lost": ("lock_lost", ("lock", "reason"), None),
    "pgkv.sweep.swept": ("swept_rows", ("table",), "rows"),
    "pgkv.evict.evicted": ("evicted_rows", ("table",), "rows"),
}
REFRESH = 5.0  # seconds between two looks at the server, and two readings under several workers
LOOK_TIME = 1.0  # seconds for the server's answer


def install(
    registry: CollectorRegistry = REGISTRY, *, store: Store | None = None
) -> Callable[[], None]:
    """Add pgkv's metrics to a registry.

    Args:
        registry: where they are scraped.
        store: its server is asked about tables, locks and queues, by one query in 5 seconds at most
            and for a second at most: a scrape never fails, ``pgkv_up`` is 0 then. An application with
            an `AsyncStore` makes a `Store` for it, of one connection.

    Returns:
        A function that takes them away again.

    Raises:
        ConfigError: `store` is no `Store`.
    """
    if store is not None:
        require(
            store, Store, "prometheus.install()", "prometheus.install() with a Store of its own"
        )
        if hasattr(store._config, "shards"):
            raise ConfigError("prometheus.install() asks one server: give it a store on one server")
    return _Metrics(registry, store).remove


class _Metrics(Collector):
    def __init__(self, registry: CollectorRegistry, store: Store | None) -> None:
        self._registry = registry
        # Held while the process forks: a child could not free a lock of prometheus_client.
        self._lock = new_lock(self, hold=True)
        self._labels: dict[str, set[str]] = {}
        # What was read last of an object's counts, by their names.
        self._seen: weakref.WeakKeyDictionary[object, dict[str, int]] = weakref.WeakKeyDictionary()
        # No scrape calls collect() where workers count into one folder: a thread does.
        self._many: bool = "PROMETHEUS_MULTIPROC_DIR" in os.environ
        self._idle = self._many
        self._removed = threading.Event()
        registry.register(self)  # the first: a scrape brings the others up to date
        self._metrics: dict[str, Any] = {
            name: kind(f"pgkv_{name}", text, labels, registry=registry, **options)
            for name, (kind, text, labels, options) in (
                OF_PROCESS | ({} if store is None else OF_SERVER)
            ).items()
        }
        self._takers: dict[tuple[str, str | None, str, bool], Any] = {}
        self._store = store
        self._overviews = None if store is None else Overviews(store)
        self._look_at = 0.0
        self._removes = [on_event(self._operation), on_event(self._event, kinds=KINDS)]
        atexit.register(self._read)
        survives_fork(self)

    def after_fork(self) -> None:
        """In the child limiters count from zero, and no thread ticks."""
        self._idle = self._many
        for counter in _observe.limiters:
            self._seen.pop(counter, None)

    def remove(self) -> None:
        self._removed.set()
        for remove in self._removes:
            remove()
        atexit.unregister(self._read)
        for each in (self, *self._metrics.values()):
            self._registry.unregister(each)

    def collect(self) -> Iterable[Any]:
        self._read()
        self._look()
        return ()

    def describe(self) -> Iterable[Any]:
        return ()

    def _bounded(self, label: str, value: str | None) -> str:
        known = self._labels.setdefault(label, set())
        if value is None or value in known:
            return value or ""
        if len(known) >= LABELS_MAX:
            if OTHER not in known:
                known.add(OTHER)
                _observe.warning("pgkv.metrics.label_full", label=label, names=LABELS_MAX)
            return OTHER
        known.add(value)
        return value

    def _operation(self, event: OperationEvent) -> None:
        hits = event.hits
        key = event.name, event.table, event.outcome, hits is None
        takers = self._takers.get(key)
        if takers is None:
            takers = self._takers_of(event)
            if len(self._takers) < TAKERS_MAX:
                self._takers[key] = takers
        observe, hit, miss = takers
        observe(event.seconds)
        if event.retries:
            self._metrics["operation_retries"].labels(event.name).inc(event.retries)
        if hits is not None:
            if hits:
                hit(hits)
            if misses := event.misses:
                miss(misses)
        if self._idle:
            self._start()

    def _takers_of(self, event: OperationEvent) -> tuple[Any, Any, Any]:
        """What takes the seconds, hits and misses of such operations: to look for it by its labels
        costs more than all else."""
        table = self._bounded("table", event.table)
        duration = self._metrics["operation_duration_seconds"]
        observe = duration.labels(event.name, table, event.outcome).observe
        if event.hits is None:
            return observe, None, None
        keys = self._metrics["keys"]
        return observe, keys.labels(table, "hit").inc, keys.labels(table, "miss").inc

    def _start(self) -> None:
        """Begin to read from time to time, in a thread of this process."""
        with self._lock:
            if self._idle:
                self._idle = False
                threading.Thread(target=self._tick, name="pgkv-metrics", daemon=True).start()

    def _tick(self) -> None:
        while not self._removed.is_set():
            self._read()
            self._look()
            self._removed.wait(REFRESH)

    def _event(self, event: StateEvent) -> None:
        self._metrics["events"].labels(event.name).inc()
        if event.name not in MEASURES:
            return
        name, labels, field = MEASURES[event.name]
        metric, fields = self._metrics[name], cast("Mapping[str, Any]", event.fields)
        if labels:
            metric = metric.labels(*(self._bounded(label, fields[label]) for label in labels))
        take = metric.observe if name.endswith("_seconds") else metric.inc
        take(1 if field is None else fields[field])

    def _read(self) -> None:
        """Bring up to date what is not told per call. Counters grow by the difference: those of a
        worker must be real ones, which a scrape in another process can add up."""
        # What there is, or a loop's queue, may change meanwhile: then the next reading tells.
        with self._lock, contextlib.suppress(RuntimeError):
            for metric, label, name, source, fields, now in tuple(_counts()):
                seen = self._seen.setdefault(source, {})
                for field, result in fields.items():
                    count = getattr(now, field)
                    # Two threads that read at one moment may see one call less.
                    if (grown := count - seen.get(field, 0)) > 0:
                        bounded = self._bounded(label, name)
                        self._metrics[metric].labels(bounded, result).inc(grown)
                        seen[field] = count
            channels = tuple(_observe.pools)
            pools = {id(getattr(each._pool, "_caller_pool", each)): each for each in channels}
            counts = [each.pool_stats() for each in pools.values()]
            idle = sum(each.idle for each in counts)
            self._set("pool_connections", idle, "idle")
            self._set("pool_connections", sum(each.size for each in counts) - idle, "used")
            self._set("pool_waiting", sum(each.waiting for each in counts))

    def _set(self, name: str, value: float, *labels: str) -> None:
        metric = self._metrics[name]
        (metric.labels(*labels) if labels else metric).set(value)

    def _look(self) -> None:
        """Ask the server, unless it was asked a moment ago."""
        if self._store is None or self._overviews is None:
            return
        with self._lock:
            if time.monotonic() < self._look_at:
                return
            self._look_at = time.monotonic() + REFRESH
        try:
            frame = self._store._run(self._overviews.look(), LOOK_TIME)
        except PgkvError:
            frame = None
        with self._lock:
            self._set("up", frame is not None)
            if not self._many:  # which cannot forget
                for name, (_, _, labels, _) in OF_SERVER.items():
                    if labels:
                        self._metrics[name].clear()
            if frame is not None:
                self._show(frame)

    def _show(self, frame: Overview) -> None:
        self._set("locks_held", frame.locks_held)
        for table in frame.tables:
            name = self._bounded("table", table.name.replace('"', ""))
            self._set("table_rows", table.rows, name)
            self._set("table_dead_rows", table.dead, name)
            self._set("table_bytes", table.bytes + table.index_bytes, name)
        for queue in frame.queues:
            name = self._bounded("queue", queue.queue)
            self._set("queue_oldest_seconds", queue.oldest, name)
            for state in STATES:
                self._set("queue_jobs", getattr(queue, state), name, state)


def _counts() -> Iterable[tuple[str, str, str, object, Mapping[str, str], Any]]:
    """What is counted per call: metric, label with its name, object, and its counts by field."""
    for function in cached_functions():
        yield "cached_calls", "function", function.name, function, RESULTS, function.cache_info()
    for counter, name in _observe.limiters.items():
        yield "limiter_decisions", "limiter", name, counter, DECISIONS, counter.snapshot()
