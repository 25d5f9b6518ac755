"""The rate limiter: buckets that are rows."""

from __future__ import annotations

import itertools
import math
import os
import struct
from typing import Any

import psycopg

import pgkv
from pgkv import Decision, RateLimitedError, RateLimiter
from pgkv._ops.op import Op
from pgkv.patterns.rate_limit.flows import Receipt
from pgkv.patterns.rate_limit.sql import KEPT_SECONDS
from tests.interleavings.pairs import Operation, Subject
from tests.interleavings.scenarios import Client, evicting, failed_by_itself, truncate, with_marks
from tests.interleavings.schedule import Scenario, World

STATEMENTS = ("pgkv.patterns.rate_limit.sql",)
READS = frozenset(["usage", "_make_usage"])
BURST = 5
TOKEN = 86_400 / BURST  # seconds: that many times slower than the test
NS = 10**9
CREATED = struct.pack(">q", 0)  # 2000-01-01
COST = {"a": 1, "b": 2}
VERSION = 7
YEAR = "(extract(epoch FROM date_trunc('year', now(), 'UTC')) * 1000000000)"  # where it began


def told(decision: Decision) -> Any:
    """What a decision says, in tokens; a window's end is further away than counts."""
    wait = min(decision.retry_after / TOKEN, 2 * BURST)
    return decision.allowed, decision.remaining, round(wait, 1)


def reserved(limiter: RateLimiter, cost: int) -> Any:
    """The place in the queue, in tokens."""
    try:
        return round(limiter.reserve("k", cost, max_wait=4 * TOKEN).delay / TOKEN, 1)
    except RateLimitedError as error:
        return told(error.decision)


def hinted(limiter: RateLimiter, side: str, refused: bool | None) -> Any:
    """A hit of a key whose last one was refused, or was not."""
    flows = limiter._flows
    flows._lately.clear()
    flows.usual.clear()
    if refused is not None:
        flows._lately[flows.row("k", flows.policy)] = -math.inf if refused else math.inf
    return told(limiter.hit("k", COST[side]))


def rewrite(limiter: RateLimiter, side: str) -> Any:
    """A row that is removed and made again in one transaction is another row."""
    return limiter.reset("k"), told(limiter.hit("k", COST[side]))


def rewrite_both(limiter: RateLimiter, side: str) -> Any:
    both = [(limiter, key, COST[side]) for key in "kz"]
    return limiter.reset("z"), limiter.reset("k"), told(limiter.hit_many(both))


def op(limiter: RateLimiter, name: str) -> None:
    """Send a statement that no method sends by itself, for the row as it was at the beginning. What
    it answers is not used."""
    flows = limiter._flows
    row = flows.row("k", flows.policy)
    made: Op[Any] = (
        flows.sql.rebase(row, struct.pack(">q", VERSION), flows.policy.shape)
        if name == "rebase"
        else limiter._store._sql.collect([row])
    )
    limiter._store._execute(made)


OPERATIONS: dict[str, Operation[RateLimiter]] = {
    "hit": lambda it, x: told(it.hit("k", COST[x])),
    # As one that nothing is known of, as one that was charged, as one that was refused.
    "hit anew": lambda it, x: hinted(it, x, None),
    "hit once more": lambda it, x: hinted(it, x, False),
    "hit in spite": lambda it, x: hinted(it, x, True),
    "hit all": lambda it, x: told(it.hit("k", BURST)),
    "hit_many": lambda it, x: told(it.hit_many([(it, "k", COST[x]), (it, "z", 1)])),
    "hit_many alone": lambda it, x: told(it.hit_many([(it, "k", BURST - 1)])),
    "reserve": lambda it, x: reserved(it, COST[x]),
    "peek": lambda it, x: told(it.peek("k", COST[x])),
    "reset": lambda it, x: it.reset("k"),
    "refund": lambda it, x: it.refund("k", COST[x]),
    "cancel": lambda it, x: it._run(it._flows.cancel(OneRate.receipt)),
    "rebase": lambda it, x: op(it, "rebase"),
    "collect": lambda it, x: op(it, "collect"),
}
# Several statements in one transaction: only as the one that is waited for.
TRANSACTIONS: dict[str, Operation[RateLimiter]] = {"rewrite": rewrite, "rewrite both": rewrite_both}


