"""The store's algorithms that take more than one statement, each written once for sync and async."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from .. import _observe
from .._ops import codec as _codec
from .._ops.op import Flow, Op, Pipelined, Raced, call, do, send, transaction
from .._sql import Statements
from .._sql.point import NOT_FOUND, REPEATS
from ..errors import (
    ConfigError,
    ConflictError,
    DecodingError,
    InvalidValueError,
    OperationTimeoutError,
    PgkvError,
    QueryError,
    StoreUnavailableError,
    TableNotFoundError,
    TransactionError,
)
from ..types import CasResult, CasStatus, Entry
from .merging import merge, parted

if TYPE_CHECKING:
    from .._ops.codec import Value
    from ..config import Seconds, Table

T = TypeVar("T")

PIPELINE_MAX = 1_000  # operations that travel together; more are sent in turns
UNDONE = "rolled back, because another operation of the pipeline was refused"
PIPELINE_BYTES = 8 * 1024 * 1024  # of their parameters


class Engine(Protocol):
    """What a pipeline asks of the channel that carries it."""

    def create_missing_table(self, table: Table) -> Any:
        """Create a missing table, where that is this channel's business."""
        ...

    def until(self) -> float:
        """The monotonic time at which a call ends that begins now."""
        ...

    def may_repeat(self, op: Op[Any] | Pipelined, error: PgkvError, /) -> bool:
        """Whether an operation that failed together with others may be repeated alone."""
        ...


class RefusedError(Exception):
    """Ends the transaction or savepoint around a batch with a refused operation."""

    def __init__(self, answers: list[Any]) -> None:
        super().__init__("refused")
        self.answers = answers


def all_of(ops: list[Op[T]]) -> Flow[list[T]]:
    """Perform a batch that was cut into chunks: all of it or nothing."""
    if len(ops) <= 1:
        return (yield from _each(ops))
    retry_safe = all(op.statement.retry_safe for op in ops)
    table = ops[0].statement.table
    return (yield from transaction(lambda: _each(ops), table=table, retry_safe=retry_safe))


