"""Invalidation against fills, each interleaving arranged: which values later calls may see.

`World` is a data row in a table of the application, and a cached function that reads it on a
connection of its own and can be held between the read and the store.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest

import pgkv
from pgkv.errors import TransactionError
from tests import FULL
from tests.cached import cached_in, invalidate_tag
from tests.peers import Peer, fetch, until
from tests.variants import Variant, in_thread, inside

Connect = Callable[..., Awaitable[Any]]
TAG = "data:{n}"


class World:
    def __init__(self, variant: Variant, store: Any, peer: Peer, connect: Connect) -> None:
        self.variant, self.store, self.peer, self.connect = variant, store, peer, connect
        self.hold: asyncio.Event | None = None
        self.held = asyncio.Event()
        peer.run("CREATE TABLE data (n int PRIMARY KEY, v text)")
        peer.run("INSERT INTO data VALUES (1, 'old')")

        @cached_in(variant, store, tags=(TAG,), beta=0)
        async def load(n: int) -> str:
            value: str = peer.one("SELECT v FROM data WHERE n = %s", n)
            if self.hold is not None:
                hold, self.hold = self.hold, None
                self.held.set()
                await hold.wait()
            return value

        self.load = load

    async def begin_fill(self) -> tuple[asyncio.Event, asyncio.Future[Any]]:
        """Start a call that has read the data and is about to store."""
        self.hold = hold = asyncio.Event()
        self.held.clear()
        call = asyncio.ensure_future(self.load(1))
        await self.held.wait()
        return hold, call

    @asynccontextmanager
    async def transaction(self, how: str, end: str) -> AsyncIterator[Any]:
        """The application's own transaction: it writes 'new' and invalidates, in that order or the
        other, and commits or rolls back behind the body."""
        conn = await self.connect()
        write = "UPDATE data SET v = 'new' WHERE n = 1"
        if how != "invalidate first":
            await conn.execute(write)
        if how == "tag":
            await invalidate_tag(self.variant, "data:1", self.store, conn)
        else:
            await self.load.using(conn).invalidate(1)
        if how == "invalidate first":
            await conn.execute(write)
        yield conn
        await getattr(conn, end)()


@pytest.fixture
def world(
    store: Any, variant: Variant, peer: Peer, connect: Connect, event_loop_runner: asyncio.Runner
) -> World:
    async def make() -> World:
        return World(variant, store, peer, connect)

    return event_loop_runner.run(make())


every_way = pytest.mark.parametrize("how", ["data first", "invalidate first", "tag"])
both_ends = pytest.mark.parametrize("end", ["commit", "rollback"])


def expected(end: str) -> str:
    return "new" if end == "commit" else "old"


@every_way
@both_ends
async def test_filled_before(world: World, how: str, end: str) -> None:
    """An entry stored before: readable to the end of the transaction, gone with its commit, valid
    again after a rollback."""
    await world.load(1)
    async with world.transaction(how, end):
        assert await world.load(1) == "old"
    assert await world.load(1) == expected(end)
    assert world.load.cache_info().misses == (2 if end == "commit" else 1)


@every_way
@both_ends
@pytest.mark.parametrize("present", [False, True], ids=["absent", "present"])
async def test_filler_reads_before_and_stores_after(
    world: World, how: str, end: str, present: bool
) -> None:
    """A filler that read before the invalidation and stores after the end of its transaction:
    refused after a commit, whether or not the key was there."""
    if present:
        await world.load(1)
        await world.load.invalidate(1)
    hold, filling = await world.begin_fill()
    async with world.transaction(how, end):
        pass
    hold.set()
    assert await filling == "old"
    assert await world.load(1) == expected(end)


@every_way
@both_ends
async def test_filler_stores_during(world: World, how: str, end: str) -> None:
    """A filler that read before and wants to store while the transaction is open: its fill is
    dropped after the lock timeout (or carries the old generation), and it returns; it never
    hangs."""
    hold, filling = await world.begin_fill()
    async with world.transaction(how, end):
        hold.set()
        assert await asyncio.wait_for(filling, 20) == "old"
    # The dropped fill left its placeholder, which the tombstone replaced; after a rollback it
    # would end with its lease.
    if end == "rollback" and how != "tag":
        await world.load.invalidate(1)
    assert await world.load(1) == expected(end)


@pytest.mark.parametrize("how", ["data first", "invalidate first"])
@both_ends
async def test_miss_during_on_an_absent_key(world: World, how: str, end: str) -> None:
    """A call that misses on a key which an open transaction has invalidated computes, stores
    nothing, and does not wait for the transaction; so does one from that transaction's own code."""
    async with world.transaction(how, end):
        for _ in range(2):
            assert await asyncio.wait_for(world.load(1), 20) == "old"
        assert world.load.cache_info().fills == 0
    assert await world.load(1) == expected(end)
    assert world.load.cache_info().fills == 1


