"""What pgkv says to the mistakes people make: which thing is wrong, why, and the way out; by the
right class; and before anything is sent.

The stores have a DSN that leads nowhere: a call that reached for a connection would fail in another
way. Only what a message must name is pinned here, not its words.
"""

from __future__ import annotations

import asyncio
import inspect
import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import psycopg
import pytest

import pgkv
from pgkv._engine.pooling import no_connection
from pgkv._ops.serialize import Serializer
from pgkv.patterns.cache.decorator import _codec_for
from tests.servers import LATE

NOWHERE = "postgresql://nobody@127.0.0.1:1/nowhere?connect_timeout=1"
CONFIG = pgkv.Config(NOWHERE, retry=None)
store: Any = pgkv.Store(CONFIG)
astore: Any = pgkv.AsyncStore(CONFIG)


async def coroutine(*_args: object) -> int:
    """An async function, where a plain one is wanted or the reverse."""
    return 1


def plain(*_args: object) -> int:
    """A plain function."""
    return 1


Mistakes = dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]]


def finish(answer: Any) -> None:
    """Await what has to be."""

    async def awaited() -> None:
        await answer

    if inspect.isawaitable(answer):
        asyncio.run(awaited())


def refused(call: Callable[[], Any], kind: type[Exception], words: tuple[str, ...]) -> None:
    """Make the mistake, and check what is said; nothing may have been asked of the server."""
    asked: list[str] = []
    remove = pgkv.on_operation(lambda name, *_: asked.append(name))

    try:
        with pytest.raises(kind) as caught:
            finish(call())
    finally:
        remove()
    text = str(caught.value)
    assert type(caught.value) is kind, text
    assert [word for word in words if word not in text] == [], text
    assert asked == []


SETTINGS: Mistakes = {
    "a DSN for a Config": (
        lambda: pgkv.Store(NOWHERE),  # type: ignore[arg-type]  # that is the mistake, as below
        pgkv.ConfigError,
        ("Store takes a pgkv.Config", "str", "Store.connect("),
    ),
    "a DSN for a Config, async": (
        lambda: pgkv.AsyncStore(NOWHERE),  # type: ignore[arg-type]
        pgkv.ConfigError,
        ("AsyncStore takes a pgkv.Config", "AsyncStore.connect("),
    ),
    "a dict for a Config": (
        lambda: pgkv.Store({"dsn": NOWHERE}),  # type: ignore[arg-type]
        pgkv.ConfigError,
        ("pgkv.Config", "dict"),
    ),
    "a Config for a DSN": (
        lambda: pgkv.Store.connect(CONFIG),  # type: ignore[arg-type]
        pgkv.ConfigError,
        ("connect() takes a DSN", "Store(config)"),
    ),
    "a DSN for schema_sql's Config": (
        lambda: pgkv.schema_sql(NOWHERE),  # type: ignore[arg-type]
        pgkv.ConfigError,
        ("schema_sql()", "pgkv.Config", "str"),
    ),
    "a dict for a DSN": (
        lambda: pgkv.Config({"host": "x"}),  # type: ignore[arg-type]
        pgkv.ConfigError,
        ("dsn", "dict"),
    ),
    "a database's name for a DSN": (
        lambda: pgkv.Config("shop"),
        pgkv.ConfigError,
        ("dsn", "postgresql://", "host=", "embedded:///"),
    ),
    "a host and database for a DSN": (
        lambda: pgkv.Config("localhost/shop"),
        pgkv.ConfigError,
        ("dsn", "postgresql://", "host="),
    ),
    "a relative embedded path": (
        lambda: pgkv.Config("embedded://data"),
        pgkv.ConfigError,
        ("embedded:///absolute/path",),
    ),
    "Redis": (lambda: pgkv.Config("redis://h"), pgkv.ConfigError, ("'redis'", "postgresql://")),
    "a misspelt setting": (
        lambda: pgkv.Store.connect(NOWHERE, tabel_name="x"),  # type: ignore[call-arg]
        pgkv.ConfigError,
        ("'tabel_name'", "table_name"),
    ),
    "a number for a policy": (
        lambda: pgkv.Config(NOWHERE, retry=3),  # type: ignore[arg-type]
        pgkv.ConfigError,
        ("retry", "pgkv.RetryPolicy", "None", "int"),
    ),
    "a word for a flag": (
        lambda: pgkv.RetryPolicy(repeat_writes="no"),  # type: ignore[arg-type]
        pgkv.ConfigError,
        ("repeat_writes", "True or False"),
    ),
    "a negative pause": (
        lambda: pgkv.RetryPolicy(wait_initial=-1),
        pgkv.ConfigError,
        ("wait_initial", "0 seconds or more"),
    ),
    "a connection for a pool": (
        lambda: pgkv.Store.from_pool(object()),  # type: ignore[arg-type]
        pgkv.ConfigError,
        ("from_pool()", "psycopg_pool.ConnectionPool", "object"),
    ),
    "a DSN for a pool, async": (
        lambda: pgkv.AsyncStore.from_pool(NOWHERE),  # type: ignore[arg-type]
        pgkv.ConfigError,
        ("psycopg_pool.AsyncConnectionPool", "str"),
    ),
}

