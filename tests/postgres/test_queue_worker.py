"""Workers: what becomes of a job by what its function does, limits, slots, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import threading
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, Self

import pytest

import pgkv
from pgkv import Backoff, Bury, ConfigError, Later
from pgkv.testing import ServerClock
from tests.peers import until
from tests.postgres.test_queue import counts, queue_of
from tests.variants import Variant, _outward, inside


class Station:
    """A worker at work, in sync or async, and the event that ends it."""

    def __init__(self, variant: Variant, queues: Any, fn: Any, **options: Any) -> None:
        self.is_async = variant.name == "async"
        if not self.is_async:
            loop = asyncio.get_running_loop()
            queues, fn = _outward(queues, loop), _outward(fn, loop)
        self.worker = variant.make("Worker", queues, fn, **options)
        self.stop: Any = asyncio.Event() if self.is_async else threading.Event()
        self.task: asyncio.Future[Any] | None = None

    async def __aenter__(self) -> Self:
        self.task = asyncio.ensure_future(self.worker.run(self.stop))
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self.task is not None
        self.stop.set()
        await asyncio.wait_for(self.task, 60)


@contextlib.asynccontextmanager
async def working(variant: Variant, queues: Any, fn: Any, **options: Any) -> AsyncIterator[Any]:
    async with Station(variant, queues, fn, **options) as station:
        yield station


async def test_a_worker_does_all_jobs_once(store: Any, variant: Variant) -> None:
    """Each job is done once, and acknowledged when its function returns."""
    queue = queue_of(variant, store)
    ids = await queue.put_many(["x"] * 40)
    done: list[int] = []

    async def work(job: Any) -> None:
        done.append(job.id)

    async with working(variant, queue, work):
        await until(lambda: len(done) == 40, "all are done")
    assert sorted(done) == ids
    assert await counts(queue) == (0, 0, 0, 0)


async def test_what_a_function_does_decides(store: Any, variant: Variant) -> None:
    """Raise: put back. Later: put back without its attempt. Bury: dead. Its own end stands."""
    queue = queue_of(variant, store, backoff=Backoff(100))
    for payload in ("fails", "later", "bury", "acks", "returns"):
        await queue.put(payload)

    async def work(job: Any) -> None:
        text = job.payload.decode()
        if text == "fails":
            raise ValueError("no luck")
        if text == "later":
            raise Later(100)
        if text == "bury":
            raise Bury("hopeless")
        if text == "acks":
            await job.ack()
            raise ValueError("after the end")

    async with working(variant, queue, work):
        for _ in range(2000):
            if await counts(queue) == (0, 2, 0, 1):
                break
            await asyncio.sleep(0.01)
    rows = {row.payload.decode(): row for row in await queue.jobs()}
    assert {name: row.state for name, row in rows.items()} == {
        "fails": "delayed",
        "later": "delayed",
        "bury": "dead",
    }
    assert (rows["fails"].attempt, rows["fails"].error) == (1, "ValueError: no luck")
    assert (rows["later"].attempt, rows["bury"].error) == (0, "Bury: hopeless"[6:])


async def test_no_more_at_a_time_than_allowed(store: Any, variant: Variant) -> None:
    """`concurrency` bounds one worker, and `slots` all workers that share the semaphore."""
    queue = queue_of(variant, store)
    await queue.put_many(["x"] * 12)
    busy, most, done = 0, 0, 0

    async def work(_job: Any) -> None:
        nonlocal busy, most, done
        busy += 1
        most = max(most, busy)
        await asyncio.sleep(0.02)
        busy -= 1
        done += 1

    async with working(variant, queue, work, concurrency=3):
        await until(lambda: done == 12, "all are done")
    assert most <= 3
    await queue.put_many(["x"] * 6)
    most = done = 0
    slots = [variant.make("Semaphore", store, "api", slots=2) for _ in range(2)]
    async with (
        working(variant, queue, work, slots=slots[0]),
        working(variant, queue, work, slots=slots[1]),
    ):
        await until(lambda: done == 6, "all are done")
    assert most <= 2


async def test_a_limit_holds_jobs_back(store: Any, variant: Variant, clock: ServerClock) -> None:
    """Jobs of a queue begin at the limiter's rates; those that are refused wait, and lose no attempt."""
    queue = queue_of(variant, store)
    await queue.put_many(["x"] * 6)
    limiter = variant.make("RateLimiter", store, "2/h", name="jobs")
    done: list[int] = []

    async def work(job: Any) -> None:
        done.append(job.attempt)

    async with working(variant, queue, work, limit=limiter):
        await until(lambda: len(done) == 2, "as many as the bucket has")
        await asyncio.sleep(0.05)
        assert len(done) == 2
    assert done == [1, 1]
    waiting, delayed, running, dead = await counts(queue)
    assert (waiting + delayed, running, dead) == (4, 0, 0)
    assert all(row.attempt == 0 for row in await queue.jobs())


