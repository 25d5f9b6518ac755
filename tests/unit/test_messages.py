"""What pgkv says to the mistakes people make: which thing is wrong, why, and the way out; by the
right class; and before anything is sent.

The stores have a DSN that leads nowhere: a call that reached for a connection would fail in another
way. Only what a message must name is pinned here, not its words.
"""

from __future__ import annotations

import asyncio
import inspect
import traceback
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

import pgkv

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
        lambda: pgkv.Store.connect(NOWHERE, tabel_name="x"),
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
    """Only an engine is told to change its driver."""
    with pytest.raises(pgkv.ConfigError) as caught:
        store.using(store)
    assert "driver" not in str(caught.value)


async def test_opened_twice() -> None:
    """What was awaited once says that it cannot be awaited again."""
    opening = astore.transaction()
    with pytest.raises(pgkv.StoreUnavailableError):
        await opening
    with pytest.raises(RuntimeError, match=r"store\.transaction\(\) was awaited"):
        await opening


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
