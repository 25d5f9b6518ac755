"""How long an acquire asks the server: the flow, fed its answers."""

from __future__ import annotations

from typing import Any

import pytest

import pgkv
from pgkv._ops.drivers import drive
from pgkv._ops.op import Op
from pgkv.patterns._runtime.renewal import clock
from pgkv.patterns.lock import flows
from pgkv.patterns.lock.sql import Denied, Granted


class BusyPort:
    """Everything is held; notes the seconds that each statement is given."""

    timeout = 20.0

    def __init__(self) -> None:
        self.asked: list[float | None] = []

    def execute(self, op: Op[Any], timeout: float | None = None) -> Denied:
        self.asked.append(timeout)
        return Denied(None, 0.0)

    def is_exhausted(self) -> bool:
        return False

    def wait(self, waiter: object, seconds: float) -> None:
        """No time passes here."""


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


def test_the_head_of_a_queue_looks_often_and_others_by_their_place(store: pgkv.Store) -> None:
    """The head looks within 5 ms of a move, and within a tenth of a second while nothing moves; who
    stands behind it sleeps for about half the time that the queue needs, and never so long that its
    ticket could end."""
    runtime: Any = BusyPort()
    waiting: flows.Acquisition[Any] = flows.Acquisition(
        runtime, pgkv.Lock(store, "n", fair=True)._options, None
    )
    assert waiting._pause_in_queue(0) == pytest.approx(flows.HEAD_FIRST)
    pauses = [waiting._pause_in_queue(0) for _ in range(30)]
    assert pauses == sorted(pauses)
    assert pauses[-1] == pytest.approx(flows.HEAD_MAX)
    waiting.place, waiting.turn = (101, clock() - 1.0), 0.0
    assert waiting._pause_in_queue(100) == flows.QUEUE_MAX < flows.TICKET_TTL / 2
    assert waiting.turn == pytest.approx(1.0, rel=0.5)
    waiting.turn = 0.04
    waiting.place = (10, clock())
    assert waiting._pause_in_queue(10) == pytest.approx(0.2)


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

        def lease(self, *args: Any) -> Any:
            return GrantingPort()

        def clean_later(self, _: object) -> None:
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

        def lease(self, *args: Any) -> Any:
            return RepeatingPort()

    port: Any = RepeatingPort()
    assert drive(flows.acquire(port, pgkv.Semaphore(store, "n", 3)._options, 0.0)) is not None
    assert [name for name, _ in sent] == [
        "semaphore_grant", "semaphore_close", "semaphore_take_back",
    ]  # fmt: skip
    assert b"n\x1f1" not in sent[2][1]
    assert b"n\x1f0" in sent[2][1]
    assert b"n\x1f2" in sent[2][1]
