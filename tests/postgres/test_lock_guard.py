"""guard(): the caller's transaction excludes every other holder, at every isolation level."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import psycopg
import pytest
from psycopg import IsolationLevel

import pgkv
from pgkv import LeaseLostError, TransactionError
from pgkv.testing import ServerClock
from tests.peers import Peer, fetch
from tests.servers import LATE
from tests.variants import Variant

LEVELS = [
    IsolationLevel.READ_COMMITTED,
    IsolationLevel.REPEATABLE_READ,
    IsolationLevel.SERIALIZABLE,
]


def lock_of(variant: Variant, store: Any, **options: Any) -> Any:
    return variant.make("Lock", store, "guarded", **options)


async def isolated(connect: Any, level: IsolationLevel) -> Any:
    conn = await connect()
    await conn.set_isolation_level(level)
    return conn


@pytest.mark.parametrize("level", LEVELS)
async def test_a_guard_keeps_everybody_out(
    store: Any, variant: Variant, connect: Any, clock: ServerClock, level: IsolationLevel
) -> None:
    """While a guarded transaction is open nobody is granted the lock, though the lease has
    expired; a try answers at once, and after the commit it is granted."""
    lease = await lock_of(variant, store, renew=False).acquire()
    conn = await isolated(connect, level)
    await lease.guard(conn)
    clock.advance(31)
    other = lock_of(variant, store)
    started = time.monotonic()
    assert await other.try_acquire() is None
    assert time.monotonic() - started < LATE
    await conn.commit()
    second = await other.acquire(timeout=0)
    assert second.token > lease.token
    await second.release()


@pytest.mark.parametrize(
    ("kind", "options"),
    [("Lock", {}), ("Lock", {"fair": True}), ("Semaphore", {"slots": 1})],
    ids=["lock", "fair", "semaphore"],
)
async def test_a_guard_stops_every_kind_of_grant(
    store: Any, variant: Variant, connect: Any, clock: ServerClock, kind: str, options: Any
) -> None:
    """First tries, tries after a denied one, fair ones and those of semaphores: none changes the
    token of a lease that has expired while its guard is open."""
    lease = await variant.make(kind, store, "guarded", renew=False, **options).acquire()
    conn = await connect()
    await lease.guard(conn)
    clock.advance(31)
    other = variant.make(kind, store, "guarded", **options)
    for _ in range(3):
        assert await asyncio.wait_for(other.try_acquire(), 30) is None
    await conn.commit()
    await (await asyncio.wait_for(other.acquire(), 30)).release()


@pytest.mark.parametrize("level", LEVELS)
async def test_renewals_pass_a_guard(
    store: Any, variant: Variant, connect: Any, level: IsolationLevel
) -> None:
    """An open guard stops neither renewal nor release of its own lease."""
    lease = await lock_of(variant, store).acquire()
    conn = await isolated(connect, level)
    await lease.guard(conn)
    await asyncio.wait_for(lease.extend(40), 30)
    await asyncio.wait_for(lease.release(), 30)
    assert await lock_of(variant, store).try_acquire() is None, "still excluded: the guard is open"
    await conn.commit()


async def test_a_waiter_behind_a_guard_gets_a_whole_lease(
    store: Any, variant: Variant, connect: Any, clock: ServerClock
) -> None:
    """Who waited while a guard was open is granted a lease with its time before it."""
    lease = await lock_of(variant, store, renew=False).acquire()
    conn = await connect()
    await lease.guard(conn)
    clock.advance(31)
    waiting = asyncio.ensure_future(_acquired(lock_of(variant, store, renew=False)))
    await asyncio.sleep(1.2)
    assert not waiting.done()
    clock.advance(31)
    await conn.commit()
    second = await asyncio.wait_for(waiting, 30)
    assert second.remaining() > 10
    assert (await lock_of(variant, store).holder()).remaining() > 10
    await second.release()


async def _acquired(lock: Any) -> Any:
    return await lock.acquire()


async def test_a_guard_of_a_lost_lease_raises(
    store: Any, variant: Variant, connect: Any, clock: ServerClock
) -> None:
    """The token of an earlier grant guards nothing, whatever its holder believes."""
    lease = await lock_of(variant, store, renew=False).acquire()
    clock.advance(31)
    async with lock_of(variant, store).acquire(timeout=0):
        conn = await connect()
        with pytest.raises(LeaseLostError):
            await lease.guard(conn)
        await conn.rollback()


@pytest.mark.parametrize("level", LEVELS[1:])
async def test_taken_over_after_the_snapshot(
    store: Any, variant: Variant, connect: Any, clock: ServerClock, level: IsolationLevel
) -> None:
    """A snapshot from before the takeover does not make the lease look alive."""
    lease = await lock_of(variant, store, renew=False).acquire()
    conn = await isolated(connect, level)
    await fetch(conn, "SELECT count(*) FROM kv_store_locks")
    await lock_of(variant, store).force_release(lease.token)
    second = await lock_of(variant, store).acquire(timeout=0)
    with pytest.raises(LeaseLostError) as error:
        await lease.guard(conn)
    assert error.value.reason == "replaced"
    await conn.rollback()
    await second.release()


async def test_a_snapshot_older_than_the_last_renewal_is_said(
    store: Any, variant: Variant, connect: Any, clock: ServerClock
) -> None:
    """REPEATABLE READ, guard not first, and the expiry that the snapshot shows has passed: not a
    loss, and the error says what to do."""
    lease = await lock_of(variant, store, renew=False).acquire()
    conn = await isolated(connect, IsolationLevel.REPEATABLE_READ)
    await fetch(conn, "SELECT count(*) FROM kv_store_locks")
    await lease.extend(600)
    clock.advance(31)
    with pytest.raises(TransactionError, match="first"):
        await lease.guard(conn)
    assert not lease.is_lost
    await conn.rollback()
    await lease.guard(conn)
    await conn.commit()
    await lease.release()


async def test_autocommit_is_refused(store: Any, variant: Variant, connect: Any) -> None:
    """Outside a transaction a guard would protect nothing; inside one on such a connection it
    does."""
    async with lock_of(variant, store).acquire() as lease:
        conn = await connect(autocommit=True)
        with pytest.raises(TransactionError, match="autocommit"):
            await lease.guard(conn)
        await conn.execute("BEGIN")
        await lease.guard(conn)
        await conn.execute("COMMIT")


async def test_a_read_only_transaction_is_refused(
    store: Any, variant: Variant, connect: Any
) -> None:
    """It cannot lock the row, so it cannot be guarded."""
    async with lock_of(variant, store).acquire() as lease:
        conn = await connect()
        await conn.set_read_only(True)
        with pytest.raises(TransactionError, match="read-only"):
            await lease.guard(conn)
        await conn.rollback()
        assert not lease.is_lost


async def test_another_database_is_refused(
    store: Any, variant: Variant, connect: Any, peer: Peer
) -> None:
    """A guard on another database protects nothing there: TransactionError, not a loss."""
    lock = lock_of(variant, store)
    async with lock.acquire() as lease:
        for text in ("CREATE DATABASE other_for_guard", None):
            if text:
                peer.run("DROP DATABASE IF EXISTS other_for_guard WITH (FORCE)")
                peer.run(text)
            conn = await connect(dsn=_in_database(peer, "other_for_guard"))
            with pytest.raises(TransactionError, match="another database"):
                await lease.guard(conn)
            await conn.close()
            # The same table there, with the same schema's name, is still another one.
            schema = peer.one("SELECT current_schema()")
            with psycopg.connect(_in_database(peer, "other_for_guard"), autocommit=True) as there:
                there.execute(f'CREATE SCHEMA IF NOT EXISTS "{schema}"'.encode())
                there.execute(
                    f'CREATE TABLE IF NOT EXISTS "{schema}".kv_store_locks '
                    "(key text primary key, version bigint, expires_at timestamptz)".encode()
                )
        assert not lease.is_lost
    peer.run("DROP DATABASE other_for_guard WITH (FORCE)")


def _in_database(peer: Peer, name: str) -> str:
    from psycopg.conninfo import make_conninfo

    return make_conninfo(peer.conn.info.dsn, dbname=name)


async def test_another_search_path_finds_the_same_table(
    store: Any, variant: Variant, connect: Any
) -> None:
    """The guard names the table with its schema: the caller's search_path does not matter."""
    async with lock_of(variant, store).acquire() as lease:
        conn = await connect()
        await conn.execute("SET search_path = pg_catalog")
        await lease.guard(conn)
        await conn.rollback()