KEYS_AND_VALUES: Mistakes = {
    "None for keys": (
        lambda: store.get_many(None),
        pgkv.InvalidKeyError,
        ("several keys", "list", "NoneType"),
    ),
    "None for pairs": (
        lambda: store.set_many(None),
        pgkv.InvalidValueError,
        ("mapping", "(key, value)", "NoneType"),
    ),
    "a value for update's function": (
        lambda: store.update("k", b"v"),
        pgkv.InvalidValueError,
        ("update", "fn", "bytes"),
    ),
    "a word for attempts": (
        lambda: store.update("k", plain, attempts="5"),
        pgkv.InvalidValueError,
        ("attempts", "integer of 1 or more"),
    ),
    "options and keywords": (
        lambda: store.keys(pgkv.ScanOptions(prefix="a"), limit=3),
        pgkv.InvalidValueError,
        ("ScanOptions", "keywords"),
    ),
    "an endless ttl": (
        lambda: store.set("k", "v", ttl=float("inf")),
        pgkv.InvalidValueError,
        ("ttl", "leave it out"),
    ),
}


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    (SETTINGS | KEYS_AND_VALUES).values(),
    ids=SETTINGS | KEYS_AND_VALUES,
)
def test_mistakes(call: Callable[[], Any], kind: type[Exception], words: tuple[str, ...]) -> None:
    """A mistake is named, with its cause and the way out, before anything is sent."""
    refused(call, kind, words)


def test_a_caller_s_own_error_stays() -> None:
    """A TypeError inside the caller's own iterator is not taken for a mistake about keys."""

    def keys() -> Any:
        yield "a"
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        store.get_many(keys())


# -- scope ---------------------------------------------------------------------------------

