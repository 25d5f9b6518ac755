"""Prometheus and OpenTelemetry see what pgkv does, and nothing of keys and values."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pgkv
from pgkv import _observe
from pgkv.integrations import prometheus
from pgkv.patterns.overview import Overviews
from tests.faults.proxy import Proxy
from tests.faults.support import newest
from tests.servers import PATIENCE, wait_until

pytest.importorskip("prometheus_client", reason="prometheus_client is not installed")
pytest.importorskip("opentelemetry.sdk", reason="opentelemetry-sdk is not installed")
pytest.importorskip(
    "opentelemetry.instrumentation", reason="opentelemetry-instrumentation is not installed"
)

import psycopg
from opentelemetry import trace
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

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

        @pgkv.cached(ttl=60, store=store, name="slow", store_timeout=PATIENCE)
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
        assert 'pgkv_cached_calls_total{function="slow:1",result="hit"} 1.0' in text
        assert "secret" not in text

        sessions = pgkv.SessionStore(store)
        session = sessions.create({"a": 1})
        sessions.load(session.id)
        sessions.destroy(session)
        assert sessions.load(session.id) is None
        for result in ("hit", "miss"):
            assert one("pgkv_keys_total", table="kv_store_sessions", result=result) == 1
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


@newest
def test_locks_limiters_sweeps_and_pools_are_counted(
    dsn: str, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A store of an earlier test lives on with its pool while a traceback keeps it.
    monkeypatch.setattr(_observe, "pools", weakref.WeakSet())

    def one(name: str, **labels: str) -> float | None:
        generate_latest(registry)  # a scrape brings gauges up to date
        return registry.get_sample_value(name, labels)

    with pgkv.Store.connect(dsn, pool_max_size=2) as store:
        lock = pgkv.Lock(store, "billing")
        with lock.acquire():
            assert pgkv.Lock(store, "billing").try_acquire() is None
        assert one("pgkv_lock_wait_seconds_count", lock="billing") == 1
        assert one("pgkv_lock_hold_seconds_count", lock="billing") == 1
        assert one("pgkv_events_total", event="pgkv.lock.denied") == 1

        limiter = pgkv.RateLimiter(store, "1/h", name="mails", timeout=30)
        assert [limiter.hit("secret").allowed for _ in range(3)] == [True, False, False]
        assert one("pgkv_limiter_decisions_total", limiter="mails", decision="allowed") == 1
        assert one("pgkv_limiter_decisions_total", limiter="mails", decision="denied") == 2

        with store.transaction() as view:
            view.get("k")
            assert one("pgkv_pool_connections", state="used") == 1
        assert one("pgkv_pool_connections", state="used") == 0
        assert one("pgkv_pool_connections", state="idle") == 1
        assert one("pgkv_pool_waiting") == 0


@newest
def test_a_wait_for_a_connection_is_told_to_threads_and_tasks(
    dsn: str, registry: CollectorRegistry
) -> None:
    told: list[tuple[str, dict[str, Any]]] = []
    remove = pgkv.on_event(
        lambda event: told.append((event.name, dict(event.fields))), kinds=["pool"]
    )

    def waited() -> list[str]:
        return [of["operation"] for name, of in told if name == "pgkv.pool.waited"]

    def counted(name: str) -> int:
        return sum(each == name for each, _ in told)

    patient: Any = {"pool_timeout": PATIENCE, "operation_timeout": PATIENCE}
    with pgkv.Store.connect(dsn, pool_max_size=1, **patient) as store:
        with store.transaction() as view:
            view.get("k")
            getter = threading.Thread(target=store.get, args=("k",))
            getter.start()
            while not store.pool_stats().waiting:
                getter.join(0.001)
            assert registry.get_sample_value("pgkv_pool_waiting") == 1
        getter.join()
        assert waited() == ["get"]
        assert counted("pgkv.pool.opened") == 1
    with (
        pgkv.Store.connect(dsn, pool_max_size=1, pool_timeout=0.01) as store,
        store.transaction() as view,
    ):
        view.get("k")
        with pytest.raises(pgkv.PoolTimeoutError):
            store.get("k")
    assert counted("pgkv.pool.timeout") == 1
    assert registry.get_sample_value("pgkv_pool_timeouts_total") == 1

    async def tasks() -> None:
        async with pgkv.AsyncStore.connect(dsn, pool_max_size=1, **patient) as store:
            async with store.transaction() as view:
                await view.get("k")
                getter = asyncio.create_task(store.set("k", b"v"))
                while not store.pool_stats().waiting:
                    await asyncio.sleep(0)
            await getter

    told.clear()
    asyncio.run(tasks())
    remove()
    assert waited() == ["set"]
    assert registry.get_sample_value("pgkv_pool_wait_seconds_count") == 3


@newest
def test_the_server_is_asked_about_tables_locks_and_queues(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a scrape does not fail without it, nor does it show what was."""
    made = CollectorRegistry()
    one = made.get_sample_value
    monkeypatch.setattr(prometheus, "LOOK_TIME", 30.0)
    monkeypatch.setattr(prometheus, "REFRESH", 3600.0)
    with Proxy(dsn) as proxy, pgkv.Store.connect(proxy.dsn, pool_max_size=1) as store:
        queue = pgkv.Queue(store, "emails")
        queue.put(b"a")
        queue.put(b"b", delay=3600)
        remove = prometheus.install(made, store=store)
        with pgkv.Lock(store, "billing").acquire():
            generate_latest(made)
            assert one("pgkv_up") == 1
            assert one("pgkv_locks_held") == 1
            states = ("waiting", "delayed", "dead")
            depths = [one("pgkv_queue_jobs", {"queue": "emails", "state": s}) for s in states]
            assert depths == [1, 1, 0]
            assert (one("pgkv_table_bytes", {"table": "kv_store_jobs"}) or 0) > 8000
            store.set("k", "v")
        with monkeypatch.context() as patched:
            looked: list[None] = []
            patched.setattr(Overviews, "look", lambda _: looked.append(None))
            generate_latest(made)
            assert looked == [], "asked a moment ago"
        monkeypatch.setattr(prometheus, "REFRESH", 0.0)
        remove()
        remove = prometheus.install(made, store=store)
        proxy.refuse()
        proxy.reset_all()
        monkeypatch.setattr(prometheus, "LOOK_TIME", 0.5)
        assert "pgkv_up 0.0" in generate_latest(made).decode()
        assert one("pgkv_table_bytes", {"table": "kv_store_jobs"}) is None
        proxy.listen()
        monkeypatch.setattr(prometheus, "LOOK_TIME", 30.0)
        generate_latest(made)
        assert one("pgkv_up") == 1
        remove()


