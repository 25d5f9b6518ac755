"""using(conn): the store inside the caller's own connection and transaction."""
# ruff: noqa: PT012  a transaction that fails has a body of several statements

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest

import pgkv
from pgkv._engine.sweep import Collector
from pgkv.testing import ServerClock
from tests.peers import Peer, fetch
from tests.variants import Threaded, Variant, inside


async def test_commits_with_the_caller(store: Any, connect: Any, peer: Peer) -> None:
    """What is written shows outside when the caller commits, together with the caller's own."""
    peer.run("CREATE TABLE own (a text)")
    conn = await connect()
    mine = store.using(conn)
    await conn.execute("INSERT INTO own VALUES ('x')")
    await mine.set("k", b"v")
    assert await mine.get("k") == b"v"
    assert await store.get("k") is None
    await conn.commit()
    assert await store.get("k") == b"v"
    assert peer.one("SELECT a FROM own") == "x"


async def test_rolls_back_with_the_caller(store: Any, connect: Any) -> None:
    """What is written is gone when the caller rolls back."""
    conn = await connect()
    mine = store.using(conn)
    await mine.set("k", b"v")  # the first statement: it opens the caller's transaction
    assert inside(conn).info.transaction_status == psycopg.pq.TransactionStatus.INTRANS
    await conn.rollback()
    assert await store.get("k") is None
    await mine.set("k", b"w")  # usable in the next transaction, too
    await conn.commit()
    assert await store.get("k") == b"w"


async def test_autocommit(store: Any, connect: Any) -> None:
    """On a connection in autocommit each operation commits by itself."""
    conn = await connect(autocommit=True)
    mine = store.using(conn)
    await mine.set("k", b"1")
    assert await store.get("k") == b"1"
    assert await mine.increment("k") == 2
    assert await store.get("k") == b"2"
    assert inside(conn).info.transaction_status == psycopg.pq.TransactionStatus.IDLE


async def test_a_transaction_of_its_own_in_autocommit(store: Any, connect: Any) -> None:
    """On a connection in autocommit transaction() opens one; batches in chunks are whole."""
    conn = await connect(autocommit=True)
    with pytest.raises(LookupError):
        async with store.using(conn).transaction() as tx:
            await tx.set("k", b"1")
            raise LookupError
    assert await store.exists("k") is False
    assert await store.using(conn).set_many({f"k{n}": b"" for n in range(5001)}) == 5001
    async with store.using(conn).transaction() as tx:
        await tx.delete_many(f"k{n}" for n in range(5001))
    assert await store.count() == 0


async def test_a_savepoint_in_the_callers_transaction(store: Any, connect: Any) -> None:
    """In an open transaction transaction() is a savepoint, and undoes no more."""
    conn = await connect()
    mine = store.using(conn)
    await mine.set("kept", b"1")
    with pytest.raises(LookupError):
        async with mine.transaction() as tx:
            await tx.set("undone", b"1")
            raise LookupError
    await conn.commit()
    assert await store.keys() == ["kept"]


async def test_inside_the_callers_transaction_block(store: Any, connect: Any) -> None:
    """using() inside psycopg's own transaction() blocks goes with these."""
    conn = inside(await connect())
    if isinstance(conn, psycopg.Connection):
        inner = Threaded(store._target.using(conn))
        with conn.transaction():
            await inner.set("a", b"1")
            with conn.transaction(force_rollback=True):
                await inner.set("b", b"1")
    else:
        async with conn.transaction():
            await store.using(conn).set("a", b"1")
            async with conn.transaction(force_rollback=True):
                await store.using(conn).set("b", b"1")
    assert await store.keys() == ["a"]


async def test_refused_values_do_not_abort(store: Any, connect: Any) -> None:
    """A refused increment leaves the caller's transaction able to commit."""
    await store.set("word", b"x")
    conn = await connect()
    mine = store.using(conn)
    await mine.set("a", b"1")
    with pytest.raises(pgkv.InvalidValueError):
        await mine.increment("word")
    with pytest.raises(pgkv.InvalidValueError):
        await mine.increment_many({"word": 1, "a": 1})
    assert not await mine.compare_and_swap("a", b"0", b"2")
    await conn.commit()
    assert await store.get("a") == b"1"


