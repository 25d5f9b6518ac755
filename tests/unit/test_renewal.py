"""The renewer never oversleeps a lease, whenever that was added."""

from __future__ import annotations

import asyncio
from typing import Any

from pgkv.patterns.lock.lease import clock
from pgkv.patterns.lock.renewal import Renewer


class FakeHold:
    """A lease that is lost at once when looked at after its end."""

    name = "n"

    def __init__(self, seconds: float) -> None:
        self._due = float("inf")
        self._until = clock() + seconds
        self.told = asyncio.Event()

    @property
    def is_lost(self) -> bool:
        if clock() >= self._until:
            self.told.set()
        return self.told.is_set()


class ReadyLink:
    """A connection that is always there."""

    def is_ready(self) -> bool:
        return True

    def close(self) -> None:
        pass


async def test_a_lease_added_while_the_renewer_looks_is_seen() -> None:
    """Another thread adds a lease after the renewer has gone through the list and before it has
    said when it will look again: it is told of its end in time."""
    renewer = Renewer(asyncio.get_running_loop(), ReadyLink())  # type: ignore[arg-type]
    first, second = FakeHold(0.05), FakeHold(0.2)
    look, added = renewer._look, False

    def look_and_add(now: float) -> float:
        nonlocal added
        soonest = look(now)
        if first.told.is_set() and not added:
            added = True
            renewer.add(second)  # type: ignore[arg-type]
        return soonest

    renewer._look = look_and_add  # type: ignore[method-assign]
    renewer.add(first)  # type: ignore[arg-type]
    await asyncio.wait_for(second.told.wait(), 2)
    await renewer.stop()


async def test_a_mistake_does_not_end_renewal(caplog: Any) -> None:
    """An exception while looking is logged, and the next look comes all the same."""
    renewer = Renewer(asyncio.get_running_loop(), ReadyLink())  # type: ignore[arg-type]
    hold = FakeHold(0.05)
    look, failures = renewer._look, 0

    def fail_once(now: float) -> float:
        nonlocal failures
        if not failures:
            failures += 1
            raise ZeroDivisionError("why")
        return look(now)

    renewer._look = fail_once  # type: ignore[method-assign]
    renewer.add(hold)  # type: ignore[arg-type]
    await asyncio.wait_for(hold.told.wait(), 3)
    assert "renewal_broken error=ZeroDivisionError detail=why" in caplog.text
    await renewer.stop()