SCOPE: Mistakes = {
    "a transaction that was not entered": (
        lambda: store.transaction().set("k", "v"),
        AttributeError,
        (".set", "with store.transaction() as tx"),
    ),
    "a transaction that was not awaited": (
        lambda: astore.transaction().set("k", "v"),
        AttributeError,
        (".set", "await store.transaction()", "async with"),
    ),
    "a store that was not awaited": (
        lambda: pgkv.AsyncStore.connect(NOWHERE).get("k"),  # type: ignore[attr-defined]
        AttributeError,
        (".get", "await AsyncStore.connect(...)", "async with"),
    ),
    "a lease that was not awaited": (
        lambda: pgkv.AsyncLock(astore, "l").acquire().token,  # type: ignore[attr-defined]
        AttributeError,
        (".token", "await lock.acquire(...)", "async with"),
    ),
    "a handle for its answer": (
        lambda: bool(store.pipeline().set_nx("k", "v")),
        TypeError,
        ("set_nx", "result()"),
    ),
    "a handle before its pipeline is sent": (
        lambda: store.pipeline().get("k").result(),
        pgkv.TransactionError,
        ("get", "not sent", "`with` block"),
    ),
    "no function to run": (
        lambda: store.run_transaction(None),
        pgkv.InvalidValueError,
        ("run_transaction", "fn", "NoneType"),
    ),
    "a word for an isolation level": (
        lambda: store.run_transaction(plain, isolation="serializable"),
        pgkv.InvalidValueError,
        ("isolation", "psycopg.IsolationLevel", "'serializable'"),
    ),
    "a word for an isolation level, async": (
        lambda: astore.run_transaction(coroutine, isolation="serializable"),
        pgkv.InvalidValueError,
        ("isolation", "psycopg.IsolationLevel"),
    ),
    "nothing for a connection": (
        lambda: store.using(None),
        pgkv.ConfigError,
        ("using()", "psycopg 3 connection", "NoneType"),
    ),
    "a store for a connection": (
        lambda: store.using(store),
        pgkv.ConfigError,
        ("using()", "psycopg 3 connection", "pgkv.Store"),
    ),
}


@pytest.mark.parametrize(("call", "kind", "words"), SCOPE.values(), ids=SCOPE)
def test_mistakes_of_scope(
    call: Callable[[], Any], kind: type[Exception], words: tuple[str, ...]
) -> None:
    """What was not entered, awaited or sent says so, and how."""
    refused(call, kind, words)


def test_no_wrong_advice() -> None:
    """Only an engine is told to change its driver, and only a key to live without a ttl."""
    with pytest.raises(pgkv.ConfigError) as caught:
        store.using(store)
    assert "driver" not in str(caught.value)
    with pytest.raises(pgkv.InvalidValueError) as endless:
        pgkv.Lock(store, "l", ttl=float("inf"))
    assert "key" not in str(endless.value)


async def test_opened_twice() -> None:
    """What was awaited once says that it cannot be awaited again."""
    opening = astore.transaction()
    with pytest.raises(pgkv.StoreUnavailableError):
        await opening
    with pytest.raises(RuntimeError, match=r"store\.transaction\(\) was awaited"):
        await opening


# -- patterns ------------------------------------------------------------------------------

limiter = pgkv.RateLimiter(store, "10/s", name="api")
alimiter = pgkv.AsyncRateLimiter(astore, "10/s", name="api")
sessions = pgkv.SessionStore(store)
asessions = pgkv.AsyncSessionStore(astore)


def wsgi(**options: Any) -> Any:
    """The limiter's middleware."""
    return pgkv.WSGIRateLimitMiddleware(plain, **({"limiter": limiter} | options))  # type: ignore[arg-type]


def cookie(**options: Any) -> Any:
    """The sessions' middleware."""
    return pgkv.WSGISessionMiddleware(plain, sessions=sessions, **options)  # type: ignore[arg-type]


def twins(pattern: str, /, *args: Any, **options: Any) -> Mistakes:
    """Each variant of a pattern given the other variant's store."""
    made: Mistakes = {}
    for one, wrong, other in (
        (pattern, astore, f"Async{pattern}"),
        (f"Async{pattern}", store, pattern),
    ):

        def make(one: str = one, wrong: Any = wrong) -> Any:
            return getattr(pgkv, one)(wrong, *args, **options)

        made[f"{one} on the other store"] = (
            make,
            pgkv.ConfigError,
            (f"{one} needs", type(wrong).__name__, f"there is {other}"),
        )
    return made