def test_another_store_is_refused() -> None:
    store = pgkv.AsyncStore(pgkv.Config("postgresql:///x"))
    with pytest.raises(pgkv.ConfigError, match=r"install\(\) needs a Store, not AsyncStore"):
        prometheus.install(CollectorRegistry(), store=store)  # type: ignore[arg-type]


def test_every_query_of_the_dashboard_is_of_a_metric() -> None:
    made = CollectorRegistry()
    with pgkv.Store(pgkv.Config("postgresql:///x")) as store:
        remove = prometheus.install(made, store=store)
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
    f = pgkv.cached(ttl=60, store=store, name="shared", store_timeout=60)(lambda n: n)
    for n in range(50):
        store.get("k")
        f(7)
"""


@newest
def test_several_workers_are_added_up(dsn: str, tmp_path: Path) -> None:
    """As under gunicorn: four processes count into one folder, and the sums are exact."""
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PGKV_DSN": dsn}
    workers = [subprocess.Popen([sys.executable, "-c", WORKER], env=environment) for _ in range(4)]
    assert [each.wait(PATIENCE) for each in workers] == [0] * 4
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


GAUGES = """
import os, sys, pgkv
from pgkv.integrations import prometheus
with pgkv.Store.connect(os.environ["PGKV_DSN"]) as store:
    store.set("k", "v")
    prometheus.install(store=store)
    limiter = pgkv.RateLimiter(store, "1000/s", name="api", timeout=30)
    limiter.hit("a")
    if os.fork():
        store.get("k")
        sys.stdin.read()
        os.wait()
    limiter.hit("a")