@both_ends
async def test_miss_during_on_an_expired_row(world: World, peer: Peer, end: str) -> None:
    """The same where a row stands whose time has passed."""
    await world.load(1)
    peer.run("UPDATE kv_store SET expires_at = to_timestamp(0)")
    async with world.transaction("data first", end):
        assert await asyncio.wait_for(world.load(1), 20) == "old"
    assert world.load.cache_info().fills == 1
    assert await world.load(1) == expected(end)


@both_ends
async def test_miss_during_on_a_row_of_an_old_generation(
    world: World, end: str, operations: list[tuple[str, str, int]]
) -> None:
    """The same where an entry stands that its tag has made a miss: the call does not ask again and
    again, and does not wait for the transaction."""
    await world.load(1)
    await invalidate_tag(world.variant, "data:1", world.store)
    async with world.transaction("data first", end):
        operations.clear()
        assert await asyncio.wait_for(world.load(1), 20) == "old"
        assert len(operations) < 100  # one in 10 ms, for 150 ms; room for another call's
    assert world.load.cache_info().fills == 1
    assert await world.load(1) == expected(end)
    assert world.load.cache_info().fills == 2


async def test_filler_begins_during_with_a_tag(world: World) -> None:
    """A filler that begins while the tag's new generation is uncommitted reads the old data under
    the old generation: nobody accepts its entry after the commit."""
    async with world.transaction("tag", "commit"):
        assert await world.load(1) == "old"
        assert world.load.cache_info().fills == 1
    assert await world.load(1) == "new"


@pytest.mark.parametrize("swept", [False, True])
async def test_plain_invalidate_against_a_filler(world: World, peer: Peer, swept: bool) -> None:
    """invalidate() outside a transaction: the fill that began before is refused, also when the
    tombstone has been collected, the table truncated, or somebody else computes by then."""
    hold, filling = await world.begin_fill()
    peer.run("UPDATE data SET v = 'new'")
    await world.load.invalidate(1)
    if swept:
        await world.store.cleanup_expired()
        assert not peer.keys()
    hold.set()
    assert await filling == "old"
    assert world.load.cache_info().discarded_fills == 1
    assert await world.load(1) == "new"


@pytest.mark.parametrize("what", ["truncate", "clear", "invalidate and fill", "cache_clear", "tag"])
async def test_whatever_removes_a_placeholder_refuses_its_fill(
    world: World, peer: Peer, what: str
) -> None:
    """Truncated, cleared, taken over or of an old generation: the earlier fill shows to nobody."""
    hold, filling = await world.begin_fill()
    peer.run("UPDATE data SET v = 'new'")
    if what == "truncate":
        await world.store.truncate()
    elif what == "clear":
        await world.store.clear()
    elif what == "cache_clear":
        await world.load.cache_clear()
    elif what == "tag":
        await invalidate_tag(world.variant, "data:1", world.store)
    else:
        await world.load.invalidate(1)
        await world.load.refresh(1)
    hold.set()
    assert await filling == "old"
    assert await world.load(1) == "new"


async def test_a_waiter_after_the_invalidation_gets_the_new_value(world: World, peer: Peer) -> None:
    """A call that begins after invalidate() returned and joins a computation that began before does
    not take its value."""
    hold, filling = await world.begin_fill()
    peer.run("UPDATE data SET v = 'new'")
    await world.load.invalidate(1)
    joined = asyncio.ensure_future(world.load(1))
    await until(lambda: world.load.cache_info().waits == 1, "the second call waits")
    hold.set()
    assert await filling == "old"
    assert await joined == "new"


async def test_a_tagged_waiter_gets_the_new_value(world: World, peer: Peer) -> None:
    """The same with invalidate_tag, whose filler's own row is untouched: its fill is accepted, its
    value not."""
    hold, filling = await world.begin_fill()
    peer.run("UPDATE data SET v = 'new'")
    await invalidate_tag(world.variant, "data:1", world.store)
    joined = asyncio.ensure_future(world.load(1))
    await until(lambda: world.load.cache_info().waits == 1, "the second call waits")
    hold.set()
    assert await filling == "old"
    assert await joined == "new"


