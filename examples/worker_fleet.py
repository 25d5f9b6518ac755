"""A fleet of workers that share one job: exclusive by a lock, safe by its fencing token.

Each worker takes the lock, reads the ledger, works, and writes the result with its token. One of
them is too slow: it outlives its lease, as a paused process would, and comes back with an old
result. The ledger's trigger (`pgkv.fence_sql`) refuses that write; nothing is lost.

Run it with a DSN in PGKV_DSN; it makes a table `ledger` and drops it again.
"""

from __future__ import annotations

import os
import threading
import time

import psycopg

import pgkv

WORKERS, ROUNDS = 4, 5


def work(store: pgkv.Store, dsn: str, slow: bool) -> int:
    """Add to the ledger so many times; how often a write was refused."""
    # Without renewal a slow worker loses its lease, as one that is paused would.
    lock = pgkv.Lock(store, "ledger", ttl=0.3, renew=False)
    refused = 0
    with psycopg.connect(dsn, autocommit=True) as conn:
        for round_ in range(ROUNDS):
            while True:
                lease = lock.acquire()
                row = conn.execute("SELECT total FROM ledger").fetchone()
                assert row is not None
                if slow and round_ == 2 and not refused:
                    time.sleep(1.0)
                try:
                    # The token travels with the write; the table compares it.
                    conn.execute(
                        "UPDATE ledger SET total = %s, fence = %s", [row[0] + 1, lease.token]
                    )
                except psycopg.errors.ObjectNotInPrerequisiteState:
                    refused += 1
                    continue
                finally:
                    lease.release()
                break
    return refused


def main() -> None:
    """Run the fleet and check the total."""
    dsn = os.environ["PGKV_DSN"]
    with pgkv.Store.connect(dsn) as store, psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("CREATE TABLE ledger (total int NOT NULL, fence bigint NOT NULL DEFAULT 0)")
        try:
            conn.execute("INSERT INTO ledger VALUES (0)")
            conn.execute(pgkv.fence_sql("ledger", "fence").encode())
            refused: list[int] = []
            fleet = [
                threading.Thread(target=lambda n=n: refused.append(work(store, dsn, n == 0)))
                for n in range(WORKERS)
            ]
            for thread in fleet:
                thread.start()
            for thread in fleet:
                thread.join()
            row = conn.execute("SELECT total FROM ledger").fetchone()
            assert row is not None
            print(f"{WORKERS} workers, {WORKERS * ROUNDS} additions, total {row[0]}")
            print(f"late writes refused by the fence: {sum(refused)}")
        finally:
            conn.execute("DROP TABLE ledger")


if __name__ == "__main__":
    main()
