"""Prometheus and OpenTelemetry see what pgkv does, and nothing of keys and values."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pgkv
from pgkv import _observe
from pgkv.integrations import prometheus
from tests.faults.support import newest

pytest.importorskip("prometheus_client", reason="prometheus_client is not installed")
pytest.importorskip("opentelemetry.sdk", reason="opentelemetry-sdk is not installed")
pytest.importorskip(
    "opentelemetry.instrumentation", reason="opentelemetry-instrumentation is not installed"
)

from opentelemetry import trace
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry, generate_latest

from pgkv.integrations.otel import PgkvInstrumentor

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"


# -- Prometheus


@pytest.fixture
def registry() -> Iterator[CollectorRegistry]:
    made = CollectorRegistry()
    remove = prometheus.install(made)
    yield made
    remove()
    assert generate_latest(made) == b""


@newest
def test_operations_keys_and_cached_functions_are_counted(
    dsn: str, registry: CollectorRegistry
) -> None:
    with pgkv.Store.connect(dsn) as store:
        store.set("secret-key", "secret-value")
        store.get("secret-key")
        store.get("none")
        store.get_many(["secret-key", "a", "b"])

        @pgkv.cached(ttl=60, store=store, name="slow", store_timeout=10)
        def slow(n: int) -> int:
            return n

        assert [slow(1), slow(1)] == [1, 1]

        def one(name: str, **labels: str) -> float | None:
            return registry.get_sample_value(name, labels)

        counted = "pgkv_operation_duration_seconds_count"
        assert one(counted, operation="get", table="kv_store", outcome="ok") == 2
        assert one("pgkv_keys_total", table="kv_store", result="hit") == 2
        assert one("pgkv_keys_total", table="kv_store", result="miss") == 3
        text = generate_latest(registry).decode()  # a scrape reads the functions
        assert one("pgkv_cached_calls_total", function="slow:1", result="hit") == 1
        assert one("pgkv_cached_calls_total", function="slow:1", result="miss") == 1
        assert "secret" not in text
        slow.cache_clear()


def test_a_label_stops_growing(
    registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    for n in range(150):
        table = pgkv.Store(pgkv.Config("postgresql:///x", table_name=f"tenant{n}"))
        _observe.notify(table._sql.get("k"), 0.0, b"v")
        table.close()
    found = re.findall(r'table="(\w+)"', generate_latest(registry).decode())
    assert len(set(found)) == 101
    assert "other" in found
    assert caplog.text.count("pgkv.metrics.label_full") == 1


def test_changes_of_state_are_counted(registry: CollectorRegistry) -> None:
    _observe.warning("pgkv.lock.lost", lock="billing")
    assert registry.get_sample_value("pgkv_events_total", {"event": "pgkv.lock.lost"}) == 1


def test_every_query_of_the_dashboard_is_of_a_metric() -> None:
    made = CollectorRegistry()
    remove = prometheus.install(made)
    names = {
        name
        for metric in (prometheus_names(made))
        for name in (metric, f"{metric}_total", f"{metric}_count", f"{metric}_bucket")
    }
    remove()
    panels = json.loads(DASHBOARD.read_text("utf-8"))["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    used = {name for query in queries for name in re.findall(r"pgkv_\w+", query)}
    assert used <= names
    assert len(used) >= 5


def prometheus_names(registry: CollectorRegistry) -> set[str]:
    described = [each for each in registry._collector_to_names if hasattr(each, "_name")]
    return {each._name for each in described}


WORKER = """
import os, sys, pgkv
from prometheus_client import CollectorRegistry
from pgkv.integrations import prometheus
prometheus.install()
with pgkv.Store.connect(os.environ["PGKV_DSN"]) as store:
    f = pgkv.cached(ttl=60, store=store, name="shared", store_timeout=10)(lambda n: n)
    for n in range(50):
        store.get("k")
        f(7)
"""


@newest
def test_several_workers_are_added_up(dsn: str, tmp_path: Path) -> None:
    """As under gunicorn: four processes count into one folder, and the sums are exact."""
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PGKV_DSN": dsn}
    workers = [subprocess.Popen([sys.executable, "-c", WORKER], env=environment) for _ in range(4)]
    assert [each.wait(60) for each in workers] == [0] * 4
    script = (
        "from prometheus_client import CollectorRegistry, generate_latest, multiprocess\n"
        "registry = CollectorRegistry(); multiprocess.MultiProcessCollector(registry)\n"
        "print(generate_latest(registry).decode())"
    )
    text = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert (
        'pgkv_operation_duration_seconds_count{operation="get",outcome="ok",table="kv_store"} 200.0'
        in text
    )
    calls = re.findall(
        r'pgkv_cached_calls_total\{function="shared:1",result="(hit|miss)"\} (\d+)', text
    )
    assert sum(int(count) for _, count in calls) == 200


# -- OpenTelemetry


class Seen:
    """What an application with an SDK collects."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.reader = InMemoryMetricReader()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.meters = MeterProvider(metric_readers=[self.reader])
        self.tracer = self.tracers.get_tracer("application")

    def spans(self) -> dict[str, Any]:
        return {each.name: each for each in self.exporter.get_finished_spans()}


@pytest.fixture
def seen() -> Iterator[Seen]:
    made = Seen()
    yield made
    PgkvInstrumentor().uninstrument()


def instrument(seen: Seen, **options: Any) -> None:
    PgkvInstrumentor().instrument(
        tracer_provider=seen.tracers, meter_provider=seen.meters, **options
    )


