"""`store.watch`: what a watcher sees, and when."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import threading
import time
from typing import Any

import psycopg_pool
import pytest
from psycopg import sql

import pgkv
from pgkv._background import listener as _listener
from pgkv._ops.drivers import drive
from pgkv._ops.op import pause
from pgkv._shards.slots import Slots
from pgkv._shards.store import sharded_config
from pgkv._sql.watch import CHANNEL, KEYS_MAX, PAYLOADS_MAX, _payloads
from pgkv._watch import source as _source
from pgkv._watch.hints import NotingChannel
from tests import FULL
from tests.peers import Peer, until
from tests.variants import Variant, inside

LONG = 60.0  # seconds in which an event comes, on the slowest machine


async def told(events: Any, count: int = 1, timeout: float = LONG) -> list[tuple[str, str]]:
    """The next events' kinds and keys."""
    found = [await events.next(timeout=timeout) for _ in range(count)]
    return [(event.kind, event.key) if event else ("none", "") for event in found]


async def quiet(events: Any) -> None:
    """Let the comparison that follows the first notification of a connection pass."""
    source = inside(events)._source
    await until(lambda: source._listener.is_listening(CHANNEL), "it listens")
    turned = threading.Event()
    source._listener._loop.call_soon_threadsafe(turned.set)
    await until(turned.is_set, "the sources were told of it")
    assert await events.next(timeout=0.05) is None


def touch(peer: Peer, key: str) -> None:
    """Change a row as another program would, without telling."""
    assert peer.run(
        "UPDATE kv_store SET version = version + 1 WHERE key = %s RETURNING version", key
    )


def hint(peer: Peer, *keys: str) -> None:
    """Tell of keys as another process would."""
    schema = peer.one("SELECT current_schema()")
    peer.run("SELECT pg_notify(%s, %s)", CHANNEL, json.dumps([schema, "kv_store", *keys]))


def listening(peer: Peer) -> list[tuple[int]]:
    """The backends that listen for watchers."""
    return peer.run(
        "SELECT pid FROM pg_stat_activity WHERE query LIKE 'LISTEN%%pgkv_watch%%'"
        " AND datname = current_database() AND pid <> pg_backend_pid()"
    )


# -- events


async def test_what_is_told(make_store: Any, variant: Variant) -> None:
    """A write, a removal and an end of a key by its ttl, of the keys that are watched, with version and
    value; a namespace's keys without its prefix."""
    store = await make_store(notify=True)
    space = store.namespace("app:")
    await space.set("b", b"old")
    async with (
        space.watch(["a", "b"], values=True, poll=None) as events,
        store.watch("app:", prefix=True, poll=None) as wide,
    ):
        version = await space.set("a", b"1")
        assert await events.next(timeout=LONG) == pgkv.Event("set", "a", version, b"1")
        await space.delete("b")
        assert await told(events) == [("gone", "b")]
        assert sorted(await told(wide, 2)) == [("gone", "app:b"), ("set", "app:a")]
        await space.set("other", b"1")
        assert await told(wide) == [("set", "app:other")]
        assert await events.next(timeout=0.1) is None
        await space.set("a", b"2", ttl=3600)
        assert await told(events) == [("set", "a")]
        await space.expire("a", 0.3)
        assert await told(events) == [("gone", "a")]
    assert await events.next(timeout=1) is None


async def test_a_key_ends_without_a_sweep(make_store: Any, variant: Variant) -> None:
    """The end of a key by its ttl is an event, although nothing removes the row; a new ttl moves it, and
    is no event itself."""
    store = await make_store(notify=True, ttl_cleanup_strategy=pgkv.TtlCleanupStrategy.MANUAL)
    await store.set("k", b"v", ttl=3600)
    async with store.watch("k", poll=None) as events:
        source = inside(events)._source
        for ttl in (1800, 7200):
            await store.expire("k", ttl)
            while abs(source.known["k"].ends - time.monotonic() - ttl) > 900:
                assert await events.next(timeout=0.02) is None
        await store.expire("k", 0.3)
        assert await told(events) == [("gone", "k")]
        assert source._ends == math.inf
        assert await store.count(include_expired=True) == 1


