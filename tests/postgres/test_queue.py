"""Queues: what happens to a job, in sync and async, and every promise as an arranged race."""

from __future__ import annotations

import asyncio
import gc
import math
from datetime import datetime, timedelta
from typing import Any

import psycopg
import pytest
from psycopg import IsolationLevel

import pgkv
from pgkv import (
    Backoff,
    ConfigError,
    ConflictError,
    InvalidKeyError,
    InvalidValueError,
    LeaseLostError,
    SerializationError,
    TransactionError,
)
from pgkv._background.renewal import clock as clock_now
from pgkv.testing import ServerClock
from tests.peers import Peer, fetch, until
from tests.variants import Variant, in_a_hurry, inside

LEASE = 60
JOBS = "kv_store_jobs"


@pytest.fixture
def queue(store: Any, variant: Variant) -> Any:
    """A queue with the default settings, but no pause between attempts."""
    return queue_of(variant, store)


def queue_of(variant: Variant, store: Any, name: str = "q", **options: Any) -> Any:
    return variant.make("Queue", store, name, **{"backoff": Backoff(0), **options})


async def taken(queue: Any) -> Any:
    """The next job, which has to be there."""
    job = await queue.take()
    assert job is not None
    return job


async def counts(queue: Any) -> tuple[int, int, int, int]:
    """Jobs that wait, are delayed, run and are dead."""
    found = await queue.stats()
    return found.waiting, found.delayed, found.running, found.dead


# -- one job -------------------------------------------------------------------------------


async def test_a_job_is_taken_once_and_gone_when_acknowledged(queue: Any) -> None:
    """put, take, ack: no other taker is given it, and then it is gone."""
    put = await queue.put(b"work")
    assert put == (put.id, "new")
    job = await taken(queue)
    assert (job.id, job.payload, job.attempt, job.queue, job.dedupe) == (
        put.id, b"work", 1, "q", None,
    )  # fmt: skip
    assert await queue.take() is None
    assert await counts(queue) == (0, 0, 1, 0)
    await job.ack()
    assert await counts(queue) == (0, 0, 0, 0)
    with pytest.raises(LeaseLostError, match="acknowledged or put back"):
        await job.ack()


async def test_a_block_acknowledges_or_puts_back(queue: Any) -> None:
    """`with job`: acknowledged at its end, put back with the failure's text if it raises."""
    await queue.put("a")
    with pytest.raises(ZeroDivisionError):
        async with await taken(queue):
            raise ZeroDivisionError("no")
    (row,) = await queue.jobs()
    assert (row.state, row.error, row.attempt) == ("waiting", "ZeroDivisionError: no", 1)
    async with await taken(queue) as job:
        assert (job.attempt, job.payload) == (2, b"a")
    assert await counts(queue) == (0, 0, 0, 0)


async def test_a_job_ended_in_its_block_is_left_alone(queue: Any) -> None:
    """What the block did to the job itself stands."""
    await queue.put("a")
    async with await taken(queue) as job:
        await job.release(30)
    assert await counts(queue) == (0, 1, 0, 0)


async def test_a_released_job_has_lost_no_attempt(queue: Any) -> None:
    """release gives the attempt back; nack does not."""
    await queue.put("a")
    assert await (await taken(queue)).release()
    job = await taken(queue)
    assert job.attempt == 1
    assert await job.nack(0, "failed")
    assert (await taken(queue)).attempt == 2


async def test_out_of_attempts_a_job_is_dead(store: Any, variant: Variant) -> None:
    """After its last failed attempt it is kept apart until it is retried or purged."""
    queue = queue_of(variant, store, max_attempts=2)
    await queue.put("a")
    for _ in range(2):
        await (await taken(queue)).nack(error="bad luck")
    assert await queue.take() is None
    (row,) = await queue.jobs("dead")
    assert (row.attempt, row.error) == (2, "bad luck")
    assert await queue.retry(row.id)
    assert not await queue.retry(row.id)
    job = await taken(queue)
    assert job.attempt == 1
    await job.bury("hopeless")
    assert await counts(queue) == (0, 0, 0, 1)
    assert await queue.purge() == 1
    assert await counts(queue) == (0, 0, 0, 0)


