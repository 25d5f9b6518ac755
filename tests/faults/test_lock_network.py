"""Locks behind a network that loses, delays and cuts, and callers that are cancelled anywhere."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from functools import partial
from itertools import count
from typing import Any, TypeVar

import psycopg
import pytest

import pgkv
from pgkv._background.renewal import clock
from pgkv._ops.op import Flow
from pgkv.patterns._runtime import lease as _lease
from pgkv.patterns.lock import flows
from pgkv.testing import ServerClock
from tests.faults.proxy import Proxy
from tests.faults.support import newest, renewed
from tests.peers import until
from tests.servers import LATE
from tests.variants import Variant

pytestmark = newest

T = TypeVar("T")


@pytest.fixture
def proxy(dsn: str) -> Iterator[Proxy]:
    with Proxy(dsn) as made:
        yield made


@pytest.fixture
def make_store(proxy: Proxy, make_store: Any) -> Any:
    """As everywhere, but closed before the proxy is: it may still be connecting through that."""
    return make_store


async def test_a_grant_whose_reply_is_lost_is_the_same_grant(
    make_store: Any, variant: Variant, proxy: Proxy, store: Any
) -> None:
    """The reply after COMMIT is dropped: the repeat returns the first grant, extended, at once."""
    through = await make_store(dsn=proxy.dsn)
    lock = variant.make("Lock", through, "lost-reply", ttl=30)
    async with lock.acquire():
        pass
    fault = proxy.arm(b"lost-reply")
    async with lock.acquire(timeout=60) as lease:
        assert fault.met == 1
        info = await variant.make("Lock", store, "lost-reply").holder()
        assert info.token == lease.token
        assert (info.expires_at - info.acquired_at).total_seconds() > 30, "granted, then extended"


async def test_a_release_whose_reply_is_lost_is_no_loss(
    make_store: Any, variant: Variant, proxy: Proxy
) -> None:
    """The release happened, its answer was lost, its repeat found nothing: that is True, and the
    block ends in peace."""
    through = await make_store(dsn=proxy.dsn)
    lock = variant.make("Lock", through, "n", ttl=30)
    async with lock.acquire():
        pass
    async with lock.acquire() as lease:
        fault = proxy.arm(lease.token.to_bytes(8, "big"))
    assert fault.met == 1
    assert await lock.holder() is None


@pytest.mark.parametrize("fault", ["silence", "refusal"])
async def test_loss_is_signalled_before_the_servers_expiry(
    make_store: Any,
    variant: Variant,
    proxy: Proxy,
    store: Any,
    clock: ServerClock,
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Renewals hang, or cannot connect: the holder is told while nobody else can be granted the
    name yet."""
    # A margin in which a loaded machine can look.
    for name, value in (("MARGIN_MIN", 58.0), ("MARGIN_MAX_SHARE", 1.0), ("RENEW_SHARE", 0.01)):
        monkeypatch.setattr(_lease, name, value)
    through = await make_store(dsn=proxy.dsn)
    lost: list[float] = []
    lock = variant.make("Lock", through, "n", ttl=60, on_lost=lambda: lost.append(time.monotonic()))
    lease = await lock.acquire()
    outside = variant.make("Lock", store, "n", ttl=600)
    if fault == "silence":
        proxy.hold()
    else:
        proxy.refuse()

    def told() -> bool:
        if fault == "refusal":
            proxy.reset_all()  # also what was being connected when it began to refuse
        return bool(lost)

    await until(told, "on_lost is called", seconds=30)  # half of its ttl
    assert lease.is_lost
    assert await outside.try_acquire() is None, "the margin is not over"
    assert await outside.holder() is not None
    if fault == "silence":
        proxy.release()
        proxy.reset_all()
    clock.advance(61)
    second = await outside.acquire(timeout=20)
    assert second.token > lease.token
    await second.release()


async def test_an_async_body_is_cancelled_though_the_network_is_silent(
    make_store: Any, variant: Variant, proxy: Proxy
) -> None:
    """No answer, no error: trust ends all the same, and the body with it."""
    if variant.name == "sync":
        pytest.skip("a thread cannot be cancelled")
    through = await make_store(dsn=proxy.dsn, retry=None)
    started = time.monotonic()
    with pytest.raises(pgkv.LeaseLostError):  # the block itself is tested
        async with variant.make("Lock", through, "n", ttl=3).acquire():
            proxy.hold()
            await asyncio.sleep(60)
    assert time.monotonic() - started < 2 + LATE
    proxy.release()
    proxy.reset_all()


@pytest.mark.usefixtures("renewed_often")
async def test_renewals_survive_resets(make_store: Any, variant: Variant, proxy: Proxy) -> None:
    """Connections are reset again and again: no lease is lost while the trust lasts."""
    through = await make_store(dsn=proxy.dsn)
    lease = await variant.make("Lock", through, "n").acquire()
    for _ in range(4):
        proxy.reset_all()
        await until(renewed(lease), "it is renewed")
        lease.check()
    assert await lease.release()


