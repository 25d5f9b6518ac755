"""Semaphores: never more live leases than slots, each a lease like a lock's."""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg
import pytest

import pgkv
from pgkv import ConfigError, LeaseLostError, LockTimeoutError
from pgkv.patterns.lock.api import statements_of
from pgkv.patterns.lock.lease import new_asking
from pgkv.patterns.lock.sql import Denied, Granted, SemaphoreStatements, slot_keys
from pgkv.testing import ServerClock
from tests.peers import Peer, gather, until
from tests.variants import Variant, inside


def semaphore(variant: Variant, store: Any, slots: int = 3, **options: Any) -> Any:
    return variant.make("Semaphore", store, "gpu", slots, **options)


async def test_as_many_holders_as_slots(store: Any, variant: Variant) -> None:
    """N are granted a slot each, the next one is denied until a slot is free."""
    gpu = semaphore(variant, store)
    leases = [await gpu.acquire(timeout=20) for _ in range(3)]
    assert sorted(lease.slot for lease in leases) == [0, 1, 2]
    assert await gpu.try_acquire() is None
    with pytest.raises(LockTimeoutError, match="semaphore of 3"):
        await gpu.acquire(timeout=0)
    await leases[1].release()
    again = await gpu.acquire(timeout=20)
    assert again.slot == leases[1].slot
    assert again.token > leases[1].token, "tokens rise per slot"
    for lease in (leases[0], leases[2], again):
        assert await lease.release()


async def test_a_storm_never_exceeds_the_slots(store: Any, variant: Variant) -> None:
    """Many askers at once, from the first grant on: at most N inside, and all get in."""
    inside = most = done = 0

    async def work() -> None:
        nonlocal inside, most, done
        gpu = semaphore(variant, store, 3)
        for _ in range(4):
            async with gpu.acquire():
                inside += 1
                most = max(most, inside)
                await asyncio.sleep(0.001)
                inside -= 1
                done += 1

    await asyncio.gather(*(work() for _ in range(8)))
    assert done == 32
    assert 1 < most <= 3


async def test_the_number_of_slots_is_agreed(store: Any, variant: Variant) -> None:
    """Another number is a ConfigError that names both, unless it is to be changed."""
    async with semaphore(variant, store, 2).acquire():
        with pytest.raises(ConfigError, match="2 slots, not 5"):
            await semaphore(variant, store, 5).try_acquire()
        async with semaphore(variant, store, 5, resize=True).acquire(timeout=0):
            with pytest.raises(ConfigError, match="5 slots, not 2"):
                await semaphore(variant, store, 2).try_acquire()


async def test_racing_definitions_agree(store: Any, variant: Variant) -> None:
    """Two first users with different numbers: one number holds, the other is told."""
    await variant.make("Lock", store, "x").try_acquire()
    made = [semaphore(variant, store, slots).try_acquire() for slots in (2, 5) * 5]
    outcomes = await gather(*made)
    refused = [each for each in outcomes if isinstance(each, ConfigError)]
    assert len(refused) == 5, outcomes
    assert sum(each is not None for each in outcomes) - 5 in (2, 5)


async def test_fewer_slots_count_the_leases_beyond(store: Any, variant: Variant) -> None:
    """After the number was lowered nobody is granted a slot before enough have ended."""
    leases = [await semaphore(variant, store, 4).acquire() for _ in range(4)]
    small = semaphore(variant, store, 2, resize=True)
    assert await small.try_acquire() is None
    leases.sort(key=lambda lease: int(lease.slot))
    await leases[0].release()
    await leases[1].release()
    assert await small.try_acquire() is None, "two live ones are left, in slots beyond"
    await leases[2].release()
    assert (await small.try_acquire()).slot in (0, 1)


@pytest.mark.parametrize("beyond", [1, 2])
async def test_grants_beside_leases_beyond_never_exceed_the_slots(
    store: Any, variant: Variant, peer: Peer, beyond: int
) -> None:
    """The number was lowered while leases in slots beyond it live on: of many askers at once as many
    are granted as the number leaves, exactly."""
    slots = 3
    for turn in range(10):
        name = f"gpu {turn}"
        large = variant.make("Semaphore", store, name, slots + beyond, resize=True)
        leases = sorted([await large.acquire() for _ in range(slots + beyond)], key=_slot)
        small = variant.make("Semaphore", store, name, slots, resize=True)
        assert await small.try_acquire() is None  # lowers the number
        for lease in leases[:slots]:
            await lease.release()
        granted = await gather(*(small.try_acquire() for _ in range(8)))
        assert sum(lease is not None for lease in granted) == slots - beyond, granted
        live = "key ~ ('^' || %s || E'\\x1f[0-9]') AND expires_at > clock_timestamp()"
        assert peer.one(f"SELECT count(*) FROM kv_store_locks WHERE {live}", name) == slots
        for lease in (*leases[slots:], *granted):
            if lease is not None:
                assert await lease.release()


