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
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.registry import Collector

from .. import _observe
from .._fork import new_lock, survives_fork
from .._observe import KINDS, OperationEvent, StateEvent, on_event
from ..errors import ConfigError, PgkvError
from ..patterns._runtime.checks import require
from ..patterns.cache.decorator import cached_functions
from ..patterns.overview import Overview, Overviews
from ..store import Store

__all__ = ["install"]

BUCKETS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.25, 1, 5, 30)
LOCK_BUCKETS = (0.001, 0.005, 0.02, 0.1, 0.5, 1, 5, 30, 120, 600, 3600)
LABELS_MAX = 100
OTHER = "other"
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
        self._lock = new_lock(self)
        self._labels: dict[str, set[str]] = {}
        # What was read last of an object's counts, by their names.
        self._seen: weakref.WeakKeyDictionary[object, dict[str, int]] = weakref.WeakKeyDictionary()
        # No scrape calls collect() where workers count into one folder: a thread does.
        self._many: bool = "PROMETHEUS_MULTIPROC_DIR" in os.environ
        self._idle = self._many
        self._removed = threading.Event()
        self._all: list[Any] = [self]
        registry.register(self)  # the first: a scrape brings the others up to date

        def add(kind: Any, name: str, text: str, *labels: str, **options: Any) -> Any:
            self._all.append(kind(name, text, labels, registry=registry, **options))
            return self._all[-1]

        self._duration = add(
            Histogram,
            "pgkv_operation_duration_seconds",
            "Time of one operation, its repeats included.",
            "operation", "table", "outcome",
            buckets=BUCKETS,
        )  # fmt: skip
        self._retries = add(
            Counter, "pgkv_operation_retries", "Attempts beyond the first.", "operation"
        )
        self._keys = add(Counter, "pgkv_keys", "Keys that reads named.", "table", "result")
        self._calls = add(
            Counter, "pgkv_cached_calls", "Calls of cached functions.", "function", "result"
        )
        self._decisions = add(
            Counter, "pgkv_limiter_decisions", "Hits of limiters.", "limiter", "decision"
        )
        self._events = add(Counter, "pgkv_events", "Changes of state.", "event")
        self._connections = add(
            Gauge,
            "pgkv_pool_connections",
            "Connections of all stores.",
            "state",
            multiprocess_mode="livesum",
        )
        self._waiting = add(
            Gauge,
            "pgkv_pool_waiting",
            "Calls that wait for a connection.",
            multiprocess_mode="livesum",
        )
        pool_wait = add(
            Histogram, "pgkv_pool_wait_seconds", "Waits for a connection.", buckets=BUCKETS
        )
        timeouts = add(Counter, "pgkv_pool_timeouts", "Calls that no connection became free for.")
        lock_wait = add(
            Histogram,
            "pgkv_lock_wait_seconds",
            "From acquire() to the grant.",
            "lock",
            buckets=LOCK_BUCKETS,
        )
        lock_hold = add(
            Histogram,
            "pgkv_lock_hold_seconds",
            "From the grant to release().",
            "lock",
            buckets=LOCK_BUCKETS,
        )
        lost = add(Counter, "pgkv_lock_lost", "Leases that ended early.", "lock", "reason")
        swept = add(Counter, "pgkv_swept_rows", "Expired rows deleted.", "table")
        evicted = add(Counter, "pgkv_evicted_rows", "Rows evicted by a bound.", "table")

        self._store = store
        self._overviews = None if store is None else Overviews(store)
        self._look_at = 0.0

        def gauge(name: str, text: str, *labels: str) -> Any:
            return add(Gauge, name, text, *labels, multiprocess_mode="mostrecent")

        if store is not None:
            self._up = gauge("pgkv_up", "Whether the server answered.")
            self._rows = gauge("pgkv_table_rows", "Rows, estimated.", "table")
            self._dead = gauge(
                "pgkv_table_dead_rows", "Row versions to vacuum, estimated.", "table"
            )
            self._bytes = gauge("pgkv_table_bytes", "Size on disk with indexes.", "table")
            self._held = gauge("pgkv_locks_held", "Locks and slots that are held.")
            self._jobs = gauge("pgkv_queue_jobs", "Jobs, estimated.", "queue", "state")
            self._oldest = gauge(
                "pgkv_queue_oldest_seconds", "Since when a waiting job is due.", "queue"
            )

        def named(metric: Any, label: str, fields: Mapping[str, Any], *more: str) -> Any:
            return metric.labels(self._bounded(label, fields[label]), *more)

        self._measures: dict[str, Callable[[Any], None]] = {
            "pgkv.pool.waited": lambda of: pool_wait.observe(of["seconds"]),
            "pgkv.pool.timeout": lambda _: timeouts.inc(),
            "pgkv.lock.acquired": lambda of: named(lock_wait, "lock", of).observe(of["seconds"]),
            "pgkv.lock.released": lambda of: named(lock_hold, "lock", of).observe(of["seconds"]),
            "pgkv.lock.lost": lambda of: named(lost, "lock", of, of["reason"]).inc(),
            "pgkv.sweep.swept": lambda of: named(swept, "table", of).inc(of["rows"]),
            "pgkv.evict.evicted": lambda of: named(evicted, "table", of).inc(of["rows"]),
        }
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
        for each in self._all:
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
        table = self._bounded("table", event.table)
        self._duration.labels(event.name, table, event.outcome).observe(event.seconds)
        if event.retries:
            self._retries.labels(event.name).inc(event.retries)
        hits = event.hits
        if hits is not None:
            if hits:
                self._keys.labels(table, "hit").inc(hits)
            if misses := event.misses:
                self._keys.labels(table, "miss").inc(misses)
        if self._idle:
            self._start()

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
        self._events.labels(event.name).inc()
        measure = self._measures.get(event.name)
        if measure is not None:
            measure(event.fields)

    def _read(self) -> None:
        """Bring up to date what is not told per call. Counters grow by the difference: those of a
        worker must be real ones, which a scrape in another process can add up."""
        with self._lock:
            for function in cached_functions():
                self._grow(
                    self._calls, function, "function", function.name, RESULTS, function.cache_info()
                )
            # A loop's queue, or what there is, may change meanwhile: then the next reading tells.
            with contextlib.suppress(RuntimeError):
                for counter, name in tuple(_observe.limiters.items()):
                    self._grow(
                        self._decisions, counter, "limiter", name, DECISIONS, counter.snapshot()
                    )
                pools = {
                    id(getattr(each._pool, "_caller_pool", each)): each
                    for each in tuple(_observe.pools)
                }
                counts = [each.pool_stats() for each in pools.values()]
                idle = sum(each.idle for each in counts)
                self._connections.labels("idle").set(idle)
                self._connections.labels("used").set(sum(each.size for each in counts) - idle)
                self._waiting.set(sum(each.waiting for each in counts))

    def _look(self) -> None:
        """Ask the server, unless it was asked a moment ago."""
        if self._store is None or self._overviews is None:
            return
        with self._lock:
            if time.monotonic() < self._look_at:
                return
            try:
                frame = self._store._run(self._overviews.look(), LOOK_TIME)
            except PgkvError:
                frame = None
            self._look_at = time.monotonic() + REFRESH
            self._up.set(frame is not None)
            if not self._many:  # which cannot forget
                for each in (self._rows, self._dead, self._bytes, self._jobs, self._oldest):
                    each.clear()
            if frame is not None:
                self._show(frame)

    def _show(self, frame: Overview) -> None:
        self._held.set(frame.locks_held)
        for table in frame.tables:
            name = self._bounded("table", table.name.replace('"', ""))
            self._rows.labels(name).set(table.rows)
            self._dead.labels(name).set(table.dead)
            self._bytes.labels(name).set(table.bytes + table.index_bytes)
        for queue in frame.queues:
            name = self._bounded("queue", queue.queue)
            self._oldest.labels(name).set(queue.oldest)
            for state in ("waiting", "delayed", "running", "dead"):
                self._jobs.labels(name, state).set(getattr(queue, state))

    def _grow(
        self,
        metric: Any,
        source: object,
        label: str,
        name: str,
        fields: Mapping[str, str],
        now: Any,
    ) -> None:
        seen = self._seen.setdefault(source, {})
        for field, result in fields.items():
            count = getattr(now, field)
            # Two threads that read at one moment may see one call less.
            if (grown := count - seen.get(field, 0)) > 0:
                metric.labels(self._bounded(label, name), result).inc(grown)
                seen[field] = count
