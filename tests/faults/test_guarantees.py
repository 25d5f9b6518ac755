"""What docs/guarantees.md says of a fault and no other test shows: a fail-over, a lock table dropped
under its holders, a killed client, a step of the server's clock under sessions; patterns behind a
pooler, with answers that are lost, or without a connection."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from psycopg.conninfo import make_conninfo

import pgkv
from pgkv import TableType
from pgkv.patterns._runtime import lease as _lease
from pgkv.patterns.session.data import id_of
from pgkv.testing import ServerClock
from tests.cached import cached_in
from tests.faults.proxy import Proxy
from tests.faults.support import Standby, Witness, newest
from tests.servers import Server, wait_until
from tests.variants import Variant

pytestmark = newest
ROOT = Path(__file__).resolve().parents[2]


def test_a_failover_to_an_asynchronous_replica(pair: tuple[Server, Standby, str]) -> None:
    """The UNLOGGED table is empty and works; of what is logged the replicated part is there, and what
    was not replicated is undone: a lock has two holders until the first one's next renewal, its token
    rising; a session that was ended lives again; so does an invalidated entry of a REGULAR table. Work
    with an idempotency key, and an acknowledged job, come twice; effects in the same transaction do not."""
    primary, standby, dsn = pair
    with (
        pgkv.Store.connect(dsn) as store,
        pgkv.Store.connect(dsn, table_name="regular", table_type=TableType.REGULAR) as regular,
    ):
        limiter = pgkv.RateLimiter(store, "3/h", name="n", timeout=20)
        lock = pgkv.Lock(store, "n", ttl=600)  # its next renewal comes after the test
        sessions = pgkv.SessionStore(store)
        calls: list[int] = []

        @pgkv.cached(600, store=regular, store_timeout=20, beta=0)
        def count() -> int:
            calls.append(1)
            return len(calls)

        assert count() == 1
        store.set("k", "v")
        session = sessions.create({"a": 1}, user_id="u")
        assert [bool(limiter.hit("u")) for _ in range(4)] == [True, True, True, False]
        assert lock.holder() is None
        idem, queue = pgkv.Idempotency(store), pgkv.Queue(store, "q")
        idem.create_table()
        pgkv.Idempotency(regular).create_table()
        queue.put("job")
        regular.set("k", "v")  # waits for the disk, and so for what did not
        standby.catch_up()
        standby.cut_off()
        regular.set("k", "later")
        first = lock.acquire(timeout=20)
        assert sessions.destroy(session.id)
        count.invalidate()
        with idem.once("elsewhere"):
            pass
        with regular.transaction() as inside, pgkv.Idempotency(inside).once("here"):
            inside.set("effect", "of here")
        job = queue.take(timeout=20)
        assert job is not None
        job.ack()
        primary.kill()
        standby.promote()

        assert store.get("k") is None
        store.set("k", "w")
        assert store.get("k") == b"w"
        assert regular.get("k") == b"v"
        assert limiter.hit("u", cost=3)
        assert sessions.load(session.id) is not None
        assert count() == 1
        second = lock.acquire(timeout=20)
        assert second.token > first.token
        assert not first.is_lost
        with pytest.raises(pgkv.LeaseLostError):
            first.extend(30)
        with idem.once("elsewhere") as attempt:
            assert not attempt.is_replay
        assert regular.get("effect") is None  # lost with its record, and so done once in the end
        with pgkv.Idempotency(regular).once("here") as attempt:
            assert not attempt.is_replay
        with queue.take(timeout=20) as again:  # type: ignore[union-attr]  # it is there
            assert again.id == job.id


def test_a_dropped_lock_table_frees_every_name(
    dsn: str, witness: Witness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next grant has a larger token; the holder of before learns at its next renewal."""
    monkeypatch.setattr(_lease, "RENEW_SHARE", 0.02)  # soon, long before the lease ends
    with pgkv.Store.connect(dsn) as store:
        lock = pgkv.Lock(store, "n", ttl=30)
        first = lock.acquire()
        witness.conn.execute("DROP TABLE kv_store_locks")
        second = lock.acquire(timeout=0)
        assert second.token > first.token
        wait_until(lambda: first.is_lost, "the first holder hears")
        second.check()