LOCKS: Mistakes = {
    **twins("Lock", "l"),
    **twins("Semaphore", "l", 2),
    **twins("Leader", "l"),
    "a name before the store": (
        lambda: pgkv.Lock("l", store),  # type: ignore[arg-type]
        pgkv.ConfigError,
        ("Lock needs a Store", "str"),
    ),
    "no name for a lock": (
        lambda: pgkv.Lock(store, ""),
        pgkv.InvalidKeyError,
        ("lock's name", "empty"),
    ),
    "bytes for a lock's name": (
        lambda: pgkv.AsyncLock(astore, b"l"),  # type: ignore[arg-type]
        pgkv.InvalidKeyError,
        ("lock's name", "str", "bytes"),
    ),
    "threading's endless timeout": (
        lambda: pgkv.Lock(store, "l").acquire(-1),
        pgkv.InvalidValueError,
        ("timeout", "0 seconds or more", "None waits without end"),
    ),
    "a word for on_lost": (
        lambda: pgkv.Lock(store, "l", on_lost="f"),  # type: ignore[arg-type]
        pgkv.ConfigError,
        ("on_lost", "function", "str"),
    ),
    "an async on_lost in threads": (
        lambda: pgkv.Semaphore(store, "l", 2, on_lost=coroutine),
        pgkv.ConfigError,
        ("on_lost", "AsyncSemaphore"),
    ),
    "an async on_elected in threads": (
        lambda: pgkv.Leader(store, "l", on_elected=coroutine),
        pgkv.ConfigError,
        ("on_elected", "AsyncLeader"),
    ),
    "a number for on_elected": (
        lambda: pgkv.AsyncLeader(astore, "l", on_elected=5),  # type: ignore[arg-type]
        pgkv.ConfigError,
        ("on_elected", "int"),
    ),
    "asyncio's event in threads": (
        lambda: pgkv.Leader(store, "l").run(asyncio.Event()),  # type: ignore[arg-type]
        pgkv.ConfigError,
        ("run()", "threading.Event", "asyncio.Event"),
    ),
    "a thread's event in a loop": (
        lambda: pgkv.AsyncLeader(astore, "l").run(threading.Event()),  # type: ignore[arg-type]
        pgkv.ConfigError,
        ("run()", "asyncio.Event", "threading.Event"),
    ),
    "a bare @locked": (
        lambda: pgkv.locked(plain),  # type: ignore[call-overload]
        TypeError,
        ("plain", "@pgkv.locked('name')", "parentheses"),
    ),
    "@locked on no function": (
        lambda: pgkv.locked("l", store=store)(5),  # type: ignore[type-var]
        TypeError,
        ("locked()", "function", "int"),
    ),
    "a plain lock on an async function": (
        lambda: pgkv.locked(pgkv.Lock(store, "l"))(coroutine),
        pgkv.ConfigError,
        ("async function", "AsyncLock"),
    ),
    "a timeout that nobody waits for": (
        lambda: pgkv.locked("l", store=store, on_busy="raise", timeout=5),
        pgkv.ConfigError,
        ("on_busy='raise'", "timeout", "'wait'"),
    ),
    "a lock that is held for no time": (
        lambda: pgkv.locked("l", store=store, ttl=0),
        pgkv.InvalidValueError,
        ("ttl", "more than 0"),
    ),
}

