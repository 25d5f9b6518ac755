"""Collecting expired rows: it frees space, changes no answer, and waits for nobody."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

import pgkv
from pgkv._engine._async import channel as async_channel
from pgkv._engine._sync import channel as sync_channel
from pgkv._engine.sweep import SWEEP_CHANCE, Collector
from pgkv._sql import sweep
from pgkv.testing import ServerClock
from tests.peers import Peer, until

MANUAL = pgkv.TtlCleanupStrategy.MANUAL


@pytest.fixture
def always_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dice of every write ask for a sweep."""
    for channel in (async_channel, sync_channel):
        monkeypatch.setattr(channel, "SWEEP_CHANCE", 1.0)


async def fill(store: Any, clock: ServerClock, *, expired: int, live: int = 0) -> None:
    """That many keys x0, x1, ... past their time, and l0, l1, ... that live."""
    await store.set_many({f"x{n}": b"old" for n in range(expired)}, ttl=60)
    clock.advance(61)
    await store.set_many({f"l{n}": b"live" for n in range(live)})


# -- on read ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "read",
    [
        lambda s: s.get("x0"),
        lambda s: s.get_entry("x0"),
        lambda s: s.get_string("x0"),
        lambda s: s.get_many(["x0", "l0"]),
    ],
    ids=["get", "get_entry", "get_string", "get_many"],
)
async def test_a_read_has_the_expired_row_deleted(
    make_store: Any, store: Any, clock: ServerClock, peer: Peer, read: Any
) -> None:
    """Under ON_READ a read that meets an expired row has it deleted soon after."""
    await fill(store.table("kv_store", ttl_cleanup_strategy=MANUAL), clock, expired=1, live=1)
    await read(store)
    await until(lambda: peer.keys() == {"l0"}, "the expired row is collected")


