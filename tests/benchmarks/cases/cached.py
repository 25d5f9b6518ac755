"""The cache decorator: a hit, a miss and a stale hit of a function that returns a small dict.

Against what Python's users take: dogpile.cache, cashews and aiocache on Redis, diskcache on its own
SQLite, functools.lru_cache. Those that are not installed are left out.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import tempfile
from collections.abc import Callable
from itertools import count, cycle
from typing import Any

import pgkv
from tests.benchmarks.case import GET, KEYS, PGKV, Bench, Entrants, case, each

GET_MANY = "get_many of 2"
L1 = "pgkv with l1"
DOGPILE, CASHEWS, AIOCACHE = "dogpile.cache", "cashews", "aiocache"
DISKCACHE, LRU = "diskcache", "functools.lru_cache"
USERS = range(1000)
OPTIONS: dict[str, Any] = {"store_timeout": 10.0, "beta": 0}


def load(user_id: int) -> dict[str, Any]:
    return {"id": user_id, "name": "Ann", "tags": ["a", "b"]}


async def load_async(user_id: int) -> dict[str, Any]:
    return load(user_id)


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def cached(bench: Bench, fn: Any = load, **options: Any) -> Any:
    store = bench.async_store() if fn is load_async else bench.store()
    return pgkv.cached(**{"ttl": 3600, "store": store, **OPTIONS, **options})(fn)


def sync_peers(bench: Bench) -> dict[str, Callable[[int], object]]:
    """The same function, cached by others."""
    found: dict[str, Callable[[int], object]] = {LRU: functools.lru_cache(load)}
    if bench.redis() is not None and has("dogpile"):
        from dogpile.cache import make_region

        region = make_region().configure(
            "dogpile.cache.redis",
            arguments={"url": f"unix://{bench.redis_socket}"},
            expiration_time=3600,
        )
        found[DOGPILE] = region.cache_on_arguments()(load)
    if has("diskcache"):
        diskcache: Any = importlib.import_module("diskcache")  # untyped
        directory = tempfile.TemporaryDirectory()
        bench.closing(directory.cleanup)
        disk = diskcache.Cache(directory.name)
        bench.closing(disk.close)
        found[DISKCACHE] = disk.memoize()(load)
    return found


def async_peers(bench: Bench) -> dict[str, Callable[[int], Any]]:
    """The same coroutine, cached by others."""
    found: dict[str, Callable[[int], Any]] = {}
    if bench.redis() is None:
        return found
    if has("cashews"):
        from cashews import Cache
        from cashews.backends.redis import Redis as CashewsRedis
        from cashews.picklers import PicklerType
        from cashews.wrapper.backend_settings import register_backend

        # It knows unix sockets, but has no name for them.
        register_backend("unix", CashewsRedis, pass_uri=True, pickler=PicklerType.DEFAULT)
        cache = Cache()
        cache.setup(f"unix://{bench.redis_socket}")
        bench.closing(lambda: bench.wait(cache.close()))
        found[CASHEWS] = cache(ttl=3600)(load_async)
    if has("aiocache"):
        from redis.asyncio import Redis

        aiocache: Any = importlib.import_module("aiocache")  # untyped
        json: Any = importlib.import_module("aiocache.serializers")

        class UnixCache(aiocache.RedisCache):  # type: ignore[misc]  # untyped
            """On a unix socket, as the others are."""

            def __init__(self, **kwargs: Any) -> None:
                super().__init__(**kwargs)
                self.client = Redis(unix_socket_path=bench.redis_socket)

        decorator = aiocache.cached(ttl=3600, cache=UnixCache, serializer=json.JsonSerializer())
        found[AIOCACHE] = decorator(load_async)
        bench.closing(lambda: bench.wait(decorator.cache.client.aclose()))
    return found


@case(
    "cached hit, sync",
    {GET: (1.6, 1.35), GET_MANY: None, DOGPILE: 0.8, DISKCACHE: None, (L1, LRU): None},
)
def hit(bench: Bench) -> Entrants:
    functions = {PGKV: cached(bench), L1: cached(bench, l1=pgkv.L1(ttl=3600)), **sync_peers(bench)}
    for name, function in functions.items():
        for user in USERS:
            function(user)
        yield name, each(function, cycle(USERS))
    store = bench.store()
    bench.vacuum()
    yield GET, each(store.get, cycle(KEYS))
    pairs = [[f"bench:{n:05}", "no such key"] for n in USERS]
    yield GET_MANY, each(store.get_many, cycle(pairs))


@case("cached miss, sync", {DOGPILE: None, DISKCACHE: None})
def miss(bench: Bench) -> Entrants:
    functions = {PGKV: cached(bench), **sync_peers(bench)}
    for name, function in functions.items():
        if name != LRU:
            yield name, each(function, count(10_000))


@case("cached stale hit, sync", {GET_MANY: None})
def stale_hit(bench: Bench) -> Entrants:
    """Served while a refresh that lasts runs behind."""
    import threading

    gate = threading.Event()
    bench.closing(gate.set)
    calls: list[int] = []

    def slow(user_id: int) -> dict[str, Any]:
        calls.append(user_id)
        if len(calls) > 1:
            gate.wait(120)
        return load(user_id)

    function = cached(bench, slow, ttl=0.001, stale=3600)
    function(1)
    while function.cache_info().stale_hits == 0:
        function(1)
    yield PGKV, each(function, cycle([1]))
    pair = ["bench:00001", "no such key"]
    yield GET_MANY, each(bench.store().get_many, cycle([pair]))


@case("cached hit, async", {CASHEWS: None, AIOCACHE: None})
def async_hit(bench: Bench) -> Entrants:
    functions = {
        PGKV: cached(bench, load_async),
        L1: cached(bench, load_async, l1=pgkv.L1(ttl=3600)),
        **async_peers(bench),
    }
    for name, function in functions.items():

        async def fill(function: Any = function) -> None:
            for user in USERS:
                await function(user)

        bench.wait(fill())
        yield name, repeated(bench, function, cycle(USERS))


@case("cached miss, async", {CASHEWS: None, AIOCACHE: None})
def async_miss(bench: Bench) -> Entrants:
    for name, function in {PGKV: cached(bench, load_async), **async_peers(bench)}.items():
        yield name, repeated(bench, function, count(10_000))


def repeated(bench: Bench, function: Any, inputs: Any) -> Callable[[int], object]:
    """Await one call after the other."""

    async def work(n: int) -> None:
        for _ in range(n):
            await function(next(inputs))

    return lambda n: bench.wait(work(n))
