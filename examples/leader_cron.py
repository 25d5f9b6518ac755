"""A cron of three processes: one leads and ticks; it is killed, another goes on; no tick is doubled.

    python examples/leader_cron.py                               # starts a PostgreSQL of its own
    PGKV_DSN=postgresql://user@host/db python examples/leader_cron.py

Every process campaigns. The one that is elected ticks ten times a second, each tick in a
transaction that its lease guards: until that ends nobody else is elected, however long the leader
is paused, and a leader whose lease has ended is refused. One that is told to stop resigns, and the
next begins at once; of one that is killed the lease has to end first. What fell due meanwhile is
made up for.

Look at: the terms, which rise; how long each change took; that no tick is doubled or missing.
"""

import asyncio
import contextlib
import multiprocessing
import os
import signal
import tempfile
import time

import psycopg

import pgkv
from pgkv import embedded

SCHEMA = "pgkv_example_cron"
OPTIONS = f"-c search_path={SCHEMA}"
PERIOD = 0.1  # seconds from tick to tick
COUNT = "SELECT count(*), count(DISTINCT n), max(n) - min(n) + 1 FROM ticks"


async def candidate() -> None:
    """Campaign, lead when elected, resign when told to stop."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    conn = await psycopg.AsyncConnection.connect(os.environ["PGKV_DSN"], options=OPTIONS)

    async def lead(lease: pgkv.AsyncLease) -> None:
        async with conn.transaction():
            [[n]] = await (await conn.execute("SELECT max(n) FROM ticks")).fetchall()
        with contextlib.suppress(pgkv.LeaseLostError):
            while True:
                n += 1
                await asyncio.sleep(n * PERIOD - time.time())  # not at all if it is overdue
                async with conn.transaction():
                    await lease.guard(conn)
                    # The job. One that leaves the database should take the term along.
                    await conn.execute("INSERT INTO ticks VALUES (%s, %s)", [n, lease.token])
                    said = f"{os.getpid()} {lease.token}"
                    await conn.execute("SELECT pg_notify('ticks', %s)", [said])

    async with conn, pgkv.AsyncStore.connect(schema=SCHEMA) as store:
        await pgkv.AsyncLeader(store, "cron", ttl=1.5, on_elected=lead).run(stop)


def run() -> None:
    """What each process does."""
    asyncio.run(candidate())


def next_leader(conn: psycopg.Connection, after: int = 0) -> tuple[int, int]:
    """Wait until a leader of a later term has ticked ten times; its process and term."""
    since, first, leader, ticks = time.monotonic(), 0.0, (0, after), 0
    for note in conn.notifies(timeout=60):
        pid, term = map(int, note.payload.split())
        if term > leader[1]:
            first, leader, ticks = time.monotonic() - since, (pid, term), 0
        ticks += term > after
        if ticks == 10:
            print(f"process {pid} leads, term {term}, after {first:.1f} s")
            return leader
    raise SystemExit("nobody leads")


def main() -> None:
    """Start the cron, kill its leader, tell the next one to stop, and look at the ticks."""
    spawn = multiprocessing.get_context("spawn")
    cron = [spawn.Process(target=run) for _ in range(3)]
    dsn = os.environ["PGKV_DSN"]
    with (
        pgkv.Store.connect(schema=SCHEMA),
        psycopg.connect(dsn, autocommit=True, options=OPTIONS) as conn,
    ):
        conn.execute("CREATE TABLE ticks (n bigint, term bigint)")
        conn.execute("INSERT INTO ticks VALUES (%s, 0)", [time.time() // PERIOD])
        conn.execute("LISTEN ticks")
        for process in cron:
            process.start()
        try:
            pid, term = next_leader(conn)
            os.kill(pid, signal.SIGKILL)
            print("killed it", flush=True)
            pid, term = next_leader(conn, term)
            os.kill(pid, signal.SIGTERM)
            print("told it to stop", flush=True)
            next_leader(conn, term)
            for process in cron:
                process.terminate()
                process.join()
            [[ticks, distinct, due]] = conn.execute(COUNT)
            print(f"{ticks} ticks, {ticks - distinct} doubled, {due - distinct} missing")
            if not ticks == distinct == due:
                raise SystemExit("a tick was doubled or lost")
        finally:
            for process in cron:
                process.kill()
            conn.execute(f"DROP SCHEMA {SCHEMA} CASCADE")


if __name__ == "__main__":
    if "PGKV_DSN" in os.environ:
        main()
    else:  # an embedded PostgreSQL, for as long as this runs
        with tempfile.TemporaryDirectory() as directory, embedded.start(directory) as server:
            os.environ["PGKV_DSN"] = server.dsn
            main()
