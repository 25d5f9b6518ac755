"""The two drivers that run any flow: one blocks, one awaits. What a step means is the channel's."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from .op import Call, Expired, Flow

T = TypeVar("T")


def drive(flow: Flow[T], perform: Callable[[Any], Any]) -> T:
    """Run a flow to its end. Failures of a step are thrown into it, so its ``finally`` runs."""
    step_outcome: Any = None
    failure: BaseException | None = None
    while True:
        try:
            step = flow.send(step_outcome) if failure is None else flow.throw(failure)
        except StopIteration as end:
            failure = None  # its traceback holds this frame, and the callers' with all they hold
            return end.value  # type: ignore[no-any-return]  # what the generator returns
        step_outcome = failure = None
        try:
            step_outcome = perform(step)
        except BaseException as error:  # noqa: BLE001  # thrown into the flow, which lets it out
            failure = error


def call(step: Call[Any]) -> Any:
    """Perform a call step: sync code only."""
    answer = step.fn(*step.args)
    if inspect.isawaitable(answer):
        if inspect.iscoroutine(answer):
            answer.close()
        raise TypeError("a function given to a Store must not be async; use AsyncStore")
    return answer


def answer_of(answer: Any) -> Any:
    """The caller's part of an answer, where nothing is collected."""
    return answer.answer if isinstance(answer, Expired) else answer


async def drive_async(flow: Flow[T], perform: Callable[[Any], Awaitable[Any]]) -> T:
    """Run a flow to its end; see `drive`. A cancellation is thrown into it as well."""
    outcome: Any = None
    failure: BaseException | None = None
    while True:
        try:
            step = flow.send(outcome) if failure is None else flow.throw(failure)
        except StopIteration as end:
            failure = None  # its traceback holds this frame, and the callers' with all they hold
            return end.value  # type: ignore[no-any-return]  # what the generator returns
        outcome = failure = None
        try:
            outcome = await perform(step)
        except BaseException as error:  # noqa: BLE001  # thrown into the flow, which lets it out
            failure = error


async def call_async(step: Call[Any]) -> Any:
    """Perform a call step."""
    answer = step.fn(*step.args)
    return await answer if inspect.isawaitable(answer) else answer
