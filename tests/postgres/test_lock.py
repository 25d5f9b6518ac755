"""Locks: grants, tokens, time, loss, and what an operator may do; in both variants."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import pytest

import pgkv
from pgkv import LeaseLostError, LockTimeoutError
from pgkv._background import background, renewal
from pgkv._background.renewal import clock as clock_now
from pgkv.patterns._runtime import lease as lease_module
from pgkv.patterns.lock import flows
from pgkv.testing import ServerClock
from tests.faults import support
from tests.peers import Peer, gather, until
from tests.servers import LATE, wait_until
from tests.variants import Variant, inside

TABLE = "kv_store_locks"


def lock_of(variant: Variant, store: Any, name: str = "billing", **options: Any) -> Any:
    return variant.make("Lock", store, name, **options)


def xmax(peer: Peer) -> int:
    """The next transaction id: it moves with each one that writes or locks."""
    return int(peer.one("SELECT pg_snapshot_xmax(pg_current_snapshot())::text"))


# -- granting


async def test_one_holder_at_a_time(store: Any, variant: Variant) -> None:
    """While one holds it nobody else is granted it; after the release somebody is."""
    lock, other = lock_of(variant, store), lock_of(variant, store)
    lease = await lock.acquire(timeout=20)
    assert await other.try_acquire() is None
    with pytest.raises(LockTimeoutError, match="billing"):
        await other.acquire(timeout=0)
    assert await lease.release() is True
    second = await other.try_acquire()
    assert second.token > lease.token
    assert await lease.release() is False
    await second.release()


async def test_a_timeout_ends_the_wait(store: Any, variant: Variant) -> None:
    """acquire(timeout) raises LockTimeoutError when its time is over, not much later."""
    lock = lock_of(variant, store)
    async with lock.acquire():
        started = time.monotonic()
        with pytest.raises(LockTimeoutError):
            await lock.acquire(timeout=0.3)
        assert 0.3 <= time.monotonic() - started < 1.5 + LATE


async def test_a_waiter_is_granted_after_the_release(store: Any, variant: Variant) -> None:
    """acquire() without a timeout returns when the holder has let go."""
    lock = lock_of(variant, store)
    lease = await lock.acquire()
    waiting = asyncio.ensure_future(_acquired(lock))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await lease.release()
    second = await asyncio.wait_for(waiting, 30)
    assert second.token > lease.token
    await second.release()


async def _acquired(lock: Any, **options: Any) -> Any:
    return await lock.acquire(**options)


async def test_the_holder_is_shown(store: Any, variant: Variant, peer: Peer) -> None:
    """holder() tells who, since when, until when by the server's clock, and the metadata."""
    lock = lock_of(variant, store, ttl=600, metadata={"job": 7})
    assert await lock.holder() is None
    async with lock.acquire() as lease:
        info = await lock.holder()
        assert (info.name, info.token, info.owner) == ("billing", lease.token, lease.owner)
        assert info.metadata == {"job": 7}
        assert 540 < info.remaining() <= 600
        assert 540 < (info.expires_at - info.read_at).total_seconds() <= 600
        assert 0 <= info.age() < 60
    assert await lock.holder() is None
    assert peer.one(f"SELECT count(*) FROM {TABLE}") == 1, "the row stays, with its token"


async def test_a_denied_try_leaves_no_trace(store: Any, variant: Variant, peer: Peer) -> None:
    """A try that is denied takes no transaction id and writes no WAL."""
    lock = lock_of(variant, store)
    async with lock.acquire():
        await lock.try_acquire()
        before: Any = None
        after: Any = 0
        for _ in range(5):  # the server writes WAL of its own now and then
            before = xmax(peer), peer.one("SELECT pg_current_wal_insert_lsn()")
            for _ in range(20):
                assert await lock.try_acquire() is None
            after = xmax(peer), peer.one("SELECT pg_current_wal_insert_lsn()")
            if before == after:
                return
        pytest.fail(f"{before} became {after}")


