"""Operations as values: what is to be done, apart from who does it and how it waits.

An `Op` is one SQL statement with its parameters. A `Flow` is a generator that yields steps where
an algorithm has a loop or a ``finally``; a sync and an async driver each run any flow, so every
algorithm is written once. This module imports no psycopg and performs nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from hashlib import blake2b
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeAlias, TypeVar

if TYPE_CHECKING:
    from ..config import Table

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
R = TypeVar("R")

Param: TypeAlias = "bytes | None"
TEXT, BINARY = 0, 1


class Result(Protocol):
    """The part of libpq's result that decoders read. All columns arrive in binary."""

    @property
    def ntuples(self) -> int: ...
    @property
    def command_tuples(self) -> int | None: ...
    def get_value(self, row_number: int, column_number: int, /) -> bytes | None: ...


@dataclass(frozen=True, slots=True, eq=False)
class Statement(Generic[T_co]):
    """One SQL statement, made once per table and shape.

    Args:
        name: what logs and metrics call it.
        sql: text with ``$1``, ``$2`` placeholders.
        formats: TEXT or BINARY, per parameter.
        decode: turns the result into the answer, or into a `Signal`.
        table: what to create again when the server says that it is missing.
        retry_safe: may be sent again when the answer to the first sending was lost.
        writes: changes rows (and so counts towards a sweep).
        sql_18: the text for PostgreSQL 18 and later, where that is better.
        savepoint: a refusal is an expected outcome that must not abort a caller's transaction.
        refused: what to say of an SQLSTATE by which the server refuses the parameters.
        script: sent by the simple protocol: several commands, or one that cannot be prepared.
        repeats: how often a `Raced` answer is asked again; 0 for one that cannot race.
        one_key: concerns its first parameter, a key, and no other row.
        retried: False where a failure is not worth a second attempt: the work comes again.
        missed: makes the answer while the server is away, under ``on_error="miss"``; None: raise.
        key: which parameter has the key that a sharded store finds the slot by.
        join: of a statement on no one key: makes one answer of several slots' answers.
    """

    name: str
    sql: str
    formats: tuple[int, ...]
    decode: Callable[[Result], T_co | Signal]
    table: Table | None = None
    retry_safe: bool = False
    writes: bool = True
    sql_18: str | None = None
    savepoint: bool = False
    refused: dict[str, str] = field(default_factory=dict)
    script: bool = False
    repeats: int = 0
    one_key: bool = False
    retried: bool = True
    missed: Callable[[], Any] | None = None
    key: int = 0
    join: Callable[[list[Any]], Any] | None = None
    prepared_name: bytes = field(init=False)

    def __post_init__(self) -> None:
        # Named by content: on a shared connection "already exists" then means "as wanted".
        digest = blake2b(f"{self.sql}\0{self.sql_18}".encode(), digest_size=12)
        object.__setattr__(self, "prepared_name", b"pgkv_" + digest.hexdigest().encode())

    def text(self, server_version: int) -> bytes:
        """The statement's text for a server of that version (such as 180003)."""
        sql = self.sql_18 if self.sql_18 is not None and server_version >= 180000 else self.sql
        return sql.encode()


class Op(Generic[T]):
    """One call of a statement. A plain class: a frozen dataclass costs three times as much,
    and one of these is made for every operation."""

    __slots__ = ("context", "contexts", "decode", "params", "retries", "statement")

    retries: int  # set only where an operation was repeated
    context: Context  # its caller's; set only where another task may tell the hooks
    contexts: Sequence[Context]  # of all its callers, where it answers several

    def __init__(
        self,
        statement: Statement[Any],
        params: Sequence[Param] = (),
        decode: Callable[[Result], T | Signal] | None = None,
    ) -> None:
        self.statement: Statement[Any] = statement
        self.params: Sequence[Param] = params
        self.decode: Callable[[Result], T | Signal] = decode or statement.decode

    @property
    def keys(self) -> int | None:
        """How many keys the call named; None for what names none."""
        statement = self.statement
        if statement.one_key:
            return 1
        if not statement.name.endswith("_many"):
            return None
        if statement.formats[0] == TEXT:
            return len(self.params)
        array = self.params[0] or b""
        return int.from_bytes(array[12:16])  # of its header: rank, nulls, type, length

    def __repr__(self) -> str:
        return f"<Op {self.statement.name}>"


class Signal:
    """An answer that the engine acts upon before the caller sees one."""

    __slots__ = ()


class Raced(Signal):
    """The statement saw that a concurrent change invalidated its answer: ask again at once.

    `fallback` is the answer if it raced every time; None makes that a ConflictError.
    """

    __slots__ = ("fallback",)

    def __init__(self, fallback: Any = None) -> None:
        self.fallback = fallback


