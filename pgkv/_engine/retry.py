"""What follows a first attempt that did not end in an answer.

Entered only then, and tenacity is imported by the first failure: a healthy program pays nothing for
it. One flow for sync and async:
it repeats raced statements at once, creates a missing table and repeats, and repeats failures by
the store's `RetryPolicy` where that is safe. It never looks at a connection.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeAlias

from .. import _observe
from .._ops.op import Call, Flow, Op, Pipelined, Raced, Sleep, Statement, Transaction
from ..config import RetryPolicy, Table
from ..errors import ConflictError, PgkvError, PoolTimeoutError, TableNotFoundError

if TYPE_CHECKING:
    from tenacity import RetryCallState

CREATIONS_MAX = 3  # of one call, whose table keeps being dropped

Repeatable: TypeAlias = "Op[Any] | Transaction[Any] | Pipelined"


def recover(
    step: Repeatable,
    outcome: BaseException | Raced,
    policy: RetryPolicy | None,
    deadline: float,
    create_missing_table: Callable[[Table], Any],
) -> Flow[Any]:
    """Bring a step to its end after a first attempt that failed or raced.

    Args:
        step: yielded again for each further attempt; the driver makes one attempt of it.
        outcome: how the first attempt ended.
        policy: None for no repeats but those that follow a race or a missing table.
        deadline: the monotonic time at which the whole call ends.
        create_missing_table: creates a missing table.
    """
    pending: BaseException | Raced | None = outcome
    del outcome
    state: RetryCallState | None = None
    try:
        while True:
            try:
                return (yield from _settle(step, pending, create_missing_table))
            except PgkvError as error:
                if policy is None:
                    raise
                if state is None:
                    state = _start(step, policy, deadline)
                state.set_exception((type(error), error, error.__traceback__))
            pending = None
            action = state.retry_object.iter(retry_state=state)
            while isinstance(action, float):  # tenacity's DoSleep; else its DoAttempt
                state.prepare_for_next_attempt()
                step.retries = state.attempt_number - 1
                yield Sleep(action)
                action = state.retry_object.iter(retry_state=state)
    finally:
        # What goes out holds this frame by its traceback: a cycle would keep the callers' frames.
        pending = None
        if state is not None:
            state.outcome = None


def about(step: Repeatable) -> Statement[Any] | Transaction[Any] | Pipelined:
    """What is known of the step: its name, table, and whether it may be repeated."""
    return step.statement if isinstance(step, Op) else step


def _start(step: Repeatable, policy: RetryPolicy, deadline: float) -> RetryCallState:
    from tenacity import RetryCallState, Retrying

    def log(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        _observe.warning(
            "pgkv.retry",
            operation=about(step).name,
            attempt=state.attempt_number,
            wait=round(state.upcoming_sleep, 3),
            error=type(error).__name__,
        )

    def stop(state: RetryCallState) -> bool:
        return monotonic() + state.upcoming_sleep >= deadline or options["stop"](state)

    options = _options(policy, lambda error: may_repeat(step, error, policy))
    retrying = Retrying(**options | {"before_sleep": log, "stop": stop})
    retrying.begin()
    return RetryCallState(retrying, None, (), {})


def may_repeat(step: Repeatable, error: BaseException, policy: RetryPolicy) -> bool:
    """Whether repeating the step after this error can do no harm and may do good."""
    if not isinstance(error, PgkvError) or not error.retryable:
        return False
    # The pool's queue was waited for already; a conflict has had its hundred attempts.
    if isinstance(error, PoolTimeoutError | ConflictError):
        return False
    what = about(step)
    if not what.retried:
        return False
    if not error.outcome_unknown:
        return True
    return what.retry_safe and (policy.repeat_writes or not what.writes)


def _settle(
    step: Repeatable,
    outcome: BaseException | Raced | None,
    create_missing_table: Callable[[Table], Any],
) -> Flow[Any]:
    """One attempt, with what belongs to it: asking again after a race, creating the table."""
    what = about(step)
    raced = 0
    created = 0
    try:
        while True:
            if isinstance(outcome, Raced):
                if raced >= what.repeats:
                    if outcome.fallback is not None:
                        return outcome.fallback
                    raise ConflictError(
                        f"{what.name}: {raced} attempts in a row met concurrent changes; "
                        "nothing was changed"
                    )
                raced += 1
            elif isinstance(outcome, TableNotFoundError):
                table = what.table
                if created == CREATIONS_MAX or table is None or not table.auto_create:
                    raise outcome
                created += 1
                yield Call(create_missing_table, table)
            elif outcome is not None:
                raise outcome
            try:
                answer = yield step
            except TableNotFoundError as error:
                outcome = error
                continue
            if not isinstance(answer, Raced):
                return answer
            outcome = answer
    finally:
        outcome = None  # as in `recover`


def transaction_options(policy: RetryPolicy | None) -> dict[str, Any]:
    """The options of tenacity to repeat a transaction that certainly left nothing behind."""
    return _options(policy or RetryPolicy(attempts=1), _left_nothing)


def _options(policy: RetryPolicy, may: Callable[[BaseException], bool]) -> dict[str, Any]:
    import tenacity as t

    return {
        "stop": t.stop_any(
            t.stop_after_attempt(policy.attempts), t.stop_before_delay(policy.deadline)
        ),
        "wait": t.wait_random_exponential(multiplier=policy.wait_initial, max=policy.wait_max),
        "retry": t.retry_if_exception(may),
        "reraise": True,
    }


def _left_nothing(error: BaseException) -> bool:
    return (
        isinstance(error, PgkvError)
        and error.retryable
        and not error.outcome_unknown
        and not isinstance(error, PoolTimeoutError)
    )
