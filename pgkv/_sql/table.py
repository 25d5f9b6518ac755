"""The parts of statements: identifiers, clauses, and the decoding of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from random import random
from typing import Any, NoReturn, ParamSpec, TypeVar

from .._ops import codec as _codec
from .._ops.lazy import cached_property
from .._ops.op import BINARY, TEXT, Noted, Op, Result, Signal, Statement
from ..config import Config, Seconds, Table, TtlCleanupStrategy
from ..errors import InvalidValueError

P = ParamSpec("P")
T = TypeVar("T")

# The version of a row is a hybrid logical clock in microseconds: an insert takes the server's
# clock, an update the greater of that clock and the old version plus one.


def micros(moment: str) -> str:
    """The microseconds of a moment since 1970, in SQL: in float8, which holds them exactly until the
    year 2106 and costs less than the numeric of extract()."""
    return f"(date_part('epoch', {moment}) * 1000000)::bigint"


CLOCK_US = micros("clock_timestamp()")
STATEMENT_US = micros("statement_timestamp()")
LIVE = "(expires_at IS NULL OR expires_at > statement_timestamp())"
# A value, or NULL where its time has passed: the column is NOT NULL.
VALUE_OR_EXPIRED = "CASE WHEN expires_at <= statement_timestamp() THEN NULL ELSE value END"
UPDATED = f"updated_at = statement_timestamp(), version = greatest(version + 1, {STATEMENT_US})"
# The row that an upsert found had expired when the statement arrived.
DEAD = "t.expires_at <= EXCLUDED.updated_at"


class Expiry:
    """How a write sets the row's expiry: the expression, and its parameter if it has one.

    `inserted` stands in an INSERT's list, `updated` in an UPDATE.
    """

    __slots__ = ("format", "inserted", "name", "updated")

    def __init__(self, name: str, inserted: str, updated: str, format: int | None) -> None:
        self.name: str = name
        self.inserted: str = inserted
        self.updated: str = updated
        self.format: int | None = format


# {n} is the parameter's number.
NEVER = Expiry("never", "NULL", "NULL", None)
AFTER = Expiry(
    "after",
    "clock_timestamp() + ${n}::interval",
    "statement_timestamp() + ${n}::interval",
    BINARY,
)
AT = Expiry("at", "${n}::timestamptz", "${n}::timestamptz", BINARY)
KEEP = Expiry("keep", "NULL", "expires_at", None)


def choose_expiry(
    ttl: Seconds | None,
    expires_at: datetime | None,
    keep_ttl: bool,
    otherwise: Expiry = NEVER,
) -> tuple[Expiry, tuple[bytes, ...]]:
    """Return the expiry that a call's arguments ask for, with its parameter."""
    if ttl is None and expires_at is None and not keep_ttl:
        return otherwise, ()
    if (ttl is not None) + (expires_at is not None) + bool(keep_ttl) > 1:
        raise InvalidValueError("give at most one of ttl, expires_at and keep_ttl")
    if ttl is not None:
        return AFTER, (_codec.encode_ttl(ttl),)
    if expires_at is not None:
        return AT, (_codec.encode_moment(expires_at),)
    return KEEP, ()


def _nothing() -> None:
    """No answer."""


# What `on_error="miss"` answers while the server is away: to reads that there is no such key, to
# writes that nothing was written. An answer of 0 is no version. No condition, no count, no scan.
MISSED: dict[str, Callable[[], Any]] = {
    **dict.fromkeys(("get", "get_entry", "ttl"), _nothing),
    **dict.fromkeys(("exists", "delete", "expire", "expire_at", "persist"), bool),
    **dict.fromkeys(("set", "set_many", "delete_many", "expire_many"), int),
    "get_many": dict,
    "exists_many": set,
}


READS_MARKED = 1 / 4  # of the reads that find something


