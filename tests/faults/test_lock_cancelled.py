"""Acquires, and blocks under a lease, that are cancelled or interrupted at any moment: nothing is
left of them, on the server and here."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import signal
import time
from collections.abc import Iterator
from typing import Any

import anyio
import psycopg
import pytest

import pgkv
from pgkv._ops.op import Op
from pgkv.patterns.lock.api import statements_of
from pgkv.patterns.lock.lease import new_asking
from pgkv.patterns.lock.sql import (
    Denied,
    Granted,
    LockStatements,
    SemaphoreStatements,
    slot_keys,
)
from tests import FULL
from tests.faults.support import Crew, Witness, newest
from tests.peers import until
from tests.servers import wait_until
from tests.variants import Variant, inside

pytestmark = [newest, pytest.mark.usefixtures("patience")]


def held(witness: Witness) -> int:
    """How many leases are live, in the table of locks and of semaphores."""
    live = "expires_at > clock_timestamp() AND expires_at < 'infinity'"
    return witness.rows(live, "kv_store_locks")


def waiters(witness: Witness) -> int:
    return witness.rows("expires_at > clock_timestamp()", "kv_store_tickets")


# -- arranged


class Arranged:
    """One asking, its grant on one connection and what takes it back on another."""

    def __init__(self, dsn: str, kind: str) -> None:
        self.store = pgkv.Store.connect(dsn)
        if kind == "semaphore":
            with pgkv.Semaphore(self.store, "n", 2).acquire():
                pass
            self.slots = statements_of(self.store, SemaphoreStatements, durable=True)
            self.sql: LockStatements = self.slots
            self.keys = slot_keys(b"n", 2)
        else:
            with pgkv.Lock(self.store, "other", fair=kind == "fair").acquire():
                pass
            self.sql = statements_of(self.store, LockStatements, durable=True)
            self.keys = [b"n"]
            if kind == "known":
                with pgkv.Lock(self.store, "n").acquire():
                    pass
        self.kind = kind
        self.asking = new_asking(b"null")
        self.grants, self.takes = psycopg.connect(dsn), psycopg.connect(dsn, autocommit=True)
        self.witness = Witness(dsn)

    def close(self) -> None:
        for conn in (self.grants, self.takes, self.witness.conn):
            conn.close()
        self.store.close()

    def grant(self) -> Op[Any]:
        if self.kind == "semaphore":
            return self.slots.grant_slot(self.keys, self.asking, 30.0, 1.0)
        if self.kind == "fair":
            return self.sql.grant_fair(b"n", self.asking, 30.0, 1.0, 2.0)
        return self.sql.grant(b"n", self.asking, 30.0, 1.0)

    def take_back(self) -> None:
        takes = self.store.using(self.takes)
        for op in self.sql.take_back(self.keys, self.asking):
            takes._channel.execute(op)
        if self.kind == "fair":
            for op in self.sql.leave_in_doubt(b"n", self.asking):
                takes._channel.execute(op)


@pytest.fixture(params=["unknown", "known", "fair", "semaphore"])
def arranged(dsn: str, request: pytest.FixtureRequest) -> Iterator[Arranged]:
    made = Arranged(dsn, request.param)
    yield made
    made.close()


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a_grant_under_way_is_taken_back(arranged: Arranged, end: str) -> None:
    """The grant's statement has run and not committed when it is taken back: that waits for it, and
    leaves nothing, whether it commits or not."""
    reply = arranged.store.using(arranged.grants)._channel.execute(arranged.grant())
    assert isinstance(reply, Granted)
    with Crew() as crew:
        taking = crew.start(arranged.take_back)
        pid = arranged.takes.info.backend_pid
        query = (
            f"SELECT count(*) FROM pg_stat_activity WHERE pid = {pid} AND wait_event_type = 'Lock'"
        )
        wait_until(
            lambda: arranged.witness.conn.execute(query.encode()).fetchone() == (1,), "it waits"
        )
        assert taking.is_alive()
        getattr(arranged.grants, end)()
    assert held(arranged.witness) == 0


def test_a_grant_that_comes_later_is_refused(arranged: Arranged) -> None:
    """The server gets to the grant's statement only after it was taken back, once while the name is
    free, and once after another held it in between: it grants nothing, and draws no ticket."""
    arranged.take_back()
    for _ in range(2):
        reply = arranged.store._execute(arranged.grant())
        assert isinstance(reply, Denied)
        assert held(arranged.witness) == 0
        kind: Any = pgkv.Semaphore if arranged.kind == "semaphore" else pgkv.Lock
        options = (
            {"slots": 2} if arranged.kind == "semaphore" else {"fair": arranged.kind == "fair"}
        )
        with kind(arranged.store, "n", **options).acquire(timeout=0):
            assert held(arranged.witness) == 1
    if arranged.kind == "fair":
        assert waiters(arranged.witness) == 0


def test_others_leases_are_not_taken_back(arranged: Arranged) -> None:
    """While another holds the name, taking an asking back ends nothing of theirs."""
    kind: Any = pgkv.Semaphore if arranged.kind == "semaphore" else pgkv.Lock
    options = {"slots": 2} if arranged.kind == "semaphore" else {"fair": arranged.kind == "fair"}
    with kind(arranged.store, "n", **options).acquire(timeout=0):
        arranged.take_back()
        assert held(arranged.witness) == 1


async def test_an_asking_that_was_ended_by_force_asks_afresh(
    store: Any, variant: Variant, dsn: str, witness: Witness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lease was granted and ended by force before its holder heard of it: the acquire that repeats
    its question is granted a new one."""
    lock = variant.make("Lock", store, "n")
    sql = inside(lock)._options.sql
    grant = sql.grant
    tokens: list[int] = []
    with pgkv.Store.connect(dsn) as aside:

        def grant_and_break(key: bytes, *args: Any) -> Op[Any]:
            if not tokens:
                tokens.append(aside._execute(grant(key, *args)).token)
                aside._execute(sql.release(key, tokens[0], False))
            return grant(key, *args)  # type: ignore[no-any-return]  # an Op

        monkeypatch.setattr(sql, "grant", grant_and_break)
        lease = await lock.acquire(timeout=60)
        assert lease.token > tokens[0]
        assert await lease.release()
    assert held(witness) == 0


