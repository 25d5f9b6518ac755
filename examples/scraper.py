"""Four processes scrape one site and keep to its rate together: 20 requests a second in all.

    python examples/scraper.py                                   # starts a PostgreSQL of its own
    PGKV_DSN=postgresql://user@host/db python examples/scraper.py

`acquire` waits for the turn of each request, first come, first served. No process knows of the
others: the rate is kept in the database. The site is a local one that notes when it was asked.

Look at: the seconds that it took, the rate that the site saw, and its busiest moment. Each process
may carry one token on its way to the site; that is all by which the site may see more than the rate.
"""

import itertools
import multiprocessing
import os
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import urlopen

import psycopg

import pgkv
from pgkv import embedded

SCHEMA = "pgkv_example_scraper"
PROCESSES, PAGES = 4, 12
RATE = pgkv.Rate(20, period=1.0, burst=5)

asked: list[float] = []


class Site(BaseHTTPRequestHandler):
    """A site that notes when it was asked."""

    def do_GET(self) -> None:
        """Note the time and answer."""
        asked.append(time.monotonic())
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"a page")

    def log_message(self, format: str, *args: object) -> None:
        """Quietly."""


def scrape(site: str, worker: int) -> None:
    """One process: its own share of the pages, everybody's share of the rate."""
    with pgkv.Store.connect(schema=SCHEMA) as store:
        limiter = pgkv.RateLimiter(store, RATE, name="scraper", timeout=20)
        for page in range(PAGES):
            limiter.acquire(site, timeout=60)
            with urlopen(f"{site}/{worker}/{page}") as answer:  # noqa: S310  # the site above
                answer.read()


def main() -> None:
    """Start the site and the processes, and look at what the site saw."""
    site = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    serving = threading.Thread(target=site.serve_forever)
    serving.start()
    url = f"http://127.0.0.1:{site.server_port}"
    spawn = multiprocessing.get_context("spawn")
    fleet = [spawn.Process(target=scrape, args=(url, n)) for n in range(PROCESSES)]
    try:
        for each in fleet:
            each.start()
        for each in fleet:
            each.join()
    finally:
        site.shutdown()
        serving.join()
        site.server_close()
        with psycopg.connect(os.environ["PGKV_DSN"], autocommit=True) as conn:
            conn.execute(f"DROP SCHEMA IF EXISTS {SCHEMA} CASCADE")

    asked.sort()
    seconds = asked[-1] - asked[0]
    print(f"{len(asked)} requests of {PROCESSES} processes in {seconds:.1f} s,")
    print(f"after a burst of {RATE.burst}: {(len(asked) - RATE.burst) / seconds:.1f} a second")
    excess = max(
        last - first + 1 - RATE.count * (asked[last] - asked[first])
        for first, last in itertools.combinations(range(len(asked)), 2)
    )
    allowed = RATE.burst + PROCESSES
    print(
        f"at worst {excess:.1f} requests above the rate, of {allowed} allowed: the burst, and one on its way for each"
    )
    if len(asked) != PROCESSES * PAGES or excess > allowed:
        raise SystemExit("the rate was not kept")


if __name__ == "__main__":
    if "PGKV_DSN" in os.environ:
        main()
    else:  # an embedded PostgreSQL, for as long as this runs
        with tempfile.TemporaryDirectory() as directory, embedded.start(directory) as server:
            os.environ["PGKV_DSN"] = server.dsn
            main()
