"""How long an acquire asks the server: the flow, fed its answers."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

import pgkv
from pgkv._ops.drivers import drive
from pgkv._ops.op import Flow, Op
from pgkv.patterns.lock import flows
from pgkv.patterns.lock.lease import LockOptions
from pgkv.patterns.lock.sql import Denied, Granted


class BusyPort:
    """Everything is held; notes the seconds that each statement is given."""

    timeout = 20.0

    def __init__(self) -> None:
        self.asked: list[float | None] = []
        self.channel = self

    def execute(self, op: Op[Any], timeout: float | None = None) -> Denied:
        self.asked.append(timeout)
        return Denied(None, 0.0)

    def is_exhausted(self) -> bool:
        return False

    def wait(self, waiter: object, seconds: float) -> Flow[None]:
        """No time passes here."""
        yield from ()


@pytest.fixture
def store() -> pgkv.Store:
    """Never connected."""
    return pgkv.Store(pgkv.Config("postgresql://"))


@pytest.mark.parametrize(("ttl", "seconds"), [(30, 20.0), (8, 8.0), (1, 5.0)])
@pytest.mark.parametrize("kind", [pgkv.Lock, pgkv.Semaphore])
def test_one_try_has_the_time_of_any_operation(
    store: pgkv.Store, kind: Any, ttl: float, seconds: float
) -> None:
    """A try that waits for nobody is one statement with the store's time, or the lease's if that is
    less: connecting may take longer than a second."""
    port: Any = BusyPort()
    slots = {"slots": 2} if kind is pgkv.Semaphore else {}
    terms = kind(store, "n", ttl=ttl, **slots)._options
    assert drive(flows.acquire(port, terms, 0.0)) is None
    assert port.asked == [seconds]


def test_who_waits_has_his_time_and_a_second_at_least(store: pgkv.Store) -> None:
    """Each statement of a wait ends with it, but none is given less than a second."""
    port: Any = BusyPort()
    terms = pgkv.Lock(store, "n")._options
    assert drive(flows.acquire(port, terms, 0.001)) is None
    assert set(port.asked) == {1.0}


class Queue:
    """A lock and its waiters on a clock of their own: each look takes a round trip, and so does
    being granted and releasing. Whoever has released it asks again a moment later.

    Attributes:
        grants: how many there were.
        looks: how many statements asked for the lock.
        idle: looks at a lock that was free which did not take it.
    """

    def __init__(self, waiters: int, round_trip: float, hold: Callable[[], float]) -> None:
        self.grants = self.looks = self.idle = 0
        self._now = 0.0
        self._random = Random(waiters)
        self._round_trip = round_trip
        self._hold = hold
        self._events: list[tuple[float, int, Callable[..., None], Any]] = []
        self._numbers = itertools.count()
        self._queue: list[Any] = []
        self._held = False
        for _ in range(waiters):
            self._later(self._random.uniform(0, 0.5), self._ask, None)

    def run(self, options: LockOptions, seconds: float) -> Queue:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flows, "clock", lambda: self._now)
            patch.setattr(flows, "uniform", self._random.uniform)
            self._options = options
            while self._now < seconds:
                self._now, _, step, waiting = heapq.heappop(self._events)
                step(waiting)
        return self

    def _later(self, seconds: float, step: Callable[..., None], waiting: Any) -> None:
        heapq.heappush(self._events, (self._now + seconds, next(self._numbers), step, waiting))

    def _half(self) -> float:
        return self._round_trip / 2 * self._random.uniform(0.7, 1.3)

    def _ask(self, waiting: Any) -> None:
        if waiting is None:
            runtime: Any = BusyPort()
            waiting = flows.Acquisition(runtime, self._options, None)
        self._later(self._half(), self._look, waiting)

    def _look(self, waiting: Any) -> None:
        self.looks += 1
        if waiting not in self._queue:
            self._queue.append(waiting)
        ahead = self._queue.index(waiting) if self._options.fair else 0
        if ahead or self._held:
            self.idle += not self._held
            pause = waiting.pause(Denied(None, 0.0, ahead))
            self._later(self._half() + pause, self._ask, waiting)
            return
        self._queue.remove(waiting)
        self._held = True
        self.grants += 1
        self._later(self._half() + self._hold() + self._half(), self._release, None)

    def _release(self, _: None) -> None:
        self._held = False
        self._later(self._half() + 0.02, self._ask, None)


@pytest.mark.parametrize("round_trip", [0.001, 0.004, 0.02])
@pytest.mark.parametrize("hold", ["none", "short", "sometimes long"])
def test_a_fair_lock_by_polling_keeps_up_with_one_that_is_not(
    store: pgkv.Store, round_trip: float, hold: str
) -> None:
    """200 waiters that take turns get at least half as many grants as those that do not, by at most
    30 looks a grant, of which few find it free and not theirs."""
    counts = itertools.count()
    holds = {
        "none": lambda: 0.0,
        "short": lambda: 0.02,
        "sometimes long": lambda: 0.002 if next(counts) % 20 else 0.3,
    }
    fair, unfair = (
        Queue(200, round_trip, holds[hold]).run(pgkv.Lock(store, "n", fair=fair)._options, 10)
        for fair in (True, False)
    )
    assert fair.grants > unfair.grants / 2
    assert fair.looks / fair.grants < 30
    assert fair.idle / fair.grants < 10


def test_a_waiter_in_a_queue_never_loses_its_ticket_by_sleeping(store: pgkv.Store) -> None:
    """However slow the queue is, a waiter asks long before its ticket ends; the head of one that
    stands still looks ten times a second."""
    runtime: Any = BusyPort()
    waiting: flows.Acquisition[Any] = flows.Acquisition(
        runtime, pgkv.Lock(store, "n", fair=True)._options, None
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flows, "clock", lambda: 0.0)
        assert waiting._pause_in_queue(5000) == flows.QUEUE_MAX
        assert flows.QUEUE_MAX + flows.TICKET_FRESH < flows.TICKET_TTL * 3 / 4
        patch.setattr(flows, "clock", lambda: 5.0)
        assert waiting._pause_in_queue(0) == pytest.approx(flows.LOOK_MIN, abs=0.001)
        patch.setattr(flows, "clock", lambda: 60.0)
        assert waiting._pause_in_queue(0) == flows.STALL_MAX


def test_old_names_are_removed_by_who_is_granted_a_lock(
    store: pgkv.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One grant in 256 removes the old names of the first chunk and of one other at random."""
    asked: list[tuple[str, bytes]] = []
    options = pgkv.Lock(store, "n", fair=True)._options

    def execute(op: Op[Any], _timeout: float | None) -> int:
        asked.append((op.statement.sql, bytes(op.params[0] or b"")))
        return 5 * 128

    drive(flows.clean(options), execute)
    tables = [sql.split("ctid", 1)[0] for sql, _ in asked]
    assert ["tickets" in table for table in tables] == [False, False, True, True]
    pages = [int(tid.strip(b"()").split(b",")[0]) for _, tid in asked]
    assert pages[0] == pages[2] == 0
    assert {pages[1], pages[3]} <= {128, 256, 384, 512}

    granted: list[int] = []
    draws = iter([0.5, 1 / 256, 0.0])
    monkeypatch.setattr(flows, "random", lambda: next(draws))

    class GrantingPort(BusyPort):
        def execute(self, op: Op[Any], timeout: float | None = None) -> Any:
            return Granted(1, b"n")

        def watch(self, held: Any) -> Any:
            return held

        def run_later(self, _: object) -> None:
            granted.append(1)

    port: Any = GrantingPort()
    for expected in (0, 0, 1):
        drive(flows.acquire(port, pgkv.Lock(store, "n")._options, 0.0))
        assert len(granted) == expected