async def test_deletions_on_read_are_batched(
    store: Any,
    clock: ServerClock,
    peer: Peer,
    operations: list[tuple[str, str, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Deletions that reads ask for are sent together, not one round trip each."""
    # The reads may take longer than usual.
    monkeypatch.setattr("pgkv._engine.sweep.BATCH_DELAY", 0.5)
    await fill(store.table("kv_store", ttl_cleanup_strategy=MANUAL), clock, expired=50)
    operations.clear()
    await asyncio.gather(*(store.get(f"x{n}") for n in range(50)))
    await until(lambda: not peer.keys(), "the expired rows are collected")
    # The row is gone before who deleted it says so.
    await until(lambda: any(name == "collect" for name, *_ in operations), "it is reported")
    assert [name for name, *_ in operations].count("get") == 50
    assert [name for name, *_ in operations].count("collect") <= 25


async def test_collecting_spares_a_value_written_a_moment_later(
    store: Any, clock: ServerClock
) -> None:
    """The deletion asked for by a read names the expiry: a newer value stays."""
    await store.set("k", b"old", ttl=60)
    clock.advance(61)
    await store.set("k", b"new", ttl=60)
    await store.set("l", b"new")
    assert await store._execute(store._sql.collect([b"k", b"l", b"absent"])) == 0
    assert await store.get_many(["k", "l"]) == {"k": b"new", "l": b"new"}


async def test_collecting_skips_a_locked_row(
    make_store: Any, clock: ServerClock, peer: Peer
) -> None:
    """Rows that somebody holds are skipped, not waited for, by every kind of collecting."""
    store = await make_store(ttl_cleanup_strategy=MANUAL)
    await fill(store, clock, expired=3)
    with peer.conn.transaction():
        peer.run("SELECT FROM kv_store WHERE key = 'x1' FOR UPDATE")
        assert await store._execute(store._sql.collect([b"x0", b"x1"])) == 1
        assert await store.cleanup_expired() == 1
    assert peer.keys() == {"x1"}
    assert await store.cleanup_expired() == 1


async def test_reads_on_a_read_only_server(
    store: Any, make_store: Any, clock: ServerClock, peer: Peer, dsn: str, caplog: Any
) -> None:
    """Where nothing can be deleted a read still answers, and the failure is its own affair."""
    await fill(store.table("kv_store", ttl_cleanup_strategy=MANUAL), clock, expired=1, live=1)
    options = f"-c search_path={peer.one('SELECT current_schema()')},pg_catalog"
    reader = await make_store(
        dsn=f"{dsn} options='{options} -c default_transaction_read_only=on'",
        auto_create_table=False,
    )
    with caplog.at_level("DEBUG", "pgkv"):
        assert await reader.get("x0") is None
        assert await reader.get("l0") == b"live"
        await until(lambda: "pgkv.sweep.failed" in caplog.text, "the collector fails")
        assert await reader.get("x0") is None
    assert not [record for record in caplog.records if record.levelname != "DEBUG"]
    with pytest.raises(pgkv.StoreUnavailableError, match="read-only"):
        await reader.set("k", b"v")


# -- after writes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "write",
    [
        lambda s: s.set("l0", b"1"),
        lambda s: s.increment("l0"),
        lambda s: s.delete("l0"),
        lambda s: s.set_many({"l0": b"1"}),
    ],
    ids=["set", "increment", "delete", "set_many"],
)
async def test_writes_sweep_now_and_then(
    store: Any, clock: ServerClock, peer: Peer, always_sweep: None, write: Any
) -> None:
    """A write whose dice say so has a chunk of the table swept, so that keys nobody reads again
    do not pile up.
    """
    peer.run(
        "INSERT INTO kv_store (key, value, expires_at)"
        " SELECT 'x' || n, '', statement_timestamp() - interval '1 s' FROM generate_series(1, 9) n"
    )
    await write(store)
    await until(lambda: peer.keys() <= {"l0"}, "the expired rows are swept")


async def test_one_write_in_256_sweeps(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the numbers that writes draw one in 256 asks for a sweep; reads draw none."""
    asked: list[int] = []
    monkeypatch.setattr(Collector, "sweep", lambda self: asked.append(1))
    drawn = itertools.count()
    for channel in (async_channel, sync_channel):
        monkeypatch.setattr(channel, "SWEEP_CHANCE", SWEEP_CHANCE)
        monkeypatch.setattr(channel, "random", lambda: next(drawn) % 256 / 256)
    for n in range(512):
        await store.set("k", b"%d" % n)
        await store.get("k")
    assert len(asked) == 2
    assert next(drawn) == 512


@pytest.mark.parametrize("strategy", [MANUAL, pgkv.TtlCleanupStrategy.DISABLED])
async def test_only_cleanup_expired_collects(
    make_store: Any,
    clock: ServerClock,
    peer: Peer,
    always_sweep: None,
    strategy: Any,
    operations: list[tuple[str, str, int]],
) -> None:
    """Under MANUAL and DISABLED neither reads nor writes collect; cleanup_expired() does."""
    store = await make_store(ttl_cleanup_strategy=strategy)
    await fill(store, clock, expired=2)
    await store.get("x0")
    await store.get_many(["x0", "x1"])
    await store.set("l0", b"1")
    assert not {name for name, *_ in operations} & {"collect", "cleanup"}
    assert await store.cleanup_expired() == 2
    assert peer.keys() == {"l0"}


# -- cleanup_expired -------------------------------------------------------------------------


async def test_cleanup_expired(make_store: Any, clock: ServerClock, peer: Peer) -> None:
    """cleanup_expired removes every expired row and nothing else, and counts them."""
    store = await make_store(ttl_cleanup_strategy=MANUAL)
    await fill(store, clock, expired=500, live=20)
    await store.set("later", b"", ttl=60)
    assert await store.cleanup_expired() == 500
    assert await store.cleanup_expired() == 0
    assert len(peer.keys()) == 21


async def test_cleanup_expired_in_chunks(
    make_store: Any,
    clock: ServerClock,
    peer: Peer,
    monkeypatch: pytest.MonkeyPatch,
    operations: list[tuple[str, str, int]],
) -> None:
    """The table is swept in chunks of pages, all of them."""
    monkeypatch.setattr(sweep, "SWEEP_PAGES", 2)
    monkeypatch.setattr("pgkv._engine.sweep.SWEEP_PAGES", 2)
    store = await make_store(ttl_cleanup_strategy=MANUAL)
    await store.set_many({f"x{n}": b"x" * 1000 for n in range(100)}, ttl=60)
    clock.advance(61)
    operations.clear()
    assert await store.cleanup_expired() == 100
    assert [name for name, *_ in operations].count("cleanup") > 5
    assert peer.keys() == set()


async def test_cleanup_expired_with_a_limit(make_store: Any, clock: ServerClock) -> None:
    """limit bounds how many rows are removed."""
    store = await make_store(ttl_cleanup_strategy=MANUAL)
    await fill(store, clock, expired=10)
    assert await store.cleanup_expired(limit=4) == 4
    assert await store.cleanup_expired(limit=0) == 0
    assert (await store.stats()).expired_keys == 6
    assert await store.cleanup_expired(limit=100) == 6


# -- in the background -----------------------------------------------------------------------


async def test_background(make_store: Any, store: Any, clock: ServerClock, peer: Peer) -> None:
    """Under BACKGROUND expired rows go away without anybody reading or writing."""
    await fill(store.table("kv_store", ttl_cleanup_strategy=MANUAL), clock, expired=9, live=1)
    await make_store(ttl_cleanup_strategy=pgkv.TtlCleanupStrategy.BACKGROUND)
    await until(lambda: peer.keys() == {"l0"}, "the patrol sweeps")


async def test_one_process_of_a_fleet_sweeps(
    make_store: Any, clock: ServerClock, peer: Peer
) -> None:
    """While another process sweeps the table in the background, this one's sweep is empty."""
    store = await make_store(ttl_cleanup_strategy=MANUAL)
    await fill(store, clock, expired=5)
    with peer.conn.transaction():
        peer.run("SELECT pg_advisory_xact_lock(hashtext('pgkv sweep'), hashtext('\"kv_store\"'))")
        deleted, seen, _ = await store._execute(store._sql.sweep_alone(0))
        assert (deleted, seen) == (0, 5)
    deleted, *_ = await store._execute(store._sql.sweep_alone(0))
    assert deleted == 5


async def test_a_sweep_spares_what_was_renewed(
    make_store: Any, clock: ServerClock, peer: Peer
) -> None:
    """A row whose expiry was put off is not swept."""
    store = await make_store(ttl_cleanup_strategy=MANUAL)
    await store.set_many({"a": b"", "b": b""}, ttl=60)
    await store.expire("a", 600)
    clock.advance(61)
    assert await store.cleanup_expired() == 1
    assert peer.keys() == {"a"}
