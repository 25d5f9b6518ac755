"""The rate limiter on a real server: what is admitted, by a clock that the test moves."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pgkv
from pgkv.patterns.rate_limit import local
from pgkv.patterns.rate_limit.policy import Policy
from pgkv.patterns.rate_limit.rate import rates_of
from pgkv.patterns.rate_limit.sql import KEPT_SECONDS
from pgkv.testing import ServerClock, disabled
from tests.faults.support import newest
from tests.peers import Peer, fetch
from tests.variants import Variant, inside

Make = Callable[..., Any]


@pytest.fixture
def make(variant: Variant, store: Any) -> Make:
    """`make("10/s", name=...)` is a limiter on the test's store, sync or async. It waits longer
    than the default for a busy machine."""

    def limiter(rates: Any, **options: Any) -> Any:
        options = {"name": "api", "timeout": 20, **options}
        return variant.make("RateLimiter", options.pop("store", store), rates, **options)

    return limiter


async def attempts(limiter: Any, count: int, key: str = "u", **options: Any) -> int:
    """How many of `count` hits are admitted."""
    return sum([bool(await limiter.hit(key, **options)) for _ in range(count)])


# -- exactness ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rates", "seconds", "calls", "ideal"),
    [("40/m", 1.0, 120, 119), ("3/s", 0.1, 60, 20), ("7/s burst 3", 0.1, 60, 44)],
)
async def test_no_token_is_lost(
    make: Make, clock: ServerClock, rates: str, seconds: float, calls: int, ideal: int
) -> None:
    """Calls at even intervals get what an exact bucket gives: the rounding of whole seconds or
    microseconds (a known library admits 80 of these 120) takes none."""
    limiter = make(rates)
    admitted = 0
    begun = time.monotonic()
    for n in range(calls):
        clock.set_offset(n * seconds)
        admitted += bool(await limiter.hit("u"))
    flowed = (time.monotonic() - begun) * limiter.rates[0].count / limiter.rates[0].period
    assert ideal - 1 <= admitted <= ideal + 2 + flowed  # the real clock moves on meanwhile


async def test_a_row_that_is_expected_and_gone(make: Make, peer: Peer, operations: Any) -> None:
    """It costs a second statement. Where a sweep may have taken it none is expected, and each hit is the
    one statement that needs none."""
    limiter = make("60/h")
    flows = inside(limiter)._flows

    async def statements() -> int:
        operations.clear()
        await limiter.hit("u")
        return len(operations)

    assert [await statements() for _ in range(3)] == [1, 1, 1]
    assert flows.usual["u"].until > time.monotonic() + KEPT_SECONDS
    peer.run("DELETE FROM kv_store")
    assert [await statements() for _ in range(2)] == [2, 1]
    peer.run("DELETE FROM kv_store")
    flows.usual["u"].until = 0.0
    flows._lately[flows.row("u", flows.policy)] = 0.0
    assert [await statements() for _ in range(2)] == [1, 1]


async def test_the_memory_of_rows_is_emptied_during_a_hit(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another thread does that finds it full: the hit is decided all the same."""
    limiter = make("60/m")
    flows = inside(limiter)._flows
    decide = type(flows.policy).decide

    def deciding(*args: Any) -> Any:
        flows._lately.clear()
        return decide(*args)

    await limiter.hit("u")
    monkeypatch.setattr(type(flows.policy), "decide", deciding)
    flows._lately[flows.row("u", flows.policy)] = 0.0
    assert all([await limiter.hit("u") for _ in range(3)])


async def test_a_burst_and_what_flows_back(make: Make, clock: ServerClock) -> None:
    """A full bucket gives its burst at once, then the rate; a long idle key has a burst, not more."""
    limiter = make("10/h burst 4")
    assert await attempts(limiter, 6) == 4
    clock.advance(721)  # two intervals
    assert await attempts(limiter, 4) == 2
    clock.advance(86400)
    assert await attempts(limiter, 6) == 4


async def test_retry_after_is_the_wait(make: Make, clock: ServerClock) -> None:
    """After retry_after the same hit is admitted, a little earlier it is not; cost counts."""
    limiter = make("6/h burst 5")
    assert await attempts(limiter, 5) == 5
    denied = await limiter.hit("u", cost=3)
    assert 1740 < denied.retry_after <= 1800
    assert 2940 < denied.reset_after <= 3000
    clock.advance(denied.retry_after - 60)
    assert not await limiter.hit("u", cost=3)
    clock.advance(60)
    assert await limiter.hit("u", cost=3)