LIMITS: Mistakes = {
    **twins("RateLimiter", "10/s", name="api"),
    "no unit": (
        lambda: pgkv.RateLimiter(store, "10", name="api"),
        pgkv.ConfigError,
        ("'10'", "'100/minute'", "units"),
    ),
    "a number for a rate": (
        lambda: pgkv.RateLimiter(store, 10, name="api"),  # type: ignore[arg-type]
        pgkv.ConfigError,
        ("rates", "10", "'100/minute'"),
    ),
    "one rate twice": (
        lambda: pgkv.RateLimiter(store, "10/s; 10/s", name="api"),
        pgkv.ConfigError,
        ("10/s", "twice"),
    ),
    "no time for the store": (
        lambda: pgkv.RateLimiter(store, "10/s", name="api", timeout=0),
        pgkv.ConfigError,
        ("timeout", "more than 0"),
    ),
    "no cost": (lambda: limiter.hit("k", cost=0), pgkv.InvalidValueError, ("cost", "1 or more")),
    "more than a bucket": (
        lambda: alimiter.hit("k", cost=11),
        pgkv.InvalidValueError,
        ("cost of 11", "holds 10", "burst"),
    ),
    "a negative wait": (
        lambda: limiter.reserve("k", max_wait=-1),
        pgkv.InvalidValueError,
        ("max_wait", "0 seconds or more", "None"),
    ),
    "a word for a wait": (
        lambda: limiter.acquire("k", timeout="5"),  # type: ignore[arg-type]
        pgkv.InvalidValueError,
        ("timeout", "str"),
    ),
    "limiters without keys": (
        lambda: pgkv.RateLimiter.hit_many([limiter]),  # type: ignore[list-item]
        pgkv.InvalidValueError,
        ("(limiter, key, cost)", "RateLimiter"),
    ),
    "a charge too long": (
        lambda: pgkv.RateLimiter.hit_many([(limiter, "k", 1, 2)]),  # type: ignore[list-item]
        pgkv.InvalidValueError,
        ("(limiter, key, cost)", "tuple of 4"),
    ),
    "one charge for several": (
        lambda: pgkv.AsyncRateLimiter.hit_many(alimiter),  # type: ignore[arg-type]
        pgkv.InvalidValueError,
        ("hit_many", "(limiter, key, cost)"),
    ),
    "no key to limit by": (
        lambda: limiter.limit(None),  # type: ignore[arg-type]
        pgkv.ConfigError,
        ("limit()", "key", "NoneType"),
    ),
    "a bare @limiter.limit": (
        lambda: limiter.limit(plain)("request"),  # type: ignore[arg-type]
        TypeError,
        ("limit()", "str", "parentheses"),
    ),
    "an async function": (
        lambda: limiter.limit("k")(coroutine),
        pgkv.ConfigError,
        ("coroutine", "AsyncRateLimiter"),
    ),
    "middleware without a limiter": (
        lambda: wsgi(limiter=None),
        pgkv.ConfigError,
        ("WSGIRateLimitMiddleware needs a RateLimiter", "NoneType"),
    ),
    "middleware on the other limiter": (
        lambda: wsgi(limiter=alimiter),
        pgkv.ConfigError,
        ("AsyncRateLimiter", "there is RateLimitMiddleware"),
    ),
    "ASGI on the other limiter": (
        lambda: pgkv.RateLimitMiddleware(coroutine, limiter=limiter),  # type: ignore[arg-type]
        pgkv.ConfigError,
        ("RateLimitMiddleware needs an AsyncRateLimiter", "there is WSGIRateLimitMiddleware"),
    ),
    "a number for a key": (lambda: wsgi(key=5), pgkv.ConfigError, ("key", "function", "int")),
    "client_ip not called": (
        lambda: wsgi(key=pgkv.client_ip),
        pgkv.ConfigError,
        ("key=client_ip()",),
    ),
    "a constant cost of nothing": (lambda: wsgi(cost=0), pgkv.ConfigError, ("cost", "1 or more")),
    "limits that are none": (lambda: wsgi(limits="x"), pgkv.ConfigError, ("'x'", "rate")),
    "a number for exempt": (lambda: wsgi(exempt=5), pgkv.ConfigError, ("exempt", "paths", "5")),
    "one proxy for several": (
        lambda: pgkv.client_ip("10.0.0.1"),
        pgkv.ConfigError,
        ("trusted_proxies", "['10.0.0.1']"),
    ),
    "no proxies at all": (
        lambda: pgkv.client_ip(None),  # type: ignore[arg-type]
        pgkv.ConfigError,
        ("trusted_proxies", "list", "NoneType"),
    ),
    "a word for a prefix": (
        lambda: pgkv.client_ip(ipv6_prefix="64"),  # type: ignore[arg-type]
        pgkv.ConfigError,
        ("ipv6_prefix", "from 1 to 128", "'64'"),
    ),
}

