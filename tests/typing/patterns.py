# pyright: strict
"""What mypy and pyright, both strict, make of queues, idempotency keys, watchers, shards and transforms, as
a user writes them. Never run."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import assert_type

from django.http import HttpRequest, HttpResponse

import pgkv
from pgkv.integrations.django.idempotency import idempotent as idempotent_view
from pgkv.integrations.django.ratelimit import ratelimit

config = pgkv.Config(
    "postgresql://",
    transforms=[pgkv.Zstd(), pgkv.AesGcmSiv({1: bytes(32)})],
    max_entries=1000,
    on_error="miss",
    notify=True,
)
pgkv.Config("postgresql://", on_error="maybe")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def store_of_today() -> None:
    with pgkv.Store.connect("postgresql://") as store:
        assert_type(store.load([("a", "1"), ("b", b"2", 60)]), int)
        assert_type(store.append("a", b"x"), int)
        assert_type(store.evict(), int)
        assert_type(store.rewrite(), int)
        assert_type(store.now(), datetime)
        with store.watch(["a", "b"], values=True) as events:
            for event in events:
                assert_type(event, pgkv.Event)
                assert_type(event.value, bytes | None)
    with pgkv.Store.sharded(["postgresql://one", "postgresql://two"], slots=32) as shards:
        assert_type(shards, pgkv.ShardedStore)
        assert_type(shards.get("k"), bytes | None)


def work(job: pgkv.Job[bytes]) -> None:
    assert_type(job.payload, bytes)


def queues(store: pgkv.Store) -> None:
    queue = pgkv.Queue(store, "emails")
    assert_type(queue.put(b"payload", delay=5), pgkv.Put)
    assert_type(queue.put_many([b"a", "b"]), list[int])
    job = queue.take(timeout=1)
    if job is not None:
        job.ack()
    pgkv.Worker(queue, work, concurrency=2, limit=pgkv.RateLimiter(store, "10/s", name="mail"))
    queue.put(b"payload", dedupe=7)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def keys_of_requests(store: pgkv.Store) -> None:
    idem = pgkv.Idempotency(store)
    with idem.once("order:1", fingerprint=b"body", wait=1) as attempt:
        assert_type(attempt.is_replay, bool)
        attempt.result = b"done"


shared = pgkv.RateLimiter(pgkv.Store(config), "10/s", name="calls")
async_store = pgkv.AsyncStore(config)
shared_async = pgkv.AsyncRateLimiter(async_store, "10/s", name="calls")


@pgkv.locked("report", on_busy="raise")
def report(day: int) -> str:
    return str(day)


@pgkv.locked(name=str)
async def report_later(day: int) -> str:
    return str(day)


@pgkv.locked("report", on_busy="skip")
def report_or_none(day: int) -> str:
    return str(day)


@pgkv.locked(name=str, on_busy="skip")
async def report_or_none_later(day: int) -> str:
    return str(day)


class Reports:
    @pgkv.locked("reports", on_busy="skip")
    def make(self, day: int) -> str:
        return str(day)


@shared.limit(key=str)
def call(day: int) -> str:
    return str(day)


@shared_async.limit("all")
async def call_later(day: int) -> str:
    return str(day)


@ratelimit(shared)
def view(request: HttpRequest, day: int) -> HttpResponse:
    return HttpResponse(str(day))


@idempotent_view(pgkv.AsyncIdempotency(async_store), scope="")
async def view_later(request: HttpRequest, day: int) -> HttpResponse:
    return HttpResponse(str(day))


async def decorated(request: HttpRequest) -> None:
    assert_type(report(1), str)
    assert_type(await asyncio.create_task(report_later(1)), str)
    assert_type(report_or_none(1), str | None)
    assert_type(await asyncio.create_task(report_or_none_later(1)), str | None)
    assert_type(Reports().make(1), str | None)
    report_or_none("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert_type(call(1), str)
    assert_type(await asyncio.create_task(call_later(1)), str)
    assert_type(view(request, 1), HttpResponse)
    assert_type(await asyncio.create_task(view_later(request, 1)), HttpResponse)
    report("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    call("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await report_later("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await call_later("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


@pgkv.idempotent(key=str)
def pay(order: int) -> str:
    return str(order)


@pgkv.idempotent(key=str)
async def pay_later(order: int) -> str:
    return str(order)


def limits(store: pgkv.Store) -> None:
    limiter = pgkv.RateLimiter(store, [pgkv.Rate(10), pgkv.Quota(1000, "month")], name="api")
    assert_type(limiter.hit("k").retry_after, float)


async def tasks(store: pgkv.AsyncStore) -> None:
    assert_type(pay(1), str)
    assert_type(await pay_later(1), str)
    pay("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    queue = pgkv.AsyncQueue(store, "emails")
    job = await queue.take()
    if job is not None:
        assert_type(job.payload, bytes)
        await job.ack()
    async with store.watch("k") as events:
        async for event in events:
            assert_type(event, pgkv.Event)
    async with pgkv.AsyncIdempotency(store).once("k") as attempt:
        assert_type(attempt.is_replay, bool)


def observe() -> None:
    def hook(event: pgkv.OperationEvent) -> None:
        assert_type(event.seconds, float)

    undo = pgkv.on_event(hook)
    undo()
