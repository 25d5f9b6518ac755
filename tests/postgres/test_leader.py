"""Leader election, the decorator, and the fence."""

from __future__ import annotations

import asyncio
import functools
import multiprocessing
import threading
import time
from typing import Any

import psycopg
import pytest

import pgkv
from pgkv.patterns.lock.api import statements_of
from pgkv.patterns.lock.sql import Asking, LockStatements
from pgkv.testing import ServerClock
from tests.peers import Peer, until
from tests.variants import Variant, in_thread, inside


def stop_event(variant: Variant) -> Any:
    return asyncio.Event() if variant.name == "async" else threading.Event()


async def test_one_leads_and_another_follows(store: Any, variant: Variant) -> None:
    """Of three candidates one is elected; when it stops it resigns, and another takes over with a
    higher term."""
    stops = [stop_event(variant) for _ in range(3)]
    terms: list[int] = []
    lost: list[int] = []
    leaders = [
        variant.make(
            "Leader", store, "cron",
            on_elected=lambda lease: terms.append(lease.token),
            on_lost=lambda lease: lost.append(lease.token),
        )
        for _ in stops
    ]  # fmt: skip
    runs = [
        asyncio.ensure_future(_run(leader, stop))
        for leader, stop in zip(leaders, stops, strict=True)
    ]
    for count in (1, 2, 3):
        await until(lambda n=count: len(terms) == n, "one is elected")  # type: ignore[misc]  # a default of the loop's variable
        (leading,) = (n for n, leader in enumerate(leaders) if leader.is_leader)
        assert leaders[leading].term == terms[-1]
        stops[leading].set()
        await asyncio.wait_for(runs[leading], 30)
        assert lost == terms[:count]
        assert not leaders[leading].is_leader
    assert terms == sorted(set(terms))


async def _run(leader: Any, stop: Any) -> None:
    await leader.run(stop)


async def test_a_leader_steps_down_when_its_lease_is_lost(
    store: Any, variant: Variant, clock: ServerClock
) -> None:
    """After a revocation on_lost is called before another one can be elected, then it campaigns
    again; async work is cancelled."""
    stop, events = stop_event(variant), []
    leases: list[Any] = []
    cancelled: list[bool] = []

    async def work(lease: Any) -> None:
        leases.append(lease)
        events.append(("elected", lease.token))
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    def note(lease: Any) -> None:
        leases.append(lease)
        events.append(("elected", lease.token))

    leader = variant.make(
        "Leader", store, "cron",
        on_elected=work if variant.name == "async" else note,
        on_lost=lambda lease: events.append(("lost", lease.token)),
    )  # fmt: skip
    run = asyncio.ensure_future(_run(leader, stop))
    await until(lambda: len(events) == 1, "it is elected")
    first = events[0][1]
    assert await variant.make("Lock", store, "cron").revoke(first)
    leases[0]._due = 0.0
    await until(lambda: len(events) == 2, "it steps down")
    clock.advance(31)
    await until(lambda: len(events) == 3, "it is elected again")
    stop.set()
    await asyncio.wait_for(run, 30)
    assert [kind for kind, _ in events] == ["elected", "lost", "elected", "lost"]
    assert events[2][1] > first
    if variant.name == "async":
        assert cancelled == [True, True]


async def test_what_the_work_raises_ends_run(store: Any, variant: Variant) -> None:
    """An exception of on_elected resigns and comes out of run()."""

    def fail() -> None:
        raise ZeroDivisionError

    leader = variant.make("Leader", store, "cron", on_elected=fail)
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(_run(leader, stop_event(variant)), 30)
    assert await variant.make("Lock", store, "cron").holder() is None


async def test_an_event_of_another_kind_stops_a_leader(store: Any, variant: Variant) -> None:
    """An event of multiprocessing, or of the caller's own: it is asked to wait itself."""
    if variant.name == "async":
        pytest.skip("tasks wait for an asyncio.Event")
    waited: list[float] = []
    leading = threading.Event()

    class Stop:
        def __init__(self) -> None:
            self.event = multiprocessing.Event()
            self.is_set = self.event.is_set

        def wait(self, seconds: float) -> bool:
            waited.append(seconds)
            return self.event.wait(seconds)

    stop = Stop()
    leader = variant.make("Leader", store, "cron", on_elected=lambda _: leading.set())
    run = asyncio.ensure_future(_run(leader, stop))
    assert await in_thread(leading.wait, 30)
    await until(lambda: waited, "it waits for the event")
    stop.event.set()
    await asyncio.wait_for(run, 30)