def _slot(lease: Any) -> int:
    return int(lease.slot)


async def test_a_grant_under_way_sees_the_number_lowered(
    store: Any, variant: Variant, dsn: str
) -> None:
    """A grant counted the old number and has not committed: lowering the number waits for it, and
    the grants that follow count its lease."""
    inner = inside(store)
    sql = statements_of(inner, SemaphoreStatements, durable=True)
    two = [await semaphore(variant, store, 3).acquire() for _ in range(2)]
    large, small = slot_keys(b"gpu", 3), slot_keys(b"gpu", 1)
    with psycopg.connect(dsn) as conn:
        aside = pgkv.Store(pgkv.Config(dsn)).using(conn)
        third = aside._channel.execute(sql.grant_slot(large, new_asking(b"null"), 30.0, 1.0))
        assert isinstance(third, Granted)
        lowering = asyncio.ensure_future(_execute(store, sql.define(small, resize=True)))
        with psycopg.connect(dsn, autocommit=True) as watcher:
            await until(
                lambda: watcher.execute(
                    "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
                    " AND datname = current_database()"
                ).fetchone() == (1,),
                "the change waits",
            )  # fmt: skip
        conn.commit()
    assert await lowering == 1
    for lease in two:
        await lease.release()
    asked = [store._execute(sql.grant_slot(small, new_asking(b"null"), 30.0, 1.0)) for _ in "ab"]
    assert [type(reply) for reply in await gather(*asked)] == [Denied, Denied], "the third lives"


async def _execute(store: Any, op: Any) -> Any:
    return await store._execute(op)


async def test_a_dead_holders_slot_is_taken_over(
    store: Any, variant: Variant, clock: ServerClock
) -> None:
    """An expired lease frees its slot; its holder is told when it asks."""
    leases = [await semaphore(variant, store, 2, renew=False).acquire() for _ in range(2)]
    clock.advance(31)
    second = await semaphore(variant, store, 2).acquire(timeout=0)
    stale = next(lease for lease in leases if lease.slot == second.slot)
    assert second.token > stale.token
    with pytest.raises(LeaseLostError):
        await stale.extend(10)
    await second.release()


async def test_a_guarded_slot_is_passed_over(
    store: Any, variant: Variant, connect: Any, clock: ServerClock
) -> None:
    """An expired slot under an open guard is not granted; another free one is, at once."""
    leases = [await semaphore(variant, store, 2, renew=False).acquire() for _ in range(2)]
    conn = await connect()
    await leases[0].guard(conn)
    clock.advance(31)
    gpu = semaphore(variant, store, 2)
    other = await asyncio.wait_for(gpu.try_acquire(), 30)
    assert other.slot == leases[1].slot
    assert await asyncio.wait_for(gpu.try_acquire(), 30) is None
    await conn.commit()
    assert (await gpu.try_acquire()).slot == leases[0].slot


async def test_a_denied_try_takes_no_transaction_id(
    store: Any, variant: Variant, peer: Peer
) -> None:
    """Waiting for a slot writes nothing."""
    gpu = semaphore(variant, store, 1)
    async with gpu.acquire():
        taken: list[int] = []
        while (
            len(taken) < 20 and 0 not in taken
        ):  # the server's own vacuum takes some, now and then
            before = int(peer.one("SELECT pg_snapshot_xmax(pg_current_snapshot())::text"))
            for _ in range(10):
                assert await gpu.try_acquire() is None
            now = int(peer.one("SELECT pg_snapshot_xmax(pg_current_snapshot())::text"))
            taken.append(now - before)
        assert 0 in taken


@pytest.mark.parametrize("slots", [0, -1, 1.5, True, 10_001])
async def test_slots_are_a_number(store: Any, variant: Variant, slots: Any) -> None:
    """What is no number of slots is refused at construction."""
    with pytest.raises(ConfigError, match="slots"):
        semaphore(variant, store, slots)
