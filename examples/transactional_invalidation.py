"""A cache that changes with its data: after a commit nobody reads the value of before.

    python examples/transactional_invalidation.py                # starts a PostgreSQL of its own
    PGKV_DSN=postgresql://user@host/db python examples/transactional_invalidation.py

Prices are in a table, and cached. Whoever changes one invalidates it through `using(conn)`: that
commits, or rolls back, with the change. A computation that read before the change and ends after
it is not stored. Done by hand ("compute, then set; delete after the commit") it would be.

Look at: the price after a rollback and after a commit; then two processes compare cache and table
while a third changes the price: how often the cache is behind, by hand and with pgkv.
"""

import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor

import psycopg

import pgkv
from pgkv import embedded

SCHEMA = "pgkv_example_prices"
CHANGES, SECONDS = 40, 0.01

pgkv.configure(schema=SCHEMA)  # where decorators keep their entries; the DSN is that of PGKV_DSN


def connect() -> psycopg.Connection:
    """A connection for the table of prices."""
    options = f"-c search_path={SCHEMA}"
    return psycopg.connect(os.environ["PGKV_DSN"], autocommit=True, options=options)


def read(item: str, conn: psycopg.Connection) -> int:
    """Return the price as the table has it."""
    [[cents]] = conn.execute("SELECT cents FROM prices WHERE item = %s", [item])
    return int(cents)


@pgkv.cached(ttl=3600, ignore=("conn",), store_timeout=20)
def price(item: str, conn: psycopg.Connection) -> int:
    """Return the price, by a computation that takes a while after it has read the table."""
    cents = read(item, conn)
    time.sleep(SECONDS)
    return cents


def raise_price(item: str, conn: psycopg.Connection) -> None:
    """Add a cent, and take the old price out of the cache, by one commit."""
    with conn.transaction():
        conn.execute("UPDATE prices SET cents = cents + 1 WHERE item = %s", [item])
        price.using(conn).invalidate(item, conn)


def price_by_hand(item: str, conn: psycopg.Connection, store: pgkv.Store) -> int:
    """The same cache, as one would write it without pgkv.cached."""
    if (kept := store.get(item)) is not None:
        return int(kept)
    cents = price.__wrapped__(item, conn)
    store.set(item, str(cents), ttl=3600)
    return int(cents)


def change(*, by_hand: bool) -> None:
    """One process: raise the price again and again."""
    with pgkv.Store.connect(schema=SCHEMA) as store, connect() as conn:
        for n in range(CHANGES):
            raise_price("tea", conn)
            if by_hand:
                store.delete("tea")
            time.sleep(n % 4 * SECONDS)  # also before a computation has ended


def watch(last: int, *, by_hand: bool) -> tuple[int, int]:
    """Another: compare cache and table until the last change; how often, and how often behind."""
    compared, behind, committed = 0, 0, 0
    with pgkv.Store.connect(schema=SCHEMA) as store, connect() as conn:
        while committed < last:
            committed = read("tea", conn)
            cents = price_by_hand("tea", conn, store) if by_hand else price("tea", conn)
            compared += 1
            behind += cents < committed
    return compared, behind


def together(pool: ProcessPoolExecutor, conn: psycopg.Connection, *, by_hand: bool) -> int:
    """Let one process change and two watch; how often they found the cache behind."""
    last = read("tea", conn) + CHANGES
    watching = [pool.submit(watch, last, by_hand=by_hand) for _ in range(2)]
    pool.submit(change, by_hand=by_hand).result()
    compared, behind = map(sum, zip(*(each.result() for each in watching), strict=True))
    way = "by hand" if by_hand else "with pgkv.cached"
    print(f"{way}: compared {compared} times, {behind} times behind the table")
    return int(behind)


def main() -> None:
    """Roll back, commit, and then let processes read and change at the same time."""
    spawn = multiprocessing.get_context("spawn")
    with pgkv.Store.connect(schema=SCHEMA), connect() as conn:
        try:
            conn.execute("CREATE TABLE prices AS SELECT 'tea' AS item, 100 AS cents")
            first = price("tea", conn)
            with conn.transaction(force_rollback=True):
                raise_price("tea", conn)
            kept = price.peek("tea")
            raise_price("tea", conn)
            then = price("tea", conn)
            print(
                f"cached: {first}; after a rollback: {kept and kept.value}; after a commit: {then}"
            )
            ready = spawn.Barrier(3, timeout=60).wait  # so that they begin together
            with ProcessPoolExecutor(3, mp_context=spawn, initializer=ready) as pool:
                together(pool, conn, by_hand=True)
                behind = together(pool, conn, by_hand=False)
            if behind or kept is None or (kept.value, then) != (first, first + 1):
                raise SystemExit("the cache was behind its data")
        finally:
            conn.execute(f"DROP SCHEMA {SCHEMA} CASCADE")


if __name__ == "__main__":
    if "PGKV_DSN" in os.environ:
        main()
    else:  # an embedded PostgreSQL, for as long as this runs
        with tempfile.TemporaryDirectory() as directory, embedded.start(directory) as server:
            os.environ["PGKV_DSN"] = server.dsn
            main()
