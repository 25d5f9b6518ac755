"""Scene: processes share one job by a lock. One is killed while it holds it, one is paused.

The job is a ledger, read when a turn begins and written when it ends: two holders at once would
lose an entry. It is written under `Lease.guard`, in one transaction with a receipt that has the
token. So the receipts show what the ledger must contain, whichever process died when.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from itertools import pairwise
from time import monotonic, sleep
from typing import TypeVar

import psycopg

from ...errors import LeaseLostError
from ...patterns.lock.api import Lock
from ...store import Store
from .. import console
from .stage import Check, DemoWorker, Orders, Stage, scene

T = TypeVar("T")
PROCESSES = 4
LEDGER, RECEIPT = "demo:ledger", "demo:receipt:"
WORK = 0.1  # seconds between reading and writing
TTL, TTL_MIN = 1.0, 0.6  # seconds
GUARD_MAX = 30.0  # seconds that a process stopped in its transaction could block the others


def lock_of(store: Store, ttl: float) -> Lock:
    """Return the lock that all processes share, by its name. They take turns."""
    return Lock(store, "demo", ttl=ttl, fair=True, wakeup="notify")


@scene(
    "A fleet with one lock",
    f"{PROCESSES} processes share a job. One is killed at work, another is paused past its lease. "
    "The job must continue, with one process at a time.",
)
def fleet(stage: Stage) -> Iterator[str | Check]:
    store = stage.store
    ttl = min(TTL, max(TTL_MIN, stage.size.seconds / 2))
    lock = lock_of(store, ttl)
    # (token, when by the server's clock, whether it waits for an order, whose), and how each ended.
    grants: list[tuple[int, float | None, bool, DemoWorker]] = []
    ended: dict[int, str] = {}
    beyond: list[float] = []  # seconds from the end of a lost lease to the next grant

    def read_until(enough: Callable[[], T | None]) -> T:
        while not (found := enough()):
            worker, (what, token, at, stays) = workers.answer()
            if what == "granted":
                grants.append((token, at, stays, worker))
            else:
                ended[token] = what
        return found

    def every_turn() -> None:
        wanted = len(ended) + PROCESSES
        read_until(lambda: len(ended) >= wanted)

    def strike(victim: DemoWorker, fate: str) -> tuple[str, int]:
        """Kill or pause it while it holds the lock; return what happened, and its token."""
        every_turn()
        victim.tell("stay")
        token = read_until(lambda: next((g[0] for g in grants if g[2] and g[3] is victim), 0))
        struck = monotonic()
        victim.kill() if fate == "killed" else victim.send_signal(signal.SIGSTOP)
        info = lock.holder()  # its lease is no longer renewed
        _, at, _, heir = read_until(
            lambda: next((g for g in grants if g[0] > token and g[3] is not victim), None)
        )
        later = monotonic() - struck
        if info is not None and info.token == token and at is not None:
            beyond.append(at - info.expires_at.timestamp())
        if fate == "paused":
            victim.send_signal(signal.SIGCONT)
            victim.tell("go on")
            read_until(lambda: token in ended)
        said = f"{victim} was {fate} while it held the lock: {heir} got it {later:.2f} s later"
        return f"{said} (ttl {ttl:g} s)", token

    fates = ["killed", "paused"] if hasattr(signal, "SIGSTOP") else ["killed"]
    pause = min(WORK, stage.size.seconds / 10)
    with stage.workers(work, PROCESSES, ttl=ttl, pause=pause) as workers:
        workers.tell("go")
        struck = []
        with stage.bar("working under one lock", len(fates)) as advance:
            for victim, fate in zip(workers.members, fates, strict=False):
                struck.append(strike(victim, fate))
                advance(1)
        every_turn()
        workers.tell(None)
        read_until(lambda: sum(what == "left" for what in ended.values()) == PROCESSES - 1)
    yield from (said for said, _ in struck)
    # The server's clock gives the order; the tokens have to agree with it.
    tokens = [token for _, token in sorted((at, token) for token, at, *_ in grants if at)]
    text = f"{len(tokens)} grants to {PROCESSES} processes, each with a higher token than the last"
    yield Check(text, all(one < other for one, other in pairwise(tokens)))
    ledger, done = int(store.get(LEDGER) or 0), list(ended.values()).count("done")
    receipts = [int(value) for _, value in store.scan(RECEIPT)]
    text = f"one holder at a time: the ledger counts {ledger} after {done} turns, with "
    text = f"{text}{len(receipts)} receipts in the order of their tokens"
    yield Check(text, receipts == list(range(1, ledger + 1)) and ledger == done)
    if beyond:
        later = " and ".join(map(console.duration, beyond))
        text = f"every lease was kept until its end: the next grant came {later} after it"
        yield Check(f"{text}, by the server's clock", min(beyond) >= 0)
    if "paused" in fates:
        text = "the paused process continued after the takeover, and the store refused its write"
        yield Check(text, ended[struck[-1][1]] == "refused")


# -- in the processes ----------------------------------------------------------------------


def work(store: Store, orders: Orders, *, ttl: float, pause: float) -> None:
    lock = lock_of(store, ttl)
    with psycopg.connect(store.dsn, autocommit=True, prepare_threshold=None) as conn:
        orders.next()
        while not orders.ended:
            try:
                lease = lock.acquire(timeout=3 * ttl)
            except TimeoutError:  # the lock's or, on a busy machine, a statement's
                continue
            entry = str(int(store.get(LEDGER) or 0) + 1)
            info = lock.holder()
            mine = info is not None and info.token == lease.token
            at = info.acquired_at.timestamp() if info is not None and mine else None
            stays = orders.one_waits()
            orders.answer(["granted", lease.token, at, stays])
            orders.next() if stays else sleep(pause)
            what = "done"
            try:
                with conn.transaction():
                    lease.guard(conn, max_hold=GUARD_MAX)
                    receipt = f"{RECEIPT}{lease.token:020}"
                    store.using(conn).set_many({LEDGER: entry, receipt: entry})
            except LeaseLostError:
                what = "refused"
            finally:
                lease.release()
            orders.answer([what, lease.token, None, False])
    orders.answer(["left", -os.getpid(), None, False])
