"""How long an acquire asks the server: the flow, fed its answers."""

from __future__ import annotations

from typing import Any

import pytest

import pgkv
from pgkv._ops.drivers import drive
from pgkv._ops.op import Op
from pgkv.patterns.lock import flows
from pgkv.patterns.lock.sql import Denied


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