@pytest.mark.usefixtures("renewed_often")
async def test_late_renewals_are_in_time(make_store: Any, variant: Variant, proxy: Proxy) -> None:
    """Every answer takes 100 ms: trust is counted from the sending, and the lease lives."""
    through = await make_store(dsn=proxy.dsn)
    lease = await variant.make("Lock", through, "n").acquire()
    proxy.shape(delay=0.1)
    for _ in range(2):
        await until(renewed(lease), "it is renewed")
    assert lease._until < clock() + 30 - 3 - 0.1
    lease.check()
    proxy.shape()
    assert await lease.release()


# -- cancelled or failing at every await

# Turns of the loop, until a call is whole however slowly the server answers.
AND_ON = [3000 << n for n in range(10)]


async def test_cancelled_at_every_await(store: Any, variant: Variant) -> None:
    """acquire() and release() cancelled after k turns of the loop: the name is free again within
    its ttl, and the lease that was granted can still be released."""
    if variant.name == "sync":
        pytest.skip("see the next test")
    for fair in (False, True):
        lock = pgkv.AsyncLock(store, f"cancel {fair}", ttl=1, fair=fair)
        async with lock.acquire():
            pass
        whole = 0
        for k in (*range(200), *AND_ON):
            task = asyncio.ensure_future(_await(lock.acquire(timeout=60)))
            for _ in range(k):
                await asyncio.sleep(0)
            whole += task.done()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                lease = await task
                releasing = asyncio.ensure_future(lease.release())
                for _ in range(k % 20):
                    await asyncio.sleep(0)
                releasing.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await releasing
                await lease.release()
            again = await lock.acquire(timeout=60)
            await again.release()
            if whole >= 3:
                break
        assert whole >= 1, "no acquire was fast enough to be whole"


async def test_extend_and_guard_cancelled_at_every_await(
    store: Any, variant: Variant, dsn: str
) -> None:
    """extend() and guard() cancelled after k turns of the loop: the lease is held on and can be
    released, its token is the same, and the caller's connection answers its own questions."""
    if variant.name == "sync":
        pytest.skip("a thread cannot be cancelled; a failing flow is swept in the next test")
    lock = pgkv.AsyncLock(store, "cancel extend", ttl=30)
    finished = 0
    for k in (*range(60), *range(60, 3000, 60), *AND_ON):  # until both are whole
        lease = await lock.acquire(timeout=20)
        async with await psycopg.AsyncConnection.connect(dsn) as conn:
            calls: list[Any] = [partial(lease.extend, ttl=60), partial(lease.guard, conn)]
            for call in calls:
                task = asyncio.ensure_future(call())
                for _ in range(k):
                    await asyncio.sleep(0)
                finished += task.done()
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            if not conn.closed:  # a statement under way is cancelled, and its connection closed
                await conn.rollback()
                answer = await (await conn.execute("SELECT %s::int", [k])).fetchone()
                assert answer == (k,)
        info = await lock.holder()
        assert info is not None
        assert info.token == lease.token
        assert not lease.is_lost
        assert await lease.release()
        if finished >= 4:
            break
    assert finished >= 4, "neither call was ever fast enough to be whole"


async def _await(awaitable: Any) -> Any:
    return await awaitable


@pytest.mark.usefixtures("patience")
def test_failing_at_every_step(dsn: str) -> None:
    """The flow of acquire() fails at its k-th step, before or after the step took place: the name
    is free at once, and no ticket is left."""
    with pgkv.Store.connect(dsn) as store:
        for fair in (False, True):
            lock = pgkv.Lock(store, f"fail {fair}", ttl=30, fair=fair)
            with lock.acquire():
                blocked = pgkv.Lock(store, f"fail {fair}", ttl=30, fair=fair)
                for k in range(6):
                    for after in (False, True):
                        with pytest.raises(KeyboardInterrupt):
                            store._run(
                                _failing(
                                    flows.acquire(blocked._runtime, blocked._options, 60.0),
                                    k,
                                    after,
                                )
                            )
            for after in (False, True):
                with pytest.raises(KeyboardInterrupt):
                    store._run(
                        _failing(flows.acquire(lock._runtime, lock._options, 60.0), 0, after)
                    )
                with lock.acquire(timeout=0):
                    pass
    with psycopg.connect(dsn) as conn:
        row = conn.execute("SELECT count(*) FROM kv_store_tickets").fetchone()
        assert row == (0,)


def _failing(flow: Flow[T], k: int, after: bool) -> Flow[T]:
    """The flow, interrupted before or after its k-th step takes place."""
    outcome: Any = None
    failure: BaseException | None = None
    for steps in count():
        try:
            step = flow.send(outcome) if failure is None else flow.throw(failure)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]  # what the generator returns
        outcome = failure = None
        try:
            if steps == k and not after:
                raise KeyboardInterrupt
            outcome = yield step
            if steps == k:
                raise KeyboardInterrupt
        except BaseException as error:  # raised inside the flow
            failure = error
    raise AssertionError("unreachable")
