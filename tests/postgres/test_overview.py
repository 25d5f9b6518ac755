"""What one frame of `pgkv top` and of the dashboard says, and what it costs."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
from psycopg import sql

import pgkv
from pgkv._ops.op import Op
from pgkv.patterns.overview import Overview, Overviews
from tests import FULL
from tests.faults.support import newest
from tests.peers import Peer
from tests.servers import wait_until

ROWS = 5_000_000 if FULL else 30_000
FILL = """
    INSERT INTO kv_store (key, value, expires_at)
    SELECT CASE g %% 4 WHEN 0 THEN 'user:' || g WHEN 1 THEN 'pgkv:rate:api:' || g
           WHEN 2 THEN 'pgkv:cache:e:app.load:1:' || lpad(g::text, 40, '0') ELSE 'x' || g END,
           'value', CASE WHEN g %% 2 = 0 THEN now() - interval '1 day' END
    FROM generate_series(1, %s) g
"""
JOBS = """
    INSERT INTO kv_store_jobs_u (queue, priority, due_at, max_attempts, created_at, payload)
    SELECT 'q' || g %% 3, 5, CASE WHEN g %% 1000 = 7 AND g < 30000 THEN 'infinity' ELSE now() END, 3, now(), 'x'
    FROM generate_series(1, %s) g