async def test_max_hold_ends_an_idle_guard(
    store: Any, variant: Variant, connect: Any, clock: ServerClock
) -> None:
    """max_hold: the server ends a guarded transaction that lies idle, and the lock moves on."""
    lock = lock_of(variant, store, renew=False)
    lease = await lock.acquire()
    conn = await connect()
    await lease.guard(conn, max_hold=60)
    rows = await fetch(conn, "SHOW idle_in_transaction_session_timeout")
    assert rows == [("1min",)]
    # Without this it takes a minute.
    await conn.execute("SET LOCAL idle_in_transaction_session_timeout = 100")
    clock.advance(31)
    second = await lock.acquire(timeout=20)
    with pytest.raises(psycopg.Error):
        await conn.execute("SELECT 1")
    await second.release()


async def test_a_savepoint_takes_its_guard_along(
    store: Any, variant: Variant, connect: Any, clock: ServerClock
) -> None:
    """The stated limit: a guard inside a savepoint that is rolled back protects no longer."""
    lease = await lock_of(variant, store, renew=False).acquire()
    conn = await connect()
    await conn.execute("SAVEPOINT here")
    await lease.guard(conn)
    await conn.execute("ROLLBACK TO SAVEPOINT here")
    clock.advance(31)
    second = await lock_of(variant, store).acquire(timeout=0)
    await conn.rollback()
    await second.release()


