"""Places in a limiter's queue: what is left of them after a cancellation, a fork, a late answer."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import pytest

import pgkv
from pgkv.patterns.rate_limit import local as _local
from tests.faults.support import exit_code
from tests.peers import Peer
from tests.variants import Variant

Make = Callable[..., Any]
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
# From 3.12 Python warns of fork() in a process with threads: that is the subject here.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture
def make(variant: Variant, store: Any) -> Make:
    """`make("10/s")` is a limiter on the test's store. It waits longer than the default for a busy
    machine."""

    def limiter(rates: Any, **options: Any) -> Any:
        options = {"name": "api", "timeout": 20, **options}
        return variant.make("RateLimiter", options.pop("store", store), rates, **options)

    return limiter


@pytest.fixture
def awaiting(dsn: str, event_loop_runner: asyncio.Runner) -> Iterator[pgkv.AsyncRateLimiter]:
    """An `AsyncRateLimiter` of one token a minute: only a task can be cancelled."""
    store = pgkv.AsyncStore(pgkv.Config(dsn))
    yield pgkv.AsyncRateLimiter(store, "1/m burst 1", name="api", timeout=20)
    event_loop_runner.run(store.close())


@pytest.fixture
def blocking(dsn: str) -> Iterator[pgkv.RateLimiter]:
    """A `RateLimiter` of one token a minute, which is taken."""
    with pgkv.Store.connect(dsn) as store:
        limiter = pgkv.RateLimiter(store, "1/m burst 1", name="api", timeout=20)
        assert limiter.hit("u")
        yield limiter


# -- cancelled --------------------------------------------------------------------------------


@contextlib.contextmanager
def after_a_hit(cancel: Callable[[], object]) -> Iterator[None]:
    """Cancel soon after the next hit was answered."""
    loop = asyncio.get_running_loop()
    remove = pgkv.on_operation(
        lambda name, *_: name == "limit_hit" and loop.call_later(0.2, cancel)
    )
    try:
        yield
    finally:
        remove()


async def test_a_wait_in_a_cancelled_scope_gives_its_place_back(
    awaiting: pgkv.AsyncRateLimiter,
) -> None:
    """anyio cancels every await of a cancelled scope again, also those of a clean-up."""
    await awaiting.hit("u")
    with anyio.CancelScope() as scope, after_a_hit(scope.cancel):
        await awaiting.acquire("u")
    assert scope.cancelled_caught
    assert (await awaiting.reserve("u")).delay <= 60


async def test_a_reservation_is_cancelled_in_a_cancelled_scope(
    awaiting: pgkv.AsyncRateLimiter,
) -> None:
    """cancel() in the `finally` of a cancelled scope gives the place back."""
    await awaiting.hit("u")
    with anyio.CancelScope() as scope, after_a_hit(scope.cancel):
        place = await awaiting.reserve("u")
        try:
            await anyio.sleep(place.delay)
        finally:
            await place.cancel()
    assert (await awaiting.reserve("u")).delay <= 60


@pytest.mark.parametrize("scopes", [False, True])
@pytest.mark.parametrize("method", ["acquire", "reserve"])
async def test_cancelled_as_the_answer_arrives(
    awaiting: pgkv.AsyncRateLimiter, method: str, scopes: bool
) -> None:
    """The charge was made, and the caller never hears of it: the place is given back."""
    await awaiting.hit("u")
    scope = anyio.CancelScope()

    async def wait() -> None:
        with scope:
            await getattr(awaiting, method)("u")

    def cancel(name: str, *_: object) -> None:
        if name == "limit_hit":
            remove()
            scope.cancel() if scopes else waiting.cancel()

    remove = pgkv.on_operation(cancel)
    waiting = asyncio.ensure_future(wait())
    await asyncio.wait([waiting])
    assert waiting.cancelled() is not scopes
    assert (await awaiting.reserve("u")).delay <= 60


async def test_a_cancelled_wait_behind_a_locked_row_ends(
    awaiting: pgkv.AsyncRateLimiter, peer: Peer, witness: Peer
) -> None:
    """The statement that is under way is waited for a second, not for the limiter's timeout."""
    await awaiting.hit("u")
    with peer.conn.transaction():
        peer.run("SELECT 1 FROM kv_store FOR UPDATE")
        waiting = asyncio.ensure_future(awaiting.acquire("u"))
        await witness.until_waiting()
        waiting.cancel()
        started = time.monotonic()
        await asyncio.wait([waiting])
        assert time.monotonic() - started < 10  # the limiter's timeout is 20
    assert waiting.cancelled()