SESSIONS: Mistakes = {
    **twins("SessionStore"),
    "a word for a size": (
        lambda: pgkv.SessionStore(store, max_data_size="1"),  # type: ignore[arg-type]
        pgkv.ConfigError,
        ("max_data_size", "integer", "'1'"),
    ),
    "a negative interval": (
        lambda: pgkv.SessionStore(store, touch_interval=-1),
        pgkv.ConfigError,
        ("touch_interval", "0 seconds or more"),
    ),
    "a negative grace": (
        lambda: sessions.rotate(pgkv.Session({}), grace=-1),
        pgkv.InvalidValueError,
        ("grace", "0 seconds or more", "-1"),
    ),
    "a token for a session": (
        lambda: asessions.save("token"),  # type: ignore[arg-type]
        pgkv.InvalidValueError,
        ("session", "str", "load()"),
    ),
    "middleware on the other sessions": (
        lambda: pgkv.SessionMiddleware(coroutine, sessions=sessions),  # type: ignore[arg-type]
        pgkv.ConfigError,
        ("SessionMiddleware needs an AsyncSessionStore", "there is WSGISessionMiddleware"),
    ),
    "WSGI on the other sessions": (
        lambda: pgkv.WSGISessionMiddleware(plain, sessions=asessions),  # type: ignore[arg-type]
        pgkv.ConfigError,
        ("there is SessionMiddleware",),
    ),
    "a number for a cookie": (lambda: cookie(cookie=5), pgkv.ConfigError, ("cookie", "5")),
    "a capital": (lambda: cookie(same_site="Lax"), pgkv.ConfigError, ("same_site", "'lax'")),
    "a word for an age": (lambda: cookie(max_age="1"), pgkv.ConfigError, ("max_age", "'1'")),
    "a number for a path": (lambda: cookie(path=1), pgkv.ConfigError, ("path", "1")),
    "a number for a domain": (
        lambda: cookie(cookie="s", domain=1),
        pgkv.ConfigError,
        ("domain", "1"),
    ),
    "no paths": (lambda: cookie(exempt=5), pgkv.ConfigError, ("exempt", "paths", "5")),
}


def kept(**options: Any) -> Any:
    """A cached function with those settings."""
    return pgkv.cached(**({"ttl": 1, "store": store} | options))(plain)


class Foreign:
    """A class that neither JSON nor msgpack knows."""


