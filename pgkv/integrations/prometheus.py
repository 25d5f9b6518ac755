"""For Prometheus: `install`, metrics of pgkv in a registry of ``prometheus_client`` (extra
``prometheus``).

====================================  =========  ==============================  =======================
metric                                type       labels                          what it counts
====================================  =========  ==============================  =======================
pgkv_operation_duration_seconds       histogram  operation, table, outcome       operations of all stores
pgkv_operation_retries_total          counter    operation                       attempts beyond the first
pgkv_keys_total                       counter    table, result=hit|miss          keys that reads named
pgkv_cached_calls_total               counter    function, result                calls of cached functions
pgkv_events_total                     counter    event                           changes of state, as logged
====================================  =========  ==============================  =======================

Labels are names written in code. Should one grow without bound all the same (a table per tenant),
names beyond the first hundred of a label become ``other``. They are right under several gunicorn
workers: with ``PROMETHEUS_MULTIPROC_DIR`` each worker's counters are added up.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram
from prometheus_client.registry import Collector

from .. import _observe
from .._fork import new_lock
from .._observe import OperationEvent, StateEvent, on_event
from ..patterns.cache.decorator import cached_functions

__all__ = ["install"]

BUCKETS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.25, 1, 5, 30)
LABELS_MAX = 100
OTHER = "other"
KINDS = ("lock", "session", "limit", "cached", "listener", "sweep", "retry", "table", "background")
RESULTS = {  # the fields of CacheInfo, as labels
    "hits": "hit",
    "misses": "miss",
    "stale_hits": "stale",
    "waits": "wait",
    "errors": "error",
    "fills": "fill",
    "discarded_fills": "discarded",
}
REFRESH = 5.0  # seconds between two readings of cached functions where no scrape asks


def install(registry: CollectorRegistry = REGISTRY) -> Callable[[], None]:
    """Add pgkv's metrics to a registry.

    Args:
        registry: where they are scraped.

    Returns:
        A function that takes them away again.
    """
    return _Metrics(registry).remove


class _Metrics(Collector):
    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._lock = new_lock(self)
        self._labels: dict[str, set[str]] = {}
        self._seen: dict[tuple[str, str], int] = {}
        self._due = 0.0

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        self._duration = Histogram(
            "pgkv_operation_duration_seconds",
            "Time of one operation, its repeats included.",
            ("operation", "table", "outcome"),
            buckets=BUCKETS,
            registry=registry,
        )
        self._retries = counter("pgkv_operation_retries", "Attempts beyond the first.", "operation")
        self._keys = counter("pgkv_keys", "Keys that reads named.", "table", "result")
        self._calls = counter(
            "pgkv_cached_calls", "Calls of cached functions.", "function", "result"
        )
        self._events = counter("pgkv_events", "Changes of state, as logged.", "event")
        registry.register(self)  # a scrape reads the cached functions first
        self._removes = [on_event(self._operation), on_event(self._event, kinds=KINDS)]
        atexit.register(self._read_functions)

    def remove(self) -> None:
        for remove in self._removes:
            remove()
        atexit.unregister(self._read_functions)
        for each in (self, self._duration, self._retries, self._keys, self._calls, self._events):
            self._registry.unregister(each)

    def collect(self) -> Iterable[Any]:
        self._read_functions()
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
        if time.monotonic() >= self._due:
            self._read_functions()

    def _event(self, event: StateEvent) -> None:
        self._events.labels(event.name).inc()

    def _read_functions(self) -> None:
        """Bring the counters of cached functions up to date, by difference: a worker's counters of
        a multiprocess registry must be real ones."""
        with self._lock:
            self._due = time.monotonic() + REFRESH
            for function in cached_functions():
                info = function.cache_info()
                name = self._bounded("function", function.name)
                for field, result in RESULTS.items():
                    count = getattr(info, field)
                    grown = count - self._seen.get((function.name, field), 0)
                    if grown > 0:
                        self._calls.labels(name, result).inc(grown)
                    self._seen[function.name, field] = count