def written(count: int, ops: list[Op[Any]]) -> Flow[int]:
    """Write all of a batch or nothing; how many keys."""
    answers = yield from all_of(ops)
    return count if all(answer is None for answer in answers) else 0  # dropped: `MISSED`


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
    more: no reader can see it."""
    if not isinstance(deltas, Mapping):
        # Of pairs a dict would keep a repeated key's last one: increments would be lost.
        raise InvalidValueError("increment_many needs a mapping of keys to deltas")
    deltas = dict(deltas)
    sums: dict[str, int] = {}
    for chunk, expired in (yield from all_of(sql.increment_many(deltas, ttl))):
        sums.update(chunk)
        if expired:
            again = {key: deltas[key] for key in expired}
            for fresh, _ in (yield from all_of(sql.increment_many(again, ttl))):
                sums.update(fresh)
    return sums


def reach(sql: Statements) -> Flow[None]:
    """Meet the server of a new store.

    Raises:
        ConfigError: Citus would accept the store's statements there and break its promises.
    """
    if not (yield from do(sql.reach()))[0]:
        return
    group, method = yield from do(sql.citus())
    if group not in ("", "0"):
        raise ConfigError(
            f"this server is a worker of a Citus cluster (group {group}): a table made here would be on "
            "it alone; connect to the coordinator"
        )
    if method not in ("", "n"):
        raise ConfigError(
            f"Citus has distributed the table {sql.t} by key: pgkv's promises do not hold on it. "
            f"undistribute_table('{sql.t}') makes it an ordinary one; or choose another table_name"
        )


def update(
    sql: Statements,
    key: str,
    fn: Callable[[bytes | None], Any],
    ttl: Seconds | None,
    attempts: int,
) -> Flow[bytes]:
    """Read, apply `fn`, write if nothing changed meanwhile; otherwise again."""
    if not callable(fn):
        raise InvalidValueError(
            f"update: fn must be a function of the current value, not {type(fn).__name__}"
        )
    _codec.whole("attempts", attempts)
    entry = yield from do(sql.strict(sql.get_entry(key)))
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


def swap(
    sql: Statements, key: str, expected: Value | None, new: Value, ttl: Seconds | None
) -> Flow[CasResult]:
    """Write `new` if the value is `expected`. Transformed values are compared here and written by
    their version: the same outcomes and races."""
    if expected is None or sql.transforms is None:
        return (yield from do(sql.compare_and_swap(key, expected, new, ttl)))
    wanted, written = sql.value(expected), sql.value(new)
    entry = yield from _live(sql, key)
    if entry is None:
        return NOT_FOUND
    found = CasResult(CasStatus.MISMATCH, entry.value, entry.version)
    for _ in range(REPEATS):
        if not found.is_mismatch or found.current != wanted:
            return found
        found = yield from do(sql.swap_version(key, found.version or 0, written, ttl))
    raise _never_settled("compare_and_swap")


def take(sql: Statements, key: str, expected: Value | None = None) -> Flow[bytes | None]:
    """Remove the key and return its value, which is transformed, if it is `expected` (None: whatever it
    is). A value that does not open is left."""
    wanted = None if expected is None else sql.value(expected)
    for _ in range(REPEATS):
        entry = yield from _live(sql, key)
        if entry is None or wanted not in (None, entry.value):
            return None
        if (yield from do(sql.delete(key, entry.version))):
            return entry.value
    raise _never_settled("get_and_delete" if expected is None else "compare_and_delete")


def _live(sql: Statements, key: str) -> Flow[Entry | None]:
    """What a conditional write finds: nothing where the key has expired, whatever reads return."""
    entry = yield from do(sql.strict(sql.get_entry(key)))
    if entry is not None and entry.expires_at is not None and entry.expires_at <= entry.read_at:
        return None
    return entry


def _never_settled(action: str) -> ConflictError:
    return ConflictError(
        f"{action}: {REPEATS} attempts in a row met concurrent changes; nothing was changed"
    )


def rewrite(
    sql: Statements, prefix: str, batch: int, progress: Callable[[int], object] | None
) -> Flow[int]:
    """Bring stored values to the present transforms, page by page, while traffic goes on; how many.

    A row that was changed meanwhile is in the present form already. One that does not open is left,
    and raised at the end.
    """
    if sql.transforms is None:
        raise ConfigError("rewrite: the table has no transforms: give the store transforms=[...]")
    from .._sql.transformed import TransformedStatements

    assert isinstance(sql, TransformedStatements)
    limit = _codec.whole("batch", batch)
    after: bytes | None = None
    count = 0
    failure: DecodingError | None = None
    while True:
        page = yield from do(sql.stored(prefix, after, limit))
        fresh: dict[bytes, tuple[bytes, bytes, int]] = {}
        for row in page:
            try:
                value = sql.again(row)
            except DecodingError as error:
                failure = failure or error
                continue
            if value is not None:
                fresh[row.key] = (row.key, value, row.version)
        if fresh:
            replaced = yield from do(sql.replaced(list(fresh.values())))
            count += len(replaced)
            for key in fresh.keys() - set(replaced):
                count += yield from do(sql.replaced_one(*fresh[key]))
            if progress is not None:
                yield from call(progress, count)
        if len(page) < limit:
            break
        after = page[-1].key
    if failure is not None:
        raise failure
    return count


def maintain(sql: Statements, op: Op[None]) -> Flow[None]:
    """Vacuum or analyze. Without the right raise an error: the server would only warn, and skip."""
    if not (yield from do(sql.may_maintain(op.statement.name))):
        raise ConfigError(
            f"{op.statement.name}: the database role lacks a right: it does not own {sql.t}. "
            "Run it as the table's owner; or, on PostgreSQL 17 and newer, let the owner "
            f"GRANT MAINTAIN ON {sql.t} TO <role>"
        )
    yield from do(op)


# -- pipelines -----------------------------------------------------------------------------


def pipeline(
    ops: list[Op[Any]], *, atomic: bool, engine: Engine, sql: Statements
) -> Flow[list[Any]]:
    """Send many operations in as few round trips and statements as possible.

    Returns:
        For each its answer, or the PgkvError that its handle raises.
    """
    if (several := getattr(engine, "pipeline", None)) is not None:  # to several servers
        return (yield from several(ops, atomic=atomic))  # type: ignore[no-any-return]  # of a flow
    started = monotonic()
    deadline = engine.until()
    outcomes: list[Any] = []
    alone: list[Op[Any]] = []  # the hooks have heard of these already
    if atomic and ops:
        outcomes = yield from _atomic(ops, engine, sql, deadline)
    elif ops:
        for chunk in chunks(ops):
            answers = yield from _independent(chunk, engine, sql, deadline, alone)
            outcomes += answers
    if _observe.hooks:
        for op, outcome in zip(ops, outcomes, strict=True):
            if op not in alone:
                error = outcome if isinstance(outcome, PgkvError) else None
                _observe.notify(op, started, outcome, error, engine)
    return outcomes


def unsent(outcomes: list[Any]) -> PgkvError | None:
    """The failure to send, if there was one: the handles may never be asked."""
    for outcome in outcomes:
        if isinstance(outcome, StoreUnavailableError | OperationTimeoutError):
            return outcome
    return None


def chunks(ops: list[Op[Any]]) -> list[list[Op[Any]]]:
    sizes = [sum(map(len, filter(None, op.params))) for op in ops]
    cuts = _codec.chunks(ops, sizes, PIPELINE_MAX, PIPELINE_BYTES)
    return [*map(ops.__getitem__, cuts)]


def _independent(
    ops: list[Op[Any]], engine: Engine, sql: Statements, deadline: float, alone: list[Op[Any]]
) -> Flow[list[Any]]:
    """One synchronization point for all. Where one is refused, all are known to be undone, and
    each is sent again with a point of its own."""
    if monotonic() >= deadline:
        return [_late(op) for op in ops]
    sent, places = merge(sql, ops)
    batch = Pipelined(sent, sync_each=False, deadline=deadline)
    try:
        answers = parted(places, ops, (yield from send(batch)))
        if _refused(answers) and not _unknown(answers):
            yield from _create_tables(answers, ops, engine)
            answers = yield from send(Pipelined(ops, sync_each=True, deadline=deadline))
    except PgkvError as error:
        answers = [error] * len(ops)
        if engine.may_repeat(batch, error):
            return answers  # it was repeated already
    for index, answer in enumerate(answers):
        if not isinstance(answer, (Raced, PgkvError)):
            continue
        op = ops[index]
        if isinstance(answer, Raced) or engine.may_repeat(op, answer):
            if monotonic() >= deadline:
                answers[index] = _late(op) if isinstance(answer, Raced) else answer
                continue
            alone.append(op)
            try:
                answers[index] = yield from do(op)
            except PgkvError as error:
                answers[index] = error
    return answers


def _late(op: Op[Any]) -> PgkvError:
    error = OperationTimeoutError(
        f"{op.statement.name}: not executed, because the time for the whole pipeline had passed"
    )
    error.outcome_unknown = False
    return error


def _atomic(
    ops: list[Op[Any]], engine: Engine, sql: Statements, deadline: float
) -> Flow[list[Any]]:
    """All or nothing. One round trip, unless there are very many or one that can race: asking
    that one again must happen before the commit."""
    table = ops[0].statement.table
    together = len(chunks(ops)) == 1 and not any(op.statement.repeats for op in ops)

    def attempt(sql: Statements | None) -> Flow[list[Any]]:
        if together:
            return (yield from _whole(ops, sql, deadline))
        try:
            return (
                yield from transaction(lambda: _inside(ops, sql), table=table, deadline=deadline)
            )
        except RefusedError as refused:
            return refused.answers

    answers = yield from attempt(sql)
    if _refused(answers) and (
        _unprepared(answers)
        or (yield from _create_tables(answers, ops, engine))
        # Of a merged batch each operation has the error: which one is refused, they tell singly.
        or not (
            _unknown(answers)
            or sql.mergeable.keys().isdisjoint(op.statement.prepared_name for op in ops)
        )
    ):
        answers = yield from attempt(None)
    if not _refused(answers):
        return answers
    return [
        answer
        if isinstance(answer, PgkvError) and not isinstance(answer, TransactionError)
        else TransactionError(f"{op.statement.name}: {UNDONE}")
        for op, answer in zip(ops, answers, strict=True)
    ]


def _whole(
    ops: list[Op[Any]], sql: Statements | None, deadline: float | None = None
) -> Flow[list[Any]]:
    """Send operations as one transaction (or a part of one), merged where `sql` is given."""
    sent, places = merge(sql, ops)
    batch = Pipelined(sent, sync_each=False, deadline=deadline)
    return parted(places, ops, (yield from send(batch)))


def _inside(ops: list[Op[Any]], sql: Statements | None) -> Flow[list[Any]]:
    outcomes: list[Any] = []
    for chunk in chunks(ops):
        answers = yield from _whole(chunk, sql)
        outcomes += answers
        if _refused(answers):
            raise RefusedError(outcomes + [None] * (len(ops) - len(outcomes)))
        for index, op in enumerate(chunk, len(outcomes) - len(chunk)):
            if isinstance(outcomes[index], Raced):
                outcomes[index] = yield from do(op)
    return outcomes


def _refused(answers: list[Any]) -> bool:
    for answer in answers:  # noqa: SIM110  # a generator costs more than the look itself
        if isinstance(answer, PgkvError):
            return True
    return False


def _unknown(answers: list[Any]) -> bool:
    """Whether a refusal proves nothing: a pooler's word for a server that it lost."""
    return any(isinstance(answer, PgkvError) and answer.outcome_unknown for answer in answers)


def _unprepared(answers: list[Any]) -> bool:
    """Whether a prepared statement was gone; the connection has taken note, and prepares it again."""
    return any(isinstance(each, QueryError) and each.sqlstate == "26000" for each in answers)


def _create_tables(answers: list[Any], ops: list[Op[Any]], engine: Engine) -> Flow[bool]:
    """Create the table if it was missing; whether it was."""
    for op, answer in zip(ops, answers, strict=True):
        if isinstance(answer, TableNotFoundError):
            table = op.statement.table
            if table is None or not table.auto_create:
                return False
            yield from call(engine.create_missing_table, table)
            return True
    return False
