"""Few connections and many callers: bounded, in order, nobody forgotten, and every answer the
asker's own."""

from __future__ import annotations

import asyncio
import contextlib
import linecache
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from types import FrameType
from typing import Any

import psycopg
import psycopg_pool
import pytest

import pgkv
from pgkv import OperationTimeoutError, PgkvError, PoolTimeoutError, Store
from tests.faults.support import Crew, Witness, newest, until
from tests.servers import LATE, wait_until
from tests.variants import Variant, in_a_hurry, inside

MakeStore = Callable[..., Awaitable[Any]]
pytestmark = newest


async def test_all_connections_in_transactions(make_store: MakeStore) -> None:
    """Two transactions hold both connections: a third call waits for pool_timeout, not less, and
    gets PoolTimeoutError; one that becomes free in time serves it."""
    store = await make_store(pool_max_size=2, pool_timeout=0.3)
    async with store.transaction() as one, store.transaction() as two:
        await one.set("a", b"1")
        await two.set("b", b"2")
        started = time.monotonic()
        with pytest.raises(PoolTimeoutError, match="pool_max_size") as caught:
            await store.get("a")
        assert 0.29 < time.monotonic() - started < 1 + LATE
        assert not caught.value.outcome_unknown
    assert await store.get("a") == b"1"
    patient = await make_store(pool_max_size=2, pool_timeout=60, operation_timeout=60)
    async with patient.transaction() as one:
        async with patient.transaction() as two:
            await two.set("b", b"3")
            waiting = asyncio.ensure_future(patient.get("a"))
            await until(lambda: patient.pool_stats().waiting == 1, "it waits")
            assert not waiting.done()
        assert await waiting == b"1"


async def test_without_a_file_descriptor_left(make_store: MakeStore) -> None:
    """A value that the socket does not take at once is written all the same."""
    resource = pytest.importorskip("resource")
    store = await make_store(pool_max_size=1)
    await store.set("k", b"")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1024), hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(2))
        await store.set("k", b"x" * 8_000_000)
    finally:
        for each in taken:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(await store.get("k")) == 8_000_000


async def test_operation_timeout_comes_first(make_store: MakeStore) -> None:
    """With operation_timeout the shorter one, that is the error; nothing was sent."""
    store = await make_store(pool_max_size=1, pool_timeout=60)
    async with store.transaction() as tx:
        await tx.ping()
        with (
            in_a_hurry(store, 0.2),
            pytest.raises(OperationTimeoutError, match="nothing was sent") as caught,
        ):
            await store.set("a", b"1")
        assert not caught.value.outcome_unknown
    assert await store.get("a") is None


async def test_waiters_are_served_in_order(make_store: MakeStore) -> None:
    """First come, first served."""
    store = await make_store(pool_max_size=1, pool_timeout=60, operation_timeout=60)
    served: list[int] = []

    async def wait(i: int) -> None:
        async with store.transaction():  # until it is noted, nobody else is served
            served.append(i)

    async with store.transaction() as tx:
        await tx.ping()
        tasks = []
        for i in range(8):
            tasks.append(asyncio.ensure_future(wait(i)))
            # In the queue before the next one comes.
            await until(lambda: store.pool_stats().waiting == len(tasks), "it waits")
        assert not served
    await asyncio.gather(*tasks)
    assert served == list(range(8))


@pytest.fixture
def _restless() -> Iterator[None]:
    """Threads take turns within microseconds: between any two steps somebody else may run."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("_restless")
def test_storm_on_three_connections(dsn: str, witness: Witness) -> None:
    """64 threads, 20,000 operations, three connections: never more, it ends, and every thread reads
    what it wrote."""
    most = 0
    running = threading.Event()
    with Store.connect(dsn, pool_max_size=3, pool_timeout=200, operation_timeout=200) as store:

        def work(number: int) -> None:
            key = f"k{number}"
            for i in range(156):
                value = b"%d:%d" % (number, i)
                store.set(key, value)
                assert store.get(key) == value

        def watch() -> None:
            nonlocal most
            while not running.wait(0.02):
                most = max(most, len(witness.backends()))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            crew = Crew()
            for number in range(64):
                crew.start(work, number)
            crew.join()
        finally:
            running.set()
            watcher.join()
        assert 1 <= most <= 3


@pytest.mark.usefixtures("_restless")
def test_storm_with_expiring_leases_and_kills(
    dsn: str, witness: Witness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same while leases end all the time and connections die: all threads come to their end, and
    the number of connections is what it was."""
    monkeypatch.setattr("pgkv._engine._sync.pool.KEEP_TIME", 0.01)
    with Store.connect(dsn, pool_max_size=3, pool_timeout=200, operation_timeout=200) as store:
        failed = 0

        def work(number: int) -> None:
            nonlocal failed
            for i in range(100):
                value = b"%d:%d" % (number, i)
                try:
                    store.set(f"k{number}", value)
                    assert store.get(f"k{number}") == value
                except PgkvError:
                    failed += 1

        crew = Crew()
        for number in range(32):
            crew.start(work, number)
        for _ in range(10):
            time.sleep(0.03)
            witness.terminate()
        crew.join()
        assert failed < 32
        # Nothing was lost on the way: three transactions find room at once.
        with store.transaction() as a, store.transaction() as b, store.transaction() as c:
            for tx in (a, b, c):
                tx.ping()


