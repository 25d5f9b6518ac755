"""The one background of a process or event loop: what it shares, and what does not end it."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import os
import signal
import threading
import time
import warnings
from typing import Any

import psycopg
import pytest
from psycopg import generators, sql
from psycopg.conninfo import make_conninfo
from psycopg.waiting import WAIT_R

import pgkv
from pgkv._background import listener as _listener
from pgkv._background.background import backgrounds
from pgkv._background.connection import opened
from pgkv._engine._async.pool import _recording
from pgkv._engine.pooling import Attempts
from tests.cached import cached_in
from tests.faults.support import newest
from tests.peers import Peer, until
from tests.servers import LATE, wait_until
from tests.variants import Variant, inside

pytestmark = newest


def listening(peer: Peer) -> list[str]:
    """The last statement of each connection that listens."""
    rows = peer.run(
        "SELECT query FROM pg_stat_activity WHERE query LIKE 'LISTEN%%'"
        " AND datname = current_database() AND pid <> pg_backend_pid()"
    )
    return [row[0] for row in rows]


async def acquired(lock: Any, **options: Any) -> Any:
    return await lock.acquire(**options)


def cancel_all_tasks() -> None:
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()


# -- one connection that listens ------------------------------------------------------------


async def test_one_connection_listens_for_all(store: Any, variant: Variant, peer: Peer) -> None:
    """Waiting locks and first levels of all stores on a database hear over one connection, which
    ends with the last of them."""

    @cached_in(variant, store, l1=pgkv.L1(ttl=600))
    async def f() -> int:
        return 1

    await f()
    await until(lambda: len(listening(peer)) == 1, "the process listens")
    lease = await variant.make("Lock", store, "name").acquire()
    waiting = asyncio.ensure_future(acquired(variant.make("Lock", store, "name", wakeup="notify")))
    await until(lambda: "pgkv_locks" in "".join(listening(peer)), "it listens for locks too")
    assert "pgkv_cache" in listening(peer)[0]
    await lease.release()
    lease = await asyncio.wait_for(waiting, 30)
    await lease.release()
    assert len(listening(peer)) == 1
    await store.close()
    await until(lambda: not listening(peer), "the connection ends with its store")


@pytest.mark.parametrize("connect", [opened, _recording(Attempts()).connect], ids=["alone", "pool"])
async def test_a_cancelled_attempt_leaves_no_connection(
    dsn: str, peer: Peer, monkeypatch: pytest.MonkeyPatch, connect: Any
) -> None:
    """What the server has opened already ends with the attempt, and not with the last one who keeps its task."""
    is_open = asyncio.Event()

    def late(_: type, conninfo: str) -> Any:
        pgconn = yield from generators.connect(conninfo)
        is_open.set()
        while True:
            yield pgconn.socket, WAIT_R

    monkeypatch.setattr(psycopg.AsyncConnection, "_connect_gen", classmethod(late))
    attempt = asyncio.ensure_future(connect(make_conninfo(dsn, application_name="late")))
    await is_open.wait()
    attempt.cancel()
    await asyncio.wait([attempt])
    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'late'"
    await until(lambda: peer.one(query) == 0, "the connection ends")
    assert attempt.cancelled()


async def test_a_refused_listen_does_not_delay_an_acquire(
    store: Any, variant: Variant, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """LISTEN is refused: an acquire keeps to its timeout, each time, a release still lets a waiter
    in, and the log says it once."""
    monkeypatch.setattr(_listener, "listen_sql", lambda channels: sql.SQL("SELECT 1/0"))
    lease = await variant.make("Lock", store, "name").acquire()
    for _ in range(3):
        started = time.monotonic()
        with pytest.raises(pgkv.LockTimeoutError):
            await acquired(variant.make("Lock", store, "name", wakeup="notify"), timeout=0.3)
        assert time.monotonic() - started < 3.0 + LATE
    # One whose time passes before its first answer does not ask to be woken.
    waiting = asyncio.ensure_future(acquired(variant.make("Lock", store, "name", wakeup="notify")))
    await until(lambda: "pgkv.listener.lost" in caplog.text, "it is logged")
    await asyncio.sleep(0.2)
    await lease.release()
    await (await asyncio.wait_for(waiting, 30)).release()
    assert caplog.text.count("pgkv.listener.lost") == 1


async def test_a_trial_that_failed_is_repeated(
    store: Any, variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is too busy to deliver the trial notification in time is tried again later."""
    listen_sql = _listener.listen_sql
    monkeypatch.setattr(_listener, "TRIAL_TIME", 0.2)
    monkeypatch.setattr(_listener, "TRIAL_AGAIN", 0.2)
    monkeypatch.setattr(_listener, "listen_sql", lambda channels: sql.SQL("LISTEN pgkv_elsewhere"))
    async with variant.make("Lock", store, "name").acquire():
        waiting = asyncio.ensure_future(
            acquired(variant.make("Lock", store, "name", wakeup="notify"))
        )
        listener = backgrounds._of_channels[inside(store)._channel].listener
        await until(lambda: listener.unavailable, "the trial fails")
        monkeypatch.setattr(_listener, "TRIAL_TIME", 30.0)
        monkeypatch.setattr(_listener, "listen_sql", listen_sql)
        await until(lambda: listener.is_listening("pgkv_locks"), "it listens")
        await until(lambda: not listener.unavailable, "and says so")
    await (await asyncio.wait_for(waiting, 30)).release()