async def test_initial(store: Any, variant: Variant) -> None:
    """What is there comes first, then a resync; what changes meanwhile is told once."""
    await store.set_many({f"k:{n}": b"v" for n in range(3)})
    async with store.watch("k:", prefix=True, initial=True, values=True) as events:
        assert await told(events) == [("set", "k:0")]
        await store.delete("k:1")
        await store.set("k:2", b"new")
        source = inside(events)._source
        source.hint([])  # everything may have changed
        assert await told(events, 2) == [("set", "k:1"), ("set", "k:2")]
        assert await told(events) == [("resync", "")]
        assert sorted(await told(events, 2)) == [("gone", "k:1"), ("set", "k:2")]
        assert await events.next(timeout=0) is None


async def test_many_kinds_of_writes(make_store: Any, variant: Variant) -> None:
    """Every way to write is told: batches, counters, pipelines, scans, whole tables, transactions."""
    store = await make_store(notify=True)
    async with store.watch("", prefix=True, poll=None) as events:
        await quiet(events)
        await store.set_many({"a": b"1", "b": b"1"})
        assert sorted(await told(events, 2)) == [("set", "a"), ("set", "b")]
        await store.increment_many({"a": 1})
        assert await told(events) == [("set", "a")]
        async with store.pipeline() as pipe:
            pipe.set("b", b"2")
            pipe.get("a")
        assert await told(events) == [("set", "b")]
        async with store.pipeline(atomic=True) as pipe:
            pipe.increment("n")
        assert await told(events) == [("set", "n")]
        await store.update("n", lambda value: b"7")
        assert await told(events) == [("set", "n")]
        await store.typed(int).set("n", 8)
        assert await told(events) == [("set", "n")]
        await store.delete_prefix("n")
        assert await told(events) == [("gone", "n")]
        await store.delete_many(["a"])
        assert await told(events) == [("gone", "a")]
        await store.truncate()
        assert await told(events) == [("gone", "b")]
        await store.load([("c", b"1")])
        assert await told(events) == [("set", "c")]
        await store.set_many({f"{n}": b"v" for n in range(6_000)})
        assert len({key for _, key in await told(events, 6_000)}) == 6_000


async def rolled_back(store: Any, key: str) -> None:
    """Write a key in a transaction, or savepoint, that is rolled back."""
    with contextlib.suppress(ZeroDivisionError):
        async with store.transaction() as tx:
            await tx.set(key, b"1")
            raise ZeroDivisionError


async def test_a_transaction_tells_at_its_commit(
    make_store: Any, variant: Variant, connect: Any
) -> None:
    """Nothing is told before the commit, and nothing of what was rolled back, also to a savepoint; the
    same on a caller's connection."""
    store = await make_store(notify=True)
    conn = await connect()
    heard: list[str] = []
    async with store.watch("", prefix=True, poll=None) as events:
        await quiet(events)
        ears = inside(events)._source._listener
        ears.subscribe(CHANNEL, heard.append)
        async with store.transaction() as tx:
            await tx.set("kept", b"1")
            await rolled_back(tx, "lost")
            async with tx.pipeline() as pipe:
                pipe.set("too", b"1")
            assert await events.next(timeout=0.1) is None
            assert heard == []
        assert sorted(await told(events, 2)) == [("set", "kept"), ("set", "too")]
        await rolled_back(store, "lost")
        await store.using(conn).set("mine", b"1")
        assert await events.next(timeout=0.1) is None
        await conn.commit()
        assert await told(events) == [("set", "mine")]
    assert not any("lost" in payload for payload in heard)


async def test_who_tells(make_store: Any, variant: Variant, peer: Peer) -> None:
    """`notify` of a store, a namespace and a table; what is written without it is not told, and goes
    through no more than before."""
    store = await make_store()
    assert inside(store)._channel is inside(store)._bare
    async with store.watch("", prefix=True, poll=None) as events:
        await quiet(events)
        await store.set("silent", b"1")
        assert await events.next(timeout=0.1) is None
        await store.namespace("loud:", notify=True).set("k", b"1")
        assert await told(events) == [("set", "loud:k")]
        await store.table("kv_store", notify=True).set("k", b"1")
        assert await told(events) == [("set", "k")]
        assert not inside(store.table("other"))._config.notify


async def test_closing_a_store_sends_what_it_has_to_tell(make_store: Any, variant: Variant) -> None:
    """A program that writes and ends is heard."""
    store = await make_store()
    async with store.watch("k", poll=None) as events:
        await quiet(events)
        other = await make_store(notify=True)
        await other.set("k", b"1")
        await other.close()
        assert await told(events) == [("set", "k")]


