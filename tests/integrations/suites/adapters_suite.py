"""Adapters whose projects ship no tests for others: each contract, method by method."""

import asyncio
import inspect
import itertools
import os
import threading

import pytest
from psycopg.conninfo import conninfo_to_dict

from pgkv import AsyncStore, Config, ConfigError, Store

DSN = os.environ["PGKV_SUITE_DSN"]
told = conninfo_to_dict(DSN)
URL = f":///{told['dbname']}?host={told['host']}&port={told['port']}&user={told['user']}"


@pytest.fixture
def store():
    with Store.connect(DSN) as made:
        made.clear()
        yield made


@pytest.fixture
async def astore():
    async with AsyncStore.connect(DSN) as made:
        await made.clear()
        yield made


# -- Litestar


async def test_litestar(astore):
    from pgkv.integrations.litestar import LitestarStore

    root = LitestarStore(astore)
    await root.set("k", "text", expires_in=600)
    await root.set("forever", b"bytes")
    assert await root.get("k") == b"text"
    assert 500 < await root.expires_in("k") <= 600
    assert await root.expires_in("forever") is None
    assert await root.expires_in("none") is None
    assert await root.get("k", renew_for=6000) == b"text"
    assert await root.expires_in("k") > 5000
    assert await root.get("forever", renew_for=600) == b"bytes"
    assert await root.expires_in("forever") is None  # nothing to renew
    assert await root.get("none", renew_for=600) is None
    child = root.with_namespace("child")
    grandchild = child.with_namespace("grand")
    await child.set("k", "c")
    await grandchild.set("k", "g")
    await child.delete_all()
    assert await root.exists("k")
    assert not await child.exists("k")
    assert not await grandchild.exists("k")
    await root.delete("k")
    await root.delete("k")
    assert not await root.exists("k")


async def test_litestar_serves_cached_responses_and_sessions():
    from litestar import Litestar, Request, get
    from litestar.middleware.rate_limit import RateLimitConfig
    from litestar.middleware.session.server_side import ServerSideSessionConfig
    from litestar.testing import AsyncTestClient

    from pgkv.integrations.litestar import LitestarStore

    calls = []

    @get("/cached", cache=60)
    async def cached() -> str:
        calls.append(1)
        return "once"

    @get("/count")
    async def count(request: Request) -> int:
        request.session["n"] = request.session.get("n", 0) + 1
        return request.session["n"]

    @get("/limited", middleware=[RateLimitConfig(("day", 2), store="limits").middleware])
    async def limited() -> str:
        return "ok"

    astore = AsyncStore(Config(DSN))  # belongs to the loop of its first operation, the client's
    root = LitestarStore(astore)
    app = Litestar(
        [cached, count, limited],
        stores={
            "response_cache": root.with_namespace("responses"),
            "sessions": root.with_namespace("sessions"),
            "limits": root.with_namespace("limits"),
        },
        middleware=[ServerSideSessionConfig().middleware],
        on_shutdown=[astore.close],
    )
    async with AsyncTestClient(app) as client:
        assert [(await client.get("/cached")).text for _ in range(2)] == ["once", "once"]
        assert [(await client.get("/count")).json() for _ in range(3)] == [1, 2, 3]
        codes = [(await client.get("/limited")).status_code for _ in range(3)]
        assert codes == [200, 200, 429]
    assert calls == [1]


# -- LangGraph


def test_langgraph(store):
    from pgkv.integrations.langgraph import LangGraphCache

    cache = LangGraphCache(store)
    a, ab, other = (("a",), "k"), (("a", "b"), "k"), (("a:", "b"), "k")
    cache.set({a: ({"x": [1]}, None), ab: ("two", 60), other: ("three", 60)})
    assert cache.get([a, ab, other, (("none",), "k")]) == {a: {"x": [1]}, ab: "two", other: "three"}
    cache.clear([("a",)])
    assert cache.get([a, ab, other]) == {ab: "two", other: "three"}
    store.set("mine", b"stays")
    cache.clear()
    assert cache.get([ab, other]) == {}
    assert store.exists("mine")
    with pytest.raises(ConfigError, match="astore"):
        asyncio.run(cache.aget([a]))


async def test_langgraph_async(astore):
    from pgkv.integrations.langgraph import LangGraphCache

    cache = LangGraphCache(astore=astore)
    key = (("a",), "k")
    await cache.aset({key: ("v", 60)})
    assert await cache.aget([key]) == {key: "v"}
    await cache.aclear([("a",)])
    assert await cache.aget([key]) == {}
    with pytest.raises(ConfigError, match="blocking"):
        cache.get([key])


