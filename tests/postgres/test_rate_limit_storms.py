"""The rate limiter under concurrency: arranged races, then storms against the exact bound."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

import pgkv
from tests.peers import Peer
from tests.variants import Variant

ROOT = Path(__file__).resolve().parents[2]
NS = 10**9
Make = Callable[..., Any]


@pytest.fixture
def make(variant: Variant, store: Any) -> Make:
    """`make("10/s", name=...)` is a limiter on the test's store, sync or async."""

    def limiter(rates: Any, **options: Any) -> Any:
        options = {"name": "api", "timeout": 20, **options}
        return variant.make("RateLimiter", store, rates, **options)

    return limiter


# -- arranged -----------------------------------------------------------------------------------


async def test_a_hit_that_lost_its_token_while_waiting(
    make: Make, peer: Peer, witness: Peer
) -> None:
    """A hit whose snapshot shows a token waits for the one who is taking it, and is then denied."""
    limiter = make("2/h")
    await limiter.hit("u")
    with peer.conn.transaction():
        peer.run(
            "UPDATE kv_store SET value = (encode(value, 'escape')::bigint + 5400000000000)"
            "::text::bytea"
        )
        waiting = asyncio.ensure_future(limiter.hit("u"))
        await witness.until_waiting()
    denied = await waiting
    assert not denied
    assert denied.retry_after > 5000  # of what it found when it asked again


async def test_hit_many_meets_a_row_in_the_making(make: Make, peer: Peer, witness: Peer) -> None:
    """A key that appears while the statement runs is charged all the same: the race is repeated."""
    limiter = make("5/h")
    await limiter.hit("old")
    with peer.conn.transaction():
        peer.run(
            "INSERT INTO kv_store (key, value, expires_at) SELECT replace(key, 'old', 'new'),"
            " value, expires_at FROM kv_store"
        )
        waiting = asyncio.ensure_future(
            limiter.hit_many([(limiter, "old", 1), (limiter, "new", 1)])
        )
        await witness.until_waiting()
    assert await waiting
    assert (await limiter.peek("new")).remaining == 3
    assert (await limiter.peek("old")).remaining == 3


async def test_a_race_inside_a_transaction_does_not_fail_it(
    make: Make, connect: Any, peer: Peer, witness: Peer
) -> None:
    """The same inside using(conn): a savepoint keeps the caller's transaction alive."""
    limiter = make("5/h")
    await limiter.hit("old")
    conn = await connect()
    inside = limiter.using(conn)
    with peer.conn.transaction():
        peer.run(
            "INSERT INTO kv_store (key, value, expires_at) SELECT replace(key, 'old', 'new'),"
            " value, expires_at FROM kv_store"
        )
        waiting = asyncio.ensure_future(inside.hit_many([(inside, "new", 1)]))
        await witness.until_waiting()
    assert await waiting
    assert await inside.hit("old")
    await conn.commit()
    assert (await limiter.peek("new")).remaining == 3


@pytest.mark.parametrize("method", ["reset", "refund"])
async def test_the_row_was_replaced_meanwhile(
    make: Make, connect: Any, witness: Peer, method: str
) -> None:
    """A reset or refund that waits for a transaction which resets the key and charges it again acts
    on the new row, as after it."""
    limiter = make("5/h")
    await limiter.hit("u", cost=3)
    conn = await connect()
    inside = limiter.using(conn)
    await inside.reset("u")
    await inside.hit("u", cost=2)
    waiting = asyncio.ensure_future(getattr(limiter, method)("u"))
    await witness.until_waiting()
    await conn.commit()
    assert await waiting
    assert (await limiter.peek("u")).remaining == (5 if method == "reset" else 4)


async def test_a_cancelled_wait_gives_its_place_back(store: Any, variant: Variant) -> None:
    """acquire() that is cancelled while it sleeps leaves the queue as it was."""
    if variant.name == "sync":
        pytest.skip("a thread cannot be cancelled")
    limiter = pgkv.AsyncRateLimiter(store, "1/m burst 1", name="api", timeout=20)
    await limiter.hit("u")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await limiter.acquire("u")
    assert (await limiter.reserve("u")).delay <= 60


