"""Scene: processes share one job by a lock. One is killed while it holds it, one is paused.

The job is a ledger, read when a turn begins and written when it ends: two holders at once would
lose an entry. It is written under `Lease.guard`, in one transaction with a receipt that has the
token. So the receipts show what the ledger must contain, whichever process died when.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from itertools import pairwise
from time import monotonic
from typing import Any, NamedTuple

import psycopg

from ...errors import LeaseLostError, LockTimeoutError
from ...patterns.lock.api import Lease, Lock
from ...store import Store
from .. import console
from .stage import Check, Report, Scene, Stage
from .workers import Orders, Worker, WorkerGroup, answer

PROCESSES = 4
LEDGER, RECEIPT = "demo:ledger", "demo:receipt:"
WORK = 0.1  # seconds between reading and writing
TTL, TTL_MIN = 1.0, 0.6  # seconds
TIMEOUT = 100.0  # seconds for the whole scene
GUARD_MAX = 30.0  # seconds that a process stopped in its transaction could block the others


class Turn(NamedTuple):
    """A grant, as its process reported it: when by the server's clock, where that could still be
    read; and whether the process waits for an order before it continues."""

    token: int
    at: float | None
    stays: bool
    worker: Worker


class Log:
    """What the processes have reported."""

    def __init__(self, workers: WorkerGroup) -> None:
        self._workers = workers
        self._until = monotonic() + TIMEOUT
        self.turns: list[Turn] = []
        self.ended: dict[str, list[int]] = {"done": [], "refused": [], "ended": []}  # tokens

    def read_until(self, enough: Callable[[], Any]) -> Any:
        """Read reports until there is enough; what `enough` returned."""
        while not (found := enough()):
            if monotonic() > self._until:
                raise TimeoutError(f"the processes made no progress in {TIMEOUT:g} s")
            worker, (what, token, at, stays) = self._workers.answer()
            if what == "granted":
                self.turns.append(Turn(token, at, stays, worker))
            else:
                self.ended[what].append(token)
        return found

    def has_finished(self, token: int) -> bool:
        """Whether the turn with that token has ended, one way or the other."""
        return token in self.ended["done"] or token in self.ended["refused"]

    def everybody_works(self) -> None:
        """Wait for as many finished turns as there are processes."""
        wanted = len(self.ended["done"]) + PROCESSES
        self.read_until(lambda: len(self.ended["done"]) >= wanted)

    def turn(self, wanted: Callable[[Turn], bool], *, after: int = 0) -> Turn:
        """Wait for such a turn, with a higher token than the other."""
        found: Turn = self.read_until(
            lambda: next((each for each in self.turns if each.token > after and wanted(each)), None)
        )
        return found


def lock_of(store: Store, ttl: float) -> Lock:
    """Return the lock that all processes share, by its name. They take turns."""
    return Lock(store, "demo", ttl=ttl, fair=True, wakeup="notify")


def play(stage: Stage) -> Report:
    """Let them work, kill one, pause one, and check the ledger."""
    ttl = min(TTL, max(TTL_MIN, stage.size.seconds / 2))
    lock = lock_of(stage.store, ttl)
    fates = ["killed", "paused"] if hasattr(signal, "SIGSTOP") else ["killed"]
    pause = min(WORK, stage.size.seconds / 10)
    said: list[str] = []
    beyond: list[float] = []
    paused = 0
    with stage.workers("fleet", PROCESSES, ttl=ttl, pause=pause) as workers:
        log = Log(workers)
        workers.tell("go")
        with stage.bar("working under one lock", len(fates)) as advance:
            for victim, fate in zip(workers.members, fates, strict=False):
                log.everybody_works()
                victim.tell("stay")
                lost = log.turn(lambda turn, it=victim: turn.worker is it and turn.stays)  # type: ignore[misc]  # bound now
                struck = monotonic()
                if fate == "killed":
                    victim.kill()
                else:
                    victim.process.send_signal(signal.SIGSTOP)
                info = lock.holder()  # its lease is no longer renewed
                found = log.turn(lambda turn, it=victim: turn.worker is not it, after=lost.token)  # type: ignore[misc]  # as above
                said.append(
                    f"{victim} was {fate} while it held the lock with token {lost.token}; "
                    f"{found.worker} got it {monotonic() - struck:.2f} s later (ttl {ttl:g} s) "
                    f"with token {found.token}"
                )
                if info is not None and info.token == lost.token and found.at is not None:
                    beyond.append(found.at - info.expires_at.timestamp())
                if fate == "paused":
                    paused = lost.token
                    victim.process.send_signal(signal.SIGCONT)
                    victim.tell("go on")
                    log.read_until(lambda token=paused: log.has_finished(token))  # type: ignore[misc]  # as above
                advance(1)
        log.everybody_works()
        workers.stop()
        log.read_until(lambda: len(log.ended["ended"]) == PROCESSES - 1)  # one is dead
    return Report(said, _checks(stage.store, log, beyond, paused))


def _checks(store: Store, log: Log, beyond: list[float], paused: int) -> list[Check]:
    # The server's clock gives the order; the tokens have to agree with it.
    tokens = [token for _, token in sorted((each.at, each.token) for each in log.turns if each.at)]
    ledger = int(store.get(LEDGER) or 0)
    receipts = [int(value) for _, value in store.scan(RECEIPT)]
    done = len(log.ended["done"])
    checks = [
        Check(f"{len(tokens)} grants to {PROCESSES} processes, each with a higher token than the last",
              all(one < other for one, other in pairwise(tokens))),
        Check(f"never two holders: the ledger counts {ledger}, after {done} turns with "
              f"{len(receipts)} receipts, in the order of their tokens",
              receipts == list(range(1, ledger + 1)) and ledger == done),
    ]  # fmt: skip
    if beyond:
        later = " and ".join(map(console.duration, beyond))
        text = f"every lease was kept until its end: the next grant came {later} later"
        checks.append(Check(f"{text}, by the server's clock", min(beyond) >= 0))
    if paused:
        text = "the paused process continued after the takeover, and its write was refused"
        checks.append(Check(text, paused in log.ended["refused"]))
    return checks


# -- in the processes ----------------------------------------------------------------------


def work(store: Store, orders: Orders, *, ttl: float, pause: float) -> None:
    """Take turns until told to end."""
    lock = lock_of(store, ttl)
    with psycopg.connect(store.dsn, autocommit=True, prepare_threshold=None) as conn:
        orders.next()
        while not orders.ended:
            try:
                lease = lock.acquire(timeout=3 * ttl)
            except LockTimeoutError:
                continue
            _take_turn(store, orders, lock, lease, conn, pause)
    answer(["ended", 0, None, False])


def _take_turn(
    store: Store, orders: Orders, lock: Lock, lease: Lease, conn: Any, pause: float
) -> None:
    entry = int(store.get(LEDGER) or 0) + 1
    info = lock.holder()
    mine = info is not None and info.token == lease.token
    at = info.acquired_at.timestamp() if info is not None and mine else None
    stays = orders.one_waits()
    answer(["granted", lease.token, at, stays])
    if stays:
        orders.next()
    else:
        orders.pause(pause)
    what = "done"
    try:
        with conn.transaction():
            lease.guard(conn, max_hold=GUARD_MAX)
            receipt = f"{RECEIPT}{lease.token:020}"
            store.using(conn).set_many({LEDGER: str(entry), receipt: str(entry)})
    except LeaseLostError:
        what = "refused"
    finally:
        lease.release()
    answer([what, lease.token, None, False])


SCENE = Scene(
    "A fleet with one lock",
    f"{PROCESSES} processes share a job. One is killed at work, another is paused past its lease: the "
    "job must continue, and be done by one process at a time.",
    play,
)
