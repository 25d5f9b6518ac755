"""How waiters wait: woken by a release, served in order, and never for long after a death."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from psycopg import sql

import pgkv
from pgkv.patterns.lock import flows
from pgkv.patterns.lock.api import statements_of
from pgkv.patterns.lock.sql import LockStatements
from tests.faults.support import newest
from tests.peers import Peer, until
from tests.servers import LATE
from tests.variants import Variant


def lock_of(variant: Variant, store: Any, **options: Any) -> Any:
    return variant.make("Lock", store, "queue", **options)


async def _acquired(lock: Any, **options: Any) -> Any:
    return await lock.acquire(**options)


def listeners(peer: Peer) -> int:
    return int(
        peer.one(
            "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%%pgkv_locks%%'"
            " AND datname = current_database()"
        )
    )


def tickets(peer: Peer) -> int:
    if peer.one("SELECT to_regclass('kv_store_tickets')::text") is None:
        return 0
    return int(peer.one("SELECT count(*) FROM kv_store_tickets"))


async def test_a_release_wakes_a_waiter(store: Any, variant: Variant, peer: Peer) -> None:
    """wakeup="notify": a waiter is granted the lock well before its next look, and one connection
    listens for all of the process."""
    locks = [lock_of(variant, store, wakeup="notify") for _ in range(4)]
    lease = await locks[0].acquire()
    waiting = [asyncio.ensure_future(_acquired(lock)) for lock in locks[1:]]
    await until(lambda: listeners(peer) == 1, "the process listens")
    await asyncio.sleep(1.0)
    handed: list[float] = []
    for _ in range(3):
        released = time.monotonic()
        await lease.release()
        done, pending = await asyncio.wait(waiting, timeout=30, return_when="FIRST_COMPLETED")
        handed.append(time.monotonic() - released)
        assert len(done) == 1, "each release lets one in"
        lease = done.pop().result()
        waiting = list(pending)
    await lease.release()
    assert min(handed) < 2
    assert listeners(peer) == 1


async def test_a_waiter_that_gives_up_passes_its_chance_on(store: Any, variant: Variant) -> None:
    """A waiter that was woken and did not try leaves the chance to the next one."""
    from pgkv._background.background import Background
    from pgkv.patterns._runtime.wakeup import Waiter
    from pgkv.patterns.lock.flows import LockWaiters

    background = Background(asyncio.get_running_loop(), "", pgkv.Pooler.TRANSACTION)
    waiters = LockWaiters(background)  # never listens here
    first, second = (Waiter(waiters, b"n", asyncio.Event()) for _ in range(2))
    waiters.add(first)
    waiters.add(second)
    waiters._receive("n")
    assert (first.trying, second.trying) == (True, False)
    waiters.remove(first, granted=False)
    await asyncio.wait_for(second.event.wait(), 20)
    assert second.trying


async def test_behind_a_transaction_pooler_waiters_poll(
    make_store: Any, variant: Variant, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    """pooler=TRANSACTION: no LISTEN, said once, and the lock is handed over all the same."""
    from pgkv._background import listener as _listener

    _listener._said.clear()
    store = await make_store(pooler=pgkv.Pooler.TRANSACTION)
    locks = [lock_of(variant, store, wakeup="notify") for _ in range(3)]
    lease = await locks[0].acquire()
    waiting = [asyncio.ensure_future(_acquired(lock)) for lock in locks[1:]]
    await until(lambda: "pgkv.listener.polling" in caplog.text, "it is said")
    assert listeners(peer) == 0
    for _ in range(2):
        await lease.release()
        done, pending = await asyncio.wait(waiting, timeout=30, return_when="FIRST_COMPLETED")
        lease, waiting = done.pop().result(), list(pending)
    await lease.release()
    assert caplog.text.count("pgkv.listener.polling") == 1


async def test_where_nothing_is_heard_waiters_poll(
    store: Any, variant: Variant, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A trial notification that does not arrive (an undeclared pooler) means polling."""
    from pgkv._background import listener as _listener

    _listener._said.clear()
    monkeypatch.setattr(_listener, "TRIAL_TIME", 0.2)
    monkeypatch.setattr(_listener, "listen_sql", lambda channels: sql.SQL("LISTEN pgkv_elsewhere"))
    lease = await lock_of(variant, store).acquire()
    waiting = asyncio.ensure_future(_acquired(lock_of(variant, store, wakeup="notify")))
    await until(lambda: "pgkv.listener.polling" in caplog.text, "it is said")
    await lease.release()
    await (await asyncio.wait_for(waiting, 30)).release()


