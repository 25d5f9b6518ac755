"""Calendar windows: what is admitted in each, by a clock that the test moves across their bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from pgkv import ConfigError, InvalidValueError, Quota, Rate, RateLimitedError
from pgkv.patterns.rate_limit import flows
from pgkv.patterns.rate_limit.sql import KEPT_SECONDS
from pgkv.testing import ServerClock
from tests.peers import Peer
from tests.variants import Variant, inside

Make = Callable[..., Any]


@pytest.fixture
def make(variant: Variant, store: Any) -> Make:
    """`make("5/month")` is a limiter on the test's store, sync or async."""

    def limiter(rates: Any, **options: Any) -> Any:
        return variant.make("RateLimiter", store, rates, **{"name": "q", "timeout": 20, **options})

    return limiter


@pytest.fixture
def at(clock: ServerClock) -> Callable[[str], None]:
    """`at("2027-03-28 01:00+00:00")`: let it be that time on the server."""

    def move(moment: str) -> None:
        now = datetime.now(UTC)
        clock.set_offset((datetime.fromisoformat(moment) - now).total_seconds())

    return move


@pytest.fixture
def sleeps(clock: ServerClock, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long `acquire` sleeps; the server's clock moves on instead."""
    slept: list[float] = []

    def pause(seconds: float) -> Iterator[Any]:
        slept.append(seconds)
        clock.advance(seconds)
        yield from ()

    monkeypatch.setattr(flows, "pause", pause)
    return slept


async def attempts(limiter: Any, count: int, key: str = "u", **options: Any) -> int:
    return sum([bool(await limiter.hit(key, **options)) for _ in range(count)])


@pytest.mark.parametrize(
    ("rates", "now", "end"),
    [
        ("3/minute fixed", "2027-05-01 10:00:20+00:00", "2027-05-01 10:01:00+00:00"),
        ("3/hour fixed", "2027-05-01 10:20:00+00:00", "2027-05-01 11:00:00+00:00"),
        # The hour that comes twice, and half an hour's zone.
        ("3/hour fixed Europe/Berlin", "2027-10-31 00:30:00+00:00", "2027-10-31 01:00:00+00:00"),
        ("3/hour fixed Asia/Kolkata", "2027-05-01 10:20:00+00:00", "2027-05-01 10:30:00+00:00"),
        ("3/day fixed", "2027-05-01 10:00:00+00:00", "2027-05-02 00:00:00+00:00"),
        # Days of 23 and of 25 hours.
        ("3/day fixed Europe/Berlin", "2027-03-27 23:30:00+00:00", "2027-03-28 22:00:00+00:00"),
        ("3/day fixed Europe/Berlin", "2027-10-30 22:30:00+00:00", "2027-10-31 23:00:00+00:00"),
        ("3/week fixed", "2027-05-01 10:00:00+00:00", "2027-05-03 00:00:00+00:00"),
        ("3/month", "2027-02-10 10:00:00+00:00", "2027-03-01 00:00:00+00:00"),
        ("3/month America/New_York", "2027-03-01 03:00:00+00:00", "2027-03-01 05:00:00+00:00"),
        ("3/quarter", "2027-02-10 10:00:00+00:00", "2027-04-01 00:00:00+00:00"),
        ("3/year", "2028-02-29 10:00:00+00:00", "2029-01-01 00:00:00+00:00"),
    ],
)
async def test_all_tokens_come_back_when_the_window_ends(
    make: Make, at: Callable[[str], None], clock: ServerClock, rates: str, now: str, end: str
) -> None:
    """The count is handed out in each window, on the zone's calendar, and `retry_after` says when
    the next one begins."""
    limiter = make(rates)
    at(now)
    left = (datetime.fromisoformat(end) - datetime.fromisoformat(now)).total_seconds()
    first = await limiter.hit("u", cost=2)
    assert (first.remaining, first.limit) == (1, 3)
    assert left - 19 < first.reset_after <= left
    assert await attempts(limiter, 3) == 1
    denied = await limiter.hit("u")
    assert not denied
    assert left - 19 < denied.retry_after <= left
    clock.advance(denied.retry_after - 0.5)
    early = await limiter.hit("u")
    if not early:  # a machine that is not slow
        clock.advance(early.retry_after)
        early = await limiter.hit("u")
    assert early.remaining == 2
    assert await attempts(limiter, 3) == 2


async def test_many_callers_get_the_count(make: Make) -> None:
    """Exactly the count, whoever comes at once."""
    limiter = make("20/year")
    decisions = await asyncio.gather(*(limiter.hit("u") for _ in range(50)))
    assert sum(map(bool, decisions)) == 20


async def test_with_a_rate_all_or_none(
    make: Make, at: Callable[[str], None], clock: ServerClock
) -> None:
    """A quota and a rate are one row: what the one refuses costs nothing of the other."""
    limiter = make("5/month; 2/h")
    at("2027-05-10 12:00:00+00:00")
    assert await attempts(limiter, 4) == 2
    assert (await limiter.hit("u")).rate == Rate(2, 3600)
    clock.advance(3600)
    assert await attempts(limiter, 4) == 2
    clock.advance(7200)
    assert await attempts(limiter, 4) == 1
    denied = await limiter.hit("u")
    assert (denied.rate, denied.remaining) == (Quota(5, "month"), 0)
    assert denied.retry_after > 86400
    assert (await limiter.peek("u")).remaining == 0
    at("2027-06-01 00:00:01+00:00")
    assert await attempts(limiter, 4) == 2


async def test_several_keys_in_one_statement(
    make: Make, at: Callable[[str], None], operations: Any
) -> None:
    """hit_many with quotas and rates, all or none; and with quotas of several zones."""
    at("2027-05-10 12:00:00+00:00")
    user, org = make("2/h", name="user"), make("3/month Europe/Berlin", name="org")
    day = make("9/day fixed", name="day")
    many = user.hit_many
    targets = [inside(each) for each in (user, org, day)]
    charges = list(zip(targets, "uod", (1, 2, 1), strict=True))
    operations.clear()
    assert await many(charges)
    assert [name for name, _, _ in operations] == ["limit_hit_many"]
    denied = await many(charges)
    assert not denied
    assert denied.rate == Quota(3, "month", "Europe/Berlin")
    assert 20 * 86400 < denied.retry_after < 22 * 86400
    assert (await user.peek("u")).remaining == 1
    assert (await org.peek("o")).remaining == 1
    assert (await day.peek("d")).remaining == 8
    at("2027-05-31 22:00:01+00:00")  # June has begun in Berlin
    assert await many(charges)


async def test_peek_reset_refund(make: Make, at: Callable[[str], None]) -> None:
    """As of buckets; a refund gives back to the window that is, never above its count."""
    at("2027-05-10 12:00:00+00:00")
    limiter = make("5/day fixed")
    assert (await limiter.peek("u")).remaining == 5
    await limiter.hit("u", cost=4)
    assert await limiter.refund("u", cost=2)
    assert (await limiter.peek("u")).remaining == 3
    assert await limiter.refund("u", cost=50)
    assert (await limiter.peek("u")).remaining == 5
    await limiter.hit("u", cost=5)
    assert await limiter.reset("u")
    assert await attempts(limiter, 6) == 5
    at("2027-05-11 00:00:01+00:00")
    assert not await limiter.refund("u"), "yesterday's tokens are gone"


async def test_the_clock_steps(make: Make, at: Callable[[str], None], clock: ServerClock) -> None:
    """A step back into an earlier window takes the used tokens along and locks nobody out."""
    limiter = make("3/month")
    at("2027-06-01 00:10:00+00:00")
    assert await attempts(limiter, 2) == 2
    clock.advance(-3600)
    assert await attempts(limiter, 3) == 1
    at("2027-06-01 00:00:01+00:00")
    assert await attempts(limiter, 4) == 3


async def test_a_row_ends_with_its_window(
    make: Make, at: Callable[[str], None], peer: Peer
) -> None:
    """It expires some time after the window's end, or after the bucket beside it is full, whichever is
    later."""
    at("2027-05-10 12:00:00+00:00")
    expires = "SELECT expires_at AT TIME ZONE 'UTC' FROM kv_store WHERE key LIKE %s"
    await make("3/month Europe/Berlin", name="a").hit("u")
    assert peer.one(expires, "pgkv:rate:a%") == datetime(2027, 5, 31, 22, 0, KEPT_SECONDS, 1)  # noqa: DTZ001  # UTC
    await make("3/day fixed; 1/7d", name="b").hit("u")
    assert peer.one(expires, "pgkv:rate:b%") > datetime(2027, 5, 17)  # noqa: DTZ001  # UTC


async def test_a_plan_changes_at_once(make: Make) -> None:
    """Another count on the same window counts what is used; another window does not."""
    limiter = make("3/year")
    assert await attempts(limiter, 4) == 3
    assert await attempts(limiter, 4, limits="5/year") == 2
    assert await attempts(limiter, 4, limits="3/year Asia/Tokyo") == 3
    assert await attempts(limiter, 4, limits="3/s burst 3") >= 3


async def test_a_hit_is_one_statement(make: Make, operations: Any) -> None:
    """As of buckets: allowed or refused; the first that is refused is two."""
    limiter = make("2/year")
    counts = []
    for _ in range(5):
        operations.clear()
        await limiter.hit("u")
        counts.append(len([name for name, _, _ in operations if name == "limit_hit"]))
    assert counts == [1, 1, 2, 1, 1]


async def test_acquire_asks_again_in_the_next_window(
    make: Make, at: Callable[[str], None], sleeps: list[float]
) -> None:
    """A used-up window has no places: acquire sleeps to its end and tries again, or refuses at once
    where that is beyond its timeout."""
    limiter = make("1/hour fixed")
    at("2027-05-10 12:50:00+00:00")
    assert await limiter.acquire("u", timeout=0)
    with pytest.raises(RateLimitedError) as refused:
        await limiter.acquire("u", timeout=60)
    assert 500 < refused.value.decision.retry_after <= 600
    assert sleeps == []
    decision = await limiter.acquire("u", timeout=3600)
    assert decision.allowed
    assert len(sleeps) == 1
    assert 500 < sleeps[0] <= 600


async def test_a_reservation_is_cancelled_in_its_window(
    make: Make, at: Callable[[str], None], clock: ServerClock
) -> None:
    """Given back whole while the window lasts, whatever came later; not into the next one."""
    limiter = make("5/day fixed")
    at("2027-05-10 12:00:00+00:00")
    first, late = await limiter.reserve("u", 2), await limiter.reserve("u", 1)
    assert (first.delay, late.delay) == (0.0, 0.0)
    assert await first.cancel()
    assert (await limiter.peek("u")).remaining == 4
    clock.advance(86400)
    await limiter.hit("u")
    assert not await late.cancel()
    assert (await limiter.peek("u")).remaining == 4


async def test_inside_a_transaction(make: Make, connect: Any) -> None:
    """A charge comes back with the rollback."""
    limiter = make("2/year")
    conn = await connect()
    assert await limiter.using(conn).hit("u", cost=2)
    assert not await limiter.using(conn).hit("u")
    await conn.rollback()
    assert (await limiter.peek("u")).remaining == 2


async def test_a_zone_that_the_server_does_not_know(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where this machine has no time zone data the server judges, and the error names the setting;
    `on_error` is not about it."""
    from pgkv.patterns.rate_limit import rate

    monkeypatch.setattr(rate, "available_timezones", set)
    limiter = make("2/month Mars/Olympus", on_error="open")
    with pytest.raises(InvalidValueError, match="timezone"):
        await limiter.hit("u")


async def test_headers(make: Make, at: Callable[[str], None]) -> None:
    """The window's length in seconds, and the time to its end."""
    at("2027-05-10 12:00:00+00:00")
    decision = await make("3/day fixed").hit("u", cost=3)
    headers = decision.headers()
    assert headers["RateLimit-Policy"] == '"q";q=3;w=86400'
    assert (
        headers["RateLimit"].startswith('"q";r=0;t=431')
        or headers["RateLimit"] == '"q";r=0;t=43200'
    )
    assert int(decision.headers("x")["X-RateLimit-Reset"]) > 43000


def test_texts() -> None:
    """What parse reads, str writes."""
    for text, quota in {
        "1000/month": Quota(1000, "month"),
        "5 per year": Quota(5, "year"),
        "100/day fixed": Quota(100, "day"),
        "100/days fixed Europe/Berlin": Quota(100, "day", "Europe/Berlin"),
        "7/Quarter Asia/Tokyo": Quota(7, "quarter", "Asia/Tokyo"),
    }.items():
        assert Rate.parse(text) == quota
        assert Rate.parse(str(quota)) == quota
    assert Rate.parse("100/day") == Rate(100, 86400)


@pytest.mark.parametrize(
    ("make_it", "named"),
    [
        (lambda: Quota(0, "day"), "count"),
        (lambda: Quota(True, "day"), "count"),
        (lambda: Quota(1, "fortnight"), "unit"),
        (lambda: Quota(1, "day", "Europe/Atlantis"), "timezone"),
        (lambda: Quota(1, "day", "UTC'; DROP TABLE x"), "timezone"),
        (lambda: Quota(10**9, "minute"), "1,000,000 per second"),
        (lambda: Rate.parse("100/second fixed"), "not a rate"),
        (lambda: Rate.parse("100/day Europe/Berlin"), "not a rate"),
        (lambda: Rate.parse("100/month burst 5"), "not a rate"),
        (lambda: Rate.parse("100/3 months"), "not a rate"),
    ],
)
def test_wrong_quotas(make_it: Callable[[], object], named: str) -> None:
    """ConfigError, and it names the setting."""
    with pytest.raises(ConfigError, match=named):
        make_it()


async def test_the_decorator_waits(
    make: Make, at: Callable[[str], None], variant: Variant, sleeps: list[float]
) -> None:
    """limit(timeout=) waits for its turn as acquire does; without it a call is refused at once."""
    at("2027-05-10 12:00:00+00:00")
    limiter = make("1/60s")
    calls: list[int] = []

    def note(n: int) -> None:
        calls.append(n)

    async def note_async(n: int) -> None:
        calls.append(n)

    fn = note if variant.name == "sync" else note_async
    target: Any = inside(limiter)
    patient = target.limit(key="u", timeout=90)(fn)
    hasty = target.limit(key="u")(fn)

    async def call(function: Any, n: int) -> None:
        if variant.name == "sync":
            await asyncio.to_thread(function, n)
        else:
            await function(n)

    await call(patient, 1)
    with pytest.raises(RateLimitedError):
        await call(hasty, 2)
    await call(patient, 3)
    assert calls == [1, 3]
    assert len(sleeps) == 1
    assert 0 < sleeps[0] <= 60
    with pytest.raises(InvalidValueError, match="timeout"):
        target.limit(key="u", timeout=-1)
