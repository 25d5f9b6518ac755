"""What the patterns' statements share: decoders of rows, sweeping, and the statement that renews the leases
of locks and of idempotency keys. That of jobs has a plan of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

from ..._engine.sweep import sweep_all
from ..._ops import codec as _codec
from ..._ops.op import Flow, Result
from .lease import EXPIRED, GONE, LOCKED, RELEASED, RENEWED, REPLACED

T = TypeVar("T")
Decode: TypeAlias = Callable[[bytes | None], Any]

NOW = "statement_timestamp()"
EPOCH = "'epoch'::timestamptz"
ASYNC = "set_config('synchronous_commit', 'off', true)"
DURABLE = (
    "set_config('synchronous_commit', CASE current_setting('synchronous_commit') "
    "WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END, true)"
)


def milliseconds(seconds: float) -> bytes:
    """A setting's text for a duration; never 0, which would mean "without end"."""
    return str(max(1, round(seconds * 1000))).encode()


def as_bytes(column: bytes | None) -> bytes:
    """The bytes of a column, none for NULL."""
    return column or b""


def as_text(column: bytes | None) -> str:
    """The text of a column, empty for NULL."""
    return (column or b"").decode()


def rows_of(make: Callable[..., T], *columns: Decode) -> Callable[[Result], list[T]]:
    """Return a decoder of all rows: of each it makes one from its columns, each read by its function."""

    def read(result: Result) -> list[T]:
        value = result.get_value
        return [
            make(*[decode(value(row, n)) for n, decode in enumerate(columns)])
            for row in range(result.ntuples)
        ]

    return read


def row_of(make: Callable[..., T], *columns: Decode) -> Callable[[Result], T | None]:
    """Return a decoder of the only row; None without one."""
    read = rows_of(make, *columns)
    return lambda result: next(iter(read(result)), None)


def in_slots(sql: Any) -> list[Any]:
    """The statements of a table, or of a sharded store's for each slot."""
    shards = getattr(sql.config, "shards", None)
    if shards is None or shards.own is not None:
        return [sql]
    from ..._shards.sql import InSlot

    return [InSlot(sql, slot) for slot in range(shards.count)]


def sweep_slots(sql: Any, limit: int) -> Flow[int]:
    """Delete expired rows, chunk by chunk, until `limit` are gone."""
    removed = 0
    for each in in_slots(sql):
        removed += yield from sweep_all(each, limit - removed)
    return removed


def renewal(
    table: str, token: str, until: str, setting: str, *, alive: str = "TRUE", also: str = ""
) -> str:
    """Return the text that extends many leases and says of each what became of it.

    Rows are locked in key order, and one that a stranger holds is passed over: it must not cost the
    others their leases.

    Args:
        table: quoted.
        token: its column that names the grant.
        until: its column with the end of the lease.
        setting: an expression that is evaluated once.
        alive: what else is true of a row ``t`` that can be renewed.
        also: what else is set; ``k.till`` is the new end.
    """
    return (
        f"WITH n AS MATERIALIZED (SELECT {setting}), u AS (SELECT * FROM "
        f"unnest($1::text[], $2::bigint[], $3::float8[]) AS u (key, {token}, ttl)), "
        f"k AS MATERIALIZED (SELECT t.key, t.{token}, {NOW} + u.ttl * interval '1 second' till FROM {table} t "
        f"JOIN u USING (key, {token}), n WHERE {alive} AND t.{until} > {NOW} "
        'ORDER BY t.key COLLATE "C" FOR NO KEY UPDATE OF t SKIP LOCKED), '
        f"r AS (UPDATE {table} t SET {until} = k.till{also} "
        f"FROM k WHERE t.key = k.key AND t.{token} = k.{token} RETURNING t.key) "
        f"SELECT u.key, CASE WHEN r.key IS NOT NULL THEN {RENEWED} WHEN t.key IS NULL THEN {GONE} "
        f"WHEN t.{token} <> u.{token} THEN {REPLACED} WHEN t.{until} > {NOW} THEN {LOCKED} "
        f"WHEN t.{until} = 'epoch'::timestamptz THEN {RELEASED} ELSE {EXPIRED} END "
        f"FROM u LEFT JOIN r ON r.key = u.key LEFT JOIN {table} t ON t.key = u.key"
    )


def renewed(leases: Sequence[tuple[bytes, int, float]]) -> tuple[bytes, bytes, bytes]:
    """Its parameters: of each lease key, token, seconds from now."""
    keys, tokens, ttls = zip(*leases, strict=True)
    return (
        _codec.encode_array(keys),
        _codec.encode_int8s(tokens),
        _codec.encode_array(list(map(_codec.encode_float8, ttls)), _codec.FLOAT8_OID),
    )


def read_renewed(result: Result) -> dict[bytes, int]:
    """Its answer: for each key what became of it."""
    column = result.get_value
    return {
        as_bytes(column(row, 0)): _codec.decode_int(column(row, 1)) for row in range(result.ntuples)
    }