async def test_every_call_makes_a_task(awaiting: pgkv.AsyncRateLimiter) -> None:
    """create_task, TaskGroup and run_coroutine_threadsafe take what the methods return."""
    limiter = pgkv.AsyncRateLimiter(awaiting._store, "9/h", name="tasks", timeout=20)
    async with asyncio.TaskGroup() as group:
        place = group.create_task(limiter.reserve("u"))
        group.create_task(limiter.acquire("u"))
        group.create_task(limiter.hit_many([(limiter, "u", 1)]))
    assert await asyncio.create_task(place.result().cancel()) in (True, False)
    loop = asyncio.get_running_loop()
    done: list[Any] = []
    thread = threading.Thread(
        target=lambda: done.append(
            asyncio.run_coroutine_threadsafe(limiter.hit("u"), loop).result(20)
        )
    )
    thread.start()
    while not done:
        await asyncio.sleep(0.01)
    thread.join()
    assert done[0].allowed


def test_an_interrupted_wait_gives_its_place_back(blocking: pgkv.RateLimiter) -> None:
    """A signal handler that raises ends the sleep, and the place goes to the next."""
    with pytest.raises(KeyboardInterrupt), alarm_in_a_sleep(signal.default_int_handler):
        blocking.acquire("u")
    assert blocking.reserve("u").delay <= 60


@contextlib.contextmanager
def alarm_in_a_sleep(handler: Callable[..., object]) -> Iterator[None]:
    """Have a signal handled in this thread soon after the next hit was answered."""

    def wind(name: str, *_: object) -> None:
        if name == "limit_hit":
            signal.setitimer(signal.ITIMER_REAL, 0.2)

    previous, remove = signal.signal(signal.SIGALRM, handler), pgkv.on_operation(wind)
    try:
        yield
    finally:
        remove()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


# -- forked -----------------------------------------------------------------------------------


@forks
def test_a_forked_child_cancels_no_reservation(blocking: pgkv.RateLimiter) -> None:
    """cancel() in a child gives nothing back: the place is the parent's, who still acts on it."""
    place = blocking.reserve("u")
    pid = os.fork()
    if pid == 0:
        os._exit(int(place.cancel()))
    assert exit_code(pid) == 0
    assert blocking.reserve("u").delay > 60
    assert place.cancel() is False  # another place follows it


@forks
def test_a_child_forked_by_a_signal_handler_gives_no_place_back(
    blocking: pgkv.RateLimiter,
) -> None:
    """A handler forks while acquire() sleeps, and the child leaves by an exception: the parent
    keeps its place."""
    children: list[int] = []

    def fork(*_: object) -> None:
        pid = os.fork()
        if pid == 0:
            raise SystemExit(0)
        children.append(pid)
        raise InterruptedError  # ends the parent's wait as well, so that the test goes on

    parent = os.getpid()
    place = blocking.reserve("u")
    try:
        with alarm_in_a_sleep(fork):
            blocking.acquire("u")
    except SystemExit:
        os._exit(0 if os.getpid() != parent else 1)
    except InterruptedError:
        pass
    assert exit_code(children[0]) == 0
    # Only the parent gave its own place back; a second time would have taken the first one's.
    assert blocking.reserve("u").delay > 60
    assert place.delay <= 60


@forks
def test_a_forked_child_counts_from_zero(blocking: pgkv.RateLimiter) -> None:
    """`counts` are those of this process."""
    assert blocking.counts.allowed == 1
    pid = os.fork()
    if pid == 0:
        os._exit(blocking.counts.allowed)
    assert exit_code(pid) == 0
    assert blocking.counts.allowed == 1


