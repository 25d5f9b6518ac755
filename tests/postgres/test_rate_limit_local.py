"""What a limiter does without asking the server (local_deny, prefetch), and when it cannot ask."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from typing import Any

import pytest

import pgkv
from pgkv.patterns.rate_limit import local as _local
from pgkv.testing import ServerClock
from tests.peers import Peer
from tests.servers import LATE
from tests.variants import Variant

Make = Callable[..., Any]


class LocalClock:
    """The process's monotonic clock, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def make(variant: Variant, store: Any) -> Make:
    """`make("10/s", local_deny=True)` is a limiter on the test's store, sync or async."""

    def limiter(rates: Any, **options: Any) -> Any:
        options = {"name": "api", "timeout": 20, **options}
        return variant.make("RateLimiter", options.pop("store", store), rates, **options)

    return limiter


@pytest.fixture
def sent(operations: Any) -> Callable[[], int]:
    """How many hits went to the server since the last call."""

    def count() -> int:
        hits = len([name for name, _, _ in operations if name == "limit_hit"])
        operations.clear()
        return hits

    return count


@pytest.fixture
def local_clock(monkeypatch: pytest.MonkeyPatch) -> LocalClock:
    """What limiters made afterwards take for the local time."""
    clock = LocalClock()
    monkeypatch.setattr("pgkv.patterns.rate_limit.flows.monotonic", clock)
    for remembered in (_local.DenyCache, _local.PrepaidTokens):
        monkeypatch.setattr(remembered.__init__, "__defaults__", (clock,))
    return clock


# -- local_deny ---------------------------------------------------------------------------------


async def test_a_denied_key_costs_no_query(make: Make, sent: Any, local_clock: LocalClock) -> None:
    """Denied once, a key is refused locally until its retry_after, a second at most; others, and
    cheaper hits, are asked about."""
    limiter = make("2/m; 90/h", local_deny=True)
    first = [await limiter.hit("u", cost=2) for _ in range(2)][1]
    assert not first
    assert sent() == 3  # the first that is refused is two
    local_clock.now += 0.5
    again = await limiter.hit("u", cost=2)
    assert not again
    assert again.retry_after == pytest.approx(first.retry_after - 0.5)
    assert sent() == 0
    await limiter.hit("u", cost=1)  # cheaper: it might pass
    await limiter.hit("u", cost=2, limits="9/m; 90/h")  # other rates
    await limiter.hit("v")
    assert sent() == 3
    local_clock.now += 1.0
    assert not await limiter.hit("u", cost=2)
    assert sent() == 1
    assert limiter.counts.denied == 4


async def test_a_new_plan_is_asked_about(make: Make, sent: Any, local_clock: LocalClock) -> None:
    """A denial under one plan says nothing about another, though they share the bucket."""
    limiter = make("2/m", local_deny=True)
    for _ in range(2):
        await limiter.hit("u", cost=2)
    sent()
    assert not await limiter.hit("u", cost=2)
    assert sent() == 0
    await limiter.hit("u", cost=2, limits="9/m")
    assert sent() > 0


async def test_no_longer_than_retry_after(make: Make, sent: Any, local_clock: LocalClock) -> None:
    """A local refusal never outlives the moment at which the server would admit."""
    limiter = make("2/s burst 1", local_deny=True)
    while denied := await limiter.hit("u"):  # two of which one comes late
        pass
    assert 0 < denied.retry_after <= 0.5
    sent()
    local_clock.now += denied.retry_after - 0.001
    assert not await limiter.hit("u")
    assert sent() == 0
    local_clock.now += 0.002
    await limiter.hit("u")
    assert sent() > 0


async def test_what_forgets_a_denial(make: Make, sent: Any, local_clock: LocalClock) -> None:
    """reset and refund here act at once; made elsewhere, within a second."""
    limiter, elsewhere = make("1/h", local_deny=True), make("1/h")

    async def deny() -> None:
        while await limiter.hit("u"):
            pass

    for undo in (limiter.reset, limiter.refund):
        await deny()
        await undo("u")
        assert await limiter.hit("u")
    await deny()
    await elsewhere.reset("u")
    assert not await limiter.hit("u")
    local_clock.now += 1.0
    assert await limiter.hit("u")


