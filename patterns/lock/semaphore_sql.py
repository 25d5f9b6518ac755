"""The statements of semaphores: a lock row for each slot, and one that says how many there are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from ..._ops import codec as _codec
from ..._ops.op import BINARY, TEXT, Op, Raced, Result, Signal, Statement
from .sql import CLOCK, NOW, REPEATS, SEPARATOR, Denied, Granted, LockStatements, milliseconds


class Undefined(NamedTuple):
    """The semaphore has another number of slots, or (None) none yet."""

    slots: int | None


class SemaphoreStatements(LockStatements):
    """A semaphore's slots are the rows ``name U+001F i``; its size is the row ``name U+001F``."""

    @cached_property
    def _grant_slot(self) -> Statement[Granted | Denied | Undefined]:
        # Each slot is a lock of its own, so there are never more leases than slots. Leases in
        # slots beyond the number (it was lowered) count too until they end.
        sql = (
            f"WITH {CLOCK}, size AS MATERIALIZED (SELECT value FROM {self.t} WHERE key = $5), "
            f"cur AS MATERIALIZED (SELECT key, value, expires_at FROM {self.t} "
            'WHERE key COLLATE "C" > $5 AND key COLLATE "C" < $5 || \':\'), '
            "mine AS MATERIALIZED (SELECT key FROM cur, n "
            "WHERE value = $2 AND expires_at > n.ts LIMIT 1), "
            "taken AS MATERIALIZED (SELECT count(*) c FROM cur, n "
            "WHERE value <> $2 AND expires_at > n.ts), "
            f"free AS MATERIALIZED (SELECT key FROM {self.t} WHERE key = ANY($1::text[]) "
            f"AND expires_at <= {NOW} AND NOT EXISTS (SELECT 1 FROM mine) "
            "LIMIT 1 FOR UPDATE SKIP LOCKED), "
            "pick AS MATERIALIZED (SELECT key FROM mine UNION ALL SELECT key FROM free UNION ALL "
            "(SELECT k FROM unnest($1::text[]) k WHERE NOT EXISTS (SELECT 1 FROM mine) "
            "AND NOT EXISTS (SELECT 1 FROM free) "
            "AND NOT EXISTS (SELECT 1 FROM cur WHERE cur.key = k) ORDER BY random() LIMIT 1)), "
            + self.granting(
                "pick.key",
                "n, pick",
                "(SELECT value FROM size) = $6 AND (SELECT c FROM taken) < $7::bigint",
            )
            + " SELECT version, key, NULL::bytea, NULL::float8, 0::bigint FROM g UNION ALL "
            "SELECT NULL, NULL, (SELECT value FROM size), (SELECT min(extract(epoch from "
            f"expires_at - {NOW})) FROM cur WHERE expires_at > {NOW})::float8, "
            "(SELECT c FROM taken) WHERE NOT EXISTS (SELECT 1 FROM g)"
        )
        formats = (BINARY, BINARY, BINARY, TEXT, TEXT, BINARY, BINARY)
        return self._statement(
            "semaphore_grant", sql, formats, lambda result: result, retry_safe=True, repeats=REPEATS
        )

    def grant_slot(
        self, keys: Sequence[bytes], owner: bytes, ttl: float, patience: float
    ) -> Op[Granted | Denied | Undefined]:
        """Take any free slot of these; arguments as of `grant`."""
        params = (
            _codec.encode_array(keys), owner, _codec.encode_float8(ttl), milliseconds(patience),
            size_key(keys), b"%d" % len(keys), _codec.encode_int8(len(keys)),
        )  # fmt: skip
        slots = len(keys)

        def decode(result: Result) -> Granted | Denied | Undefined | Signal:
            column = result.get_value
            token = column(0, 0)
            if token is not None:
                return Granted(_codec.decode_int(token), column(0, 1) or b"")
            size, left = column(0, 2), column(0, 3)
            if size is None or int(size) != slots:
                return Undefined(None if size is None else int(size))
            denied = Denied(None, 0.0 if left is None else _codec.decode_float8(left))
            # There was a slot, but somebody was quicker, or has its row in flight.
            return denied if _codec.decode_int(column(0, 4)) >= slots else Raced(denied)

        return Op(self._grant_slot, params, decode)

    @cached_property
    def _define(self) -> Statement[int]:
        return self._statement(
            "semaphore_define",
            f"WITH i AS (INSERT INTO {self.t} AS t "
            "(key, value, expires_at, created_at, updated_at, version) SELECT $1, $2, "
            "'infinity'::timestamptz, c, c, (extract(epoch from c) * 1000000)::bigint "
            "FROM (SELECT clock_timestamp() c) n ON CONFLICT (key) DO UPDATE SET "
            "value = CASE WHEN $3::bool THEN EXCLUDED.value ELSE t.value END RETURNING value) "
            "SELECT value FROM i",
            (TEXT, BINARY, BINARY),
            _read_slots,
            retry_safe=True,
        )

    def define(self, keys: Sequence[bytes], *, resize: bool) -> Op[int]:
        """Say how many slots there are, where nobody has, or anew; the number that holds."""
        return Op(self._define, (size_key(keys), b"%d" % len(keys), bytes([resize])))


def slot_keys(key: bytes, slots: int) -> list[bytes]:
    """The rows of a semaphore's slots."""
    return [key + SEPARATOR.encode() + b"%d" % slot for slot in range(slots)]


def size_key(keys: Sequence[bytes]) -> bytes:
    """The row that says how many there are."""
    return keys[0].rpartition(SEPARATOR.encode())[0] + SEPARATOR.encode()


def _read_slots(result: Result) -> int:
    return int(result.get_value(0, 0) or b"0")