# -- storms


KINDS = ["lock", "fair", "semaphore"]
TURNS = 40 if FULL else 20


def made(kind: str, store: Any, name: str) -> Any:
    prefix = "Async" if isinstance(store, pgkv.AsyncStore) else ""
    if kind == "semaphore":
        return getattr(pgkv, f"{prefix}Semaphore")(store, name, 2)
    return getattr(pgkv, f"{prefix}Lock")(store, name, fair=kind == "fair")


@pytest.mark.parametrize("kind", KINDS)
async def test_cancelled_acquires_leave_nothing(dsn: str, witness: Witness, kind: str) -> None:
    """Hundreds of acquires of a few names by eight tasks, cancelled at any moment: when all have
    ended, exactly the leases that were returned were held, and none is left."""
    random.seed(7)
    async with pgkv.AsyncStore.connect(dsn, pool_max_size=4) as store:
        async with made(kind, store, "warm").acquire():
            pass
        typical = 60.0
        for _ in range(5):
            started = time.monotonic()
            await (await made(kind, store, "warm").acquire()).release()
            typical = min(typical, time.monotonic() - started)
        returned = cancelled = 0

        async def work(number: int) -> None:
            nonlocal returned, cancelled
            for turn in range(TURNS):
                lock = made(kind, store, f"n{number % 3} {turn % 5}")
                task = asyncio.create_task(lock.acquire(timeout=60))
                await asyncio.sleep(random.uniform(0, 1.5 * typical))
                task.cancel()
                try:
                    lease = await task
                except asyncio.CancelledError:
                    cancelled += 1
                    continue
                returned += 1
                assert not lease.is_lost
                assert await lease.release()

        await asyncio.gather(*(work(number) for number in range(8)))
        assert returned + cancelled == 8 * TURNS
        assert cancelled > TURNS // 2
        assert held(witness) == 0
        if kind == "fair":
            assert waiters(witness) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_acquires_leave_nothing(dsn: str, witness: Witness, kind: str) -> None:
    """A signal handler raises at any moment of an acquire: either the lease was returned, or
    nothing is held."""

    class StopError(Exception):
        pass

    def stop(*_: object) -> None:
        raise StopError

    random.seed(11)
    before = signal.signal(signal.SIGALRM, stop)
    try:
        with pgkv.Store.connect(dsn) as store:
            lock = made(kind, store, "n")
            typical = 60.0
            for _ in range(5):
                started = time.monotonic()
                lock.acquire().release()
                typical = min(typical, (time.monotonic() - started) / 2)
            interrupted = 0
            for turn in itertools.count():
                if turn >= 200 and interrupted > 20:
                    break
                assert turn < 20_000, "too few calls are interrupted"
                lease = None
                try:
                    signal.setitimer(signal.ITIMER_REAL, random.uniform(0.00002, 1.3 * typical))
                    lease = lock.acquire(timeout=60)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except StopError:
                    interrupted += 1
                signal.setitimer(signal.ITIMER_REAL, 0)
                if lease is not None:
                    lease.release()
                assert held(witness) == 0, turn
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# -- cancel scopes, which cancel every await again