async def test_a_job_that_the_limit_refuses_gives_its_slot_back(
    store: Any, variant: Variant, clock: ServerClock
) -> None:
    """With a limiter and a semaphore both must allow a job; one that is refused by the limiter keeps no
    slot of the other workers."""
    queue = queue_of(variant, store)
    await queue.put_many(["x"] * 4)
    limiter = variant.make("RateLimiter", store, "2/h", name="jobs")
    slots = variant.make("Semaphore", store, "api", slots=2)
    done: list[int] = []

    async def work(job: Any) -> None:
        done.append(job.attempt)

    workers = [working(variant, queue, work, limit=limiter, slots=slots) for _ in range(2)]
    async with workers[0], workers[1]:
        await until(lambda: len(done) == 2, "as many as the bucket has")
    leases = [await slots.try_acquire() for _ in range(2)]
    assert all(leases)
    for lease in leases:
        await lease.release()
    assert done == [1, 1]
    assert (await queue.stats()).running == 0
    assert [row.attempt for row in await queue.jobs()] == [0, 0]


async def test_a_limit_that_fails_costs_a_job_no_attempt(store: Any, variant: Variant) -> None:
    """While the limit's store is away, a job that was taken for it goes back at once."""
    queue = queue_of(variant, store)
    await queue.put("x")
    limiter = variant.make("RateLimiter", store, "9/h", name="jobs")
    away = [pgkv.StoreUnavailableError("away")] * 2
    done: list[int] = []

    class Failing:
        def peek(self, name: str) -> Any:
            return limiter._target.peek(name)

        def hit(self, name: str) -> Any:
            if away:
                raise away.pop()
            return limiter._target.hit(name)

    class AsyncFailing:
        async def peek(self, name: str) -> Any:
            return await limiter.peek(name)

        async def hit(self, name: str) -> Any:
            if away:
                raise away.pop()
            return await limiter.hit(name)

    limit = AsyncFailing() if variant.name == "async" else Failing()

    async def work(job: Any) -> None:
        done.append(job.attempt)

    async with working(variant, queue, work, limit=limit):
        await until(lambda: bool(done), "it is done")
    assert done == [1]
    assert not away


async def test_queues_are_served_in_order(store: Any, variant: Variant) -> None:
    """A later queue is looked at when the earlier ones are empty."""
    first, second = queue_of(variant, store, "first"), queue_of(variant, store, "second")
    await second.put_many(["second"] * 2)
    await first.put_many(["first"] * 2)
    done: list[bytes] = []

    async def work(job: Any) -> None:
        done.append(job.payload)

    async with working(variant, [first, second], work, concurrency=1):
        await until(lambda: len(done) == 4, "all are done")
    assert done == [b"first"] * 2 + [b"second"] * 2


async def test_a_notified_worker_wakes(store: Any, variant: Variant) -> None:
    """With wakeup="notify" a put ends the worker's wait."""
    queue = queue_of(variant, store, wakeup="notify")
    await queue.create_table()
    done = asyncio.Event()

    async def work(_job: Any) -> None:
        done.set()

    inner = inside(queue)
    async with working(variant, queue, work):
        listener = inner._runtime.background().listener
        await until(lambda: listener.is_listening("pgkv_jobs"), "it listens")
        await asyncio.sleep(0.05)
        await queue.put("x")
        await asyncio.wait_for(done.wait(), 20)


async def test_an_end_waits_for_what_runs(store: Any, variant: Variant) -> None:
    """Told to stop, a worker takes no more and lets running jobs end."""
    queue = queue_of(variant, store)
    await queue.put_many(["x"] * 2)
    began, go = asyncio.Event(), asyncio.Event()

    async def work(_job: Any) -> None:
        began.set()
        await go.wait()

    async with working(variant, queue, work, concurrency=1) as station:
        await asyncio.wait_for(began.wait(), 20)
        station.stop.set()
        await asyncio.sleep(0.1)
        assert not station.task.done()
        go.set()
    assert await counts(queue) == (1, 0, 0, 0)


async def test_after_its_grace_jobs_are_put_back(store: Any, variant: Variant) -> None:
    """What has not ended by then is put back without losing its attempt."""
    queue = queue_of(variant, store)
    await queue.put("x")
    began, go = asyncio.Event(), asyncio.Event()

    async def work(_job: Any) -> None:
        began.set()
        await go.wait()

    async with working(variant, queue, work, grace=0.1):
        await asyncio.wait_for(began.wait(), 20)
    (row,) = await queue.jobs()
    assert (row.state, row.attempt) == ("waiting", 0)
    go.set()
    await asyncio.sleep(0.05)


