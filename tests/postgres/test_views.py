"""Ways to a store and views of one: connect, pools, namespaces, other tables, the mapping protocol."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import psycopg_pool
import pytest

import pgkv
from pgkv.testing import ServerClock
from tests.peers import Peer, fetch
from tests.variants import Threaded, Variant, in_thread, inside


async def test_namespace(store: Any) -> None:
    """In a namespace every key carries the prefix going in and none coming out."""
    inner = store.namespace("n:")
    assert await inner.set("a", b"1") > 0
    assert await store.get("n:a") == b"1"
    assert await inner.get("a") == b"1"
    assert await inner.get("n:a") is None
    assert (await inner.get_entry("a")).key == "a"
    assert await inner.increment("a") == 2
    assert await inner.update("a", lambda old: old + b"!") == b"2!"
    assert await inner.keys() == ["a"]
    assert await inner.delete("a") is True


async def test_namespaces_nest(store: Any) -> None:
    """Prefixes of nested namespaces are joined with nothing in between."""
    inner = store.namespace("a").namespace("b")
    await inner.set("c", b"")
    assert await store.keys() == ["abc"]
    assert await store.namespace("ab").keys() == ["c"]


async def test_namespaces_do_not_see_each_other(store: Any, clock: ServerClock) -> None:
    """clear, count, scans and batches keep to their namespace."""
    one, two = store.namespace("1:"), store.namespace("2:")
    await one.set_many({"a": b"1", "b": b"1"})
    await two.set_many({"a": b"2"}, ttl=60)
    assert await one.count() == 2
    assert await two.scan() == [("a", b"2")]
    assert await one.clear() == 2
    assert await two.get_many(["a", "b"]) == {"a": b"2"}
    clock.advance(61)
    assert await two.count() == 0


@pytest.mark.parametrize("prefix", ["ž", "\U0010ffff", "%", "a'b", "\ud7ff"])
async def test_any_prefix(store: Any, prefix: str) -> None:
    """A namespace may have any prefix."""
    inner = store.namespace(prefix)
    await inner.set_many({"a": b"1", "\U0010ffff": b"2"})
    await store.set("outside", b"")
    assert await inner.keys() == ["a", "\U0010ffff"]
    assert await inner.clear() == 2
    assert await store.keys() == ["outside"]


async def test_errors_name_the_key_without_prefix(store: Any) -> None:
    """In a namespace an error names the key as the caller knows it."""
    with pytest.raises(pgkv.NotFoundError, match="no such key: 'k'"):
        await store.namespace("n:").get_or_raise("k")


async def test_tables_are_apart(store: Any, peer: Peer) -> None:
    """table() gives another table over the same connections; it is made at its first use."""
    other = store.table("other", table_type=pgkv.TableType.REGULAR)
    assert peer.one("SELECT to_regclass('other')") is None
    await other.set("k", b"other")
    await store.set("k", b"first")
    assert await other.get("k") == b"other"
    assert peer.one("SELECT relpersistence FROM pg_class WHERE oid = 'other'::regclass") == "p"


async def test_options_of_a_table(store: Any, clock: ServerClock) -> None:
    """table() takes a table's own options; what is not given is as in the store."""
    small = store.table("kv_store", max_value_size=3)
    with pytest.raises(pgkv.InvalidValueError, match="max_value_size is 3"):
        await small.set("k", b"1234")
    await store.set("k", b"1234", ttl=60)
    clock.advance(61)
    everything = store.table("kv_store", ttl_cleanup_strategy=pgkv.TtlCleanupStrategy.DISABLED)
    assert await everything.get("k") == b"1234"


async def test_views_close_nothing(store: Any) -> None:
    """Closing a view leaves the store open."""
    await store.namespace("n:").close()
    await store.table("kv_store").close()
    await store.set("k", b"v")
    assert await store.get("k") == b"v"


async def test_a_closed_store(make_store: Any) -> None:
    """A closed store, and its views, refuse every operation, and say why."""
    store = await make_store()
    inner = store.namespace("n:")
    await store.close()
    await store.close()
    for closed in (store, inner):
        with pytest.raises(pgkv.StoreUnavailableError, match="closed") as caught:
            await closed.get("k")
        assert not caught.value.retryable


async def test_as_context_manager(variant: Variant, dsn: str) -> None:
    """Leaving the `with` block closes the store."""
    async with await variant.connect(dsn) as store:
        await store.set("k", b"v")
    with pytest.raises(pgkv.StoreUnavailableError, match="closed"):
        await store.get("k")


async def test_connecting_nowhere(variant: Variant, server: Any) -> None:
    """connect() to a server that is not there says so at once."""
    with pytest.raises(pgkv.StoreUnavailableError, match="no connection to PostgreSQL") as caught:
        await variant.connect("postgresql://127.0.0.1:1/db", connect_timeout=5, retry=None)
    assert isinstance(caught.value, ConnectionError)