async def test_a_usual_pair_is_two_statements_that_move_no_index(
    store: Any, variant: Variant, peer: Peer, operations: list[tuple[str, str, int]]
) -> None:
    """Taking and releasing a free lock are one UPDATE each, heap-only: neither the table nor its
    index grows with the grants."""
    lock = lock_of(variant, store)
    await (await lock.acquire()).release()
    operations.clear()
    for _ in range(20):
        await (await lock.acquire()).release()
    assert [name for name, _, _ in operations] == ["lock_take", "lock_release"] * 20
    peer.count_all()
    counts = "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_all_tables WHERE relid = %s::regclass"
    await until(lambda: peer.run(counts, TABLE)[0][0] >= 41, "the updates are counted")
    updates, heap_only = peer.run(counts, TABLE)[0]
    assert updates == heap_only


async def test_a_repeated_grant_is_the_same_grant(store: Any, variant: Variant) -> None:
    """A grant sent twice by the same acquire() (its first reply was lost) has one token."""
    from pgkv.patterns.lock.api import statements_of
    from pgkv.patterns.lock.lease import new_asking
    from pgkv.patterns.lock.sql import Denied, Granted, LockStatements

    inner = inside(store)
    sql = statements_of(inner, LockStatements, durable=True)
    row, stranger = new_asking(b"null"), new_asking(b"null")
    first = await store._execute(sql.grant(b"n", row, 30.0, 1.0))
    again = await store._execute(sql.grant(b"n", row, 30.0, 1.0))
    assert isinstance(first, Granted)
    assert again == first
    assert isinstance(await store._execute(sql.grant(b"n", stranger, 30.0, 1.0)), Denied)
    assert await store._execute(sql.release(b"n", first.token, False))
    taken = await store._execute(sql.take(b"n", stranger, 30.0))
    assert isinstance(taken, Granted)
    assert await store._execute(sql.take(b"n", stranger, 30.0)) is None
    assert await store._execute(sql.grant(b"n", stranger, 30.0, 1.0)) == taken


async def test_racing_first_grants_have_one_winner(store: Any, variant: Variant) -> None:
    """Of many who ask for a name that never was, exactly one is granted it."""
    locks = [lock_of(variant, store, "fresh") for _ in range(10)]  # one connection each
    await locks[0].holder()
    leases = await gather(*(lock.try_acquire() for lock in locks))
    granted = [lease for lease in leases if lease is not None]
    assert len(granted) == 1
    await granted[0].release()


async def test_tokens_rise_through_a_storm(store: Any, variant: Variant) -> None:
    """Every grant's token is above all earlier ones, and the critical sections never overlap."""
    lock = lock_of(variant, store, "storm")
    tokens: list[int] = []
    inside = 0

    async def work() -> None:
        nonlocal inside
        for _ in range(5):
            async with lock.acquire() as lease:
                inside += 1
                assert inside == 1
                tokens.append(lease.token)
                await asyncio.sleep(0)
                inside -= 1

    await asyncio.gather(*(work() for _ in range(6)))
    assert len(tokens) == 30
    assert tokens == sorted(set(tokens))


# -- time


async def test_an_expired_lease_is_taken_over(
    store: Any, variant: Variant, clock: ServerClock
) -> None:
    """When the holder's time has passed by the server's clock, the next asker is granted it."""
    lease = await lock_of(variant, store, renew=False).acquire()
    clock.advance(31)
    second = await lock_of(variant, store).acquire(timeout=0)
    assert second.token > lease.token
    assert await lease.release() is False, "an expired holder cannot release its successor's lease"
    assert (await lock_of(variant, store).holder()).token == second.token
    with pytest.raises(LeaseLostError) as lost:
        await lease.extend(30)
    assert lost.value.reason in ("replaced", "released")
    await second.release()


