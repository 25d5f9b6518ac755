"""A fleet of processes shares one job; one is killed, one is paused, and the total is exact.

    python examples/worker_fleet.py                              # starts a PostgreSQL of its own
    PGKV_DSN=postgresql://user@host/db python examples/worker_fleet.py

A turn reads a total, works for a while, and writes the total plus one; a lock keeps the others out.
The lease of the worker that is killed ends by itself, and others go on. The worker that is paused
wakes up after its lease and writes what it had computed long ago: its fencing token is older than
the one that the table has seen, and the table refuses it.

Look at: the tokens, which rise with every grant; the write that came too late; the total.
"""

import multiprocessing
import os
import signal
import tempfile
import time

import psycopg

import pgkv
from pgkv import embedded

SCHEMA = "pgkv_example_fleet"
WORKERS, GOAL, SECONDS = 4, 8, 0.5

TABLES = """
CREATE TABLE ledger (total int, fence bigint);
INSERT INTO ledger VALUES (0, 0);
CREATE TABLE turns (token bigint PRIMARY KEY, refused text);
"""
# Reading leaves the token in the row: from then on it takes no write of an earlier holder.
READ = "UPDATE ledger SET fence = %s RETURNING total"
WRITE = """
WITH written AS (UPDATE ledger SET total = %(total)s, fence = %(token)s)
INSERT INTO turns VALUES (%(token)s)
"""
REFUSED = "INSERT INTO turns VALUES (%s, %s)"
COUNT = "SELECT total, (SELECT count(*) FROM turns WHERE refused IS NULL) FROM ledger"


def connect() -> psycopg.Connection:
    """A connection for the tables of the job, which are in the schema of the lock's."""
    options = f"-c search_path={SCHEMA}"
    return psycopg.connect(os.environ["PGKV_DSN"], autocommit=True, options=options)


def lock_of(store: pgkv.Store, ttl: float = 1) -> pgkv.Lock:
    """The lock as all use it; whoever looks at it sees the holder's process."""
    return pgkv.Lock(
        store, "ledger", ttl=ttl, fair=True, wakeup="notify", metadata={"pid": os.getpid()}
    )


def work() -> None:
    """A worker: turns, until the goal is reached."""
    with pgkv.Store.connect(schema=SCHEMA) as store, connect() as conn:
        lock, token, total = lock_of(store), 0, 0
        while total < GOAL:
            try:
                with lock.acquire() as lease:
                    token = lease.token
                    [[total]] = conn.execute(READ, [token])
                    if total < GOAL:
                        time.sleep(SECONDS)  # the work
                        conn.execute(WRITE, {"total": total + 1, "token": token})
            except psycopg.errors.ObjectNotInPrerequisiteState as error:
                conn.execute(REFUSED, [token, error.diag.message_primary])
            except pgkv.LeaseLostError:
                pass  # nobody had come after it yet: the table would have refused it


def stop_at_work(lock: pgkv.Lock, conn: psycopg.Connection) -> tuple[int, int]:
    """Stop a worker between reading and writing; its process and its token."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        time.sleep(0.01)
        if found := lock.holder():
            pid: int = found.metadata["pid"]
            os.kill(pid, signal.SIGSTOP)
            os.waitpid(pid, os.WUNTRACED)  # until it stands still
            [[last]] = conn.execute("SELECT fence FROM ledger")
            if last == found.token and (now := lock.holder()) and now.age() < SECONDS:
                return pid, last
            os.kill(pid, signal.SIGCONT)  # it had not read yet, or may have written
    raise SystemExit("nobody was caught at work")


def main() -> None:
    """Start the fleet, kill one of it, pause another, and count."""
    spawn = multiprocessing.get_context("spawn")
    fleet = [spawn.Process(target=work) for _ in range(WORKERS)]
    with pgkv.Store.connect(schema=SCHEMA) as store, connect() as conn:
        conn.execute(TABLES)
        conn.execute(pgkv.fence_sql("ledger", "fence").encode())
        lock = lock_of(store, ttl=60)  # of those who do not work here none is killed or paused
        for worker in fleet:
            worker.start()
        try:
            pid, token = stop_at_work(lock, conn)
            os.kill(pid, signal.SIGKILL)
            print(f"token {token} was killed", flush=True)
            with lock.acquire() as lease:  # when the dead worker's lease has ended
                print(f"token {lease.token} came next", flush=True)

            pid, token = stop_at_work(lock, conn)
            print(f"token {token} was paused", flush=True)
            with lock.acquire() as lease:
                conn.execute(READ, [lease.token])
                print(f"token {lease.token} came next", flush=True)
            os.kill(pid, signal.SIGCONT)

            for worker in fleet:
                worker.join()
            [[said]] = conn.execute("SELECT refused FROM turns WHERE token = %s", [token])
            print(f"token {token} writes: {said}")
            [[total, accepted]] = conn.execute(COUNT)
            print(f"{accepted} turns were accepted, the total is {total}")
            if not total == accepted == GOAL:
                raise SystemExit("a turn was lost")
        finally:
            for worker in fleet:
                worker.kill()
            conn.execute(f"DROP SCHEMA {SCHEMA} CASCADE")


if __name__ == "__main__":
    if "PGKV_DSN" in os.environ:
        main()
    else:  # an embedded PostgreSQL, for as long as this runs
        with tempfile.TemporaryDirectory() as directory, embedded.start(directory) as server:
            os.environ["PGKV_DSN"] = server.dsn
            main()