async def test_a_refresh_in_the_background_is_fenced(world: World, peer: Peer) -> None:
    """refresh() that read before an invalidation and stores after it is refused."""
    await world.load(1)
    world.hold = hold = asyncio.Event()
    world.held.clear()
    call = asyncio.ensure_future(world.load.refresh(1))
    await world.held.wait()
    peer.run("UPDATE data SET v = 'new'")
    await world.load.invalidate(1)
    hold.set()
    assert await call == "old"
    assert await world.load.peek(1) is None
    assert await world.load(1) == "new"


async def test_using_wants_a_sound_connection(world: World, connect: Connect) -> None:
    """A failed transaction is refused, and so is what is no connection."""
    conn = await connect()
    with pytest.raises(psycopg.Error):
        await conn.execute("SELECT 1/0")
    with pytest.raises(TransactionError, match="failed"):
        await world.load.using(conn).invalidate(1)
    await conn.rollback()
    with pytest.raises(pgkv.ConfigError, match="psycopg 3 connection"):
        world.load.using(object())


async def test_using_makes_the_table_beforehand(
    store: Any, variant: Variant, connect: Connect
) -> None:
    """On a database without the table, invalidating inside a transaction does not fail it."""

    @cached_in(variant, store.table("not_there_yet"))
    async def f() -> int:
        return 1

    conn = await connect()
    await conn.execute("SELECT 1")
    await f.using(conn).invalidate()
    assert await fetch(conn, "SELECT count(*) FROM not_there_yet") == [(1,)]
    await conn.commit()
    assert await f() == 1


@pytest.mark.parametrize("way", ["invalidate", "transaction", "tag", "clear"])
async def test_storm_no_reader_sees_an_older_value(
    make_store: Callable[..., Coroutine[Any, Any, Any]], connect: Connect,
    variant: Variant, peer: Peer, dsn: str, way: str,
) -> None:  # fmt: skip
    """Readers on several stores against a writer: no read that begins after an invalidation
    returned shows a value older than that."""
    peer.run("CREATE TABLE data (n int PRIMARY KEY, v int)")
    peer.run("INSERT INTO data SELECT n, 0 FROM generate_series(0, 2) n")
    rng = random.Random(seed := random.randrange(2**32))
    print(f"seed {seed}")

    def read(n: int) -> int:
        try:
            conn = idle.pop()
        except IndexError:
            conn = psycopg.connect(dsn, autocommit=True)
            conns.append(conn)
        row = conn.execute("SELECT v FROM data WHERE n = %s", [n]).fetchone()
        idle.append(conn)
        assert row is not None
        return int(row[0])

    conns: list[psycopg.Connection[Any]] = []
    idle: list[psycopg.Connection[Any]] = []  # not one of each thread: there may be hundreds

    async def load(n: int) -> int:
        value: int = await in_thread(read, n)
        await asyncio.sleep(rng.choice([0, 0.001, 0.004]))
        return value

    options = {"tags": ("row:{n}",)} if way == "tag" else {}
    stores = [await make_store() for _ in range(3)]
    readers = [cached_in(variant, each, max_wait=5, **options)(load) for each in stores]
    invalidated = [0, 0, 0]
    old: list[tuple[int, int]] = []
    reads = 0
    running = True

    async def keep_reading(cached: Any) -> None:
        nonlocal reads
        while running:
            n = rng.randrange(3)
            at_least = invalidated[n]
            value = await cached(n)
            reads += 1
            if value < at_least:
                old.append((value, at_least))

    async def write() -> None:
        nonlocal running
        conn = await connect()
        for round_ in range(1, 3000):
            n = rng.randrange(3)
            await conn.execute("UPDATE data SET v = %s WHERE n = %s", [round_, n])
            if way == "transaction":
                await readers[0].using(conn).invalidate(n)
            await conn.commit()
            if way == "invalidate":
                await readers[0].invalidate(n)
            elif way == "tag":
                await invalidate_tag(variant, f"row:{n}", stores[0])
            elif way == "clear":
                await readers[0].cache_clear()
            invalidated[n] = round_
            await asyncio.sleep(rng.choice([0, 0.002, 0.01]))
            if round_ >= (60 if FULL else 25) and reads > 100 and count_hits() > 30:
                break
        running = False

    def count_hits() -> int:
        return sum(each.cache_info().hits for each in readers)

    try:
        await asyncio.gather(write(), *(keep_reading(each) for each in readers for _ in range(4)))
    finally:
        running = False
        for each in conns:
            each.close()
    hits = count_hits()
    print(
        f"{reads} reads, {hits} hits, {sum(each.cache_info().discarded_fills for each in readers)} discarded"
    )
    assert not old, (len(old), reads, old[:3])
    assert reads > 100
    assert hits > 30
    assert inside(stores[0]) is not None
