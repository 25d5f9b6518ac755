"""For OpenTelemetry: `PgkvInstrumentor`, metrics and spans of every operation (extra ``otel``).

``opentelemetry-instrument python app.py`` finds it by itself. Names and attributes follow the stable
semantic conventions for database clients. No key, value or SQL parameter is exported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any, Literal

from opentelemetry import metrics, trace
from opentelemetry.instrumentation import instrumentor  # switches its own type checks off
from opentelemetry.instrumentation.utils import is_instrumentation_enabled
from opentelemetry.trace import SpanKind, Status, StatusCode

from .._observe import OperationEvent, on_event
from ..errors import ConfigError

__all__ = ["PgkvInstrumentor"]

BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10)  # seconds; advised by the conventions


class PgkvInstrumentor(instrumentor.BaseInstrumentor):  # type: ignore[name-defined]  # its module is untyped
    """Makes OpenTelemetry see pgkv: ``PgkvInstrumentor().instrument()``.

    The histogram ``db.client.operation.duration`` counts every operation, a batch once. Spans are
    made inside a recording span only, so background sweeps and polls make none; ``instrument(spans=
    "always")`` makes one for every operation, ``"never"`` none. Both respect
    ``suppress_instrumentation()``. With ``coalesce=True`` an operation keeps its own task's parent;
    several ``get`` calls become one ``get_many``, whose span has the parent of the first.
    """

    _remove: Callable[[], None] | None = None

    def instrumentation_dependencies(self) -> Collection[str]:
        """Return what must be installed: nothing but pgkv."""
        return ()

    def _instrument(
        self, spans: Literal["parent", "always", "never"] = "parent", **options: Any
    ) -> None:
        if spans not in ("parent", "always", "never"):
            raise ConfigError(f"spans are 'parent', 'always' or 'never', not {spans!r}")
        tracer = trace.get_tracer("pgkv", tracer_provider=options.get("tracer_provider"))
        duration = metrics.get_meter(
            "pgkv", meter_provider=options.get("meter_provider")
        ).create_histogram(
            "db.client.operation.duration",
            unit="s",
            description="Duration of database client operations.",
            explicit_bucket_boundaries_advisory=BUCKETS,
        )

        def observe(event: OperationEvent) -> None:
            if not is_instrumentation_enabled():
                return
            attributes = attributes_of(event)
            duration.record(event.seconds, attributes)
            if spans == "never" or (
                spans == "parent" and not trace.get_current_span().is_recording()
            ):
                return
            if event.batch_size is not None and event.batch_size > 1:
                attributes["db.operation.batch.size"] = event.batch_size
            ended = time.time_ns()
            span = tracer.start_span(
                attributes["db.query.summary"],
                kind=SpanKind.CLIENT,
                attributes=attributes,
                start_time=ended - int(event.seconds * 1e9),
            )
            if event.error is not None:
                span.set_status(Status(StatusCode.ERROR, type(event.error).__name__))
            span.end(ended)

        self._remove = on_event(observe)

    def _uninstrument(self, **_: Any) -> None:
        if self._remove is not None:
            self._remove()
            self._remove = None


def attributes_of(event: OperationEvent) -> dict[str, Any]:
    """Return the attributes of an operation, those of metrics and spans alike."""
    name, table = event.name, event.table
    attributes = {
        "db.system.name": "postgresql",
        "db.operation.name": name,
        "db.query.summary": name if table is None else f"{name} {table}",
    }
    if table is not None:
        attributes["db.collection.name"] = table
    if event.sqlstate is not None:
        attributes["db.response.status_code"] = event.sqlstate
    if event.error is not None:
        attributes["error.type"] = event.outcome
    return attributes
