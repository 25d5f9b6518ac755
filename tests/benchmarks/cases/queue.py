"""Queues: a job put, taken and acknowledged, alone, by several workers and in batches, and with a
million dead rows that an old snapshot keeps; against pgmq's statements, procrastinate's, a list in Redis, and RQ."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import psycopg

import pgkv
from tests.benchmarks.case import PGKV, REDIS, Bench, Entrants, Run, case, facts, spent
from tests.benchmarks.figures import LATENCY, Fact, Goal

# Redis keeps its list as safe as that: a crash may lose it.
NOT_DURABLE = "pgkv, durable=False"
PGMQ, PROCRASTINATE, RQ = "pgmq's statements", "procrastinate's statements", "RQ"
PAYLOAD = b"p" * 100
DEAD = 1_000_000

# pgmq's table and texts, as `pgmq.send`, `read` and `delete` run them.
PGMQ_TABLE = """
DROP TABLE IF EXISTS bench_pgmq;
CREATE TABLE bench_pgmq (msg_id bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY, read_ct int DEFAULT 0 NOT NULL,
    enqueued_at timestamptz DEFAULT now() NOT NULL, vt timestamptz NOT NULL, message jsonb);
CREATE INDEX ON bench_pgmq (vt ASC)
"""
PGMQ_SEND = "INSERT INTO bench_pgmq (vt, message) VALUES (clock_timestamp(), $1) RETURNING msg_id"
PGMQ_READ = (
    "WITH cte AS (SELECT msg_id FROM bench_pgmq WHERE vt <= clock_timestamp() ORDER BY msg_id ASC"
    " LIMIT $1 FOR UPDATE SKIP LOCKED) UPDATE bench_pgmq m SET vt = clock_timestamp() +"
    " interval '60 s', read_ct = read_ct + 1 FROM cte WHERE m.msg_id = cte.msg_id"
    " RETURNING m.msg_id, m.message"
)
PGMQ_DELETE = "DELETE FROM bench_pgmq WHERE msg_id = $1"
DOCUMENT = f'{{"payload": "{PAYLOAD.decode()}"}}'


def prepared(bench: Bench) -> psycopg.Connection[Any]:
    """A connection that prepares what it sends."""
    conn = bench.psycopg()
    conn.prepare_threshold = 0
    return conn


def queue(bench: Bench, **options: Any) -> pgkv.Queue[bytes]:
    """An empty queue."""
    made = pgkv.Queue(bench.store(), "bench", **options)
    made.create_table()
    with psycopg.connect(bench.dsn, autocommit=True) as conn:
        conn.execute(f"TRUNCATE {made._options.sql.t}".encode())
    return made


def pgmq(bench: Bench) -> tuple[Callable[[], object], Callable[[], object]]:
    """Its put, and its take with the ack."""
    with psycopg.connect(bench.dsn, autocommit=True) as plain:
        plain.execute(PGMQ_TABLE.encode())
    conn = prepared(bench)

    def take() -> None:
        while (row := conn.execute(PGMQ_READ, [1]).fetchone()) is None:
            pass  # others have locked what there is
        conn.execute(PGMQ_DELETE, [row[0]])

    return lambda: conn.execute(PGMQ_SEND, [DOCUMENT]), take


def procrastinate(bench: Bench) -> tuple[Callable[[], object], Callable[[], object]] | None:
    """The same of procrastinate, where it is installed."""
    spec = importlib.util.find_spec("procrastinate")
    if spec is None or spec.origin is None:
        return None
    conn = prepared(bench)
    if conn.execute("SELECT to_regclass('procrastinate_jobs')").fetchone() == (None,):
        with psycopg.connect(bench.dsn, autocommit=True) as plain:
            schema = Path(spec.origin).parent / "sql" / "schema.sql"
            plain.execute(schema.read_text(encoding="utf-8").encode())
    conn.execute("DELETE FROM procrastinate_jobs")
    sql = "INSERT INTO procrastinate_workers DEFAULT VALUES RETURNING id"
    (worker,) = conn.execute(sql).fetchone() or (0,)
    put = (
        "SELECT unnest(procrastinate_defer_jobs_v1(ARRAY[ROW('bench', 'task', 0, NULL, NULL,"
        " $1::jsonb, NULL)::procrastinate_job_to_defer_v1]))"
    )

    def take() -> None:
        fetch = "SELECT id FROM procrastinate_fetch_job_v2(NULL, $1) WHERE id IS NOT NULL"
        while (row := conn.execute(fetch, [worker]).fetchone()) is None:
            pass  # as above
        (job,) = row
        finish = "SELECT procrastinate_finish_job_v1($1, 'succeeded', true)"
        conn.execute(finish, [job])

    return lambda: conn.execute(put, [DOCUMENT]), take


def redis_list(bench: Bench) -> tuple[Callable[[], object], Callable[[], object]] | None:
    """A list that is moved to another one while its job is done."""
    client = bench.redis()
    if client is None:
        return None
    client.delete("jobs", "doing")

    def take() -> None:
        job = client.lmove("jobs", "doing")
        client.lrem("doing", 1, job)  # type: ignore[arg-type]  # never None here

    return lambda: client.rpush("jobs", PAYLOAD), take


def rq(bench: Bench) -> tuple[Callable[[], object], Callable[[], object]] | None:
    """RQ without the bookkeeping of its worker, where it is installed."""
    client = bench.redis()
    if client is None or importlib.util.find_spec("rq") is None:
        return None
    module: Any = importlib.import_module("rq")
    jobs = module.Queue(connection=client)
    jobs.empty()

    def take() -> None:
        job, _ = module.Queue.dequeue_any([jobs], None, connection=client)
        job.delete()

    return lambda: jobs.enqueue("time.time"), take


def others(bench: Bench) -> Iterator[tuple[str, Callable[[], object], Callable[[], object]]]:
    """The other entrants: their put and their take."""
    yield (PGMQ, *pgmq(bench))
    for name, make in ((PROCRASTINATE, procrastinate), (REDIS, redis_list), (RQ, rq)):
        if made := make(bench):
            yield (name, *made)


def repeated(call: Callable[[], object]) -> Run:
    """Call it that many times."""

    def run(calls: int) -> None:
        for _ in range(calls):
            call()

    return run


@case("queue: put", {PGMQ: 1.4, PROCRASTINATE: 1.1, REDIS: None, RQ: None})
def put(bench: Bench) -> Entrants:
    """One job in its own commit."""
    jobs = queue(bench)
    yield PGKV, repeated(lambda: jobs.put(PAYLOAD))
    for name, add, _ in others(bench):
        yield name, repeated(add)


def doing(jobs: pgkv.Queue[bytes]) -> None:
    """Take a job that is there, and acknowledge it."""
    job = jobs.take(timeout=5)
    assert job is not None
    job.ack()


@case(
    "queue: put, take, ack",
    {PGMQ: 1.0, PROCRASTINATE: 0.85, REDIS: None, RQ: None, (NOT_DURABLE, REDIS): 5},
)
def take(bench: Bench) -> Entrants:
    """One job through an empty queue."""
    jobs = queue(bench)

    def through(add: Callable[[], object], get: Callable[[], object]) -> Run:
        return repeated(lambda: (add(), get()))

    yield PGKV, through(lambda: jobs.put(PAYLOAD), lambda: doing(jobs))
    unlogged = queue(bench, durable=False)
    yield NOT_DURABLE, through(lambda: unlogged.put(PAYLOAD), lambda: doing(unlogged))
    for name, add, get in others(bench):
        yield name, through(add, get)


def batches(size: int) -> Callable[[Bench], Entrants]:
    """That many jobs in three statements; the time is of one batch."""

    def made(bench: Bench) -> Entrants:
        jobs, single = queue(bench), queue(bench)

        def batch() -> None:
            jobs.put_many([PAYLOAD] * size)
            assert not jobs.ack_many(jobs.take_many(size))

        def one_by_one() -> None:
            for _ in range(size):
                single.put(PAYLOAD)
                doing(single)

        yield PGKV, repeated(batch)
        yield "one by one", repeated(one_by_one)

    return made


for size, share in ((10, 0.17), (100, 0.07)):
    case(f"queue: put_many, take_many, ack_many of {size}", {"one by one": share})(batches(size))


def threads(workers: int) -> Callable[[Bench], Entrants]:
    """Workers of one queue, each with a job of its own in it."""

    def made(bench: Bench) -> Entrants:
        pool = ThreadPoolExecutor(workers)
        bench.closing(pool.shutdown)

        def shared(clients: list[tuple[Callable[[], object], Callable[[], object]]]) -> Run:
            def run(n: int) -> None:
                calls = [lambda add=add, get=get: (add(), get()) for add, get in clients]
                for future in [pool.submit(repeated(call), n // workers) for call in calls]:
                    future.result()

            return run

        jobs = queue(bench)
        yield PGKV, shared([(lambda: jobs.put(PAYLOAD), lambda: doing(jobs))] * workers)
        for name, make in ((PGMQ, pgmq), (PROCRASTINATE, procrastinate), (REDIS, redis_list)):
            clients = [made for _ in range(workers) if (made := make(bench))]
            if clients:
                yield name, shared(clients)

    return made


for count in (4, 8):
    name = f"queue: put, take, ack, {count} threads"
    case(name, {PGMQ: 0.9, PROCRASTINATE: 1.1, REDIS: None}, workers=count)(threads(count))


# What leaves that many finished jobs in each table. Triggers are off meanwhile: they leave nothing there.
FINISHED = {
    "{jobs} (queue, priority, due_at, max_attempts, created_at, payload)": (
        "'bench', i % 10, clock_timestamp(), 20, now(), 'x'"
    ),
    "bench_pgmq (vt, message)": "clock_timestamp(), '{}'",
    "procrastinate_jobs (queue_name, task_name, args)": "'bench', 'task', '{}'",
}


@facts("queue: put, take, ack under a snapshot that keeps a million finished jobs")
def dead_rows(bench: Bench) -> Iterator[Fact]:
    """The medians with rows of finished jobs, which no vacuum may remove. Redis keeps none."""
    count = DEAD // 50 if bench.quick else DEAD
    jobs = queue(bench)
    entrants = list(others(bench))
    empty = medians(jobs)

    def through() -> None:
        jobs.put(PAYLOAD)
        doing(jobs)

    with bench.psycopg() as conn, bench.psycopg() as old:
        old.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        old.execute("SELECT 1 FROM pg_class LIMIT 1")
        conn.execute("SET session_replication_role = replica")
        for target, values in FINISHED.items():
            table, _, columns = target.format(jobs=jobs._options.sql.t).partition(" ")
            if conn.execute("SELECT to_regclass($1)", [table]).fetchone() != (None,):
                rows = f"SELECT {values} FROM generate_series(1, {count}) i"
                conn.execute(f"INSERT INTO {table} {columns} {rows}".encode())
                conn.execute(f"DELETE FROM {table}".encode())
        full_look = spent(through)  # sets the marks
        name = f"queue: put, take, ack with {count:,} dead rows"
        parts = medians(jobs)
        yield Fact("queue: put, take, ack, empty", 1e6 * sum(empty), LATENCY)
        yield Fact(name, 1e6 * sum(parts), LATENCY)
        for part, seconds in zip(("put", "take", "ack"), parts, strict=True):
            yield Fact(f"{name}: the {part}", 1e6 * seconds, LATENCY)
        yield Fact(f"{name}, of the empty table's", 100 * sum(parts) / sum(empty), "%", Goal(300))
        yield Fact(f"{name}: a full look", 1e6 * full_look, LATENCY)
        for other, add, get in entrants:
            middle = median(spent(lambda: (add(), get())) for _ in range(15))  # noqa: B023  # called at once
            yield Fact(f"{name}, {other}", 1e6 * middle, LATENCY)


def medians(jobs: pgkv.Queue[bytes]) -> list[float]:
    """Those of a put, a take and an ack, in seconds."""
    taken: list[pgkv.Job[bytes]] = []

    def take() -> None:
        taken.append(jobs.take() or taken[0])

    calls = lambda: jobs.put(PAYLOAD), take, lambda: taken.pop().ack()
    rounds = [[spent(call) for call in calls] for _ in range(300)]
    return [median(times) for times in zip(*rounds, strict=True)]
