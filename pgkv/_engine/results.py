"""What the server's results mean: answers, refusals, and whose a pipeline's results are.

For sync and async connections. It reads results and never waits for one.
"""

from __future__ import annotations

from itertools import starmap
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import pq

from .._ops.op import Op, Pipelined, Statement, Undecoded
from ..errors import (
    DecodingError,
    OperationTimeoutError,
    PgkvError,
    StoreUnavailableError,
    TransactionError,
    from_result,
    translate,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from psycopg.pq.abc import PGconn, PGresult

OK = frozenset((int(pq.ExecStatus.COMMAND_OK), int(pq.ExecStatus.TUPLES_OK)))
STATUS = attrgetter("status")  # of a result
PIPELINE_SYNC = int(pq.ExecStatus.PIPELINE_SYNC)
PIPELINE_ABORTED = int(pq.ExecStatus.PIPELINE_ABORTED)

# What an error that concerns a whole pipeline is called.
PIPELINE: Statement[Any] = Statement("pipeline", "", (), lambda result: result)


class PipelineReader:
    """Takes the results of a pipeline as they arrive.

    Args:
        pgconn: in pipeline mode.
        syncs: how many synchronization points end it.
    """

    __slots__ = ("_current", "_pgconn", "_syncs", "answers")

    def __init__(self, pgconn: PGconn, syncs: int) -> None:
        self.answers: list[PGresult] = []
        self._pgconn = pgconn
        self._syncs = syncs
        self._current: PGresult | None = None

    def advance(self) -> bool:
        """Take what is there, without blocking; whether that was all."""
        pgconn = self._pgconn
        while not pgconn.is_busy():
            result = pgconn.get_result()
            if result is None:
                if self._current is not None:
                    self.answers.append(self._current)
                    self._current = None
            elif result.status == PIPELINE_SYNC:
                self._syncs -= 1
                if not self._syncs:
                    return True
            elif self._current is None:
                self._current = result
        return False


def outcomes(batch: Pipelined, results: Sequence[PGresult]) -> list[Any]:
    """The answers to a batch's operations: for a refused one the exception."""
    return [*starmap(_outcome, zip(batch.ops, results, strict=True))]


def _outcome(op: Op[Any], result: PGresult) -> Any:
    if result.status in OK:
        try:
            return op.decode(result)
        except DecodingError as error:
            return Undecoded(error)
    if result.status == PIPELINE_ABORTED:
        return TransactionError(
            f"{op.statement.name}: not executed, because an earlier operation of the pipeline "
            "was refused"
        )
    return refusal(result, op.statement)


def is_outdated(error: psycopg.Error) -> bool:
    """Whether a prepared statement no longer fits its table (after an ALTER TABLE)."""
    return error.sqlstate == "0A000" and error.diag.source_function == "RevalidateCachedQuery"


def is_fenced(ops: Sequence[Op[Any]]) -> bool:
    """Whether one of them is of a table that Citus may move: see `_shards.fences`."""
    for op in ops:
        table = op.statement.table
        if table is not None and table.fences is not None:
            return True
    return False


def fence_of(op: Op[Any]) -> Any:
    """How an operation is sent to a slot on Citus; None for one that is sent as everywhere."""
    table = op.statement.table
    return None if table is None or table.fences is None else table.fences.plan(op.statement)


def behind_fences(
    ops: Sequence[Op[Any]], *, inside: bool
) -> tuple[list[Op[Any]], list[int | None]]:
    """What is sent as one transaction, or inside one: fences, and then the operations; and for each of
    these the place of its fence. Plain reads alone go without."""
    plans = [*map(fence_of, ops)]
    if not inside and all(plan is None or plan.plain for plan in plans):
        return [*ops], [None] * len(ops)
    fences = {plan.fence.params: plan.fence for plan in plans if plan is not None}
    sent = [op if plan is None else plan.of(op) for op, plan in zip(ops, plans, strict=True)]
    places = {params: place for place, params in enumerate(fences)}
    behind = [None if plan is None else places[plan.fence.params] for plan in plans]
    return [*fences.values(), *sent], behind


def without_fences(results: list[PGresult], behind: list[int | None]) -> list[PGresult]:
    """The results of the operations: that of its fence for each whose fence was refused."""
    first = len(results) - len(behind)
    for place, result in enumerate(results[:first]):
        if result.status not in OK and result.status != PIPELINE_ABORTED:
            pairs = zip(behind, results[first:], strict=True)
            return [result if fence == place else own for fence, own in pairs]
    return results[first:]


def in_part(error: PgkvError) -> PgkvError:
    """The failure of operations that stand for themselves, of which the first ones have happened."""
    if error.outcome_unknown:
        return error
    failure = StoreUnavailableError(f"{error} The operations before it have happened.")
    failure.outcome_unknown = True
    return failure


def past_deadline(name: str, seconds: float) -> OperationTimeoutError:
    """The error when the time passes after sending. Of a call that was late already nothing was left."""
    within = f"{seconds:.3g} s" if seconds > 0 else "the time that was left"
    return OperationTimeoutError(
        f"{name}: no answer within {within}; it was cancelled, but may still have happened"
    )


def refusal(result: PGresult, statement: Statement[Any]) -> PgkvError:
    """The exception for an error result: a known outcome, but for what poolers say."""
    return failed(from_result(result), statement, sent=True)


def failed(error: psycopg.Error, statement: Statement[Any], *, sent: bool) -> PgkvError:
    """The exception for a psycopg error during that statement."""
    return translate(
        error,
        action=statement.name,
        table=statement.table.quoted if statement.table else "",
        refused=statement.refused,
        sent=sent,
    )