CACHED: Mistakes = {
    "a bare @cached, called with a value": (
        lambda: pgkv.cached(plain)(1),  # type: ignore[call-overload]
        TypeError,
        ("cached()", "int", "@pgkv.cached(ttl=...)"),
    ),
    "a bare @cached, called with nothing": (
        lambda: pgkv.cached(plain)(),  # type: ignore[call-overload]  # noqa: PLW0108  # the last call is the mistake
        TypeError,
        ("@pgkv.cached(ttl=...)", "parentheses"),
    ),
    "a bare @cached, called with keywords": (
        lambda: pgkv.cached(plain)(user_id=1),  # type: ignore[call-overload]
        TypeError,
        ("@pgkv.cached(ttl=...)", "parentheses"),
    ),
    "an endless ttl in cached": (
        lambda: kept(ttl=float("inf")),
        pgkv.InvalidValueError,
        ("ttl", "None"),
    ),
    "negative staleness": (lambda: kept(stale=-1), pgkv.InvalidValueError, ("stale", "0 seconds")),
    "a word for beta": (lambda: kept(beta="1"), pgkv.ConfigError, ("beta", "number")),
    "a word for jitter": (lambda: kept(jitter="1"), pgkv.ConfigError, ("jitter", "less than 1")),
    "one tag for several": (lambda: kept(tags="a"), pgkv.ConfigError, ("tags", "('name',)")),
    "numbers for tags": (lambda: kept(tags=(1,)), pgkv.ConfigError, ("tags", "strings")),
    "nothing for ignore": (lambda: kept(ignore=None), pgkv.ConfigError, ("ignore", "strings")),
    "a template left open": (lambda: kept(tags=("u:{x",)), TypeError, ("'u:{x'", "template")),
    "a word for key": (lambda: kept(key="id"), pgkv.ConfigError, ("key", "function", "str")),
    "a word for condition": (lambda: kept(condition="x"), pgkv.ConfigError, ("condition", "str")),
    "an AsyncStore for a plain function": (
        lambda: kept(store=astore),
        pgkv.ConfigError,
        ("plain()", "a Store", "async def"),
    ),
    "a Store for an async function": (
        lambda: pgkv.cached(ttl=1, store=store)(coroutine),
        pgkv.ConfigError,
        ("coroutine()", "an AsyncStore"),
    ),
    "no tag": (
        lambda: pgkv.invalidate_tag(None, store=store),  # type: ignore[call-overload]
        pgkv.InvalidKeyError,
        ("tag", "str", "NoneType"),
    ),
    "no tag, async": (
        lambda: pgkv.invalidate_tag(["a"], store=astore),  # type: ignore[call-overload]
        pgkv.InvalidKeyError,
        ("tag", "list"),
    ),
    "a connection for a store": (
        lambda: pgkv.invalidate_tag("a", store=5),  # type: ignore[call-overload]
        pgkv.ConfigError,
        ("invalidate_tag()", "Store", "int"),
    ),
    "a class of one's own": (
        lambda: store.typed(Foreign),
        pgkv.ConfigError,
        ("Foreign", "json"),
    ),
    "a list of it": (
        lambda: store.typed(dict[str, list[Foreign] | None], "msgpack"),
        pgkv.ConfigError,
        ("Foreign", "msgpack"),
    ),
    "a value that its codec cannot hold": (
        lambda: store.typed(dict).set("k", {"a": Foreign()}),
        pgkv.SerializationError,
        ("'k'", "json", "Foreign"),
    ),
    "no hook": (
        lambda: pgkv.on_operation(None),  # type: ignore[arg-type]
        pgkv.ConfigError,
        ("on_operation()", "NoneType"),
    ),
}

PATTERNS = LOCKS | LIMITS | SESSIONS | CACHED


@pytest.mark.parametrize(("call", "kind", "words"), PATTERNS.values(), ids=PATTERNS)
def test_mistakes_with_patterns(
    call: Callable[[], Any], kind: type[Exception], words: tuple[str, ...]
) -> None:
    """A mistake with a pattern is named when it is made or decorated, with the way out."""
    refused(call, kind, words)


def test_a_result_that_no_codec_holds() -> None:
    """What a cached function may not return says which codec could keep it."""
    codec = _codec_for(kept, "json")
    with pytest.raises(pgkv.SerializationError, match=r"Foreign.*SignedPickle"):
        codec.encode("f", [Foreign()])


@pytest.mark.parametrize("value", [1, "a", None, {"a": [1.5]}])
def test_what_any_value_is(value: object) -> None:
    """`object` is a type that every plain value fits: it can be kept."""
    serializer: Serializer[object] = Serializer(object, "json")
    assert serializer.decode("k", serializer.encode("k", value)) == value


# -- a server that says nothing -------------------------------------------------------------


