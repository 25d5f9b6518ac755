"""Queues under kills: storms with exact totals, the control that shows doubles, and single faults."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

import pgkv
from pgkv.testing import ServerClock
from tests.faults.proxy import Proxy
from tests.faults.queue_worker import LEASE, orders
from tests.faults.support import newest
from tests.hammer import Start, Storm, count, kill_when_done, starting
from tests.servers import Server, wait_until
from tests.variants import Variant

pytestmark = newest
# A storm goes on until that much was done, however slow the machine is.
ORDERS = int(os.environ.get("PGKV_QUEUE_ORDERS", "60"))
KILLS = max(6, ORDERS // 20)
CHANGES, HOT = 6, 8  # changes of a document; documents changed at a time


start = starting("tests.faults.queue_worker")


@pytest.fixture
def world(dsn: str) -> Iterator[psycopg.Connection]:
    """What the workers work on, and a connection that counts it."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("CREATE TABLE orders (id int)")
        conn.execute("CREATE TABLE effects (id int)")
        conn.execute("CREATE TABLE meetings (id int)")
        conn.execute("CREATE TABLE documents (id int PRIMARY KEY, version int, indexed int)")
        yield conn


def calm(storm: Storm, queue: pgkv.Queue[Any]) -> None:
    """Let the workers do what is left, then end them."""
    wait_until(lambda: sum(queue.stats()[1:4]) == 0, "all jobs are done", seconds=200)
    storm.wait_for_paused()
    storm.end()


def test_a_storm_of_kills(dsn: str, world: psycopg.Connection, start: Start) -> None:
    """Workers are killed, paused past their leases and cut off; some work fails, some commits late, and
    some orders are rolled back: every order has its effect, once."""
    with pgkv.Store.connect(dsn) as store, psycopg.connect(dsn) as conn:
        queue = orders(store)
        queue.create_table()
        storm = Storm(start, ("ship", dsn), world, "kill kill cut pause", LEASE)
        number = 0
        while storm.kills < KILLS or number < ORDERS:
            for _ in range(5):
                number += 1
                conn.execute("INSERT INTO orders VALUES (%s)", [number])
                queue.using(conn).put(str(number))
                conn.commit() if number % 10 else conn.rollback()
            storm.strike()
        calm(storm, queue)
        placed = count(world, "SELECT count(*) FROM orders")
        assert placed >= ORDERS * 9 // 10
        assert count(world, "SELECT count(DISTINCT id) FROM effects") == placed
        assert count(world, "SELECT count(*) FROM effects") == placed
        assert queue.stats().dead == 0


def test_a_storm_of_changes(dsn: str, world: psycopg.Connection, start: Start) -> None:
    """Documents change a few times each, and a job of each is put with a key, alone or in the change's
    transaction, while workers are killed: in the end none is stale, and never do two work on one at once."""
    with pgkv.Store.connect(dsn) as store, psycopg.connect(dsn) as conn:
        queue = orders(store)
        queue.create_table()
        storm = Storm(start, ("index", dsn), world, "kill", LEASE)
        rng, changes = random.Random(4), 0
        change = "UPDATE documents SET version = version + 1 WHERE id = %s"
        while storm.kills < KILLS or changes < ORDERS * 4:
            for _ in range(40):
                key = changes // CHANGES + rng.randrange(HOT)
                changes += 1
                world.execute(
                    "INSERT INTO documents VALUES (%s, 0, 0) ON CONFLICT DO NOTHING", [key]
                )
                if changes % 2:
                    world.execute(change, [key])
                    queue.put(b"", dedupe=str(key))
                else:
                    conn.execute(change, [key])
                    queue.using(conn).put(b"", dedupe=str(key))
                    time.sleep(rng.uniform(0, 0.04))
                    conn.commit()
            storm.strike()
        calm(storm, queue)
        assert count(world, "SELECT sum(version) FROM documents") == changes
        assert count(world, "SELECT count(*) FROM documents WHERE indexed <> version") == 0
        assert count(world, "SELECT count(*) FROM meetings") == 0


@pytest.mark.parametrize(("mode", "effects"), [("apart", 2), ("together", 1)])
def test_killed_between_effect_and_ack(
    dsn: str, world: psycopg.Connection, start: Start, mode: str, effects: int
) -> None:
    """The control: an ack apart from its effect lets the job of a killed worker be done twice. In the
    effect's transaction it does not."""
    with pgkv.Store.connect(dsn) as store:
        queue = orders(store)
        queue.put("1")
        kill_when_done(start("control", mode, dsn))
        assert sum(queue.stats()[1:5]) == effects - 1  # what is left to be done
        if mode == "apart":
            job = queue.take(timeout=60)
            assert job is not None
            world.execute("INSERT INTO effects VALUES (1)")
            job.ack()
    assert count(world, "SELECT count(*) FROM effects") == effects


async def test_lost_answers(
    dsn: str, make_store: Any, variant: Variant, clock: ServerClock
) -> None:
    """A put whose answer is lost is not repeated; an ack is, and counts; a take is, and the job that it
    had been given comes back at its lease's end."""
    with Proxy(dsn) as proxy:
        queue = variant.make("Queue", await make_store(dsn=proxy.dsn), "the queue", lease=60)
        await queue.put("warm")
        job = await queue.take()
        proxy.arm(b"DELETE FROM")
        await job.ack()
        assert sum((await queue.stats())[1:5]) == 0
        proxy.arm(b"unheard")
        with pytest.raises(pgkv.StoreUnavailableError) as lost:
            await queue.put("unheard")
        assert lost.value.outcome_unknown
        assert (await queue.stats()).waiting == 1
        await queue.put("second")
        proxy.arm(b"the queue")
        first = await queue.take()
        assert first.payload == b"second"
        await first.ack()
        clock.advance(61)
        async with await queue.take(timeout=20) as again:
            assert (again.payload, again.attempt) == (b"unheard", 2)


async def test_a_crash_of_the_server(
    make_server: Callable[..., Server], make_store: Any, variant: Variant
) -> None:
    """A committed put survives; the lease of a moment before may not: then the job is given again, and the
    first worker's ack is refused. An UNLOGGED queue is empty."""
    server = make_server(durable=True)
    retry = pgkv.RetryPolicy(attempts=100, deadline=60)
    with ServerClock(server.dsn, schema="moved") as clock:
        store = await make_store(dsn=clock.dsn, retry=retry)
    queue = variant.make("Queue", store, "q", lease=60)
    unlogged = variant.make("Queue", store, "q", durable=False)
    ids = await queue.put_many(["a", "b"])
    await unlogged.put("c")
    job = await queue.take()
    server.kill()
    server.start()
    with ServerClock(server.dsn, schema="moved") as clock:
        clock.advance(61)
    seen: dict[int, Any] = {}
    while len(seen) < 2:
        found = await queue.take(timeout=20)
        assert found is not None
        seen[found.id] = found
    assert sorted(seen) == ids
    assert seen[job.id].token > job.token
    with pytest.raises(pgkv.LeaseLostError):
        await job.ack()
    assert await queue.ack_many(list(seen.values())) == []
    assert sum((await unlogged.stats())[1:5]) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_in_a_forked_child(dsn: str) -> None:
    """A child's copy of a job is lost, and ends nothing; the parent's goes on."""
    with pgkv.Store.connect(dsn) as store:
        queue = pgkv.Queue(store, "q")
        queue.put("a")
        job = queue.take()
        assert job is not None
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                try:
                    job.ack()
                except pgkv.LeaseLostError as error:
                    code = 0 if job.is_lost and error.reason == "forked" else 2
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        job.check()
        job.ack()