async def test_an_invalidation_in_a_transaction_reaches_this_process_at_its_commit(
    store: Any, variant: Variant, connect: Any
) -> None:
    """A call before the commit puts the old value into the first level again; the commit removes
    it, in the process that invalidated as well."""
    calls: list[int] = []

    @cached_in(variant, store, l1=pgkv.L1(ttl=600))
    async def f() -> int:
        calls.append(1)
        return len(calls)

    assert await f() == 1
    background = backgrounds._of_channels[inside(store)._channel]
    await until(lambda: background.listener.is_listening("pgkv_cache"), "the process listens")
    assert await f() == 1
    conn = await connect()
    await f.using(conn).invalidate()
    assert await f() == 1
    await conn.commit()
    async with asyncio.timeout(60):
        while await f() == 1:
            await asyncio.sleep(0.01)
    assert await f() == 2


# -- what does not end it -------------------------------------------------------------------


async def test_cancelling_all_tasks_ends_no_lease(dsn: str) -> None:
    """A program that cancels every task of its loop, again and again: the lease is renewed for far
    longer than its ttl, waiters are woken by releases, the store works, and closing it raises
    nothing."""
    store = await pgkv.AsyncStore.connect(dsn, pool_min_size=2)
    lease = await pgkv.AsyncLock(store, "name", ttl=9).acquire()
    background = backgrounds._of_channels[store._channel]
    token = lease.token
    until_time = time.monotonic() + 12
    struck = 0.0  # the end of the lease whose renewal was met under way
    while time.monotonic() < until_time:
        # Where each takes longer than the pause none of them would ever end.
        under_way = background.renewer._sending is not None
        if not under_way or struck != lease._until:
            cancel_all_tasks()
            struck = lease._until if under_way else struck
        await asyncio.sleep(0.1)
        lease.check()
    holder = await pgkv.AsyncLock(store, "name").holder()
    assert holder is not None
    assert holder.token == token
    assert lease.remaining() > 0
    values = await asyncio.gather(*(store.increment("n") for _ in range(20)))
    assert max(values) == 20
    waiting = asyncio.ensure_future(acquired(pgkv.AsyncLock(store, "name", wakeup="notify")))
    async with asyncio.timeout(60):
        while not background.listener.is_listening("pgkv_locks"):
            await asyncio.sleep(0.01)
    for task in asyncio.all_tasks() - {asyncio.current_task(), waiting}:
        task.cancel()
    await asyncio.sleep(0.1)
    assert background.listener.is_listening("pgkv_locks")
    assert await lease.release()
    await (await asyncio.wait_for(waiting, 30)).release()
    cancel_all_tasks()
    await store.close()


async def test_cancelled_refreshes_come_again(dsn: str) -> None:
    """A refresh that is cancelled before its first step does not keep its key from being refreshed
    for ever."""
    async with pgkv.AsyncStore.connect(dsn) as store:
        calls: list[int] = []

        @pgkv.cached(0.05, stale=600, store=store, store_timeout=20)
        async def f() -> int:
            calls.append(1)
            return len(calls)

        assert await f() == 1
        await asyncio.sleep(0.1)
        assert await f() == 1  # a refresh was begun
        cancel_all_tasks()
        async with asyncio.timeout(60):
            while await f() == 1:
                await asyncio.sleep(0.01)


