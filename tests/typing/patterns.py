"""What mypy and pyright, both strict, make of the patterns and adapters as a user writes them. Never run."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from typing import Annotated, assert_type

import flask
from django.http import HttpRequest, HttpResponse
from fastapi import Depends, FastAPI

import pgkv
from pgkv.integrations import fastapi as limits_of_fastapi
from pgkv.integrations import flask as limits_of_flask
from pgkv.integrations.dashboard import ASGIDashboard, WSGIDashboard, dashboard
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
    pgkv.Worker(queue, lambda job: print(job.payload)).run()
    pgkv.Worker([queue, queue], lambda job: job.ack())
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
    await pgkv.AsyncWorker(queue, lambda job: print(job.payload)).run()
    async with pgkv.AsyncIdempotency(store).once("k") as attempt:
        assert_type(attempt.is_replay, bool)
    async with pgkv.AsyncStore.sharded(["postgresql://one", "postgresql://two"]) as shards:
        assert_type(shards, pgkv.AsyncShardedStore)
        assert_type(await shards.get("k"), bytes | None)


def lambdas(store: pgkv.Store) -> None:
    """Where a function of the arguments or of the result is asked for, a lambda will do."""
    pgkv.cached(ttl=lambda result, *args: result.ttl)
    pgkv.cached(ttl=lambda result: 60)
    pgkv.cached(
        ttl=60, key=lambda month: ("tenant", month), condition=lambda user: user is not None
    )
    pgkv.locked(name=lambda account, amount: f"account:{account}", store=store)
    pgkv.idempotent(key=lambda order: order, fingerprint=lambda order: b"%d" % order)
    shared.limit(key=lambda user: user, cost=lambda user: 2)
    shared_async.limit(key=lambda user: user, timeout=5)
    store.update("log", lambda old: (old or b"") + b"line")
    store.rewrite(progress=lambda count: print(f"{count:,} values"))
    pgkv.locked(name=7)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    shared.limit(key=lambda user: 7)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    pgkv.cached(ttl=lambda result: "1h")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def locks(store: pgkv.Store) -> None:
    accounts = [pgkv.Lock(store, f"account:{n}") for n in (7, 3)]
    with pgkv.Lock.acquire_many(accounts, timeout=5) as (source, target):
        assert_type(source, pgkv.Lease)
        assert_type(target.token, int)
    with pgkv.Lock.acquire_many([accounts[0], pgkv.Semaphore(store, "few", 2)]) as leases:
        assert_type(leases[0], pgkv.Lease)


async def locks_later(store: pgkv.AsyncStore) -> None:
    accounts = [pgkv.AsyncLock(store, f"account:{n}") for n in (7, 3)]
    async with pgkv.AsyncLock.acquire_many(accounts, timeout=5) as (source, target):
        assert_type(source, pgkv.AsyncLease)
        assert_type(target.token, int)
    await pgkv.AsyncLock.acquire_many([pgkv.Lock(pgkv.Store(config), "l")])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]


def lives_of_sessions(store: pgkv.Store) -> None:
    sessions = pgkv.SessionStore(store)
    session = sessions.create({"n": 1}, idle_timeout=60, absolute_timeout=timedelta(days=1))
    assert_type(sessions.exists(session.id), bool)
    sessions.save(session, idle_timeout=None)
    sessions.rotate(session, user_id="u", absolute_timeout=3600)
    sessions.create(idle_timeout="1h")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def lives_of_sessions_later(store: pgkv.AsyncStore) -> None:
    sessions = pgkv.AsyncSessionStore(store)
    session = await sessions.create(idle_timeout=60)
    assert_type(await sessions.exists(session.id), bool)
    await sessions.save(session, absolute_timeout=3600)


api = FastAPI()
api.add_exception_handler(limits_of_fastapi.RateLimited, limits_of_fastapi.problem_response)
api.mount("/pgkv", dashboard(async_store, authorize=lambda request: request.path == "/"))
once = limits_of_fastapi.Idempotent(
    pgkv.AsyncIdempotency(async_store), scope=lambda request: request.headers["x-user"]
)
search_limit = limits_of_fastapi.rate_limit(
    shared_async, key=lambda request: request.headers.get("x-user"), limits=lambda request: "2/s"
)


@api.get("/search", dependencies=[Depends(search_limit)])
async def search() -> str:
    return "found"


@api.post("/pay")
async def pay_by_request(
    attempt: Annotated[pgkv.AsyncAttempt[bytes] | None, Depends(once)],
) -> bool:
    return attempt is not None and attempt.is_replay


site = flask.Flask("site")
site.session_interface = limits_of_flask.PgkvSessionInterface(
    pgkv.SessionStore(pgkv.Store(config)), timeout=1.0, on_error="anonymous"
)


@site.get("/report")
@limits_of_flask.rate_limit(shared, key=lambda request: request.headers.get("X-User"))
def site_report() -> str:
    return "done"


@site.post("/pay")
@limits_of_flask.idempotent(pgkv.Idempotency(pgkv.Store(config)), scope=lambda request: "user")
def site_pay() -> str:
    return "done"


def pages(store: pgkv.Store) -> None:
    assert_type(dashboard(store), WSGIDashboard)
    assert_type(dashboard(async_store, authorize=lambda request: True), ASGIDashboard)
    dashboard(store, authorize=7)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    limits_of_flask.rate_limit(shared_async)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    limits_of_fastapi.rate_limit(shared, on_error="maybe")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def observe() -> None:
    def hook(event: pgkv.OperationEvent) -> None:
        assert_type(event.seconds, float)

    undo = pgkv.on_event(hook)
    undo()
