"""Locks with every kind of store: they keep to their promises, and to their time, with each."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import psycopg_pool
import pytest

import pgkv
from pgkv.patterns.lock import flows
from tests.peers import until
from tests.servers import LATE
from tests.variants import Threaded, Variant


@contextlib.asynccontextmanager
async def opened(kind: str, variant: Variant, dsn: str) -> AsyncIterator[Any]:
    """A store of that kind."""
    if kind == "own pool":
        if variant.name == "async":
            async with psycopg_pool.AsyncConnectionPool(dsn, min_size=2, open=False) as pool:
                store: Any = pgkv.AsyncStore.from_pool(pool)
                yield store
                await store.close()
        else:
            with psycopg_pool.ConnectionPool(dsn, min_size=2, open=True) as blocking:
                store = Threaded(pgkv.Store.from_pool(blocking))
                yield store
                await store.close()
        return
    options: dict[str, Any] = {"coalesce": True} if kind == "coalescing" else {}
    store = await variant.connect(dsn, **options)
    yield store.namespace("inner:") if kind == "namespace" else store
    await store.close()


KINDS = ["plain", "coalescing", "namespace", "own pool"]


@pytest.mark.parametrize("kind", KINDS)
async def test_everything_about_locks_works(kind: str, variant: Variant, dsn: str) -> None:
    """Locks in all their ways of waiting, semaphores, leaders, guards of holders: with any store."""
    if kind == "coalescing" and variant.name == "sync":
        pytest.skip("only AsyncStore coalesces")
    async with opened(kind, variant, dsn) as store:
        for options in ({}, {"fair": True}, {"wakeup": "notify"}, {"durable": False}):
            lock = variant.make("Lock", store, "n", **options)
            async with lock.acquire() as lease:
                assert await lock.try_acquire() is None
                assert (await lock.holder()).token == lease.token
                await lease.extend(20)
                waiting = asyncio.ensure_future(_acquired(lock))
                await asyncio.sleep(0.05)
            assert await (await asyncio.wait_for(waiting, 90)).release()
            lease = await lock.acquire(timeout=0)
            assert await lock.revoke(lease.token)
            assert await lock.force_release((await lock.holder()).token)
        gpus = variant.make("Semaphore", store, "gpus", 2)
        async with gpus.acquire(), gpus.acquire():
            assert await gpus.try_acquire() is None
        elected: list[int] = []
        leader = variant.make(
            "Leader", store, "cron", on_elected=lambda lease: elected.append(lease.token)
        )
        stop = asyncio.Event() if variant.name == "async" else threading.Event()
        run = asyncio.ensure_future(_run(leader, stop))
        await until(lambda: bool(elected), "it is elected")
        stop.set()
        await asyncio.wait_for(run, 30)


async def _acquired(lock: Any) -> Any:
    return await lock.acquire(timeout=60)


async def _run(leader: Any, stop: Any) -> None:
    await leader.run(stop)


async def test_an_exhausted_pool_does_not_prolong_a_wait(
    make_store: Callable[..., Coroutine[Any, Any, Any]],
    variant: Variant,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All connections are in transactions: a try ends within a second or so, an acquire about when
    its timeout ends, though pool_timeout is a minute; and nothing is left to be taken back."""
    monkeypatch.setattr(flows, "ANSWER_TIME", 60.0)  # of a statement while a connection is free
    store = await make_store(pool_max_size=1, pool_timeout=60, operation_timeout=60)
    lock = variant.make("Lock", store, "n", ttl=60)
    async with lock.acquire():
        pass
    async with store.transaction() as tx:
        await tx.set("k", b"v")
        for timeout, seconds in ((None, 1.0), (0.2, 0.2), (0.0, 1.0)):
            started = time.monotonic()
            with pytest.raises(pgkv.PgkvError) as error:
                await (lock.try_acquire() if timeout is None else lock.acquire(timeout=timeout))
            assert isinstance(error.value, TimeoutError)
            assert not error.value.outcome_unknown
            assert seconds <= time.monotonic() - started < seconds + LATE
    async with lock.acquire(timeout=0):
        pass