@pytest.mark.usefixtures("_restless")
async def test_storm_of_time_outs(make_store: MakeStore) -> None:
    """Waiters that give up at the very moment at which a connection becomes free lose neither it nor
    their own deadline."""
    store = await make_store(pool_max_size=2, pool_timeout=0.004)
    outcomes = {"served": 0, "timed out": 0}

    async def work() -> None:
        for _ in range(60):
            started = time.monotonic()
            try:
                await store.ping()
                outcomes["served"] += 1
            except PoolTimeoutError:
                outcomes["timed out"] += 1
            assert time.monotonic() - started < 5 + LATE

    await asyncio.gather(*(work() for _ in range(40)))
    print(outcomes)
    async with store.transaction() as a, store.transaction() as b:
        await a.ping()
        await b.ping()


class Moments(deque[Any]):
    """A queue of waiters, or a stack, that lets something happen around a pop or an append."""

    def __init__(self) -> None:
        super().__init__()
        self.before_append: Callable[[], None] = lambda: None
        self.after_append: Callable[[], None] = lambda: None
        self.snatched = True

    def append(self, each: Any) -> None:
        self.before_append()
        super().append(each)
        after, self.after_append = self.after_append, lambda: None
        after()

    def pop(self) -> Any:  # type: ignore[override]  # a deque's takes no index
        if self and not self.snatched:
            self.snatched = True
            raise IndexError
        return super().pop()