def test_a_killed_clients_statement_may_finish(dsn: str, witness: Witness) -> None:
    """kill -9 of a process whose write waits for a row lock: the write happens all the same."""
    with pgkv.Store.connect(dsn) as store:
        store.set("k", "before")
        program = "import sys, pgkv; pgkv.Store.connect(sys.argv[1]).set('k', 'after')"
        where = make_conninfo(dsn, application_name="doomed")
        with witness.lock("k"):
            process = subprocess.Popen(
                [sys.executable, "-c", program, where],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
            wait_until(lambda: witness.waiting("doomed") == 1, "its write waits")
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert store.get("k") == b"before"
        wait_until(lambda: store.get("k") == b"after", "the write happens")


def test_sessions_move_with_the_servers_clock(dsn: str, clock: ServerClock) -> None:
    """A step back lengthens a session by the step, a step forward ends it that much earlier."""
    with pgkv.Store.connect(dsn) as store:
        sessions = pgkv.SessionStore(store, idle_timeout=600, touch_interval=60)
        token = sessions.create({"a": 1}).id
        clock.advance(-3600)
        assert sessions.load(token) is not None
        clock.advance(3600 + 540)
        assert sessions.load(token) is not None
        clock.advance(601)
        assert sessions.load(token) is None


async def test_answers_of_patterns_that_are_lost(
    dsn: str, make_store: Any, variant: Variant
) -> None:
    """The server has committed and its answer is lost. A hit is not sent again: charged once, and
    decided by on_error. A value whose fill was lost is returned. A session's load is repeated, its
    creation is not."""
    with Proxy(dsn) as proxy:
        store = await make_store(dsn=proxy.dsn)
        limiter = variant.make("RateLimiter", store, "3/h", name="n", timeout=20)
        assert await limiter.hit("u")
        proxy.arm(b"pgkv:rate:n:u")
        with pytest.raises(pgkv.StoreUnavailableError) as caught:
            await limiter.hit("u")
        assert caught.value.outcome_unknown
        assert (await limiter.peek("u")).remaining == 1

        calls: list[int] = []

        @cached_in(variant, store)
        async def slow() -> str:
            calls.append(1)
            return "marked value"

        lost = proxy.arm(b"marked value")
        assert [await slow(), await slow()] == ["marked value"] * 2
        assert lost.met == len(calls) == 1  # the fill had happened: the second call is a hit

        sessions = variant.make("SessionStore", store)
        proxy.arm(b"marked data")
        with pytest.raises(pgkv.StoreUnavailableError) as caught:
            await sessions.create({"a": "marked data"})
        assert caught.value.outcome_unknown
        session = await sessions.create({"a": 1})
        lost = proxy.arm(id_of(session.id))
        assert (await sessions.load(session.id)).data == {"a": 1}
        assert lost.met == 1


async def test_an_exhausted_pool(make_store: Any, variant: Variant) -> None:
    """While a transaction has the only connection a limiter goes by on_error, a cached function runs,
    and sessions raise, each in its time."""
    store = await make_store(pool_max_size=1, pool_timeout=0.3)
    hasty, limiter = (
        variant.make("RateLimiter", store, "3/h", name="n", on_error="open", timeout=seconds)
        for seconds in (0.1, 20)
    )
    sessions = variant.make("SessionStore", store)
    token = (await sessions.create({"a": 1})).id

    @cached_in(variant, store, store_timeout=0.1)
    async def one() -> int:
        return 1

    async with store.transaction():
        assert (await hasty.hit("u")).degraded
        assert await one() == 1
        with pytest.raises(pgkv.PoolTimeoutError):
            await sessions.load(token)
    assert one.cache_info().errors == 1
    assert not (await limiter.hit("u")).degraded
