"""The statements of a table whose values are compressed or encrypted.

The server sees frames (`transforms`) and the statements are the store's own: values are sealed where
an operation is made and opened where its answer is decoded. What the server would have to read is
refused here, before anything is sent: comparisons, appends, and sums where numbers are encrypted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn, TypeVar

from .._ops import codec as _codec
from .._ops.lazy import cached_property
from .._ops.op import BINARY, TEXT, Expired, Op, Raced, Result, Signal, Statement
from ..config import Config, Seconds
from ..errors import ConfigError
from ..transforms import HEAD, Transforms, applied, is_own
from ..types import CasResult, Entry, KeyValue, ScanOptions
from . import SETS, Statements
from .point import PointStatements
from .table import AFTER

T = TypeVar("T")


class StoredRow(NamedTuple):
    """A row as `rewrite` reads it; no value where it is in its present form."""

    key: bytes
    value: bytes | None
    version: int


class TransformedStatements(Statements):
    def __init__(self, config: Config, prefix: str = "") -> None:
        super().__init__(config, prefix)
        self.transforms: Transforms = Transforms(
            config.transforms, config.table_name, self.value_size_max
        )

    @classmethod
    def of(cls, config: Config, prefix: str = "") -> Statements:
        """Return the statements of another table, which may have none, or prefix."""
        return Statements.of(config, prefix)

    # -- values on their way

    def pair(self, key: str, value: _codec.Value) -> tuple[bytes, bytes]:
        """A key and the value as it is stored."""
        raw, plain = super().pair(key, value)
        return raw, self.transforms.seal(raw, plain)

    def columns(
        self, names: Sequence[str], contents: Sequence[_codec.Value]
    ) -> tuple[list[bytes], Sequence[bytes]]:
        """Keys, and the values as they are stored."""
        keys, values = super().columns(names, contents)
        return keys, list(map(self.transforms.seal, keys, values))

    def _sealed(self, op: Op[T]) -> Op[T]:
        key, value, *rest = op.params
        assert key is not None
        assert value is not None
        op.params = (key, self.transforms.seal(key, value), *rest)
        return op

    def _opened(self, op: Op[T]) -> Op[T]:
        key, inner = op.params[0] or b"", op.decode
        op.decode = lambda result: self._open(key, inner(result))
        return op

    def _open(self, key: bytes, answer: Any) -> Any:
        if answer is None:
            return None
        opened = self.transforms.open
        if isinstance(answer, bytes):
            return opened(key, answer)
        if isinstance(answer, Expired) and answer.answer is not None:
            answer.answer = self._open(key, answer.answer)
        elif isinstance(answer, Raced) and answer.fallback is not None:
            answer.fallback = self._open(key, answer.fallback)
        elif isinstance(answer, Entry):
            return replace(
                answer, value=opened(key, answer.value), transforms=applied(answer.value)
            )
        elif isinstance(answer, CasResult) and answer.is_mismatch:
            return CasResult(answer.status, opened(key, answer.current or b""), answer.version)
        return answer

    # -- one key

    @cached_property
    def get_statement(self) -> Statement[bytes | None]:
        # Callers of the statement have no decoder of their own: its answer brings the key.
        plain = PointStatements.get_statement._compute(self)
        inner = plain.decode

        def decode(result: Result) -> bytes | Signal | None:
            key = result.get_value(0, 1) if result.ntuples else None
            return self._open(key or b"", inner(result))  # type: ignore[no-any-return]  # as `inner`

        return replace(plain, sql=plain.sql.replace(" FROM ", ", key FROM ", 1), decode=decode)

    @cached_property
    def mergeable(self) -> dict[bytes, int]:
        """Writes only: another view of the table may read by other transforms, or refuse sums."""
        sets = (self.set_statement, self.shaped(self._make_set, AFTER))
        return {statement.prepared_name: SETS for statement in sets}

    def get_entry(self, key: str) -> Op[Entry | None]:
        return self._opened(super().get_entry(key))

    def get_and_touch(self, key: str, ttl: Seconds) -> Op[bytes | None]:
        return self._opened(super().get_and_touch(key, ttl))

    def get_and_delete(self, key: str) -> Op[bytes | None]:
        return self._opened(super().get_and_delete(key))

    def get_and_set(
        self, key: str, value: _codec.Value, ttl: Seconds | None = None
    ) -> Op[bytes | None]:
        return self._opened(super().get_and_set(key, value, ttl))

    def swap_version(
        self, key: str, version: int, new: bytes, ttl: Seconds | None = None
    ) -> Op[CasResult]:
        """Write if the row still has that version."""
        return self._sealed(self._opened(super().swap_version(key, version, new, ttl)))

    def compare_and_swap(
        self,
        key: str,
        expected: _codec.Value | None,
        new: _codec.Value,
        ttl: Seconds | None = None,
    ) -> Op[CasResult]:
        """Write if there is no such key. Values are compared by a flow, not by the server."""
        if expected is not None:
            raise _in_pipeline("compare_and_swap", "set(if_version=...)")
        return self._sealed(self._opened(super().compare_and_swap(key, None, new, ttl)))

    def compare_and_delete(self, *_: Any) -> NoReturn:
        """Refused: the server cannot compare; a flow does."""
        raise _in_pipeline("compare_and_delete", "delete(if_version=...)")

    def append(self, *_: Any) -> NoReturn:
        """Refused: the server would add plain bytes to a frame."""
        raise ConfigError(
            "append: the values of this table are transformed, and the server cannot add to them; "
            "use update(), or a table without transforms"
        )

    # -- numbers

    def _require_numbers(self, action: str) -> None:
        cipher = self.transforms.cipher
        if cipher is not None and not cipher.plain_integers:
            raise ConfigError(
                f"{action}: the server cannot add to an encrypted value; allow plain numbers by "
                "AesGcmSiv(plain_integers=True), or use a table without encryption"
            )

    def increment(self, *args: Any, **kwargs: Any) -> Op[Any]:
        self._require_numbers("increment")
        return super().increment(*args, **kwargs)

    @cached_property
    def increment_statement(self) -> Statement[int]:
        self._require_numbers("increment")
        return PointStatements.increment_statement._compute(self)

    def increment_many(
        self, deltas: Mapping[str, int], ttl: Seconds | None = None
    ) -> list[Op[tuple[dict[str, int], list[str]]]]:
        self._require_numbers("increment_many")
        return super().increment_many(deltas, ttl)

    # -- many keys

    def _read_pairs(self, result: Result) -> dict[str, bytes] | Signal:
        answer: Any = super()._read_pairs(result)
        found = answer.answer if isinstance(answer, Expired) else answer
        for key, raw in found.items():
            found[key] = self.transforms.open(self.prefix_bytes + key.encode(), raw)
        return answer  # type: ignore[no-any-return]  # as it came

    def _read_rows(self, result: Result) -> list[KeyValue]:
        opened, prefix = self.transforms.listed, self.prefix_bytes
        return [
            KeyValue(key, opened(prefix + key.encode(), raw))
            for key, raw in super()._read_rows(result)
        ]

    # -- the present form

    def stored(self, prefix: str, after: bytes | None, limit: int) -> Op[list[StoredRow]]:
        """A page of rows as they are stored; without the values that are in the present form."""
        start = None if after is None else after[len(self.prefix_bytes) :].decode()
        where, params = self._range(ScanOptions(prefix=prefix, after=start))
        statement = self.made(
            ("rewrite", where),
            lambda: self.reading(
                "rewrite",
                f"SELECT key, CASE WHEN substring(value from 1 for {HEAD}) <> $2 THEN value END, version "
                f'FROM {self.t} WHERE {where} ORDER BY key COLLATE "C" LIMIT $1::bigint',
                (BINARY, BINARY, *(TEXT,) * len(params)),
                _read_stored,
            ),
        )
        return Op(statement, (_codec.encode_int8(limit), self.transforms.head, *params))

    def again(self, row: StoredRow) -> bytes | None:
        """What a row's value is in the present form; None where it is already, or none of ours."""
        if row.value is None or self.transforms.is_plain_number(row.value):
            return None
        if is_own(row.key, row.value):
            return None
        framed = bool(applied(row.value))
        fresh = self.transforms.seal(row.key, self.transforms.open(row.key, row.value))
        same = fresh[:HEAD] == row.value[:HEAD] if framed else fresh == row.value
        return None if same else fresh

    @cached_property
    def _replace(self) -> Statement[list[bytes]]:
        return self.statement(
            "rewrite",
            f"WITH l AS MATERIALIZED (SELECT key FROM {self.t} WHERE key = ANY($1::text[]) "
            'ORDER BY key COLLATE "C" FOR NO KEY UPDATE SKIP LOCKED) '
            f"UPDATE {self.t} t SET value = u.v "
            "FROM l, unnest($1::text[], $2::bytea[], $3::bigint[]) u(k, v, n) "
            "WHERE t.key = l.key AND u.k = l.key AND t.version = u.n RETURNING t.key",
            (BINARY, BINARY, BINARY),
            lambda result: [result.get_value(row, 0) or b"" for row in range(result.ntuples)],
            retry_safe=True,
        )

    @cached_property
    def _replace_one(self) -> Statement[bool]:
        return self._of_one_key(
            "rewrite",
            f"UPDATE {self.t} SET value = $2 WHERE key = $1 AND version = $3",
            (TEXT, BINARY, BINARY),
            lambda result: bool(result.command_tuples),
            retry_safe=True,
        )

    def replaced(self, rows: Sequence[tuple[bytes, bytes, int]]) -> Op[list[bytes]]:
        """Put values in place of others if the rows have their versions still, which they keep. The
        keys of those that were replaced; a row that another client has locked is passed over."""
        keys, values, versions = zip(*rows, strict=True)
        return Op(
            self._replace,
            (
                _codec.encode_array(keys),
                _codec.encode_array(values, _codec.BYTEA_OID),
                _codec.encode_int8s(versions),
            ),
        )

    def replaced_one(self, key: bytes, value: bytes, version: int) -> Op[bool]:
        """The same for one row, waiting for who has locked it."""
        return Op(self._replace_one, (key, value, _codec.encode_int8(version)))


def _in_pipeline(action: str, instead: str) -> ConfigError:
    return ConfigError(
        f"{action}: the server cannot compare transformed values, so it cannot be queued in a "
        f"pipeline; read the version with get_entry() and queue {instead}"
    )


def _read_stored(result: Result) -> list[StoredRow]:
    column = result.get_value
    return [
        StoredRow(column(row, 0) or b"", column(row, 1), _codec.decode_int(column(row, 2)))
        for row in range(result.ntuples)
    ]