"""
BLOCKS = 400  # 64 of the table, and those of the index


def explain(peer: Peer, op: Op[Any]) -> Any:
    """What the server did for a statement."""
    kind, argument = ("(text)", "('')") if op.params else ("", "")
    peer.conn.execute(f"PREPARE q{kind} AS {op.statement.sql}".encode())
    (plan,) = peer.one(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE q{argument}")
    peer.conn.execute("DEALLOCATE q")
    return plan


def blocks_of(plan: Any) -> int:
    return int(plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"])


def look(store: pgkv.Store) -> Overview:
    return store._run(Overviews(store).look(), 30.0)


def test_tables_come_and_go(dsn: str, peer: Peer) -> None:
    """A table that is missing is not asked about and not made; one that went in between is refused once."""
    with pgkv.Store.connect(dsn) as store:
        overviews = Overviews(store)
        frame = store._run(overviews.look())
        assert ([each.kind for each in frame.tables], frame.sessions, frame.queues) == (
            ["store"],
            None,
            [],
        )
        peer.run("DROP TABLE kv_store")
        frame = store._run(overviews.look())
        assert (frame.tables, frame.kinds, frame.refused) == ([], [], {})
        assert store._run(overviews.look()).tables == []
        store.set("user:1", "x")
        assert [each.name for each in store._run(overviews.look()).keys] == ["user:"]


def test_what_a_frame_says(dsn: str) -> None:
    """Keys by their first part, functions, limiters, locks, sessions, queues: exact in small tables."""
    with pgkv.Store.connect(dsn, max_entries=1000) as store:
        overviews = Overviews(store)
        store._run(overviews.look())
        store.set_many({"user:1": "a", "user:2": "b", "alone": "c", "a:b": "d"})

        @pgkv.cached(60, store=store, store_timeout=20)
        def square(n: int) -> int:
            return n * n

        assert [square(n) for n in range(3)] == [0, 1, 4]
        pgkv.RateLimiter(store, pgkv.Rate(1, 60), name="a:b#c", timeout=20).hit("me:1")
        sessions = pgkv.SessionStore(store)
        for user in ("ada", None):
            sessions.create({"n": 1}, user_id=user)
        queue: pgkv.Queue[Any] = pgkv.Queue(store, "emails", max_attempts=1)
        for delay in (0, 0, 0, 60):
            queue.put("x", delay=delay)
        job = queue.take()
        assert job is not None
        job.nack()
        assert queue.take() is not None
        with (
            pgkv.Lock(store, "nightly", metadata={"by": "cron"}).acquire(),
            pgkv.Semaphore(store, "gpu", 2).acquire(),
        ):
            frame = store._run(overviews.look())
        assert {each.kind: each.rows for each in frame.kinds} == {
            "key": 4,
            "function": 3,
            "limiter": 1,
        }
        assert {each.name: each.rows for each in frame.keys} == {"user:": 2, "a:": 1, "": 1}
        assert [each.rows for each in frame.functions] == [3]
        assert frame.functions[0].name == square.name
        assert [each.name for each in frame.limiters] == ["a:b#c"]
        assert [(lock.name, lock.slot, lock.metadata) for lock in frame.locks] == [
            ("nightly", None, {"by": "cron"}),
            ("gpu", frame.locks[1].slot, None),
        ]
        assert frame.locks_held == 2
        (depth,) = frame.queues
        assert (depth.queue, depth.waiting, depth.delayed, depth.running, depth.dead) == (
            "emails",
            1,
            1,
            1,
            1,
        )
        assert frame.sessions is not None
        assert (frame.sessions.live, frame.sessions.with_user) == (2, 1)
        assert frame.max_entries == 1000
        assert {table.kind for table in frame.tables} >= {"store", "locks", "sessions", "jobs"}
        assert not any(table.sampled for table in frame.tables)
        assert frame.refused == {}


def test_a_namespace_sees_its_own(dsn: str) -> None:
    """Keys, locks and queues of other namespaces are not in its frame; names carry no prefix."""
    with pgkv.Store.connect(dsn) as store:
        mine, other = store.namespace("mine:"), store.namespace("other:")
        for each in (mine, other):
            each.set("user:1", "x")
            pgkv.Queue(each, "q").put("x")
        with pgkv.Lock(mine, "l").acquire(), pgkv.Lock(other, "l").acquire():
            frame = look(mine)
            assert look(store).locks_held == 2
        assert [(each.name, each.rows) for each in frame.keys] == [("user:", 1)]
        assert [lock.name for lock in frame.locks] == ["l"]
        assert [each.queue for each in frame.queues] == ["q"]


def test_connections_and_who_waits(dsn: str, peer: Peer, witness: Peer) -> None:
    """Connections by application; a statement that waits for a row lock, and for whom."""
    peer.run("CREATE TABLE rows AS SELECT 1 AS n")
    waiter = Peer(psycopg.conninfo.make_conninfo(dsn, application_name="waiter"))
    with pgkv.Store.connect(dsn) as store, ThreadPoolExecutor() as pool, waiter.conn:
        with peer.conn.transaction():
            peer.run("UPDATE rows SET n = 2")
            waiting = pool.submit(waiter.run, "UPDATE rows SET n = 3")
            wait_until(lambda: witness.waiting() == 1, "the update waits")
            frame = look(store)
        waiting.result(20)
        (blocked,) = frame.blocked
        assert (blocked.application, blocked.blockers) == ("waiter", [peer.conn.info.backend_pid])
        assert any(each.application == "waiter" for each in frame.connections)


async def test_frames_of_any_store(store: Any) -> None:
    """Sync and async stores run the same flow, also through a pooler: the next frame says what is new."""
    overviews = Overviews(store)
    for count in (1, 2, 3):
        await store.set(f"user:{count}", "x")
        frame = await store._run(overviews.look(), 30.0)
        assert [(each.name, each.rows) for each in frame.keys] == [("user:", count)]


def test_a_role_that_may_only_read_a_part(dsn: str, peer: Peer) -> None:
    """What the server refuses is named; the rest is there."""
    with pgkv.Store.connect(dsn) as store:
        store.set("user:1", "x")
        pgkv.Queue(store, "q").put("x")
    role = sql.Identifier("reader_" + str(peer.conn.info.backend_pid))
    schema = sql.Identifier(peer.one("SELECT current_schema()"))
    peer.conn.execute(sql.SQL("CREATE ROLE {} LOGIN").format(role))
    try:
        peer.conn.execute(sql.SQL("GRANT USAGE ON SCHEMA {} TO {}").format(schema, role))
        peer.conn.execute(sql.SQL("GRANT SELECT ON kv_store TO {}").format(role))
        with pgkv.Store.connect(psycopg.conninfo.make_conninfo(dsn, user=role._obj[0])) as store:
            frame = look(store)
            assert [each.name for each in frame.keys] == ["user:"]
            assert frame.queues == []
            assert list(frame.refused) == ["jobs"]
            assert "permission denied" in frame.refused["jobs"]
            assert "not visible" in {each.state for each in frame.connections}
    finally:
        peer.conn.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(role))


@newest
def test_a_large_table_is_not_read(dsn: str, peer: Peer) -> None:
    """A frame reads at most 64 pages of the table, by places, whatever the plan; its counts are near.

    PGKV_TESTS=full fills it with 5 million rows.
    """
    with pgkv.Store.connect(dsn) as store:
        store.create_table()
        queue: pgkv.Queue[Any] = pgkv.Queue(store, "q", durable=False)
        queue.put("x")
        overviews = Overviews(store)
        for _ in range(7):  # generic plans are made, of small tables
            store._run(overviews.look())
        run = peer.conn.execute
        run(FILL, (ROWS,))
        run(JOBS, (ROWS,))
        store._run(overviews.look(), 30.0)
        frame = store._run(overviews.look(), 30.0)
        assert {table.kind for table in frame.tables if table.sampled} == {"store", "jobs_unlogged"}
        for each in frame.kinds:
            share = ROWS / 2 if each.kind == "key" else ROWS / 4
            assert share * 0.8 < each.rows < share * 1.2
        assert sum(each.dead for each in frame.queues) == 30
        assert sum(each.waiting for each in frame.queues) > ROWS * 0.8
        for op in overviews._made.values():
            for mode in ("force_custom_plan", "force_generic_plan"):
                run(f"SET plan_cache_mode = {mode}")
                plan = explain(peer, op)
                assert blocks_of(plan) < BLOCKS, plan
                assert '"Seq Scan"' not in json.dumps(plan)
                assert "JIT" not in plan


@newest
def test_finished_jobs_that_cannot_be_reclaimed(dsn: str, peer: Peer) -> None:
    """An old snapshot keeps the index entries of finished jobs, which come before all others. A frame
    does not go through them."""
    with pgkv.Store.connect(dsn) as store, psycopg.connect(dsn) as old:
        queue: pgkv.Queue[Any] = pgkv.Queue(store, "q", durable=False)
        queue.create_table()
        old.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        old.execute("SELECT 1 FROM pg_class LIMIT 1")
        run = peer.conn.execute
        run(JOBS, (30_000,))
        run("DELETE FROM kv_store_jobs_u")
        run("VACUUM kv_store_jobs_u")
        queue.put("x")
        overviews = Overviews(store)
        frame = store._run(overviews.look(), 30.0)
        assert frame.tables[-1].dead > 20_000
        assert blocks_of(explain(peer, overviews._op(frame.tables[-1]))) < BLOCKS
