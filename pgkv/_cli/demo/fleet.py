"""Scene: processes that share one job by a lock. One is killed while it holds it, one is paused.

The job is a ledger, read when a turn begins and written when it ends: two holders at once would
lose an entry. It is written under `Lease.guard`, in one transaction with a receipt that bears the
token. So the receipts tell what the ledger has to say, whoever died when.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from time import monotonic
from typing import Any, Literal

import psycopg
from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ...errors import LeaseLostError, LockTimeoutError
from ...patterns.lock.api import Lease, Lock
from ...store import Store
from .. import console
from .crew import Crew, Member, Orders, say
from .stage import Check, Report, Scene, Stage

PROCESSES = 4
LEDGER, RECEIPT = "demo:ledger", "demo:receipt:"
WORK = 0.1  # seconds between reading and writing
TTL, TTL_MIN = 1.0, 0.6  # seconds
PATIENCE = 100.0  # seconds for the whole of it
GUARD_MAX = 30.0  # seconds that a process stopped in its transaction could keep everybody out
STYLES = {"waits": "dim", "holds": "green", "killed": "red", "paused": "yellow"}
Fate = Literal["killed", "paused"]


@dataclass(frozen=True, slots=True)
class Grant:
    """A turn, as its process told it.

    Args:
        token: the fencing token.
        at: when it was granted, by the server's clock, in seconds since 1970; None: it was over
            before that could be read.
        stays: it waits for a word before it goes on.
        member: whose.
        heard: when the demo heard of it, by its own clock.
    """

    token: int
    at: float | None
    stays: bool
    member: Member
    heard: float


@dataclass(frozen=True, slots=True)
class Takeover:
    """What followed when a holder was killed or paused.

    Args:
        lost: its grant.
        found: the next one.
        seconds: from the signal to that.
        beyond: seconds between the end of the lost lease and the next grant, by the server's clock.
    """

    lost: Grant
    found: Grant
    seconds: float
    beyond: float | None


@dataclass(slots=True)
class Log:
    """What the processes have said, and how things are.

    Args:
        crew: the processes.
        show: shows how things are.
        until: when, by `monotonic`, to stop listening: of a lock that lets nobody get anywhere.
    """

    crew: Crew
    show: Callable[[RenderableType], None]
    until: float
    grants: list[Grant] = field(default_factory=list)
    done: list[int] = field(default_factory=list)  # tokens
    refused: list[int] = field(default_factory=list)
    states: dict[Member, str] = field(default_factory=dict)
    ended: int = 0

    def hear(self) -> None:
        """Wait for the next thing that a process says."""
        self.show(self._picture())
        if monotonic() > self.until:
            raise TimeoutError(f"the processes got nowhere in {PATIENCE:g} s")
        member, answer = self.crew.hear()
        if answer["what"] == "ended":
            self.ended += 1
            return
        if answer["what"] == "granted":
            self.grants.append(
                Grant(answer["token"], answer["at"], answer["stays"], member, monotonic())
            )
            self.states[member] = "holds"
            return
        self.states[member] = "waits"
        (self.done if answer["what"] == "done" else self.refused).append(answer["token"])

    def turns(self, count: int) -> None:
        """Wait until so many more turns were finished."""
        wanted = len(self.done) + count
        while len(self.done) < wanted:
            self.hear()

    def next_grant(self, wanted: Callable[[Grant], bool], *, after: Grant | None = None) -> Grant:
        """Wait for a grant like that, later than that one."""
        place = 0 if after is None else self.grants.index(after) + 1
        while True:
            for each in self.grants[place:]:
                if wanted(each):
                    return each
            self.hear()

    def _picture(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, header_style="bold")
        for column in ("process", "pid", "is", "turns", "last token"):
            table.add_column(column, justify="left" if column == "is" else "right", min_width=6)
        for member in self.crew.members:
            state = self.states.get(member, "waits")
            tokens = [each.token for each in self.grants if each.member is member]
            table.add_row(
                str(member.number), str(member.pid), Text(state, STYLES[state]),
                str(len(set(tokens) & set(self.done))), str(max(tokens, default="")),
            )  # fmt: skip
        return table


def lock_of(store: Store, ttl: float) -> Lock:
    """Return the lock that all processes share, by its name. They take turns."""
    return Lock(store, "demo", ttl=ttl, fair=True, wakeup="notify")


def play(stage: Stage) -> Report:
    """Let them work, kill one, pause one, and look whether the ledger is whole."""
    ttl = min(TTL, max(TTL_MIN, stage.size.seconds / 2))
    lock = lock_of(stage.store, ttl)
    fates: list[Fate] = ["killed", "paused"] if hasattr(signal, "SIGSTOP") else ["killed"]
    work = min(WORK, stage.size.seconds / 10)
    with stage.crew("fleet", PROCESSES, ttl=ttl, work=work) as crew, stage.live() as show:
        log = Log(crew, show, monotonic() + PATIENCE)
        crew.tell("go")
        takeovers: dict[Fate, Takeover] = {}
        for victim, fate in zip(crew.members, fates, strict=False):
            log.turns(PROCESSES)
            takeovers[fate] = _strike(log, lock, victim, fate)
        log.turns(PROCESSES)
        crew.stop()
        while log.ended < PROCESSES - 1:  # one is dead
            log.hear()
    return _report(stage, log, takeovers, ttl)


def _strike(log: Log, lock: Lock, victim: Member, fate: Fate) -> Takeover:
    """Kill or pause a process while it holds the lock, and wait until another one does."""
    victim.tell("stay")
    lost = log.next_grant(lambda each: each.member is victim and each.stays)
    struck = monotonic()
    if fate == "killed":
        victim.kill()
    else:
        victim.signal(signal.SIGSTOP)
    log.states[victim] = fate
    info = lock.holder()  # it is renewed no more
    found = log.next_grant(lambda each: each.member is not victim, after=lost)
    beyond = None
    if info is not None and info.token == lost.token and found.at is not None:
        beyond = found.at - info.expires_at.timestamp()
    if fate == "paused":
        victim.signal(signal.SIGCONT)
        victim.tell("go on")
        while lost.token not in log.done + log.refused:
            log.hear()
    return Takeover(lost, found, found.heard - struck, beyond)


def _report(stage: Stage, log: Log, takeovers: dict[Fate, Takeover], ttl: float) -> Report:
    said = [
        f"{each.lost.member} was {fate} while it held the lock with token {each.lost.token}; "
        f"{each.found.member} got it {each.seconds:.2f} s later (ttl {ttl:g} s) with token "
        f"{each.found.token}"
        for fate, each in takeovers.items()
    ]
    # The server's clock tells the order; the tokens have to agree with it.
    tokens = [token for _, token in sorted((each.at, each.token) for each in log.grants if each.at)]
    ledger = int(stage.store.get(LEDGER) or 0)
    receipts = [int(value) for _, value in stage.store.scan(RECEIPT)]
    checks = [
        Check(
            f"{len(tokens)} grants to {PROCESSES} processes, each with a higher token than the last",
            all(one < other for one, other in pairwise(tokens)),
        ),
        Check(
            f"never two holders: the ledger counts {ledger}, after {len(log.done)} turns with "
            f"{len(receipts)} receipts, in the order of their tokens",
            receipts == list(range(1, ledger + 1)) and ledger == len(log.done),
        ),
    ]
    beyond = [each.beyond for each in takeovers.values() if each.beyond is not None]
    if beyond:
        checks.append(
            Check(
                "no lease was given away before its end: the next grant came "
                f"{' and '.join(map(console.duration, beyond))} after it, by the server's clock",
                min(beyond) >= 0,
            )
        )
    if "paused" in takeovers:
        checks.append(
            Check(
                "when the paused one went on, with the lock in other hands, its write was refused",
                takeovers["paused"].lost.token in log.refused,
            )
        )
    return Report(said, checks)


# -- in the processes ----------------------------------------------------------------------


def take_part(store: Store, orders: Orders, *, ttl: float, work: float) -> None:
    """Take turns until told to stop."""
    lock = lock_of(store, ttl)
    with psycopg.connect(store.dsn, autocommit=True, prepare_threshold=None) as conn:
        orders.next()
        while not orders.ended:
            try:
                lease = lock.acquire(timeout=3 * ttl)
            except LockTimeoutError:
                continue
            _turn(store, orders, lock, lease, conn, work)
    say({"what": "ended"})


def _turn(store: Store, orders: Orders, lock: Lock, lease: Lease, conn: Any, work: float) -> None:
    entry = int(store.get(LEDGER) or 0) + 1
    info = lock.holder()
    mine = info is not None and info.token == lease.token
    stays = orders.heard()
    say(
        {
            "what": "granted",
            "token": lease.token,
            "at": info.acquired_at.timestamp() if info is not None and mine else None,
            "stays": stays,
        }
    )
    if stays:
        orders.next()
    else:
        orders.pause(work)
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
    say({"what": what, "token": lease.token})


SCENE = Scene(
    "A fleet with one lock",
    f"{PROCESSES} processes share a job. One is killed at work, another one wakes up after its time: "
    "the job must go on, and be done by one at a time.",
    play,
)