async def test_writing_without_watchers_opens_nothing(
    make_store: Any, variant: Variant, peer: Peer
) -> None:
    """notify=True listens to nothing by itself."""
    store = await make_store(notify=True)
    for n in range(20):
        await store.set(f"k{n}", b"v")
    assert listening(peer) == []


async def test_what_travels_together_is_told(dsn: str) -> None:
    """The writes of one turn of the event loop, in a store that coalesces."""
    async with (
        pgkv.AsyncStore.connect(dsn, coalesce=True, notify=True) as store,
        store.watch("", prefix=True, poll=None) as events,
    ):
        await quiet(events)
        await asyncio.gather(*(store.set(f"k{n}", b"v") for n in range(20)), store.get("k0"))
        assert sorted(await told(events, 20)) == sorted(("set", f"k{n}") for n in range(20))


# -- races


async def test_a_change_while_the_first_read_is_under_way(
    store: Any, variant: Variant, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change after the first read took its snapshot, told before the watcher has used the answer, is an
    event: with poll=None nothing else would find it."""
    await store.set("k", b"1")
    rows = _source.Source._rows
    late: list[int] = []

    def slow(source: Any, keys: Any) -> Any:
        found = yield from rows(source, keys)
        if not late:
            late.append(1)
            touch(peer, "k")
            hint(peer, "k")
            while not source._hinted:
                yield from pause(0.005)
        return found

    async with store.watch("other", poll=None) as first:
        await quiet(first)  # or the comparison that follows would find it
        monkeypatch.setattr(_source.Source, "_rows", slow)
        async with store.watch("k", poll=None) as events:
            assert await told(events) == [("set", "k")]


async def test_a_change_before_listen_is_in_the_first_read(
    store: Any, variant: Variant, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written while LISTEN is on its way is read with the rest: no event, and no loss."""
    await store.set("k", b"1")
    listen_sql = _listener.listen_sql

    def slow(channels: list[str]) -> Any:
        if CHANNEL in channels:
            touch(peer, "k")
        return listen_sql(channels)

    monkeypatch.setattr(_listener, "listen_sql", slow)
    async with store.watch("k", poll=None) as events:
        version = peer.one("SELECT version FROM kv_store WHERE key = 'k'")
        assert inside(events)._source.known["k"].version == version


async def test_a_lost_hint_is_found_by_poll(store: Any, variant: Variant, peer: Peer) -> None:
    """A change of which nothing tells is found by the next comparison; hints without a change, or
    twice, are no event."""
    await store.set("k", b"1")
    async with store.watch("k", poll=0.2) as events, store.watch("k", poll=None) as deaf:
        await quiet(deaf)
        touch(peer, "k")
        assert await told(events) == [("set", "k")]
        assert await deaf.next(timeout=0.1) is None
        for _ in range(2):
            hint(peer, "k", "k")
        peer.run("SELECT pg_notify(%s, 'no payload of ours')", CHANNEL)
        assert await told(deaf) == [("set", "k")]
        assert await deaf.next(timeout=0.2) is None


async def test_a_lost_connection_is_a_resync(
    store: Any, variant: Variant, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The LISTEN connection is ended by the server, and a key changes meanwhile: a resync, then the key.
    Nothing polls."""
    monkeypatch.setattr(_source, "POLL_DEAF", 1e6)
    await store.set("k", b"1")
    async with store.watch("k", poll=None) as events:
        await quiet(events)
        ((pid,),) = listening(peer)
        touch(peer, "k")
        peer.run("SELECT pg_terminate_backend(%s)", pid)
        assert await told(events, 2) == [("resync", ""), ("set", "k")]
        assert await events.next(timeout=0.1) is None


async def test_behind_a_transaction_pooler_it_polls(
    make_store: Any,
    variant: Variant,
    peer: Peer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """pooler=TRANSACTION: nothing listens, which is logged, and changes are found all the same."""
    assert _source.POLL_DEAF == 1.0
    monkeypatch.setattr(_source, "POLL_DEAF", 0.1)
    _listener._said.clear()
    store = await make_store(pooler=pgkv.Pooler.TRANSACTION)
    await store.set("k", b"1")
    async with store.watch("k") as events:
        touch(peer, "k")
        assert await told(events) == [("set", "k")]
        assert listening(peer) == []
    assert caplog.text.count("pgkv.listener.polling") == 1


async def test_an_undeclared_pooler_is_noticed(
    store: Any, variant: Variant, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LISTEN is accepted and nothing is heard: the table is polled from the beginning."""
    monkeypatch.setattr(_source, "POLL_DEAF", 0.1)
    monkeypatch.setattr(_listener, "TRIAL_TIME", 0.2)
    monkeypatch.setattr(_listener, "listen_sql", lambda channels: sql.SQL("LISTEN pgkv_elsewhere"))
    await store.set("k", b"1")
    async with store.watch("k", poll=None) as events:
        for _ in range(3):
            touch(peer, "k")
            assert await told(events) == [("set", "k")]
        await until(lambda: inside(events)._source._listener.unavailable, "the trial fails")
        touch(peer, "k")
        found = await told(events)
        assert ("set", "k") in (found if found != [("resync", "")] else await told(events))


async def test_watchers_of_one_key_share_a_read(
    make_store: Any, variant: Variant, peer: Peer, operations: list[tuple[str, str, int]]
) -> None:
    """Of twenty watchers of a key all hear of a change, and one reads; one connection listens."""
    store = await make_store(notify=True)
    async with store.watch("k", poll=None) as first:
        others = [store.watch("k", poll=None) for _ in range(19)]
        watchers = [first, *[await each.__aenter__() for each in others]]
        await quiet(first)
        waiting = [asyncio.ensure_future(told(each)) for each in watchers]
        source = inside(first)._source
        await until(lambda: len(source.waiting) == 20, "all wait")
        operations.clear()
        await store.set("k", b"1")
        assert await asyncio.gather(*waiting) == [[("set", "k")]] * 20
        assert [name for name, *_ in operations].count("watch") == 1
        assert len(listening(peer)) == 1
        for each in others:
            await each.__aexit__(None, None, None)
        assert len(source.hearers) == 1


async def test_a_reader_that_gives_up_leaves_its_work(
    make_store: Any, variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watcher that was woken to read is cancelled: another reads."""
    if variant.name == "sync":
        pytest.skip("a thread is not cancelled")
    store = await make_store(notify=True)
    rows = _source.Source._rows
    hung: list[asyncio.Task[Any] | None] = []

    def slow(source: Any, keys: Any) -> Any:
        if not hung:
            hung.append(asyncio.current_task())
            yield from pause(1e6)
        return (yield from rows(source, keys))

    async with store.watch("k", poll=None) as first, store.watch("k", poll=None) as second:
        await quiet(first)
        monkeypatch.setattr(_source.Source, "_rows", slow)
        waiting = [asyncio.ensure_future(told(each)) for each in (first, second)]
        await store.set("k", b"1")
        await until(lambda: hung, "one reads")
        task = hung[0]
        assert task is not None
        task.cancel()
        (left,) = [each for each in waiting if each is not task]
        assert await left == [("set", "k")]
        before = asyncio.all_tasks()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() <= before


# -- bounds


async def test_many_hints_become_a_resync(
    store: Any, variant: Variant, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A consumer that was busy meanwhile gets a resync, and each key once."""
    monkeypatch.setattr(_source, "HINTS_MAX", 10)
    await store.set_many({f"k{n:02}": b"v" for n in range(20)})
    async with store.watch("k", prefix=True, poll=None) as events:
        await quiet(events)
        source = inside(events)._source
        for n in range(20):
            touch(peer, f"k{n:02}")
            hint(peer, f"k{n:02}")
        await until(lambda: source._gap, "it hears of more than it keeps")
        assert len(source._hinted) <= 10
        assert await told(events) == [("resync", "")]
        assert sorted(await told(events, 20)) == [("set", f"k{n:02}") for n in range(20)]


async def test_memory_of_a_slow_consumer(make_store: Any, variant: Variant) -> None:
    """Keys that come and go while a consumer does not look leave nothing behind."""
    store = await make_store(notify=True)
    async with store.watch("k", prefix=True) as slow, store.watch("k", prefix=True) as quick:
        await quiet(quick)
        for n in range(20):
            await store.set(f"k{n}", b"v")
            assert await told(quick) == [("set", f"k{n}")]
            await store.delete(f"k{n}")
            assert await told(quick) == [("gone", f"k{n}")]
        assert inside(slow)._pending == {}
        assert await slow.next(timeout=0) is None


ODD = ['"', "\\", "\x1e", "\x01" * 2600, "\U0001f600" * 650, "é" * 1300, "[1]", "a\nb"]


async def test_keys_of_any_kind_are_told(make_store: Any, variant: Variant) -> None:
    """Quotes, separators, control characters, the longest keys in one to four bytes."""
    store = await make_store(notify=True, max_key_length=2600)
    async with store.watch("", prefix=True, poll=None) as events:
        await quiet(events)
        for key in ODD:
            await store.set(key, b"1")
            assert await told(events) == [("set", key)]


def test_payloads_fit() -> None:
    """Keys are cut into payloads that the server takes; of too many, or of one that does not fit, nothing
    is named."""
    for keys in ([key.encode() for key in ODD if key != ODD[3]], [b"k%d" % n for n in range(5000)]):
        parts = _payloads(keys)
        assert max(map(len, parts)) <= KEYS_MAX
        assert [k.encode() for part in parts for k in json.loads(b"[" + part[1:] + b"]")] == keys
    assert _payloads([b"\x01" * 2600]) == [b""]
    assert _payloads([b"%0100d" % n for n in range(PAYLOADS_MAX * KEYS_MAX // 100)]) == [b""]
    assert _payloads([]) == [b""]


async def test_triggers_tell_of_every_writer(make_store: Any, variant: Variant, peer: Peer) -> None:
    """With the triggers of `watch_sql` any program's writes are heard; the text may be run again."""
    store = await make_store(max_key_length=2600)
    config = inside(store)._config
    schema = peer.one("SELECT current_schema()")
    for _ in range(2):
        peer.run(pgkv.watch_sql(pgkv.Config(config.dsn, schema=schema)))
    row = "INSERT INTO kv_store (key, value, created_at, updated_at, version) "
    async with store.watch("", prefix=True, poll=None) as events:
        await quiet(events)
        for key in ODD:
            peer.run(row + "VALUES (%s, 'v', now(), now(), 1)", key)
            assert await told(events) == [("set", key)]
        peer.run("UPDATE kv_store SET version = 2 WHERE key = 'a\nb'")
        assert await told(events) == [("set", "a\nb")]
        peer.run("UPDATE kv_store SET version = 2 WHERE false")
        peer.run("DELETE FROM kv_store")
        assert {kind for kind, _ in await told(events, len(ODD))} == {"gone"}
        peer.run(row + "SELECT 'k' || n, 'v', now(), now(), 1 FROM generate_series(1, 2000) n")
        assert len([kind for kind, _ in await told(events, 2000) if kind == "set"]) >= 1999
        peer.run("TRUNCATE kv_store")
        assert ("gone", "k1") in await told(events, 2000)


# -- ends


async def test_close_ends_the_iteration(make_store: Any, store: Any, variant: Variant) -> None:
    """close() from elsewhere, and closing the store, end a `for` that waits; another store with the same
    background goes on."""

    async def everything(events: Any) -> list[Any]:
        return [event async for event in events]

    other = await make_store()
    async with (
        other.watch("k", poll=None),
        store.watch("k", poll=None) as events,
        store.watch("k", poll=None) as left,
    ):
        waiting = [asyncio.ensure_future(everything(each)) for each in (events, left)]
        await until(lambda: len(inside(events)._source.waiting) == 2, "both wait")
        await asyncio.to_thread(inside(events).close)
        assert await asyncio.wait_for(waiting[0], LONG) == []
        assert not waiting[1].done()
        await store.close()
        assert await asyncio.wait_for(waiting[1], LONG) == []
        assert await left.next() is None


async def test_bad_input_is_refused_before_anything_is_sent(
    make_store: Any, variant: Variant, operations: list[tuple[str, str, int]]
) -> None:
    """Each with an error that says what is wrong."""
    store = await make_store()
    pooled = await make_store(pooler=pgkv.Pooler.TRANSACTION)
    operations.clear()

    async def refused(error: Any, match: str, on: Any, *args: Any, **options: Any) -> None:
        with pytest.raises(error, match=match):
            async with on.watch(*args, **options):
                pass

    await refused(pgkv.ConfigError, "poll must be 0.1 seconds or more", store, "k", poll=0.05)
    await refused(pgkv.ConfigError, "poll must be seconds", store, "k", poll="1")
    await refused(pgkv.ConfigError, "poll must not be None", pooled, "k", poll=None)
    await refused(pgkv.ConfigError, "prefix must be True or False", store, "k", prefix="p")
    await refused(pgkv.InvalidKeyError, "from 1 to 10,000 keys", store, [])
    await refused(pgkv.InvalidKeyError, "from 1 to 10,000 keys", store, map(str, range(10_001)))
    await refused(pgkv.InvalidKeyError, "key", store, "")
    await refused(pgkv.InvalidKeyError, "give a key or several, not int", store, 1)
    await refused(pgkv.InvalidKeyError, "key", store, b"k")
    await refused(pgkv.InvalidKeyError, "prefix must be a str", store, ["a"], prefix=True)
    events = inside(store).watch("k")
    with pytest.raises(pgkv.ConfigError, match="enter it first"):
        await asyncio.to_thread(lambda: drive(events._following(None)))
    assert operations == []
    async with store.transaction() as tx:
        await refused(pgkv.ConfigError, "call it on the store itself", tx, "k")


async def test_a_prefix_with_too_many_keys(
    store: Any, variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not compared every few seconds; with poll=None they may be watched, page by page."""
    monkeypatch.setattr(_source, "KEYS_MAX", 5)
    monkeypatch.setattr(_source, "PAGE", 2)
    monkeypatch.setattr("pgkv._sql.watch.PAGE", 2)
    await store.set_many({f"k{n}": b"v" for n in range(6)})
    with pytest.raises(pgkv.ConfigError, match="6 keys would be compared every 30 s"):
        async with store.watch("k", prefix=True):
            pass
    async with store.watch("k", prefix=True, poll=None, initial=True) as events:
        assert await told(events, 7) == [("set", f"k{n}") for n in range(6)] + [("resync", "")]


async def test_values_are_opened(make_store: Any, variant: Variant) -> None:
    """The values of a table with transforms."""
    store = await make_store(notify=True, transforms=[pgkv.AesGcmSiv({1: b"k" * 32})])
    async with store.watch("k", values=True, poll=None) as events:
        await store.set("k", b"secret")
        assert (await events.next(timeout=LONG)).value == b"secret"


def test_what_cannot_be_watched(dsn: str) -> None:
    """A pool that does not tell where its server is; stores of several servers."""
    pool = psycopg_pool.ConnectionPool("", open=False)
    with pytest.raises(pgkv.ConfigError, match=r"give from_pool\(\) a dsn"):
        pgkv.Store.from_pool(pool).watch("k")
    with pytest.raises(pgkv.ConfigError, match="no notify="):
        pgkv.Store.sharded([dsn], notify=True)
    sharded = sharded_config(pgkv.Config(dsn, notify=True), Slots(4, None))
    with pytest.raises(pgkv.ConfigError, match="no notify="):
        NotingChannel(None, sharded)


# -- all at once


async def test_storms_converge(make_store: Any, variant: Variant, peer: Peer, dsn: str) -> None:
    """Writers, of which some tell and some do not, while connections are killed: in the end each watcher
    has seen what the table has."""
    store = await make_store(notify=True)
    silent = await make_store()
    stop = time.monotonic() + (15.0 if FULL else 1.5)

    async def write(to: Any, who: int) -> None:
        n = 0
        while time.monotonic() < stop:
            n += 1
            key = f"k{(n * 7 + who) % 40}"
            try:
                await (to.delete(key) if n % 5 == 0 else to.set(key, b"%d" % n))
            except pgkv.PgkvError:
                pass  # killed

    async def kill() -> None:
        while time.monotonic() < stop:
            await asyncio.sleep(0.3)
            for (pid,) in listening(peer):
                peer.run("SELECT pg_terminate_backend(%s)", pid)

    async def follow(events: Any) -> dict[str, int]:
        seen: dict[str, int] = {}
        async for event in events:
            if event.kind == "set":
                assert event.version > seen.get(event.key, 0)
                seen[event.key] = event.version
            elif event.kind == "gone":
                assert seen.pop(event.key)
        return seen

    async with (
        store.watch("k", prefix=True, poll=1.0) as first,
        silent.watch([f"k{n}" for n in range(40)], poll=0.5) as second,
    ):
        following = [asyncio.ensure_future(follow(each)) for each in (first, second)]
        writers = [write(to, n) for n, to in enumerate((store, store, silent))]
        await asyncio.gather(kill(), *writers)
        rows = dict(peer.run("SELECT key, version FROM kv_store WHERE key LIKE 'k%%'"))

        def converged() -> bool:
            return all(
                {key: row.version for key, row in inside(each)._source.known.items()} == rows
                and not inside(each)._pending
                for each in (first, second)
            )

        await until(converged, "both know what the table has", LONG)
        for each in (first, second):
            inside(each).close()
        assert await asyncio.gather(*following) == [rows, rows]
