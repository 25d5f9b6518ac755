"""Every two operations on a limiter's rows, overlapping: see `pairs`."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import psycopg
import pytest

from pgkv import Decision, RateLimitedError, RateLimiter, Store, TtlCleanupStrategy
from pgkv._ops.op import Op
from pgkv.patterns.rate_limit.flows import Receipt
from tests.interleavings.pairs import Operation, Pairs, pairs_of

BURST = 5
TOKEN = 86_400 / BURST  # seconds: that many times slower than the test
NS = 10**9
CREATED = struct.pack(">q", 0)  # 2000-01-01
COST = {"a": 1, "b": 2}
VERSION = 7


def told(decision: Decision) -> Any:
    """What a decision says, in tokens."""
    return decision.allowed, decision.remaining, round(decision.retry_after / TOKEN, 1)


def reserved(limiter: RateLimiter, cost: int) -> Any:
    """The place in the queue, in tokens."""
    try:
        return round(limiter.reserve("k", cost, max_wait=4 * TOKEN).delay / TOKEN, 1)
    except RateLimitedError as error:
        return told(error.decision)


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
        flows.sql.rebase(row, struct.pack(">q", VERSION), len(flows.rates))
        if name == "rebase"
        else limiter._store._sql.collect([row])
    )
    limiter._store._execute(made)


OPERATIONS: dict[str, Operation[RateLimiter]] = {
    "hit": lambda it, x: told(it.hit("k", COST[x])),
    "hit all": lambda it, x: told(it.hit("k", BURST)),
    "hit_many": lambda it, x: told(it.hit_many([(it, "k", COST[x]), (it, "z", 1)])),
    "hit_many alone": lambda it, x: told(it.hit_many([(it, "k", BURST - 1)])),
    "reserve": lambda it, x: reserved(it, COST[x]),
    "peek": lambda it, x: told(it.peek("k", COST[x])),
    "reset": lambda it, x: it.reset("k"),
    "refund": lambda it, x: it.refund("k", COST[x]),
    "cancel": lambda it, x: it._run(it._flows.cancel(LimiterSubject.receipt)),
    "rebase": lambda it, x: op(it, "rebase"),
    "collect": lambda it, x: op(it, "collect"),
}
# Several statements in one transaction: only as the one that is waited for.
TRANSACTIONS: dict[str, Operation[RateLimiter]] = {"rewrite": rewrite, "rewrite both": rewrite_both}


class LimiterSubject:
    """Two buckets, k and z: absent, partly used, with nothing left, overdrawn by reservations, or
    full again."""

    operations: Mapping[str, Operation[RateLimiter]] = OPERATIONS | TRANSACTIONS
    states: tuple[str, ...] = ("absent", "used", "spent", "queued", "full")
    # Nothing weaker: a transaction is one step.
    transactions: Mapping[str, tuple[str, ...]] = {}
    on_existing: Mapping[tuple[str, str], str] = {}
    receipt: Receipt  # of the last token charged to k

    def __init__(self, dsn: str, rates: str) -> None:
        self.store = Store.connect(
            dsn, ttl_cleanup_strategy=TtlCleanupStrategy.MANUAL, pool_max_size=1
        )
        self._pid: int = self.store._channel._pool.idle[-1].pgconn.backend_pid  # type: ignore[union-attr]  # a PoolChannel
        self._conn = psycopg.connect(dsn, autocommit=True)
        self.limiter = RateLimiter(self.store, rates, name="l", timeout=20)

    def close(self) -> None:
        self._conn.close()
        self.store.close()

    def reset(self, state: str) -> None:
        flows = self.limiter._flows
        tokens = {"used": 2, "spent": BURST, "queued": BURST + 2, "full": -1}.get(state)
        self._conn.execute("DELETE FROM kv_store")
        now: Any = self._conn.execute(
            "SELECT (extract(epoch FROM statement_timestamp()) * 1000000)::bigint * 1000"
        ).fetchone()
        tat = now[0] + round((tokens or 0) * TOKEN * NS)
        rows = [flows.row(key, flows.policy) for key in "kz"]
        incs = flows.policy.charge(1).incs
        type(self).receipt = Receipt(os.getpid(), rows[0], CREATED, incs, [tat] * len(incs))
        if tokens is not None:
            self._conn.execute(
                "INSERT INTO kv_store SELECT k, %s::text::bytea, to_timestamp(%s / 1e9),"
                " '2000-01-01 00:00:00+00', now(), %s FROM unnest(%s::text[]) k",
                [" ".join([str(tat)] * len(incs)), tat, VERSION, [row.decode() for row in rows]],
            )

    def using(self, conn: psycopg.Connection) -> RateLimiter:
        return self.limiter.using(conn)

    def alone(self) -> RateLimiter:
        return self.limiter

    def alone_pid(self) -> int:
        return self._pid

    def observe(self) -> Any:
        # The debt of each bucket in tokens; and whether the row is the one of the beginning.
        return self._conn.execute(
            "SELECT right(key, 1), array(SELECT round((greatest(0, tat::bigint -"
            " extract(epoch FROM now()) * 1e9) / %s)::numeric, 1)::float"
            " FROM unnest(string_to_array(encode(value, 'escape'), ' ')) tat),"
            " created_at < '2001-01-01'"
            " FROM kv_store WHERE expires_at > now() ORDER BY key",
            [TOKEN * NS],
        ).fetchall()


@pytest.fixture(params=["5/d", "5/d; 50/1000d burst 5"], ids=["one rate", "two rates"])
def subject(dsn: str, request: pytest.FixtureRequest) -> Iterator[LimiterSubject]:
    made = LimiterSubject(dsn, request.param)
    yield made
    made.close()


@pytest.fixture
def pairs(subject: LimiterSubject, dsn: str) -> Iterator[Pairs[RateLimiter]]:
    with pairs_of(subject, dsn) as made:
        yield made


@pytest.mark.parametrize("a", OPERATIONS | TRANSACTIONS)
def test_pairs(pairs: Pairs[RateLimiter], a: str) -> None:
    """A open while B runs, for every B, from every state: as one after the other."""
    wrong = [each for b in OPERATIONS for each in pairs.wrong(a, b)]
    assert not wrong, "\n".join(wrong)


def test_every_statement_has_its_part(subject: LimiterSubject) -> None:
    """The operations above send every statement that the limiter has."""
    for name in OPERATIONS:
        subject.reset("used")
        subject.operations[name](subject.limiter, "a")
    sql = subject.limiter._flows.sql
    made = {each.name for each in sql._made.values()}
    names = ("hit", "hit_many", "peek", "reset", "refund", "cancel", "rebase")
    assert made == {f"limit_{name}" for name in names}