"""


@newest
def test_gauges_of_several_workers(dsn: str, tmp_path: Path) -> None:
    """Each worker keeps them true by itself: no scrape calls it. A forked one counts from zero."""
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PGKV_DSN": dsn}
    workers = [
        subprocess.Popen([sys.executable, "-c", GAUGES], env=environment, stdin=subprocess.PIPE)
        for _ in range(2)
    ]
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(tmp_path))  # type: ignore[no-untyped-call]  # prometheus_client's

    def one(name: str, **labels: str) -> float | None:
        with contextlib.suppress(struct.error):  # a file that a worker is just creating
            return registry.get_sample_value(name, labels)
        return None

    try:
        wait_until(
            # More than one of each, where its thread asked while a call ran.
            lambda: (one("pgkv_pool_connections", state="idle") or 0) >= 2 and one("pgkv_up") == 1,
            "both workers have told",
            PATIENCE,
        )
        assert (one("pgkv_table_bytes", table="kv_store") or 0) > 8000
    finally:
        for each in workers:
            each.communicate(timeout=PATIENCE)
    assert [each.returncode for each in workers] == [0, 0]
    assert one("pgkv_limiter_decisions_total", limiter="api", decision="allowed") == 6


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
    # The reads are one statement: its span is a child of the first that asked, with links.
    merged = next(each for each in spans if each.name == "get_many kv_store")
    assert [names[link.context.span_id] for link in merged.links] == ["read1", "read2"]
    assert parents == [
        ("get_many kv_store", "read0"),
        *(("set kv_store", f"write{n}") for n in range(4)),
    ]


def server_of(dsn: str) -> dict[str, Any]:
    """What the attributes of a span say of the server."""
    with psycopg.connect(dsn) as conn:
        info = conn.info
        return {
            "server.address": info.host,
            "server.port": info.port,
            "db.namespace": info.dbname,
        }


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
        **server_of(dsn),
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
    metrics = data.resource_metrics[0].scope_metrics[0].metrics
    [metric] = [each for each in metrics if each.name != "pgkv.events"]
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
        timeout=2 * PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert '"name": "get kv_store"' in done.stdout


@newest
def test_events_are_counted_and_are_on_the_span_they_happen_in(dsn: str, seen: Seen) -> None:
    instrument(seen)
    with pgkv.Store.connect(dsn, max_entries=100) as store:
        with seen.tracer.start_as_current_span("work"), pgkv.Lock(store, "billing").acquire():
            pass
        store.set_many({f"k{n}": b"v" for n in range(500)})
        store.evict()
    [work] = [each for each in seen.exporter.get_finished_spans() if each.name == "work"]
    names = ["pgkv.table.create", "pgkv.lock.acquired", "pgkv.lock.released"]
    assert [each.name for each in work.events if each.name in names][-2:] == names[1:]
    data: Any = seen.reader.get_metrics_data()
    metrics = {each.name: each for each in data.resource_metrics[0].scope_metrics[0].metrics}
    counted = {
        point.attributes["event.name"]: point.value
        for point in metrics["pgkv.events"].data.data_points
    }
    assert counted["pgkv.lock.acquired"] == 1
    assert {"pgkv.pool.opened", "pgkv.evict.evicted"} <= set(counted)


def test_a_wrong_setting_is_refused() -> None:
    with pytest.raises(pgkv.ConfigError, match="'parent', 'always' or 'never'"):
        PgkvInstrumentor().instrument(spans="sometimes")
    PgkvInstrumentor().uninstrument()
