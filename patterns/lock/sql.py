"""The statements of locks and semaphores: grant, renew, release, take back, guard, inspect.

A lock is one row of its own table: who holds it (`value`), until when (`expires_at`), and by which
grant (`version`, the fencing token). The row stays when the lease ends, so the token rises.

* A grant reads before it writes, and takes the row with SKIP LOCKED: a denied try takes no row
  lock, no xid and writes no WAL, and no try waits behind a guard to be granted a lease that
  is over (an upsert's clock is read before it waits).
* Whatever changes a lease's version locks its row FOR UPDATE first: a guard's FOR KEY SHARE stops
  that, and lets renewals and releases pass, which change no key. No index needs the version, so
  that grants are HOT updates.
* Grants and renewals say ``synchronous_commit`` themselves: a grant that a crash takes back would
  be given twice. A release says the opposite: lost in a crash, it leaves the name held to its ttl.
* A release writes the epoch, not the clock's time: a clock that steps back must not lock again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, NamedTuple, TypeVar

import msgspec

from ..._ops import codec as _codec
from ..._ops.lazy import cached_property
from ..._ops.op import BINARY, TEXT, Op, Raced, Result, Signal, Statement
from ..._sql.table import STATEMENT_US, micros, query, read_changed, read_found, read_int
from ...config import Table, TableShape, quote_identifier, short_identifier
from ...errors import InvalidValueError
from .._runtime.sql import (
    ASYNC,
    DURABLE,
    EPOCH,
    NOW,
    as_text,
    milliseconds,
    read_renewed,
    renewal,
    renewed,
    row_of,
    rows_of,
)

T = TypeVar("T")

LOCKS = TableShape(
    "_locks",
    """\
    key        TEXT COLLATE "C" PRIMARY KEY,
    value      BYTEA NOT NULL,
    expires_at TIMESTAMPTZ NOT NULL,
    created_at TIMESTAMPTZ NOT NULL,
    updated_at TIMESTAMPTZ NOT NULL,
    version    BIGINT NOT NULL""",
    fillfactor=50,
)
# A table of its own: a process that forgets durable=False must not share one that a crash empties.
LOCKS_UNLOGGED = replace(LOCKS, suffix="_locks_u")
# Places in the queues of fair locks. Worth nothing after a crash, so never logged.
TICKETS = TableShape(
    "_tickets",
    """\
    key        TEXT COLLATE "C" PRIMARY KEY,
    version    BIGINT NOT NULL,
    expires_at TIMESTAMPTZ NOT NULL""",
    fillfactor=50,
)

CHANNEL = b"pgkv_locks"  # one for a database; its payloads name table and key
LISTEN = b"LISTEN pgkv_locks"
NOTE = b"\x1e"  # between a name and the note of a waiter without a ticket
SEPARATOR = "\x1f"  # between a name and its slot or ticket; no name may hold it
MARK_LENGTH = 25  # characters of a ticket's, or note's, key after the name
REPEATS = 3  # of a try that met a row in flight, before it counts as denied
KEEP_DAYS = 7  # days that an unused name's token is remembered
MARK_US = 3_600_000_000  # the same for a request that was taken back, in microseconds
CLEAN_PAGES = 128

LIVE = f"expires_at > {NOW}"
STILL_MINE = "t.value = EXCLUDED.value AND t.expires_at > EXCLUDED.updated_at"
# An asking whose own grant was ended is granted nothing more: a copy of it may still be under way.
ENDED = f"t.value = EXCLUDED.value AND t.expires_at = {EPOCH}"
FREE = f"(expires_at <= {NOW} OR value = $2) AND NOT (value = $2 AND expires_at = {EPOCH})"
FOUND = "EXISTS (SELECT 1 FROM free)"
US = micros("n.ts")
COLUMNS = "(key, value, expires_at, created_at, updated_at, version)"


class Asking(NamedTuple):
    """One asking for a grant, unlike any other.

    Attributes:
        owner: ``host:pid``.
        row: what the granted row holds: owner, nonce, metadata.
        mark: U+001F and the nonce: the end of its ticket's key, and the key of the mark that it was
            taken back.
    """

    owner: str
    row: bytes
    mark: bytes


class Granted(NamedTuple):
    token: int
    key: bytes


class Denied(NamedTuple):
    """It is held: by whose row, for how many more seconds, how many waiters stand before this one."""

    holder: bytes | None
    remaining: float
    ahead: int = 0


@dataclass(frozen=True, slots=True)
class LockInfo:
    """Who holds a lock, as one read saw it.

    Attributes:
        name: the lock's name.
        owner: ``host:pid`` of the holder.
        token: the grant's fencing token.
        metadata: what the holder's Lock was given.
        acquired_at: when it was granted (UTC, the server's clock).
        expires_at: when it ends unless it is renewed.
        read_at: the server's time of this read.
    """

    name: str
    owner: str
    token: int
    metadata: Any
    acquired_at: datetime
    expires_at: datetime
    read_at: datetime
    _read_clock: float = field(default_factory=time.monotonic, repr=False, compare=False)

    def remaining(self) -> float:
        """Return the seconds left now unless it is renewed, never below 0."""
        left_then = (self.expires_at - self.read_at).total_seconds()
        return max(0.0, left_then - (time.monotonic() - self._read_clock))

    def age(self) -> float:
        """Return the seconds since it was granted."""
        age_then = (self.read_at - self.acquired_at).total_seconds()
        return age_then + (time.monotonic() - self._read_clock)


def read_owner(row: bytes | None) -> tuple[str, Any]:
    """Return owner and metadata of a row; what others wrote there is shown as unknown."""
    try:
        document = msgspec.json.decode(row or b"")
        return str(document["owner"]), document["metadata"]
    except (msgspec.DecodeError, KeyError, TypeError):
        return "unknown", None


class Place(NamedTuple):
    """Where a lock table is: its full name, and what tells its database from any other."""

    quoted: str
    identity: str


class Guarding(NamedTuple):
    """An open transaction that has locked rows of the table."""

    pid: int
    application: str
    state: str
    seconds: float
    key: str | None


class LockStatements:
    """All statements of one lock table, and of its queues' tickets, for names under one prefix."""

    def __init__(self, table: Table, tickets: Table, prefix: bytes = b"") -> None:
        self.table = table
        self.tickets = tickets
        self.prefix = prefix
        self.t: str = table.quoted
        self.q: str = tickets.quoted
        # What is not logged waits for no disk, whatever the setting.
        logged = table.shape != LOCKS_UNLOGGED
        self.durable = DURABLE if logged else "NULL"
        self.relaxed = ASYNC if logged else "NULL"
        self.logged: bool = logged
        # MATERIALIZED and referenced: otherwise the settings in it would never be made.
        self.clock = (
            f"n AS MATERIALIZED (SELECT clock_timestamp() ts, {self.durable}, "
            "set_config('lock_timeout', $4, true))"
        )

    def _statement(
        self, name: str, sql: str, formats: tuple[int, ...], decode: Any, **options: Any
    ) -> Statement[Any]:
        options = {"table": self.table, "retry_safe": True, **options}
        return Statement(name, sql, formats, decode, **options)

    def _inserted(self, key: str, value: str, expires: str, version: str = US) -> str:
        """The beginning of what inserts a row, from something that has a clock ``n``."""
        return (
            f"{self.t} AS t {COLUMNS} SELECT {key}, {value}, {expires}, n.ts, n.ts, {version} FROM"
        )

    def _name_of(self, key: bytes | None) -> str | None:
        """A key as users see it: without the namespace's prefix."""
        return None if key is None else key[len(self.prefix) :].decode()

    # -- granting

    def granting(self, key: str, source: str, where: str, locked: str, revoked: str) -> str:
        """The upsert of every grant, from `source`, under a condition on the snapshot; where a row
        exists, under `locked`: it was locked FOR UPDATE. Where the row holds this very grant
        already, its first reply was lost: same token, new time. `revoked` is the key of the mark
        that `take_back` leaves for this asking."""
        row = self._inserted(key, "$2", "n.ts + $3::float8 * interval '1 second'")
        return (
            f"revoked AS (SELECT FROM {self.t} WHERE key = {revoked}), "
            f"g AS (INSERT INTO {row} {source} WHERE ({where}) AND NOT EXISTS (SELECT FROM revoked) "
            "ON CONFLICT (key) DO UPDATE SET "
            f"version = CASE WHEN {STILL_MINE} THEN t.version "
            "ELSE greatest(t.version + 1, EXCLUDED.version) END, "
            f"updated_at = CASE WHEN {STILL_MINE} THEN t.updated_at ELSE EXCLUDED.updated_at END, "
            "value = EXCLUDED.value, expires_at = EXCLUDED.expires_at "
            "WHERE (t.expires_at <= EXCLUDED.updated_at OR t.value = EXCLUDED.value) "
            f"AND NOT ({ENDED}) AND {locked} RETURNING version, key)"
        )

    # `take` and `look` are what mostly answers. Each costs half as much as `grant`, and says nothing
    # (None) where it does not apply: then `grant` knows.

    def _taking(self, revoked: str, where: str = "") -> str:
        """The update of a row that is there, free, and not this asking's."""
        source = "FROM n " if self.logged else ""
        return (
            f"UPDATE {self.t} SET value = $2, expires_at = {NOW} + $3::float8 * interval "
            f"'1 second', updated_at = {NOW}, version = greatest(version + 1, {STATEMENT_US}) {source}"
            f"WHERE key = (SELECT key FROM {self.t} WHERE key = $1 AND expires_at <= {NOW} "
            f"AND value <> $2 AND NOT EXISTS (SELECT 1 FROM {self.t} WHERE key = {revoked}){where} "
            "FOR UPDATE SKIP LOCKED) RETURNING version, key"
        )

    @cached_property
    def _take(self) -> Statement[Granted | None]:
        sql = self._settings(self.durable)[0] + self._taking("$4")
        return self._statement("lock_take", sql, (TEXT, BINARY, BINARY, TEXT), _read_taken)

    def take(self, key: bytes, asking: Asking, ttl: float) -> Op[Granted | Denied | None]:
        """Take a name that exists and is free. May be repeated: where the first sending took it,
        the second one says nothing."""
        return Op(self._take, (key, asking.row, _codec.encode_float8(ttl), asking.mark))

    @cached_property
    def _look(self) -> Statement[Denied | None]:
        sql = (
            f"SELECT value, extract(epoch from expires_at - {NOW})::float8 FROM {self.t} "
            f"WHERE key = $1 AND {LIVE} AND value <> $2"
        )
        return self._statement("lock_look", sql, (TEXT, BINARY), _read_held, writes=False)

    def look(self, key: bytes, asking: Asking, ttl: float) -> Op[Granted | Denied | None]:
        """See that another holds the name."""
        del ttl
        return Op(self._look, (key, asking.row))

    def _settings(self, setting: str) -> tuple[str, str]:
        """The beginning of a statement that makes a setting, and what its command has to read from."""
        if not self.logged:
            return "", ""
        return f"WITH n AS MATERIALIZED (SELECT {setting}) ", "FROM n "

    @cached_property
    def _grant(self) -> Statement[Granted | Denied]:
        free, absent = FOUND, "NOT EXISTS (SELECT FROM there)"
        sql = (
            f"WITH {self.clock}, there AS (SELECT FROM {self.t} WHERE key = $1), "
            f"free AS MATERIALIZED (SELECT key FROM {self.t} WHERE key = $1 "
            f"AND {FREE} FOR UPDATE SKIP LOCKED), "
            + self.granting("$1", "n", f"{free} OR {absent}", free, "$5")
            + " SELECT version, key, NULL::bytea, NULL::float8 FROM g UNION ALL "
            f"SELECT NULL, NULL, value, extract(epoch from expires_at - {NOW})::float8 "
            f"FROM {self.t} WHERE key = $1 AND NOT EXISTS (SELECT 1 FROM g)"
        )
        formats = (TEXT, BINARY, BINARY, TEXT, TEXT)
        return self._statement("lock_grant", sql, formats, _read_grant, repeats=REPEATS)

    def grant(
        self, key: bytes, asking: Asking, ttl: float, lock_timeout: float
    ) -> Op[Granted | Denied]:
        """Take the name if it is free, for `ttl` seconds; a row lock in the way is waited for that long.
        A repeat of the same asking gets the same grant."""
        params = (
            key, asking.row, _codec.encode_float8(ttl), milliseconds(lock_timeout), asking.mark,
        )  # fmt: skip
        return Op(self._grant, params)

    @cached_property
    def _grant_fair(self) -> Statement[Granted | Denied]:
        free, absent = FOUND, "NOT EXISTS (SELECT FROM there)"
        first = "(SELECT c FROM ahead) = 0"
        sql = (
            f"WITH {self.clock}, there AS (SELECT FROM {self.t} WHERE key = $1), "
            f"tick AS MATERIALIZED (SELECT key, version, expires_at, key = $5 AS mine FROM {self.q}, n "
            'WHERE key COLLATE "C" > $6 AND key COLLATE "C" < $7 AND expires_at > n.ts), '
            "ahead AS MATERIALIZED (SELECT count(*) c FROM tick WHERE NOT mine AND coalesce("
            "(version, key) < (SELECT version, key FROM tick WHERE mine), true)), "
            f"free AS MATERIALIZED (SELECT key FROM {self.t} WHERE key = $1 "
            f"AND {FREE} AND ({first} OR value = $2 AND {LIVE}) FOR UPDATE SKIP LOCKED), "
            + self.granting("$1", "n", f"{free} OR {first} AND {absent}", free, "$9")
            # Refreshed when a quarter of its life has passed, or every look would write.
            + f", q AS (INSERT INTO {self.q} AS t (key, version, expires_at) "
            f"SELECT $5, {US}, "
            "n.ts + $8::float8 * interval '1 second' FROM n "
            f"WHERE NOT EXISTS (SELECT 1 FROM g) AND NOT EXISTS (SELECT 1 FROM {self.t} "
            "WHERE key = $9) AND NOT EXISTS (SELECT 1 FROM tick "
            "WHERE mine AND expires_at > n.ts + $8::float8 * interval '0.75 second') "
            "ON CONFLICT (key) DO UPDATE SET version = CASE "
            "WHEN t.expires_at <= to_timestamp(EXCLUDED.version / 1e6) THEN EXCLUDED.version "
            "ELSE t.version END, expires_at = EXCLUDED.expires_at), "
            f"d AS (DELETE FROM {self.q} WHERE key = $5 AND EXISTS (SELECT 1 FROM g)) "
            "SELECT version, key, NULL::bytea, NULL::float8, 0::bigint FROM g UNION ALL "
            f"SELECT NULL, NULL, l.value, extract(epoch from l.expires_at - {NOW})::float8, ahead.c "
            f"FROM ahead LEFT JOIN {self.t} l ON l.key = $1 WHERE NOT EXISTS (SELECT 1 FROM g)"
        )
        formats = (TEXT, BINARY, BINARY, TEXT, TEXT, TEXT, TEXT, BINARY, TEXT)
        return self._statement("lock_grant_fair", sql, formats, _read_grant_fair, repeats=REPEATS)

    def grant_fair(
        self, key: bytes, asking: Asking, ttl: float, lock_timeout: float, ticket_ttl: float
    ) -> Op[Granted | Denied]:
        """Take the name if it is free and no other has waited longer; else keep a place in the queue,
        which is lost `ticket_ttl` seconds after the last asking."""
        params = (
            key, asking.row, _codec.encode_float8(ttl), milliseconds(lock_timeout),
            key + asking.mark, key + b"\x1f", key + b"\x20", _codec.encode_float8(ticket_ttl),
            asking.mark,
        )  # fmt: skip
        return Op(self._grant_fair, params)

    @cached_property
    def _turn(self) -> Statement[Granted | Denied | None]:
        settings = self._settings(self.durable)[0].removeprefix("WITH ")
        sql = (
            f"WITH {settings and settings + ', '}m AS MATERIALIZED (SELECT (SELECT count(*) "
            f'FROM {self.q} WHERE key COLLATE "C" > $5 AND key COLLATE "C" < $6 AND {LIVE} '
            f"AND (version, key) < (o.version, o.key)) c FROM {self.q} o WHERE key = $4 AND {LIVE}), "
            f"g AS ({self._taking('$7', ' AND (SELECT c FROM m) = 0')}), "
            f"d AS (DELETE FROM {self.q} WHERE key = $4 AND EXISTS (SELECT 1 FROM g)) "
            "SELECT version, key, NULL::bytea, NULL::float8, 0::bigint FROM g UNION ALL "
            f"SELECT NULL, NULL, l.value, extract(epoch from l.expires_at - {NOW})::float8, m.c "
            f"FROM m LEFT JOIN {self.t} l ON l.key = $1 WHERE NOT EXISTS (SELECT 1 FROM g)"
        )
        formats = (TEXT, BINARY, BINARY, TEXT, TEXT, TEXT, TEXT)
        return self._statement("lock_turn", sql, formats, _read_turn)

    def turn(self, key: bytes, asking: Asking, ttl: float) -> Op[Granted | Denied | None]:
        """Take the name if it is free and this asking's ticket is the first; otherwise see how many
        are before it. `grant_fair` for half the price or less; None where that knows more."""
        params = (
            key, asking.row, _codec.encode_float8(ttl), key + asking.mark, key + b"\x1f",
            key + b"\x20", asking.mark,
        )  # fmt: skip
        return Op(self._turn, params)

    @cached_property
    def _leave(self) -> Statement[bool]:
        sql = f"DELETE FROM {self.q} WHERE key = $1"
        return self._statement("lock_leave", sql, (TEXT,), read_changed, table=self.tickets)

    def leave(self, key: bytes, asking: Asking, *, note: bool = False) -> Op[bool]:
        """Give up a place in the queue of a name, or remove the note."""
        return Op(self._leave, (_note_key(key, asking) if note else key + asking.mark,))

    def note(self, key: bytes, asking: Asking, seconds: float) -> Op[bool]:
        """Note for that time that this waits without a ticket. No grant reads it."""
        sql = (
            f"INSERT INTO {self.q} (key, version, expires_at) VALUES ($1, 0, "
            f"{NOW} + $2::float8 * interval '1 second') "
            "ON CONFLICT (key) DO UPDATE SET expires_at = EXCLUDED.expires_at"
        )
        made = self._statement(
            "lock_note", sql, (TEXT, BINARY), read_changed, table=self.tickets, retried=False
        )
        return Op(made, (_note_key(key, asking), _codec.encode_float8(seconds)))

    @cached_property
    def _end_ticket(self) -> Statement[bool]:
        sql = (
            f"INSERT INTO {self.q} AS t (key, version, expires_at) VALUES ($1, 0, {EPOCH}) "
            f"ON CONFLICT (key) DO UPDATE SET expires_at = {EPOCH}"
        )
        return self._statement("lock_leave", sql, (TEXT,), read_changed, table=self.tickets)

    def leave_in_doubt(self, key: bytes, asking: Asking) -> list[Op[bool]]:
        """`leave` where the statement that draws the ticket may still be under way: the first one
        waits for it."""
        return [Op(self._end_ticket, (key + asking.mark,)), self.leave(key, asking)]

    # -- holding

    @cached_property
    def _renew(self) -> Statement[dict[bytes, int]]:
        sql = renewal(self.t, "version", "expires_at", self.durable)
        return self._statement("lock_renew", sql, (BINARY, BINARY, BINARY), read_renewed)

    def renew(self, leases: Sequence[tuple[bytes, int, float]]) -> Op[dict[bytes, int]]:
        """Extend many leases: (key, token, seconds from now). For each key, what became of it."""
        return Op(self._renew, renewed(leases))

    def _make_release(self, notify: bool) -> Statement[bool]:
        settings, source = self._settings(self.relaxed)
        sql = (
            f"UPDATE {self.t} SET expires_at = {EPOCH} {source}"
            f"WHERE key = $1 AND version = $2 AND {LIVE}"
        )
        if notify:
            settings = f"{settings}, " if settings else "WITH "
            sql = f"r AS ({sql} RETURNING key) SELECT pg_notify($3, $4 || key) FROM r"
        formats = (TEXT, BINARY, TEXT, TEXT) if notify else (TEXT, BINARY)
        return self._statement("lock_release", settings + sql, formats, read_changed)

    @cached_property
    def _release(self) -> Statement[bool]:
        return self._make_release(notify=False)

    @cached_property
    def _release_notify(self) -> Statement[bool]:
        return self._make_release(notify=True)

    def release(self, key: bytes, token: int, notify: bool) -> Op[bool]:
        """End a lease; whether it was held. With `notify` waiting processes are told."""
        params = (key, _codec.encode_int8(token))
        if notify:
            return Op(self._release_notify, (*params, CHANNEL, self.payload(b"")))
        return Op(self._release, params)

    def ended(self, key: bytes, token: int) -> Op[bool]:
        """Whether that token was the last one, and was released."""
        sql = f"SELECT FROM {self.t} WHERE key = $1 AND version = $2 AND expires_at = {EPOCH}"
        made = self._statement("lock_ended", sql, (TEXT, BINARY), read_found, writes=False)
        return Op(made, (key, _codec.encode_int8(token)))

    def payload(self, key: bytes) -> bytes:
        """What a release tells on the channel."""
        return f"{self.t} ".encode() + key

    def notify(self, payload: bytes) -> Op[bool]:
        """Say something on the channel: to learn whether it is heard."""
        sql = "SELECT pg_notify($1, $2)"
        return Op(
            Statement("lock_notify", sql, (TEXT, TEXT), read_found, writes=False),
            (CHANNEL, payload),
        )

    # -- taking back
    #
    # A grant whose answer never came may be done, under way, or not begun. The statements here end
    # the first, wait for the second (they write a row that it locks or inserts), and leave a mark
    # that refuses the third.

    def _mark(self, param: str) -> str:
        # Old enough for the cleaning to remove it in an hour.
        version = f"{US} - {KEEP_DAYS * 86_400_000_000 - MARK_US}"
        row = self._inserted(param, "''::bytea", EPOCH, version).replace(" AS t", "")
        return f"mark AS (INSERT INTO {row} n ON CONFLICT (key) DO NOTHING)"

    @cached_property
    def _take_back(self) -> Statement[bool]:
        sql = (
            f"WITH n AS MATERIALIZED (SELECT clock_timestamp() ts, {self.relaxed}), {self._mark('$3')} "
            f"INSERT INTO {self._inserted('$1', '$2', EPOCH)} n "
            f"ON CONFLICT (key) DO UPDATE SET value = EXCLUDED.value, expires_at = {EPOCH} "
            "WHERE t.value = EXCLUDED.value OR t.expires_at <= EXCLUDED.updated_at"
        )
        return self._statement("lock_take_back", sql, (TEXT, BINARY, TEXT), read_changed)

    def take_back(self, keys: Sequence[bytes], asking: Asking) -> list[Op[Any]]:
        """The statements, in order, after which an asking holds nothing and is granted nothing."""
        return [Op(self._take_back, (keys[0], asking.row, asking.mark))]

    @cached_property
    def _revoke(self) -> Statement[bool]:
        sql = (
            f"WITH n AS MATERIALIZED (SELECT {self.durable}, set_config('lock_timeout', '250', true)), "
            f"l AS MATERIALIZED (SELECT key FROM {self.t} t, n WHERE key = $1 AND version = $2 "
            f"AND {LIVE} FOR UPDATE OF t) "
            f"UPDATE {self.t} t SET version = greatest(version + 1, {STATEMENT_US}) FROM l "
            "WHERE t.key = l.key"
        )
        return self._statement("lock_revoke", sql, (TEXT, BINARY), read_changed, retry_safe=False)

    def revoke(self, key: bytes, token: int) -> Op[bool]:
        """End a token but not its lease: the name is not granted before its old expiry."""
        return Op(self._revoke, (key, _codec.encode_int8(token)))

    # -- guarding

    def guard(self, quoted: str, key: bytes, token: int, max_hold: float | None) -> Op[bool]:
        """Lock the lease's row against takeover to the end of the caller's transaction."""
        params: tuple[bytes, ...] = (key, _codec.encode_int8(token))
        setting, source = "", quoted
        formats: tuple[int, ...] = (TEXT, BINARY)
        if max_hold is not None:
            name = "idle_in_transaction_session_timeout"
            setting = f"WITH n AS MATERIALIZED (SELECT set_config('{name}', $3, true)) "
            source = f"n, {quoted}"
            params, formats = (*params, milliseconds(max_hold)), (*formats, TEXT)
        sql = (
            f"{setting}SELECT t.version FROM {source} t WHERE t.key = $1 AND t.version = $2 "
            f"AND t.{LIVE} FOR KEY SHARE OF t"
        )
        made = self._statement(
            "lock_guard", sql, formats, read_found, writes=False, retry_safe=False
        )
        return Op(made, params)

    def place(self, quoted: str | None = None) -> Op[Place | None]:
        """Where the table is, as this connection sees it; None where it is not."""
        sql = (
            "SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname), "
            "concat_ws('/', (SELECT oid FROM pg_database WHERE datname = current_database()), "
            "c.oid, extract(epoch from pg_postmaster_start_time())) FROM pg_class c "
            "JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = to_regclass($1)"
        )
        made = query("lock_place", sql, row_of(Place, as_text, as_text), TEXT)
        return Op(made, ((quoted or self.t).encode(),))

    def isolation(self) -> Op[str]:
        sql = "SELECT current_setting('transaction_isolation')"
        return Op(query("isolation", sql, row_of(str, as_text)))

    # -- looking

    def _make_holders(
        self, name: str, where: str, formats: tuple[int, ...]
    ) -> Statement[list[LockInfo]]:
        sql = (
            f"SELECT key, value, version, updated_at, expires_at, {NOW} FROM {self.t} WHERE {where}"
        )
        read = rows_of(
            lambda name, by, token, *times: LockInfo(name, by[0], token, by[1], *times),
            self._name_of,
            read_owner,
            _codec.decode_int,
            *(_codec.decode_moment,) * 3,
        )
        return self._statement(name, sql, formats, read, writes=False)

    @cached_property
    def _holder(self) -> Statement[list[LockInfo]]:
        return self._make_holders("lock_holder", f"key = $1 AND {LIVE}", (TEXT,))

    def holder(self, key: bytes) -> Op[list[LockInfo]]:
        """The live lease of a name, if there is one."""
        return Op(self._holder, (key,))

    def holders(self) -> Op[list[LockInfo]]:
        """Every live lease, slots of semaphores among them."""
        where = f"{LIVE} AND expires_at < 'infinity' ORDER BY key COLLATE \"C\""
        return Op(self._make_holders("lock_holders", where, ()))

    def queue(self) -> Op[dict[str, int]]:
        sql = f"SELECT left(key, {-MARK_LENGTH}), count(*) FROM {self.q} WHERE {LIVE} GROUP BY 1"
        pairs = rows_of(lambda *pair: pair, self._name_of, _codec.decode_int)
        options: dict[str, Any] = {"table": self.tickets, "writes": False}
        return Op(self._statement("lock_queue", sql, (), lambda rows: dict(pairs(rows)), **options))

    def guards(self) -> Op[list[Guarding]]:
        """Open transactions that have locked rows here: guards, as a rule. The name is known
        where one transaction alone has locked the row."""
        sql = (
            "SELECT a.pid, coalesce(a.application_name, ''), coalesce(a.state, ''), "
            "extract(epoch from clock_timestamp() - a.xact_start)::float8, l.key "
            "FROM pg_locks k JOIN pg_stat_activity a ON a.pid = k.pid "
            f"LEFT JOIN {self.t} l ON l.xmax::text = a.backend_xid::text "
            "WHERE k.locktype = 'relation' AND k.relation = to_regclass($1) "
            "AND k.mode = 'RowShareLock' AND k.granted AND a.pid <> pg_backend_pid() "
            "AND a.xact_start IS NOT NULL ORDER BY a.xact_start"
        )
        read = rows_of(
            Guarding, _codec.decode_int, as_text, as_text, _codec.decode_float8, self._name_of
        )
        made = self._statement("lock_guards", sql, (TEXT,), read, writes=False)
        return Op(made, (self.t.encode(),))

    # -- cleaning

    def _make_clean(self, table: Table, condition: str) -> Statement[int]:
        chunk = "ctid >= $1::tid AND ctid < $2::tid"
        regclass = "'" + table.quoted.replace("'", "''") + "'::regclass"
        sql = (
            f"WITH gone AS (DELETE FROM {table.quoted} WHERE ctid = ANY (ARRAY("
            f"SELECT ctid FROM {table.quoted} WHERE {chunk} AND {condition} "
            f"FOR UPDATE SKIP LOCKED)) AND {condition} RETURNING 1) "
            "SELECT pg_relation_size(" + regclass + ") "
            "/ current_setting('block_size')::bigint, (SELECT count(*) FROM gone)"
        )
        return self._statement("lock_clean", sql, (TEXT, TEXT), read_int, table=table)

    @cached_property
    def _clean(self) -> Statement[int]:
        # A new row begins at the clock: above any token that is older than a week.
        week = f"version < {STATEMENT_US} - {KEEP_DAYS * 86_400_000_000}"
        return self._make_clean(self.table, f"expires_at <= {NOW} AND {week}")

    def clean(self, page: int) -> Op[int]:
        """Forget free names not granted for a week, in one chunk; the table's pages."""
        return Op(self._clean, _pages(page))

    @cached_property
    def _clean_tickets(self) -> Statement[int]:
        return self._make_clean(self.tickets, f"expires_at <= {NOW}")

    def clean_tickets(self, page: int) -> Op[int]:
        """Drop tickets of the dead, in one chunk; the table's pages."""
        return Op(self._clean_tickets, _pages(page))


def _note_key(key: bytes, asking: Asking) -> bytes:
    """The key of a note, next to the tickets of the name. Of a semaphore the slot is left out."""
    return key.partition(SEPARATOR.encode())[0] + NOTE + asking.mark[1:]


def _pages(first: int) -> tuple[bytes, bytes]:
    return f"({first},0)".encode(), f"({first + CLEAN_PAGES},0)".encode()


def _read_grant(result: Result) -> Granted | Denied | Signal:
    if not result.ntuples:
        return Raced(Denied(None, 0.0))
    if (granted := _read_taken(result)) is not None:
        return granted
    denied = Denied(result.get_value(0, 2), _codec.decode_float8(result.get_value(0, 3)))
    # Its data say "free", but the row is in flight: a takeover, a guard, the cleaning.
    return denied if denied.remaining > 0 else Raced(denied)


def _read_grant_fair(result: Result) -> Granted | Denied | Signal:
    if (granted := _read_taken(result)) is not None:
        return granted
    column = result.get_value
    left, ahead = column(0, 3), _codec.decode_int(column(0, 4))
    denied = Denied(column(0, 2), 0.0 if left is None else _codec.decode_float8(left), ahead)
    return denied if denied.remaining > 0 or ahead else Raced(denied)


def _read_taken(result: Result) -> Granted | None:
    token = result.get_value(0, 0) if result.ntuples else None
    return (
        None if token is None else Granted(_codec.decode_int(token), result.get_value(0, 1) or b"")
    )


def _read_held(result: Result) -> Denied | None:
    column = result.get_value
    return Denied(column(0, 0), _codec.decode_float8(column(0, 1))) if result.ntuples else None


def _read_turn(result: Result) -> Granted | Denied | None:
    reply = _read_grant_fair(result) if result.ntuples else None
    return None if isinstance(reply, Signal) else reply


# -- semaphores ----------------------------------------------------------------------------


class Undefined(NamedTuple):
    """The semaphore has another number of slots, or (None) none yet."""

    slots: int | None


class SemaphoreStatements(LockStatements):
    """A semaphore's slots are the rows ``name U+001F i``; its size is the row ``name U+001F``."""

    @cached_property
    def _grant_slot(self) -> Statement[Granted | Denied | Undefined]:
        # Each slot is a lock of its own, so there are never more leases than slots. Leases in
        # slots beyond the number (it was lowered) keep as many of the highest others from being
        # granted: `room` is the number of the lowest slots that may be. Two grants that count the
        # same leases then still take different slots below it. The size's row is locked against
        # a change, and against `take_back`, which both change its version.
        found = f"({FOUND} OR {STILL_MINE})"  # the version of one's own stays
        sql = (
            f"WITH {self.clock}, size AS MATERIALIZED (SELECT value, version FROM {self.t} "
            "WHERE key = $5), "
            f"cur AS MATERIALIZED (SELECT key, value, expires_at FROM {self.t} "
            'WHERE key COLLATE "C" > $5 AND key COLLATE "C" < $5 || \':\'), '
            "mine AS MATERIALIZED (SELECT key FROM cur, n "
            "WHERE value = $2 AND expires_at > n.ts LIMIT 1), "
            "taken AS MATERIALIZED (SELECT substr(key, length($5) + 1)::bigint slot FROM cur, n "
            "WHERE value <> $2 AND expires_at > n.ts), "
            "room AS MATERIALIZED (SELECT CASE WHEN EXISTS (SELECT 1 FROM taken WHERE slot >= $7) "
            "THEN $7 - (SELECT count(*) FROM (SELECT slot + row_number() OVER (ORDER BY slot DESC) r "
            "FROM taken) o WHERE r > $7) ELSE $7 END::int c), "
            "slots AS MATERIALIZED (SELECT ($1::text[])[1:c] keys FROM room), "
            f"free AS MATERIALIZED (SELECT key FROM {self.t} "
            "WHERE key = ANY((SELECT keys FROM slots)::text[]) "
            f"AND {FREE} AND expires_at <= {NOW} AND NOT EXISTS (SELECT 1 FROM mine) "
            "LIMIT 1 FOR UPDATE SKIP LOCKED), "
            "pick AS MATERIALIZED (SELECT key FROM mine UNION ALL SELECT key FROM free UNION ALL "
            "(SELECT k FROM slots, unnest(keys) k WHERE NOT EXISTS (SELECT 1 FROM mine) "
            "AND NOT EXISTS (SELECT 1 FROM free) "
            "AND NOT EXISTS (SELECT 1 FROM cur WHERE cur.key = k) ORDER BY random() LIMIT 1)), "
            f"agreed AS MATERIALIZED (SELECT 1 FROM {self.t} WHERE key = $5 AND value = $6 "
            "AND version = (SELECT version FROM size) AND EXISTS (SELECT 1 FROM pick) FOR SHARE), "
            + self.granting("pick.key", "n, pick", "EXISTS (SELECT 1 FROM agreed)", found, "$8")
            + " SELECT version, key, NULL::bytea, NULL::float8, 0::bigint FROM g UNION ALL "
            "SELECT NULL, NULL, (SELECT value FROM size), (SELECT min(extract(epoch from "
            f"expires_at - {NOW})) FROM cur WHERE expires_at > {NOW})::float8, "
            "(SELECT count(*) FROM taken) WHERE NOT EXISTS (SELECT 1 FROM g)"
        )
        formats = (BINARY, BINARY, BINARY, TEXT, TEXT, BINARY, BINARY, TEXT)
        return self._statement("semaphore_grant", sql, formats, None, repeats=REPEATS)

    def grant_slot(
        self, keys: Sequence[bytes], asking: Asking, ttl: float, lock_timeout: float
    ) -> Op[Granted | Denied | Undefined]:
        """Take any free slot of these; arguments as of `grant`."""
        params = (
            _codec.encode_array(keys), asking.row, _codec.encode_float8(ttl),
            milliseconds(lock_timeout), size_key(keys), b"%d" % len(keys),
            _codec.encode_int8(len(keys)), asking.mark,
        )  # fmt: skip
        slots = len(keys)

        def decode(result: Result) -> Granted | Denied | Undefined | Signal:
            if (granted := _read_taken(result)) is not None:
                return granted
            column = result.get_value
            size, left = column(0, 2), column(0, 3)
            if size is None or int(size) != slots:
                return Undefined(None if size is None else int(size))
            denied = Denied(None, 0.0 if left is None else _codec.decode_float8(left))
            # There was a slot, but another grant was quicker, or its row is in flight.
            return denied if _codec.decode_int(column(0, 4)) >= slots else Raced(denied)

        return Op(self._grant_slot, params, decode)

    @cached_property
    def _define(self) -> Statement[int]:
        row = self._inserted("$1", "$2", "'infinity'::timestamptz")
        sql = (
            f"WITH i AS (INSERT INTO {row} (SELECT clock_timestamp() ts) n "
            "ON CONFLICT (key) DO UPDATE SET version = t.version + $3::bool::int, "
            "value = CASE WHEN $3::bool THEN EXCLUDED.value ELSE t.value END RETURNING value) "
            "SELECT value FROM i"
        )
        return self._statement("semaphore_define", sql, (TEXT, BINARY, BINARY), _read_slots)

    def define(self, keys: Sequence[bytes], *, resize: bool) -> Op[int]:
        """Store the number of slots, unless there is one already, or replace it; return the number."""
        return Op(self._define, (size_key(keys), b"%d" % len(keys), bytes([resize])))

    @cached_property
    def _close_slots(self) -> Statement[bool]:
        sql = (
            f"WITH n AS MATERIALIZED (SELECT clock_timestamp() ts, {self.relaxed}), {self._mark('$2')} "
            f"UPDATE {self.t} SET version = version + 1 FROM n WHERE key = $1"
        )
        return self._statement("semaphore_close", sql, (TEXT, TEXT), read_changed)

    @cached_property
    def _free_slot(self) -> Statement[bool]:
        sql = (
            f"WITH n AS MATERIALIZED (SELECT {self.relaxed}) UPDATE {self.t} SET expires_at = {EPOCH} "
            f"FROM n WHERE key = ANY($1::text[]) AND value = $2 AND {LIVE}"
        )
        return self._statement("semaphore_take_back", sql, (BINARY, BINARY), read_changed)

    def take_back(self, keys: Sequence[bytes], asking: Asking) -> list[Op[Any]]:
        """As of `LockStatements`. What the first one waited for only the second one sees."""
        return [
            Op(self._close_slots, (size_key(keys), asking.mark)),
            Op(self._free_slot, (_codec.encode_array(keys), asking.row)),
        ]


def slot_keys(key: bytes, slots: int) -> list[bytes]:
    return [key + SEPARATOR.encode() + b"%d" % slot for slot in range(slots)]


def name_and_slot(key: str) -> tuple[str, int | None]:
    """The name in a row's key, and which slot of a semaphore the row is."""
    name, separator, slot = key.partition(SEPARATOR)
    return name, int(slot) if separator else None


def size_key(keys: Sequence[bytes]) -> bytes:
    """The row that says how many there are."""
    return keys[0].rpartition(SEPARATOR.encode())[0] + SEPARATOR.encode()


def _read_slots(result: Result) -> int:
    return int(result.get_value(0, 0) or b"0")


# -- the fence -----------------------------------------------------------------------------


def fence(table: str, column: str) -> str:
    """The commands that make the trigger, and again the same if it is there."""
    parts = [_name(part, "table") for part in str(table).split(".")]
    if len(parts) not in (1, 2):
        raise InvalidValueError("table must be a name, or schema.name")
    name, quoted = _name(column, "column"), ".".join(map(quote_identifier, parts))
    value = quote_identifier(name)
    schema = f"{quote_identifier(parts[0])}." if len(parts) == 2 else ""
    function = schema + quote_identifier(short_identifier(f"pgkv_fence_{parts[-1]}_{name}"))
    return f"""\
CREATE OR REPLACE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS $pgkv$
BEGIN
    IF NEW.{value} IS NULL OR NEW.{value} < OLD.{value} THEN
        RAISE EXCEPTION 'fenced: the token of this write is older than the last one of the row'
            USING ERRCODE = '55000',
            HINT = 'The lease of this writer was lost; another holder has written since.';
    END IF;
    RETURN NEW;
END
$pgkv$;
DROP TRIGGER IF EXISTS pgkv_fence ON {quoted};
CREATE TRIGGER pgkv_fence BEFORE UPDATE ON {quoted}
    FOR EACH ROW EXECUTE FUNCTION {function}();
"""


def _name(name: object, what: str) -> str:
    if not isinstance(name, str) or not name or "\0" in name or "$pgkv$" in name:
        raise InvalidValueError(f"{what} must be a name")
    return name
