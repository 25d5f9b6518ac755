"""The drivers of flows, and clean-up that a cancellation does not cut short."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from pgkv._ops.drivers import drive, drive_async, shielded
from pgkv._ops.op import Flow, call, pause


def steps() -> Flow[int]:
    yield from pause(0.0)
    return (yield from call(len, "abc"))


async def test_a_flow_of_calls_and_pauses_needs_no_channel() -> None:
    """Both drivers run it to its end."""
    assert drive(steps()) == await drive_async(steps()) == 3


def test_a_sync_driver_names_the_function_that_is_async() -> None:
    """What it cannot await is refused, by name."""

    async def fetch() -> int:
        return 1

    flow: Flow[int] = call(fetch)
    with pytest.raises(TypeError, match=r"fetch returned an awaitable"):
        drive(flow)


class Work:
    """Clean-up with several awaits."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.started = asyncio.Event()
        self.done = False

    async def run(self) -> str:
        self.started.set()
        await self.gate.wait()
        await asyncio.sleep(0)
        self.done = True
        return "done"


async def test_shielded_returns_what_the_work_returns() -> None:
    """Its failure is raised as well."""

    async def fails() -> None:
        raise LookupError

    work = Work()
    work.gate.set()
    assert await shielded(work.run(), 30) == "done"
    with pytest.raises(LookupError):
        await shielded(fails(), 30)


async def test_shielded_outlasts_cancellations() -> None:
    """The work ends first, then the cancellation is raised."""
    work = Work()
    task = asyncio.create_task(shielded(work.run(), 30))
    await work.started.wait()
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    work.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.done


async def test_shielded_outlasts_a_cancelled_scope() -> None:
    """anyio cancels each await again, until the task has left the scope."""
    work = Work()
    loop = asyncio.get_running_loop()
    with anyio.CancelScope() as scope:
        try:
            scope.cancel()
            await anyio.sleep_forever()
        finally:
            loop.call_later(0.01, work.gate.set)
            await shielded(work.run(), 30)
    assert work.done
    assert scope.cancelled_caught


async def test_shielded_ends_in_time() -> None:
    """Work that hangs is cancelled."""
    work = Work()
    with pytest.raises(TimeoutError):
        await shielded(work.run(), 0.01)
    assert not work.done
