"""Orders are placed, paid and shipped by a fleet of workers, of which some are killed.

    python examples/order_pipeline.py                              # starts a PostgreSQL of its own
    PGKV_DSN=postgresql://user@host/db python examples/order_pipeline.py

An order and its job are one transaction. A worker takes the job, does one step, and acknowledges it
in the transaction of the step, which also puts the job of the next one. A worker that is killed
leaves its job to another when the lease ends. A leader puts a report once per second, under a key: a
report that waits already is not put twice.

Look at: the workers that were killed; that every order was paid once and shipped once all the same.
"""

import multiprocessing
import os
import tempfile
import threading
import time

import psycopg

import pgkv
from pgkv import embedded

SCHEMA = "pgkv_example_orders"
ORDERS, WORKERS, KILLS = 40, 4, 3

TABLES = """
CREATE TABLE orders (id int PRIMARY KEY);
CREATE TABLE effects (step text, id int);
CREATE TABLE reports (made_at timestamptz);
"""
COUNT = "SELECT count(*), count(DISTINCT id) FROM effects WHERE step = %s"


def connect() -> psycopg.Connection:
    """A connection for the tables of the orders, which are in the schema of the queues."""
    return psycopg.connect(os.environ["PGKV_DSN"], options=f"-c search_path={SCHEMA}")


def queues(store: pgkv.Store) -> dict[str, pgkv.Queue[int]]:
    """The steps of an order, and reports."""
    names = ("pay", "ship", "report")
    return {name: pgkv.Queue(store, name, lease=1, wakeup="notify").typed(int) for name in names}


def work() -> None:
    """A worker of all queues, one job at a time."""
    with pgkv.Store.connect(schema=SCHEMA) as store:
        steps = queues(store)

        def do(job: pgkv.Job[int]) -> None:
            with connect() as conn:
                if job.queue == "report":
                    conn.execute("INSERT INTO reports VALUES (now())")
                else:
                    conn.execute("INSERT INTO effects VALUES (%s, %s)", [job.queue, job.payload])
                    time.sleep(0.05)  # the step takes a while: here a kill hits it
                if job.queue == "pay":
                    steps["ship"].using(conn).put(job.payload)
                steps[job.queue].using(conn).ack(job)

        pgkv.Worker(steps.values(), do, concurrency=1).run()


def work_of(steps: dict[str, pgkv.Queue[int]]) -> list[pgkv.QueueStats]:
    """How much is left of each step that is not done."""
    found = [steps[name].stats() for name in ("pay", "ship")]
    return [each for each in found if each.waiting or each.delayed or each.running]


def report(store: pgkv.Store, stop: threading.Event) -> None:
    """Put a report each second, from one process of the fleet."""

    def lead(lease: pgkv.Lease) -> None:
        while not stop.wait(1):
            lease.check()
            queues(store)["report"].put(0, dedupe="report")

    pgkv.Leader(store, "reports", ttl=3, on_elected=lead).run(stop)


def main() -> None:
    """Place the orders, kill some of those who work on them, and count."""
    spawn = multiprocessing.get_context("spawn")
    fleet = [spawn.Process(target=work) for _ in range(WORKERS)]
    stop = threading.Event()
    with pgkv.Store.connect(schema=SCHEMA) as store, connect() as conn:
        conn.execute(TABLES)
        conn.commit()
        steps = queues(store)
        steps["pay"].create_table()
        leader = threading.Thread(target=report, args=(store, stop))
        leader.start()
        try:
            for worker in fleet:
                worker.start()
            for number in range(1, ORDERS + 1):
                conn.execute("INSERT INTO orders VALUES (%s)", [number])
                steps["pay"].using(conn).put(number)
                conn.commit()  # the order and its job, or neither
            for _ in range(KILLS):
                # One at work, while there is work.
                while (found := work_of(steps)) and not any(each.running for each in found):
                    time.sleep(0.02)
                time.sleep(0.03)
                victim = fleet.pop(0)
                victim.kill()
                victim.join()
                print(f"worker {victim.pid} was killed", flush=True)
                fleet.append(spawn.Process(target=work))
                fleet[-1].start()
            while work_of(steps):
                time.sleep(0.05)
            for step, done in (("pay", "paid"), ("ship", "shipped")):
                [[effects, orders]] = conn.execute(COUNT, [step])
                print(f"{done}: {effects} times, {orders} orders")
                if not effects == orders == ORDERS:
                    raise SystemExit("an order was lost or doubled")
            [[reports]] = conn.execute("SELECT count(*) FROM reports")
            print(f"reports in that time: {reports}")
        finally:
            stop.set()
            leader.join()
            for worker in fleet:
                worker.terminate()  # SIGTERM: it ends in order
                worker.join()
            conn.rollback()
            conn.execute(f"DROP SCHEMA {SCHEMA} CASCADE")
            conn.commit()


if __name__ == "__main__":
    if "PGKV_DSN" in os.environ:
        main()
    else:  # an embedded PostgreSQL, for as long as this runs
        with tempfile.TemporaryDirectory() as directory, embedded.start(directory) as server:
            os.environ["PGKV_DSN"] = server.dsn
            main()
