"""Scene: processes share one job by a lock. One is killed while it holds it, one is paused.

The job is a ledger, read when a turn begins and written when it ends: two holders at once would
lose an entry. It is written under `Lease.guard`, in one transaction with a receipt that has the
token. So the receipts show what the ledger must contain, whichever process died when.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from time import monotonic
from typing import Any

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


@dataclass(frozen=True, slots=True)
class Turn:
    """A grant, as its process reported it.

    Args:
        token: the fencing token.
        at: when it was granted, by the server's clock, in seconds since 1970; None: it had ended
            before that could be read.
        stays: the process waits for an order before it continues.
        worker: the process.
        heard: when the demo got the report, by its own clock.
    """

    token: int
    at: float | None
    stays: bool
    worker: Worker
    heard: float


@dataclass(frozen=True, slots=True)
class Takeover:
    """What followed when a holder was killed or paused.

    Args:
        lost: its turn.
        found: the next one.
        seconds: from the signal to that.
        beyond: seconds between the end of the lost lease and the next grant, by the server's clock.
    """

    lost: Turn
    found: Turn
    seconds: float
    beyond: float | None


@dataclass(slots=True)
class Log:
    """What the processes have reported. `until` ends a scene in which no process gets a turn."""

    workers: WorkerGroup
    until: float
    turns: list[Turn] = field(default_factory=list)
    done: list[int] = field(default_factory=list)  # tokens
    refused: list[int] = field(default_factory=list)
    ended: int = 0

    def read(self) -> None:
        """Wait for the next report."""
        if monotonic() > self.until:
            raise TimeoutError(f"the processes made no progress in {TIMEOUT:g} s")
        worker, told = self.workers.answer()
        if told["what"] == "ended":
            self.ended += 1
        elif told["what"] == "granted":
            turn = Turn(told["token"], told["at"], told["stays"], worker, monotonic())
            self.turns.append(turn)
        else:
            (self.done if told["what"] == "done" else self.refused).append(told["token"])

    def finish(self, count: int) -> None:
        """Wait until that many more turns were finished."""
        wanted = len(self.done) + count
        while len(self.done) < wanted:
            self.read()

    def next_turn(self, wanted: Callable[[Turn], bool], *, after: Turn | None = None) -> Turn:
        """Wait for such a turn, later than the other."""
        place = 0 if after is None else self.turns.index(after) + 1
        while True:
            for each in self.turns[place:]:
                if wanted(each):
                    return each
            self.read()


def lock_of(store: Store, ttl: float) -> Lock:
    """Return the lock that all processes share, by its name. They take turns."""
    return Lock(store, "demo", ttl=ttl, fair=True, wakeup="notify")


def play(stage: Stage) -> Report:
    """Let them work, kill one, pause one, and check the ledger."""
    ttl = min(TTL, max(TTL_MIN, stage.size.seconds / 2))
    lock = lock_of(stage.store, ttl)
    fates = ["killed", "paused"] if hasattr(signal, "SIGSTOP") else ["killed"]
    pause = min(WORK, stage.size.seconds / 10)
    with stage.workers("fleet", PROCESSES, ttl=ttl, pause=pause) as workers:
        log = Log(workers, monotonic() + TIMEOUT)
        workers.tell("go")
        takeovers: dict[str, Takeover] = {}
        with stage.bar("working under one lock", len(fates)) as advance:
            for victim, fate in zip(workers.members, fates, strict=False):
                log.finish(PROCESSES)
                takeovers[fate] = _strike(log, lock, victim, fate)
                advance(1)
        log.finish(PROCESSES)
        workers.stop()
        while log.ended < PROCESSES - 1:  # one is dead
            log.read()
    return _report(stage, log, takeovers, ttl)


def _strike(log: Log, lock: Lock, victim: Worker, fate: str) -> Takeover:
    """Kill or pause a process while it holds the lock, and wait until another one does."""
    victim.tell("stay")
    lost = log.next_turn(lambda each: each.worker is victim and each.stays)
    struck = monotonic()
    if fate == "killed":
        victim.kill()
    else:
        victim.signal(signal.SIGSTOP)
    info = lock.holder()  # its lease is no longer renewed
    found = log.next_turn(lambda each: each.worker is not victim, after=lost)
    beyond = None
    if info is not None and info.token == lost.token and found.at is not None:
        beyond = found.at - info.expires_at.timestamp()
    if fate == "paused":
        victim.signal(signal.SIGCONT)
        victim.tell("go on")
        while lost.token not in log.done + log.refused:
            log.read()
    return Takeover(lost, found, found.heard - struck, beyond)


def _report(stage: Stage, log: Log, takeovers: dict[str, Takeover], ttl: float) -> Report:
    said = [
        f"{each.lost.worker} was {fate} while it held the lock with token {each.lost.token}; "
        f"{each.found.worker} got it {each.seconds:.2f} s later (ttl {ttl:g} s) with token "
        f"{each.found.token}"
        for fate, each in takeovers.items()
    ]
    # The server's clock gives the order; the tokens have to agree with it.
    tokens = [token for _, token in sorted((each.at, each.token) for each in log.turns if each.at)]
    ledger = int(stage.store.get(LEDGER) or 0)
    receipts = [int(value) for _, value in stage.store.scan(RECEIPT)]
    checks = [
        Check(f"{len(tokens)} grants to {PROCESSES} processes, each with a higher token than the last",
              all(one < other for one, other in pairwise(tokens))),
        Check(f"never two holders: the ledger counts {ledger}, after {len(log.done)} turns with "
              f"{len(receipts)} receipts, in the order of their tokens",
              receipts == list(range(1, ledger + 1)) and ledger == len(log.done)),
    ]  # fmt: skip
    beyond = [each.beyond for each in takeovers.values() if each.beyond is not None]
    if beyond:
        later = " and ".join(map(console.duration, beyond))
        text = f"every lease was kept until its end: the next grant came {later} later"
        checks.append(Check(f"{text}, by the server's clock", min(beyond) >= 0))
    if "paused" in takeovers:
        text = "the paused process continued after the takeover, and its write was refused"
        checks.append(Check(text, takeovers["paused"].lost.token in log.refused))
    return Report(said, checks)


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
    answer({"what": "ended"})


def _take_turn(
    store: Store, orders: Orders, lock: Lock, lease: Lease, conn: Any, pause: float
) -> None:
    entry = int(store.get(LEDGER) or 0) + 1
    info = lock.holder()
    mine = info is not None and info.token == lease.token
    at = info.acquired_at.timestamp() if info is not None and mine else None
    stays = orders.next(wait=False) is not None
    answer({"what": "granted", "token": lease.token, "at": at, "stays": stays})
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
    answer({"what": what, "token": lease.token})


SCENE = Scene(
    "A fleet with one lock",
    f"{PROCESSES} processes share a job. One is killed at work, another is paused past its lease: the "
    "job must continue, and be done by one process at a time.",
    play,
)
