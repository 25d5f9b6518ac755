"""Every order in which threads (by bytecode) and tasks (by await) can share a pool of connections."""

from __future__ import annotations

import gc
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from queue import Empty
from typing import Any

import pytest

import pgkv
from pgkv._engine._async import pool as async_pool
from pgkv._engine._sync import pool as pool_module
from pgkv._engine._sync.connection import PgConnection
from pgkv._engine.pooling import LOOK_AGAIN, PATIENCE
from tests.interleavings import threads
from tests.interleavings.pairs import FULL
from tests.interleavings.schedule import Cancelled, Scenario, World, explore
from tests.interleavings.threads import AT_ONCE, Decision, Interrupt, Schedule

FILES = frozenset((pool_module.__file__,))
POOL_TIMEOUT = 50.0  # of the scheduler's seconds

Made = tuple[Schedule, Callable[[], None]]


class FakePool:
    """psycopg_pool, as far as it is asked here; it always has a connection.

    Attributes:
        out: the connections in use. One that is dropped is closed: it does not count.
    """

    closed = False

    def __init__(self) -> None:
        self.out: weakref.WeakSet[FakeConnection] = weakref.WeakSet()

    def getconn(self, timeout: float) -> FakeConnection:
        made = FakeConnection()
        self.out.add(made)
        return made

    def putconn(self, conn: FakeConnection) -> None:
        self.out.discard(conn)


class FakeConnection:
    """A psycopg connection."""

    _pool = None

    def close(self) -> None:
        """It has gone."""


class FakeLink:
    """A connection of a pool. A stale one has been closed by the server."""

    def __init__(self, conn: FakeConnection, **_: Any) -> None:
        self.conn = conn
        self.retire_at = 1e9
        self.stale = False
        self.users = 0

    def is_stale(self) -> bool:
        return self.stale

    def is_usable(self) -> bool:
        return not self.stale


class FakePgConnection(FakeLink):
    """One of threads, with a place in the pool."""

    place: Any = None
    keep_place = PgConnection.keep_place
    release = PgConnection.release
    __del__ = PgConnection.__del__
    _lost: Any = None


class Queue:
    """`queue.SimpleQueue`, as the scheduler sees it."""

    def __init__(self) -> None:
        self.items: deque[Any] = deque()
        self.full = threads.Lock()
        self.full.acquire()

    def put(self, item: Any) -> None:
        self.items.append(item)
        self.full.release()

    def get(self, timeout: float) -> Any:
        if not self.full.acquire(timeout=timeout):
            raise Empty
        return self.items.popleft()

    def get_nowait(self) -> Any:
        if not self.full.acquire(blocking=False):
            raise Empty
        return self.items.popleft()


def now() -> float:
    return Schedule.current.now if Schedule.current is not None else 0.0


