"""The store's algorithms that take more than one statement, each written once for both colours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from ._op import Flow, Op, call, do, transaction
from ._sql import Statements
from .errors import ConflictError, InvalidValueError
from .types import CasResult

if TYPE_CHECKING:
    from .config import Seconds

T = TypeVar("T")


def all_of(ops: list[Op[T]]) -> Flow[list[T]]:
    """Perform a batch that was cut into chunks: all of it or nothing."""
    if len(ops) <= 1:
        return (yield from _each(ops))
    retry_safe = all(op.statement.retry_safe for op in ops)
    table = ops[0].statement.table
    return (yield from transaction(lambda: _each(ops), table=table, retry_safe=retry_safe))


def _each(ops: list[Op[T]]) -> Flow[list[T]]:
    answers: list[T] = []
    for op in ops:
        answer = yield from do(op)
        answers.append(answer)
    return answers


def increment_many(
    sql: Statements, deltas: Mapping[str, int], ttl: Seconds | None
) -> Flow[dict[str, int]]:
    """Add to many integers. A sum that had expired by the time it was written is added once
    more, for nobody can see it."""
    deltas = dict(deltas)
    sums: dict[str, int] = {}
    for chunk, expired in (yield from all_of(sql.increment_many(deltas, ttl))):
        sums.update(chunk)
        if expired:
            again = {key: deltas[key] for key in expired}
            for fresh, _ in (yield from all_of(sql.increment_many(again, ttl))):
                sums.update(fresh)
    return sums


def update(
    sql: Statements,
    key: str,
    fn: Callable[[bytes | None], Any],
    ttl: Seconds | None,
    attempts: int,
) -> Flow[bytes]:
    """Read, apply `fn`, write if nothing changed meanwhile; otherwise again."""
    if attempts < 1:
        raise InvalidValueError("attempts must be 1 or more")
    entry = yield from do(sql.get_entry(key))
    current = None if entry is None else entry.value
    version = None if entry is None else entry.version
    for _ in range(attempts):
        new = sql.value((yield from call(fn, current)))
        swapped: CasResult
        if version is None:
            swapped = yield from do(sql.compare_and_swap(key, None, new, ttl))
        else:
            swapped = yield from do(sql.swap_version(key, version, new, ttl))
        if swapped.is_success:
            return new
        current, version = swapped.current, swapped.version
    raise ConflictError(
        f"update: the value was changed by others during each of {attempts} attempts; "
        "raise attempts, or split the key"
    )