async def test_a_graph_runs_a_node_once(store, astore):
    """LangGraph's own graph, blocking and async: the second run takes the node's value from the cache."""
    from typing import TypedDict

    from langgraph.graph import StateGraph
    from langgraph.types import CachePolicy

    from pgkv.integrations.langgraph import LangGraphCache

    class State(TypedDict):
        n: int

    calls = []

    def double(state):
        calls.append(state["n"])
        return {"n": 2 * state["n"]}

    graph = StateGraph(State).add_node("double", double, cache_policy=CachePolicy(ttl=60))
    graph = graph.set_entry_point("double").set_finish_point("double")
    made = graph.compile(cache=LangGraphCache(store, astore=astore))
    assert [made.invoke({"n": 2})["n"] for _ in range(2)] == [4, 4]
    assert (await made.ainvoke({"n": 2}))["n"] == 4
    assert [(await made.ainvoke({"n": 3}))["n"] for _ in range(2)] == [6, 6]
    assert calls == [2, 3]


# -- Celery


def celery_app(url):
    from celery import Celery

    app = Celery("app", broker="memory://", backend=url)
    app.conf.update(task_always_eager=True, task_store_eager_result=True, result_expires=600)
    return app


def test_celery_keeps_results_and_counts_chords():
    from pgkv.integrations.celery import CeleryBackend

    app = celery_app("pgkv+postgresql" + URL)
    assert isinstance(app.backend, CeleryBackend)  # found by its entry point

    @app.task
    def add(x, y):
        return x + y

    result = add.delay(2, 3)
    assert result.get() == 5
    assert app.AsyncResult(result.id).get() == 5
    backend = app.backend
    backend.set("k", "v")
    assert backend.mget(["k", "none"]) == [b"v", None]
    assert 500 < backend._store.ttl("k") <= 600
    assert [backend.incr("chord"), backend.incr("chord")] == [1, 2]
    backend.expire("chord", 1000)
    assert 900 < backend._store.ttl("chord") <= 1000
    backend.delete("k")
    assert backend.get("k") is None
    backend.cleanup()
    backend._store.close()


def test_a_chord_of_a_worker_is_counted_in_the_table():
    """Its last task finds that it is the last one, by an increment; groups keep their order."""
    from celery import chord, group
    from celery.contrib.testing.worker import start_worker

    app = celery_app("pgkv+postgresql" + URL)
    app.conf.update(task_always_eager=False, task_store_eager_result=False)

    @app.task
    def double(n):
        return 2 * n

    @app.task
    def total(found):
        return sum(found)

    with start_worker(app, pool="solo", perform_ping_check=False, loglevel="error"):
        assert group(double.s(n) for n in range(5)).delay().get(timeout=60) == [0, 2, 4, 6, 8]
        assert chord((double.s(n) for n in range(5)), total.s()).delay().get(timeout=60) == 20
    app.backend._store.close()


# -- dramatiq


def test_dramatiqs_limiters(store):
    from dramatiq.rate_limits import (
        Barrier,
        BucketRateLimiter,
        ConcurrentRateLimiter,
        WindowRateLimiter,
    )

    from pgkv.integrations.dramatiq import DramatiqBackend

    backend = DramatiqBackend(store)
    mutex = ConcurrentRateLimiter(backend, "mutex", limit=1)
    with (
        mutex.acquire(raise_on_failure=False) as first,
        mutex.acquire(raise_on_failure=False) as second,
    ):
        assert (first, second) == (True, False)
    with mutex.acquire(raise_on_failure=False) as again:
        assert again
    bucket = BucketRateLimiter(backend, "bucket", limit=2, bucket=86_400_000)
    assert [bucket._acquire() for _ in range(3)] == [True, True, False]
    window = WindowRateLimiter(backend, "window", limit=2, window=300)
    assert [window._acquire() for _ in range(3)] == [True, True, False]
    barrier = Barrier(backend, "barrier", ttl=60_000)
    assert barrier.create(parties=2)
    assert not barrier.create(parties=2)
    assert not barrier.wait(block=False)
    waiter = threading.Thread(target=lambda: barrier.wait(timeout=20_000))
    waiter.start()
    assert barrier.wait(block=False)
    waiter.join(30)
    assert not waiter.is_alive()


def test_dramatiqs_window_is_never_passed_by_many(store):
    from dramatiq.rate_limits import WindowRateLimiter

    from pgkv.integrations.dramatiq import DramatiqBackend

    window = WindowRateLimiter(DramatiqBackend(store), "storm", limit=5, window=300)
    granted = []

    def work():
        for _ in range(5):
            try:
                granted.append(window._acquire())
            except Exception:
                granted.append(False)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert sum(granted) == 5


# -- Flask-Caching, Flask-Limiter