# -- how long -----------------------------------------------------------------------------------


async def test_a_late_answer_does_not_prolong_the_wait(
    make: Make, peer: Peer, witness: Peer
) -> None:
    """The statement waited for another transaction until the turn was out of reach: refused, and
    the place is given back."""
    limiter = make("1/100s burst 1")
    begun = time.monotonic()
    await limiter.hit("u")
    with peer.conn.transaction():
        peer.run("UPDATE kv_store SET updated_at = updated_at")
        waiting = asyncio.ensure_future(limiter.acquire("u", timeout=105))
        await witness.until_waiting()
        asked = time.monotonic()
        peer.run(
            "UPDATE kv_store SET value = ((encode(value, 'escape')::bigint + 4000000000)"
            "::text)::bytea"
        )
        # Its turn is 104 s after the hit: with the wait for this transaction more than 105 s after it asked.
        await asyncio.sleep(1.1 + asked - begun)
    with pytest.raises(pgkv.RateLimitedError) as caught:
        await waiting
    assert 0 < caught.value.decision.retry_after <= 105
    assert not caught.value.decision.allowed
    assert (await limiter.reserve("u")).delay < 105


# -- stores -------------------------------------------------------------------------------------


async def test_a_limiter_on_a_coalescing_store(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With coalesce=True a limiter is what it is on any store: on_error, local_deny and prefetch
    hold, and it is not taken for one inside a transaction."""
    monkeypatch.setattr(_local, "DENY_SECONDS_MAX", 600.0)
    async with pgkv.AsyncStore.connect(dsn, coalesce=True) as store:
        limiter = pgkv.AsyncRateLimiter(
            store, "4/h", name="api", on_error="closed", timeout=20, local_deny=True
        )
        decisions = await asyncio.gather(*(limiter.hit("u") for _ in range(8)))
        assert sum(map(bool, decisions)) == 4
        assert await limiter.hit_many([(limiter, "v", 1)])
        place = await limiter.reserve("v")
        assert await place.cancel()
        denied = await limiter.hit("u")
        before = []
        remove = pgkv.on_operation(lambda name, *_: before.append(name))
        assert not await limiter.hit("u")
        remove()
        assert before == []
        assert not denied
        prepaid = pgkv.AsyncRateLimiter(store, "9/h", name="p", prefetch=5, timeout=20)
        assert [(await prepaid.hit("u")).remaining for _ in range(3)] == [8, 7, 6]
        assert (await prepaid.peek("u")).remaining == 4
    assert (await limiter.hit("w")).degraded  # the store is closed


def test_a_store_of_another_loop_is_a_mistake_of_the_program(dsn: str) -> None:
    """It is raised, whatever on_error says: nothing would be limited, for ever."""
    store = pgkv.AsyncStore(pgkv.Config(dsn))
    limiter = pgkv.AsyncRateLimiter(store, "9/h", name="api", on_error="open", timeout=20)

    async def first() -> None:
        assert await limiter.hit("u")

    with asyncio.Runner() as runner:
        runner.run(first())
        for mode in ("open", "closed"):
            other = pgkv.AsyncRateLimiter(store, "9/h", name="b", on_error=mode, timeout=20)
            for call in (other.hit, other.acquire, other.reserve, other.peek):
                with pytest.raises(pgkv.ConfigError, match="event loop"):
                    asyncio.run(call("u"))
        runner.run(store.close())


async def test_a_table_of_another_shape_is_a_mistake_of_the_program(make: Make, peer: Peer) -> None:
    """Statements that can never succeed are raised with on_error="open", not admitted."""
    limiter = make("9/h", on_error="open")
    await limiter.hit("u")
    peer.run("ALTER TABLE kv_store RENAME COLUMN version TO renamed")
    for call in (limiter.hit, limiter.acquire, limiter.peek):
        with pytest.raises(pgkv.QueryError, match="version"):
            await call("u")