def noted(
    name: str, sql: str, decode: Callable[[Result], T | Signal], config: Config
) -> Callable[[Result], T | Signal]:
    """Return a decoder that lets the collector of a bounded table hear of a sample of what is read
    and written. It evicts two rows for each that is written."""
    if name == "get":

        def read(result: Result) -> T | Signal:
            answer = decode(result)
            if answer is None or isinstance(answer, Signal) or random() >= READS_MARKED:  # noqa: S311  # a sample, no secret
                return answer
            return Noted(answer, 0)

        return read
    if "INSERT INTO" not in sql:
        return decode
    one_in = 256 if config.max_entries is None else min(256, max(1, config.max_entries // 100))

    def write(result: Result) -> T | Signal:
        answer = decode(result)
        rows = result.command_tuples or 1
        if isinstance(answer, Signal) or random() * one_in >= rows:  # noqa: S311  # likewise
            return answer
        return Noted(answer, 2 * max(rows, one_in))

    return write


class TableStatements:
    """The statements of one table, created at first use and kept; see `made`.

    Args:
        config: the table, its limits and its cleanup strategy.
        prefix: the namespace that every key carries.
    """

    may_miss = False  # no pattern's statement, whatever `on_error` says

    def __init__(self, config: Config, prefix: str = "") -> None:
        self.config = config
        self.table: Table = config.table
        self.t: str = self.table.quoted
        self.prefix = prefix
        self.prefix_bytes: bytes = prefix.encode()
        self.key_length_max: int = config.max_key_length
        self.value_size_max: int = config.max_value_size
        if (shards := getattr(config, "shards", None)) is not None:
            shards.restrict(self)
        if config.max_bytes is not None:
            self.value_size_max = min(self.value_size_max, config.max_bytes // 8)
        strategy = config.ttl_cleanup_strategy
        # The condition under which reads (not writes) treat a row as live.
        self.readable = "TRUE" if strategy is TtlCleanupStrategy.DISABLED else LIVE
        # Under ON_READ a read also reports expired rows, so that they can be collected.
        self.collects: bool = strategy is TtlCleanupStrategy.ON_READ
        self.lenient: bool = self.may_miss and config.on_error == "miss"
        self._made: dict[object, Statement[Any]] = {}

    def shaped(
        self, make: Callable[P, Statement[T]], *args: P.args, **kwargs: P.kwargs
    ) -> Statement[T]:
        """Return what that method makes of those arguments, made once."""
        shape = (make.__name__, *args, *kwargs.values())
        try:
            return self._made[shape]
        except KeyError:
            return self._made.setdefault(shape, make(*args, **kwargs))

    def made(self, shape: object, make: Callable[[], Statement[T]]) -> Statement[T]:
        """Return the statement of that shape, made once."""
        try:
            return self._made[shape]
        except KeyError:
            return self._made.setdefault(shape, make())

    def statement(
        self,
        name: str,
        sql: str,
        formats: tuple[int, ...],
        decode: Callable[[Result], T | Signal],
        **options: Any,
    ) -> Statement[T]:
        if self.lenient and options.get("retry_safe"):
            options["missed"] = MISSED.get(name)
        if self.config.bounded and self.table.shape is None:
            decode = noted(name, sql, decode, self.config)
        return Statement(name, sql, formats, decode, table=self.table, **options)

    def reading(
        self,
        name: str,
        sql: str,
        formats: tuple[int, ...],
        decode: Callable[[Result], T | Signal],
        **options: Any,
    ) -> Statement[T]:
        """Make a statement of this table that only reads."""
        return self.statement(name, sql, formats, decode, retry_safe=True, writes=False, **options)

    def strict(self, op: Op[T]) -> Op[T]:
        """An operation that raises while the server is away, whatever `on_error` says."""
        if op.statement.missed is None:
            return op
        statement = self.made(("strict", op.statement), lambda: replace(op.statement, missed=None))
        return Op(statement, op.params, op.decode)

    # -- parameters

    def key(self, key: str) -> bytes:
        return _codec.encode_key(key, self.prefix_bytes, self.key_length_max)

    def many_keys(self, keys: Iterable[str]) -> list[bytes]:
        return _codec.encode_keys(keys, self.prefix_bytes, self.key_length_max)

    def value(self, value: _codec.Value) -> bytes:
        return _codec.encode_value(value, self.value_size_max)

    def pair(self, key: str, value: _codec.Value) -> tuple[bytes, bytes]:
        return (
            _codec.encode_key(key, self.prefix_bytes, self.key_length_max),
            _codec.encode_value(value, self.value_size_max),
        )

    def columns(
        self, names: Sequence[str], contents: Sequence[_codec.Value]
    ) -> tuple[list[bytes], Sequence[bytes]]:
        return self.many_keys(names), _codec.encode_values(contents, self.value_size_max)

    @cached_property
    def read_key(self) -> Callable[[bytes], str]:
        """Decodes a key that is read, without the namespace's prefix."""
        cut = len(self.prefix_bytes)
        if not cut:
            return bytes.decode
        return lambda raw: raw[cut:].decode()

    # -- clauses

    def upsert(
        self,
        expiry: Expiry,
        *,
        source: str | None = None,
        value: str = "EXCLUDED.value",
        expires_at: str | None = None,
        where: str = "",
        returning: str = "",
    ) -> str:
        """The upsert behind every unconditional write and every write "if absent".

        Parameters are ``$1`` key, ``$2`` value, ``$3`` the expiry's. An expired row
        counts as absent: it gets a new ``created_at``, and never keeps the old expiry.
        """
        inserted = expiry.inserted.format(n=3)
        if expires_at is None:
            expires_at = "EXCLUDED.expires_at"
            if expiry is KEEP:
                expires_at = f"CASE WHEN {DEAD} THEN NULL ELSE t.expires_at END"
        if source is None:
            rows = f"VALUES ($1, $2, {inserted}, clock_timestamp(), clock_timestamp(), {CLOCK_US})"
        else:
            rows = (
                f"SELECT u.k, u.v, {inserted}, clock_timestamp(), clock_timestamp(), {CLOCK_US} "
                f"FROM {source}"
            )
        return (
            f"INSERT INTO {self.t} AS t (key, value, expires_at, created_at, updated_at, version) "
            f"{rows} ON CONFLICT (key) DO UPDATE SET value = {value}, expires_at = {expires_at}, "
            f"created_at = CASE WHEN {DEAD} THEN EXCLUDED.created_at ELSE t.created_at END, "
            f"updated_at = EXCLUDED.updated_at, "
            f"version = greatest(t.version + 1, EXCLUDED.version)"
            + (f" WHERE {where}" if where else "")
            + (f" RETURNING {returning}" if returning else "")
        )

    def locked(self, where: str) -> str:
        """A CTE ``l`` that locks the rows in key order before the statement changes them.

        A sorted array alone does not order an UPDATE or DELETE; two of them then deadlock.
        """
        return (
            f"l AS MATERIALIZED (SELECT key FROM {self.t} WHERE {where} "
            f'ORDER BY key COLLATE "C" FOR UPDATE)'
        )


def formats(count: int, expiry: Expiry = NEVER, *more: int) -> tuple[int, ...]:
    """Formats of ``$1`` key, ``$2`` value (for count 2), the expiry's parameter, and `more`."""
    first = (TEXT, BINARY)[:count]
    return first + (() if expiry.format is None else (expiry.format,)) + more


# -- statements of no table ----------------------------------------------------------------


def query(
    name: str, sql: str, decode: Callable[[Result], T | Signal], *formats: int
) -> Statement[T]:
    """A statement that changes nothing, and whose table is not created where it is missing."""
    return Statement(name, sql, formats, decode, retry_safe=True, writes=False)


def command(name: str, sql: str) -> Statement[None]:
    """A command that cannot be prepared, or several."""
    return Statement(name, sql, (), read_nothing, script=True, writes=False)


# -- reading results -----------------------------------------------------------------------


def read_nothing(result: Result) -> None:
    """The result of a command that returns nothing."""


def in_each_call(result: Result) -> NoReturn:
    """Placeholder: each call has a decoder of its own, which depends on its arguments."""
    raise AssertionError(f"undecoded: {result!r}")


def read_changed(result: Result) -> bool:
    return bool(result.command_tuples)


def read_count(result: Result) -> int:
    return result.command_tuples or 0


def read_found(result: Result) -> bool:
    return result.ntuples > 0


def read_value(result: Result) -> bytes | None:
    """The first column of the only row, or None without one."""
    return result.get_value(0, 0) if result.ntuples else None


def read_int(result: Result) -> int:
    """An integer column of the only row."""
    return _codec.decode_int(result.get_value(0, 0))


def read_int_or_none(result: Result) -> int | None:
    """An integer column, or None without a row."""
    return _codec.decode_int(result.get_value(0, 0)) if result.ntuples else None