async def test_memory_is_bounded(
    make: Make, monkeypatch: pytest.MonkeyPatch, local_clock: LocalClock
) -> None:
    """An attack from many addresses fills no memory."""
    monkeypatch.setattr(_local, "ENTRIES_MAX", 10)
    limiter = make("1/h", local_deny=True)
    for n in range(30):
        await limiter.hit(f"u{n}")
        await limiter.hit(f"u{n}")
    assert len(limiter._flows.denied._entries) == 10
    prefetching = make("100/h", prefetch=5, name="prefetching")
    for n in range(30):
        await prefetching.hit(f"u{n}")
    assert len(prefetching._flows.prepaid._entries) == 10


# -- prefetch --------------------------------------------------------------------------------------


async def test_prefetching_spares_queries(make: Make, sent: Any) -> None:
    """One statement takes N tokens; the next N - 1 hits send nothing. The total is exact."""
    limiter = make("100/h", prefetch=10)
    allowed = [await limiter.hit("u") for _ in range(40)]
    assert all(allowed)
    assert sent() == 4
    assert [decision.remaining for decision in allowed] == list(range(99, 59, -1))
    assert sum([bool(await limiter.hit("u")) for _ in range(80)]) == 60


async def test_the_last_tokens_are_not_lost(make: Make) -> None:
    """Where not all tokens of a prefetch are there, tokens are taken one by one."""
    limiter = make("7/h", prefetch=5)
    assert sum([bool(await limiter.hit("u")) for _ in range(9)]) == 7
    assert sum([bool(await limiter.hit("v", cost=2)) for _ in range(9)]) == 3
    denied = await limiter.hit("u")
    assert 500 < denied.retry_after < 515  # for one token, not for the prefetch


async def test_prepaid_tokens_end_with_the_bucket(
    make: Make, clock: ServerClock, local_clock: LocalClock, sent: Any
) -> None:
    """When the bucket is full again prepaid tokens are worth nothing: no burst comes on top of it."""
    limiter = make("10/h", prefetch=5)
    await limiter.hit("u")
    sent()
    local_clock.now += 1801
    clock.advance(1801)
    assert sum([bool(await limiter.hit("u")) for _ in range(20)]) == 10


async def test_the_bounds_of_prefetching(make: Make, clock: ServerClock) -> None:
    """P processes with prefetch=N admit at most burst + rate x t + P(N - 1), and when they all keep
    asking at least burst + rate x t - P(N - 1); here P = 4, N = 5, over 20 bursts."""
    crew = [make("60/m burst 20", prefetch=5) for _ in range(4)]
    admitted, begun = 0, time.monotonic()
    for step in range(20):
        clock.set_offset(step * 20.0)
        admitted += sum([bool(await each.hit("u")) for _ in range(9) for each in crew])
    ideal = 20 + 19 * 20
    flowed = time.monotonic() - begun  # the real clock moves on meanwhile
    assert ideal - 4 * 4 <= admitted <= ideal + 4 * 4 + flowed


async def test_a_burst_of_callers_fetches_once(make: Make) -> None:
    """While one caller fetches, others hit one by one: never more than N - 1 lie unspent."""
    limiter = make("1000/d", prefetch=50)
    await asyncio.gather(*(limiter.hit("u") for _ in range(32)))
    left = (await limiter.peek("u")).remaining
    assert 1000 - 32 - 49 <= left <= 1000 - 32


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_spends_nothing_of_its_parents() -> None:
    """Tokens taken before fork() stay with the parent."""
    prepaid = _local.PrepaidTokens()
    policy: Any = object()
    decision = pgkv.Decision(True, 9, 5, 0.0, 100.0, pgkv.Rate(9))
    prepaid.fill(b"u", policy, 4, time.monotonic(), decision)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if prepaid.spend(b"u", policy, 1) is None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert prepaid.spend(b"u", policy, 1) is not None


