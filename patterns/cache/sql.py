"""The statements of `pgkv.patterns.cache.decorator`: entries, leases on them, and generations.

All rows live in the store's own table under one reserved prefix. The row of a cached call holds
either an entry or the placeholder of a caller who computes one; its first bytes tell which. A mark
of `MARK_LENGTH` bytes at the front and the row's version together identify one state of it, and a
fill replaces only the state it began from. Generation rows hold nothing but their version.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple

from ..._ops import codec as _codec
from ..._ops.lazy import cached_property
from ..._ops.op import BINARY, TEXT, Op, Raced, Result, Signal, Statement
from ..._sql.table import (
    AFTER,
    CLOCK_US,
    LIVE,
    STATEMENT_US,
    UPDATED,
    Expiry,
    TableStatements,
    choose_expiry,
    formats,
    in_each_call,
    read_changed,
    read_int_or_none,
)
from ...config import Seconds
from ...errors import InvalidKeyError
from .._runtime.sql import as_bytes, as_text, rows_of

PREFIX = "pgkv:cache:"
ENTRY, FUNCTION, TAG, REFRESH, REPORT = (f"{PREFIX}{kind}:" for kind in "eftrs")
REPORT_TTL = 3600.0  # seconds for which a process's counts are kept
REPORTS_MAX = 1_000  # processes
DIGEST_LENGTH = 40  # hexadecimal digits at the end of an entry's key, after a colon
MARK_LENGTH = 17

# A server that changes one generation has them all in its cache; a longer IN list is planned
# no more often than an array, but a text per length is kept for each.
KEYS_NAMED_MAX = 8
TAG_DAYS = 30  # a tagged entry lives no longer; its tags' rows an hour more

# Waiting for a row lock ends after this: an open transaction holds it.
LOCK_TIMEOUT_MS = 150
_LOCK_TIMEOUT = f"set_config('lock_timeout', '{LOCK_TIMEOUT_MS}', true)"
_FLOAT8 = Struct("!d")
_MARK = f"substring(value from 1 for {MARK_LENGTH})"
_AGE = "date_part('epoch', statement_timestamp() - updated_at)"


class Row(NamedTuple):
    """What a look found of an entry: the row's bytes, its version, and the seconds since it was
    written, by the server's clock."""

    value: bytes
    version: int
    age: float


class CacheRead(NamedTuple):
    """One look at an entry (None: there is none) and the generations that it depends on, in the
    order of their keys; 0 stands for one that was never bumped."""

    row: Row | None
    generations: tuple[int, ...]


class ComputeLease(NamedTuple):
    """The answer to a request for the right to compute: the placeholder's version, or None. Of a
    denial also the bytes that stand there (none when the row vanished meanwhile) and the seconds
    until that row expires (None for never). 0 or less means that the row is locked: an open
    transaction is about to change it."""

    version: int | None
    held: bytes = b""
    remaining: float | None = 0.0


class Usage(NamedTuple):
    function: str
    entries: int
    computing: int
    value_bytes: int


