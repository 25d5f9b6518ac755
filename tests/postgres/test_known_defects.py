"""Mistakes that comparable systems made, each with the test that it is not made here.

Most of them are of the Rust crate `pgkv`, whose tables are opened and shared, some of other
key-value stores on PostgreSQL.
"""

from __future__ import annotations

import asyncio
import math
from typing import Any

import psycopg
import pytest

import pgkv
from pgkv.testing import ServerClock
from tests.peers import Peer, until

# As the Rust crate makes it: the database's collation, no version, an index on expires_at.
RUST_TABLE = """
CREATE UNLOGGED TABLE IF NOT EXISTS "kv_store" (
    key TEXT PRIMARY KEY,
    value BYTEA NOT NULL,
    expires_at TIMESTAMPTZ,
    created_at TIMESTAMPTZ NOT NULL DEFAULT NOW(),
    updated_at TIMESTAMPTZ NOT NULL DEFAULT NOW()
);
CREATE INDEX IF NOT EXISTS "kv_store_expires_idx" ON "kv_store" (expires_at)
    WHERE expires_at IS NOT NULL;
"""
RUST_SET = """
INSERT INTO "kv_store" (key, value, expires_at, updated_at) VALUES (%s, %s, %s, NOW())
ON CONFLICT (key) DO UPDATE
    SET value = EXCLUDED.value, expires_at = EXCLUDED.expires_at, updated_at = NOW()
"""
LOOSE_TABLE = """
CREATE UNLOGGED TABLE kv_store (
    key TEXT COLLATE loose PRIMARY KEY, value BYTEA NOT NULL, expires_at TIMESTAMPTZ,
    created_at TIMESTAMPTZ NOT NULL DEFAULT NOW(), updated_at TIMESTAMPTZ NOT NULL DEFAULT NOW()
);
"""


@pytest.fixture
def expired(make_store: Any, clock: ServerClock) -> Any:
    """`await expired()` is a store whose key "k" holds b"5" and has ended, its row still there."""

    async def make() -> Any:
        store = await make_store(ttl_cleanup_strategy=pgkv.TtlCleanupStrategy.MANUAL)
        await store.set("k", b"5", ttl=60)
        clock.advance(61)
        return store

    return make


# -- of the Rust crate -----------------------------------------------------------------------


async def test_an_expired_row_does_not_block_set_nx(expired: Any) -> None:
    """set_nx takes the place of a row that has expired and that nobody collected."""
    store = await expired()
    assert await store.set_nx("k", b"new") is True
    assert await store.get("k") == b"new"


async def test_an_expired_row_does_not_block_cas_of_none(expired: Any) -> None:
    """compare_and_swap(None) takes the place of a row that has expired."""
    store = await expired()
    assert (await store.compare_and_swap("k", None, b"new")).is_success
    assert await store.get("k") == b"new"


@pytest.mark.parametrize(
    "write",
    [
        lambda s: s.set_many({"k": b"7"}),
        lambda s: s.increment("k", 7),
        lambda s: s.get_and_set("k", b"7"),
        lambda s: s.set("k", b"7", keep_ttl=True),
        lambda s: s.increment_many({"k": 7}),
    ],
    ids=["set_many", "increment", "get_and_set", "keep_ttl", "increment_many"],
)
async def test_a_write_on_an_expired_key_is_visible(expired: Any, write: Any) -> None:
    """What is written over an expired row does not inherit its expiry, and can be read."""
    store = await expired()
    await write(store)
    assert await store.get("k") == b"7"
    assert await store.ttl("k") == math.inf


async def test_get_and_set_never_returns_a_stale_value(
    store: Any, peer: Peer, witness: Peer
) -> None:
    """get_and_set that waited for another writer returns that writer's value."""
    await store.set("k", b"stale")
    with peer.conn.transaction():
        peer.run("UPDATE kv_store SET value = 'fresh', version = version + 1")
        waiting = asyncio.ensure_future(store.get_and_set("k", b"mine"))
        await witness.until_waiting()
    assert await waiting == b"fresh"


async def test_get_and_delete_returns_no_expired_value(expired: Any) -> None:
    """get_and_delete of a key that has expired is None."""
    assert await (await expired()).get_and_delete("k") is None


async def test_collecting_deletes_no_fresh_value(
    store: Any, clock: ServerClock, peer: Peer
) -> None:
    """A key that is read expired and written again before its deletion arrives is kept."""
    await store.set("k", b"old", ttl=60)
    await store.set("gone", b"old", ttl=60)
    clock.advance(61)
    await asyncio.gather(store.get("k"), store.get("gone"))
    await store.set("k", b"fresh")
    await until(lambda: peer.keys() == {"k"}, "the deletion has arrived")
    assert await store.get("k") == b"fresh"


