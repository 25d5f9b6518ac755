"""The statements of idempotency keys: claim, complete, release, renew, read, forget.

A row is one key: who works on it (`token`, `leased_until`), what was asked (`fingerprint`), and the
outcome (`result`, NULL while there is none). A claim inside a transaction has no lease: its uncommitted
row is the lock.

* A claim reads before it writes, and takes the row with SKIP LOCKED: a claim that is refused, and a
  replay, take no row lock and no xid, and never wait for a transaction that completes the key.
* A claim, its renewal and its completion say ``synchronous_commit`` themselves: the claim is on disk
  before the effect. Inside a caller's transaction none of them does, because it would affect its commit.
* A release writes the epoch, not the clock's time, and keeps the row, so the token still rises.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from ..._ops import codec as _codec
from ..._ops.lazy import cached_property
from ..._ops.op import BINARY, TEXT, Op, Raced, Result, Signal, Statement
from ..._sql.sweep import Sweep
from ..._sql.table import micros, read_changed
from ...config import Config, Table, TableShape
from .._runtime.sql import DURABLE, EPOCH, NOW, milliseconds, read_renewed, renewal, renewed

IDEMPOTENCY = TableShape(
    "_idempotency",
    """\
    key          TEXT COLLATE "C" PRIMARY KEY,
    fingerprint  BYTEA NOT NULL,
    token        BIGINT NOT NULL,
    leased_until TIMESTAMPTZ NOT NULL,
    expires_at   TIMESTAMPTZ NOT NULL,
    created_at   TIMESTAMPTZ NOT NULL,
    result       BYTEA""",
    fillfactor=70,
)

SEPARATOR = b"\x1f"  # between scope and key
REPEATS = 3  # of a claim that met a row in flight, before the key counts as busy
US = micros("n.ts")
ENDS = "n.ts + $3::float8 * interval '1 second'"


class Answer(NamedTuple):
    """What a claim met: ``"mine"``, ``"done"`` (with the result), ``"busy"`` (for how many more seconds
    of its lease), or ``"mismatch"``."""

    status: str
    token: int = 0
    result: bytes = b""
    remaining: float = 0.0


BUSY = Answer("busy")


class Record(NamedTuple):
    """A live row, as one read saw it."""

    token: int
    result: bytes | None
    created_at: datetime
    expires_at: datetime
    leased_until: datetime
    read_at: datetime


class IdempotencyStatements(Sweep):
    """All statements of one store's table of idempotency keys."""

    def __init__(self, config: Config, table: Table) -> None:
        super().__init__(config)
        self.table = table
        self.t: str = self.table.quoted

    # -- claiming

    @cached_property
    def _claim(self) -> Statement[Answer]:
        one = f"FROM {self.t} WHERE key = $1"
        row = self._new_row("n.ts + $5::float8 * interval '1 second'")
        sql = (
            f"WITH n AS MATERIALIZED (SELECT clock_timestamp() ts, {DURABLE}, "
            "set_config('lock_timeout', $4, true)), "
            f"free AS MATERIALIZED (SELECT key {one} AND (expires_at <= {NOW} OR result IS NULL "
            f"AND leased_until <= {NOW} AND fingerprint = $2) FOR UPDATE SKIP LOCKED), "
            f"g AS ({row} WHERE EXISTS (SELECT 1 FROM free) OR NOT EXISTS (SELECT 1 {one}) "
            "ON CONFLICT (key) DO UPDATE SET "
            "token = greatest(t.token + 1, EXCLUDED.token), leased_until = EXCLUDED.leased_until, "
            "expires_at = EXCLUDED.expires_at, fingerprint = EXCLUDED.fingerprint, result = NULL, "
            "created_at = EXCLUDED.created_at WHERE t.expires_at <= EXCLUDED.created_at "
            "OR t.result IS NULL AND t.leased_until <= EXCLUDED.created_at "
            "AND t.fingerprint = EXCLUDED.fingerprint RETURNING token)"
            " SELECT 'mine', token, NULL::bytea, NULL::float8 FROM g UNION ALL SELECT "
            f"CASE WHEN expires_at <= {NOW} THEN 'raced' WHEN fingerprint <> $2 THEN 'mismatch' "
            "WHEN result IS NOT NULL THEN 'done' "
            f"WHEN leased_until <= {NOW} THEN 'raced' ELSE 'busy' END, token, result, "
            f"extract(epoch from leased_until - {NOW})::float8 {one} AND NOT EXISTS (SELECT 1 FROM g)"
        )
        formats = (TEXT, BINARY, BINARY, TEXT, BINARY)
        return self.statement("idempotency_claim", sql, formats, _read_claim, repeats=REPEATS)

    def claim(
        self, key: bytes, fingerprint: bytes, ttl: float, wait: float, lease: float
    ) -> Op[Answer]:
        """Take the key for `lease` seconds if nothing has it; another transaction that is about to take
        it is waited for `wait` seconds, then it fails with 55P03."""
        float8 = _codec.encode_float8
        return Op(self._claim, (key, fingerprint, float8(ttl), milliseconds(wait), float8(lease)))

    # Inside a caller's transaction nothing is prepared, and planning costs the most: so the usual case has a
    # statement of its own. Each of the three answers None where it is for the next.

    def _new_row(self, lease: str) -> str:
        """The insert of both kinds of claim: $1 key, $2 fingerprint, $3 ttl."""
        return (
            f"INSERT INTO {self.t} AS t (key, fingerprint, token, leased_until, expires_at, created_at) "
            f"SELECT $1, $2, {US}, {lease}, {ENDS}, n.ts FROM n"
        )

    def _make_inside(self, change: str) -> Statement[Answer | None]:
        # The last SELECT puts the caller's own lock_timeout back.
        sql = (
            "WITH n AS MATERIALIZED (SELECT clock_timestamp() ts, current_setting('lock_timeout') "
            f"old, set_config('lock_timeout', $4, true)), g AS ({change} RETURNING token) "
            "SELECT g.token, set_config('lock_timeout', n.old, true) FROM n LEFT JOIN g ON true"
        )
        return self.statement("idempotency_claim", sql, (TEXT, BINARY, BINARY, TEXT), _read_token)

    @cached_property
    def _insert(self) -> Statement[Answer | None]:
        return self._make_inside(f"{self._new_row(EPOCH)} ON CONFLICT DO NOTHING")

    def insert(self, key: bytes, fingerprint: bytes, ttl: float, wait: float) -> Op[Answer | None]:
        """Take a new key in the caller's transaction; another transaction that has it is waited for
        `wait` seconds, then it fails with 55P03."""
        return Op(self._insert, (key, fingerprint, _codec.encode_float8(ttl), milliseconds(wait)))

    @cached_property
    def _look(self) -> Statement[Answer | None]:
        sql = (
            "SELECT CASE WHEN fingerprint <> $2 THEN 'mismatch' WHEN result IS NOT NULL THEN 'done' "
            f"ELSE 'busy' END, token, result, extract(epoch from leased_until - {NOW})::float8 "
            f"FROM {self.t} WHERE key = $1 AND expires_at > {NOW} "
            f"AND (result IS NOT NULL OR fingerprint <> $2 OR leased_until > {NOW})"
        )
        return self.statement("idempotency_claim", sql, (TEXT, BINARY), _read_answer, writes=False)

    def look(self, key: bytes, fingerprint: bytes) -> Op[Answer | None]:
        """What became of a key that is not new."""
        return Op(self._look, (key, fingerprint))

    @cached_property
    def _take_over(self) -> Statement[Answer | None]:
        return self._make_inside(
            f"UPDATE {self.t} SET token = greatest(token + 1, {US}), leased_until = {EPOCH}, "
            f"expires_at = {ENDS}, fingerprint = $2, result = NULL, created_at = n.ts FROM n "
            "WHERE key = $1 AND (expires_at <= n.ts OR result IS NULL AND leased_until <= n.ts "
            "AND fingerprint = $2)"
        )

    def take_over(
        self, key: bytes, fingerprint: bytes, ttl: float, wait: float
    ) -> Op[Answer | None]:
        """Take a key that has expired, or that an attempt left, as of `insert`."""
        return Op(
            self._take_over, (key, fingerprint, _codec.encode_float8(ttl), milliseconds(wait))
        )

    # -- ending

    def _make_complete(self, source: str) -> Statement[bool]:
        # The same result again is a repeat whose first answer was lost.
        return self.statement(
            "idempotency_complete",
            f"UPDATE {self.t} SET result = $1, leased_until = {EPOCH}, "
            f"expires_at = {NOW} + $4::float8 * interval '1 second'{source} "
            "WHERE key = $2 AND token = $3 AND (result IS NULL OR result = $1)",
            (BINARY, TEXT, BINARY, BINARY),
            read_changed,
            retry_safe=True,
        )

    @cached_property
    def _complete(self) -> Statement[bool]:
        return self._make_complete(f" FROM (SELECT {DURABLE}) n")

    @cached_property
    def _complete_inside(self) -> Statement[bool]:
        return self._make_complete("")

    def complete(
        self, key: bytes, token: int, result: bytes, ttl: float, *, inside: bool
    ) -> Op[bool]:
        """Record the outcome, in the caller's transaction or alone; False if another took the key over."""
        statement = self._complete_inside if inside else self._complete
        return Op(statement, (result, key, _codec.encode_int8(token), _codec.encode_float8(ttl)))

    @cached_property
    def _release(self) -> Statement[bool]:
        # A row that is locked is being completed, or taken over: neither is waited for.
        return self.statement(
            "idempotency_release",
            f"UPDATE {self.t} SET leased_until = {EPOCH}, expires_at = {EPOCH} WHERE key IN (SELECT "
            f"key FROM {self.t} WHERE key = $1 AND token = $2 AND result IS NULL FOR UPDATE SKIP LOCKED)"
            " AND token = $2 AND result IS NULL",
            (TEXT, BINARY),
            read_changed,
            retry_safe=True,
        )

    def release(self, key: bytes, token: int) -> Op[bool]:
        """Let the next claim have the key at once, with any payload."""
        return Op(self._release, (key, _codec.encode_int8(token)))

    @cached_property
    def _renew(self) -> Statement[dict[bytes, int]]:
        # A key that is worked on does not expire, however short its ttl.
        also = ", expires_at = greatest(t.expires_at, k.till)"
        sql = renewal(self.t, "token", "leased_until", DURABLE, alive="t.result IS NULL", also=also)
        formats = (BINARY, BINARY, BINARY)
        return self.statement("idempotency_renew", sql, formats, read_renewed, retry_safe=True)

    def renew(self, leases: Sequence[tuple[bytes, int, float]]) -> Op[dict[bytes, int]]:
        """Extend many leases: (key, token, seconds from now). For each key, what became of it."""
        return Op(self._renew, renewed(leases))

    # -- looking, and upkeep

    @cached_property
    def _get(self) -> Statement[Record | None]:
        return self.statement(
            "idempotency_get",
            f"SELECT token, result, created_at, expires_at, leased_until, {NOW} FROM {self.t} "
            f"WHERE key = $1 AND expires_at > {NOW}",
            (TEXT,),
            _read_record,
            retry_safe=True,
            writes=False,
        )

    def get(self, key: bytes) -> Op[Record | None]:
        """The key's live row."""
        return Op(self._get, (key,))

    @cached_property
    def _forget(self) -> Statement[bool]:
        # Not repeated: an attempt that began meanwhile would be ended.
        return self.statement(
            "idempotency_forget",
            f"UPDATE {self.t} SET leased_until = {EPOCH}, expires_at = {EPOCH}, result = NULL, "
            f"token = token + 1 WHERE key = $1 AND expires_at > {NOW}",
            (TEXT,),
            read_changed,
        )

    def forget(self, key: bytes) -> Op[bool]:
        """Make the key new, and drop its result; an attempt under way can no longer complete it."""
        return Op(self._forget, (key,))


def _read_answer(result: Result) -> Answer | None:
    column = result.get_value
    status = (column(0, 0) or b"").decode() if result.ntuples else "raced"
    if status == "raced":
        return None
    token, remaining = column(0, 1), column(0, 3)
    return Answer(
        status,
        0 if token is None else _codec.decode_int(token),
        column(0, 2) or b"",
        0.0 if remaining is None else max(0.0, _codec.decode_float8(remaining)),
    )


_RACED = Raced(BUSY)


def _read_claim(result: Result) -> Answer | Signal:
    return _read_answer(result) or _RACED


def _read_token(result: Result) -> Answer | None:
    token = result.get_value(0, 0)
    return None if token is None else Answer("mine", _codec.decode_int(token))


def _read_record(result: Result) -> Record | None:
    if not result.ntuples:
        return None
    column, moment = result.get_value, _codec.decode_moment
    return Record(
        _codec.decode_int(column(0, 0)),
        column(0, 1),
        *(moment(column(0, each)) for each in range(2, 6)),
    )