@pytest.fixture
def silent() -> Iterator[str]:
    """The DSN of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listening:
        yield f"postgresql://nobody@127.0.0.1:{listening.getsockname()[1]}/nowhere"


# Without connect_timeout one attempt, or all of them, would take a minute.
OTHERWISE: dict[str, Any] = {
    "operation_timeout": 60,
    "retry": pgkv.RetryPolicy(attempts=200, deadline=60),
}


def test_connecting_ends_in_time(silent: str) -> None:
    """connect() gives up within connect_timeout, retries included, and names it."""
    began = monotonic()
    with pytest.raises(pgkv.StoreUnavailableError, match=r"0\.5 s \(connect_timeout\)"):
        pgkv.Store.connect(f"{silent}?connect_timeout=60", connect_timeout=0.5, **OTHERWISE)
    assert monotonic() - began < 2.5 + LATE


async def test_connecting_ends_in_time_async(silent: str) -> None:
    """So does the other variant's."""
    began = monotonic()
    with pytest.raises(pgkv.StoreUnavailableError, match=r"0\.5 s \(connect_timeout\)"):
        await pgkv.AsyncStore.connect(
            f"{silent}?connect_timeout=60", connect_timeout=0.5, **OTHERWISE
        )
    assert monotonic() - began < 2.5 + LATE


def test_a_call_that_ends_before_connecting_does(silent: str) -> None:
    """A call whose own time is shorter does not blame connect_timeout, nor tell of less than no time where
    it was over before."""
    late = pgkv.Store(pgkv.Config(silent, operation_timeout=0.2))
    with pytest.raises(pgkv.StoreUnavailableError, match=r"0(\.\d+)? s \(the time for the call\)"):
        late.get("k")
    late.close()
    assert " within 0 s " in str(no_connection(CONFIG, "get", -0.3))
    assert " within 0.2 s " in str(no_connection(CONFIG, "get", 0.19999))


# -- a closed store ------------------------------------------------------------------------


def test_a_closed_store_has_one_error() -> None:
    """A closed store says that it is closed, that repeating does not help, and nothing of its
    insides."""
    closed = pgkv.Store(CONFIG)
    closed.close()
    with pytest.raises(pgkv.StoreUnavailableError, match="get: the store is closed") as caught:
        closed.get("k")
    assert not caught.value.retryable
    assert "IndexError" not in "".join(traceback.format_exception(caught.value))


def test_a_closed_store_starts_no_server(tmp_path: Path) -> None:
    """The DSN of a closed store on an embedded server does not start that server again."""
    closed = pgkv.Store(pgkv.Config(f"embedded://{tmp_path}/pg"))
    closed.close()
    with pytest.raises(pgkv.StoreUnavailableError, match="closed"):
        _ = closed.dsn
    assert list(tmp_path.iterdir()) == []


def test_a_store_of_another_loop() -> None:
    """An AsyncStore says in another loop that it can be neither used nor closed there."""
    foreign = pgkv.AsyncStore(CONFIG)

    async def use() -> None:
        with pytest.raises(pgkv.StoreUnavailableError):
            await foreign.get("k")

    asyncio.run(use())
    with pytest.raises(pgkv.ConfigError, match="one AsyncStore per loop"):
        asyncio.run(foreign.get("k"))
    with pytest.raises(pgkv.ConfigError, match="close it there"):
        asyncio.run(foreign.close())


def test_a_closed_connection() -> None:
    """A connection that is closed is refused by name, where it is given."""

    class Closed(psycopg.Connection[Any]):
        closed = True

        def __init__(self) -> None:
            pass

        def __del__(self, *_: object) -> None:
            pass

    with pytest.raises(pgkv.TransactionError, match=r"using\(\) is closed"):
        store.using(Closed())


def test_a_lock_of_asyncio_entered_by_with() -> None:
    """As a store."""
    lock = pgkv.AsyncLock(pgkv.AsyncStore(pgkv.Config(NOWHERE)), "n")
    with (
        pytest.raises(TypeError, match=r"`async with lock\.acquire\(\.\.\.\)"),
        lock.acquire(),  # type: ignore[attr-defined]  # the mistake
    ):
        pass


def test_a_store_of_asyncio_entered_by_with() -> None:
    """Says what to write instead, of the call that was made."""
    with (
        pytest.raises(TypeError, match=r"`async with AsyncStore\.embedded\(\.\.\.\)"),
        pgkv.AsyncStore.embedded("./nowhere"),  # type: ignore[attr-defined]  # the mistake
    ):
        pass