@pytest.mark.parametrize("moment", ["before the queue", "in the queue", "snatched"])
def test_no_wake_up_is_lost(dsn: str, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that comes back between a caller's look at the stack and its place in the queue,
    or at once after, or that another caller snatches and returns meanwhile, reaches the caller."""
    monkeypatch.setattr("pgkv._engine._sync.pool.LOOK_AGAIN", 60.0)  # nothing finds it later
    with Store.connect(dsn, pool_max_size=1, pool_timeout=60) as store:
        pool = store._channel._pool  # type: ignore[union-attr]  # a PoolChannel's
        held = pool.check_out(time.monotonic() + 30, "test")
        queue, pool.idle = Moments(), Moments()
        pool.waiters = queue
        pool.idle.snatched = moment != "snatched"

        def give() -> None:
            pool.put_idle(held)

        if moment == "before the queue":
            queue.before_append = give
        else:
            queue.after_append = give
        started = time.monotonic()
        assert pool.check_out(started + 60, "test") is held
        assert time.monotonic() - started < 5 + LATE
        pool.put_idle(held)
        assert store.get("k") is None


def test_a_stale_connection_wakes_who_waits(dsn: str, witness: Witness) -> None:
    """A connection found dead, while another thread finds the stack empty for a waiter, leaves
    room; the waiter opens a new one."""
    with Store.connect(dsn, pool_max_size=1, pool_timeout=60) as store:
        pool = store._channel._pool  # type: ignore[union-attr]  # a PoolChannel's
        held = pool.check_out(time.monotonic() + 30, "test")
        pool.waiters = queue = Moments()

        def snatch() -> None:
            """Push; take the waiter off; let another caller pop and find it dead."""
            witness.terminate()
            pool.idle.append(held)
            pool.idle.pop()
            turn, _ = queue.popleft()
            pool.discard(held)  # no waiter is there to be woken
            turn.put(None)

        queue.after_append = snatch
        started = time.monotonic()
        conn = pool.check_out(started + 60, "test")
        assert time.monotonic() - started < 5 + LATE
        pool.check_in(conn)
        assert store.get("k") is None


class InterruptedCallError(Exception):
    """What a signal handler raises."""


def test_interrupts_at_any_line_leave_the_pool_whole(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler that raises between any two lines of a call costs no place of the pool."""
    for name in ("LOOK_AGAIN", "SEARCH_AFTER", "SEARCH_AGAIN"):
        monkeypatch.setattr(f"pgkv._engine._sync.pool.{name}", 0.01)
    with Store.connect(dsn, pool_max_size=2, pool_timeout=30) as store:
        store.set("k", b"v")
        calls: list[Callable[[], Any]] = [
            lambda: store.get("k"),
            lambda: store.run_transaction(lambda tx: tx.get("k")),
        ]
        for call in calls:
            found = next(each for each in count(1) if not _interrupted(call, each))
            assert found > 10
        with store.transaction() as one, store.transaction() as two:
            assert one.get("k") == two.get("k") == b"v"


def _interrupted(call: Callable[[], Any], line: int) -> bool:
    """Whether the call had so many lines; at the last of them it is interrupted."""
    left = line
    call()  # so that each begins with an idle connection

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if "/_engine/_sync/" not in frame.f_code.co_filename.replace("\\", "/"):
            return None
        if frame.f_code.co_name == "__del__":
            return None  # CPython reports what a destructor raises, and goes on
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        # CPython runs no handler between the last call of a block and the release of its lock.
        if event == "line" and not line.lstrip().startswith("with self._lock"):
            left -= 1
            if not left:
                sys.settrace(None)
                raise InterruptedCallError
        return trace

    sys.settrace(trace)
    try:
        call()
    except InterruptedCallError:
        return True
    finally:
        sys.settrace(None)
    return False


def test_a_waiter_finds_a_place_that_was_lost(dsn: str) -> None:
    """A connection dropped without a word is found by who waits already."""
    with Store.connect(dsn, pool_max_size=1, pool_timeout=60) as store:
        pool = store._channel._pool  # type: ignore[union-attr]  # a PoolChannel's
        held = [pool.check_out(time.monotonic() + 30, "test")]
        started = time.monotonic()
        with ThreadPoolExecutor(1) as threads:
            answer = threads.submit(store.ping, timeout=60)
            wait_until(lambda: len(pool.waiters) == 1, "it waits")
            held.clear()
            answer.result()
        assert time.monotonic() - started < 5 + LATE


async def test_a_full_server_makes_callers_wait_for_their_own(
    make_store: MakeStore, dsn: str, witness: Witness
) -> None:
    """Where the server has no slot left, calls wait for a connection of the store's own."""
    role = f"{witness.name}_narrow"
    schema = witness.conn.execute("SELECT current_schema()").fetchone()
    assert schema is not None
    witness.conn.execute(
        f'CREATE ROLE {role} LOGIN CONNECTION LIMIT 1; GRANT ALL ON SCHEMA "{schema[0]}" TO {role}'
    )
    try:
        store = await make_store(
            dsn=psycopg.conninfo.make_conninfo(dsn, user=role), pool_max_size=4, pool_timeout=30
        )
        await store.set("k", b"v")
        async with store.transaction() as tx:
            await tx.get("k")
            others = [asyncio.ensure_future(store.get("k")) for _ in range(3)]
            await asyncio.sleep(0.5)  # long enough for each to be refused by the server
            assert not any(each.done() for each in others)
        assert await asyncio.gather(*others) == [b"v"] * 3
        await store.close()
    finally:
        witness.conn.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


async def test_self_healing_with_one_connection(make_store: MakeStore, witness: Witness) -> None:
    """A missing table is created over the very connection that missed it; so is one that a
    transaction needs."""
    store = await make_store(pool_max_size=1)
    calls: list[Callable[[], Awaitable[Any]]] = [
        lambda: store.set("k", b"v"),
        lambda: store.get("k"),
        lambda: store.set_many({f"k{i}": b"v" for i in range(5001)}),
        lambda: store.update("k", lambda value: b"v"),
    ]
    for heal in calls:
        witness.conn.execute("DROP TABLE kv_store")
        await heal()
        assert witness.rows("true") >= 0
    other = store.table("other")
    async with other.transaction() as tx:
        await tx.set("k", b"v")
    assert await other.get("k") == b"v"


async def test_cancelled_waiters_lose_no_connection(make_store: MakeStore) -> None:
    """Waiting callers that are cancelled leave the queue (async), or end by themselves (sync)."""
    store = await make_store(pool_max_size=1, pool_timeout=30)
    async with store.transaction() as tx:
        await tx.ping()
        tasks = [asyncio.ensure_future(store.ping()) for _ in range(5)]
        await until(lambda: store.pool_stats().waiting == 5, "they wait")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    started = time.monotonic()
    await store.ping()
    assert time.monotonic() - started < 2 + LATE


async def test_close_with_callers_waiting(make_store: MakeStore, witness: Witness) -> None:
    """close() while calls wait for a connection: they fail with "closed", soon, and what is under
    way ends."""
    store = await make_store(pool_max_size=1, pool_timeout=30)
    await store.set("k", b"v")
    with witness.lock("k"):
        busy = asyncio.ensure_future(store.set("k", b"w"))
        await until(lambda: witness.waiting() == 1, "the call is blocked")
        waiting = [asyncio.ensure_future(store.get("k")) for _ in range(3)]
        await until(lambda: store.pool_stats().waiting == 3, "they wait")
        started = time.monotonic()
        closing = asyncio.ensure_future(store.close())
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert time.monotonic() - started < LATE
        assert all("closed" in str(outcome) for outcome in outcomes), outcomes
    outcome = (await asyncio.gather(busy, return_exceptions=True))[0]
    assert isinstance(outcome, int | PgkvError)
    await closing
    await until(lambda: not witness.backends(), "connections end")


async def test_close_while_a_connection_is_handed_over(
    make_store: MakeStore, witness: Witness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """psycopg_pool hands a connection to a caller whose wait times out in that moment; the store is
    closed before the pool's workers have taken it back: it is closed all the same."""
    store = await make_store(pool_max_size=2, retry=None)
    owner: Any = inside(store)
    wait_sync = psycopg_pool.pool.WaitingClient.wait
    wait_async = psycopg_pool.pool_async.WaitingClient.wait

    def given_late(self: Any, timeout: float) -> Any:
        wait_sync(self, 30)
        owner.close()
        raise psycopg_pool.PoolTimeout

    async def given_late_async(self: Any, timeout: float) -> Any:
        await wait_async(self, 30)
        await owner.close()
        raise psycopg_pool.PoolTimeout

    async with store.transaction() as held:
        await held.ping()
        monkeypatch.setattr(psycopg_pool.pool.WaitingClient, "wait", given_late)
        monkeypatch.setattr(psycopg_pool.pool_async.WaitingClient, "wait", given_late_async)
        with pytest.raises(PgkvError, match="the store is closed"):
            await store.get("k")
    await until(lambda: not witness.backends(), "connections end")


async def test_close_while_the_pool_is_opened(dsn: str, variant: Variant, witness: Witness) -> None:
    """A store that is closed while its first operation opens the pool opens none; the operation ends
    at once."""
    store = variant.make(
        "Store", pgkv.Config(dsn, retry=None, connect_timeout=60, operation_timeout=60)
    )
    owner: Any = inside(store)
    pool = owner._channel._pool
    asked, closing, conninfo = threading.Event(), threading.Event(), pool.conninfo

    def slow() -> Any:
        asked.set()
        closing.wait(30)
        return conninfo()

    pool.conninfo = slow
    first = asyncio.ensure_future(store.get("k"))
    await asyncio.to_thread(asked.wait, 30)
    closed = asyncio.ensure_future(store.close())
    await asyncio.sleep(0)
    started = time.monotonic()
    closing.set()
    await closed
    with contextlib.suppress(PgkvError):  # a thread may have been served before
        assert await first is None
    assert time.monotonic() - started < LATE
    await until(lambda: not witness.backends(), "connections end")


async def test_close_under_load(make_store: MakeStore, witness: Witness) -> None:
    """Calls that run when the store is closed succeed or say that it is closed; no connection is
    left, and every later call says so too."""
    for _ in range(5):
        store = await make_store(pool_max_size=3, pool_timeout=60, operation_timeout=60)

        async def work(store: Any = store) -> str:
            while True:
                try:
                    await store.set("k", b"v")
                    await store.get("k")
                except PgkvError as error:
                    return str(error)

        tasks = [asyncio.ensure_future(work()) for _ in range(10)]
        await asyncio.sleep(0.05)
        await store.close()
        messages = await asyncio.gather(*tasks)
        assert all("closed" in message for message in messages), messages
        await until(lambda: not witness.backends(), "connections end")
        with pytest.raises(PgkvError, match="the store is closed"):
            await store.get("k")
        with pytest.raises(PgkvError, match="the store is closed"):
            async with store.transaction():
                pass
        await store.close()


def test_nothing_is_left_after_close(dsn: str, witness: Witness) -> None:
    """No thread of ours or of the pool's, and no socket, outlives close()."""
    from pathlib import Path

    def sockets() -> set[str]:
        links: set[str] = set()
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                links.add(str(entry.readlink()))
        return {link for link in links if link.startswith("socket:")}

    from pgkv import TtlCleanupStrategy

    threads = set(threading.enumerate())
    before = sockets() if Path("/proc/self/fd").exists() else None
    for strategy in TtlCleanupStrategy:
        with Store.connect(dsn, pool_min_size=3, ttl_cleanup_strategy=strategy) as store:
            store.set("k", b"v", ttl=0.001)
            with Crew() as crew:
                for _ in range(5):
                    crew.start(store.get, "k")
    wait_until(lambda: not set(threading.enumerate()) - threads, "threads end")
    wait_until(lambda: not witness.backends(), "connections end")
    if before is not None:
        assert not sockets() - before
