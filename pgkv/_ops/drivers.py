"""The two drivers of flows: one blocks, one awaits. A channel's `run` calls them with the channel's
own way to perform an operation.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator
from time import monotonic
from typing import Any, TypeVar

from .op import Call, Expired, Op, Sleep

T = TypeVar("T")


def _unexpected(step: Any, _timeout: float | None) -> Any:
    raise AssertionError(f"this driver cannot perform {step!r}")


def drive(
    flow: Generator[Any, Any, T],
    execute: Callable[[Op[Any], float | None], Any] = _unexpected,
    timeout: float | None = None,
    together: Callable[[Any, float | None], Any] = _unexpected,
    sleep: Callable[[float], Any] = time.sleep,
) -> T:
    """Run a flow to its end. A step that fails raises inside the flow, so its ``finally`` runs.

    Args:
        flow: yields the steps.
        execute: performs an `Op`; called with the operation and `timeout`.
        timeout: passed on unchanged.
        together: performs any other step; called like `execute`.
        sleep: performs a `Sleep`; called with the seconds.
    """
    outcome: Any = None
    failure: BaseException | None = None
    while True:
        try:
            step = flow.send(outcome) if failure is None else flow.throw(failure)
        except StopIteration as end:
            failure = None  # its traceback holds this frame, and the callers' with all they hold
            return end.value  # type: ignore[no-any-return]  # what the generator returns
        except BaseException:
            failure = None  # likewise: whatever the frames hold would live until the collector runs
            raise
        outcome = failure = None
        try:
            if isinstance(step, Op):
                outcome = execute(step, timeout)
            elif isinstance(step, Sleep):
                sleep(step.seconds)
            elif isinstance(step, Call):
                outcome = invoke(step.fn, *step.args)
            else:
                outcome = together(step, timeout)
        except BaseException as error:  # noqa: BLE001  # raised inside the flow, which lets it out
            failure = error


def invoke(fn: Callable[..., Any], *args: Any) -> Any:
    """Call a user's function from sync code.

    Raises:
        TypeError: it returned an awaitable.
    """
    answer = fn(*args)
    if inspect.isawaitable(answer):
        if inspect.iscoroutine(answer):
            answer.close()
        name = getattr(fn, "__qualname__", repr(fn))
        raise TypeError(
            f"{name} returned an awaitable, and sync code cannot await it: pass a function that "
            "is not async, or use the async class (AsyncStore); a decorated function must be "
            "`async def`"
        )
    return answer


def answer_of(answer: Any) -> Any:
    """The caller's part of an answer, where nothing is collected."""
    return answer.answer if isinstance(answer, Expired) else answer


async def _unexpected_async(step: Any, _timeout: float | None) -> Any:
    _unexpected(step, _timeout)


async def drive_async(
    flow: Generator[Any, Any, T],
    execute: Callable[[Op[Any], float | None], Awaitable[Any]] = _unexpected_async,
    timeout: float | None = None,
    together: Callable[[Any, float | None], Awaitable[Any]] = _unexpected_async,
    sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
) -> T:
    """Run a flow to its end; see `drive`. A cancellation is raised inside the flow as well, and
    a `Call` may return an awaitable."""
    outcome: Any = None
    failure: BaseException | None = None
    while True:
        try:
            step = flow.send(outcome) if failure is None else flow.throw(failure)
        except StopIteration as end:
            failure = None  # its traceback holds this frame, and the callers' with all they hold
            return end.value  # type: ignore[no-any-return]  # what the generator returns
        except BaseException:
            failure = None  # likewise: whatever the frames hold would live until the collector runs
            raise
        outcome = failure = None
        try:
            if isinstance(step, Op):
                outcome = await execute(step, timeout)
            elif isinstance(step, Sleep):
                await sleep(step.seconds)
            elif isinstance(step, Call):
                outcome = step.fn(*step.args)
                if inspect.isawaitable(outcome):
                    outcome = await outcome
            else:
                outcome = await together(step, timeout)
        except BaseException as error:  # noqa: BLE001  # raised inside the flow, which lets it out
            failure = error


async def is_set_within(event: asyncio.Event, seconds: float) -> bool:
    """Wait for an event at most that long; whether it was set, as `threading.Event.wait`."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True


_left: set[asyncio.Task[Any]] = set()  # the loop keeps only weak references to tasks


async def shielded(work: Coroutine[Any, Any, T], seconds: float) -> T:
    """Await clean-up in a task of its own, to its end, however often the caller is cancelled.

    anyio cancels every ``await`` of a cancelled scope, also those in a ``finally``. A
    cancellation that arrives meanwhile is raised when the work has ended.

    Raises:
        TimeoutError: the work took longer than `seconds`; it was cancelled.
    """
    until = monotonic() + seconds
    task = asyncio.get_running_loop().create_task(work)
    _left.add(task)
    task.add_done_callback(_left.discard)
    cancelled: asyncio.CancelledError | None = None
    while not task.done() and (left := until - monotonic()) > 0:
        try:
            await asyncio.wait((task,), timeout=left)
        except asyncio.CancelledError as error:
            cancelled = cancelled or error
    done = task.done()
    if not done:
        task.cancel()
    elif cancelled is not None and not task.cancelled():
        task.exception()  # looked at: or asyncio logs that nothing did
    try:
        if cancelled is not None:
            raise cancelled
        if not done:
            raise TimeoutError(f"clean-up was cancelled after {seconds:g} s")
        return task.result()
    finally:
        cancelled = None  # its traceback holds this frame