async def test_a_whole_burst_at_once(make: Make, clock: ServerClock) -> None:
    """cost = burst passes on a full bucket, also where the interval is no whole number; once."""
    limiter = make("7/h burst 3")
    for _ in range(2):
        assert [bool(await limiter.hit("u", cost=3)) for _ in range(2)] == [True, False]
        clock.advance(3600)
    assert await limiter.hit_many([(limiter, "u", 3), (limiter, "new", 3)])


async def test_cost_beyond_the_burst_is_refused_at_once(make: Make, operations: Any) -> None:
    """It could never be admitted: a ValueError, nothing sent."""
    limiter = make("10/s burst 5; 1000/h")
    for call in (limiter.hit, limiter.acquire, limiter.reserve, limiter.peek):
        with pytest.raises(pgkv.InvalidValueError, match="burst"):
            await call("u", cost=6)
    for cost in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match="cost"):
            await limiter.hit("u", cost=cost)
    assert not [name for name, _, _ in operations if name.startswith("limit_")]


async def test_several_rates_all_or_none(make: Make, clock: ServerClock) -> None:
    """A hit that one rate refuses is charged to none of them."""
    limiter = make("4/w burst 4; 2/h burst 2")
    assert await attempts(limiter, 9) == 2
    clock.advance(3700)
    assert await attempts(limiter, 9) == 2  # nothing of the week's went to the seven refused
    clock.advance(3700)
    denied = await limiter.hit("u")
    assert not denied
    assert denied.rate.period == 7 * 86400
    assert denied.limit == 4


async def test_names_and_keys_never_meet(make: Make) -> None:
    """Two names share no bucket, whatever is in names and keys; neither do one rate and several."""
    first, second = make("1/h", name="a"), make("1/h", name="a:b")
    several = make("1/h; 2/d", name="a")
    assert await first.hit("b:c")
    assert await second.hit("c")
    assert await several.hit("b:c")
    assert not await first.hit("b:c")
    long = "x" * 5000
    assert await first.hit(long)
    assert not await first.hit(long)
    assert await first.hit(long + "y")
    for wrong in ("", 7, "a\0", "\ud800"):
        with pytest.raises(pgkv.InvalidKeyError):
            await first.hit(wrong)


async def test_a_namespace_has_buckets_of_its_own(store: Any, make: Make) -> None:
    """A limiter on store.namespace() keeps to it."""
    one, two = (make("1/h", store=store.namespace(tenant)) for tenant in ("t1:", "t2:"))
    assert await one.hit("u")
    assert await two.hit("u")
    assert not await one.hit("u")


async def test_limits_per_call(make: Make) -> None:
    """A user's plan goes with the call; a change of plan takes effect on the bucket as it stands."""
    limiter = make("2/h")
    assert await attempts(limiter, 1) == 1
    assert await attempts(limiter, 4, limits="4/h") == 2  # half of the bucket was used
    assert await attempts(limiter, 1) == 0
    assert await attempts(limiter, 9, "v", limits=pgkv.Rate(3, 3600)) == 3
    assert await attempts(limiter, 9, "w", limits="5/h; 100/d") == 5


async def test_peek_reset_refund(make: Make, clock: ServerClock) -> None:
    """peek charges nothing, reset fills the bucket, refund never lifts it above full nor makes a row."""
    limiter = make("4/h; 100/d")
    assert (await limiter.peek("u")).remaining == 4
    assert not await limiter.refund("u", cost=3)
    assert await attempts(limiter, 3) == 3
    assert (await limiter.peek("u")).remaining == 1
    assert not await limiter.peek("u", cost=2)
    assert await limiter.refund("u", cost=2)
    assert (await limiter.peek("u")).remaining == 3
    assert await limiter.refund("u", cost=50)
    assert await attempts(limiter, 9) == 4
    assert await limiter.reset("u")
    assert not await limiter.reset("u")
    assert await attempts(limiter, 9) == 4
    clock.advance(86400 * 2)
    assert not await limiter.refund("u")


async def test_the_clock_steps(make: Make, clock: ServerClock) -> None:
    """Set back an hour, the debt counts from the new time: no key is locked out. Set forward, one
    burst comes early at most."""
    limiter = make("10/h; 500/d")
    assert await attempts(limiter, 12) >= 10
    clock.advance(-3600)
    assert not await limiter.hit("u", cost=10)  # the debt is still owed
    clock.advance(3600)
    assert await limiter.hit("u", cost=9)
    clock.advance(-3600)
    assert not await limiter.hit_many([(limiter, "u", 10)])
    clock.advance(3600)
    assert await limiter.hit_many([(limiter, "u", 9)])
    clock.advance(7200)
    assert 10 <= await attempts(limiter, 15) <= 12