async def test_nothing_is_prepared(store: Any, connect: Any) -> None:
    """No prepared statement is left on the caller's connection."""
    conn = await connect(autocommit=True)
    mine = store.using(conn)
    for _ in range(10):
        await mine.set("k", b"1")
        await mine.get("k")
    assert await fetch(conn, "SELECT name FROM pg_prepared_statements") == []


async def test_session_settings_stay(store: Any, connect: Any) -> None:
    """The caller's session settings are as they were."""
    query = "SELECT name, setting FROM pg_settings ORDER BY name"
    conn = await connect(autocommit=True)
    before = await fetch(conn, query)
    mine = store.using(conn)
    await mine.set("k", b"1", ttl=60)
    await mine.increment("n")
    assert await fetch(conn, query) == before


async def test_a_closed_connection(store: Any, connect: Any) -> None:
    """A closed connection is refused by each operation, naming the fault."""
    conn = await connect()
    mine = store.using(conn)
    await conn.close()
    with pytest.raises(pgkv.TransactionError, match="is closed"):
        await mine.get("k")


async def test_a_failed_transaction(store: Any, connect: Any) -> None:
    """A transaction that has failed is refused with the advice to roll back."""
    conn = await connect()
    with pytest.raises(psycopg.Error):
        await conn.execute("SELECT 1/0")
    with pytest.raises(pgkv.TransactionError, match="roll it back"):
        await store.using(conn).set("k", b"v")


async def test_pipeline_mode(store: Any, connect: Any) -> None:
    """A connection in pipeline mode is refused."""
    conn = inside(await connect())
    mine = store.using(conn)
    if isinstance(conn, psycopg.Connection):
        with conn.pipeline(), pytest.raises(pgkv.TransactionError, match="pipeline mode"):
            await mine.get("k")
    else:
        async with conn.pipeline():
            with pytest.raises(pgkv.TransactionError, match="pipeline mode"):
                await mine.get("k")


async def test_another_encoding(store: Any, connect: Any, dsn: str) -> None:
    """A connection whose client_encoding is not UTF-8 is refused: keys would arrive as others."""
    conn = await connect(dsn=f"{dsn} client_encoding=LATIN1")
    with pytest.raises(pgkv.ConfigError, match="client_encoding UTF8, not LATIN1"):
        await store.using(conn).get("k")


async def test_the_connection_of_the_other_variant(store: Any, variant: Variant, dsn: str) -> None:
    """A connection of the other variant is refused, naming the store that takes it."""
    if variant.name == "sync":
        other: Any = await psycopg.AsyncConnection.connect(dsn)
        wanted = "AsyncStore"
    else:
        other = psycopg.connect(dsn)
        wanted = "a Store"
    try:
        with pytest.raises(pgkv.ConfigError, match=wanted):
            store.using(other)
    finally:
        closing = other.close()
        if closing is not None:
            await closing


@pytest.mark.parametrize("conn", [None, "postgresql://", 7, SimpleNamespace(connection=object())])
async def test_what_is_no_connection(store: Any, conn: Any) -> None:
    """What holds no psycopg 3 connection is refused, naming what it is."""
    with pytest.raises(pgkv.ConfigError, match="needs a psycopg 3 connection, not"):
        store.using(conn)


async def test_the_connections_lock_is_taken(store: Any, connect: Any) -> None:
    """While another of the caller's threads or tasks is in a statement, an operation waits."""
    conn = inside(await connect(autocommit=True))
    mine = store.using(conn)
    lock = conn.lock
    if isinstance(conn, psycopg.Connection):
        lock.acquire()
    else:
        await lock.acquire()
    waiting = asyncio.ensure_future(mine.get("k"))
    done, _ = await asyncio.wait([waiting], timeout=0.05)
    assert not done
    lock.release()
    assert await waiting is None
    assert not lock.locked()


