"""For OpenTelemetry: `PgkvInstrumentor`, metrics and spans of every operation (extra ``otel``).

``opentelemetry-instrument python app.py`` finds it by itself. Names and attributes follow the stable
semantic conventions for database clients. No key, value or SQL parameter is exported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

from opentelemetry import metrics, trace
from opentelemetry.instrumentation import instrumentor  # switches its own type checks off
from opentelemetry.instrumentation.utils import is_instrumentation_enabled
from opentelemetry.trace import Link, SpanKind, Status, StatusCode

from .._observe import KINDS, OperationEvent, StateEvent, on_event
from ..errors import ConfigError

__all__ = ["PgkvInstrumentor"]

SERVER = "server.address", "server.port", "db.namespace"
BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10)  # seconds; advised by the conventions


class PgkvInstrumentor(instrumentor.BaseInstrumentor):  # type: ignore[name-defined]  # its module is untyped
    """Makes OpenTelemetry see pgkv: ``PgkvInstrumentor().instrument()``.

    The histogram ``db.client.operation.duration`` counts every operation, a batch once. Spans are
    made inside a recording span only, so background sweeps and polls make none; ``instrument(spans=
    "always")`` makes one for every operation, ``"never"`` none. Both respect
    ``suppress_instrumentation()``. With ``coalesce=True`` an operation keeps its own task's parent;
    several ``get`` calls become one ``get_many``, whose span has the parent of the first and links
    to the others. Changes of state, such as a wait for a connection or a lost lease, are counted by
    ``pgkv.events``, and are events of the span in which they happen.
    """

    _removes: Sequence[Callable[[], None]] = ()

    def instrumentation_dependencies(self) -> Collection[str]:
        """Return what must be installed: nothing but pgkv."""
        return ()

    def _instrument(
        self, spans: Literal["parent", "always", "never"] = "parent", **options: Any
    ) -> None:
        if spans not in ("parent", "always", "never"):
            raise ConfigError(f"spans are 'parent', 'always' or 'never', not {spans!r}")
        tracer = trace.get_tracer("pgkv", tracer_provider=options.get("tracer_provider"))
        meter = metrics.get_meter("pgkv", meter_provider=options.get("meter_provider"))
        events = meter.create_counter("pgkv.events", description="Changes of state of pgkv.")
        duration = meter.create_histogram(
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
                links=_links(event),
                start_time=ended - int(event.seconds * 1e9),
            )
            if event.error is not None:
                span.set_status(Status(StatusCode.ERROR, type(event.error).__name__))
            span.end(ended)

        def note(event: StateEvent) -> None:
            if not is_instrumentation_enabled():
                return
            events.add(1, {"event.name": event.name})
            if spans != "never":
                shown = {k: v for k, v in event.fields.items() if isinstance(v, str | int | float)}
                trace.get_current_span().add_event(event.name, shown)

        self._removes = on_event(observe), on_event(note, kinds=KINDS)

    def _uninstrument(self, **_: Any) -> None:
        for remove in self._removes:
            remove()
        self._removes = ()


def _links(event: OperationEvent) -> list[Link]:
    """The spans of the other calls that a merged statement answers."""
    asking = [context.run(trace.get_current_span) for context in event.contexts[1:]]
    return [Link(span.get_span_context()) for span in asking if span.is_recording()]


def attributes_of(event: OperationEvent) -> dict[str, Any]:
    """Return the attributes of an operation, those of metrics and spans alike."""
    name, table = event.name, event.table
    attributes: dict[str, Any] = {
        "db.system.name": "postgresql",
        "db.operation.name": name,
        "db.query.summary": name if table is None else f"{name} {table}",
    }
    server = zip(SERVER, event.server, strict=True)
    attributes |= {name: value for name, value in server if value is not None}
    if table is not None:
        attributes["db.collection.name"] = table
    if event.sqlstate is not None:
        attributes["db.response.status_code"] = event.sqlstate
    if event.error is not None:
        attributes["error.type"] = event.outcome
    return attributes