def test_flask_caching(store):
    from flask import Flask
    from flask_caching import Cache

    app = Flask("app")
    app.config.update(
        CACHE_TYPE="pgkv.integrations.cachelib.CachelibCache",
        CACHE_ARGS=[store],
        CACHE_DEFAULT_TIMEOUT=60,
    )
    cache = Cache(app)
    calls = []

    @app.get("/")
    @cache.cached()
    def index():
        calls.append(1)
        return "once"

    client = app.test_client()
    assert [client.get("/").text for _ in range(2)] == ["once", "once"]
    assert calls == [1]
    assert len(store.keys()) == 1


def test_flask_limiter():
    from flask import Flask
    from flask_limiter import Limiter

    import pgkv.integrations.limits  # noqa: F401  # registers pgkv://

    app = Flask("app")
    limiter = Limiter(
        lambda: "all",
        app=app,
        storage_uri="pgkv" + URL,
        strategy="moving-window",
        default_limits=["2/day"],
    )

    @app.get("/")
    def index():
        return "ok"

    client = app.test_client()
    assert [client.get("/").status_code for _ in range(3)] == [200, 200, 429]
    limiter.storage.close()


STRATEGIES = ("FixedWindow", "MovingWindow", "SlidingWindowCounter")


async def awaited(answer):
    return await answer if inspect.isawaitable(answer) else answer


@pytest.mark.parametrize("scheme", ["pgkv", "async+pgkv"])
@pytest.mark.parametrize(("old", "new"), [*itertools.permutations(STRATEGIES, 2)])
async def test_a_limit_whose_strategy_changes(old, new, scheme):
    """The new strategy begins with nothing used, while processes with the old one go on with theirs, and
    both clear what belongs to the limit."""
    from limits import RateLimitItemPerDay, strategies
    from limits.aio import strategies as aio_strategies
    from limits.storage import storage_from_string

    storage = storage_from_string(scheme + URL)
    module = aio_strategies if scheme.startswith("async") else strategies
    before, after = (getattr(module, f"{each}RateLimiter")(storage) for each in (old, new))
    item = RateLimitItemPerDay(3)
    await awaited(storage.reset())
    for rounds in range(3):
        assert await awaited(before.hit(item, "k"))
        assert await awaited(after.test(item, "k"))
        assert (await awaited(after.get_window_stats(item, "k"))).remaining == 3 - rounds
        assert await awaited(after.hit(item, "k"))
    for each in (before, after):
        assert not await awaited(each.hit(item, "k"))
        assert (await awaited(each.get_window_stats(item, "k"))).remaining == 0
    await awaited(after.clear(item, "k"))
    assert [await awaited(each.hit(item, "k")) for each in (before, after)] == [True, True]
    wider = RateLimitItemPerDay(4)
    assert [await awaited(after.hit(wider, "k")) for _ in range(5)] == [True] * 4 + [False]
    await awaited(storage.close())


def test_flask_limiter_with_another_strategy():
    from flask import Flask
    from flask_limiter import Limiter

    import pgkv.integrations.limits  # noqa: F401  # registers pgkv://

    for strategy in ("fixed-window", "sliding-window-counter", "moving-window", "fixed-window"):
        app = Flask("app")
        limiter = Limiter(
            lambda: "changed",
            app=app,
            storage_uri="pgkv" + URL,
            strategy=strategy,
            default_limits=["2/day"],
        )
        app.get("/")(lambda: "ok")
        codes = [app.test_client().get("/").status_code for _ in range(3)]
        expected = [429] * 3 if codes[0] == 429 else [200, 200, 429]
        assert codes == expected
        limiter.storage.close()


def test_slowapi():
    import slowapi
    from fastapi import FastAPI, Request
    from fastapi.testclient import TestClient
    from slowapi.errors import RateLimitExceeded

    import pgkv.integrations.limits  # noqa: F401  # registers pgkv://

    app = FastAPI()
    limiter = slowapi.Limiter(lambda: "slow", storage_uri="pgkv" + URL)
    app.state.limiter = limiter
    app.add_exception_handler(RateLimitExceeded, slowapi._rate_limit_exceeded_handler)

    @app.get("/")
    @limiter.limit("2/day")
    async def index(request: Request):
        return "ok"

    client = TestClient(app)
    assert [client.get("/").status_code for _ in range(3)] == [200, 200, 429]
    limiter._storage.close()


