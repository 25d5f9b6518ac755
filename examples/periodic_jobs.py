"""Periodic jobs: two schedulers, two workers; a scheduler is killed, and each slot runs exactly once.

    python examples/periodic_jobs.py                              # starts a PostgreSQL of its own
    PGKV_DSN=postgresql://user@host/db python examples/periodic_jobs.py

Time is cut into slots of 0.2 seconds. The scheduler that leads puts one job for each slot. The job
and the slot's idempotency key are one transaction, so a slot that has its job is never given
another, also by a scheduler that was paused and believes that it still leads. A new leader begins two
minutes in the past: slots that have a job are replays, the others are made up for. The leader
only spares the others the work.

Look at: the scheduler that was killed; that no slot was run twice, and that none is missing.
"""

import multiprocessing
import os
import signal
import tempfile
import threading
import time

import psycopg

import pgkv
from pgkv import embedded

SCHEMA = "pgkv_example_periodic"
PERIOD = 0.2  # seconds of a slot
MISSED = 600  # slots that a new leader looks back
COUNT = "SELECT count(*), count(DISTINCT slot), max(slot) - min(slot) + 1 FROM runs"


def connect() -> psycopg.Connection:
    """A connection for the table of what was run."""
    return psycopg.connect(os.environ["PGKV_DSN"], options=f"-c search_path={SCHEMA}")


def jobs_of(store: pgkv.Store) -> pgkv.Queue[tuple[int, int]]:
    """The queue: a slot, and the process that put it."""
    return pgkv.Queue(store, "periodic", lease=1, wakeup="notify").typed(tuple[int, int])


def schedule(first: int) -> None:
    """Campaign, and put the jobs of all slots from the first one on while leading."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    with pgkv.Store.connect(schema=SCHEMA) as store:
        jobs, slots = jobs_of(store), pgkv.Idempotency(store, ttl=3600)

        def lead(lease: pgkv.Lease) -> None:
            slot = max(first, int(time.time() / PERIOD) - MISSED)
            while not stop.wait(max(0, slot * PERIOD - time.time())):
                lease.check()
                with connect() as conn, slots.using(conn).once(str(slot), scope="report") as run:
                    if not run.is_replay:
                        jobs.using(conn).put((slot, os.getpid()))
                slot += 1

        pgkv.Leader(store, "periodic", ttl=1.5, on_elected=lead).run(stop)


def work() -> None:
    """Run the jobs. The effect and the acknowledgement are one transaction."""
    with pgkv.Store.connect(schema=SCHEMA) as store:
        jobs = jobs_of(store)

        def do(job: pgkv.Job[tuple[int, int]]) -> None:
            with connect() as conn:
                conn.execute("INSERT INTO runs VALUES (%s, %s)", job.payload)
                jobs.using(conn).ack(job)

        pgkv.Worker(jobs, do, concurrency=2).run()


def scheduler(conn: psycopg.Connection, but: int = 0) -> int:
    """Wait until another scheduler has put ten jobs that were run; its process."""
    query = "SELECT scheduler FROM runs WHERE scheduler <> %s GROUP BY 1 HAVING count(*) >= 10"
    until = time.monotonic() + 60
    while time.monotonic() < until:
        for (pid,) in conn.execute(query, [but]):
            return int(pid)
        time.sleep(0.05)
    raise SystemExit("no scheduler leads")


def main() -> None:
    """Kill the scheduler that leads, let the next one go on, and count the runs."""
    spawn = multiprocessing.get_context("spawn")
    first = int(time.time() / PERIOD)
    schedulers = [spawn.Process(target=schedule, args=(first,)) for _ in range(2)]
    workers = [spawn.Process(target=work) for _ in range(2)]
    with pgkv.Store.connect(schema=SCHEMA) as store, connect() as conn:
        conn.autocommit = True
        conn.execute("CREATE TABLE runs (slot bigint, scheduler int)")
        jobs_of(store).create_table()
        try:
            for process in (*workers, *schedulers):
                process.start()
            leader = scheduler(conn)
            os.kill(leader, signal.SIGKILL)
            print(f"scheduler {leader} was killed", flush=True)
            print(f"scheduler {scheduler(conn, but=leader)} went on", flush=True)
            for process in schedulers:
                process.terminate()
                process.join()
            while sum(jobs_of(store).stats()[1:4]):
                time.sleep(0.05)
            [[runs, distinct, due]] = conn.execute(COUNT)
            print(f"{runs} runs, {runs - distinct} doubled, {due - distinct} missing")
            if not runs == distinct == due:
                raise SystemExit("a slot was run twice or not at all")
        finally:
            for process in (*schedulers, *workers):
                process.terminate()  # SIGTERM: it ends in order
                process.join()
            conn.execute(f"DROP SCHEMA {SCHEMA} CASCADE")


if __name__ == "__main__":
    if "PGKV_DSN" in os.environ:
        main()
    else:  # an embedded PostgreSQL, for as long as this runs
        with tempfile.TemporaryDirectory() as directory, embedded.start(directory) as server:
            os.environ["PGKV_DSN"] = server.dsn
            main()
