"""An expensive function before and after: computed once for all processes, then remembered.

    python examples/memoize.py                                   # starts a PostgreSQL of its own
    PGKV_DSN=postgresql://user@host/db python examples/memoize.py

In how many ways can n queens stand on a board so that none attacks another? The count takes a good
part of a second. One decorator keeps the answers in the database, where every process finds them.
Of four processes that ask for the same new answer at the same moment, one counts.

Look at: the two times of the same answer; who counted the other one, and how often.
"""

import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor

import psycopg

import pgkv
from pgkv import embedded

SCHEMA = "pgkv_example_memoize"
PROCESSES = 4

pgkv.configure(schema=SCHEMA)  # where decorators keep their entries; the DSN is that of PGKV_DSN


@pgkv.cached(ttl=3600, store_timeout=20)
def queens(n: int) -> int:
    """Count the solutions of the puzzle."""

    def place(taken: tuple[int, ...]) -> int:
        row = len(taken)
        return row == n or sum(
            place((*taken, column))
            for column in range(n)
            if all(column != c and abs(column - c) != row - r for r, c in enumerate(taken))
        )

    return place(())


def timed(n: int) -> tuple[int, float]:
    """Return the answer, and the milliseconds until it was there."""
    started = time.perf_counter()
    return queens(n), (time.perf_counter() - started) * 1000


def ask(n: int) -> tuple[int, int]:
    """What one process does: the answer, and how often it has counted itself."""
    return queens(n), queens.cache_info().misses


def main() -> None:
    """Ask, ask again, and let others ask."""
    try:
        answer, before = timed(9)
        again, after = timed(9)
        print(f"9 queens: {answer} ways, counted in {before:.0f} ms")
        print(
            f"again: {again} ways, remembered in {after:.1f} ms, {before / after:.0f} times faster"
        )

        spawn = multiprocessing.get_context("spawn")
        ready = spawn.Barrier(PROCESSES, timeout=60).wait  # so that they ask together
        with ProcessPoolExecutor(PROCESSES, mp_context=spawn, initializer=ready) as pool:
            answers, counted = zip(*pool.map(ask, [10] * PROCESSES), strict=True)
        print(
            f"10 queens, asked by {PROCESSES} processes at once: {answers}, counted {counted} times"
        )
        if set(answers) != {724} or sum(counted) != 1 or queens.cache_info().hits != 1:
            raise SystemExit("an answer was counted more than once")
    finally:
        with psycopg.connect(os.environ["PGKV_DSN"], autocommit=True) as conn:
            conn.execute(f"DROP SCHEMA IF EXISTS {SCHEMA} CASCADE")


if __name__ == "__main__":
    if "PGKV_DSN" in os.environ:
        main()
    else:  # an embedded PostgreSQL, for as long as this runs
        with tempfile.TemporaryDirectory() as directory, embedded.start(directory) as server:
            os.environ["PGKV_DSN"] = server.dsn
            main()