# -- settings, outages, events ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"name": ""},
        {"name": 'a"b'},
        {"name": "a\nb"},
        {"on_error": "ignore"},
        {"timeout": 0},
        {"prefetch": 0},
        {"prefetch": 11},
        {"rates": "often"},
    ],
)
async def test_wrong_settings(make: Make, options: dict[str, Any]) -> None:
    """Refused when the limiter is made, with the reason."""
    with pytest.raises(ValueError, match=r"\w"):
        make(**{"rates": "10/s", **options})


def test_the_wrong_kind_of_store(dsn: str) -> None:
    """A limiter says which store it takes."""
    config = pgkv.Config(dsn)
    with pytest.raises(pgkv.ConfigError, match="AsyncRateLimiter"):
        pgkv.RateLimiter(pgkv.AsyncStore(config), "1/s", name="api")  # type: ignore[arg-type]  # that is the point
    with pytest.raises(pgkv.ConfigError, match="RateLimiter"):
        pgkv.AsyncRateLimiter(pgkv.Store(config), "1/s", name="api")  # type: ignore[arg-type]  # likewise


@pytest.fixture
def nowhere(variant: Variant) -> Any:
    """A store whose server does not exist."""
    config = pgkv.Config("host=127.0.0.1 port=1 dbname=none", retry=None)
    return (pgkv.AsyncStore if variant.name == "async" else pgkv.Store)(config)


async def test_outages(make: Make, nowhere: Any, variant: Variant, caplog: Any) -> None:
    """raise raises; open admits and closed refuses, both degraded, counted, and logged once."""
    with pytest.raises(pgkv.StoreUnavailableError):
        await make("9/s", store=nowhere).hit("u")
    with caplog.at_level(logging.WARNING, logger="pgkv"):
        for mode, allowed in (("open", True), ("closed", False)):
            limiter = make("9/s; 90/h", store=nowhere, on_error=mode)
            for decision in [await limiter.hit("u") for _ in range(5)]:
                assert (decision.allowed, decision.degraded) == (allowed, True)
            assert (await limiter.hit_many([(limiter, "u", 1)])).degraded
            assert limiter.counts.degraded == 6
            with pytest.raises(ValueError, match="burst"):
                await limiter.hit("u", cost=10)
            if allowed:
                assert await limiter.acquire("u")
                assert (await limiter.reserve("u")).delay == 0.0
                assert not await (await limiter.reserve("u")).cancel()
            else:
                assert (await limiter.peek("u")).headers() == {"Retry-After": "1"}
                with pytest.raises(pgkv.RateLimitedError, match="on_error"):
                    await limiter.acquire("u")
    messages = [each.getMessage() for each in caplog.records]
    assert len([text for text in messages if text.startswith("pgkv.limit.degraded")]) == 2
    await nowhere.close() if variant.name == "async" else nowhere.close()


async def test_the_strictest_decides_for_many(make: Make, nowhere: Any, variant: Variant) -> None:
    """Of limiters charged together, raise outdoes closed, and closed open."""
    modes = [make("9/s", store=nowhere, on_error=mode, name=mode) for mode in ("open", "closed")]
    assert not await modes[0].hit_many([(each, "u", 1) for each in modes])
    modes.append(make("9/s", store=nowhere, name="raise"))
    with pytest.raises(pgkv.StoreUnavailableError):
        await modes[0].hit_many([(each, "u", 1) for each in modes])
    await nowhere.close() if variant.name == "async" else nowhere.close()


async def test_a_locked_key_is_no_stall(make: Make, peer: Peer) -> None:
    """A charge held in another open transaction delays a hit by the timeout, not longer."""
    limiter = make("9/h", timeout=0.2, on_error="closed")
    await make("9/h").hit("u")  # has more time
    with peer.conn.transaction():
        peer.run("SELECT 1 FROM kv_store FOR UPDATE")
        started = time.monotonic()
        decision = await limiter.hit("u")
        assert decision.degraded
        assert not decision
        assert time.monotonic() - started < 0.2 + LATE


