"""Statements that touch many keys, given as arrays: one round trip per few thousand keys.

Keys are made distinct and sorted over the whole batch before it is cut into chunks, so that two
batches lock rows in the same order, in whatever order they were given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import add
from typing import Any, NamedTuple, TypeVar

from .._ops import codec as _codec
from .._ops.codec import Value
from .._ops.lazy import cached_property
from .._ops.op import BINARY, TEXT, Expired, Op, Param, Raced, Result, Signal, Statement
from ..config import Seconds
from ..errors import InvalidKeyError, InvalidValueError
from .point import ADDED, LATE, REFUSED_INCREMENT, WINDOW
from .table import (
    AFTER,
    LIVE,
    NEVER,
    VALUE_OR_EXPIRED,
    Expiry,
    TableStatements,
    choose_expiry,
    read_count,
    read_nothing,
)

T = TypeVar("T")
K = TypeVar("K")

CHUNK_ROWS = 5_000
CHUNK_BYTES = 8 * 1024 * 1024
# A small array is planned at every call; one parameter per key keeps the plan.
IN_LIST_MAX = 8


class LoadTexts(NamedTuple):
    """The commands of a `load`: the clock in microseconds since 2000, as a timestamptz is sent; COPY
    into the table itself; or into a temporary table, and from there."""

    now: bytes
    insert: bytes
    stage: bytes
    fill: bytes
    merge: bytes


class BatchStatements(TableStatements):
    def distinct(self, keys: Iterable[str]) -> list[bytes]:
        """Check the keys and return them distinct, in the order of their bytes: that of locks."""
        return list(dict.fromkeys(self._listed(keys)))

    def _listed(self, keys: Iterable[str]) -> list[bytes]:
        if isinstance(keys, str | bytes):
            raise InvalidKeyError("give several keys as a list; a single string is one key")
        return sorted(self.many_keys(keys))  # the server sorts them too, and is slower at it

    # -- reading

    def get_many(self, keys: Iterable[str]) -> Op[dict[str, bytes]] | None:
        """The values of those keys that exist: one statement, so one snapshot, of any size.
        None when no key was given."""
        raw = self._listed(keys)
        return self._get_many(raw) if raw else None

    def _get_many(self, raw: list[bytes]) -> Op[dict[str, bytes]]:
        few = len(raw) if len(raw) <= IN_LIST_MAX else 0
        statement = self.shaped(self._make_get_many, few)
        return Op(statement, raw if few else (_codec.encode_array(raw),))

    def _make_get_many(self, few: int) -> Statement[dict[str, bytes]]:
        return self.reading(
            "get_many",
            f"SELECT key, {VALUE_OR_EXPIRED if self.collects else 'value'} FROM {self.t} "
            f"WHERE {_among(few)}" + ("" if self.collects else f" AND {self.readable}"),
            (TEXT,) * few or (BINARY,),
            self._read_pairs,
            join=_united,
        )

    def _read_pairs(self, result: Result) -> dict[str, bytes] | Signal:
        return _pairs_of(result, self.read_key)

    def get_raw(self, keys: Iterable[bytes]) -> Op[dict[bytes, bytes]]:
        """The values of keys that are encoded already, for merged reads."""
        op = self._get_many(sorted(keys))
        return Op(op.statement, op.params, _read_raw_pairs)

    def exists_many(self, keys: Iterable[str]) -> Op[set[str]] | None:
        """Those of the keys that exist; None when no key was given."""
        raw = self._listed(keys)
        return self._exist_many(raw) if raw else None

    def _exist_many(self, raw: list[bytes]) -> Op[set[str]]:
        return Op(self._exists_many, (_codec.encode_array(raw),))

    @cached_property
    def _exists_many(self) -> Statement[set[str]]:
        return self.reading(
            "exists_many",
            f"SELECT key FROM {self.t} WHERE {_among(0)} AND {self.readable}",
            (BINARY,),
            self._read_key_set,
            join=_all_keys,
        )

    def _read_key_set(self, result: Result) -> set[str]:
        return {self.read_key(result.get_value(row, 0) or b"") for row in range(result.ntuples)}

    # -- writing

    def set_many(
        self,
        items: Mapping[str, Value] | Iterable[tuple[str, Value]],
        ttl: Seconds | None = None,
    ) -> tuple[int, list[Op[None]]]:
        """Write all pairs; of a repeated key the last. How many keys, and the operations."""
        expiry, extra = choose_expiry(ttl, None, False)
        latest = dict(zip(*self.columns(*_columns(items)), strict=True))
        return len(latest), self._in_chunks(
            self.shaped(self._make_set_many, expiry), latest, *extra
        )

    def _in_chunks(
        self, statement: Statement[T], latest: Mapping[bytes, bytes], *extra: bytes
    ) -> list[Op[T]]:
        """The operations that write those values by key, in the order of the keys."""
        array = _codec.encode_array

        def make(keys: list[bytes]) -> list[Op[T]]:
            values = [latest[key] for key in keys]
            sizes = list(map(add, map(len, keys), map(len, values)))
            return [
                Op(statement, (array(keys[cut]), array(values[cut], _codec.BYTEA_OID), *extra))
                for cut in _codec.chunks(keys, sizes, CHUNK_ROWS, CHUNK_BYTES)
            ]

        return self.parted(sorted(latest), make)

    def parted(self, keys: list[bytes], make: Callable[[list[bytes]], list[Op[T]]]) -> list[Op[T]]:
        """The operations on sorted keys, made for those that are kept together: here for all."""
        return make(keys)

    def _make_set_many(
        self,
        expiry: Expiry,
        returning: str = "",
        decode: Callable[[Result], Any] = read_nothing,
    ) -> Statement[Any]:
        source = "unnest($1::text[], $2::bytea[]) u(k, v)"
        sql = self.upsert(expiry, source=source, returning=returning)
        formats = _array_formats(expiry)
        return self.statement("set_many", sql, formats, decode, retry_safe=True, join=_first_told)

    @cached_property
    def load_sql(self) -> LoadTexts:
        """What `load` sends."""
        copy = "COPY {} FROM STDIN (FORMAT BINARY)"
        return LoadTexts(
            now=b"SELECT extract(epoch FROM clock_timestamp()) * 1000000 - 946684800000000",
            insert=copy.format(
                f"{self.t} (key, value, expires_at, created_at, updated_at, version)"
            ).encode(),
            stage=b"CREATE TEMP TABLE pgkv_load (k TEXT, v BYTEA, e TIMESTAMPTZ, "
            b"c TIMESTAMPTZ, u TIMESTAMPTZ, n BIGINT) ON COMMIT DROP",
            fill=copy.format("pg_temp.pgkv_load").encode(),
            merge=self.upsert(
                Expiry("load", "u.e", "", None), source="pg_temp.pgkv_load u"
            ).encode(),
        )

    def increment_many(
        self, deltas: Mapping[str, int], ttl: Seconds | None = None
    ) -> list[Op[tuple[dict[str, int], list[str]]]]:
        """Add to integers: the sums, and those keys whose sum had expired when it was written."""
        expiry, extra = choose_expiry(ttl, None, False)
        summed: dict[bytes, int] = {}
        for key, delta in _pairs(deltas):
            raw = self.key(key)
            summed[raw] = summed.get(raw, 0) + _codec.integer(delta, "delta")
        latest = {key: b"%d" % _codec.integer(total, "delta") for key, total in summed.items()}
        return self._in_chunks(self.shaped(self._make_increment_many, expiry), latest, *extra)

    def _make_increment_many(self, expiry: Expiry) -> Statement[tuple[dict[str, int], list[str]]]:
        upsert = self.upsert(
            expiry,
            source="unnest($1::text[], $2::bytea[]) u(k, v)",
            value=ADDED,
            expires_at=WINDOW,
            returning="key, value, expires_at",
        )
        return self.statement(
            "increment_many",
            f"WITH up AS ({upsert}) SELECT key, value, {LATE} FROM up",
            _array_formats(expiry),
            self._read_sums,
            savepoint=True,
            refused=REFUSED_INCREMENT,
            join=_all_sums,
        )

    def _read_sums(self, result: Result) -> tuple[dict[str, int], list[str]]:
        sums: dict[str, int] = {}
        expired: list[str] = []
        for raw, total in _read_raw_sums(result).items():
            key = self.read_key(raw)
            if isinstance(total, Raced):
                expired.append(key)
            sums[key] = total.fallback if isinstance(total, Raced) else total
        return sums, expired

    # -- single operations as one

    def merged_set(self, expiry: Expiry, params: Sequence[Sequence[Param]]) -> Op[Any]:
        """Writes of different keys, sorted by key; their versions by key."""
        make = self._make_set_many
        statement = self.shaped(make, expiry, "key, version", _read_raw_versions)
        return Op(statement, _merged_columns(params))

    def merged_increment(self, params: Sequence[Sequence[Param]]) -> Op[Any]:
        """Increments of different keys; the sums by key, `Raced` where one had expired."""
        statement = self.shaped(self._make_increment_many, NEVER)
        return Op(statement, _merged_columns(params), _read_raw_sums)

    def delete_many(self, keys: Iterable[str]) -> list[Op[int]]:
        return self._chunked(self._delete_many, self.distinct(keys))

    def _chunked(self, statement: Statement[T], keys: list[bytes], *extra: bytes) -> list[Op[T]]:
        def make(keys: list[bytes]) -> list[Op[T]]:
            return [
                Op(statement, (_codec.encode_array(keys[begin : begin + CHUNK_ROWS]), *extra))
                for begin in range(0, len(keys), CHUNK_ROWS)
            ]

        return self.parted(keys, make)

    @cached_property
    def _delete_many(self) -> Statement[int]:
        return self.statement(
            "delete_many",
            f"WITH {self.locked(f'{_among(0)} AND {LIVE}')} "
            f"DELETE FROM {self.t} t USING l WHERE t.key = l.key",
            (BINARY,),
            read_count,
            retry_safe=True,
            join=sum,
        )

    def expire_many(self, keys: Iterable[str], ttl: Seconds) -> list[Op[int]]:
        interval = _codec.encode_ttl(ttl)
        return self._chunked(self._expire_many, self.distinct(keys), interval)

    @cached_property
    def _expire_many(self) -> Statement[int]:
        return self.statement(
            "expire_many",
            f"WITH {self.locked(f'{_among(0)} AND {LIVE}')} "
            f"UPDATE {self.t} t SET expires_at = {AFTER.updated.format(n=2)} "
            "FROM l WHERE t.key = l.key",
            (BINARY, BINARY),
            read_count,
            retry_safe=True,
            join=sum,
        )

    @cached_property
    def _collect(self) -> Statement[int]:
        # Tests the expiry again, so that a value written meanwhile is safe, and skips locked rows:
        # collecting never waits.
        dead = f"{_among(0)} AND expires_at <= statement_timestamp()"
        return self.statement(
            "collect",
            f"DELETE FROM {self.t} WHERE {dead} AND key IN "
            f"(SELECT key FROM {self.t} WHERE {dead} FOR UPDATE SKIP LOCKED)",
            (BINARY,),
            read_count,
            retry_safe=True,
            writes=False,
            retried=False,  # on a read-only server it would fail, and warn, after every read
        )

    def collect(self, keys: Iterable[bytes]) -> Op[int]:
        """Delete those of the keys (encoded, with prefix) whose time has passed."""
        return Op(self._collect, (_codec.encode_array(sorted(set(keys))),))


def _pairs_of(result: Result, read_key: Callable[[bytes], K]) -> dict[K, bytes] | Signal:
    column = result.get_value
    found: dict[K, bytes] = {}
    expired: list[bytes] = []
    for row in range(result.ntuples):
        key, value = column(row, 0), column(row, 1)
        assert key is not None
        if value is None:
            expired.append(key)
        else:
            found[read_key(key)] = value
    return Expired(found, expired) if expired else found


def _merged_columns(params: Sequence[Sequence[Param]]) -> tuple[bytes, ...]:
    rows = sorted((key or b"", value or b"") for key, value, *_ in params)
    keys = _codec.encode_array([key for key, _ in rows])
    values = _codec.encode_array([value for _, value in rows], _codec.BYTEA_OID)
    return (keys, values, *params[0][2:])  # type: ignore[arg-type]  # a ttl is never None


def _read_raw_versions(result: Result) -> dict[bytes, int]:
    column = result.get_value
    return {
        column(row, 0) or b"": _codec.decode_int(column(row, 1)) for row in range(result.ntuples)
    }


def _read_raw_sums(result: Result) -> dict[bytes, int | Raced]:
    """A sum that had expired when it was written counts as `Raced`: no reader can see it."""
    sums: dict[bytes, int | Raced] = {}
    column = result.get_value
    for row in range(result.ntuples):
        total = int(column(row, 1) or b"")
        sums[column(row, 0) or b""] = Raced(total) if column(row, 2) == b"\1" else total
    return sums


def _united(answers: list[dict[K, T]]) -> dict[K, T]:
    return {key: value for each in answers for key, value in each.items()}


def _all_keys(answers: list[set[K]]) -> set[K]:
    return set().union(*answers)


def _first_told(answers: list[Any]) -> Any:
    return next((each for each in answers if each is not None), None)


def _all_sums(
    answers: list[tuple[dict[str, int], list[str]]],
) -> tuple[dict[str, int], list[str]]:
    return _united([sums for sums, _ in answers]), [
        key for _, expired in answers for key in expired
    ]


def _read_raw_pairs(result: Result) -> dict[bytes, bytes] | Signal:
    return _pairs_of(result, bytes)


def _among(few: int) -> str:
    if not few:
        return "key = ANY($1::text[])"
    return f"key IN ({', '.join(f'${n}' for n in range(1, few + 1))})"


def _array_formats(expiry: Expiry) -> tuple[int, ...]:
    return (BINARY, BINARY) if expiry is NEVER else (BINARY, BINARY, BINARY)


def _pairs(items: Mapping[str, T] | Iterable[tuple[str, T]]) -> Iterable[tuple[str, T]]:
    if isinstance(items, Mapping):
        return items.items()
    return _checked_pairs(items)


def _columns(items: Mapping[str, T] | Iterable[tuple[str, T]]) -> tuple[list[str], list[T]]:
    if isinstance(items, Mapping):
        return list(items), list(items.values())
    if not hasattr(items, "__iter__"):
        raise InvalidValueError(
            f"give a mapping, or an iterable of (key, value) pairs, not {type(items).__name__}"
        )
    pairs = list(_checked_pairs(items))
    return [key for key, _ in pairs], [value for _, value in pairs]


def _checked_pairs(items: Iterable[tuple[str, T]]) -> Iterable[tuple[str, T]]:
    for item in items:
        try:
            key, value = item
        except (TypeError, ValueError):
            raise InvalidValueError(
                "give a mapping, or an iterable of (key, value) pairs"
            ) from None
        yield key, value