class CacheStatements(TableStatements):
    def cache_key(self, kind: str, name: str) -> bytes:
        """One of the cache's own keys; `kind` is ENTRY, FUNCTION, TAG or REFRESH.

        Raises:
            InvalidKeyError: it is longer than the store's ``max_key_length``, or no text for
                PostgreSQL.
        """
        try:
            return self.key(kind + name)
        except InvalidKeyError as error:
            raise InvalidKeyError(f"cached: {name!r}: {error}") from None

    # -- reading

    def read(self, keys: Sequence[bytes]) -> Op[CacheRead]:
        """Read an entry, and the generations (function, tags) it depends on, in one snapshot."""
        count = len(keys) if len(keys) <= KEYS_NAMED_MAX else 0
        try:
            statement = self._made[count]
        except KeyError:
            statement = self.made(count, lambda: self._make_read(count))
        return Op(statement, keys if count else (_codec.encode_array(keys),), ReadDecoder(keys))

    def _make_read(self, count: int) -> Statement[CacheRead]:
        # IN with few keys keeps its plan; `= ANY` of a small array is planned at every call.
        names = ", ".join(f"${n}" for n in range(1, count + 1))
        where = f"key IN ({names})" if count else "key = ANY($1::text[])"
        return self.reading(
            "cache_read",
            f"SELECT key, value, version, {_AGE} FROM {self.t} WHERE {where} AND {LIVE}",
            (TEXT,) * count or (BINARY,),
            in_each_call,
        )

    # -- leases and fills

    def lease(self, key: bytes, mark: bytes, seconds: float, replace: int = 0) -> Op[ComputeLease]:
        """Put a placeholder where no live row stands, or where the row still has the version
        `replace`. A denial writes nothing and waits for no one."""
        params = (key, mark, _codec.encode_ttl(seconds), _codec.encode_int8(replace))
        return Op(self._lease, params)

    @cached_property
    def _lease(self) -> Statement[ComputeLease]:
        # Reads before it writes: ON CONFLICT ... WHERE false would take a row lock and an xid for
        # each denial, and wait behind an open transaction's. `free` skips a row that is locked.
        # The mark is unique to one attempt: matching it makes a repeat find its own grant.
        free = "(expires_at <= statement_timestamp() OR version = $4 OR value = $2)"
        return self.statement(
            "cache_lease",
            f"WITH n AS MATERIALIZED (SELECT {_LOCK_TIMEOUT} AS lock_timeout), "
            f"free AS MATERIALIZED (SELECT key FROM {self.t} WHERE key = $1 AND {free} "
            "FOR UPDATE SKIP LOCKED), "
            f"g AS (INSERT INTO {self.t} AS t "
            "(key, value, expires_at, created_at, updated_at, version) "
            "SELECT $1, $2::bytea, clock_timestamp() + $3::interval, clock_timestamp(), "
            f"clock_timestamp(), {CLOCK_US} FROM n WHERE n.lock_timeout IS NOT NULL "
            f"AND (EXISTS (SELECT 1 FROM free) OR NOT EXISTS (SELECT 1 FROM {self.t} WHERE key = $1)) "
            "ON CONFLICT (key) DO UPDATE SET value = EXCLUDED.value, "
            "expires_at = EXCLUDED.expires_at, created_at = EXCLUDED.created_at, "
            "updated_at = EXCLUDED.updated_at, version = greatest(t.version + 1, EXCLUDED.version) "
            "WHERE t.expires_at <= EXCLUDED.updated_at OR t.version = $4 OR t.value = EXCLUDED.value "
            "RETURNING version) "
            "SELECT version, NULL::bytea, NULL::float8 FROM g UNION ALL "
            # Of the version to be replaced, and still not free: another transaction holds the row.
            "SELECT NULL, value, CASE WHEN version = $4 THEN 0 ELSE "
            "(extract(epoch from expires_at) - extract(epoch from statement_timestamp()))::float8 END "
            f"FROM {self.t} WHERE key = $1 AND NOT EXISTS (SELECT 1 FROM g)",
            (TEXT, BINARY, BINARY, BINARY),
            _read_lease,
            repeats=3,
            # Not repeated: a lock timeout is an answer here (compute, do not store).
            retried=False,
        )

    def extend(self, key: bytes, version: int, mark: bytes, seconds: float) -> Op[bool]:
        """Prolong a placeholder, from now; False when it is no longer there."""
        params = (key, _codec.encode_int8(version), mark, _codec.encode_ttl(seconds))
        return Op(self._extend, params)

    @cached_property
    def _extend(self) -> Statement[bool]:
        return self.statement(
            "cache_extend",
            f"UPDATE {self.t} SET expires_at = statement_timestamp() + $4::interval "
            f"WHERE key = $1 AND version = $2 AND value = $3 AND {_LOCK_TIMEOUT} IS NOT NULL",
            (TEXT, BINARY, BINARY, BINARY),
            read_changed,
            retry_safe=True,
            retried=False,
        )

    def claim(self, key: bytes, version: int) -> Op[int | None]:
        """Give a live row a new version and leave the rest of it: fills that began before are
        refused, and its value stays readable. None when it has another version by now."""
        return Op(self._claim, (key, _codec.encode_int8(version)))

    @cached_property
    def _claim(self) -> Statement[int | None]:
        return self.statement(
            "cache_claim",
            f"UPDATE {self.t} SET version = greatest(version + 1, {STATEMENT_US}) "
            f"WHERE key = $1 AND version = $2 AND {LIVE} AND {_LOCK_TIMEOUT} IS NOT NULL "
            "RETURNING version",
            (TEXT, BINARY),
            read_int_or_none,
            retried=False,
        )

    def fill(
        self, key: bytes, version: int, mark: bytes, value: bytes, ttl: Seconds | None
    ) -> Op[int | None]:
        """Replace the state (version, mark) of a row by an entry; None when it is in another.

        Never an INSERT: whatever removed or changed the row meanwhile has the last word.
        """
        expiry, life = choose_expiry(ttl, None, keep_ttl=False)
        params = (key, _codec.encode_int8(version), mark, self.value(value), *life)
        return Op(self.shaped(self._make_fill, expiry), params)

    def _make_fill(self, expiry: Expiry) -> Statement[int | None]:
        return self.statement(
            "cache_fill",
            f"UPDATE {self.t} SET value = $4, expires_at = {expiry.updated.format(n=5)}, {UPDATED} "
            f"WHERE key = $1 AND version = $2 AND {_MARK} = $3 AND {_LOCK_TIMEOUT} IS NOT NULL "
            "RETURNING version",
            (TEXT, BINARY, BINARY, BINARY, *formats(0, expiry)),
            read_int_or_none,
            retried=False,
        )

    def give_up(self, key: bytes, version: int, mark: bytes) -> Op[bool]:
        """Remove a placeholder, so that a waiting caller may compute."""
        return Op(self._give_up, (key, _codec.encode_int8(version), mark))

    @cached_property
    def _give_up(self) -> Statement[bool]:
        return self.statement(
            "cache_give_up",
            f"DELETE FROM {self.t} WHERE key = $1 AND version = $2 AND value = $3 "
            f"AND {_LOCK_TIMEOUT} IS NOT NULL",
            (TEXT, BINARY, BINARY),
            read_changed,
            retry_safe=True,
            retried=False,
        )

    # -- invalidation

    def invalidate(self, key: bytes) -> Op[bool]:
        """Put a tombstone in an entry's place, also where none is: an upsert, so that inside a
        transaction it holds the lock that fills wait for. It is written expired and may be
        collected at once: it matters only while it is uncommitted."""
        return Op(self.shaped(self._make_bump, "cache_invalidate", "to_timestamp(0)"), (key,))

    def bump_tag(self, key: bytes) -> Op[bool]:
        """Begin a new generation of a tag: entries that carry the old one are misses from now."""
        # An hour longer than any entry with the tag: a row that dies earlier revives old values.
        until = f"clock_timestamp() + interval '{TAG_DAYS * 24 + 1} hours'"
        return Op(self.shaped(self._make_bump, "cache_bump_tag", until), (key,))

    def bump_function(self, key: bytes) -> Op[bool]:
        """Begin a new generation of a function: all of its entries are misses from now."""
        return Op(self.shaped(self._make_bump, "cache_bump_function", "NULL"), (key,))

    def _make_bump(self, name: str, expires_at: str) -> Statement[bool]:
        return self.statement(
            name,
            f"INSERT INTO {self.t} AS t (key, value, expires_at, created_at, updated_at, version) "
            f"VALUES ($1, '', {expires_at}, clock_timestamp(), clock_timestamp(), {CLOCK_US}) "
            "ON CONFLICT (key) DO UPDATE SET value = EXCLUDED.value, "
            "expires_at = EXCLUDED.expires_at, updated_at = EXCLUDED.updated_at, "
            "version = greatest(t.version + 1, EXCLUDED.version)",
            (TEXT,),
            read_changed,
            retry_safe=True,
            # A look is in the slot of its entry: generations are in every one.
            join=None if name == "cache_invalidate" else any,
        )

    def notify(self, channel: str, payload: bytes) -> Op[None]:
        """Tell the listeners of a channel; inside a transaction, when it commits."""
        return Op(_NOTIFY, (channel.encode(), payload))

    # -- upkeep

    def usage(self) -> Op[list[Usage]]:
        """What each function keeps. Reads every entry: linear."""
        start = self.key(ENTRY)
        return Op(self._usage, (start, _codec.successor(start)))

    @cached_property
    def _usage(self) -> Statement[list[Usage]]:
        name = f"substr(key, {len(self.prefix) + len(ENTRY) + 1})"
        return self.reading(
            "cache_usage",
            f"SELECT left({name}, {-DIGEST_LENGTH - 1}), "
            "count(*) FILTER (WHERE substring(value from 1 for 1) <> '~'), "
            "count(*) FILTER (WHERE substring(value from 1 for 1) = '~'), "
            "coalesce(sum(length(value)), 0)::bigint "
            f'FROM {self.t} WHERE key COLLATE "C" >= $1 AND key COLLATE "C" < $2 AND {LIVE} '
            "GROUP BY 1 ORDER BY 1",
            (TEXT, TEXT),
            rows_of(Usage, as_text, *(_codec.decode_int,) * 3),
        )

    def report(self, process: str, counts: bytes) -> Op[bool]:
        """Keep what a process has counted."""
        statement = self.statement(
            "cache_report", self.upsert(AFTER), formats(2, AFTER), read_changed, retried=False
        )
        return Op(statement, (self.key(REPORT + process), counts, _codec.encode_ttl(REPORT_TTL)))

    def reports(self) -> Op[list[bytes]]:
        """What processes have counted in the last hour."""
        start = self.key(REPORT)
        sql = (
            f'SELECT value FROM {self.t} WHERE key COLLATE "C" >= $1 AND key COLLATE "C" < $2 '
            f"AND {LIVE} LIMIT {REPORTS_MAX}"
        )
        statement = self.reading(
            "cache_reports",
            sql,
            (TEXT, TEXT),
            rows_of(bytes, as_bytes),
        )
        return Op(statement, (start, _codec.successor(start)))