async def test_revoke_waits_for_a_guard_and_says_so(
    store: Any, variant: Variant, connect: Any
) -> None:
    """revoke() changes the token, so it waits for an open guard, at most a second or so."""
    lock = lock_of(variant, store)
    lease = await lock.acquire()
    conn = await connect()
    await lease.guard(conn)
    with pytest.raises(pgkv.ConflictError, match="guard"):
        await lock_of(variant, store).revoke(lease.token)
    assert not lease.is_lost
    await conn.commit()
    assert await lock.revoke(lease.token)


async def test_work_under_guard_is_never_overwritten(
    store: Any, variant: Variant, connect: Any, peer: Peer
) -> None:
    """Workers that outstay a short lease inside guarded transactions lose no update."""
    peer.run("CREATE TABLE counter (n int NOT NULL)")
    peer.run("INSERT INTO counter VALUES (0)")
    done = 0

    async def work(worker: int) -> None:
        nonlocal done
        conn = await connect()
        ttl = 0.05
        end = time.monotonic() + 1.2
        while time.monotonic() < end or done <= 5:
            lease = await lock_of(variant, store, ttl=ttl, renew=False).acquire(timeout=120)
            try:
                await lease.guard(conn)
            except LeaseLostError:
                await conn.rollback()
                ttl = min(ttl * 2, 2.0)  # the machine is too slow for the shorter one
                continue
            ((n,),) = await fetch(conn, "SELECT n FROM counter")
            await asyncio.sleep(1.6 * ttl if worker % 2 else 0.0)
            await conn.execute("UPDATE counter SET n = %s", [n + 1])
            await conn.commit()
            done += 1

    await asyncio.gather(*(work(worker) for worker in range(4)))
    assert peer.one("SELECT n FROM counter") == done
