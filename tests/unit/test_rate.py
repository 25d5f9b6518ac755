"""Rates and decisions: the arithmetic, against an exact bucket of rational numbers."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pgkv
from pgkv.patterns.rate_limit.policy import Policy
from pgkv.patterns.rate_limit.rate import NS, rates_of
from pgkv.patterns.rate_limit.sql import Arrival


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("10/s", (10, 1.0, 10)),
        ("100/minute", (100, 60.0, 100)),
        ("10/s burst 20", (10, 1.0, 20)),
        ("5 per 10 seconds", (5, 10.0, 5)),
        ("1000/h", (1000, 3600.0, 1000)),
        ("3/15min, burst=1", (3, 900.0, 1)),
        ("1/250ms", (1, 0.25, 1)),
        ("2 PER DAY", (2, 86400.0, 2)),
    ],
)
def test_rates_are_read(text: str, rate: tuple[int, float, int]) -> None:
    """A rate is count, unit and burst in the usual spellings, and reads itself back."""
    parsed = pgkv.Rate.parse(text)
    assert (parsed.count, parsed.period, parsed.burst) == rate
    assert pgkv.Rate.parse(str(parsed)) == parsed == pgkv.Rate(*rate)


def test_a_period_may_be_a_timedelta() -> None:
    """Durations come back as float seconds."""
    assert pgkv.Rate(5, timedelta(minutes=1)).period == 60.0


@pytest.mark.parametrize(
    "text", ["", "10", "10/x", "-1/s", "10/s burst", "10/s burst 0", "0/s", "1.5/s", "10/fortnight"]
)
def test_what_is_no_rate_is_refused(text: str) -> None:
    """Nothing is guessed: a text that is no rate is a ConfigError."""
    with pytest.raises(pgkv.ConfigError):
        pgkv.Rate.parse(text)


@pytest.mark.parametrize(
    ("rate", "why"),
    [
        ((1_000_001, 1.0), "per second"),
        ((1, 86400.0 * 366, 101), "100 years"),
        ((1, 0.0), "period"),
        ((1, float("nan")), "period"),
        ((True, 1.0), "count"),
        ((1, 1.0, 0), "burst"),
    ],
)
def test_impossible_rates_say_why(rate: tuple[Any, ...], why: str) -> None:
    """Rates beyond the clock's tick or the counter's 64 bits are refused with that reason."""
    with pytest.raises(pgkv.ConfigError, match=why):
        pgkv.Rate(*rate)


def test_rates_are_sorted_and_distinct() -> None:
    """Several rates have one order, whatever they were given in; the same one twice is a mistake."""
    assert rates_of("1000/h; 10/s") == rates_of(["10/s", pgkv.Rate(1000, 3600)])
    for wrong in (["10/s", "10/1s"], [""], [";"], []):
        with pytest.raises(pgkv.ConfigError):
            rates_of(";".join(wrong))
        with pytest.raises(pgkv.ConfigError):
            rates_of(wrong)


# -- decisions ------------------------------------------------------------------------------


def decide(rates: str, used: Sequence[float], *, charged: bool, cost: int = 1) -> pgkv.Decision:
    """The decision when the buckets are so many seconds from full."""
    now = 10**18
    tats = [now + round(seconds * NS) for seconds in used]
    return Policy("api", rates_of(rates)).decide(Arrival(charged, now, tats), cost)


def test_a_decision_is_true_when_allowed() -> None:
    """`if limiter.hit(...)` reads as it means."""
    assert decide("10/s", [0.1], charged=True)
    assert not decide("10/s", [1.0], charged=False)


def test_a_decision_tells_of_the_tightest_rate() -> None:
    """limit and remaining are of the rate with the least share left; of a denial, the longest wait."""
    allowed = decide("10/s; 1000/h", [0.5, 3400], charged=True)
    assert (allowed.limit, allowed.remaining, allowed.retry_after) == (1000, 55, 0.0)
    denied = decide("10/s; 1000/h", [1.0, 3000], charged=False)
    assert (denied.limit, denied.remaining, denied.retry_after) == (10, 0, 0.1)


def test_draft_headers() -> None:
    """RateLimit-Policy lists every rate, RateLimit the one that counts; whole seconds, rounded up."""
    decision = decide("10/s burst 25; 1000/h", [0.5, 3400.2], charged=True)
    assert decision.headers() == {
        "RateLimit-Policy": '"api 10/s burst 25";q=25;w=3,"api 1000/h";q=1000;w=3600',
        "RateLimit": '"api 1000/h";r=55;t=3401',
    }
    denied = decide("2/3s burst 1", [1.5], charged=False)
    assert denied.headers() == {
        "RateLimit-Policy": '"api";q=1;w=2',
        "RateLimit": '"api";r=0;t=2',
        "Retry-After": "2",
    }


def test_x_headers() -> None:
    """X-RateLimit-*: the reset in seconds from now."""
    assert decide("10/s", [0.3], charged=True).headers("x") == {
        "X-RateLimit-Limit": "10",
        "X-RateLimit-Remaining": "7",
        "X-RateLimit-Reset": "1",
    }
    assert decide("10/s", [1.0], charged=False).headers("x")["Retry-After"] == "1"
    with pytest.raises(pgkv.ConfigError):
        decide("10/s", [1.0], charged=False).headers("y")  # type: ignore[arg-type]


@pytest.mark.parametrize("rates", ["10/s", "7/s burst 3", "40/m", "999999/s", "3/s; 1000/h"])
def test_a_full_bucket_has_its_burst(rates: str) -> None:
    """Also where the interval is no whole number of nanoseconds, and each hit takes one token."""
    policy = Policy("api", rates_of(rates))
    full = policy.decide(Arrival(True, 10**18, [10**18] * len(policy.rates)), 1)
    assert full.remaining == full.limit
    incs = policy.charge(1).incs
    after = policy.decide(Arrival(True, 10**18, [10**18 + inc for inc in incs]), 1)
    assert after.remaining == after.limit - 1


A_STEP = st.one_of(st.integers(0, 5 * 10**9), st.just("until it would be admitted"))


@given(
    count=st.integers(1, 10**6),
    period=st.integers(1, 10**6),
    burst=st.integers(1, 5000),
    calls=st.lists(st.tuples(A_STEP, st.integers(1, 5000), st.booleans()), max_size=60),
)
def test_never_more_than_an_exact_bucket(
    count: int, period: int, burst: int, calls: list[tuple[int | str, int, bool]]
) -> None:
    """What is admitted an exact bucket of rational numbers admits too; what is denied it denies, but
    for 1 ns per hit; to the nanosecond. A refund never lifts it above full."""
    period = max(period, -(-count // 10**6))
    policy = Policy("api", (pgkv.Rate(count, float(period), burst),))
    per_ns = Fraction(count, period * NS)
    level, now, tat, hits = Fraction(burst), 10**18, 0, 0
    for step, wanted, is_refund in calls:
        cost = 1 + wanted % burst
        charge = policy.charge(cost)
        (inc,), (cap,) = charge.incs, charge.caps
        passed = step if isinstance(step, int) else max(0, tat + inc - cap - now)
        now += passed
        level = min(Fraction(burst), level + passed * per_ns)
        tat = max(tat, now)
        if is_refund:
            tat -= policy.refund(cost)[0]
            level = min(Fraction(burst), level + cost)
            hits += 1
        elif tat + inc - now <= cap:
            tat, level, hits = tat + inc, level - cost, hits + 1
            assert level >= 0
        else:
            assert level - cost < (hits + 1) * per_ns


@given(count=st.integers(1, 10**6), period=st.integers(1, 10**6), cost=st.integers(1, 1000))
def test_refunds_in_parts(count: int, period: int, cost: int) -> None:
    """What was charged at once and is refunded token by token leaves no more than was there."""
    seconds = max(period, -(-count // 10**6))
    policy = Policy("api", (pgkv.Rate(count, float(seconds), 1000),))
    exact = Fraction(cost * seconds * NS, count)
    assert cost * policy.refund(1)[0] <= exact <= policy.charge(cost).incs[0]