# -- storms -----------------------------------------------------------------------------------


def assert_no_span_exceeds(times: list[int], rate: pgkv.Rate) -> None:
    """Over every span of the server's clock at most burst + rate x t were admitted.

    Equivalent to a bucket of rational numbers that never runs below empty.
    """
    per_ns = Fraction(rate.count, round(float(rate.period) * NS))  # type: ignore[arg-type]  # seconds
    level, last = Fraction(rate.burst), min(times)
    for now in sorted(times):
        level = min(Fraction(rate.burst), level + (now - last) * per_ns) - 1
        last = now
        assert level >= 0


@pytest.mark.parametrize("rates", ["50/s burst 250"])
def test_eight_processes_on_one_key(dsn: str, rates: str) -> None:
    """8 processes x 4 threads for three seconds: by the server's clock exactly the ideal number is
    admitted between the first and the last decision, or a few less: a hit that waits for the row keeps
    the time at which it began. The bucket takes five seconds to fill: a busy
    machine does not leave all processes waiting for so long."""
    with pgkv.Store.connect(dsn):
        pass
    command = [sys.executable, "-m", "tests.postgres.limiter_worker", dsn, rates, "3", "4"]
    crew = [subprocess.Popen(command, cwd=ROOT, stdin=-1, stdout=-1, text=True) for _ in range(8)]
    decided: list[tuple[int, bool]] = []
    for each in crew:
        assert each.stdout is not None
        assert each.stdout.readline() == "ready\n"
    for each in crew:
        assert each.stdin is not None
        each.stdin.write("go\n")
        each.stdin.flush()
    for each in crew:
        out, _ = each.communicate(timeout=300)
        assert each.returncode == 0
        decided += [(int(now), yes == "1") for now, yes in map(str.split, out.splitlines())]
    rate = pgkv.Rate.parse(rates)
    admitted = [now for now, charged in decided if charged]
    span = max(decided)[0] - min(decided)[0]
    ideal = rate.burst + span * rate.count // NS
    assert ideal - 10 <= len(admitted) <= ideal
    assert len(decided) > len(admitted)  # there was competition
    assert_no_span_exceeds(admitted, rate)


async def test_two_rates_and_mixed_costs(make: Make) -> None:
    """32 callers, two rates, costs of 1 to 3: what is admitted fits both rates to the token."""
    limiter = make("60/d; 100/w")

    async def caller(seed: int) -> int:
        rng = random.Random(seed)
        spent = 0
        for _ in range(8):
            cost = rng.randint(1, 3)
            spent += cost * bool(await limiter.hit("u", cost=cost))
        return spent

    spent = sum(await asyncio.gather(*map(caller, range(32))))
    assert spent == 60 - (await limiter.peek("u")).remaining
    assert spent >= 58


async def test_hit_many_storm(make: Make) -> None:
    """Callers naming the same keys in any order neither deadlock nor overdraw; half the keys are new
    in each round."""
    limiters = [make("20/h", name=f"l{n}") for n in range(4)]

    async def caller(seed: int) -> list[int]:
        rng = random.Random(seed)
        spent = [0] * 4
        for round_ in range(4):
            chosen = rng.sample(range(4), 3)
            charges = [(limiters[n], f"k{round_ // 2}", 1) for n in chosen]
            if await limiters[0].hit_many(charges):
                for n in chosen:
                    spent[n] += 1
        return spent

    totals = [
        sum(each) for each in zip(*await asyncio.gather(*map(caller, range(24))), strict=True)
    ]
    for n, limiter in enumerate(limiters):
        left = sum([(await limiter.peek(f"k{key}")).remaining for key in range(2)])
        assert totals[n] == 40 - left


async def test_counts_are_exact(make: Make) -> None:
    """limiter.counts loses nothing between threads or tasks."""
    limiter = make("30/h", local_deny=True)
    results = await asyncio.gather(*(limiter.hit("u") for _ in range(200)))
    allowed = sum(map(bool, results))
    assert allowed == 30
    assert limiter.counts == pgkv.LimiterCounts(allowed=30, denied=170)
