"""Statements that touch one key. Each names it as ``key = $1``, so that a sharded server routes it.
A method that a store has as well makes the operation of the store's method.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import datetime
from typing import Any, TypeVar

from .._ops import codec as _codec
from .._ops.codec import Value
from .._ops.lazy import cached_property
from .._ops.op import BINARY, TEXT, Expired, Op, Raced, Result, Signal, Statement
from ..config import Seconds
from ..errors import InvalidValueError
from ..types import CasResult, CasStatus, Entry, IncrementResult
from .table import (
    AFTER,
    AT,
    DEAD,
    KEEP,
    LIVE,
    NEVER,
    UPDATED,
    VALUE_OR_EXPIRED,
    Expiry,
    TableStatements,
    choose_expiry,
    formats,
    in_each_call,
    read_changed,
    read_found,
    read_int,
    read_int_or_none,
    read_value,
)

T = TypeVar("T")

REPEATS = 100  # attempts that may meet a concurrent change before a ConflictError

# Integers are kept as decimal text, as the Rust crate keeps them. The pattern is tested before
# the cast, which on 16 and later would also take '1_000' and '0x1F', and ' 7 ' on any version.
INTEGER = "substring(encode({value}, 'escape') from '^-?[0-9]{{1,19}}$')::bigint"
NOT_AN_INTEGER = "the stored value is not a signed 64-bit integer; nothing was changed"
REFUSED_INCREMENT = {
    "22003": "the result is outside the signed 64-bit range; nothing was changed",
    "22008": NOT_AN_INTEGER,
    "22P02": NOT_AN_INTEGER,
    "23502": NOT_AN_INTEGER,
}
# A value that is no integer gives NULL, and the column's NOT NULL refuses it (23502).
ADDED = (
    f"CASE WHEN {DEAD} THEN EXCLUDED.value ELSE ("
    + INTEGER.format(value="t.value")
    + " + encode(EXCLUDED.value, 'escape')::bigint)::text::bytea END"
)
# Whether a row that was just written had expired meanwhile.
LATE = "coalesce(expires_at <= clock_timestamp(), false)"
# An increment applies its ttl only when it creates the key: a fixed window.
WINDOW = f"CASE WHEN {DEAD} THEN EXCLUDED.expires_at ELSE t.expires_at END"


class PointStatements(TableStatements):
    def _of_one_key(
        self,
        name: str,
        sql: str,
        formats: tuple[int, ...],
        decode: Callable[[Result], T | Signal],
        **options: Any,
    ) -> Statement[T]:
        return self.statement(name, sql, formats, decode, one_key=True, **options)

    def _with_ttl(
        self,
        make: Callable[[Expiry], Statement[Any]],
        ttl: Seconds | None,
        params: tuple[bytes, ...],
        decode: Callable[[Result], T | Signal] | None = None,
    ) -> Op[T]:
        expiry, extra = choose_expiry(ttl, None, False)
        return Op(self.shaped(make, expiry), (*params, *extra), decode)

    # -- reading

    def _read_key(
        self, name: str, columns: str, decode: Callable[[Result], T | Signal], where: str = ""
    ) -> Statement[T]:
        sql = f"SELECT {columns} FROM {self.t} WHERE key = $1{where}"
        return self.reading(name, sql, (TEXT,), decode, one_key=True)

    @cached_property
    def _and_readable(self) -> str:
        return f" AND {self.readable}"

    @cached_property
    def get_statement(self) -> Statement[bytes | None]:
        if self.collects:
            return self._read_key("get", VALUE_OR_EXPIRED, _read_value_or_expired)
        return self._read_key("get", "value", read_value, self._and_readable)

    def get(self, key: str) -> Op[bytes | None]:
        return Op(self.get_statement, (self.key(key),))

    @cached_property
    def _get_entry(self) -> Statement[Entry | None]:
        return self._read_key(
            "get_entry",
            "value, version, expires_at, created_at, updated_at, statement_timestamp(), "
            "coalesce(expires_at <= statement_timestamp(), false)",
            in_each_call,
            "" if self.collects else self._and_readable,
        )

    def get_entry(self, key: str) -> Op[Entry | None]:

        def decode(result: Result) -> Entry | Signal | None:
            if not result.ntuples:
                return None
            if self.collects and result.get_value(0, 6) == b"\1":
                return Expired(None)
            column = result.get_value
            return Entry(
                key,
                column(0, 0) or b"",
                _codec.decode_int(column(0, 1)),
                _codec.decode_moment_or_none(column(0, 2)),
                _codec.decode_moment(column(0, 3)),
                _codec.decode_moment(column(0, 4)),
                _codec.decode_moment(column(0, 5)),
            )

        return Op(self._get_entry, (self.key(key),), decode)

    @cached_property
    def exists_statement(self) -> Statement[bool]:
        return self._read_key("exists", "1", read_found, self._and_readable)

    def exists(self, key: str) -> Op[bool]:
        return Op(self.exists_statement, (self.key(key),))

    @cached_property
    def _ttl(self) -> Statement[float | None]:
        # Not expires_at - now: before 17 the difference to 'infinity' is an error.
        left = (
            "(extract(epoch from expires_at) - extract(epoch from statement_timestamp()))::float8"
        )
        return self._read_key("ttl", left, _read_seconds, self._and_readable)

    def ttl(self, key: str) -> Op[float | None]:
        return Op(self._ttl, (self.key(key),))

    # -- writing

    def set(
        self,
        key: str,
        value: Value,
        ttl: Seconds | None = None,
        expires_at: datetime | None = None,
        keep_ttl: bool = False,
        if_version: int | None = None,
    ) -> Op[int | None]:
        if ttl is None and expires_at is None and not keep_ttl and if_version is None:
            return Op(self.set_statement, self.pair(key, value))
        expiry, extra = choose_expiry(ttl, expires_at, keep_ttl)
        params = (*self.pair(key, value), *extra)
        if if_version is None:
            return Op(self.shaped(self._make_set, expiry), params)
        if _codec.integer(if_version, "if_version") == 0:
            return Op(self.shaped(self._make_set_nx, expiry), params)
        return Op(self.shaped(self._make_set_if, expiry), (*params, _codec.encode_int8(if_version)))

    @cached_property
    def set_statement(self) -> Statement[int | None]:
        return self._make_set(NEVER)

    def _make_set(self, expiry: Expiry) -> Statement[int | None]:
        return self._of_one_key(
            "set",
            self.upsert(expiry, returning="version"),
            formats(2, expiry),
            read_int,
            retry_safe=True,
        )

    def _make_set_nx(self, expiry: Expiry) -> Statement[int | None]:
        return self._of_one_key(
            "set_nx",
            self.upsert(expiry, where=DEAD, returning="version"),
            formats(2, expiry),
            read_int_or_none,
        )

    def _make_set_if(self, expiry: Expiry) -> Statement[int | None]:
        n = 3 if expiry.format is None else 4
        return self._of_one_key(
            "set",
            f"UPDATE {self.t} SET value = $2, expires_at = {expiry.updated.format(n=3)}, {UPDATED} "
            f"WHERE key = $1 AND version = ${n} AND {LIVE} RETURNING version",
            formats(2, expiry, BINARY),
            read_int_or_none,
        )

    def set_nx(self, key: str, value: Value, ttl: Seconds | None = None) -> Op[bool]:
        return self._with_ttl(self._make_set_nx, ttl, self.pair(key, value), read_found)

    def set_xx(self, key: str, value: Value, ttl: Seconds | None = None) -> Op[bool]:
        return self._with_ttl(self._make_set_xx, ttl, self.pair(key, value))

    def _make_set_xx(self, expiry: Expiry) -> Statement[bool]:
        return self._of_one_key(
            "set_xx",
            f"UPDATE {self.t} SET value = $2, expires_at = {expiry.updated.format(n=3)}, {UPDATED} "
            f"WHERE key = $1 AND {LIVE}",
            formats(2, expiry),
            read_changed,
        )

    @cached_property
    def delete_statement(self) -> Statement[bool]:
        return self._of_one_key(
            "delete",
            f"DELETE FROM {self.t} WHERE key = $1 AND {LIVE}",
            (TEXT,),
            read_changed,
            retry_safe=True,
        )

    @cached_property
    def _delete_if(self) -> Statement[bool]:
        return self._of_one_key(
            "delete",
            f"DELETE FROM {self.t} WHERE key = $1 AND version = $2 AND {LIVE}",
            (TEXT, BINARY),
            read_changed,
        )

    def delete(self, key: str, if_version: int | None = None) -> Op[bool]:
        if if_version is None:
            return Op(self.delete_statement, (self.key(key),))
        version = _codec.encode_int8(_codec.integer(if_version, "if_version"))
        return Op(self._delete_if, (self.key(key), version))

    @cached_property
    def _get_and_delete(self) -> Statement[bytes | None]:
        return self._of_one_key(
            "get_and_delete",
            f"DELETE FROM {self.t} WHERE key = $1 AND {LIVE} RETURNING value",
            (TEXT,),
            read_value,
        )

    def get_and_delete(self, key: str) -> Op[bytes | None]:
        return Op(self._get_and_delete, (self.key(key),))

    def get_and_set(self, key: str, value: Value, ttl: Seconds | None = None) -> Op[bytes | None]:
        return self._with_ttl(self._make_get_and_set, ttl, self.pair(key, value))

    def _make_get_and_set(self, expiry: Expiry) -> Statement[bytes | None]:
        # Before 18 RETURNING has no old row. FOR UPDATE returns the newest value and holds it;
        # count(*) makes that run before the INSERT; and the version test turns a row
        # inserted in between into "no row returned", which is repeated.
        before_18 = (
            f"WITH old AS MATERIALIZED (SELECT value, expires_at, version FROM {self.t} "
            "WHERE key = $1 FOR UPDATE), ups AS ("
            + self.upsert(
                expiry,
                source="(SELECT $1::text AS k, $2::bytea AS v, count(*) FROM old) u",
                where="t.version = (SELECT version FROM old)",
                returning="updated_at",
            )
            + ") SELECT CASE WHEN old.expires_at <= ups.updated_at THEN NULL ELSE old.value END "
            "FROM ups LEFT JOIN old ON TRUE"
        )
        since_18 = self.upsert(
            expiry,
            returning="CASE WHEN old.expires_at <= new.updated_at THEN NULL ELSE old.value END",
        )
        return self._of_one_key(
            "get_and_set",
            before_18,
            formats(2, expiry),
            _read_value_or_raced,
            sql_18=since_18,
            repeats=REPEATS,
        )

    # -- atomic

    def increment(
        self,
        key: str,
        delta: int = 1,
        ttl: Seconds | None = None,
        only_if_exists: bool = False,
        minimum: int | None = None,
        maximum: int | None = None,
    ) -> Op[Any]:
        if only_if_exists or minimum is not None or maximum is not None:
            return self._conditional(key, delta, ttl, only_if_exists, minimum, maximum)
        if ttl is None:
            return Op(self.increment_statement, (self.key(key), decimal(delta)))
        return self._with_ttl(self._make_increment, ttl, (self.key(key), decimal(delta)))

    @cached_property
    def increment_statement(self) -> Statement[int]:
        return self._make_increment(NEVER)

    def _make_increment(self, expiry: Expiry) -> Statement[int]:
        # The statement judged the row when it arrived. If it then waited for a lock, the row may
        # have expired meanwhile, and the sum would never be visible: it is tested again with a
        # later clock.
        upsert = self.upsert(expiry, value=ADDED, expires_at=WINDOW, returning="value, expires_at")
        return self._of_one_key(
            "increment",
            f"WITH up AS ({upsert}) SELECT value, {LATE} FROM up",
            formats(2, expiry),
            _read_sum,
            savepoint=True,
            refused=REFUSED_INCREMENT,
            repeats=1,
        )

    def _conditional(
        self,
        key: str,
        delta: int,
        ttl: Seconds | None,
        only_if_exists: bool,
        minimum: int | None,
        maximum: int | None,
    ) -> Op[Any]:
        if not isinstance(only_if_exists, bool):
            raise InvalidValueError("only_if_exists must be True or False")
        if only_if_exists and ttl is not None:
            raise InvalidValueError(
                "give ttl or only_if_exists, not both: an increment sets a ttl only on a key that "
                "it creates"
            )
        low = None if minimum is None else _codec.integer(minimum, "minimum")
        high = None if maximum is None else _codec.integer(maximum, "maximum")
        if low is not None and high is not None and low > high:
            raise InvalidValueError("minimum must not be greater than maximum")
        added = decimal(delta)
        # An absent key counts as 0, and its sum is the delta: known here.
        creates = (
            not only_if_exists and (low is None or low <= delta) and (high is None or delta <= high)
        )
        expiry, extra = choose_expiry(ttl, None, False)
        if not creates:
            expiry, extra = NEVER, ()
        statement = self.shaped(self._make_conditional, expiry, creates)
        bounds = (
            b"-Infinity" if low is None else b"%d" % low,
            b"Infinity" if high is None else b"%d" % high,
        )
        decode = _sum_reader(
            absent=None if only_if_exists else 0,
            creates=creates,
            bounded=low is not None or high is not None,
        )
        return Op(statement, (self.key(key), added, *extra, *bounds), decode)

    def _make_conditional(self, expiry: Expiry, creates: bool) -> Statement[Any]:
        n = 3 if expiry.format is None else 4
        delta = "encode($2::bytea, 'escape')::numeric"

        def within(value: str) -> str:
            # A value that is no integer gives NULL, which passes, and is refused as above.
            total = f"{INTEGER.format(value=value)}::numeric + {delta}"
            return f"({total} BETWEEN ${n}::numeric AND ${n + 1}::numeric) IS NOT FALSE"

        if creates:
            change = self.upsert(
                expiry,
                value=ADDED,
                expires_at=WINDOW,
                where=f"({DEAD} OR {within('t.value')})",
                returning="value, expires_at",
            )
        else:
            change = (
                f"UPDATE {self.t} SET value = ({INTEGER.format(value='value')} + "
                f"{delta}::bigint)::text::bytea, {UPDATED} "
                f"WHERE key = $1 AND {LIVE} AND {within('value')} RETURNING value, expires_at"
            )
        # As in `_make_cas`: a refusal by a value that would have passed is a stale snapshot (2).
        return self._of_one_key(
            "increment",
            f"WITH up AS ({change}) "
            f"SELECT 0, value, {LATE} FROM up UNION ALL "
            f"SELECT CASE WHEN {within('value')} THEN 2 ELSE 1 END, value, false "
            f"FROM {self.t} WHERE key = $1 AND {LIVE} AND NOT EXISTS (SELECT 1 FROM up)",
            formats(2, expiry, TEXT, TEXT),
            in_each_call,
            savepoint=True,
            refused=REFUSED_INCREMENT,
            repeats=REPEATS,
        )

    def append(self, key: str, value: Value, ttl: Seconds | None = None) -> Op[int]:
        return self._with_ttl(self._make_append, ttl, (self.key(key), self.value(value)))

    def _make_append(self, expiry: Expiry) -> Statement[int]:
        # A value that would be too long becomes NULL, which the column refuses.
        longer = (
            f"CASE WHEN {DEAD} THEN EXCLUDED.value WHEN octet_length(t.value) "
            f"+ octet_length(EXCLUDED.value) <= {self.value_size_max} "
            "THEN t.value || EXCLUDED.value END"
        )
        upsert = self.upsert(expiry, value=longer, expires_at=WINDOW, returning="value, expires_at")
        return self._of_one_key(
            "append",
            f"WITH up AS ({upsert}) SELECT octet_length(value), {LATE} FROM up",
            formats(2, expiry),
            _read_length,
            savepoint=True,
            refused={"23502": "the value would exceed max_value_size; nothing was changed"},
            repeats=1,
        )

    def compare_and_swap(
        self, key: str, expected: Value | None, new: Value, ttl: Seconds | None = None
    ) -> Op[CasResult]:
        value = self.value(new)
        if expected is None:
            reader = _cas_reader(value, Raced())
            return self._with_ttl(self._make_cas_new, ttl, (self.key(key), value), reader)
        expiry, extra = choose_expiry(ttl, None, False, KEEP)
        statement = self.shaped(self._make_cas, expiry, "value")
        params = (self.key(key), value, *extra, self.value(expected))
        return Op(statement, params, _cas_reader(value, NOT_FOUND))

    def swap_version(
        self, key: str, version: int, new: bytes, ttl: Seconds | None = None
    ) -> Op[CasResult]:
        """Write if the row still has that version: the inner step of `update`."""
        expiry, extra = choose_expiry(ttl, None, False, KEEP)
        statement = self.shaped(self._make_cas, expiry, "version")
        params = (self.key(key), new, *extra, _codec.encode_int8(version))
        return Op(statement, params, _cas_reader(new, NOT_FOUND))

    def _make_cas(self, expiry: Expiry, column: str) -> Statement[CasResult]:
        n = 3 if expiry.format is None else 4
        # The UPDATE sees the newest row, the SELECT this statement's snapshot. A mismatch that
        # shows the expected value is therefore a stale snapshot (2): ask again.
        return self._of_one_key(
            "compare_and_swap",
            f"WITH up AS (UPDATE {self.t} SET value = $2, "
            f"expires_at = {expiry.updated.format(n=3)}, {UPDATED} "
            f"WHERE key = $1 AND {column} = ${n} AND {LIVE} RETURNING version) "
            "SELECT 0, NULL::bytea, version FROM up UNION ALL "
            f"SELECT CASE WHEN {column} = ${n} THEN 2 ELSE 1 END, value, version "
            f"FROM {self.t} WHERE key = $1 AND {LIVE} AND NOT EXISTS (SELECT 1 FROM up)",
            formats(2, expiry, BINARY),
            in_each_call,
            savepoint=True,
            repeats=REPEATS,
        )

    def _make_cas_new(self, expiry: Expiry) -> Statement[CasResult]:
        return self._of_one_key(
            "compare_and_swap",
            f"WITH up AS ({self.upsert(expiry, where=DEAD, returning='version')}) "
            "SELECT 0, NULL::bytea, version FROM up UNION ALL "
            f"SELECT 1, value, version FROM {self.t} "
            f"WHERE key = $1 AND {LIVE} AND NOT EXISTS (SELECT 1 FROM up)",
            formats(2, expiry),
            in_each_call,
            savepoint=True,
            repeats=REPEATS,
        )

    @cached_property
    def _compare_and_delete(self) -> Statement[bool]:
        return self._of_one_key(
            "compare_and_delete",
            f"DELETE FROM {self.t} WHERE key = $1 AND value = $2 AND {LIVE}",
            (TEXT, BINARY),
            read_changed,
        )

    def compare_and_delete(self, key: str, expected: Value) -> Op[bool]:
        return Op(self._compare_and_delete, (self.key(key), self.value(expected)))

    # -- expiry

    def expire(self, key: str, ttl: Seconds, if_version: int | None = None) -> Op[bool]:
        params = (self.key(key), _codec.encode_ttl(ttl))
        if if_version is None:
            return Op(self.shaped(self._make_expire, AFTER), params)
        statement = self.shaped(self._make_expire, AFTER, True)
        version = _codec.encode_int8(_codec.integer(if_version, "if_version"))
        return Op(statement, (*params, version))

    def expire_at(self, key: str, moment: datetime) -> Op[bool]:
        return Op(self.shaped(self._make_expire, AT), (self.key(key), _codec.encode_moment(moment)))

    def persist(self, key: str) -> Op[bool]:
        return Op(self.shaped(self._make_expire, NEVER), (self.key(key),))

    def _make_expire(self, expiry: Expiry, versioned: bool = False) -> Statement[bool]:
        name = {AFTER: "expire", AT: "expire_at", NEVER: "persist"}[expiry]
        return self._of_one_key(
            name,
            f"UPDATE {self.t} SET expires_at = {expiry.updated.format(n=2)} "
            f"WHERE key = $1 AND {LIVE}" + (" AND version = $3" if versioned else ""),
            formats(1, expiry, *((BINARY,) if versioned else ())),
            read_changed,
            retry_safe=not versioned,
        )

    @cached_property
    def _get_and_touch(self) -> Statement[bytes | None]:
        return self._of_one_key(
            "get_and_touch",
            f"UPDATE {self.t} SET expires_at = statement_timestamp() + $2::interval "
            f"WHERE key = $1 AND {LIVE} RETURNING value",
            (TEXT, BINARY),
            read_value,
        )

    def get_and_touch(self, key: str, ttl: Seconds) -> Op[bytes | None]:
        return Op(self._get_and_touch, (self.key(key), _codec.encode_ttl(ttl)))


# -- decoders ------------------------------------------------------------------------------

_EXPIRED = Expired(None)
_RACED = Raced()
NOT_FOUND = CasResult(CasStatus.NOT_FOUND, None, None)


def decimal(delta: int) -> bytes:
    # `type is int` first: it settles the usual call at once.
    if type(delta) is int and -(2**62) < delta < 2**62:
        return b"%d" % delta
    return b"%d" % _codec.integer(delta, "delta")


def negated(delta: int) -> int:
    """Return ``-delta`` for `decrement`."""
    if _codec.integer(delta, "delta") == _codec.INT8_MIN:
        raise InvalidValueError("delta is outside the range that can be subtracted")
    return -delta


def _read_value_or_expired(result: Result) -> bytes | Signal | None:
    if not result.ntuples:
        return None
    value = result.get_value(0, 0)
    return _EXPIRED if value is None else value


def _read_value_or_raced(result: Result) -> bytes | Signal | None:
    return result.get_value(0, 0) if result.ntuples else _RACED


def _read_seconds(result: Result) -> float | None:
    if not result.ntuples:
        return None
    raw = result.get_value(0, 0)
    return math.inf if raw is None else max(0.0, _codec.decode_float8(raw))


def _read_sum(result: Result) -> int | Signal:
    total = int(result.get_value(0, 0) or b"")
    return total if result.get_value(0, 1) == b"\0" else Raced(total)


def _read_length(result: Result) -> int | Signal:
    length = _codec.decode_int(result.get_value(0, 0))
    return length if result.get_value(0, 1) == b"\0" else Raced(length)


def _sum_reader(*, absent: int | None, creates: bool, bounded: bool) -> Callable[[Result], Any]:
    """Read the answer of a conditional increment: with bounds an `IncrementResult`. Where the statement
    inserts an absent key, an empty answer is a race."""

    def answer(value: int | None, applied: bool) -> Any:
        return IncrementResult(value, applied) if bounded else value

    def read(result: Result) -> Any:
        if not result.ntuples:
            return _RACED if creates else answer(absent, False)
        status = _codec.decode_int(result.get_value(0, 0))
        if status == 2:
            return _RACED
        told = answer(int(result.get_value(0, 1) or b""), status == 0)
        return told if result.get_value(0, 2) == b"\0" else Raced(told)

    return read


def _cas_reader(
    new: bytes, without_row: CasResult | Signal
) -> Callable[[Result], CasResult | Signal]:
    """Read the answer of a compare-and-swap. The server does not send the new value back."""

    def read(result: Result) -> CasResult | Signal:
        if not result.ntuples:
            return without_row
        status = _codec.decode_int(result.get_value(0, 0))
        if status == 2:
            return _RACED
        version = _codec.decode_int(result.get_value(0, 2))
        if status == 0:
            return CasResult(CasStatus.SUCCESS, new, version)
        return CasResult(CasStatus.MISMATCH, result.get_value(0, 1), version)

    return read
