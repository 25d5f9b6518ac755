"""What follows a first attempt that ended in no answer: the flow is fed its answers, no database."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Any

import pytest
import structlog

import pgkv
from pgkv import RetryPolicy
from pgkv._engine.retry import may_repeat, recover
from pgkv._ops.op import Call, Op, Raced, Sleep, Statement, Transaction
from pgkv.config import Table
from pgkv.errors import (
    ConflictError,
    InvalidValueError,
    OperationTimeoutError,
    PgkvError,
    PoolTimeoutError,
    QueryError,
    StoreUnavailableError,
    TableNotFoundError,
)

TABLE = Table("t")
POLICY = RetryPolicy(attempts=4, wait_initial=0.01, wait_max=0.1, deadline=3600)


def op(**options: Any) -> Op[Any]:
    return Op(Statement("test", "SELECT 1", (), lambda _: None, table=TABLE, **options))


def lost(*, unknown: bool) -> StoreUnavailableError:
    error = StoreUnavailableError("lost")
    error.outcome_unknown = unknown
    return error


def serialization() -> QueryError:
    error = QueryError("40001")
    error._sqlstate = "40001"
    error.retryable = True
    return error


class Run:
    """Drives `recover`: each attempt gets the next of `answers`; everything yielded is kept."""

    def __init__(
        self,
        step: Any,
        first: Any,
        *answers: Any,
        policy: RetryPolicy | None = POLICY,
        seconds: float = 3600.0,
        create_missing_table: Callable[[Table], Any] = lambda _: None,
    ) -> None:
        self.sleeps: list[float] = []
        self.created: list[Table] = []
        self.attempts = 0
        self.result: Any = None
        flow = recover(step, first, policy, monotonic() + seconds, create_missing_table)
        pending = list(answers)
        send: Any = None
        failure: BaseException | None = None
        while True:
            try:
                yielded = flow.send(send) if failure is None else flow.throw(failure)
            except StopIteration as end:
                self.result = end.value
                return
            except PgkvError as error:
                self.result = error
                return
            send = failure = None
            if isinstance(yielded, Sleep):
                self.sleeps.append(yielded.seconds)
            elif isinstance(yielded, Call):
                self.created.append(*yielded.args)
                yielded.fn(*yielded.args)
            else:
                assert yielded is step
                self.attempts += 1
                answer = pending.pop(0)
                if isinstance(answer, BaseException):
                    failure = answer
                else:
                    send = answer


@pytest.fixture(autouse=True)
def _no_structlog() -> None:
    assert not structlog.is_configured()


# -- races -----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [POLICY, None])
def test_a_race_is_asked_again_at_once(policy: RetryPolicy | None) -> None:
    """A raced statement is repeated without a pause, with or without a policy."""
    run = Run(op(repeats=100), Raced(), Raced(), Raced(), "answer", policy=policy)
    assert (run.result, run.attempts, run.sleeps) == ("answer", 3, [])


def test_a_race_that_never_ends() -> None:
    """After its repeats a race is a ConflictError, and no policy repeats that."""
    run = Run(op(repeats=5), Raced(), *[Raced()] * 5)
    assert isinstance(run.result, ConflictError)
    assert (run.attempts, run.sleeps) == (5, [])


def test_a_race_with_a_fallback() -> None:
    """A race that has an answer all the same gives it after its repeats."""
    run = Run(op(repeats=1), Raced(7), Raced(8))
    assert (run.result, run.attempts) == (8, 1)


# -- a missing table -------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [POLICY, None])
def test_a_missing_table_is_made_and_the_operation_repeated(policy: RetryPolicy | None) -> None:
    """A missing table is created, once, and the operation repeated at once."""
    run = Run(op(), TableNotFoundError("t"), "answer", policy=policy)
    assert (run.result, run.created, run.attempts, run.sleeps) == ("answer", [TABLE], 1, [])


def test_a_table_that_stays_missing() -> None:
    """A table that is missing each time, though it was created thrice, is the caller's error."""
    run = Run(op(), *(TableNotFoundError(str(n)) for n in range(4)))
    assert isinstance(run.result, TableNotFoundError)
    assert (len(run.created), run.attempts) == (3, 3)


def test_a_table_that_may_not_be_made() -> None:
    """With auto_create off a missing table is the caller's error, nothing is repeated."""
    step: Op[None] = Op(Statement("t", "", (), lambda _: None, table=Table("t", auto_create=False)))
    run = Run(step, TableNotFoundError("t"))
    assert isinstance(run.result, TableNotFoundError)
    assert (run.created, run.attempts) == ([], 0)


def test_a_table_that_cannot_be_made() -> None:
    """A failure to create the table is what the caller sees."""

    def create_missing_table(_: Table) -> None:
        raise pgkv.ConfigError("no right")

    with pytest.raises(pgkv.ConfigError, match="no right"):
        Run(op(), TableNotFoundError("t"), create_missing_table=create_missing_table)


def test_a_missing_table_after_a_lost_connection() -> None:
    """Healing and repeating go together: a table lost in a fail-over is made on the way."""
    run = Run(op(), lost(unknown=False), TableNotFoundError("t"), "answer")
    assert (run.result, run.created, run.attempts) == ("answer", [TABLE], 2)
    assert len(run.sleeps) == 1


# -- failures --------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [lost(unknown=False), serialization()], ids=["lost", "40001"])
@pytest.mark.parametrize("retry_safe", [True, False])
def test_a_known_outcome_is_repeated(error: PgkvError, retry_safe: bool) -> None:
    """Whatever certainly did not happen is repeated, after a pause."""
    run = Run(op(retry_safe=retry_safe), error, "answer")
    assert (run.result, run.attempts, len(run.sleeps)) == ("answer", 1, 1)


