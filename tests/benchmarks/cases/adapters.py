"""Adapters through the interfaces that programs call: Django's cache and sessions, Flask-Session, limits'
strategies; each against that interface on Redis, and Django's against its own backends."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib import import_module  # Django has no types: mypy looks away
from itertools import count, cycle
from typing import Any

from limits import RateLimitItemPerSecond
from limits.storage import RedisStorage
from limits.strategies import FixedWindowRateLimiter, SlidingWindowCounterRateLimiter

import pgkv.integrations.limits  # registers pgkv://
from pgkv.integrations.cachelib import CachelibCache
from tests.benchmarks.case import PGKV, Bench, Entrants, case, each
from tests.benchmarks.cases.session import (
    DATA,
    FLASK,
    LIFETIME,
    django_sessions,
    flask_sessions,
    flask_sessions_in,
)

DJANGO_REDIS = "django-redis"
DATABASE = "Django DatabaseCache"
LOCMEM = "Django LocMemCache"
DB_SESSIONS = "Django db sessions"
LIMITS_REDIS = "limits on Redis"
KEYS = [f"key-{n}" for n in range(100)]
VALUE = "x" * 100
LIMIT = RateLimitItemPerSecond(1_000_000)


def django_caches(bench: Bench) -> Iterator[tuple[str, Any]]:
    """The same interface over four backends, each filled."""
    django_sessions(bench)  # configures Django
    found = [(PGKV, "pgkv.integrations.django.PgkvCache", bench.dsn)]
    if client := bench.redis():
        path = client.connection_pool.connection_kwargs["path"]
        found.append((DJANGO_REDIS, "django_redis.cache.RedisCache", f"unix://{path}"))
    found.append((DATABASE, "django.core.cache.backends.db.DatabaseCache", "bench_cache"))
    found.append((LOCMEM, "django.core.cache.backends.locmem.LocMemCache", "bench"))
    for name, path, location in found:
        module, _, kind = path.rpartition(".")
        cache = getattr(import_module(module), kind)(location, {"OPTIONS": {}})
        if name == DATABASE:
            import_module("django.core.management").call_command("createcachetable", "bench_cache")
            cache._max_entries = 1_000_000
        cache.set_many(dict.fromkeys(KEYS, VALUE), timeout=3600)
        yield name, cache
    stores: Any = import_module("pgkv.integrations.django.stores")
    bench.closing(stores.STORES.close)


@case("Django: cache.get", {DJANGO_REDIS: 0.9, DATABASE: None, LOCMEM: None})
def django_get(bench: Bench) -> Entrants:
    for name, cache in django_caches(bench):
        yield name, each(cache.get, cycle(KEYS))


def _set(cache: Any, key: str) -> None:
    cache.set(key, VALUE, 3600)


@case("Django: cache.set", {DJANGO_REDIS: 0.9, DATABASE: 0.1, LOCMEM: None})
def django_set(bench: Bench) -> Entrants:
    for name, cache in django_caches(bench):
        yield name, each(partial(_set, cache), cycle(KEYS))


@case("Django: cache.get_many of 100", {DJANGO_REDIS: None, DATABASE: None, LOCMEM: None})
def django_get_many(bench: Bench) -> Entrants:
    for name, cache in django_caches(bench):
        yield name, each(cache.get_many, cycle([KEYS]))


@case("Django: session load + save", {DB_SESSIONS: None})
def django_session(bench: Bench) -> Entrants:
    theirs, keys = django_sessions(bench)
    settings: Any = import_module("django.conf").settings
    settings.PGKV_SESSIONS = {"LOCATION": bench.dsn}
    ours: Any = import_module("pgkv.integrations.django.sessions").SessionStore
    stores: Any = import_module("pgkv.integrations.django.stores")
    bench.closing(stores.STORES.close)
    numbers = count()

    def save(kind: Any, key: str) -> None:
        session = kind(key)
        session["n"] = next(numbers)
        session.save()

    made = []
    for _ in keys:
        session = ours()
        session.update(DATA)
        session.create()
        made.append(session.session_key)
    yield PGKV, each(lambda key: save(ours, key), cycle(made))
    yield DB_SESSIONS, each(lambda key: save(theirs, key), cycle(keys))


@case("Flask-Session: load + save", {FLASK: 1.5})
def flask_session(bench: Bench) -> Entrants:
    """Flask-Session's interface over cachelib, as its requests use it; and its own one of Redis."""
    ours, names = flask_sessions_in("cachelib", "CacheLib", CachelibCache(bench.store()))
    numbers = count()

    def save(interface: Any, name: str) -> None:
        data = interface._retrieve_session_data(name)
        data["n"] = next(numbers)
        interface._upsert_session(LIFETIME, data, name)

    yield PGKV, each(partial(save, ours), cycle(names))
    if theirs := flask_sessions(bench):
        yield FLASK, each(partial(save, theirs[0]), cycle(theirs[1]))


def limits_storages(bench: Bench) -> Iterator[tuple[str, Any]]:
    """limits' storage over both."""
    storage = pgkv.integrations.limits.PgkvStorage(dsn=bench.dsn)
    bench.closing(storage._store.close)
    storage.reset()  # a key has one strategy
    yield PGKV, storage
    if client := bench.redis():
        pool = client.connection_pool
        yield LIMITS_REDIS, RedisStorage("redis://localhost:1", connection_pool=pool)


@case("limits: fixed-window hit", {LIMITS_REDIS: None})
def limits_fixed(bench: Bench) -> Entrants:
    for name, storage in limits_storages(bench):
        limiter = FixedWindowRateLimiter(storage)
        yield name, each(partial(limiter.hit, LIMIT), cycle(KEYS))


@case("limits: sliding-window-counter hit", {LIMITS_REDIS: None})
def limits_sliding(bench: Bench) -> Entrants:
    for name, storage in limits_storages(bench):
        limiter = SlidingWindowCounterRateLimiter(storage)
        yield name, each(partial(limiter.hit, LIMIT), cycle(KEYS))