@pytest.mark.parametrize("how", ["entered", "released in finally", "locked"])
async def test_a_cancelled_scope_leaves_no_lease(dsn: str, witness: Witness, how: str) -> None:
    """anyio cancels every await of a scope, those of the clean-up too: a release that has to wait on
    the server is waited for, and the lease has ended."""
    async with pgkv.AsyncStore.connect(dsn) as store:
        lock = pgkv.AsyncLock(store, "n")
        with contextlib.ExitStack() as blocked:

            async def body() -> None:
                blocked.enter_context(witness.lock("n", "kv_store_locks"))
                releasing.append(asyncio.create_task(unblock()))
                scope.cancel()
                await anyio.sleep(30)

            async def unblock() -> None:
                await until(lambda: witness.waiting() == 1, "the release waits")
                await asyncio.sleep(0.1)  # cancelled again and again meanwhile
                blocked.close()

            releasing: list[asyncio.Task[None]] = []
            with anyio.CancelScope() as scope:
                if how == "locked":
                    await pgkv.locked(lock)(body)()
                elif how == "released in finally":
                    lease = await lock.acquire()
                    try:
                        await body()
                    finally:
                        await lease.release()
                else:
                    async with lock.acquire():
                        await body()
            assert scope.cancelled_caught
            await releasing[0]
        assert held(witness) == 0


async def test_a_waiter_in_a_cancelled_scope_leaves_the_queue(dsn: str, witness: Witness) -> None:
    """Its ticket is gone when the scope has ended, and the next one is served."""
    async with pgkv.AsyncStore.connect(dsn) as store:
        lock = pgkv.AsyncLock(store, "n", fair=True)
        lease = await lock.acquire()
        for delay in (0.0, 0.001, 0.002, 0.005, 0.05):
            with anyio.move_on_after(delay) as scope:
                await lock.acquire()
            assert scope.cancelled_caught
            assert waiters(witness) == 0
        await lease.release()
        async with lock.acquire(timeout=0):
            pass


async def test_a_cancelled_scope_ends_a_leader(dsn: str, witness: Witness) -> None:
    """A leader whose scope is cancelled tells its work, waits for it, and resigns."""
    ended: list[str] = []

    async def work() -> None:
        try:
            await anyio.sleep(30)
        finally:
            ended.append("work")

    async with pgkv.AsyncStore.connect(dsn) as store:
        leader = pgkv.AsyncLeader(
            store, "n", 10, on_elected=work, on_lost=lambda: ended.append("told")
        )
        async with anyio.create_task_group() as group:
            group.start_soon(leader.run)
            await until(lambda: leader.is_leader, "it is elected")
            await asyncio.sleep(0)
            group.cancel_scope.cancel()
        assert ended == ["told", "work"]
        assert not leader.is_leader
        assert held(witness) == 0


async def test_a_block_cancelled_by_its_loss_says_so(dsn: str) -> None:
    """The lease is lost while the body runs in a scope: the block raises LeaseLostError, and the
    scope was not cancelled."""
    async with pgkv.AsyncStore.connect(dsn) as store:
        lock = pgkv.AsyncLock(store, "n", ttl=3)
        with anyio.CancelScope() as scope, contextlib.suppress(pgkv.LeaseLostError):
            async with lock.acquire() as lease:
                await lock.force_release(lease.token)
                await anyio.sleep(30)
        assert not scope.cancelled_caught