async def test_a_server_that_is_away_is_waited_for(
    store: Any, variant: Variant, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An outage ends no worker: it says so, and goes on afterwards."""
    from pgkv.patterns.queue import flows

    queue = queue_of(variant, store)
    await queue.put("x")
    right, failures = flows.look, [2]

    def look(*args: Any) -> Any:
        if failures[0]:
            failures[0] -= 1
            raise pgkv.StoreUnavailableError("away")
        return (yield from right(*args))

    monkeypatch.setattr(flows, "look", look)
    done: list[int] = []

    async def work(job: Any) -> None:
        done.append(job.id)

    async with working(variant, queue, work):
        await until(lambda: done, "it is done")
    assert caplog.text.count("pgkv.queue.waiting") == 2


async def test_a_signal_ends_a_worker(dsn: str) -> None:
    """SIGTERM, where no event was given: no more jobs, those that run end. In both kinds."""
    code = """
import asyncio, signal, sys, time, pgkv
dsn, kind = sys.argv[1:]
def told():  # the worker's handler puts the one of before back
    return signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
def work(job):
    print("began", flush=True)
    while not told(): time.sleep(0.01)
    print("ended", flush=True)
async def awork(job):
    print("began", flush=True)
    while not told(): await asyncio.sleep(0.01)
    print("ended", flush=True)
async def main():
    async with pgkv.AsyncStore.connect(dsn) as store:
        await pgkv.AsyncWorker(pgkv.AsyncQueue(store, "q"), awork, concurrency=1).run()
if kind == "sync":
    with pgkv.Store.connect(dsn) as store:
        pgkv.Worker(pgkv.Queue(store, "q"), work, concurrency=1).run()
else:
    asyncio.run(main())
print("over")
"""
    with pgkv.Store.connect(dsn) as store:
        queue = pgkv.Queue(store, "q")
        for kind in ("sync", "async"):
            queue.put_many(["x"] * 2)
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", code, dsn, kind,
                stdout=asyncio.subprocess.PIPE,
            )  # fmt: skip
            assert process.stdout is not None
            assert await process.stdout.readline() == b"began\n"
            process.send_signal(signal.SIGTERM)
            rest = await asyncio.wait_for(process.stdout.read(), 60)
            assert rest == b"ended\nover\n"
            assert await process.wait() == 0
            assert queue.stats().waiting == 1
            queue.cancel(queue.jobs()[0].id)


async def test_a_cancelled_async_worker_puts_its_jobs_back(dsn: str) -> None:
    """Cancelling run() cancels what runs, whose jobs are put back."""
    async with pgkv.AsyncStore.connect(dsn) as store:
        queue = pgkv.AsyncQueue(store, "q")
        await queue.put("x")
        began = asyncio.Event()

        async def work(_job: pgkv.AsyncJob[Any]) -> None:
            began.set()
            await asyncio.sleep(60)

        running = asyncio.ensure_future(pgkv.AsyncWorker(queue, work).run(asyncio.Event()))
        await asyncio.wait_for(began.wait(), 20)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        (row,) = await queue.jobs()
        assert (row.state, row.attempt) == ("waiting", 0)


async def test_a_job_that_was_taken_and_not_begun_is_put_back(dsn: str) -> None:
    """A worker that is cancelled between the take and its limit's answer leaves no job leased."""

    class Limit:
        async def peek(self, _name: str) -> Any:
            return SimpleNamespace(allowed=True, retry_after=0.0)

        async def hit(self, _name: str) -> Any:
            running.cancel()
            await asyncio.sleep(60)

    async with pgkv.AsyncStore.connect(dsn) as store:
        queue = pgkv.AsyncQueue(store, "q")
        await queue.put("x")
        worker = pgkv.AsyncWorker(queue, print, limit=Limit())
        running = asyncio.ensure_future(worker.run(asyncio.Event()))
        with pytest.raises(asyncio.CancelledError):
            await running
        (row,) = await queue.jobs()
        assert (row.state, row.attempt) == ("waiting", 0)


async def test_settings_of_a_worker(store: Any, variant: Variant) -> None:
    """What cannot be is refused when the worker is made."""
    queue = queue_of(variant, store)
    with pytest.raises(ConfigError):
        variant.make("Worker", [], print)
    with pytest.raises(ConfigError):
        variant.make("Worker", queue, None)
    with pytest.raises(ConfigError):
        variant.make("Worker", queue, print, concurrency=0)
    with pytest.raises(ConfigError):
        variant.make("Worker", 17, print)


def test_kinds_are_not_mixed(dsn: str) -> None:
    """A Worker takes no async function, and no async limiter or semaphore."""

    async def work(_job: Any) -> None: ...

    with pgkv.Store.connect(dsn) as store:
        queue = pgkv.Queue(store, "q")
        with pytest.raises(ConfigError, match="AsyncWorker"):
            pgkv.Worker(queue, work)
        limiter = pgkv.AsyncRateLimiter(pgkv.AsyncStore(pgkv.Config(dsn)), "1/s", name="n")
        with pytest.raises(ConfigError, match="limit"):
            pgkv.Worker(queue, print, limit=limiter)
        assert repr(pgkv.Worker(queue, print)) == "<Worker of 'q' concurrency=8>"