_NOTIFY: Statement[None] = Statement(
    "cache_notify",
    "SELECT pg_notify($1, $2)",
    (TEXT, TEXT),
    lambda _result: None,
    writes=False,
    join=any,  # on every server of a sharded store
)


# -- reading results -----------------------------------------------------------------------


class ReadDecoder:
    """Sorts a look's rows: the first key is the entry's."""

    __slots__ = ("keys",)

    def __init__(self, keys: Sequence[bytes]) -> None:
        self.keys: Sequence[bytes] = keys

    def __call__(self, result: Result) -> CacheRead:
        keys = self.keys
        column = result.get_value
        count = result.ntuples
        row = None
        if count == 1 and column(0, 0) == keys[0]:  # what a hit usually is: no generation yet
            return CacheRead(_row(result, 0), (0,) * (len(keys) - 1))
        found: dict[bytes | None, int] = {}
        for n in range(count):
            key = column(n, 0)
            if key == keys[0]:
                row = _row(result, n)
            else:
                found[key] = _codec.decode_int(column(n, 2))
        return CacheRead(row, tuple(found.get(key, 0) for key in keys[1:]))


def _row(result: Result, n: int) -> Row:
    column = result.get_value
    (age,) = _FLOAT8.unpack(column(n, 3) or b"")
    version = int.from_bytes(column(n, 2) or b"", "big")
    # Negative after the server's clock was stepped back.
    return Row(column(n, 1) or b"", version, max(0.0, age))


_RACED = Raced(ComputeLease(None))


def _read_lease(result: Result) -> ComputeLease | Signal:
    if not result.ntuples:
        return _RACED  # another caller's insert, which this statement's snapshot does not show
    version = result.get_value(0, 0)
    if version is not None:
        return ComputeLease(_codec.decode_int(version))
    remaining = result.get_value(0, 2)
    seconds = None if remaining is None else _codec.decode_float8(remaining)
    return ComputeLease(None, result.get_value(0, 1) or b"", seconds)