class OneRate(Subject[RateLimiter]):
    """Two buckets, k and z: absent, partly used, with nothing left, overdrawn by reservations, or
    full again."""

    rates = "5/d"
    operations = OPERATIONS
    only_first = TRANSACTIONS
    states: tuple[str, ...] = ("absent", "used", "spent", "queued", "full")
    repeatable = (OPERATIONS | TRANSACTIONS).keys() - {"collect"}
    receipt: Receipt  # of the last token charged to k

    def __init__(self, dsn: str) -> None:
        super().__init__(dsn)
        self.limiter = RateLimiter(self.store, self.rates, name="l", timeout=20)

    def reset(self, state: str) -> None:
        flows = self.limiter._flows
        tokens = {"used": 2, "spent": BURST, "queued": BURST + 2, "full": -1}.get(state)
        self.conn.execute("DELETE FROM kv_store")
        now: Any = self.conn.execute(
            "SELECT (extract(epoch FROM statement_timestamp()) * 1000000)::bigint * 1000,"
            f" {YEAR}::bigint"
        ).fetchone()
        tat = now[0] + round((tokens or 0) * TOKEN * NS)
        values = [
            now[1] + max(tokens or 0, 0) if isinstance(rate, pgkv.Quota) else tat
            for rate in flows.rates
        ]
        rows = [flows.row(key, flows.policy) for key in "kz"]
        incs = flows.policy.charge(1).incs
        OneRate.receipt = Receipt(os.getpid(), rows[0], CREATED, incs, values, flows.policy.shape)
        if tokens is not None:
            self.conn.execute(
                f"INSERT INTO kv_store SELECT k, %s::text::bytea, to_timestamp(%s / 1e9 + {KEPT_SECONDS}),"
                " '2000-01-01 00:00:00+00', now(), %s FROM unnest(%s::text[]) k",
                [" ".join(map(str, values)), tat, VERSION, [row.decode() for row in rows]],
            )

    def on(self, conn: psycopg.Connection | None) -> RateLimiter:
        return self.limiter if conn is None else self.limiter.using(conn)

    def observe(self) -> Any:
        # The debt of each counter in tokens; and whether the row is the one of the beginning.
        return self.conn.execute(
            "SELECT right(key, 1), array(SELECT round((CASE WHEN tat::bigint < 1e6 + "
            f"{YEAR} THEN greatest(0, tat::bigint - {YEAR})"
            " ELSE greatest(0, tat::bigint - extract(epoch FROM now()) * 1e9) / %s"
            " END)::numeric, 1)::float"
            " FROM unnest(string_to_array(encode(value, 'escape'), ' ')) tat),"
            " created_at < '2001-01-01'"
            " FROM kv_store WHERE expires_at > now() ORDER BY key",
            [TOKEN * NS],
        ).fetchall()


class TwoRates(OneRate):
    """The same under two rates."""

    rates = "5/d; 50/1000d burst 5"


class RateAndQuota(OneRate):
    """The same under a rate and a calendar window."""

    rates = "5/d; 5/year"
    states = ("absent", "used", "spent")


# -- schedules

INTERVAL = 10.0


def limiter(world: World, burst: int) -> Any:
    return world.make("RateLimiter", pgkv.Rate(burst, burst * INTERVAL), name="r", timeout=60)


async def acquiring(world: World) -> None:
    """Wait for a token of a bucket that holds one."""
    decision = await limiter(world, 1).acquire("k", timeout=1000)
    assert decision.allowed
    world.memory.setdefault("admitted", []).append(world.now)


async def cancelling(world: World) -> None:
    """Reserve a token, and give it back."""
    reservation = await limiter(world, 1).reserve("k", max_wait=1000)
    await world.step("thinks")
    await reservation.cancel()


def hitting(*, refunds: bool = False, resets: bool = False) -> Client:
    """Take tokens of a bucket that holds two, and perhaps give them back."""

    async def client(world: World) -> None:
        it = limiter(world, 2)
        for _ in range(2):
            decision = await it.hit("k")
            world.memory["spent"] = world.memory.get("spent", 0) + decision.allowed
            if refunds and decision.allowed:
                world.memory["spent"] -= 1
                await it.refund("k")
            elif resets:
                world.memory["spent"] -= 2
                await it.reset("k")

    return client