async def test_the_async_storage_of_limits():
    """Every method of the contract, awaited; what pgkv raises is limits' error where that was asked for."""
    from limits import RateLimitItemPerDay
    from limits.aio import strategies
    from limits.errors import StorageError
    from limits.storage import storage_from_string

    storage = storage_from_string("async+pgkv" + URL, wrap_exceptions=True)
    assert await storage.check() is True
    await storage.reset()
    item = RateLimitItemPerDay(2)
    for kind in ("FixedWindow", "MovingWindow", "SlidingWindowCounter"):
        limiter = getattr(strategies, f"{kind}RateLimiter")(storage)
        assert [await limiter.hit(item, kind) for _ in range(3)] == [True, True, False]
        assert (await limiter.get_window_stats(item, kind)).remaining == 0
        await limiter.clear(item, kind)
        assert await limiter.test(item, kind)
        await limiter.hit(item, kind)
    assert await storage.reset() == 3
    with pytest.raises(StorageError):
        await storage.incr("\0", 60)
    await storage.close()


def test_flask_session(store):
    import flask
    import flask_session

    from pgkv.integrations.cachelib import CachelibCache

    app = flask.Flask("app")
    app.config.update(SESSION_TYPE="cachelib", SESSION_CACHELIB=CachelibCache(store))
    flask_session.Session(app)

    @app.get("/")
    def index():
        flask.session["n"] = flask.session.get("n", 0) + 1
        return str(flask.session["n"])

    @app.get("/leave")
    def leave():
        flask.session.clear()
        return "gone"

    one, other = app.test_client(), app.test_client()
    assert [each.get("/").text for each in (one, one, other, one)] == ["1", "2", "1", "3"]
    assert len(store.keys("session:")) == 2
    one.get("/leave")
    assert one.get("/").text == "1"


@pytest.mark.parametrize("kind", ["acquire_entry", "acquire_sliding_window_entry"])
def test_a_window_of_limits_is_never_passed_by_many(kind):
    from pgkv.integrations.limits import PgkvStorage

    storage = PgkvStorage("pgkv" + URL)
    acquire = getattr(storage, kind)
    granted = []
    threads = [
        threading.Thread(target=lambda: granted.extend(acquire(kind, 20, 3600) for _ in range(10)))
        for _ in range(6)
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert sum(granted) == 20
    storage.close()


# -- Alembic


def test_alembic_leaves_pgkvs_tables_alone_and_makes_them(store):
    import sqlalchemy
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext
    from alembic.operations import Operations

    from pgkv.integrations.alembic import include_object

    engine = sqlalchemy.create_engine("postgresql+psycopg" + URL)
    metadata = sqlalchemy.MetaData()
    mine = sqlalchemy.Table("mine", metadata, sqlalchemy.Column("id", sqlalchemy.Integer))
    with engine.begin() as conn:
        op = Operations(MigrationContext.configure(conn))
        op.create_pgkv_tables("app_cache")
        names = set(sqlalchemy.inspect(conn).get_table_names())
        assert {"app_cache", "app_cache_locks", "app_cache_sessions"} <= names

        def differences(**options):
            context = MigrationContext.configure(conn, opts=options)
            return [(each[0], each[1].name) for each in compare_metadata(context, metadata)]

        assert ("remove_table", "app_cache_sessions") in differences()
        judged = include_object("kv_store", "app_cache", "celery_results", "limits")
        assert differences(include_object=judged) == [("add_table", "mine")]
        only_pgkv = include_object(
            "kv_store", "app_cache", "celery_results", "limits", then=lambda *_: False
        )
        assert differences(include_object=only_pgkv) == []
        assert mine.name == "mine"
        op.drop_pgkv_tables("app_cache")
        assert "app_cache" not in sqlalchemy.inspect(conn).get_table_names()
        assert "kv_store" in sqlalchemy.inspect(conn).get_table_names()
    engine.dispose()


def test_alembics_operation_is_undone_and_printed():
    from alembic.migration import MigrationContext
    from alembic.operations import Operations

    from pgkv.integrations.alembic import PgkvTablesOp

    none = {"locks": False, "sessions": False, "idempotency": False, "queues": False}
    assert PgkvTablesOp("app", None, False, none).sql().count("CREATE UNLOGGED TABLE") == 1
    assert PgkvTablesOp("app", None, True, none).sql() == 'DROP TABLE IF EXISTS "app"'
    made = PgkvTablesOp("app", "cache", False, {"locks": False})
    assert "CREATE UNLOGGED TABLE" in made.sql()
    assert "_locks" not in made.sql()
    assert made.reverse().sql().startswith('DROP TABLE IF EXISTS "cache"."app", ')
    lines = []
    context = MigrationContext.configure(
        dialect_name="postgresql",
        opts={
            "as_sql": True,
            "output_buffer": type("Out", (), {"write": lines.append, "flush": lambda: None}),
        },
    )
    Operations(context).create_pgkv_tables("app")  # alembic upgrade --sql
    assert "CREATE UNLOGGED TABLE" in "".join(lines)