def test_an_unknown_outcome_is_repeated_where_that_is_safe() -> None:
    """An operation whose answer was lost is repeated if it may take effect twice."""
    assert Run(op(retry_safe=True), lost(unknown=True), "answer").result == "answer"


def test_an_unknown_outcome_is_not_repeated_elsewhere() -> None:
    """An increment whose answer was lost is never sent again; the error says so."""
    run = Run(op(retry_safe=False), lost(unknown=True))
    assert isinstance(run.result, StoreUnavailableError)
    assert run.result.outcome_unknown
    assert run.attempts == 0


def test_an_unknown_outcome_of_a_repeat_ends_it() -> None:
    """Once a repeat of an unsafe operation may have happened, no further one is made."""
    run = Run(op(retry_safe=False), lost(unknown=False), lost(unknown=True))
    assert isinstance(run.result, StoreUnavailableError)
    assert run.attempts == 1


def test_repeat_writes_off() -> None:
    """repeat_writes=False leaves lost writes alone, and still repeats reads and known outcomes."""
    policy = RetryPolicy(wait_initial=0, repeat_writes=False, deadline=3600)
    write, read = op(retry_safe=True), op(retry_safe=True, writes=False)
    assert Run(write, lost(unknown=True), policy=policy).attempts == 0
    assert Run(read, lost(unknown=True), "answer", policy=policy).result == "answer"
    assert Run(write, lost(unknown=False), "answer", policy=policy).result == "answer"


@pytest.mark.parametrize(
    "error",
    [
        PoolTimeoutError("busy"),
        OperationTimeoutError("late"),
        InvalidValueError("refused"),
        pgkv.ConfigError("no right"),
        QueryError("syntax"),
        ConflictError("a hundred times"),
        pgkv.TransactionError("over"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_is_never_repeated(error: PgkvError) -> None:
    """Timeouts, refusals and mistakes are not repeated: they would end the same way."""
    run = Run(op(retry_safe=True), error)
    assert run.result is error
    assert (run.attempts, run.sleeps) == (0, [])


def test_no_policy_repeats_nothing() -> None:
    """Without a policy a failure is the caller's at once."""
    run = Run(op(retry_safe=True), lost(unknown=False), policy=None)
    assert isinstance(run.result, StoreUnavailableError)
    assert run.attempts == 0


def test_work_that_comes_again_is_tried_once() -> None:
    """Collecting, which the next read asks for anyway, is not repeated after a failure."""
    assert Run(op(retry_safe=True, retried=False), lost(unknown=False)).attempts == 0


def test_attempts_are_counted_with_the_first() -> None:
    """`attempts` bounds the tries in all; the last error is raised, as it is."""
    errors = [lost(unknown=False) for _ in range(4)]
    step = op()
    run = Run(step, *errors)
    assert run.result is errors[3]
    assert (run.attempts, len(run.sleeps), step.retries) == (3, 3, 3)


def test_pauses_grow_up_to_a_bound() -> None:
    """Pauses are random below a bound that doubles up to wait_max."""
    policy = RetryPolicy(attempts=10, wait_initial=0.01, wait_max=0.05, deadline=3600)
    for _ in range(50):
        run = Run(op(), *[lost(unknown=False) for _ in range(10)], policy=policy)
        bounds = [0.01, 0.02, 0.04] + [0.05] * 6
        assert all(0 <= s <= b + 1e-9 for s, b in zip(run.sleeps, bounds, strict=True))


def test_no_repeat_begins_after_the_deadline() -> None:
    """The call's own deadline ends the repeats, also while the policy has attempts left."""
    policy = RetryPolicy(attempts=100, wait_initial=10, wait_max=10, deadline=60)
    slept = [len(Run(op(), lost(unknown=False), *[lost(unknown=False)] * 99, policy=policy,
                     seconds=0.0).sleeps) for _ in range(5)]  # fmt: skip
    assert slept == [0] * 5


def test_the_policys_deadline() -> None:
    """No further try begins after the policy's deadline."""
    policy = RetryPolicy(attempts=100, wait_initial=0.5, wait_max=1, deadline=0)
    assert Run(op(), lost(unknown=False), policy=policy).attempts == 0


def test_transactions_are_repeated_whole() -> None:
    """A transaction step goes by its own retry_safe."""

    def flow() -> Any:
        yield op()

    for safe, attempts in ((True, 1), (False, 0)):
        step: Transaction[Any] = Transaction(flow, table=TABLE, retry_safe=safe)
        assert Run(step, lost(unknown=True), *["answer"] * attempts).attempts == attempts
        assert Run(step, serialization(), "answer").result == "answer"


def test_strangers_are_not_repeated() -> None:
    """An exception that is not pgkv's is nobody's to repeat."""
    assert not may_repeat(op(retry_safe=True), KeyboardInterrupt(), POLICY)
    assert not may_repeat(op(retry_safe=True), ValueError(), POLICY)


def test_each_retry_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Each repeat is a warning `pgkv.retry` with the operation, the attempt and the error."""
    Run(op(), lost(unknown=False), lost(unknown=False), "answer")
    events = [record.__dict__["pgkv"] for record in caplog.records]
    assert [event["attempt"] for event in events] == [1, 2]
    assert {event["operation"] for event in events} == {"test"}
    assert {event["error"] for event in events} == {"StoreUnavailableError"}
    assert all(record.levelname == "WARNING" for record in caplog.records)
    assert all(record.getMessage().startswith("pgkv.retry ") for record in caplog.records)