async def test_cancelled_sweeps_come_again(dsn: str, peer: Peer) -> None:
    """The sweeps of BACKGROUND go on after all tasks of the loop were cancelled."""
    strategy = pgkv.TtlCleanupStrategy.BACKGROUND
    async with pgkv.AsyncStore.connect(dsn, ttl_cleanup_strategy=strategy) as store:
        await store.set("k", b"v")
        await asyncio.sleep(0.1)
        cancel_all_tasks()
        await store.set("gone", b"v", ttl=0.01)
        await until(lambda: peer.keys() == {"k"}, "it is swept", 60)


# -- contexts ------------------------------------------------------------------------------

tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="none")


async def test_a_refresh_runs_in_the_context_of_its_call(store: Any, variant: Variant) -> None:
    """A stale value is computed again with the context variables of the call that met it."""
    seen: list[str] = []

    @cached_in(variant, store, ttl=0.05, stale=600)
    async def f() -> str:
        seen.append(tenant.get())
        return tenant.get()

    tenant.set("first")
    assert await f() == "first"
    await asyncio.sleep(0.1)
    tenant.set("second")
    assert await f() == "first"
    await until(lambda: len(seen) == 2, "it is refreshed")
    assert seen == ["first", "second"]


# -- stores that are dropped ----------------------------------------------------------------


def backends(peer: Peer, name: str) -> int:
    return int(peer.one("SELECT count(*) FROM pg_stat_activity WHERE application_name = %s", name))


def test_a_dropped_store_ends_with_a_warning(dsn: str, peer: Peer) -> None:
    """Stores that are dropped without close() leave no thread and no connection, whatever ran
    behind them; a ResourceWarning says so."""
    before = threading.active_count()

    def use() -> None:
        store = pgkv.Store.connect(
            f"{dsn} application_name=dropped" if "://" not in dsn else dsn,
            ttl_cleanup_strategy=pgkv.TtlCleanupStrategy.BACKGROUND,
        )
        store.set("k", b"v")
        lease = pgkv.Lock(store, "name").acquire()
        with pytest.raises(pgkv.LockTimeoutError):
            pgkv.Lock(store, "name", wakeup="notify").acquire(timeout=0.2)
        lease.release()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            use()
        gc.collect()
        wait_until(lambda: (gc.collect(), threading.active_count() <= before)[1], "threads end", 60)
    assert any(
        issubclass(each.category, ResourceWarning) and "without close()" in str(each.message)
        for each in caught
    )


# -- fork ------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork() here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_has_a_background_of_its_own(dsn: str, peer: Peer) -> None:
    """The child renews a lease that it took, listens by itself, and leaves its parent's alone."""
    with pgkv.Store.connect(dsn) as store:
        lease = pgkv.Lock(store, "parent", ttl=9).acquire()
        pid = os.fork()
        if not pid:
            code = 1
            with contextlib.suppress(BaseException):
                signal.alarm(120)
                mine = pgkv.Lock(store, "child", ttl=9).acquire()
                first = mine._until
                with contextlib.suppress(pgkv.LockTimeoutError):
                    pgkv.Lock(store, "child", wakeup="notify").acquire(timeout=2.0)
                listener = backgrounds._of_channels[store._channel].listener
                wait_until(lambda: listener.is_listening("pgkv_locks"), "it listens")
                wait_until(lambda: mine._until > first, "it is renewed")
                mine.check()
                code = 0
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        lease.check()
        assert lease.release()


def test_the_thread_survives_what_ends_an_event_loop(
    dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    """SystemExit in the background's thread is logged, and ends no renewal."""
    with pgkv.Store.connect(dsn) as store:
        lease = pgkv.Lock(store, "name", ttl=9).acquire()
        background = backgrounds._of_channels[store._channel]

        def leave() -> None:
            raise SystemExit

        background.loop.call_soon_threadsafe(leave)
        wait_until(lambda: "pgkv.background.broken error=SystemExit" in caplog.text, "it is logged")
        first = lease._until
        wait_until(lambda: lease._until > first, "it is renewed", 60)
        lease.check()
        assert lease.release()