@newest
def test_spans_have_the_parent_of_their_thread_or_task(dsn: str, seen: Seen) -> None:
    instrument(seen)
    with pgkv.Store.connect(dsn) as store:

        def work(name: str) -> None:
            with seen.tracer.start_as_current_span(name):
                store.set(name, b"v")

        store.get("outside of any span")
        threads = [threading.Thread(target=work, args=(f"t{n}",)) for n in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()

    async def tasks() -> None:
        async with pgkv.AsyncStore.connect(dsn) as astore:

            async def work(name: str) -> None:
                with seen.tracer.start_as_current_span(name):
                    await astore.get(name)

            await asyncio.gather(*(work(f"a{n}") for n in range(4)))

    asyncio.run(tasks())
    spans = seen.exporter.get_finished_spans()
    parents = {each.context.span_id: each.name for each in spans if each.name[0] in "ta"}
    ours = [each for each in spans if each.name.endswith("kv_store")]
    found = [parents[each.parent.span_id] for each in ours if each.parent is not None]
    assert sorted(found) == sorted(parents.values())
    assert {each.name for each in ours} == {"set kv_store", "get kv_store"}
    assert all((each.end_time or 0) >= (each.start_time or 1) for each in ours)


@newest
def test_operations_that_travel_together_have_the_parents_of_their_own_tasks(
    dsn: str, seen: Seen
) -> None:
    instrument(seen)
    gate = asyncio.Event()

    async def tasks() -> None:
        async with pgkv.AsyncStore.connect(dsn, coalesce=True) as store:
            await store.set("ready", b"v")

            async def work(name: str, call: Any) -> None:
                with seen.tracer.start_as_current_span(name):
                    await gate.wait()
                    await call

            async def suppressed() -> None:
                with suppress_instrumentation():
                    await gate.wait()
                    await store.set("suppressed", b"v")

            calls = [work(f"write{n}", store.set(f"k{n}", b"v")) for n in range(4)]
            calls += [work(f"read{n}", store.get(f"r{n}")) for n in range(3)]
            waiting = [asyncio.create_task(each) for each in (suppressed(), *calls)]
            await asyncio.sleep(0)
            gate.set()  # all in one turn
            await asyncio.gather(*waiting)

    asyncio.run(tasks())
    spans = seen.exporter.get_finished_spans()
    names = {each.context.span_id: each.name for each in spans}
    parents = sorted(
        (each.name, names[each.parent.span_id]) for each in spans if each.parent is not None
    )
    # The reads are one statement: its span is a child of the first that asked.
    assert parents == [
        ("get_many kv_store", "read0"),
        *(("set kv_store", f"write{n}") for n in range(4)),
    ]


@newest
def test_attributes_follow_the_conventions(dsn: str, seen: Seen) -> None:
    instrument(seen, spans="always")
    with pgkv.Store.connect(dsn) as store:
        store.set_many({f"secret{n}": b"secret" for n in range(20)})
        store.set("text", b"no number")
        with pytest.raises(pgkv.InvalidValueError):
            store.increment("text")
    batch, failed = seen.spans()["set_many kv_store"], seen.spans()["increment kv_store"]
    assert dict(batch.attributes) == {
        "db.system.name": "postgresql",
        "db.operation.name": "set_many",
        "db.query.summary": "set_many kv_store",
        "db.collection.name": "kv_store",
        "db.operation.batch.size": 20,
    }
    assert batch.kind is trace.SpanKind.CLIENT
    assert failed.attributes["error.type"] == "InvalidValueError"
    assert not failed.status.is_ok
    shown = "".join(each.to_json() for each in seen.exporter.get_finished_spans())
    assert "secret" not in shown
    assert "no number" not in shown


@newest
def test_metrics_count_and_suppression_ends_both(dsn: str, seen: Seen) -> None:
    instrument(seen, spans="always")
    with pgkv.Store.connect(dsn) as store:
        store.get("k")
        with suppress_instrumentation():
            store.get("k")
        PgkvInstrumentor().uninstrument()
        store.get("k")
    data: Any = seen.reader.get_metrics_data()
    [metric] = data.resource_metrics[0].scope_metrics[0].metrics
    assert (metric.name, metric.unit) == ("db.client.operation.duration", "s")
    counts = {
        point.attributes["db.operation.name"]: point.count for point in metric.data.data_points
    }
    assert counts["get"] == 1
    assert [each.name for each in seen.exporter.get_finished_spans()].count("get kv_store") == 1


@newest
def test_the_agent_finds_pgkv_without_a_line_of_code(dsn: str, tmp_path: Path) -> None:
    """`opentelemetry-instrument python app.py`."""
    app = tmp_path / "app.py"
    app.write_text(
        "import os, pgkv\n"
        "from opentelemetry import trace\n"
        "with pgkv.Store.connect(os.environ['PGKV_DSN']) as store:\n"
        "    with trace.get_tracer('app').start_as_current_span('request'):\n"
        "        store.get('k')\n"
    )
    done = subprocess.run(
        [Path(sys.executable).with_name("opentelemetry-instrument"), sys.executable, app],
        env={
            **os.environ,
            "PGKV_DSN": dsn,
            "OTEL_TRACES_EXPORTER": "console",
            "OTEL_METRICS_EXPORTER": "none",
            "OTEL_LOGS_EXPORTER": "none",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert '"name": "get kv_store"' in done.stdout


def test_a_wrong_setting_is_refused() -> None:
    with pytest.raises(pgkv.ConfigError, match="'parent', 'always' or 'never'"):
        PgkvInstrumentor().instrument(spans="sometimes")
    PgkvInstrumentor().uninstrument()