async def test_events(make: Make, caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Denials are debug events with the key; counts come as an event now and then, without it."""
    limiter = make("1/h")
    with caplog.at_level(logging.DEBUG, logger="pgkv"):
        await limiter.hit("somebody")
        monkeypatch.setattr(_local, "REPORT_SECONDS", 0.0)
        await limiter.hit("somebody")
    events = {each.getMessage().split()[0]: each for each in caplog.records}
    assert events["pgkv.limit.denied"].levelno == logging.DEBUG
    assert "key=somebody" in events["pgkv.limit.denied"].getMessage()
    counts = events["pgkv.limit.counts"]
    assert counts.pgkv == {"limiter": "api", "allowed": 1, "denied": 1, "degraded": 0}
    assert "somebody" not in counts.getMessage()


# -- the decorator ----------------------------------------------------------------------------------


async def test_decorator(store: Any, variant: Variant) -> None:
    """Each call is a hit; a refused one raises RateLimitedError and does not begin."""
    began = []
    if variant.name == "async":
        limiter = pgkv.AsyncRateLimiter(store, "5/h", name="api", timeout=20)

        @limiter.limit(key=lambda user, **_: user, cost=lambda user, size=1: size)
        async def work(user: str, size: int = 1) -> int:
            began.append(user)
            return size

        with pytest.raises(pgkv.ConfigError, match="RateLimiter"):
            limiter.limit("k")(len)  # type: ignore[arg-type]
        for size in (2, 3):
            assert await work("a", size=size) == size
        with pytest.raises(pgkv.RateLimitedError) as caught:
            await work("a")
        assert await work("b") == 1
    else:
        blocking = pgkv.RateLimiter(store._target, "5/h", name="api", timeout=20)

        @blocking.limit(key=lambda user, **_: user, cost=lambda user, size=1: size)
        def block(user: str, size: int = 1) -> int:
            began.append(user)
            return size

        async def never() -> None: ...

        with pytest.raises(pgkv.ConfigError, match="AsyncRateLimiter"):
            blocking.limit("k")(never)
        for size in (2, 3):
            assert block("a", size=size) == size
        with pytest.raises(pgkv.RateLimitedError) as caught:
            block("a")
        assert block("b") == 1
    assert began == ["a", "a", "b"]
    assert caught.value.decision.retry_after > 600
    assert "api" in str(caught.value)


def test_what_is_decorated(dsn: str) -> None:
    """Static and class methods, in either order of the decorators, and objects with `__call__`; an
    async object needs an AsyncRateLimiter."""
    limiter = pgkv.RateLimiter(pgkv.Store(pgkv.Config(dsn)), "9/h", name="api", timeout=20)

    class Service:
        @limiter.limit(key="outermost")
        @staticmethod
        def static(n: int) -> int:
            return n

        @limiter.limit(key=lambda cls, n: cls.__name__)
        @classmethod
        def of_class(cls, n: int) -> tuple[str, int]:
            return cls.__name__, n

        @staticmethod
        @limiter.limit(key="innermost")
        def below(n: int) -> int:
            return n

    class Adder:
        def __call__(self, n: int) -> int:
            return n + 1

    class AsyncAdder:
        async def __call__(self, n: int) -> int:
            return n + 1

    service: Any = Service()
    assert (service.static(1), Service.static(2)) == (1, 2)
    assert service.of_class(3) == ("Service", 3)
    assert service.below(4) == 4
    assert limiter.limit("object")(Adder())(4) == 5
    with pytest.raises(pgkv.ConfigError, match=r"AsyncAdder.*AsyncRateLimiter"):
        limiter.limit("object")(AsyncAdder())

    async def awaited() -> int:
        async with pgkv.AsyncStore.connect(dsn) as store:
            other = pgkv.AsyncRateLimiter(store, "9/h", name="api", timeout=20)
            return await other.limit("async")(AsyncAdder())(4)

    assert asyncio.run(awaited()) == 5
    for key in ("outermost", "Service", "innermost", "object"):
        assert limiter.peek(key).remaining < 9
    limiter._store.close()