async def test_the_clients_clock_decides_nothing(
    store: Any, clock: ServerClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a client whose clock is a day off keys live as long as they should."""
    monkeypatch.setattr("time.time", lambda: 0.0)
    clock.set_offset(86_400)
    await store.set("k", b"v", ttl=60)
    assert await store.get("k") == b"v"
    assert 0 < await store.ttl("k") <= 60
    clock.advance(61)
    assert await store.get("k") is None


async def test_a_batch_is_no_round_trip_per_key(
    store: Any, operations: list[tuple[str, str, int]]
) -> None:
    """set_many of a thousand keys is one statement."""
    operations.clear()
    await store.set_many({f"k{n}": b"v" for n in range(1000)})
    assert operations == [("set_many", "ok", 0)]


async def test_a_statement_is_prepared_once(make_store: Any, peer: Peer) -> None:
    """A statement is prepared once per connection and used again from there."""
    peer.run(
        "CREATE VIEW prepared AS SELECT name AS key, value, NULL::timestamptz AS expires_at FROM"
        " (SELECT name, (generic_plans + custom_plans)::text::bytea AS value"
        " FROM pg_prepared_statements) p"
    )
    store = await make_store(pool_max_size=1)
    for n in range(50):
        await store.set("k", b"%d" % n)
        await store.get("k")
    uses = await store.table("prepared", auto_create_table=False).scan()
    assert sorted(int(row.value) for row in uses)[-2:] == [50, 50]


async def test_a_prefix_is_no_like_pattern(store: Any) -> None:
    """'%', '_' and backslashes in a prefix stand for themselves."""
    await store.set_many({"a%b": b"", "a_b": b"", "axb": b"", "a\\b": b""})
    assert await store.keys("a%") == ["a%b"]
    assert await store.keys("a_") == ["a_b"]
    assert await store.keys("a\\") == ["a\\b"]
    assert await store.delete_prefix("a_") == 1
    assert await store.count() == 3


async def test_paging_needs_no_offset(store: Any) -> None:
    """A page begins after the last key of the one before, at the same cost for each."""
    keys = [f"k{n:02}" for n in range(25)]
    await store.set_many(dict.fromkeys(keys, b""))
    seen: list[str] = []
    while page := await store.keys("k", after=seen[-1] if seen else None, limit=10):
        seen += page
    assert seen == keys


# -- a table of the Rust crate's -------------------------------------------------------------


async def test_a_table_of_the_rust_crate_is_opened(
    make_store: Any, peer: Peer, clock: ServerClock
) -> None:
    """A table that the Rust crate made is opened with its rows, gets a version, and works."""
    peer.run(RUST_TABLE)
    for key in ("a", "B", "b"):
        peer.run(RUST_SET, key, b"rust", None)
    store = await make_store()
    assert await store.keys() == ["B", "a", "b"]
    assert await store.get("a") == b"rust"
    entry = await store.get_entry("a")
    assert entry.version == 1
    assert await store.set("a", b"mine", if_version=1) > 1
    assert await store.set("c", b"1", ttl=60) > 10**15
    assert await store.increment("n") == 1
    assert await store.get_and_set("b", b"2") == b"rust"
    assert (await store.compare_and_swap("B", b"rust", b"3")).is_success
    assert await store.delete_prefix("a") == 1
    clock.advance(61)
    assert await store.get("c") is None
    assert await store.keys() == ["B", "b", "n"]


async def test_the_rust_crate_goes_on_working(
    make_store: Any, peer: Peer, clock: ServerClock
) -> None:
    """A Rust worker writes to the table while pgkv uses it, and each sees the other's values."""
    peer.run(RUST_TABLE)
    store = await make_store()
    peer.run(RUST_SET, "k", b"rust", None)
    assert await store.get("k") == b"rust"
    await store.set("k", b"mine", ttl=60)
    assert peer.one("SELECT value FROM kv_store WHERE key = 'k'") == b"mine"
    peer.run(RUST_SET, "k", b"41", None)
    assert await store.increment("k") == 42
    peer.run(RUST_SET, "soon", b"x", clock.now())
    assert await store.get("soon") is None
    peer.run(RUST_TABLE)  # the worker's next start
    assert await store.get("k") == b"42"


async def test_new_rows_of_a_rust_worker_start_at_the_clock(make_store: Any, peer: Peer) -> None:
    """A row that a client without versions inserts gets one, and never 0."""
    peer.run(RUST_TABLE)
    peer.run(RUST_SET, "old", b"x", None)
    store = await make_store()
    peer.run(RUST_SET, "new", b"x", None)
    assert (await store.get_entry("old")).version == 1
    assert (await store.get_entry("new")).version > 10**15


async def test_a_rust_worker_writes_to_a_table_of_ours(store: Any, peer: Peer) -> None:
    """The Rust crate's INSERT works on a table that pgkv made."""
    peer.run(RUST_TABLE)
    peer.run(RUST_SET, "k", b"rust", None)
    assert await store.get("k") == b"rust"
    assert (await store.get_entry("k")).version > 0


async def test_what_goes_by_versions_does_not_notice_a_rust_worker(store: Any, peer: Peer) -> None:
    """update and if_version overwrite what a Rust worker wrote meanwhile; compare_and_swap, which goes
    by the value, does not.
    """
    await store.set("k", b"1")

    def meanwhile(_: bytes | None) -> bytes:
        peer.run(RUST_SET, "k", b"rust", None)
        return b"mine"

    assert await store.update("k", meanwhile) == b"mine"
    version = (await store.get_entry("k")).version
    peer.run(RUST_SET, "k", b"rust", None)
    assert not await store.compare_and_swap("k", b"mine", b"2")
    assert await store.set("k", b"2", if_version=version) is not None


async def test_a_prefix_under_another_collation(make_store: Any, peer: Peer) -> None:
    """Under a collation that sorts A1 between a and b, delete_prefix('a') leaves A1 alone."""
    try:
        peer.run("CREATE COLLATION loose (provider = icu, locale = 'en-US')")
    except psycopg.errors.FeatureNotSupported:
        try:
            peer.run("CREATE COLLATION loose (provider = libc, locale = 'en_US.utf8')")
        except psycopg.Error:
            pytest.skip("this server has neither ICU nor the locale en_US")
    peer.run(LOOSE_TABLE)
    store = await make_store()
    keys = ["A", "A1", "B", "a", "a1", "b", "ä", "Ä1"]
    await store.set_many(dict.fromkeys(keys, b""))
    assert peer.one("SELECT count(*) FROM kv_store WHERE key >= 'a' AND key < 'b'") > 2
    assert await store.keys("a") == ["a", "a1"]
    assert await store.keys() == sorted(keys, key=str.encode)
    assert await store.keys(after="B", limit=2) == ["a", "a1"]
    assert [key async for key in store.iter_keys(page_size=1)] == sorted(keys, key=str.encode)
    assert await store.delete_prefix("a") == 2
    assert await store.count() == 6


# -- of others -------------------------------------------------------------------------------


async def test_expired_rows_are_removed(make_store: Any, clock: ServerClock, peer: Peer) -> None:
    """py-key-value: expired rows stayed for ever. Here a background strategy removes them."""
    store = await make_store(ttl_cleanup_strategy=pgkv.TtlCleanupStrategy.BACKGROUND)
    await store.set("k", b"v", ttl=60)
    clock.advance(61)
    await until(lambda: not peer.keys(), "the row is removed")


async def test_rows_without_ttl_are_readable(store: Any, peer: Peer) -> None:
    """Kinto: rows whose ttl is NULL could not be read. Here they never expire."""
    peer.run("INSERT INTO kv_store (key, value, expires_at) VALUES ('k', 'v', NULL)")
    assert await store.get("k") == b"v"
    assert await store.get_many(["k"]) == {"k": b"v"}
    assert await store.ttl("k") == math.inf


@pytest.mark.parametrize("seconds", [59, 61, 3601, 90_061, 40_000_000])
async def test_ttl_beyond_a_minute(store: Any, seconds: int) -> None:
    """Kinto: ttl() told the seconds field, wrong beyond a minute. Here it is all of them."""
    await store.set("k", b"v", ttl=seconds)
    assert seconds - 30 < await store.ttl("k") <= seconds


@pytest.mark.parametrize(
    "ddl",
    [
        "CREATE TABLE kv_store (key text PRIMARY KEY, value jsonb)",
        "CREATE TABLE kv_store (id int)",
        "CREATE TABLE kv_store (key bigint, value bytea, expires_at timestamptz,"
        " created_at timestamptz, updated_at timestamptz, version bigint)",
    ],
)
async def test_a_foreign_table_is_left_alone(make_store: Any, peer: Peer, ddl: str) -> None:
    """xtdlib/pgkv: a table whose types differ was dropped. Here it is refused and stays."""
    peer.run(ddl)
    before = peer.run(
        "SELECT attname, atttypid FROM pg_attribute WHERE attrelid = 'kv_store'::regclass"
    )
    with pytest.raises(pgkv.ConfigError, match=r"not a pgkv table.*choose another table_name"):
        await make_store()
    after = peer.run(
        "SELECT attname, atttypid FROM pg_attribute WHERE attrelid = 'kv_store'::regclass"
    )
    assert after == before


@pytest.mark.parametrize("value", [b"", "", b"0", b"\0"])
async def test_falsy_values(store: Any, value: Any) -> None:
    """PyPI's pgkv refused falsy values. Here an empty value is a value for every call."""
    raw = value.encode() if isinstance(value, str) else value
    await store.set("k", value)
    assert await store.get("k", b"default") == raw
    assert await store.get_or_raise("k") == raw
    assert await store.get_string("k") == raw.decode()
    assert await store.get_many(["k"]) == {"k": raw}
    assert await store.scan() == [("k", raw)]
    assert (await store.get_entry("k")).value == raw
    assert await store.set_nx("k", b"other") is False
    assert await store.compare_and_swap("k", value, value)
    assert await store.get_and_set("k", value) == raw
    assert await store.update("k", lambda old: old) == raw
    assert await store.get_and_delete("k") == raw


async def test_one_connection_serves_many_operations(make_store: Any, peer: Peer) -> None:
    """Others open a connection per operation. Here one after the other uses the same one."""
    store = await make_store()
    await store.set("k", b"v")
    query = (
        "SELECT array_agg(pid ORDER BY pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        " AND backend_type = 'client backend'"
    )
    before = peer.one(query)
    for _ in range(100):
        await store.get("k")
    assert peer.one(query) == before