@pytest.mark.parametrize("undoes", ["cancel", "refund"])
async def test_what_is_given_back_hides_no_step_of_the_clock(
    make: Make, clock: ServerClock, undoes: str
) -> None:
    """Of two tokens one is given back after the clock was set back an hour: the other one's debt
    counts from the new time all the same."""
    limiter = make("1/100s burst 2")
    await limiter.hit("u")
    reservation = await limiter.reserve("u", max_wait=0)
    clock.advance(-3600)
    assert await (reservation.cancel() if undoes == "cancel" else limiter.refund("u"))
    assert await limiter.hit("u")
    assert not await limiter.hit("u")


@pytest.mark.parametrize("many", [False, True])
async def test_a_key_that_changes_as_its_step_back_is_undone(
    make: Make, clock: ServerClock, monkeypatch: pytest.MonkeyPatch, many: bool
) -> None:
    """A token given back between the answer that shows a step of the clock and what undoes the step: the
    key is not locked out."""
    limiter = make("1/100s burst 2")
    sql: Any = inside(limiter)._flows.sql
    rebase = sql.rebase
    with pgkv.Store.connect(clock.dsn) as store:
        other = pgkv.RateLimiter(store, "1/100s burst 2", name="api", timeout=20)

        def raced(*args: Any) -> Any:
            monkeypatch.setattr(sql, "rebase", rebase)
            assert other.refund("u")
            return rebase(*args)

        monkeypatch.setattr(sql, "rebase", raced)
        await limiter.hit("u", cost=2)
        clock.advance(-3600)
        ask = limiter.hit_many([(limiter, "u", 1)]) if many else limiter.hit("u")
        assert await ask
    assert sql.rebase == rebase


async def test_a_cancel_of_what_was_reserved_before_a_step_back(
    make: Make, clock: ServerClock
) -> None:
    """When the debt counts from the new time, a cancel gives back nothing that a later caller relies on."""
    limiter = make("1/100s")
    first = await limiter.reserve("u", max_wait=1000)
    await limiter.reserve("u", max_wait=1000)
    clock.advance(-3600)
    assert not await limiter.hit("u")
    assert not await first.cancel()
    assert (await limiter.peek("u")).retry_after > 150