async def test_waiters_are_served_in_order(
    store: Any, variant: Variant, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fair=True: first come, first served; and no ticket is left behind."""
    # A waiter that stands still for longer loses its place.
    monkeypatch.setattr(flows, "TICKET_TTL", 60.0)
    lock = lock_of(variant, store, fair=True)
    order: list[int] = []
    lease = await lock.acquire()

    async def wait(number: int) -> None:
        async with lock_of(variant, store, fair=True).acquire():
            order.append(number)

    waiting = []
    for number in range(5):
        waiting.append(asyncio.ensure_future(wait(number)))
        await until(lambda n=number: tickets(peer) > n, "the ticket is drawn")  # type: ignore[misc]  # a default of the loop's variable
    await lease.release()
    await asyncio.gather(*waiting)
    assert order == [0, 1, 2, 3, 4]
    assert tickets(peer) == 0


async def test_a_dead_waiter_stalls_the_queue_for_its_ticket_only(
    store: Any, variant: Variant, peer: Peer
) -> None:
    """A ticket whose owner no longer asks loses its place after its two seconds."""
    lock = lock_of(variant, store, fair=True)
    with pytest.raises(pgkv.LockTimeoutError):
        async with lock.acquire():
            await lock_of(variant, store, fair=True).acquire(timeout=0.05)
    assert tickets(peer) == 0, "one that gives up leaves the queue"
    started = time.monotonic()
    peer.run(
        "INSERT INTO kv_store_tickets VALUES ('queue' || E'\\x1f' || 'dead', 1,"
        " clock_timestamp() + interval '1 second')"
    )
    async with lock.acquire(timeout=90):
        assert 0.9 < time.monotonic() - started < 2.5 + LATE


async def test_a_fair_try_does_not_overtake(store: Any, variant: Variant, peer: Peer) -> None:
    """try_acquire of a free lock is denied while somebody waits in order, and leaves no ticket."""
    lock = lock_of(variant, store, fair=True)
    async with lock.acquire():
        pass
    peer.run("UPDATE kv_store_locks SET expires_at = to_timestamp(0)")
    peer.run(
        "CREATE TABLE IF NOT EXISTS kv_store_tickets (key text primary key, version bigint, expires_at timestamptz)"
    )
    peer.run(
        "INSERT INTO kv_store_tickets VALUES ('queue' || E'\\x1f' || 'early', 1,"
        " clock_timestamp() + interval '1 minute')"
    )
    assert await lock.try_acquire() is None
    assert tickets(peer) == 1
    barger = await lock_of(variant, store).try_acquire()
    assert barger is not None, "fair binds those who use it"
    await barger.release()


@newest
async def test_waiting_costs_few_statements(
    store: Any, variant: Variant, operations: list[tuple[str, str, int]]
) -> None:
    """Waiters settle at two to four looks a second each."""
    lock = lock_of(variant, store)

    def looks() -> int:
        return sum(name in ("lock_look", "lock_take", "lock_grant") for name, *_ in operations)

    async def visit() -> None:
        async with lock.acquire(timeout=60):
            pass

    async with lock.acquire():
        waiting = [asyncio.ensure_future(visit()) for _ in range(5)]
        await until(lambda: looks() >= 5 * 10, "all have begun, and look more seldom")
        operations.clear()
        started = time.monotonic()
        await asyncio.sleep(1.0)
        assert looks() <= 5 * 5 * (time.monotonic() - started)
        await until(lambda: looks() >= 5, "they go on")
    await asyncio.gather(*waiting)


async def test_waiters_without_a_ticket_are_counted(
    store: Any, variant: Variant, dsn: str, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits for a while for a lock that is not fair, or a semaphore, leaves a note. A grant at once
    leaves none, and neither does it once it has the lock. A note is no place in a queue."""
    monkeypatch.setattr(flows, "NOTE_AFTER", 0.0)
    lock, slots = lock_of(variant, store), variant.make("Semaphore", store, "queue", 1)
    held = [await lock.acquire(), await slots.acquire()]
    assert tickets(peer) == 0
    waiting = [asyncio.ensure_future(_acquired(each)) for each in (lock, slots)]
    await until(lambda: tickets(peer) == 2, "both have noted that they wait")
    with pgkv.Store.connect(dsn) as other:
        counted = other._execute(statements_of(other, LockStatements, durable=True).queue())
    assert counted == {"queue": 2}
    fair = variant.make("Lock", store, "queue", fair=True, durable=False)
    await (await fair.acquire(timeout=30)).release()
    for each in held:
        await each.release()
    for each in await asyncio.wait_for(asyncio.gather(*waiting), 30):
        await each.release()
    await until(lambda: tickets(peer) == 0, "the notes are gone")