def test_a_denial_of_a_statement_that_was_sent_again_is_taken_back(store: pgkv.Store) -> None:
    """The answer to the first sending was lost, and it may be committed after the second was denied:
    what it asked for is taken back."""
    sent: list[str] = []

    class RepeatingPort(BusyPort):
        def execute(self, op: Op[Any], timeout: float | None = None) -> Any:
            sent.append(op.statement.name)
            op.retries = 1
            answers = {"lock_take": None, "lock_look": None, "lock_grant": Denied(None, 5.0)}
            return answers.get(op.statement.name, True)

    port: Any = RepeatingPort()
    assert drive(flows.acquire(port, pgkv.Lock(store, "n")._options, 0.0)) is None
    assert sent == ["lock_take", "lock_look", "lock_grant", "lock_take_back"]


def test_a_slot_granted_to_a_statement_that_was_sent_again_is_the_only_one(
    store: pgkv.Store,
) -> None:
    """The answer to the first sending was lost: the slot that it may be granted is given back, and
    not the one that the second was granted."""
    sent: list[tuple[str, bytes]] = []

    class RepeatingPort(BusyPort):
        def execute(self, op: Op[Any], timeout: float | None = None) -> Any:
            sent.append((op.statement.name, bytes(op.params[0] or b"")))
            op.retries = 1
            return Granted(7, b"n\x1f1") if op.statement.name == "semaphore_grant" else True

        def watch(self, held: Any) -> Any:
            return held

    port: Any = RepeatingPort()
    assert drive(flows.acquire(port, pgkv.Semaphore(store, "n", 3)._options, 0.0)) is not None
    assert [name for name, _ in sent] == [
        "semaphore_grant", "semaphore_close", "semaphore_take_back",
    ]  # fmt: skip
    assert b"n\x1f1" not in sent[2][1]
    assert b"n\x1f0" in sent[2][1]
    assert b"n\x1f2" in sent[2][1]