@pytest.fixture(autouse=True)
def _scheduled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The pool's locks and clock are the scheduler's, its connections are none."""

    class Threading:
        RLock = threads.Lock  # which would notice a thread that takes it twice

    class Time:
        @staticmethod
        def sleep(seconds: float) -> None:
            assert Schedule.current is not None
            Schedule.current.sleep(seconds)

    monkeypatch.setattr(pool_module, "threading", Threading)
    monkeypatch.setattr(pool_module, "time", Time)
    monkeypatch.setattr(pool_module, "monotonic", now)
    monkeypatch.setattr(pool_module, "PgConnection", FakePgConnection)
    monkeypatch.setattr(pool_module, "SimpleQueue", Queue)
    gc.collect()
    gc.freeze()  # each schedule collects what it made, and nothing else
    yield
    gc.unfreeze()


def users(
    size: int, number: int, turns: int = 1, *, breaks: bool = False, holds: float = 0.0
) -> Callable[[tuple[Decision, ...]], Made]:
    """Threads that check a connection out and in, `turns` times each.

    Args:
        size: of the pool.
        number: of threads.
        turns: of each.
        breaks: the first connection that each thread uses does not survive it.
        holds: the seconds for which the first thread uses one; the second gives up at that moment.
    """

    def make(decisions: tuple[Decision, ...]) -> Made:
        config = pgkv.Config("postgresql://nowhere", pool_max_size=size, pool_timeout=POOL_TIMEOUT)
        pool = pool_module.StorePool(config, lambda: "")
        fake = FakePool()
        pool._psycopg_pool = lambda **_: (fake, False)  # type: ignore[method-assign,assignment]  # a fake
        pool._pool = fake  # type: ignore[assignment]  # a fake
        twice: list[str] = []

        def use(name: str, *, last: bool) -> None:
            patience = holds - AT_ONCE / 2 if holds and name == "T1" else 2 * POOL_TIMEOUT
            link: Any = pool.check_out(now() + patience, "test")
            try:
                if holds and name == "T0":
                    run.sleep(holds)
                link.users += 1
                if link.users > 1:
                    twice.append("one connection was given to two threads")
                link.stale = breaks and not last
                link.users -= 1
            finally:
                pool.check_in(link)

        def user(name: str) -> None:
            for turn in range(turns):
                use(name, last=turn == turns - 1)

        names = [f"T{n}" for n in range(number)]
        run = Schedule({name: partial(user, name) for name in names}, FILES, decisions)

        def check() -> None:
            assert not twice, twice
            expected = any(decision.interrupts for decision in decisions)
            for name, thread in run.threads.items():
                gave_up = (
                    holds and name == "T1" and isinstance(thread.result, pgkv.OperationTimeoutError)
                )
                interrupted = expected and type(thread.result) is Interrupt
                if not (thread.result is None or gave_up or interrupted):
                    raise AssertionError(f"{name}: {thread.result!r}") from thread.result
            if expected:
                gc.collect()
            # A waiter looks again now and then; but only an interrupt makes it need to.
            waited = run.now - 1000.0 - holds
            assert waited < POOL_TIMEOUT, "a thread waited to the end of its time"
            assert expected or waited < AT_ONCE, "a thread was not woken"
            assert not len(pool.waiters), "a thread is left in the queue"
            # What was lost on the way is found again, at the latest when it is needed.
            again = [pool.check_out(POOL_TIMEOUT, "again") for _ in range(size)]
            assert len(set(map(id, again))) == size
            assert len(fake.out) <= size, "more connections are open than the pool may have"

        return run, check

    return make


@pytest.mark.parametrize(
    ("size", "number", "turns", "breaks", "preemptions"),
    [(1, 2, 1, False, 2), (1, 2, 2, True, 1), (1, 3, 1, False, 1), (2, 3, 1, False, 1)],
)
@pytest.mark.parametrize("patience", [0.002, -1.0], ids=["told", "given"])
def test_every_order(
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    number: int,
    turns: int,
    breaks: bool,
    preemptions: int,
    patience: float,
) -> None:
    """No connection is lost or given twice, and no thread is forgotten in the queue: whether who
    waits is told to look, or is given a connection."""
    monkeypatch.setattr(pool_module, "PATIENCE", patience)
    make = users(size, number, turns, breaks=breaks)
    if number == 2 and turns == 1:  # the smallest: three in the full set
        preemptions += FULL if patience > 0 else FULL - 1
    print(threads.explore(make, preemptions=preemptions, interrupts=0), "schedules")


@pytest.mark.parametrize("holds", [PATIENCE / 2, LOOK_AGAIN / 2])
def test_a_waiter_that_gives_up(holds: float) -> None:
    """What it was given as its time was over goes to the next one."""
    make = users(1, 3, holds=holds)
    print(threads.explore(make, preemptions=1 + FULL, interrupts=0), "schedules")


@pytest.mark.parametrize("breaks", [False, True])
def test_an_interrupt_at_any_bytecode(breaks: bool) -> None:
    """So does a Ctrl-C: the thread that it strikes ends, the others go on."""
    make = users(1, 2, 1 + breaks, breaks=breaks)
    preemptions = (1 if breaks else 2) * FULL
    print(threads.explore(make, preemptions=preemptions, interrupts=1), "schedules")


# -- tasks ---------------------------------------------------------------------------------


class FakeTaskLink(FakeLink):
    """A connection of an AsyncStore's pool."""

    def __init__(self, conn: FakeConnection, *_: Any, **__: Any) -> None:
        super().__init__(conn)

    def is_running(self) -> bool:
        return False

    def detach(self) -> None:
        """It has no reader."""

    def close(self) -> None:
        """It has gone."""

    def send_pending(self, *_: Any) -> bool:
        return False


class FakeTaskPool:
    """psycopg_pool for tasks."""

    _workers = ()
    _sched_runner = None

    async def putconn(self, conn: FakeConnection) -> None:
        """It is taken back."""


def shared_pool(world: World, size: int) -> Any:
    """The pool that all clients of a schedule use."""
    if "pool" not in world.memory:
        config = pgkv.Config("postgresql://nowhere", pool_max_size=size, pool_timeout=POOL_TIMEOUT)
        pool: Any = async_pool.AsyncStorePool(config, lambda: "")
        pool._pool = FakeTaskPool()

        async def connect(deadline: float, action: str) -> FakeConnection:
            await world.step("connects")
            return FakeConnection()

        pool._connect = connect
        world.memory["pool"] = pool
    return world.memory["pool"]


def task(size: int, *, breaks: bool) -> Callable[[World], Any]:
    """Check a connection out and in, twice; the first one does not survive, if `breaks`."""

    async def client(world: World) -> None:
        pool = shared_pool(world, size)
        for turn in range(2):
            link = await pool.check_out(world.now + 2 * POOL_TIMEOUT, "test")
            try:
                assert not link.users, "one connection was given to two tasks"
                link.users += 1
                await world.step("uses")
                link.stale = breaks and not turn
            finally:
                link.users -= 1
                pool.check_in(link)

    return client


def all_there(world: World, results: dict[str, Any]) -> None:
    pool = world.memory["pool"]
    assert all(result in (None, Cancelled) for result in results.values()), results
    assert all(each.turn.done() for each in pool.waiters), "a task is left in the queue"
    assert pool._size == len(pool.idle), f"{pool._size} are counted, {len(pool.idle)} are there"
    assert world.now < 1e6 + POOL_TIMEOUT, "a task waited to the end of its time"


@pytest.mark.parametrize(("size", "number"), [(1, 2), (1, 3), (2, 3)])
@pytest.mark.parametrize("breaks", [False, True])
def test_every_order_of_tasks(
    monkeypatch: pytest.MonkeyPatch, size: int, number: int, breaks: bool
) -> None:
    """The same holds for tasks, with one that is cancelled at any await."""
    monkeypatch.setattr(async_pool, "AsyncPgConnection", FakeTaskLink)
    scenario = Scenario(
        "pool of tasks",
        {f"T{n}": task(size, breaks=breaks) for n in range(number)},
        check=all_there,
        kinds=("cancel",),
        preemptions=2 if number == 2 else 1,
    )
    outcome = explore(scenario)
    print(outcome)
    assert outcome.failure is None, str(outcome.failure)