async def test_a_job_that_kills_its_workers_dies(
    store: Any, variant: Variant, clock: ServerClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Each take is an attempt: leases that end use them up, and the take after that buries it."""
    queue = queue_of(variant, store, max_attempts=2)
    await queue.put("poison")
    held = []
    for _ in range(2):
        held.append(await taken(queue))
        clock.advance(LEASE + 1)
    await queue.put("other")
    await look_at_all(queue)
    assert (await taken(queue)).payload == b"other"
    assert [row.payload for row in await queue.jobs("dead")] == [b"poison"]
    assert "pgkv.queue.dead" in caplog.text
    assert not await held[1].nack()


async def look_at_all(queue: Any) -> None:
    """Let the next look be a full one."""
    inside(queue)._options.marks._full_from = 0.0


async def look_by_the_marks(queue: Any) -> None:
    """Let no further look be a full one."""
    inside(queue)._options.marks._full_from = math.inf


async def test_a_failed_job_waits_longer_each_time(store: Any, variant: Variant) -> None:
    """The backoff grows by its factor, up to its longest; a given delay counts instead."""
    backoff = Backoff(10, 2, max=25)
    for attempt, longest in ((1, 10), (2, 20), (3, 25), (50, 25)):
        assert longest / 2 <= backoff.seconds(attempt) <= longest
    queue = queue_of(variant, store, backoff=backoff)
    await queue.put("a")
    await (await taken(queue)).nack()
    assert await counts(queue) == (0, 1, 0, 0)


async def test_order(queue: Any) -> None:
    """High priorities first; within one by the time they are due; of put_many in their order."""
    for payload, priority in (("low", 0), ("high", 9), ("middle", 5)):
        await queue.put(payload, priority=priority)
    await queue.put_many([b"%d" % n for n in range(5)], priority=7)
    assert await payloads(queue) == ["high", "0", "1", "2", "3", "4", "middle", "low"]


async def payloads(queue: Any) -> list[str]:
    """All that can be taken, one by one, and acknowledged."""
    found = []
    while (job := await queue.take()) is not None:
        found.append(job.payload.decode())
        await job.ack()
    return found


async def test_many(queue: Any) -> None:
    """take_many and ack_many concern many jobs in one statement; jobs with a key as well."""
    ids = await queue.put_many([b"%d" % n for n in range(2500)])
    assert ids == sorted(ids)
    assert len(ids) == 2500
    keyed = await queue.put("keyed", dedupe="k", priority=9)
    jobs = await queue.take_many(2000)
    assert [job.id for job in jobs] == [keyed.id, *ids[:1999]]
    assert await queue.put("again", dedupe="k") == (keyed.id, "again")
    assert await queue.ack_many(jobs) == []
    assert await counts(queue) == (502, 0, 0, 0)


async def test_many_are_put_all_or_none(queue: Any) -> None:
    """One payload that is refused, and nothing is put."""
    await queue.put("first")
    with pytest.raises(InvalidValueError):
        await queue.put_many(["a", 17])
    assert await queue.put_many([]) == []
    assert await counts(queue) == (1, 0, 0, 0)


async def test_of_many_the_lost_ones_are_told(queue: Any, clock: ServerClock) -> None:
    """ack_many returns the jobs that were given to others."""
    await queue.put_many(["a", "b"])
    first = await queue.take_many(2)
    clock.advance(LEASE + 1)
    await look_at_all(queue)
    second = await taken(queue)
    lost = await queue.ack_many(first)
    assert [job.id for job in lost] == [second.id]
    await second.ack()


async def test_delayed_jobs(queue: Any, clock: ServerClock) -> None:
    """A job is not given before its time: after `delay` seconds, or at a moment."""
    await queue.put("soon", delay=100)
    await queue.put("at", at=datetime.now().astimezone() + timedelta(seconds=50))
    assert await counts(queue) == (0, 2, 0, 0)
    clock.advance(60)
    assert (await taken(queue)).payload == b"at"
    assert await queue.take() is None
    clock.advance(60)
    assert (await taken(queue)).payload == b"soon"


async def test_a_delayed_job_ends_a_wait_in_time(queue: Any) -> None:
    """Who waits with a timeout wakes for a job that becomes due meanwhile, not at the next poll."""
    await queue.put("soon", delay=0.3)
    job = await asyncio.wait_for(queue.take(timeout=30), 20)
    assert job.payload == b"soon"


async def test_typed_payloads(queue: Any) -> None:
    """typed() gives values of a type back, and refuses others before anything is sent."""
    orders = queue.typed(dict[str, int])
    await orders.put({"order": 17})
    assert (await taken(orders)).payload == {"order": 17}
    with pytest.raises(SerializationError):
        await orders.put({"order": "no"})
    await queue.put("no JSON")
    job = await taken(orders)
    with pytest.raises(SerializationError):
        _ = job.payload
    assert await job.bury("no order")


async def test_queues_do_not_mix(store: Any, variant: Variant) -> None:
    """Each name, and each namespace, is a queue of its own."""
    one, two = (queue_of(variant, store, name) for name in ("one", "two"))
    inner = queue_of(variant, store.namespace("ns:"), "one")
    for queue in (one, two, inner):
        await queue.put(queue.name if queue is not inner else "inner")
    assert (await taken(inner)).payload == b"inner"
    assert (await taken(two)).payload == b"two"
    assert (await taken(one)).payload == b"one"


async def test_a_waiting_job_is_cancelled_a_running_one_is_not(queue: Any) -> None:
    """cancel removes what no worker has."""
    first, second = await queue.put("a"), await queue.put("b")
    job = await taken(queue)
    assert not await queue.cancel(first.id)
    assert await queue.cancel(second.id)
    await job.ack()
    assert await counts(queue) == (0, 0, 0, 0)


BAD_PUTS: list[dict[str, Any]] = [
    {"payload": 17},
    {"payload": "x" * (pgkv.Config("postgresql://").max_value_size + 1)},
    {"delay": -1},
    {"delay": math.nan},
    {"at": datetime(2030, 1, 1)},  # noqa: DTZ001  # naive on purpose
    {"at": datetime.now().astimezone(), "delay": 1},
    {"priority": 10},
    {"priority": -1},
    {"priority": True},
]


@pytest.mark.parametrize("wrong", BAD_PUTS, ids="-".join)
async def test_bad_input_is_refused(
    queue: Any, wrong: dict[str, Any], operations: list[Any]
) -> None:
    """Nothing is sent for arguments that cannot be meant."""
    with pytest.raises(InvalidValueError) as refused:
        await queue.put(**{"payload": b"", **wrong})
    assert "xxx" not in str(refused.value)
    assert not operations


async def test_settings_are_checked(store: Any, variant: Variant) -> None:
    """Names, leases and modes that cannot be."""
    with pytest.raises(InvalidKeyError):
        queue_of(variant, store, "")
    for lease in (0.5, math.nan):
        with pytest.raises(InvalidValueError):
            queue_of(variant, store, lease=lease)
    bad: list[dict[str, Any]] = [
        {"wakeup": "x"}, {"max_attempts": 0}, {"backoff": 3},
    ]  # fmt: skip
    for settings in bad:
        with pytest.raises(ConfigError):
            queue_of(variant, store, **settings)
    with pytest.raises(InvalidValueError):
        Backoff(1, 0.5)
    async with store.transaction() as tx:
        with pytest.raises(TransactionError, match="taken"):
            queue_of(variant, tx)


# -- leases --------------------------------------------------------------------------------


async def test_after_its_lease_a_job_is_given_to_another(
    store: Any, queue: Any, variant: Variant, clock: ServerClock
) -> None:
    """The job of a worker that is gone comes back, with a larger token; what the old worker says of
    it then is refused."""
    await queue.put("a")
    old = await taken(queue)
    clock.advance(LEASE - 30)
    other = queue_of(variant, store)
    assert await other.take() is None
    clock.advance(31)
    await look_at_all(other)
    new = await taken(other)
    assert new.token > old.token
    assert new.attempt == 2
    assert not await old.nack()
    with pytest.raises(LeaseLostError):
        await old.ack()
    await new.ack()
    assert await counts(queue) == (0, 0, 0, 0)


async def test_a_waiting_take_gets_the_job_of_a_dead_worker(queue: Any, clock: ServerClock) -> None:
    """It has looked past that job, which another one had, and looks at everything from time to time."""
    await queue.put("dead")
    dead = await queue.take()
    clock.advance(10)
    await queue.put("done")
    await (await queue.take()).ack()
    waiting = asyncio.ensure_future(queue.take(timeout=60))
    clock.advance(61)
    job = await waiting
    assert (job.id, job.payload) == (dead.id, b"dead")
    assert job.token > dead.token
    await job.ack()


async def test_a_late_ack_counts_if_nobody_took_the_job(queue: Any, clock: ServerClock) -> None:
    """The work was done once: there is nothing to do again."""
    await queue.put("a")
    job = await taken(queue)
    clock.advance(LEASE + 1)
    await job.ack()
    assert await counts(queue) == (0, 0, 0, 0)


async def test_renewal_keeps_a_job(queue: Any, peer: Peer) -> None:
    """A job is renewed in the background at a third of its lease."""
    await queue.put("a")
    job = await taken(queue)
    assert inside(job)._due - inside(job)._began == pytest.approx(LEASE / 3)
    first = peer.one(f"SELECT leased_until FROM {JOBS}")
    inside(job)._due = 0.0
    await until(lambda: peer.one(f"SELECT leased_until FROM {JOBS}") > first, "it is renewed")
    assert not job.is_lost
    job.check()
    await job.ack()


async def test_extend(queue: Any, peer: Peer) -> None:
    """extend gives a job as much time as is asked for, counted from now."""
    await queue.put("a")
    job = await taken(queue)
    await job.extend(1000)
    left = peer.one(f"SELECT extract(epoch FROM leased_until - now()) FROM {JOBS}")
    assert 900 < left <= 1000
    await job.ack()


async def test_a_job_that_was_taken_over_is_noticed(
    store: Any, queue: Any, variant: Variant, clock: ServerClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The next renewal finds out that a job has another worker: check raises, and it is logged."""
    await queue.put("a")
    job = await taken(queue)
    clock.advance(LEASE + 1)
    await look_at_all(queue)
    other = await taken(queue)
    with pytest.raises(LeaseLostError, match="taken by another"):
        await job.extend(LEASE)
    with pytest.raises(LeaseLostError, match="done again elsewhere"):
        job.check()
    assert "pgkv.queue.lost" in caplog.text
    await other.ack()


async def test_a_locked_job_costs_the_others_nothing(queue: Any, peer: Peer, connect: Any) -> None:
    """A job that a transaction has locked is neither waited for by a take nor by a renewal."""
    first, second = await queue.put("a"), await queue.put("b")
    with peer.conn.transaction():
        peer.run(f"SELECT 1 FROM {JOBS} WHERE id = %s FOR UPDATE", first.id)
        job = await asyncio.wait_for(taken(queue), 30)
        assert job.id == second.id
        peer.run(f"SELECT 1 FROM {JOBS} WHERE id = %s FOR NO KEY UPDATE", first.id)
        await asyncio.wait_for(job.extend(LEASE), 30)
    await look_at_all(queue)
    assert (await taken(queue)).id == first.id


async def test_a_step_of_the_clock_forward_ends_leases(queue: Any, clock: ServerClock) -> None:
    """A clock that steps forward makes leases end and delays pass early; tokens rise all the same."""
    await queue.put("a")
    old = await taken(queue)
    await queue.put("b", delay=1000)
    clock.advance(3600)
    await look_at_all(queue)
    new = await queue.take_many(5)
    assert {job.payload for job in new} == {b"a", b"b"}
    assert next(job for job in new if job.id == old.id).token > old.token


async def test_a_step_of_the_clock_back(queue: Any, clock: ServerClock) -> None:
    """After a step back new jobs are found at the latest by the next full look, and tokens rise."""
    await queue.put("a")
    first = await taken(queue)
    assert await queue.take() is None, "the mark lies at the clock now"
    await look_by_the_marks(queue)
    clock.set_offset(-3600)
    await queue.put("b")
    await look_at_all(queue)
    assert (await taken(queue)).payload == b"b"
    await first.release()
    second = await taken(queue)
    assert (second.id, second.payload) == (first.id, b"a")
    assert second.token > first.token


# -- in the caller's transaction -----------------------------------------------------------


async def test_a_put_commits_with_the_callers_transaction(queue: Any, connect: Any) -> None:
    """No taker is given a job before the commit; after a rollback there is none."""
    await queue.create_table()
    conn = await connect()
    await queue.using(conn).put("a")
    await queue.using(conn).put_many(["b", "c"])
    assert await queue.take() is None
    await conn.rollback()
    assert await counts(queue) == (0, 0, 0, 0)
    await queue.using(conn).put("a")
    await conn.commit()
    await look_at_all(queue)
    assert (await taken(queue)).payload == b"a"


async def test_a_put_that_commits_late_is_found(
    queue: Any, connect: Any, clock: ServerClock
) -> None:
    """The mark has passed the due time of a put that was not committed yet: the next full look goes back."""
    await queue.create_table()
    conn = await connect()
    await queue.using(conn).put("late")
    clock.advance(5)
    assert await queue.take() is None, "a full look, which sets the mark"
    await look_by_the_marks(queue)
    await conn.commit()
    assert await queue.take() is None, "the mark hides it"
    await queue.put("next")
    assert (await taken(queue)).payload == b"next"
    await look_at_all(queue)
    assert (await taken(queue)).payload == b"late"


async def test_a_full_look_that_takes_too_long_stops_no_queue(
    make_store: Any, variant: Variant, peer: Peer
) -> None:
    """Where it is not answered in time, the next looks go by the marks: jobs are taken all the same."""
    store = await make_store(retry=None)
    queue = queue_of(variant, store)
    await queue.put("a")
    assert (await taken(queue)).payload == b"a"
    await look_at_all(queue)
    with peer.conn.transaction():
        peer.run(f"LOCK TABLE {JOBS}")
        begun = clock_now()
        with in_a_hurry(store, 0.5), pytest.raises(pgkv.OperationTimeoutError):
            await queue.take()
    assert inside(queue)._options.marks._full_from - begun > 2


async def test_a_put_in_the_stores_transaction(store: Any, queue: Any) -> None:
    """using() takes the store of store.transaction() as well."""
    await queue.create_table()
    async with store.transaction() as tx:
        await tx.set("k", "v")
        await queue.using(tx).put("a")
    await look_at_all(queue)
    assert (await taken(queue)).payload == b"a"


async def test_an_ack_commits_with_its_effect(
    store: Any, queue: Any, variant: Variant, connect: Any, clock: ServerClock
) -> None:
    """While the transaction is open no taker is given the job, though its lease has ended; after the
    commit it is gone."""
    await queue.put("a")
    job = await taken(queue)
    conn = await connect()
    await queue.using(conn).ack(job)
    clock.advance(LEASE + 1)
    other = queue_of(variant, store)
    assert await other.take() is None
    await conn.commit()
    await look_at_all(other)
    assert await other.take() is None
    assert await counts(queue) == (0, 0, 0, 0)


async def test_an_ack_that_is_rolled_back_did_not_happen(queue: Any, connect: Any) -> None:
    """The job is still this worker's, who can go on with it."""
    await queue.put("a")
    job = await taken(queue)
    conn = await connect()
    await queue.using(conn).ack(job)
    await conn.rollback()
    assert await counts(queue) == (0, 0, 1, 0)
    assert await job.nack(0)
    async with await taken(queue) as job:
        await queue.using(conn).ack(job)
        await conn.commit()
    assert await counts(queue) == (0, 0, 0, 0)


async def test_an_ack_after_a_takeover_is_refused(
    store: Any, queue: Any, connect: Any, clock: ServerClock
) -> None:
    """The transaction of a worker that lost its job is told so before it commits."""
    await queue.put("a")
    job = await taken(queue)
    clock.advance(LEASE + 1)
    await look_at_all(queue)
    other = await taken(queue)
    conn = await connect()
    with pytest.raises(LeaseLostError):
        await queue.using(conn).ack(job)
    await conn.rollback()
    await other.ack()


@pytest.mark.parametrize("change", ["takeover", "renewal"])
async def test_an_ack_on_an_older_snapshot_is_refused(
    queue: Any, connect: Any, clock: ServerClock, change: str
) -> None:
    """Above READ COMMITTED a transaction that began before a takeover, or a renewal, fails with 40001
    and may be repeated."""
    await queue.put("a")
    job = await taken(queue)
    conn = await connect()
    await conn.set_isolation_level(IsolationLevel.REPEATABLE_READ)
    await fetch(conn, "SELECT 1")
    if change == "takeover":
        clock.advance(LEASE + 1)
        await look_at_all(queue)
        await taken(queue)
    else:
        await job.extend(LEASE)
    with pytest.raises(pgkv.QueryError) as refused:
        await queue.using(conn).ack(job)
    assert refused.value.sqlstate == "40001"
    assert refused.value.retryable
    await conn.rollback()


async def test_a_job_acknowledged_in_a_transaction_is_not_abandoned(
    queue: Any, connect: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """When its object is dropped after the commit the log says nothing; of one that was not
    acknowledged it does."""
    for payload in (b"one", b"two"):
        await queue.put(payload)
    conn = await connect()
    job = await taken(queue)
    await queue.using(conn).ack(job)
    await conn.commit()
    job = await taken(queue)
    name = job.name
    del job
    gc.collect()
    with caplog.at_level("WARNING", "pgkv"):
        await until(lambda: f"pgkv.queue.abandoned job={name}" in caplog.text, "it is noticed")
    assert caplog.text.count("pgkv.queue.abandoned") == 1


async def test_an_ack_needs_a_transaction(queue: Any, connect: Any) -> None:
    """In autocommit it would not be one with its effect."""
    await queue.put("a")
    job = await taken(queue)
    conn = await connect(autocommit=True)
    with pytest.raises(TransactionError, match="autocommit"):
        await queue.using(conn).ack(job)
    async with conn.transaction():
        await queue.using(conn).ack(job)
    assert await counts(queue) == (0, 0, 0, 0)


async def test_nothing_is_taken_inside_a_transaction(queue: Any, connect: Any) -> None:
    """A take that is rolled back would have given its token twice."""
    conn = await connect()
    with pytest.raises(TransactionError, match="not taken"):
        await queue.using(conn).take()


async def test_a_job_dropped_after_its_ack_is_no_loss(
    queue: Any, connect: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A renewal that finds the row gone after the commit tells of nothing."""
    await queue.put("a")
    job = await taken(queue)
    conn = await connect()
    await queue.using(conn).ack(job)
    await conn.commit()
    with pytest.raises(LeaseLostError):
        await job.extend(30)
    assert "pgkv.queue.lost" not in caplog.text


# -- dedupe --------------------------------------------------------------------------------


async def test_one_waiting_job_per_key(queue: Any) -> None:
    """A second put of a key that waits puts nothing; after its run there is another one."""
    first = await queue.put("one", dedupe="k")
    assert await queue.put("two", dedupe="k") == (first.id, "waiting")
    other = await queue.put("three", dedupe="other")
    assert other.outcome == "new"
    assert await payloads(queue) == ["one", "three"]
    assert (await queue.put("four", dedupe="k")).outcome == "new"


async def test_a_key_that_runs_will_run_again(queue: Any) -> None:
    """What is put while a job of the key runs is run after it, with the new payload, once."""
    first = await queue.put("old", dedupe="k")
    job = await taken(queue)
    assert await queue.put("new", dedupe="k") == (first.id, "again")
    assert await queue.put("newer", dedupe="k") == (first.id, "waiting")
    assert await queue.take() is None, "never two at once for a key"
    await job.ack()
    second = await taken(queue)
    assert (second.payload, second.attempt) == (b"new", 1)
    await second.ack()
    assert await counts(queue) == (0, 0, 0, 0)


@pytest.mark.parametrize("end", ["nack", "release", "bury", "lease"])
async def test_however_a_run_ends_a_key_put_meanwhile_runs(
    queue: Any, clock: ServerClock, end: str
) -> None:
    """A put is not lost with the run that it found, not even if that is buried or its worker dies."""
    await queue.put("old", dedupe="k")
    job = await taken(queue)
    await queue.put("new", dedupe="k")
    if end == "lease":
        clock.advance(LEASE + 1)
        await look_at_all(queue)
    else:
        await getattr(job, end)()
    second = await taken(queue)
    assert (second.payload, second.attempt) == (b"new", 1)
    await second.ack()
    assert await counts(queue) == (0, 0, 0, 0)


async def test_a_late_ack_does_not_lose_a_put(queue: Any, clock: ServerClock) -> None:
    """A put after the end of a lease may be of what the old run has not seen: if that run is acknowledged
    all the same, the job runs again."""
    await queue.put("old", dedupe="k")
    job = await taken(queue)
    clock.advance(LEASE + 1)
    assert (await queue.put("new", dedupe="k")).outcome == "again"
    await job.ack()
    await look_at_all(queue)
    assert await payloads(queue) == ["new"]


async def test_a_dead_job_does_not_keep_its_key(queue: Any) -> None:
    """A key whose job is dead can be put; the dead one is not retried meanwhile."""
    first = await queue.put("one", dedupe="k")
    await (await taken(queue)).bury()
    assert (await queue.put("two", dedupe="k")).outcome == "new"
    with pytest.raises(ConflictError, match="dedupe key"):
        await queue.retry(first.id)
    await (await taken(queue)).ack()
    assert await queue.retry(first.id)


async def test_a_put_inside_a_transaction_holds_its_twin_back(
    store: Any, queue: Any, variant: Variant, connect: Any
) -> None:
    """A job that waits does not run on what was there before the caller's commit."""
    await queue.put("a", dedupe="k")
    conn = await connect()
    assert (await queue.using(conn).put("b", dedupe="k")).outcome == "waiting"
    assert await queue_of(variant, store).take() is None
    await conn.commit()
    await look_at_all(queue)
    assert (await taken(queue)).payload == b"a"


async def test_a_put_that_meets_a_take_makes_it_run_again(
    queue: Any, connect: Any, peer: Peer, witness: Peer
) -> None:
    """A put that waited for a take in flight finds the job running."""
    await queue.put("a", dedupe="k")
    conn = await connect()
    with peer.conn.transaction():
        peer.run(f"UPDATE {JOBS} SET leased_until = clock_timestamp() + interval '60 s', token = 5")
        put = asyncio.ensure_future(queue.using(conn).put("b", dedupe="k"))
        await witness.until_waiting()
    assert (await put).outcome == "again"
    await conn.commit()


async def test_an_ack_that_meets_a_put_leaves_its_work(
    queue: Any, connect: Any, witness: Peer
) -> None:
    """An ack waits for a put of the key in an open transaction, and then lets the job run again."""
    await queue.put("old", dedupe="k")
    job = await taken(queue)
    conn = await connect()
    assert (await queue.using(conn).put("new", dedupe="k")).outcome == "again"
    ack = asyncio.ensure_future(job.ack())
    await witness.until_waiting()
    await conn.commit()
    await ack
    assert (await taken(queue)).payload == b"new"


async def test_a_put_that_meets_an_ack_is_a_new_job(
    queue: Any, connect: Any, witness: Peer
) -> None:
    """A put waits for an ack in an open transaction: committed, there is no job of the key."""
    await queue.put("old", dedupe="k")
    job = await taken(queue)
    conn = await connect()
    await queue.using(conn).ack(job)
    put = asyncio.ensure_future(queue.put("new", dedupe="k"))
    await witness.until_waiting()
    await conn.commit()
    assert (await put).outcome == "new"
    assert (await taken(queue)).payload == b"new"


async def test_two_puts_of_a_key_at_once_are_one_job(queue: Any) -> None:
    """Of many puts at the same time one is new and the others find it."""
    puts = await asyncio.gather(*(queue.put("a", dedupe="k") for _ in range(16)))
    assert sorted(put.outcome for put in puts) == ["new"] + ["waiting"] * 15
    assert len({put.id for put in puts}) == 1
    assert await payloads(queue) == ["a"]


# -- concurrency ---------------------------------------------------------------------------


async def test_each_job_goes_to_one_taker(store: Any, variant: Variant) -> None:
    """Many takers at once share the jobs, and none is given to two."""
    queues = [queue_of(variant, store) for _ in range(6)]
    ids = await queues[0].put_many(["x"] * 60)

    async def drain(queue: Any) -> list[int]:
        found = []
        while (job := await queue.take()) is not None:
            found.append(job.id)
            await job.ack()
        return found

    found = await asyncio.gather(*map(drain, queues))
    assert sorted(each for some in found for each in some) == ids


@pytest.mark.parametrize("n", [1, 3])
async def test_a_take_is_cancelled_as_its_answer_arrives(dsn: str, n: int) -> None:
    """The jobs were given out, and the caller never hears of them: they are put back at once."""
    async with pgkv.AsyncStore.connect(dsn) as store:
        queue = pgkv.AsyncQueue(store, "q")
        await queue.put_many(["x"] * n)
        taking: asyncio.Task[Any] = asyncio.ensure_future(queue.take_many(n, 60))

        def cancel(name: str, *_: object) -> None:
            if name == "queue_take":
                remove()
                taking.cancel()

        remove = pgkv.on_operation(cancel)
        await asyncio.wait([taking])
        assert taking.cancelled()
        assert [(row.state, row.attempt) for row in await queue.jobs()] == [("waiting", 0)] * n


async def test_a_take_is_cancelled_anywhere(dsn: str) -> None:
    """A cancellation, whichever step it strikes, leaves no job leased that nothing works on."""
    async with pgkv.AsyncStore.connect(dsn) as store:
        queue = pgkv.AsyncQueue(store, "q")
        await queue.put("x")
        for steps in range(30):
            taking: asyncio.Task[Any] = asyncio.ensure_future(queue.take(timeout=60))
            for _ in range(steps):
                await asyncio.sleep(0)
            taking.cancel()
            await asyncio.wait([taking])
            if not taking.cancelled():
                await taking.result().release()
            assert await counts(queue) == (1, 0, 0, 0), steps


async def test_notified_takers_wake(store: Any, variant: Variant) -> None:
    """wakeup="notify": a put ends a wait at once, from outside and from inside a transaction."""
    queue = queue_of(variant, store, wakeup="notify")
    await queue.create_table()
    waiting = asyncio.ensure_future(queue.take(timeout=60))
    listener = inside(queue)._runtime.background().listener
    await until(lambda: listener.is_listening("pgkv_jobs"), "it listens")
    put = await queue.put("a")
    job = await asyncio.wait_for(waiting, 20)
    assert job.id == put.id
    await job.ack()
    async with store.transaction() as tx:
        await queue.using(tx).put("b")
    async with await queue.take(timeout=60) as job:
        assert job.payload == b"b"


async def test_puts_are_notified_of_together(
    store: Any, variant: Variant, operations: list[tuple[str, str, int]]
) -> None:
    """Of many puts in a moment the first and the last are notified of, and none is left out."""
    queue = queue_of(variant, store, wakeup="notify")
    for _ in range(50):
        await queue.put("a")
    sent = [name for name, *_ in operations]
    inner = inside(queue)
    await until(lambda: not inner._notifier._resting, "the last one is sent")
    sent = [name for name, *_ in operations]
    assert sent.count("queue_put") == 50
    assert 1 <= sent.count("queue_notify") < 50
    assert not inner._notifier._wanted


async def test_an_empty_take_takes_no_transaction_id(queue: Any, peer: Peer) -> None:
    """Looking at an empty queue writes nothing."""
    await queue.create_table()
    before = peer.one("SELECT txid_snapshot_xmax(txid_current_snapshot())")
    for _ in range(50):
        assert await queue.take() is None
    after = peer.one("SELECT txid_snapshot_xmax(txid_current_snapshot())")
    assert after - before < 25, "others may use some"


async def test_a_job_that_another_take_had_locked(
    queue: Any, peer: Peer, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look passes over it. The next one is soon, not after the pause of an empty queue."""
    job = await queue.put("x")
    pauses: list[float] = []
    runtime = type(inside(queue)._runtime)
    wait = runtime.wait

    def waiting(self: Any, waiter: Any, seconds: float) -> Any:
        pauses.append(seconds)
        if len(pauses) == 2:
            other.rollback()
        return wait(self, waiter, seconds)

    monkeypatch.setattr(runtime, "wait", waiting)
    with psycopg.connect(dsn) as other:
        other.execute(f"SELECT FROM {JOBS} FOR UPDATE")
        taken = await queue.take(timeout=60)
    assert taken.id == job.id
    assert pauses == [0.01, 0.02]


async def test_leases_stay_heap_only(queue: Any, peer: Peer) -> None:
    """A take and a renewal change no indexed column: the next version stays on the page."""
    await queue.put_many(["x"] * 40)
    jobs = await queue.take_many(5)
    for job in jobs:
        await job.extend(LEASE)
    assert await queue.ack_many(jobs) == []
    peer.count_all()
    updated = f"coalesce(pg_stat_get_tuples_updated('{JOBS}'::regclass), 0)"
    await until(lambda: peer.one(f"SELECT {updated}") >= 10, "the statistics arrive")
    assert peer.one(f"SELECT pg_stat_get_tuples_hot_updated('{JOBS}'::regclass)") == 10


async def test_an_unlogged_queue(store: Any, variant: Variant, peer: Peer) -> None:
    """durable=False has a table of its own."""
    queue = queue_of(variant, store, durable=False)
    await queue.put("a")
    assert peer.one("SELECT relpersistence FROM pg_class WHERE relname = 'kv_store_jobs_u'") == "u"
    async with await taken(queue):
        pass


def test_a_job_says_what_it_is(dsn: str) -> None:
    """A repr has the queue, the id and the time left; never the payload."""
    with pgkv.Store.connect(dsn) as store:
        queue = pgkv.Queue(store, "secret")
        queue.put("hidden")
        job = queue.take()
        assert job is not None
        assert "hidden" not in repr(job)
        assert f"'secret' id={job.id} attempt=1" in repr(job)
        assert repr(queue) == "<Queue 'secret' lease=60 max_attempts=20>"
        job.ack()


def test_wrong_class_of_store(dsn: str) -> None:
    """A Queue needs a Store."""
    with pytest.raises(ConfigError, match="AsyncQueue"):
        pgkv.Queue(pgkv.AsyncStore(pgkv.Config(dsn)), "q")