async def hitting_both(world: World) -> None:
    """Take one of each of two buckets, or none."""
    it = limiter(world, 2)
    target = getattr(it, "_target", it)
    decision = await it.hit_many([(target, "k", 1), (target, "z", 1)])
    world.memory["spent"] = world.memory.get("spent", 0) + decision.allowed
    world.memory["both"] = world.memory.get("both", 0) + decision.allowed


def evenly(world: World, results: dict[str, Any]) -> None:
    """Never more than the bucket's bound: with a burst of 1, one in each interval."""
    assert not failed_by_itself(results), results
    admitted = sorted(world.memory.get("admitted", []))
    gaps = [b - a for a, b in itertools.pairwise(admitted)]
    # What was admitted is noted a moment later, as long as the machine takes.
    assert all(gap >= INTERVAL - 0.5 - world.took for gap in gaps), f"admitted at {admitted}"


def bounded(world: World) -> None:
    """What is spent and not given back is in the bucket, or has flowed back since."""
    now = world.now + max(0.0, world.ahead)
    since = now - world.memory["began"]
    spent = world.memory.get("spent", 0)
    assert spent <= 2 + since / INTERVAL + 0.1, f"{spent} were spent in {since:.0f} s"


def none_lost(world: World, results: dict[str, Any]) -> None:
    """No token is charged for nothing, and nothing outlives the time in which it flows back."""
    assert not failed_by_itself(results), results
    for key in "kz":
        flows = pgkv.RateLimiter(world.sync, pgkv.Rate(2, 2 * INTERVAL), name="r", timeout=60)
        left = flows.peek(key).remaining
        if key == "z" and all(not isinstance(each, type) for each in results.values()):
            assert left >= 2 - world.memory.get("both", 0), "one of two buckets was charged"
        world.pass_time(3 * INTERVAL)
        assert flows.peek(key).remaining == 2, "a bucket does not fill"


def of_limiter(name: str, clients: dict[str, Client], **options: Any) -> Scenario:
    def prepare(world: World) -> None:
        truncate(world, "")
        if "evicter" in clients:
            with_marks(world)
        world.memory["began"] = world.now

    return Scenario(name, clients, prepare=prepare, **options)


SUBJECTS = (OneRate, TwoRates, RateAndQuota)
SCENARIOS = (
    of_limiter(
        "limiter: acquire and cancel",
        {"A": acquiring, "B": acquiring, "C": cancelling},
        check=evenly,
    ),
    of_limiter(
        "limiter: cancel in the middle",
        {"A": acquiring, "C": cancelling, "D": cancelling, "E": acquiring},
        check=evenly,
        preemptions=2,
        kinds=("die",),
    ),
    of_limiter(
        "limiter: the server's clock goes back",
        {"A": acquiring, "B": acquiring, "C": cancelling},
        check=evenly,
        kinds=(),
        server_jumps=(-3600.0,),
        preemptions=2,
        small=1,
    ),
    of_limiter(
        "limiter: refund",
        {"A": hitting(), "B": hitting(refunds=True), "C": hitting(refunds=True)},
        invariant=bounded,
        check=none_lost,
        preemptions=2,
    ),
    of_limiter(
        "limiter: several keys",
        {"A": hitting(), "B": hitting_both, "C": hitting_both, "D": hitting(resets=True)},
        invariant=bounded,
        check=none_lost,
        preemptions=2,
    ),
    of_limiter(
        "limiter: clocks jump",
        {"A": hitting(), "B": hitting(refunds=True), "C": hitting_both},
        invariant=bounded,
        check=none_lost,
        kinds=("lose",),
        jumps=(INTERVAL,),
        server_jumps=(INTERVAL,),
        preemptions=2,
    ),
    of_limiter(
        "limiter: evicted",
        {"A": hitting(), "B": hitting(), "evicter": evicting},
        invariant=bounded,
        check=none_lost,
        kinds=(),
        preemptions=2,
    ),
)
