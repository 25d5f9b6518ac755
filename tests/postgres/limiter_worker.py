"""A process that hammers one key of a limiter with several threads: `python -m tests.postgres.limiter_worker`.

Arguments: DSN, rates, seconds, threads. It waits for a line on stdin, so that all begin at once, and
prints what the server decided: one line per hit, its clock in nanoseconds and 1 or 0.
"""

from __future__ import annotations

import sys
import threading
import time

import pgkv
from pgkv.patterns.rate_limit.sql import Arrival


def main(dsn: str, rates: str, seconds: str, threads: str) -> None:
    decided: list[tuple[int, bool]] = []
    with pgkv.Store.connect(dsn, pool_max_size=int(threads)) as store:
        limiter = pgkv.RateLimiter(store, rates, name="storm", timeout=20)
        policy = limiter._flows.policy
        decide = policy.decide

        def noted(arrival: Arrival, cost: int, *, allowed: bool | None = None) -> pgkv.Decision:
            decided.append((arrival.now, arrival.charged))
            return decide(arrival, cost, allowed=allowed)

        policy.decide = noted  # type: ignore[method-assign]  # what the server's clock said is kept nowhere else
        store.ping()
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        sys.stdin.readline()
        end = time.monotonic() + float(seconds)

        def hammer() -> None:
            # The last decision of each is a denial: then nothing is left that nobody asked for.
            while limiter.hit("hot") or time.monotonic() < end:
                pass

        crew = [threading.Thread(target=hammer) for _ in range(int(threads))]
        for each in crew:
            each.start()
        for each in crew:
            each.join()
    sys.stdout.writelines(f"{now} {int(charged)}\n" for now, charged in decided)


if __name__ == "__main__":
    main(*sys.argv[1:])