async def test_dsn_from_the_environment(
    variant: Variant, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a DSN connect() takes PGKV_DSN, else DATABASE_URL."""
    nothing: Any = None
    monkeypatch.delenv("PGKV_DSN", raising=False)
    monkeypatch.setenv("DATABASE_URL", dsn)
    async with await variant.connect(nothing) as store:
        assert await store.ping() > 0
    monkeypatch.setenv("DATABASE_URL", "postgresql://127.0.0.1:1/db")
    monkeypatch.setenv("PGKV_DSN", dsn)
    async with await variant.connect(nothing) as store:
        assert await store.ping() > 0


async def test_a_store_that_is_made_lazily(variant: Variant, dsn: str, peer: Peer) -> None:
    """A store made of a Config connects, and makes its table, at its first operation."""
    store = variant.make("Store", pgkv.Config(dsn, table_name="lazy"))
    assert peer.one("SELECT to_regclass('lazy')") is None
    try:
        assert await store.increment("k") == 1
    finally:
        await store.close()


async def test_settings_of_the_connections(make_store: Any, dsn: str, peer: Peer) -> None:
    """Connections run with READ COMMITTED, without jit, in UTF-8, under the application's name."""
    shown = "SELECT name AS key, setting::bytea AS value, NULL::timestamptz AS expires_at FROM pg_settings"
    peer.run(f"CREATE VIEW settings AS {shown}")
    schema = peer.one("SELECT current_schema()")
    store = await make_store(dsn=f"{dsn} application_name=mine options='-c search_path={schema}'")
    settings = store.table("settings", auto_create_table=False)
    found = await settings.get_many(
        ["default_transaction_isolation", "jit", "client_encoding", "application_name"]
    )
    assert found == {
        "default_transaction_isolation": b"read committed",
        "jit": b"off",
        "client_encoding": b"UTF8",
        "application_name": b"mine",
    }


async def test_from_pool(variant: Variant, dsn: str) -> None:
    """from_pool uses the caller's pool, one checkout per operation, and never closes it."""
    pool: Any
    if variant.name == "sync":
        pool = psycopg_pool.ConnectionPool(dsn, min_size=1, max_size=2, open=True)
        store: Any = Threaded(pgkv.Store.from_pool(pool, table_name="pooled"))
        close: Any = lambda: in_thread(pool.close)  # noqa: E731  one name for both variants
    else:
        pool = psycopg_pool.AsyncConnectionPool(dsn, min_size=1, max_size=2, open=False)
        await pool.open()
        store = pgkv.AsyncStore.from_pool(pool, table_name="pooled")
        close = pool.close
    try:
        assert await store.increment("k") == 1
        async with store.transaction() as tx:
            assert await tx.increment("k") == 2
        assert pool.get_stats()["requests_num"] >= 2
        await store.close()
        assert not pool.closed
        conn = Threaded(pool.getconn()) if variant.name == "sync" else await pool.getconn()
        try:
            query = "SELECT value FROM pooled WHERE key = %s"
            assert await fetch(conn, query, "k") == [(b"2",)]
        finally:
            plain = inside(conn)
            given = pool.putconn(plain)
            if given is not None:
                await given
    finally:
        await close()


# -- the mapping protocol, of the blocking store only ---------------------------------------


@pytest.fixture
def mapping(dsn: str) -> Iterator[pgkv.Store]:
    """The blocking store as it is."""
    with pgkv.Store.connect(dsn) as store:
        yield store


def test_items(mapping: pgkv.Store) -> None:
    """store[k], store[k] = v, del store[k] and `in` work as on a dict."""
    mapping["k"] = "v"
    assert mapping["k"] == b"v"
    assert "k" in mapping
    del mapping["k"]
    assert "k" not in mapping
    with pytest.raises(KeyError, match="no such key: 'k'"):
        mapping["k"]
    with pytest.raises(pgkv.NotFoundError):
        del mapping["k"]


def test_iteration(mapping: pgkv.Store) -> None:
    """iter(store) gives the keys in order."""
    mapping.set_many({"b": b"", "a": b""})
    assert list(mapping) == ["a", "b"]


def test_truth(mapping: pgkv.Store) -> None:
    """A store is true, also an empty one, and has no length."""
    assert bool(mapping) is True
    assert not hasattr(mapping, "__len__")


def test_async_callbacks_are_refused(mapping: pgkv.Store) -> None:
    """A coroutine function given to the blocking store's update() is refused, with advice."""

    async def fn(_: bytes | None) -> bytes:
        return b""

    with pytest.raises(TypeError, match="AsyncStore"):
        mapping.update("k", fn)  # type: ignore[arg-type]  # that is the test
    assert "k" not in mapping


def test_isolation_levels_are_psycopgs(mapping: pgkv.Store) -> None:
    """run_transaction of the blocking store takes an ordinary function."""
    level = psycopg.IsolationLevel.SERIALIZABLE
    assert mapping.run_transaction(lambda tx: tx.increment("k"), isolation=level) == 1