async def test_locked_functions_run_one_at_a_time(store: Any, variant: Variant) -> None:
    """@locked waits, skips or raises while another call runs."""
    inner = inside(store)
    running = 0
    go_on = threading.Event()

    def decorated(**options: Any) -> Any:
        exclusive: Any = pgkv.locked("job", store=inner, **options)
        if variant.name == "async":

            @exclusive  # type: ignore[untyped-decorator]  # typed by its options, which are any here
            async def job(*, waits: bool = False) -> str:
                nonlocal running
                running += 1
                assert running == 1
                await (in_thread(go_on.wait, 60) if waits else asyncio.sleep(0.01))
                running -= 1
                return "done"

            return job

        @exclusive  # type: ignore[untyped-decorator]  # as above
        def blocking_job(*, waits: bool = False) -> str:
            nonlocal running
            running += 1
            assert running == 1
            go_on.wait(60) if waits else time.sleep(0.01)
            running -= 1
            return "done"

        return functools.partial(in_thread, blocking_job)

    wait, skip, fail = decorated(), decorated(on_busy="skip"), decorated(on_busy="raise")
    assert await asyncio.gather(*(wait() for _ in range(3))) == ["done"] * 3
    slow = asyncio.ensure_future(wait(waits=True))
    await until(lambda: running == 1, "it runs")
    assert await skip() is None
    with pytest.raises(pgkv.LockTimeoutError):
        await fail()
    with pytest.raises(pgkv.LockTimeoutError):
        await decorated(timeout=0.05)()
    go_on.set()
    assert await slow == "done"


async def test_locked_by_a_name_of_the_arguments(store: Any, variant: Variant) -> None:
    """With name= the lock is that of the call's arguments: a busy one does not keep another out."""
    inner = inside(store)

    def name(account: str, *, amount: int) -> str:
        return f"account:{account}"

    decorate = pgkv.locked(name=name, store=inner, on_busy="raise")
    call: Any
    if variant.name == "async":

        @decorate
        async def pay(account: str, *, amount: int) -> int:
            return amount

        call = pay
    else:

        @decorate
        def blocking_pay(account: str, *, amount: int) -> int:
            return amount

        def call(*args: Any, **kwargs: Any) -> Any:
            return in_thread(blocking_pay, *args, **kwargs)

    async with variant.make("Lock", store, "account:ada").acquire():
        with pytest.raises(pgkv.LockTimeoutError):
            await call("ada", amount=1)
        assert await call("bob", amount=2) == 2
    assert await call("ada", amount=3) == 3


def test_locked_takes_one_name() -> None:
    """A lock or its name, or a function that tells the name: not both, and not neither."""
    for given in ({"name": "x"}, {"lock_or_name": "x", "name": str}, {"lock_or_name": None}, {}):
        with pytest.raises(TypeError, match=r"locked\(\)"):
            pgkv.locked(**given)


async def test_locked_refuses_what_cannot_work(store: Any, variant: Variant) -> None:
    """A generator, an unknown on_busy, a lock of the other variant, a name without a store."""
    inner = inside(store)

    async def coroutine() -> None: ...

    def plain() -> None: ...

    def generator() -> Any:
        yield

    with pytest.raises(TypeError, match="generator"):
        pgkv.locked("x", store=inner)(generator)
    with pytest.raises(pgkv.ConfigError, match="on_busy"):
        pgkv.locked("x", store=inner, on_busy="cry")  # type: ignore[call-overload]  # that is the test
    lock = (pgkv.AsyncLock if variant.name == "async" else pgkv.Lock)(inner, "x")
    with pytest.raises(pgkv.ConfigError, match="needs a"):
        pgkv.locked(lock)(plain if variant.name == "async" else coroutine)


def wrapped(fn: Any) -> Any:
    """As a decorator that is not async does it."""

    @functools.wraps(fn)
    def wrapper(*args: Any) -> Any:
        return fn(*args)

    return wrapper


class Job:
    """Something with functions of every kind, each of which tells who holds the lock."""

    def __init__(self, lock: Any) -> None:
        self.lock = lock

    async def __call__(self) -> Any:
        return await self.lock.holder()