async def test_a_step_back_is_logged_once(
    make: Make, clock: ServerClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A clock that was set back concerns every key: one line, and later the number of the others."""
    limiter = make("1/h")
    for n in range(5):
        await limiter.hit(f"u{n}")
    clock.advance(-3600)
    with caplog.at_level(logging.WARNING, logger="pgkv"), pytest.MonkeyPatch.context() as patch:
        for n in range(5):
            if n == 4:
                patch.setattr(local, "WARN_SECONDS", 0.0)
            assert not await limiter.hit(f"u{n}")
    events: list[Any] = [each for each in caplog.records if "clock_back" in each.getMessage()]
    assert [each.pgkv["rows"] for each in events] == [1, 4]


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rates=st.sampled_from(["40/m", "7/s burst 3", "3/s; 10/m burst 5", "999999/s burst 9"]),
    calls=st.lists(st.tuples(st.integers(0, 3_000_000), st.integers(1, 3)), max_size=12),
)
async def test_against_an_exact_bucket(
    make: Make, store: Any, clock: ServerClock, rates: str, calls: list[tuple[int, int]]
) -> None:
    """The server's answers, replayed by its own clock on buckets of rational numbers: never more is
    admitted, and nothing denied for which 1 ns more had been there."""
    limiter = make(rates)
    await limiter.reset("u")
    policy = Policy("api", rates_of(rates))
    core: Any = inside(limiter)._flows
    row = core.row("u", policy)
    speeds = [Fraction(gauge.count, gauge.period) for gauge in policy.gauges]
    levels = [Fraction(rate.burst) for rate in policy.rates]
    last: int | None = None
    for step_us, cost in calls:
        clock.advance(step_us / 1e6)
        arrival = await store._execute(core.sql.hit(row, policy.charge(cost)))
        passed = 0 if last is None else arrival.now - last
        last = arrival.now
        levels = [
            min(Fraction(rate.burst), level + passed * speed)
            for rate, level, speed in zip(policy.rates, levels, speeds, strict=True)
        ]
        if arrival.charged:
            levels = [level - cost for level in levels]
            assert min(levels) >= 0
        else:
            slack = [level - cost - len(calls) * v for level, v in zip(levels, speeds, strict=True)]
            assert min(slack) < 0


# -- what it costs the server -----------------------------------------------------------------


async def test_a_denial_writes_nothing(make: Make, connect: Any, peer: Peer) -> None:
    """No transaction id is taken, so nothing is logged, and no row is locked; also by hit_many."""
    limiter, other = make("2/h; 9/d"), make("5/h", name="other")
    await attempts(limiter, 2)
    await other.hit("v")
    before = peer.run("SELECT key, ctid, xmin, xmax FROM kv_store ORDER BY key")
    conn = await connect()
    inside, other_inside = limiter.using(conn), other.using(conn)
    assert await attempts(inside, 20) == 0
    for _ in range(20):
        assert not await inside.hit_many(
            [(inside, "u", 1), (other_inside, "v", 1), (other_inside, "new", 1)]
        )
    assert await fetch(conn, "SELECT pg_current_xact_id_if_assigned()") == [(None,)]
    assert peer.run("SELECT key, ctid, xmin, xmax FROM kv_store ORDER BY key") == before
    await conn.rollback()


async def test_rows_vanish_some_time_after_they_are_full(
    make: Make, store: Any, clock: ServerClock, peer: Peer
) -> None:
    """The row of a full bucket stays for a moment, in which its client mostly comes again; it counts as
    no bucket."""
    limiter = make("2/m; 30/30h")
    await limiter.hit("u")
    clock.advance(3540)  # the slowest rate gives one token in an hour
    assert await limiter.refund("u") is True
    ends = "SELECT extract(epoch FROM expires_at) FROM kv_store"
    before = clock.now().timestamp()
    await limiter.hit("u")
    assert 0 <= float(peer.one(ends)) - before - 3600 - KEPT_SECONDS < 60
    clock.advance(3601)
    assert await limiter.refund("u") is await limiter.reset("u") is False
    clock.advance(KEPT_SECONDS + 60)
    assert await store.cleanup_expired() == 1
    assert peer.keys() == set()


async def test_a_hit_is_one_statement(make: Make, operations: Any) -> None:
    """Allowed or denied, with any number of rates; the first that is denied is two, and so is the
    first that is allowed again."""
    limiter = make("2/h; 3/d; 4/w")
    counts = []
    for number in range(7):
        operations.clear()
        if number == 5:
            await limiter.refund("u", 2)
            operations.clear()
        await limiter.hit("u")
        counts.append(len([name for name, _, _ in operations if name == "limit_hit"]))
    assert counts == [1, 1, 2, 1, 1, 2, 1]


class Forgetful(dict[str, Any]):
    """Keeps nothing."""

    def __setitem__(self, key: str, value: Any) -> None:
        pass


async def test_a_hit_without_a_flow_decides_as_one_with_it(
    make: Make, clock: ServerClock, operations: Any, store: Any
) -> None:
    """What is usual of a key is asked without a flow: the same statements, decisions and counts, also
    when the row is gone, full again, of another time, or cannot be read."""

    async def story(name: str, usual: dict[str, Any]) -> Any:
        limiter = make("2/200s burst 2", name=name, on_error="closed")
        flows: Any = inside(limiter)._flows
        flows.usual = usual
        clock.set_offset(0)
        operations.clear()
        told: list[Any] = []

        async def hit(count: int) -> None:
            for _ in range(count):
                made = await limiter.hit("u")
                told.append((made.allowed, made.remaining, made.degraded))

        await hit(5)
        known = set(usual)
        clock.advance(110)
        await hit(3)
        clock.advance(1200)
        await hit(2)
        await limiter.reset("u")
        await hit(4)
        sent = [each[:2] for each in operations]
        clock.advance(-3600)
        await hit(3)
        await store.set(f"pgkv:rate:{name}:u", b"hello")
        with pytest.raises(pgkv.InvalidValueError, match="another program"):
            await limiter.hit("u")
        await limiter.reset("u")
        await hit(1)
        with pytest.raises(pgkv.InvalidKeyError):
            await limiter.hit(["u"])
        flows.timeout = 0.2
        with psycopg.connect(clock.dsn) as peer:
            peer.execute("LOCK kv_store")
            await hit(1)
        return told, sent, limiter.counts, known

    *ways, known = await story("usual", {})
    *expected, forgotten = await story("flow", Forgetful())
    assert (known, forgotten) == ({"u"}, set())
    assert ways == expected
    assert ways[0][-1] == (False, 0, True)


async def test_foreign_data_is_named(make: Make, store: Any) -> None:
    """A foreign value under a limiter's key is an error that says so, not a free pass."""
    limiter = make("2/h", on_error="open")
    await store.set("pgkv:rate:api:u", b"hello")
    with pytest.raises(pgkv.InvalidValueError, match="another program"):
        await limiter.hit("u")


async def test_a_dropped_table_is_made_again(make: Make, peer: Peer) -> None:
    """As after the fail-over of an UNLOGGED table: every bucket is full, and the limiter goes on."""
    limiter = make("2/h")
    assert await attempts(limiter, 3) == 2
    peer.run("DROP TABLE kv_store")
    assert await attempts(limiter, 3) == 2


# -- waiting -----------------------------------------------------------------------------------


async def test_reservations_queue(make: Make, clock: ServerClock) -> None:
    """Each reservation is told its own slot; one beyond max_wait is refused and costs nothing."""
    limiter = make("1/100s burst 2")
    delays = [(await limiter.reserve("u", max_wait=300)).delay for _ in range(5)]
    assert delays == pytest.approx([0, 0, 100, 200, 300], abs=50)
    with pytest.raises(pgkv.RateLimitedError) as caught:
        await limiter.reserve("u", max_wait=300)
    assert caught.value.decision.retry_after == pytest.approx(400, abs=50)
    assert not await limiter.hit("u")
    clock.advance(401)
    assert await limiter.hit("u")


async def test_cancelling_never_doubles_a_slot(make: Make, clock: ServerClock) -> None:
    """The last place is given back whole; one in the middle moves no other, so over every span of
    the slots that remain and are newly given, no more than burst + rate x t are used."""
    limiter = make("1/100s burst 1")
    slots = [await limiter.reserve("u") for _ in range(5)]
    taken = [each.delay for each in slots]
    assert not await slots[2].cancel()  # in the middle: its slot is lost, not handed on
    taken.remove(slots[2].delay)
    assert await slots[4].cancel()
    assert not await slots[4].cancel()  # idempotent
    taken.remove(slots[4].delay)
    taken += [(await limiter.reserve("u")).delay for _ in range(3)]
    taken.sort()
    assert taken == pytest.approx([0, 100, 300, 400, 500, 600], abs=50)
    for n, start in enumerate(taken):
        for m in range(n, len(taken)):
            assert m - n + 1 <= 1 + (taken[m] - start) / 100 + 0.5


async def test_a_reservation_from_before_a_reset(make: Make, clock: ServerClock) -> None:
    """cancel() takes nothing off a bucket that was reset meanwhile, nor off later hits when its own
    tokens have flowed back."""
    limiter = make("1/m burst 3")
    old = await limiter.reserve("u", cost=3)
    await limiter.reset("u")
    assert await attempts(limiter, 5) == 3
    assert not await old.cancel()
    assert not await limiter.hit("u")
    late = await limiter.reserve("v", cost=3)
    clock.advance(185)
    assert await limiter.hit("v")
    assert not await late.cancel()
    assert await attempts(limiter, 5, "v") == 2


async def test_acquire_waits_its_turn(make: Make, operations: Any) -> None:
    """One statement and one sleep; a wait beyond the timeout is refused at once."""
    limiter = make("20/s burst 1")
    for _ in range(3):
        assert await limiter.acquire("u")
    assert [name for name, _, _ in operations if name.startswith("limit")] == ["limit_hit"] * 3
    await limiter.reserve("u", cost=1)
    slow = make("1/h", name="slow")
    assert await slow.acquire("u", timeout=0)
    with pytest.raises(pgkv.RateLimitedError) as caught:
        await slow.acquire("u", timeout=5)
    assert caught.value.decision.retry_after > 3000


# -- several keys --------------------------------------------------------------------------------


async def test_hit_many_all_or_none(make: Make) -> None:
    """One denial charges no key; costs of one key named twice add up; the decision is the tightest's."""
    user, llm = make("5/h", name="user"), make("1000/d; 5000/w", name="llm")
    decision = await user.hit_many([(user, "1", 1), (llm, "9", 850)])
    assert decision.allowed
    assert decision.limit == 1000
    assert decision.remaining == 150
    assert '"user";q=5;w=3600' in decision.policies
    denied = await user.hit_many([(user, "1", 1), (llm, "9", 151)])
    assert not denied
    assert denied.policy == "llm 1000/d"
    assert 0 < denied.retry_after < 87
    assert (await user.peek("1")).remaining == 4
    assert await user.hit_many([(user, "1", 2), (user, "1", 2)])
    assert (await user.peek("1")).remaining == 0
    assert user.counts == pgkv.LimiterCounts(allowed=2, denied=1)


async def test_hit_many_refuses_what_one_statement_cannot_do(make: Make, make_store: Any) -> None:
    """Limiters on different stores, or two of one name with different rates; nothing at all."""
    user = make("5/h", name="user")
    elsewhere = make("5/h", name="user", store=await make_store(table_name="other"))
    for charges in (
        [(user, "1", 1), (elsewhere, "1", 1)],
        [(user, "1", 1), (make("6/h", name="user"), "1", 1)],
    ):
        with pytest.raises(pgkv.ConfigError):
            await user.hit_many(charges)
    for wrong in ([], [(user, "1", 6)], [(user, "1", 3), (user, "1", 3)]):
        with pytest.raises(pgkv.InvalidValueError):
            await user.hit_many(wrong)


# -- inside a transaction ---------------------------------------------------------------------------


async def test_a_charge_comes_back_with_the_rollback(make: Make, connect: Any) -> None:
    """using(conn) charges inside the caller's transaction; a race inside it does not fail it."""
    limiter = make("3/h")
    conn = await connect()
    inside = limiter.using(conn)
    assert await attempts(inside, 5) == 3
    await conn.rollback()
    assert (await limiter.peek("u")).remaining == 3
    assert await inside.hit_many([(inside, "u", 1), (inside, "v", 1)])
    await conn.commit()
    assert (await limiter.peek("u")).remaining == 2
    assert (await limiter.peek("v")).remaining == 2


async def test_disabled(make: Make, operations: Any) -> None:
    """Inside pgkv.testing.disabled() every call of a limiter is admitted at once and none counts;
    bad arguments are refused."""
    limiter = make("1/h")
    with disabled():
        assert await attempts(limiter, 3) == 3
        assert (await limiter.acquire("u", timeout=0)).degraded
        assert (await limiter.reserve("u")).delay == 0
        assert await limiter.hit_many([(limiter, "u", 1)])
        assert await limiter.peek("u")
        assert await limiter.refund("u") is await limiter.reset("u") is False
        with pytest.raises(pgkv.InvalidValueError):
            await limiter.hit("u", cost=2)
    assert operations == []
    assert limiter.counts.allowed == 0
    assert await attempts(limiter, 3) == 1


# Kinds of rates, and the row of a key that counts them. Within a row a change keeps what was used; another
# row begins with nothing used.
ROWS_OF = {
    "3/h": "bucket",
    "4/d": "bucket",
    "5/w burst 4": "bucket",
    "3/quarter": "quarter",
    "4/quarter": "quarter",
    "3/quarter Asia/Tokyo": "quarter in Tokyo",
    "3/h; 4/d": "h and d",
    "2/h; 4/d": "other h and d",
    "3/h; 4/year": "h and year",
}


@newest
async def test_the_rates_of_a_live_key_change(make: Make) -> None:
    """From each kind of rates to each other, while processes with the old ones go on: nothing raises, and
    what one row counts does not show in another."""
    limiters = {rates: make(rates) for rates in ROWS_OF}
    bursts = {rates: min(each.burst for each in made.rates) for rates, made in limiters.items()}
    for old, new in itertools.permutations(ROWS_OF, 2):
        before, after, key = limiters[old], limiters[new], f"{old} {new}"
        fresh = ROWS_OF[old] != ROWS_OF[new]
        assert await before.hit(key)
        assert ((await after.peek(key)).remaining == bursts[new]) is fresh
        turns = [await each.hit(key) for _ in range(bursts[new]) for each in (after, before)]
        if fresh:
            assert sum(map(bool, turns[::2])) == bursts[new]
            assert sum(map(bool, turns[1::2])) == min(bursts[new], bursts[old] - 1)
        assert not await after.hit(key)
        assert not await after.hit_many([(after, key, 1)])
        assert await after.refund(key)
        assert await after.reset(key)
        assert await after.acquire(key, timeout=0)
        assert await before.reset(key)
        assert await before.hit(key)