async def test_many_callers_on_one_connection(store: Any, connect: Any) -> None:
    """Threads or tasks that share the connection take turns, the caller's own statements too."""
    conn = await connect()
    mine = store.using(conn)
    await asyncio.gather(
        *(mine.increment("k") for _ in range(16)), *(conn.execute("SELECT 1") for _ in range(16))
    )
    await conn.commit()
    assert await store.get("k") == b"16"


async def test_nothing_is_collected(
    store: Any, connect: Any, clock: ServerClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads that meet expired rows have nothing deleted from the caller's connection."""
    asked: list[object] = []
    monkeypatch.setattr(Collector, "collect", lambda self, keys: asked.append(keys))
    await store.set("k", b"1", ttl=60)
    clock.advance(61)
    mine = store.using(await connect())
    assert await mine.get("k") is None
    assert await mine.get_many(["k"]) == {}
    assert asked == []


async def test_nothing_is_healed(store: Any, connect: Any, peer: Peer) -> None:
    """A missing table is not created in the caller's transaction."""
    peer.run("DROP TABLE kv_store")
    with pytest.raises(pgkv.TableNotFoundError, match="kv_store"):
        await store.using(await connect()).set("k", b"v")
    assert peer.one("SELECT to_regclass('kv_store')") is None


async def test_views_of_the_callers_connection(store: Any, connect: Any, peer: Peer) -> None:
    """namespace() and table() of using(conn) stay in the caller's transaction."""
    await store.table("other").create_table()
    conn = await connect()
    mine = store.using(conn)
    await mine.namespace("n:").set("a", b"1")
    await mine.table("other").set("b", b"1")
    assert peer.keys() == peer.keys("other") == set()
    await conn.commit()
    assert (peer.keys(), peer.keys("other")) == ({"n:a"}, {"b"})


async def test_closing_the_view_leaves_the_connection(store: Any, connect: Any) -> None:
    """A store that uses the caller's connection does not close it."""
    conn = await connect(autocommit=True)
    mine = store.using(conn)
    await mine.close()
    assert await fetch(conn, "SELECT 1") == [(1,)]


def wrapped_like_sqlalchemy(conn: Any) -> Any:
    return SimpleNamespace(connection=SimpleNamespace(driver_connection=conn))


def wrapped_like_django(conn: Any) -> Any:
    return SimpleNamespace(ensure_connection=lambda: None, connection=conn)


def wrapped_like_a_session(conn: Any) -> Any:
    return SimpleNamespace(get_bind=lambda: None, connection=lambda: wrapped_like_sqlalchemy(conn))


@pytest.mark.parametrize(
    "wrap", [wrapped_like_sqlalchemy, wrapped_like_django, wrapped_like_a_session]
)
async def test_wrappers(store: Any, connect: Any, wrap: Any) -> None:
    """The connection is found inside Django's and SQLAlchemy's wrappers."""
    conn = await connect(autocommit=True)
    await store.using(wrap(inside(conn))).set("k", b"v")
    assert await store.get("k") == b"v"


async def test_a_wrapper_of_another_driver(store: Any) -> None:
    """A wrapper of another driver's connection is refused by that driver's name."""
    other = type("connection", (), {"__module__": "psycopg2.extensions"})()
    with pytest.raises(pgkv.ConfigError, match=r"not psycopg2\.connection; switch that engine"):
        store.using(wrapped_like_sqlalchemy(other))


async def test_a_statement_that_fails_in_a_nested_transaction(
    store: Any, connect: Any, peer: Peer
) -> None:
    """A nested transaction on the caller's connection is rolled back to its savepoint: what the caller
    did before stays usable."""
    conn = await connect(autocommit=True)
    async with conn.transaction():
        await store.using(conn).set("before", "1")
        with pytest.raises(psycopg.errors.DivisionByZero):
            async with store.using(conn).transaction():
                await conn.execute("SELECT 1 / 0")
        await store.using(conn).set("after", "1")
    assert peer.keys() == {"before", "after"}