async def test_locked_holds_while_an_awaitable_runs(store: Any, variant: Variant) -> None:
    """Wrappers that are not async, partials, objects with an async call, static and class methods:
    the lock is held while the body runs."""
    if variant.name == "sync":
        pytest.skip("plain functions are tested below")
    lock = pgkv.AsyncLock(store, "n")

    async def body(*_: Any) -> Any:
        return await lock.holder()

    class Methods:
        @pgkv.locked(lock)
        @staticmethod
        async def outer_static() -> Any:
            return await body()

        @staticmethod
        @pgkv.locked(lock)
        async def inner_static() -> Any:
            return await body()

        @pgkv.locked(lock)
        @classmethod
        async def outer_class(cls) -> Any:
            return cls, await body()

        @pgkv.locked(lock)
        async def method(self) -> Any:
            return self, await body()

    under = pgkv.locked(lock)
    for function in (
        under(body), under(wrapped(body)), under(functools.partial(body, 1)), under(Job(lock)),
        Methods.outer_static, Methods().outer_static, Methods.inner_static,
    ):  # fmt: skip
        assert await function() is not None
        assert await lock.holder() is None
    owner, info = await Methods().outer_class()
    assert owner is Methods
    assert info is not None
    methods = Methods()
    own, info = await methods.method()
    assert own is methods
    assert info is not None


async def test_plain_functions_under_a_lock_return_no_awaitable(
    store: Any, variant: Variant
) -> None:
    """What would run after the release is refused, and the lock is free again; static and class
    methods are functions."""
    if variant.name == "async":
        pytest.skip("see above")
    lock = pgkv.Lock(store._target, "n")

    async def body(*_: Any) -> None: ...

    class Methods:
        @pgkv.locked(lock)
        @staticmethod
        def static() -> Any:
            return lock.holder()

        @pgkv.locked(lock)
        @classmethod
        def of_class(cls) -> Any:
            return cls, lock.holder()

    under = pgkv.locked(lock)
    for function in (under(lambda: body(1)), under(wrapped(body))):
        with pytest.raises(TypeError, match=r"returned an awaitable.*async def"):
            await in_thread(function)
        assert await in_thread(lock.holder) is None
    with pytest.raises(TypeError, match="generator"):
        await in_thread(under(lambda: (n for n in range(3))))
    assert await in_thread(Methods.static) is not None
    owner, info = await in_thread(Methods().of_class)
    assert owner is Methods
    assert info is not None


async def test_a_second_acquire_of_the_process_says_so(store: Any, variant: Variant) -> None:
    """Its timeout names the cause: a lock is not reentrant."""
    lock = variant.make("Lock", store, "n")
    async with lock.acquire():
        with pytest.raises(pgkv.LockTimeoutError, match="this process holds it already"):
            await lock.acquire(timeout=0.05)
    row = b'{"owner":"elsewhere:1","nonce":"x","metadata":null}'
    await store._execute(_grant_by(store, row))
    with pytest.raises(pgkv.LockTimeoutError, match=r"holder\(\)"):
        await lock.acquire(timeout=0)


def _grant_by(store: Any, row: bytes) -> Any:
    inner = inside(store)
    sql = statements_of(inner, LockStatements, durable=True)
    return sql.grant(b"n", Asking("elsewhere:1", row, b"\x1fx"), 30.0, 1.0)


async def test_a_fenced_table_refuses_older_tokens(peer: Peer) -> None:
    """The trigger of fence_sql lets equal and higher tokens write, and no lower one."""
    peer.run('CREATE TABLE "odd orders" (id int, note text, "the fence" bigint NOT NULL DEFAULT 0)')
    peer.run('INSERT INTO "odd orders" (id) VALUES (1)')
    for _ in range(2):
        peer.run(pgkv.fence_sql("odd orders", "the fence"))
    update = 'UPDATE "odd orders" SET note = %s, "the fence" = %s'
    peer.run(update, "a", 5)
    peer.run(update, "b", 5)
    peer.run(update, "c", 9)
    for token in (8, None):
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="fenced"):
            peer.run(update, "late", token)
    assert peer.run('SELECT note, "the fence" FROM "odd orders"') == [("c", 9)]


def test_fence_sql_names_are_checked() -> None:
    """What is no name is refused."""
    for table, column in (("", "f"), ("a.b.c", "f"), ("t", ""), ("t", "$pgkv$")):
        with pytest.raises(pgkv.InvalidValueError):
            pgkv.fence_sql(table, column)
