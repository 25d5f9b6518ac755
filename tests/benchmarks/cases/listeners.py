"""What it costs to look: the same calls with nothing listening, and with each listener."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import cycle, repeat
from typing import Any

import pgkv
from pgkv import _observe
from tests.benchmarks.case import KEYS, PGKV, Bench, Entrants, Run, case, each

EMPTY = "on_event, an empty function"
PROMETHEUS = "Prometheus"
OTEL_METRICS = "OpenTelemetry, metrics"
OTEL_UNSAMPLED = "OpenTelemetry, a span that is not sampled"
OTEL_SPANS = "OpenTelemetry, spans"

Hooks = tuple[list[Any], list[Any]]


def nothing(_: object) -> None:
    pass


def hooks_of(install: Callable[[], Callable[[], None]]) -> Hooks:
    """The functions that a listener registers, without it listening."""
    remove = install()
    found = list(_observe.hooks), list(_observe.listeners)
    remove()
    return found


def while_heard(hooks: Hooks, run: Run) -> Run:
    """Listen while `run` runs."""

    def heard(n: int) -> None:
        _observe.hooks[:], _observe.listeners[:] = hooks
        try:
            run(n)
        finally:
            _observe.hooks.clear()
            _observe.listeners.clear()

    return heard


def listeners(bench: Bench) -> Iterator[tuple[str, Hooks]]:
    """Each listener that is installed here."""
    yield EMPTY, hooks_of(lambda: pgkv.on_event(nothing, kinds=["operation", "lock"]))
    with contextlib.suppress(ImportError):
        from prometheus_client import CollectorRegistry

        from pgkv.integrations import prometheus

        yield PROMETHEUS, hooks_of(lambda: prometheus.install(CollectorRegistry()))
    with contextlib.suppress(ImportError):
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

        from pgkv.integrations.otel import PgkvInstrumentor

        def instrument(spans: str, tracers: Any) -> Callable[[], None]:
            meters = MeterProvider()
            bench.closing(meters.shutdown)
            made = PgkvInstrumentor()
            made.instrument(spans=spans, tracer_provider=tracers, meter_provider=meters)
            return made.uninstrument  # type: ignore[no-any-return]  # an untyped class's

        unsampled, all_of_them = TracerProvider(sampler=ALWAYS_OFF), TracerProvider()
        yield OTEL_METRICS, hooks_of(lambda: instrument("never", unsampled))
        yield OTEL_UNSAMPLED, hooks_of(lambda: instrument("always", unsampled))
        yield OTEL_SPANS, hooks_of(lambda: instrument("always", all_of_them))


@case(
    "get, by who listens",
    {
        (EMPTY, PGKV): 1.1,
        (PROMETHEUS, PGKV): 1.3,
        (OTEL_METRICS, PGKV): None,
        (OTEL_UNSAMPLED, PGKV): None,
        (OTEL_SPANS, PGKV): None,
    },
)
def get(bench: Bench) -> Entrants:
    store = bench.store()
    run = each(store.get, cycle(KEYS))
    yield PGKV, run
    for name, hooks in listeners(bench):
        yield name, while_heard(hooks, run)


@case(
    "acquire and release, by who listens",
    {
        (EMPTY, PGKV): 1.1,
        (PROMETHEUS, PGKV): None,
        (OTEL_METRICS, PGKV): None,
        (OTEL_UNSAMPLED, PGKV): None,
        (OTEL_SPANS, PGKV): None,
    },
)
def acquire_and_release(bench: Bench) -> Entrants:
    lock = pgkv.Lock(bench.store(), "looked-at", durable=False)
    run = each(lambda _: lock.acquire().release(), repeat(None))
    yield PGKV, run
    for name, hooks in listeners(bench):
        yield name, while_heard(hooks, run)
