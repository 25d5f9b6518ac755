"""Queues: what they read of a table, however large its dead part is and whenever a plan was made."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import psycopg
import pytest

import pgkv
from pgkv._ops.op import Op, Statement
from pgkv._sql.table import read_nothing
from tests.peers import Peer

JOBS = "kv_store_jobs"
DEAD = 20_000  # rows that no vacuum may remove
ROUNDS = 30


@pytest.fixture
def store(dsn: str) -> Iterator[pgkv.Store]:
    """One connection, which keeps its plans."""
    with pgkv.Store.connect(dsn, pool_max_size=1) as made:
        yield made


@pytest.fixture
def old_snapshot(dsn: str) -> Iterator[Callable[[], None]]:
    """A transaction that begins when called, and stays open."""
    with psycopg.connect(dsn) as conn:
        conn.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        yield lambda: (conn.execute("SELECT 1 FROM pg_class LIMIT 1"), None)[1]


def read(store: pgkv.Store, peer: Peer) -> tuple[int, int]:
    """Sequential scans of the table, and blocks read of its ready index, so far."""
    if peer.conn.info.server_version >= 150000:
        return counted(store, peer, "SELECT pg_stat_force_next_flush()")
    # A process sends and asks for statistics twice a second, and they come by and by.
    before: tuple[int, int] | None = None
    now = counted(store, peer, "SELECT pg_sleep(0.6)")
    while before != now:
        before, now = now, counted(store, peer, "SELECT pg_sleep(0.6)")
    return now


def counted(store: pgkv.Store, peer: Peer, flush: str) -> tuple[int, int]:
    store._execute(Op(Statement("flush", flush, (), read_nothing, writes=False)))
    store.get("k")
    peer.run(flush)
    peer.run("SELECT pg_stat_clear_snapshot()")
    return (
        peer.one(f"SELECT pg_stat_get_numscans('{JOBS}'::regclass)"),
        peer.one(f"SELECT pg_stat_get_blocks_fetched('{JOBS}_ready'::regclass)"),
    )


def work(queue: pgkv.Queue[bytes], rounds: int) -> None:
    """What workers and putters do, by every statement that finds a job."""
    for number in range(rounds):
        queue.put("x", dedupe="k" if number % 2 else None)
        job = queue.take()
        assert job is not None
        assert job.nack(0)
        job = queue.take()
        assert job is not None
        job.ack()


def test_old_plans_and_a_dead_tail(
    store: pgkv.Store, peer: Peer, old_snapshot: Callable[[], None]
) -> None:
    """Plans made while the table was small and analyzed are not kept when it has grown: nothing reads
    the table, and no take reads over finished jobs, though a snapshot keeps them all."""
    queue = pgkv.Queue(store, "q", backoff=pgkv.Backoff(0))
    work(queue, ROUNDS)
    peer.run(f"VACUUM ANALYZE {JOBS}")
    work(queue, ROUNDS)
    old_snapshot()
    peer.run(
        f"INSERT INTO {JOBS} (queue, priority, due_at, max_attempts, created_at, payload)"
        " SELECT 'q', 0, clock_timestamp() - interval '1 minute', 20, now(), 'x'"
        f" FROM generate_series(1, {DEAD})"
    )
    peer.run(f"DELETE FROM {JOBS}")
    work(queue, 1)  # learns the size, and sets the marks
    before = read(store, peer)
    work(queue, ROUNDS)
    after = read(store, peer)
    assert after[0] == before[0], "no sequential scan"
    pages = peer.one(f"SELECT pg_relation_size('{JOBS}_ready') / 8192")
    assert (after[1] - before[1]) / (5 * ROUNDS) < pages / 3
    peer.run(f"ANALYZE {JOBS}")  # of a table without a live row
    work(queue, ROUNDS)
    again = read(store, peer)
    assert again[0] == after[0], "no sequential scan"
    assert (again[1] - after[1]) / (5 * ROUNDS) < pages / 3


def test_delayed_and_running_jobs_cost_a_take_nothing(store: pgkv.Store, peer: Peer) -> None:
    """Neither jobs that are not due yet nor jobs in front that run are read each time."""
    queue = pgkv.Queue(store, "q", backoff=pgkv.Backoff(0))
    queue.create_table()
    for due, leased in (("+ interval '1 day'", "epoch"), ("- interval '1 day'", "2100-01-01")):
        peer.run(
            f"INSERT INTO {JOBS} (queue, priority, due_at, leased_until, max_attempts, created_at,"
            f" payload) SELECT 'q', 0, clock_timestamp() {due}, '{leased}', 20, now(), 'x'"
            f" FROM generate_series(1, {DEAD})"
        )
    peer.run(f"ANALYZE {JOBS}")
    work(queue, 1)
    before = read(store, peer)
    work(queue, ROUNDS)
    after = read(store, peer)
    assert after[0] == before[0], "no sequential scan"
    assert (after[1] - before[1]) / (5 * ROUNDS) < 100
