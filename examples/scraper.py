"""Four processes scrape one site and keep to its rate together: 20 requests a second in all.

    python examples/scraper.py                                  # starts a database of its own
    PGKV_DSN=postgresql://user@host/db python examples/scraper.py

The site is a local one that notes when it was asked. `acquire` waits for the turn of each request,
first come, first served; no process knows of the others.
"""

import multiprocessing
import os
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import urlopen

import pgkv

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


def scrape(dsn: str, url: str, worker: int) -> None:
    """One worker: its own share of the pages, everybody's share of the rate."""
    with pgkv.Store.connect(dsn) as store:
        limiter = pgkv.RateLimiter(store, RATE, name="scraper", timeout=5)
        for page in range(PAGES):
            limiter.acquire("site", timeout=60)
            urlopen(f"{url}/{worker}/{page}").read()  # noqa: S310  # the site above


def main(dsn: str) -> None:
    """Start the site and the workers, and look at what the site saw."""
    site = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{site.server_port}"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=scrape, args=(dsn, url, n)) for n in range(PROCESSES)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
        if each.exitcode:
            raise SystemExit("a worker failed")
    site.shutdown()
    site.server_close()
    span = max(asked) - min(asked)
    fair = RATE.burst + span * RATE.count
    print(f"{len(asked)} requests of {PROCESSES} processes in {span:.1f} s; {fair:.0f} would fit")


if __name__ == "__main__":
    if found := os.environ.get("PGKV_DSN"):
        main(found)
    else:
        with tempfile.TemporaryDirectory() as directory:
            dsn = f"embedded://{directory}/pg"
            with pgkv.Store.connect(dsn):  # the server runs as long as somebody uses it
                main(dsn)
