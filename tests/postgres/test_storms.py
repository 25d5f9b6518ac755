"""Storms: many callers at once on few keys, and totals that must come out exactly."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

import pgkv
from pgkv.testing import ServerClock
from tests.peers import Peer

CALLERS = 32


async def storm(call: Callable[[int], Any], callers: int = CALLERS, each: int = 8) -> list[Any]:
    """The answers of so many callers, each calling `each` times."""

    async def caller(number: int) -> list[Any]:
        return [await call(number * each + n) for n in range(each)]

    answers = await asyncio.gather(*(caller(number) for number in range(callers)))
    return [answer for per_caller in answers for answer in per_caller]


async def test_increments_reach_the_exact_total(store: Any) -> None:
    """Concurrent increments add up, and each caller sees a sum of its own."""
    sums = await storm(lambda _: store.increment("k"))
    assert sorted(sums) == list(range(1, len(sums) + 1))
    assert await store.get("k") == b"%d" % len(sums)


async def test_increments_of_an_expired_key(make_store: Any, clock: ServerClock) -> None:
    """Of increments on an expired key one starts again and all others add to it."""
    store = await make_store(ttl_cleanup_strategy=pgkv.TtlCleanupStrategy.MANUAL)
    await store.set("k", b"1000", ttl=60)
    clock.advance(61)
    sums = await storm(lambda _: store.increment("k"), each=2)
    assert sorted(sums) == list(range(1, 2 * CALLERS + 1))


async def test_increment_many_totals(store: Any) -> None:
    """Batches of increments in any key order add up exactly and never deadlock."""
    keys = [f"k{n}" for n in range(12)]

    def call(n: int) -> Any:
        chosen = random.Random(n).sample(keys, 8)
        return store.increment_many(dict.fromkeys(chosen, 1))

    answers = await storm(call, each=4)
    assert all(len(answer) == 8 for answer in answers)
    assert sum(map(int, (await store.get_many(keys)).values())) == 8 * len(answers)


async def test_get_and_set_hands_out_every_value_once(store: Any) -> None:
    """In a chain of get_and_set every value is handed to exactly one caller."""
    answers = await storm(lambda n: store.get_and_set("k", b"%d" % n))
    answers.append(await store.get("k"))
    assert Counter(answers) == Counter([None, *(b"%d" % n for n in range(len(answers) - 1))])


async def test_exchange_and_removal_hand_out_every_value_once(store: Any) -> None:
    """Values put by get_and_set and set_nx come out of get_and_set and get_and_delete once
    each.
    """

    put: list[bytes] = []

    async def call(n: int) -> list[bytes | None]:
        value = b"%d" % n
        if n % 3 == 0:
            put.append(value)
            return [await store.get_and_set("k", value)]
        if n % 3 == 1:
            return [await store.get_and_delete("k")]
        if await store.set_nx("k", value):
            put.append(value)
        return []

    answers = [value for some in await storm(call) for value in some]
    answers.append(await store.get("k"))
    assert Counter(value for value in answers if value is not None) == Counter(put)


async def test_one_set_nx_wins(store: Any) -> None:
    """Of concurrent set_nx exactly one wins each key, and its value is the one stored."""

    async def call(n: int) -> bytes | None:
        won = await store.set_nx(f"k{n % 8}", b"%d" % n)
        return b"%d" % n if won else None

    winners = [value for value in await storm(call) if value is not None]
    assert len(winners) == 8
    assert sorted(winners) == sorted((await store.get_many(f"k{n}" for n in range(8))).values())


@pytest.mark.parametrize("rival", ["set_nx", "cas", "if_version"])
async def test_one_wins_an_expired_key(make_store: Any, clock: ServerClock, rival: str) -> None:
    """Of concurrent callers who take an expired key for absent exactly one gets it."""
    store = await make_store(ttl_cleanup_strategy=pgkv.TtlCleanupStrategy.MANUAL)
    calls: dict[str, Callable[[str, bytes], Any]] = {
        "set_nx": lambda k, v: store.set_nx(k, v, ttl=60),
        "cas": lambda k, v: store.compare_and_swap(k, None, v, ttl=60),
        "if_version": lambda k, v: store.set(k, v, ttl=60, if_version=0),
    }
    for turn in range(3):
        await store.set("k", b"old", ttl=60)
        clock.advance(61)
        won = await storm(lambda n: calls[rival]("k", b"%d" % n), each=1)
        assert sum(map(bool, won)) == 1, turn
        clock.advance(61)


async def test_cas_loops_reach_the_exact_total(store: Any) -> None:
    """Counting by compare_and_swap loses no count."""

    async def call(_: int) -> None:
        current = await store.get("k")
        while True:
            new = b"1" if current is None else b"%d" % (int(current) + 1)
            result = await store.compare_and_swap("k", current, new)
            if result:
                return
            assert result.current != current
            current = result.current

    await storm(call, callers=16, each=4)
    assert await store.get("k") == b"64"


async def test_update_reaches_the_exact_total(store: Any) -> None:
    """Counting by update() loses no count."""
    await storm(
        lambda _: store.update("k", lambda old: b"%d" % (int(old or b"0") + 1)), callers=16, each=4
    )
    assert await store.get("k") == b"64"


async def test_if_version_loops_reach_the_exact_total(store: Any) -> None:
    """Counting by set(if_version=...) loses no count."""
    await store.set("k", b"0")

    async def call(_: int) -> None:
        while True:
            entry = await store.get_entry("k")
            new = b"%d" % (int(entry.value) + 1)
            if await store.set("k", new, if_version=entry.version) is not None:
                return

    await storm(call, callers=8, each=4)
    assert await store.get("k") == b"32"


async def test_versions_are_handed_out_once(store: Any) -> None:
    """Concurrent writes of one key each return a version of their own."""
    versions = await storm(lambda n: store.set("k", b"%d" % n))
    assert len(set(versions)) == len(versions)
    assert (await store.get_entry("k")).version == max(versions)


async def test_batches_in_opposite_order_never_deadlock(make_store: Any, peer: Peer) -> None:
    """Batches over the same rows, written in opposite orders over a table stored in reverse, wait
    for each other and never deadlock.
    """
    store = await make_store(retry=None)  # a deadlock would be repeated, and hidden
    keys = [f"k{n:03}" for n in range(60)]
    peer_lock = threading.Lock()

    def refill() -> None:
        with peer_lock:
            for key in keys[::-1]:  # one row per transaction
                peer.run(
                    "INSERT INTO kv_store (key, value) VALUES (%s, '1') ON CONFLICT DO NOTHING", key
                )

    refill()
    assert [row[0] for row in peer.run("SELECT key FROM kv_store ORDER BY ctid")] == keys[::-1]

    async def call(n: int) -> None:
        ordered = keys if n % 2 else keys[::-1]
        kind = n % 7
        if kind == 0:
            await store.set_many([(key, b"%d" % n) for key in ordered])
        elif kind == 1:
            await store.delete_many(ordered)
        elif kind in (2, 3):
            await store.increment_many(dict.fromkeys(ordered, 1))
        elif kind == 4:
            await store.expire_many(ordered, 600)
        elif kind == 5:
            await store.delete_prefix("k0")
        else:
            await asyncio.to_thread(refill)

    before = peer.one(DEADLOCKS)
    await storm(call, callers=16, each=14)
    assert peer.one(DEADLOCKS) == before


DEADLOCKS = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"


async def test_transfers_keep_the_sum(store: Any) -> None:
    """Transfers by run_transaction keep the total, whatever is repeated."""
    accounts = [f"a{n}" for n in range(4)]
    await store.set_many(dict.fromkeys(accounts, b"100"))

    async def call(n: int) -> None:
        giver, taker = random.Random(n).sample(accounts, 2)

        async def transfer(tx: Any) -> None:
            values = await tx.get_many([giver, taker])
            await tx.set(giver, b"%d" % (int(values[giver]) - 1))
            await tx.set(taker, b"%d" % (int(values[taker]) + 1))

        await store.run_transaction(transfer, isolation=psycopg.IsolationLevel.SERIALIZABLE)

    answers = await asyncio.gather(*(call(n) for n in range(12)), return_exceptions=True)
    failures = [answer for answer in answers if answer is not None]
    assert all(isinstance(f, pgkv.QueryError) and f.retryable for f in failures)
    assert len(failures) < 10
    assert sum(map(int, (await store.get_many(accounts)).values())) == 400