async def test_a_waiter_takes_over_within_a_second_of_expiry(
    store: Any, variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A waiter sleeps no longer than the lease that keeps it out."""
    for name in ("POLL_FIRST", "POLL_MAX"):
        monkeypatch.setattr(flows, name, 60.0)
    lease = await lock_of(variant, store, ttl=1, renew=False).acquire()
    started = time.monotonic()
    second = await lock_of(variant, store).acquire(timeout=90)
    assert time.monotonic() - started < 2 + LATE
    assert lease.is_lost
    await second.release()


async def test_tokens_rise_though_the_clock_steps_back(
    store: Any, variant: Variant, clock: ServerClock
) -> None:
    """A server clock that steps back, by an hour or a day, does not lower the next token, nor
    lock a released name again."""
    lock = lock_of(variant, store)
    last = 0
    for offset in (0, -3600, -86_400, 3600, 0):
        clock.set_offset(offset)
        async with lock.acquire(timeout=0) as lease:
            assert lease.token > last
            last = lease.token


async def test_a_step_back_prolongs_a_dead_holders_lease_by_the_step(
    store: Any, variant: Variant, clock: ServerClock
) -> None:
    """The stated limit: a holder that died before a step back keeps the name for the step."""
    lease = await lock_of(variant, store, ttl=60, renew=False).acquire()
    clock.advance(-100)
    info = await lock_of(variant, store).holder()
    assert 100 < info.remaining() <= 160
    assert await lock_of(variant, store).try_acquire() is None
    await lease.release()


def due(lease: Any) -> None:
    """Let its renewal be due now, and not at a third of its ttl."""
    inside(lease)._due = 0.0


async def renewed(peer: Peer, key: str, first: Any) -> Any:
    """Wait until a lease ends later than it did first; when."""
    ends = f"SELECT expires_at FROM {TABLE} WHERE key = %s"
    await until(lambda: peer.one(ends, key) > first, "it is renewed")
    return peer.one(ends, key)


async def test_leases_are_renewed(
    store: Any, variant: Variant, peer: Peer, clock: ServerClock
) -> None:
    """A lease lives beyond its ttl while its holder does, renewed at a third of it; the token stays."""
    lock = lock_of(variant, store, ttl=60)
    async with lock.acquire() as lease:
        assert inside(lease)._due - inside(lease)._began == pytest.approx(20)
        ends = (await lock.holder()).expires_at
        for _ in range(2):
            clock.advance(40)
            heard = support.renewed(inside(lease))
            due(lease)
            ends = await renewed(peer, "billing", ends)
            await until(heard, "its holder hears of it")
        info = await lock.holder()
        assert info.age() > 60
        assert info.token == lease.token
        assert not lease.is_lost
        lease.check()


async def test_without_renewal_a_lease_ends(
    store: Any, variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """renew=False: trust ends a margin before the ttl, and on_lost is told."""
    lost: list[Any] = []

    def on_lost(lease: Any) -> None:
        lost.append(lease.token)

    lock = lock_of(variant, store, ttl=300, renew=False, on_lost=on_lost)
    lease = await lock.acquire()
    assert 200 < lease.remaining() <= 270
    real = renewal.clock
    for module in (renewal, lease_module):
        monkeypatch.setattr(module, "clock", lambda: real() + 271)
    await until(lambda: bool(lost), "on_lost is called")
    assert lost == [lease.token]
    assert await lock.holder() is not None, "the holder hears of it before the server's expiry"
    with pytest.raises(LeaseLostError) as error:
        lease.check()
    assert error.value.reason == "expired"
    assert lease.remaining() == 0


async def test_extend_sets_the_remaining_time(store: Any, variant: Variant) -> None:
    """extend(6000) makes 6000 s remain, not 6000 more; it may also shorten."""
    lock = lock_of(variant, store, ttl=3000)
    async with lock.acquire() as lease:
        await lease.extend(6000)
        assert 5900 < (await lock.holder()).remaining() <= 6000
        assert 5300 < lease.remaining() <= 5400, "6000 less the margin of a tenth"
        assert lease.ttl == 6000
        await lease.extend(600)
        assert 500 < (await lock.holder()).remaining() <= 600
        assert 440 < lease.remaining() <= 540


async def test_one_locked_row_costs_no_other_lease(
    store: Any, variant: Variant, peer: Peer, witness: Peer
) -> None:
    """A stranger's transaction holds one lease's row: the other leases of the process, renewed with it, are
    renewed meanwhile."""
    locks = {name: lock_of(variant, store, name) for name in "abc"}
    leases = [await lock.acquire() for lock in locks.values()]
    ends = {name: (await lock.holder()).expires_at for name, lock in locks.items()}
    with peer.conn.transaction():
        peer.run(f"SELECT 1 FROM {TABLE} WHERE key = 'b' FOR UPDATE")
        for lease in leases:
            due(lease)
        for name in "ac":
            await renewed(witness, name, ends[name])
        assert witness.one(f"SELECT expires_at FROM {TABLE} WHERE key = 'b'") == ends["b"]
        leases[0].check()
        leases[2].check()
    assert await leases[0].release()
    assert await leases[2].release()


async def test_a_locked_row_is_renewed_later(store: Any, variant: Variant, peer: Peer) -> None:
    """A lease whose row a stranger held at the first renewal is renewed soon after that has gone."""
    lock = lock_of(variant, store, "b")
    lease = await lock.acquire()
    ends = (await lock.holder()).expires_at
    with peer.conn.transaction():
        peer.run(f"SELECT 1 FROM {TABLE} WHERE key = 'b' FOR UPDATE")
        due(lease)
        held = inside(lease)
        await until(lambda: held._due > 0 and not held._turn.locked(), "it was tried")
    assert held._due - clock_now() < 2
    await renewed(peer, "b", ends)
    lease.check()
    assert await lease.release()


# -- loss


async def test_a_lost_lease_ends_its_block(store: Any, variant: Variant) -> None:
    """After force_release the holder hears at its next renewal: check() raises, an async body is
    cancelled, the block raises LeaseLostError."""
    lock = lock_of(variant, store)
    lost: list[str] = []
    ended = False
    with pytest.raises(LeaseLostError) as error:  # noqa: PT012  # the block itself is tested
        async with lock_of(variant, store, on_lost=lambda: lost.append("told")).acquire() as lease:
            assert await lock.force_release(lease.token) is True
            other = await lock.acquire(timeout=0)
            due(lease)
            if variant.name == "async":
                await asyncio.sleep(30)
                ended = True
            else:
                await until(lambda: lease.is_lost, "the renewal notices")
    assert not ended
    assert error.value.reason == "replaced"
    await until(lambda: lost == ["told"], "on_lost is called once")
    assert other.token > lease.token
    await other.release()


def test_two_leases_of_one_name_are_due_at_once(dsn: str) -> None:
    """After force_release a process may have the lost lease and the next one, renewed together:
    each hears what became of itself."""
    with pgkv.Store.connect(dsn) as store:
        lock = pgkv.Lock(store, "n")
        old = lock.acquire()
        assert lock.force_release(old.token)
        new = lock.acquire(timeout=0)
        old._due = new._due = 0.0
        wait_until(lambda: old.is_lost, "the renewal notices")
        with pytest.raises(LeaseLostError) as error:
            old.check()
        assert error.value.reason == "replaced"
        new.check()


async def test_the_bodys_own_exception_is_not_masked(store: Any, variant: Variant) -> None:
    """A block that raises lets that out, also when its lease was lost."""
    lock = lock_of(variant, store, ttl=30)
    with pytest.raises(ZeroDivisionError):  # noqa: PT012  # as above
        async with lock.acquire() as lease:
            await lock.force_release(lease.token)
            raise ZeroDivisionError
    assert await lock.try_acquire() is not None


async def test_a_block_whose_lease_was_taken_raises_at_its_end(
    store: Any, variant: Variant
) -> None:
    """A loss that nobody noticed before the release is noticed by it."""
    lock = lock_of(variant, store, ttl=30)
    with pytest.raises(LeaseLostError):
        async with lock.acquire() as lease:
            await lock.force_release(lease.token)
    async with lock.acquire(timeout=0) as lease:
        await lease.release()  # an early release is no loss


async def test_revoke_never_makes_two_holders(
    store: Any, variant: Variant, clock: ServerClock
) -> None:
    """revoke(token) ends the token at once, and the name stays taken to the lease's old expiry."""
    lock = lock_of(variant, store, ttl=30)
    lease = await lock.acquire()
    assert await lock.revoke(lease.token) is True
    assert await lock.revoke(lease.token) is False
    assert await lock.try_acquire() is None
    with pytest.raises(LeaseLostError):
        await lease.extend(30)
    clock.advance(31)
    second = await lock.acquire(timeout=0)
    assert second.token > lease.token
    await second.release()


async def test_force_release_needs_the_token(store: Any, variant: Variant) -> None:
    """Another grant's token frees nothing."""
    lock = lock_of(variant, store)
    async with lock.acquire() as lease:
        assert await lock.force_release(lease.token - 1) is False
        assert await lock.revoke(lease.token + 1) is False
        lease.check()


async def test_a_closed_store_loses_its_leases(
    make_store: Any, variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the store its renewal ends; the lease says so, of a blocking store when close() returns."""
    monkeypatch.setattr(background, "STOP_TIME", 60.0)
    store = await make_store()
    lease = await lock_of(variant, store).acquire()
    if variant.name == "sync":  # its background has something else to do first
        loop = inside(lease)._runtime.background().loop
        loop.call_soon_threadsafe(time.sleep, 0.2)
        await store.close()
        assert lease.is_lost
    else:
        await store.close()
        await until(lambda: lease.is_lost, "it is told")
    with pytest.raises(LeaseLostError) as error:
        lease.check()
    assert error.value.reason == "closed"


# -- where locks live


async def test_grants_are_logged_unless_told_otherwise(
    store: Any, variant: Variant, peer: Peer
) -> None:
    """Durable grants are in a logged table, the others in an UNLOGGED one of another name, and
    neither knows of the other."""
    async with (
        lock_of(variant, store).acquire(),
        lock_of(variant, store, durable=False).acquire(timeout=0),
    ):
        kinds = dict(
            peer.run(
                "SELECT relname, relpersistence::text FROM pg_class WHERE relname ~ '^kv_store_locks(_u)?$'"
            )
        )
    assert kinds == {"kv_store_locks": "p", "kv_store_locks_u": "u"}


async def test_clearing_the_store_frees_no_lock(store: Any, variant: Variant) -> None:
    """clear(), truncate() and sweeps know nothing of locks."""
    lock = lock_of(variant, store)
    async with lock.acquire():
        await store.clear()
        await store.truncate()
        await store.cleanup_expired()
        assert await lock.try_acquire() is None


async def test_a_namespace_has_locks_of_its_own(store: Any, variant: Variant) -> None:
    """Names in a namespace carry its prefix, and are shown without."""
    inner, outer = lock_of(variant, store.namespace("a:"), "x"), lock_of(variant, store, "x")
    async with inner.acquire(), outer.acquire(timeout=0):
        assert (await inner.holder()).name == "x"
        assert await lock_of(variant, store, "a:x").try_acquire() is None


async def test_no_lock_inside_a_transaction(store: Any, variant: Variant, connect: Any) -> None:
    """A grant that can be rolled back would give its token twice: refused at construction."""
    async with store.transaction() as tx:
        with pytest.raises(pgkv.TransactionError, match="guard"):
            lock_of(variant, tx)
    conn = await connect()
    with pytest.raises(pgkv.TransactionError, match="guard"):
        lock_of(variant, store.using(conn))
    await conn.rollback()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"ttl": 0}, pgkv.InvalidValueError, "ttl"),
        ({"ttl": float("nan")}, pgkv.InvalidValueError, "ttl"),
        ({"wakeup": "shout"}, pgkv.ConfigError, "wakeup"),
        ({"on_lost": 3}, pgkv.ConfigError, "on_lost"),
        ({"metadata": object()}, pgkv.InvalidValueError, "metadata"),
    ],
)
async def test_what_is_wrong_is_named(
    store: Any, variant: Variant, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    """Bad settings are refused when the lock is made, by name."""
    with pytest.raises(error, match=text):
        lock_of(variant, store, **options)


async def test_names_are_checked(store: Any, variant: Variant) -> None:
    """A name is a key: not empty, no NUL, not too long; and without the separator of tickets."""
    for name in ("", "a\0b", "a\x1fb", "x" * 2000):
        with pytest.raises(pgkv.InvalidKeyError):
            lock_of(variant, store, name)


async def test_the_lock_itself_is_not_entered(store: Any, variant: Variant) -> None:
    """`with lock:` could not know which lease to end, if two are entered in turns: it is refused
    with what to write, and nothing is acquired."""
    for made, what in (
        (lock_of(variant, store, "n"), "lock"),
        (variant.make("Semaphore", store, "s", 2), "semaphore"),
    ):
        with pytest.raises(TypeError, match=rf"write `(async )?with {what}.acquire\(\) as lease:`"):
            async with made:
                pass
    assert await lock_of(variant, store, "n").holder() is None


async def test_each_block_ends_its_own_lease(store: Any, variant: Variant) -> None:
    """Blocks that are left in another order, or in another task or thread, than they were entered
    in: each ends the lease that it began with."""
    gpus = variant.make("Semaphore", store, "gpus", 3)

    async def gpu() -> Any:
        async with gpus.acquire() as lease:
            yield lease

    generators = [gpu() for _ in range(3)]
    leases = [await anext(each) for each in generators]
    stack = contextlib.AsyncExitStack()
    entered = await asyncio.create_task(_entered(stack, lock_of(variant, store, "stack")))
    for ended in (0, 2, 1):
        await asyncio.create_task(_await(generators[ended].aclose()))
        assert leases[ended].is_lost
        assert not any(leases[other].is_lost for other in {0: (1, 2), 2: (1,), 1: ()}[ended])
    assert not entered.is_lost
    await stack.aclose()
    assert entered.is_lost
    assert await lock_of(variant, store, "stack").holder() is None


async def _entered(stack: contextlib.AsyncExitStack, lock: Any) -> Any:
    return await stack.enter_async_context(lock.acquire())


async def _await(awaitable: Any) -> Any:
    return await awaitable


async def test_only_names_unused_for_a_week_are_forgotten(
    store: Any, variant: Variant, peer: Peer, clock: ServerClock
) -> None:
    """Cleaning deletes free rows whose last grant is older than seven days; tokens rise on."""
    from pgkv.patterns.lock.api import statements_of
    from pgkv.patterns.lock.sql import LockStatements

    inner = inside(store)
    sql = statements_of(inner, LockStatements, durable=True)
    async with lock_of(variant, store, "old").acquire() as lease:
        last = lease.token
    held = await lock_of(variant, store, "held", ttl=30 * 86_400, renew=False).acquire()
    clock.advance(6.9 * 86_400)
    await store._execute(sql.clean(0))
    assert peer.one(f"SELECT count(*) FROM {TABLE}") == 2
    clock.advance(0.2 * 86_400)
    await store._execute(sql.clean(0))
    assert peer.run(f"SELECT key FROM {TABLE}") == [("held",)]
    async with lock_of(variant, store, "old").acquire() as lease:
        assert lease.token > last
    await held.release()


@pytest.mark.parametrize("fair", [False, True], ids=["lock", "fair lock"])
async def test_a_grant_removes_old_names(
    store: Any,
    variant: Variant,
    peer: Peer,
    clock: ServerClock,
    monkeypatch: pytest.MonkeyPatch,
    fair: bool,
) -> None:
    """One grant in many is followed by the cleaning, of tickets too where the lock is fair."""
    async with lock_of(variant, store, "old", fair=fair).acquire():
        pass
    if fair:
        peer.run("INSERT INTO kv_store_tickets VALUES ('dead', 1, to_timestamp(0))")
    clock.advance(8 * 86_400)
    monkeypatch.setattr(flows, "CLEAN_CHANCE", 1.0)
    async with lock_of(variant, store, "new", fair=fair).acquire():
        await until(lambda: peer.run(f"SELECT key FROM {TABLE}") == [("new",)], "it is cleaned")
        if fair:
            count = "SELECT count(*) FROM kv_store_tickets"
            await until(lambda: peer.one(count) == 0, "the tickets are cleaned")


async def test_grants_are_durable_for_a_role_that_is_not(
    make_store: Any, dsn: str, variant: Variant, peer: Peer
) -> None:
    """With synchronous_commit off for the role each grant and renewal still waits for the disk."""
    from psycopg.conninfo import conninfo_to_dict, make_conninfo

    options = conninfo_to_dict(dsn).get("options") or ""
    relaxed = make_conninfo(dsn, options=f"{options} -c synchronous_commit=off")
    lock = lock_of(variant, await make_store(dsn=relaxed), "n")
    async with lock.acquire():
        pass
    for _ in range(5):
        lease = await lock.acquire()
        row = peer.run("SELECT pg_current_wal_flush_lsn() >= pg_current_wal_insert_lsn()")
        await lease.release()
        if row == [(True,)]:
            return
    pytest.fail("no grant was flushed when it was answered")