class Expired(Signal):
    """A read met rows whose time has passed: their keys may be collected. `answer` is the
    caller's."""

    __slots__ = ("answer", "keys")

    def __init__(self, answer: Any, keys: Sequence[bytes] = ()) -> None:
        self.answer = answer
        self.keys = keys

    def keys_of(self, op: Op[Any]) -> Sequence[bytes]:
        """The expired keys that the operation met: its only one, if it names but one."""
        return self.keys or op.params[:1]  # type: ignore[return-value]  # a key is never None


class Noted(Expired):
    """An answer that the collector of a bounded table hears of: of `rows` that were written, or
    with 0 that the key was read."""

    __slots__ = ("rows",)

    def __init__(self, answer: Any, rows: int) -> None:
        super().__init__(answer)
        self.rows = rows


class Undecoded:
    """What stands in a batch for an answer that could not be decoded. Not an error of the batch,
    which has taken effect."""

    __slots__ = ("error",)

    def __init__(self, error: Exception) -> None:
        self.error = error


class Sleep:
    """Step: let time pass."""

    __slots__ = ("seconds",)

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


class Call(Generic[T]):
    """Step: run user code, which may be sync or (under the async driver) return an awaitable."""

    __slots__ = ("args", "fn")

    def __init__(self, fn: Callable[..., T | Awaitable[T]], *args: Any) -> None:
        self.fn = fn
        self.args = args


class Transaction(Generic[T]):
    """Step: run a flow's operations on one connection, from BEGIN to COMMIT, all or nothing.

    What a `Statement` says of an operation, it says of itself.
    """

    __slots__ = ("deadline", "flow", "retries", "retry_safe", "table")

    name = "transaction"
    writes = True
    repeats = 0
    retried = True

    def __init__(
        self,
        flow: Callable[[], Flow[T]],
        *,
        table: Table | None,
        retry_safe: bool,
        deadline: float | None = None,
    ) -> None:
        self.flow: Callable[[], Flow[T]] = (
            flow  # a factory: a repeated transaction starts its flow again
        )
        self.deadline: float | None = deadline
        self.table: Table | None = table
        self.retry_safe: bool = retry_safe
        self.retries: int = 0


_RETRY_SAFE = attrgetter("statement.retry_safe")
_WRITES = attrgetter("statement.writes")


class Pipelined:
    """Step: send many operations in one round trip. Its outcome is a list: for each operation its
    answer, a `Raced`, or the `PgkvError` by which it was refused.

    Args:
        ops: none of them a script.
        sync_each: each stands for itself. Otherwise one refusal undoes all of them.
        deadline: the monotonic time at which the call ends that it is a part of; None where it is
            all of it.
    """

    __slots__ = ("deadline", "ops", "retries", "retry_safe", "sync_each", "table", "writes")

    name = "pipeline"
    repeats = 0
    retried = True

    def __init__(
        self, ops: Sequence[Op[Any]], *, sync_each: bool, deadline: float | None = None
    ) -> None:
        self.ops: Sequence[Op[Any]] = ops
        self.deadline: float | None = deadline
        self.sync_each: bool = sync_each
        self.retries: int = 0
        self.table: Table | None = ops[-1].statement.table
        self.retry_safe: bool = all(map(_RETRY_SAFE, ops))
        self.writes: bool = any(map(_WRITES, ops))


Step: TypeAlias = "Op[Any] | Sleep | Call[Any] | Transaction[Any] | Pipelined"
Flow: TypeAlias = Generator[Step, Any, T]


def do(op: Op[T]) -> Flow[T]:
    """Perform one operation inside a flow: ``value = yield from do(op)``."""
    return (yield op)  # type: ignore[no-any-return]  # the driver sends what the op decodes to


def pause(seconds: float) -> Flow[None]:
    """Sleep inside a flow."""
    yield Sleep(seconds)


def call(fn: Callable[..., T | Awaitable[T]], *args: Any) -> Flow[T]:
    """Call user code inside a flow."""
    return (yield Call(fn, *args))  # type: ignore[no-any-return]  # the driver sends its result


def send(batch: Pipelined) -> Flow[list[Any]]:
    """Perform a batch inside a flow."""
    return (yield batch)  # type: ignore[no-any-return]  # the driver sends its outcomes


def transaction(
    flow: Callable[[], Flow[T]],
    *,
    table: Table | None,
    retry_safe: bool = False,
    deadline: float | None = None,
) -> Flow[T]:
    """Run another flow in one transaction."""
    return (yield Transaction(flow, table=table, retry_safe=retry_safe, deadline=deadline))  # type: ignore[no-any-return]  # as above
