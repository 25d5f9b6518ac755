"""The renewer never oversleeps an end, whenever that was added, and no accident ends it."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
from typing import Any

import pytest

from pgkv._background.renewal import Renewer, clock


class FakeLease:
    """It is lost at once when looked at after its end; each renewal gives it a minute."""

    name = "n"

    def __init__(self, seconds: float, due: float = float("inf")) -> None:
        self._due = clock() + due
        self._until = clock() + seconds
        self.told = asyncio.Event()
        self.renewed = 0

    @property
    def is_lost(self) -> bool:
        if clock() >= self._until:
            self.told.set()
        return self.told.is_set()


class FakeRenewal:
    """Renews by doing nothing, as often as `failures` says after an error."""

    def __init__(self, *failures: BaseException) -> None:
        self.failures = list(failures)
        self.names: list[str] = []
        self.ended: list[Any] = []
        self.gate: asyncio.Event | None = None

    async def renew(self, connection: Any, batch: list[Any], seconds: float) -> None:
        if self.gate is not None:
            await self.gate.wait()
        if self.failures:
            raise self.failures.pop(0)
        for each in batch:
            each.renewed += 1
            each._due, each._until = clock() + 0.05, clock() + 60
        batch.clear()

    def abandoned(self, name: str) -> None:
        self.names.append(name)

    def closed(self, each: Any) -> None:
        self.ended.append(each)


class ReadyConnection:
    """A connection that is always there."""

    is_ready = True

    def close(self) -> None:
        pass


def renewer_here() -> Renewer:
    connection: Any = ReadyConnection()
    return Renewer(asyncio.get_running_loop(), connection, contextvars.Context())


async def until(condition: Any) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_lease_added_while_the_renewer_looks_is_seen() -> None:
    """Another thread adds a lease after the renewer has gone through the list and before it has
    said when it will look again: it is told of its end in time."""
    renewer, renewal = renewer_here(), FakeRenewal()
    first, second = FakeLease(0.05), FakeLease(0.2)
    look, added = renewer._look_after, False

    def look_and_add(now: float) -> float:
        nonlocal added
        soonest = look(now)
        if first.told.is_set() and not added:
            added = True
            renewer.add(second, renewal)
        return soonest

    renewer._look_after = look_and_add  # type: ignore[method-assign]  # comes in between
    renewer.add(first, renewal)
    await asyncio.wait_for(second.told.wait(), 30)
    renewer.stop()


@pytest.mark.parametrize("error", [ZeroDivisionError("why"), KeyboardInterrupt()])
async def test_a_mistake_does_not_end_renewal(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """An exception while looking is logged, and the next look comes all the same; so it does after
    an interrupt."""
    renewer = renewer_here()
    lease = FakeLease(0.05)
    look, failures = renewer._look_after, [error]

    def fail_once(now: float) -> float:
        if failures:
            raise failures.pop()
        return look(now)

    renewer._look_after = fail_once  # type: ignore[method-assign]  # comes in between
    with contextlib.suppress(KeyboardInterrupt):
        renewer._next_look = 0.0  # it does not look by itself now
        renewer.add(lease, FakeRenewal())
        renewer._look()
    await asyncio.wait_for(lease.told.wait(), 30)
    if isinstance(error, Exception):
        assert "pgkv.background.broken error=ZeroDivisionError" in caplog.text
    renewer.stop()


async def test_cancelling_every_task_does_not_end_renewal() -> None:
    """A program that cancels all tasks of its loop, once or again and again, a renewal under way
    among them: the lease is renewed all the same."""
    renewer, renewal = renewer_here(), FakeRenewal()
    lease = FakeLease(60, due=0.0)
    renewal.gate = asyncio.Event()
    renewer.add(lease, renewal)
    for _ in range(3):
        await until(lambda: renewer._sending is not None)
        sending = renewer._sending
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await until(lambda sending=sending: renewer._sending is not sending)
        lease._due = 0.0
    renewal.gate.set()
    await until(lambda: lease.renewed >= 2)
    renewer.stop()


async def test_a_renewal_that_raises_is_repeated(caplog: pytest.LogCaptureFixture) -> None:
    """A defect in one kind of renewal is logged and repeated, and the other kinds go on."""
    renewer = renewer_here()
    bad, good = FakeRenewal(ZeroDivisionError("why")), FakeRenewal()
    leases = [FakeLease(60, due=0.0) for _ in range(2)]
    renewer.add(leases[0], bad)
    renewer.add(leases[1], good)
    await until(lambda: leases[0].renewed and leases[1].renewed)
    assert "pgkv.background.broken error=ZeroDivisionError" in caplog.text
    renewer.stop()


async def test_dropped_and_closed() -> None:
    """A lease that was dropped is renewed no more, and its kind is told; so it is of those that
    live when the background ends."""
    renewer, renewal = renewer_here(), FakeRenewal()
    leases = [FakeLease(60, due=0.0), kept := FakeLease(60)]
    for lease in leases:
        renewer.add(lease, renewal)
    await until(lambda: leases[0].renewed)
    del lease, leases[:]
    gc.collect()
    await until(lambda: renewal.names == ["n"])
    renewer.stop()
    assert renewal.ended == [kept]
    assert not renewer._entries


async def test_a_loss_is_told_in_the_context_of_the_holder() -> None:
    """What is called for a loss sees the context variables of the code that took the lease."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")
    renewer = renewer_here()
    seen: list[str] = []

    class Noting(FakeLease):
        @property
        def is_lost(self) -> bool:
            seen.append(variable.get())
            return super().is_lost

    lease = Noting(0.05)
    variable.set("mine")
    renewer.add(lease, FakeRenewal())
    variable.set("other")
    await asyncio.wait_for(lease.told.wait(), 30)
    assert set(seen) == {"mine"}
    renewer.stop()
