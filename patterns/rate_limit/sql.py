"""Statements of the rate limiter: the token bucket as one counter per key and rate.

The counter is the bucket's theoretical arrival time (TAT; GCRA, ITU-T I.371), in nanoseconds since
1970: the moment at which the bucket will be full again. A hit is admitted if it moves that moment
no further than `cap` ahead of now, and then moves it by `inc`. A row holds one TAT per rate,
separated by spaces, as decimal text. A missing TAT, or one that has passed, is a full bucket, so
collecting a row after its last TAT is always safe. The row expires `KEPT_SECONDS` later: most clients
come when their bucket is full again, and then update a row instead of inserting what a sweep took.

A calendar window is counted by the same arithmetic: its beginning takes the place of now, a token is
one nanosecond, and its counter is full again at the window's end. The shape of a row says which
counters are windows.

The server's clock decides. `policy` works out what the numbers mean to a caller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import zip_longest
from typing import NamedTuple, TypeAlias
from urllib.parse import unquote

from ..._ops import codec as _codec
from ..._ops.op import BINARY, TEXT, Op, Raced, Result, Signal, Statement
from ..._sql.table import STATEMENT_US, TableStatements, in_each_call, micros, read_changed
from .._runtime.sql import as_bytes, as_text, rows_of
from .rate import WINDOWS

ROWS = "pgkv:rate:"
KEY_CHARACTERS_MAX = 256  # a longer key is hashed: a client may choose it
RACES_MAX = 3  # repeats of a statement that lost a race; after the last a hit counts as denied
INT4_OID = 23
# How many buckets a row has; or, where there are windows among its counters, for each "" (a bucket)
# or unit and time zone.
Shape: TypeAlias = int | tuple[str, ...]
EPOCH_2000_US = 946_684_800_000_000  # a timestamptz on the wire counts from 2000
KEPT_SECONDS = 10  # for which the row of a full bucket stays
LAST_US = KEPT_SECONDS * 1_000_000 + 1  # rounded up
# When every bucket of a row is full. A program of version 0.1 lets it expire at that moment.
FULL_AT = (
    f"greatest(expires_at - interval '{LAST_US} microseconds', (SELECT to_timestamp(max(tat::float8) / 1e9) "
    "FROM string_to_table(encode(value, 'escape'), ' ') tat WHERE tat ~ '^[0-9]{1,19}$'))"
)
NOT_FULL = f"(expires_at IS NULL OR {FULL_AT} > statement_timestamp())"
STEP_BACK_US = 1_000_000  # a row this far ahead of the clock was written before a step back

LENGTHS = {unit: "3 months" if unit == "quarter" else f"1 {unit}" for unit in WINDOWS}

FOREIGN = {
    "22023": "the server's time zone data has no such zone: give the quota another timezone",
    "22P02": "the key holds no arrival times: another program wrote to the limiter's key; reset() it",
    "22003": "the key holds no arrival times: another program wrote to the limiter's key; reset() it",
}


class Arrival:
    """The server's answer to a hit.

    Attributes:
        charged: whether the hit was admitted.
        now: the server's clock, which decided, in nanoseconds since 1970.
        tats: the arrival times, one per rate, never before `now`.
        stamp: the row's ``created_at`` if charged, else its ``updated_at``, as it came.
        version: the row's, if the hit was denied.
    """

    __slots__ = ("charged", "now", "stamp", "tats", "version")

    def __init__(
        self,
        charged: bool,
        now: int,
        tats: Sequence[int],
        stamp: bytes | None = None,
        version: bytes | None = None,
    ) -> None:
        self.charged: bool = charged
        self.now: int = now
        self.tats: Sequence[int] = tats
        self.stamp: bytes | None = stamp
        self.version: bytes | None = version

    @property
    def made(self) -> Sequence[int]:
        """The counters as the row has them."""
        return self.tats

    @property
    def ends(self) -> Sequence[int]:
        """When each counter's window ends; 0 for a bucket."""
        return (0,) * len(self.tats)

    def stepped_back(self) -> bool:
        """Whether this denial is due to the server's clock having been set back."""
        if self.charged or self.stamp is None:
            return False
        written = _codec.decode_int(self.stamp) + EPOCH_2000_US
        return written - self.now // 1000 > STEP_BACK_US


class WindowArrival(Arrival):
    """An answer about a row with windows: their `tats` are as far after `now` as tokens are used.

    Args:
        charged: as of `Arrival`, as `now`, `stamp` and `version` are.
        value: the row's, or None.
        bounds: what `_told` tells.
    """

    __slots__ = ("ends", "made")

    made: Sequence[int]
    ends: Sequence[int]

    def __init__(
        self,
        charged: bool,
        now: int,
        value: bytes | None,
        bounds: bytes | None,
        stamp: bytes | None = None,
        version: bytes | None = None,
    ) -> None:
        told = [int(us) * 1000 for us in (bounds or b"").split()]
        origins, self.ends = told[::2], told[1::2]
        found = [int(each) for each in (value or b"").split()]
        # A counter that the row does not have is full, as one that lies before its origin.
        self.made = [max(pair) for pair in zip_longest(origins, found[: len(origins)], fillvalue=0)]
        tats = [now + each - origin for each, origin in zip(self.made, origins, strict=True)]
        super().__init__(charged, now, tats, stamp, version)


class Charge:
    """What a hit adds to each arrival time, and how far ahead of now each may then be (further for a
    place in the queue), in nanoseconds.

    Made once and used for many hits: it carries its encoded parameters, and reads the answer."""

    __slots__ = ("caps", "incs", "params", "read", "shape", "short")

    def __init__(
        self, incs: Sequence[int], caps: Sequence[int], shape: Shape | None = None
    ) -> None:
        shape = shape or len(incs)
        self.shape: Shape = shape
        self.short: object = -shape if isinstance(shape, int) else ("charge", shape)
        self.incs: Sequence[int] = incs
        self.caps: Sequence[int] = caps
        pairs = zip(incs, caps, strict=True)
        self.params: tuple[bytes, ...] = tuple(
            _codec.encode_int8(n) for pair in pairs for n in pair
        )
        self.read: Callable[[Result], Arrival | Signal] = HitReader(incs, caps, shape)


@dataclass(frozen=True, slots=True)
class BucketUsage:
    """What one limiter keeps in the table: buckets that are not full."""

    limiter: str
    buckets: int
    idle: float  # seconds since the last was charged
    full_in: float  # seconds until the last is full
    row: bytes  # the encoded key of one of them


class LimiterStatements(TableStatements):
    """Hits, and the statements that undo them, on rows of any number of rates."""

    # -- one key
    #
    # `charge` and `refusal` are what mostly answers a hit, for half as much as `hit`. Each says
    # nothing (None) where it does not apply. None of the three may be repeated.

    def charge(self, row: bytes, charge: Charge) -> Op[Arrival | None]:
        """Charge a row that exists, if no arrival time is then more than its cap ahead of now."""
        try:
            statement = self._made[charge.short]
        except KeyError:
            statement = self.made(charge.short, lambda: self._make_charge(charge.shape))
        return Op(statement, (row, *charge.params))

    def _make_charge(self, shape: Shape) -> Statement[Arrival | None]:
        windows = _windows_of(shape)
        terms = _terms(windows, "t", "statement_timestamp()", STATEMENT_US)
        until = _expiry(terms.moved, windows, "statement_timestamp()")
        # The clock is read from updated_at: Citus takes no function that changes in RETURNING.
        told = _told(shape, "t.updated_at", _in_us("t.updated_at"))
        return self.statement(
            "limit_hit",
            f"UPDATE {self.t} AS t SET value = {_joined(terms.moved)}, "
            f"expires_at = {until}, updated_at = statement_timestamp(), "
            f"version = greatest(t.version + 1, {STATEMENT_US}) WHERE key = $1 AND {terms.admitted} "
            f"RETURNING value, updated_at, created_at{told}",
            (TEXT, *(BINARY,) * (2 * len(windows))),
            lambda result: _read_charged(result, shape),
            refused=FOREIGN,
        )

    def refusal(self, row: bytes, charge: Charge) -> Op[Arrival | None]:
        """See that `charge` would be refused. It reads a snapshot, and takes no transaction id."""
        shape = charge.shape
        statement = self.made(("refusal", shape), lambda: self._make_refusal(shape))
        return Op(statement, (row, *charge.params))

    def _make_refusal(self, shape: Shape) -> Statement[Arrival | None]:
        windows = _windows_of(shape)
        admitted = _terms(windows, "t", "statement_timestamp()", STATEMENT_US).admitted
        told = _told(shape, "statement_timestamp()", STATEMENT_US)
        return self.statement(
            "limit_hit",
            f"SELECT FALSE, t.value, {STATEMENT_US}, t.updated_at, t.version{told} FROM {self.t} t "
            f"WHERE key = $1 AND NOT ({admitted})",
            (TEXT, *(BINARY,) * (2 * len(windows))),
            lambda result: _read_arrival(result, 0, shape) if result.ntuples else None,
            refused=FOREIGN,
            writes=False,
        )

    def hit(self, row: bytes, charge: Charge) -> Op[Arrival]:
        """Charge the row, if no arrival time is then more than its cap ahead of now."""
        try:
            statement = self._made[charge.shape]
        except KeyError:
            statement = self.made(charge.shape, lambda: self._make_hit(charge.shape))
        return Op(statement, (row, *charge.params), charge.read)

    def _make_hit(self, shape: Shape) -> Statement[Arrival]:
        windows = _windows_of(shape)
        snapshot = _terms(windows, "cur", "ts", "us")
        locked = _terms(windows, "t", "EXCLUDED.updated_at", "EXCLUDED.version")
        # A denial that the snapshot shows is answered from it: no row lock, no xid, no WAL.
        # ON CONFLICT ... WHERE alone would take a lock and an xid for each denial.
        first, moved = snapshot.first, locked.moved
        told = _told(shape, "ts", "us")
        return self.statement(
            "limit_hit",
            f"WITH u AS MATERIALIZED ({_CLOCK}), cur AS MATERIALIZED ("
            f"SELECT value, updated_at, version FROM {self.t} WHERE key = $1), h AS ("
            f"INSERT INTO {self.t} AS t (key, value, expires_at, created_at, updated_at, version) "
            f"SELECT $1::text, {_joined(first)}, {_expiry(first, windows, 'ts')}, ts, ts, us FROM u "
            f"WHERE NOT EXISTS (SELECT 1 FROM cur WHERE NOT ({snapshot.admitted})) "
            f"ON CONFLICT (key) DO UPDATE SET value = {_joined(moved)}, "
            f"expires_at = {_expiry(moved, windows, 'EXCLUDED.updated_at')}, "
            "updated_at = EXCLUDED.updated_at, "
            f"version = greatest(t.version + 1, EXCLUDED.version) WHERE {locked.admitted} "
            "RETURNING value, created_at) "
            f"SELECT TRUE, h.value, us, h.created_at, NULL::bigint{told} FROM h, u UNION ALL "
            f"SELECT FALSE, cur.value, us, cur.updated_at, cur.version{told} "
            "FROM u LEFT JOIN cur ON TRUE "
            "WHERE NOT EXISTS (SELECT 1 FROM h)",
            (TEXT, *(BINARY,) * (2 * len(windows))),
            in_each_call,
            refused=FOREIGN,
            repeats=RACES_MAX,
        )

    def peek(self, row: bytes, shape: Shape) -> Op[Arrival]:
        """Read the arrival times; charge nothing."""
        told = _told(shape, "u.ts", "u.us")
        statement = self.shaped(self._make_peek, told)
        return Op(statement, (row,), lambda result: _read_arrival(result, 0, shape))

    def _make_peek(self, told: str) -> Statement[Arrival]:
        return self.reading(
            "limit_peek",
            f"SELECT FALSE, t.value, u.us, t.updated_at, t.version{told} "
            f"FROM (SELECT statement_timestamp() AS ts, {STATEMENT_US} AS us) u LEFT JOIN {self.t} t ON t.key = $1",
            (TEXT,),
            in_each_call,
        )

    def reset(self, row: bytes) -> Op[bool]:
        """Forget the row: a full bucket."""
        return Op(self.shaped(self._make_reset), (row,))

    def _make_reset(self) -> Statement[bool]:
        return self.statement(
            "limit_reset",
            self._seen(f"DELETE FROM {self.t} WHERE key = $1 AND {NOT_FULL}"),
            (TEXT,),
            _read_changed_or_raced,
            retry_safe=True,
            repeats=RACES_MAX,
        )

    def usage(self, key: str | None) -> Op[list[BucketUsage]]:
        """What each limiter keeps, or keeps for one key. Reads every bucket: linear."""
        start = self.key(ROWS)
        part = b""
        if key is not None:
            text = f":{key}" if len(key) <= KEY_CHARACTERS_MAX else hashed(key)
            part = _codec.encode_key(text, b"", self.key_length_max)
        params = (start, _codec.successor(start), part)
        return Op(self.shaped(self._make_usage), params)

    def _make_usage(self) -> Statement[list[BucketUsage]]:
        # A limiter's name has no ":", "#" or "~": they are escaped. Limiters of several rates have
        # "~" and a digest of these behind the name.
        rest = f"substr(key, {len(self.prefix) + len(ROWS) + 1})"
        return self.reading(
            "limit_usage",
            "SELECT name, count(*), "
            "extract(epoch from statement_timestamp() - max(updated_at))::float8, "
            "coalesce(extract(epoch from max(full_at) - statement_timestamp())::float8, 0), min(key) "
            f"FROM (SELECT regexp_replace({rest}, '[:#~].*', '') AS name, "
            f"regexp_replace({rest}, '^[^:#]*', '') AS part, key, updated_at, {FULL_AT} AS full_at "
            f'FROM {self.t} WHERE key COLLATE "C" >= $1 AND key COLLATE "C" < $2 AND {NOT_FULL}) b '
            "WHERE $3 IN ('', part) "
            "GROUP BY name, CASE WHEN $3 = '' THEN '' ELSE key END ORDER BY 1, 5",
            (TEXT, TEXT, TEXT),
            _read_usage,
        )

    def _seen(self, change: str) -> str:
        """A change of one row that also says whether the row existed. A change that waits for a row
        finds none when another transaction replaces it, and has to be repeated."""
        return (
            f"WITH seen AS MATERIALIZED (SELECT 1 FROM {self.t} WHERE key = $1 AND {NOT_FULL}), "
            f"changed AS ({change} RETURNING 1) "
            "SELECT EXISTS (SELECT 1 FROM changed), EXISTS (SELECT 1 FROM seen)"
        )

    def refund(self, row: bytes, amounts: Sequence[int], shape: Shape | None = None) -> Op[bool]:
        """Take nanoseconds off the arrival times. A full bucket stays full."""
        shape = shape or len(amounts)
        params = (row, *map(_codec.encode_int8, amounts))
        return Op(self.shaped(self._make_refund, shape), params)

    def _make_refund(self, shape: Shape) -> Statement[bool]:
        windows = _windows_of(shape)
        rates = len(windows)
        lowered = [f"({_field('t', n, rates)} - ${n + 1}::bigint)" for n in range(1, rates + 1)]
        return self.statement(
            "limit_refund",
            self._seen(self._moved(lowered, f" AND {NOT_FULL}", windows)),
            (TEXT, *(BINARY,) * rates),
            _read_changed_or_raced,
            refused=FOREIGN,
            repeats=RACES_MAX,
        )

    def cancel(
        self,
        row: bytes,
        created_at: bytes,
        incs: Sequence[int],
        tats: Sequence[int],
        shape: Shape | None = None,
    ) -> Op[bool]:
        """Give a reservation back, except the part that later reservations rely on.

        `created_at` is that of the row that was charged, since a row made after a reset does not
        contain it; `tats` are the arrival times that the charge made."""
        shape = shape or len(incs)
        pairs = [_codec.encode_int8(n) for pair in zip(incs, tats, strict=True) for n in pair]
        return Op(self.shaped(self._make_cancel, shape), (row, created_at, *pairs))

    def _make_cancel(self, shape: Shape) -> Statement[bool]:
        windows = _windows_of(shape)
        rates = len(windows)

        def back(n: int) -> str:
            tat, inc, mine = _field("t", n, rates), f"${2 * n + 1}::bigint", f"${2 * n + 2}::bigint"
            if window := windows[n - 1]:  # no place in a queue: all of it, while the window lasts
                origin = _origin(window, "statement_timestamp()", "")
                return f"CASE WHEN {mine} > {origin} THEN {inc} ELSE 0 END"
            # Moving later callers up would put two of them into one slot; and tokens that have
            # flowed back since cannot be given back again.
            return f"least({inc} - greatest(0, {tat} - {mine}), {mine} - {STATEMENT_US} * 1000)"

        numbers = range(1, rates + 1)
        lowered = [f"({_field('t', n, rates)} - greatest(0, {back(n)}))" for n in numbers]
        where = (
            " AND created_at = $2::timestamptz "
            f"AND greatest({', '.join(back(n) for n in numbers)}) > 0 AND {NOT_FULL}"
        )
        formats = (TEXT, BINARY, *(BINARY,) * (2 * rates))
        return self.statement(
            "limit_cancel",
            self._moved(lowered, where, windows),
            formats,
            read_changed,
            refused=FOREIGN,
        )

    def rebase(self, row: bytes, version: bytes, shape: Shape) -> Op[bool]:
        """After the clock was set back: let the debt of that version of the row count from now."""
        return Op(self.shaped(self._make_rebase, shape), (row, version))

    def _make_rebase(self, shape: Shape) -> Statement[bool]:
        windows = _windows_of(shape)
        since = "updated_at - timestamptz '1970-01-01 00:00+00'"  # the epoch of a moment costs more
        written = f"(extract(epoch from {since}) * 1000000)::bigint"
        moved = [
            f"({_origin(window, 'statement_timestamp()', STATEMENT_US)} + greatest(0, "
            f"{_field('t', n, len(windows))} - {_origin(window, 'updated_at', written)}))"
            for n, window in enumerate(windows, 1)
        ]
        # Another row from here on: what was reserved before is not given back, since nothing tells how
        # much of it later callers rely on.
        now = "updated_at = statement_timestamp(), created_at = statement_timestamp()"
        sql = self._moved(moved, " AND version = $2::bigint", windows, now)
        return self.statement("limit_rebase", sql, (TEXT, BINARY), read_changed, refused=FOREIGN)

    def _moved(
        self,
        tats: list[str],
        where: str,
        windows: Sequence[str],
        # Before a step back of the clock: what lowers a debt must not hide the step from later hits.
        stamps: str = "updated_at = greatest(updated_at, statement_timestamp())",
    ) -> str:
        """Move the arrival times of one version of a row; nothing changes if another row replaced
        it."""
        return (
            f"UPDATE {self.t} AS t SET value = {_joined(tats)}, "
            f"expires_at = {_expiry(tats, windows, 'statement_timestamp()')}, "
            f"{stamps}, version = greatest(version + 1, {STATEMENT_US}) WHERE key = $1{where}"
        )

    # -- several keys

    def hit_many(self, charges: Sequence[tuple[bytes, Charge]]) -> Op[dict[bytes, Arrival]]:
        """Charge all rows or none; each row once, in key order."""
        places = [
            (index, place, inc, cap)
            for index, (_, charge) in enumerate(charges, 1)
            for place, (inc, cap) in enumerate(zip(charge.incs, charge.caps, strict=True), 1)
        ]
        int4 = _codec.encode_int4
        windows = [window for _, charge in charges for window in _windows_of(charge.shape)]
        fixed: tuple[bytes, ...] = ()
        if any(windows):
            parts = [window.partition(" ")[::2] for window in windows]
            fixed = tuple(
                _codec.encode_array([each.encode() for each in p]) for p in zip(*parts, strict=True)
            )
        return Op(
            self.shaped(self._make_hit_many, bool(fixed)),
            (
                _codec.encode_array([row for row, _ in charges]),
                _codec.encode_array([int4(place[0]) for place in places], INT4_OID),
                _codec.encode_array([int4(place[1]) for place in places], INT4_OID),
                _codec.encode_int8s(place[2] for place in places),
                _codec.encode_int8s(place[3] for place in places),
                *fixed,
            ),
            ManyReader({row: charge.shape for row, charge in charges}),
        )

    def _make_hit_many(self, fixed: bool) -> Statement[dict[bytes, Arrival]]:
        """With `fixed` some counters are windows; their units and time zones are parameters."""
        origin, until, told, columns, arrays, names = "us * 1000", "tat", "", "", "", ""
        if fixed:
            origin, until = "origin", "CASE ends WHEN 0 THEN tat ELSE ends END"
            arrays, names = ", $6::text[], $7::text[]", ", unit, zone"
            columns = (
                f", CASE r.unit {_case('us', 0)} END * 1000 AS origin, "
                f"CASE r.unit {_case('0', 1)} END * 1000 AS ends"
            )
            told = (
                ", (SELECT string_agg(origin / 1000 || ' ' || ends / 1000, ' ' ORDER BY place) "
                "FROM p WHERE p.key = k.key)"
            )

        def tat(row: str) -> str:
            field = f"split_part(encode({row}.value, 'escape'), ' ', p.place)"
            return f"greatest(nullif({field}, '')::bigint, {origin})"

        # Read first, so that a denial that the snapshot shows locks nothing; then lock in key
        # order and decide again on the locked rows.
        # `ins` has no ON CONFLICT on purpose: a row that was inserted meanwhile is error 23505,
        # which undoes the whole statement, and the flow repeats it.
        return self.statement(
            "limit_hit_many",
            f"WITH u AS MATERIALIZED ({_CLOCK}), p AS MATERIALIZED ("
            f"SELECT k.key, r.place, r.inc, r.cap{columns} "
            "FROM u CROSS JOIN unnest($1::text[]) WITH ORDINALITY k(key, i) JOIN unnest("
            f"$2::int[], $3::int[], $4::bigint[], $5::bigint[]{arrays}) r(i, place, inc, cap{names}) "
            "ON r.i = k.i), pre AS MATERIALIZED ("
            f"SELECT key, value, updated_at, version FROM {self.t} WHERE key = ANY($1::text[])), "
            "ok0 AS MATERIALIZED (SELECT coalesce(bool_and("
            f"{tat('pre')} + p.inc - {origin} <= p.cap), TRUE) AS ok "
            "FROM u CROSS JOIN p LEFT JOIN pre USING (key)), cur AS MATERIALIZED ("
            f"SELECT key, value, updated_at, version FROM {self.t} WHERE key = ANY($1::text[]) "
            'AND (SELECT ok FROM ok0) ORDER BY key COLLATE "C" FOR UPDATE), '
            f"s AS MATERIALIZED (SELECT p.key, p.place, {tat('cur')} + p.inc AS tat, p.cap, "
            f"{'p.origin, p.ends, ' * fixed}cur.key IS NULL AS absent FROM u CROSS JOIN p LEFT JOIN cur USING (key)), "
            "ok AS MATERIALIZED (SELECT (SELECT ok FROM ok0) "
            f"AND bool_and(s.tat - {origin} <= s.cap) AS ok FROM s, u), "
            "x AS MATERIALIZED (SELECT key, absent, "
            "string_agg(tat::text, ' ' ORDER BY place)::bytea AS value, "
            f"max({until}) AS top FROM s "
            "WHERE (SELECT ok FROM ok) GROUP BY key, absent), "
            f"up AS (UPDATE {self.t} t SET value = x.value, "
            f"expires_at = to_timestamp((top / 1000 + {LAST_US}) / 1e6::float8), updated_at = ts, "
            "version = greatest(t.version + 1, us) FROM x, u WHERE t.key = x.key AND NOT absent "
            f"RETURNING 1), ins AS (INSERT INTO {self.t} "
            "(key, value, expires_at, created_at, updated_at, version) "
            f"SELECT key, x.value, to_timestamp((top / 1000 + {LAST_US}) / 1e6::float8), ts, ts, us FROM x, u "
            'WHERE absent ORDER BY key COLLATE "C" RETURNING 1) '
            f"SELECT (SELECT ok FROM ok), z.value, us, z.updated_at, z.version, k.key{told} "
            "FROM u CROSS JOIN unnest($1::text[]) k(key) LEFT JOIN ("
            "SELECT key, value, NULL::timestamptz AS updated_at, NULL::bigint AS version FROM x "
            "UNION ALL SELECT key, value, updated_at, version FROM cur WHERE NOT (SELECT ok FROM ok) "
            "UNION ALL SELECT key, value, updated_at, version FROM pre "
            "WHERE NOT (SELECT ok FROM ok0)) z USING (key)",
            (BINARY,) * (7 if fixed else 5),
            in_each_call,
            savepoint=True,
            refused=FOREIGN,
        )


# -- clauses -------------------------------------------------------------------------------

_CLOCK = f"SELECT ts, {micros('ts')} AS us FROM (SELECT clock_timestamp() AS ts) c"


def _field(row: str, n: int, rates: int) -> str:
    """The n-th arrival time of a row. With one rate the value is a number and nothing else."""
    text = f"encode({row}.value, 'escape')"
    return f"{text}::bigint" if rates == 1 else f"nullif(split_part({text}, ' ', {n}), '')::bigint"


class Terms(NamedTuple):
    """What a hit does to each counter of a row, and when."""

    first: list[str]  # their values where there is no row
    moved: list[str]
    admitted: str


def _terms(windows: Sequence[str], row: str, ts: str, us: str) -> Terms:
    origins = [_origin(window, ts, us) for window in windows]
    moved, within = [], []
    for n, origin in enumerate(origins, 1):
        tat = f"greatest({_field(row, n, len(origins))}, {origin}) + ${2 * n}::bigint"
        moved.append(f"({tat})")
        within.append(f"{tat} - {origin} <= ${2 * n + 1}::bigint")
    return Terms(
        [f"({origin} + ${2 * n}::bigint)" for n, origin in enumerate(origins, 1)],
        moved,
        " AND ".join(within),
    )


def _windows_of(shape: Shape) -> tuple[str, ...]:
    return ("",) * shape if isinstance(shape, int) else shape


# All of it immutable, as what is moved on a conflict has to be for Citus.


def _in_us(moment: str) -> str:
    return f"(extract(epoch from ({moment}) AT TIME ZONE 'UTC') * 1000000)::bigint"


def _bounds(unit: str, ts: str, zone: str, length: str) -> tuple[str, str]:
    """Beginning and end of the window around a moment. A day and more is counted on the zone's own
    calendar: a day may have 23 hours, and an hour may come twice."""
    local = f"({ts} AT TIME ZONE {zone})"
    begins = f"date_trunc({unit}, {local})"
    if unit in ("'minute'", "'hour'"):
        begins = f"({ts} AT TIME ZONE 'UTC') - ({local} - {begins})"
        zone = "'UTC'"
    return f"({begins}) AT TIME ZONE {zone}", f"({begins} + {length}) AT TIME ZONE {zone}"


def _window_bounds(window: str, ts: str) -> tuple[str, str]:
    unit, zone = window.split(" ")
    return _bounds(f"'{unit}'", ts, f"'{zone}'", f"interval '{LENGTHS[unit]}'")


def _case(bucket: str, bound: int) -> str:
    """A bound of each kind of window, in microseconds, for a row that has unit and zone."""
    found = {
        unit: _bounds(f"'{unit}'", "ts", "r.zone", f"interval '{length}'")[bound]
        for unit, length in LENGTHS.items()
    }
    kinds = [f"WHEN '{unit}' THEN {_in_us(moment)}" for unit, moment in found.items()]
    return f"WHEN '' THEN {bucket} {' '.join(kinds)}"


def _origin(window: str, ts: str, us: str) -> str:
    """What a counter counts from, in nanoseconds: now, or the beginning of its window."""
    return f"{_in_us(_window_bounds(window, ts)[0])} * 1000" if window else f"{us} * 1000"


def _told(shape: Shape, ts: str, us: str) -> str:
    """The column that tells beginning and end of each counter's window, in microseconds."""
    if isinstance(shape, int):
        return ""
    bounds = [map(_in_us, _window_bounds(window, ts)) if window else (us, "0") for window in shape]
    return f", concat_ws(' ', {', '.join(', '.join(each) for each in bounds)})"


def _joined(tats: Sequence[str]) -> str:
    return "(" + " || ' ' || ".join(f"{tat}::text" for tat in tats) + ")::bytea"


def _expiry(tats: Sequence[str], windows: Sequence[str] = (), ts: str = "") -> str:
    """When a row expires: some time after every bucket of it is full and every window over."""
    ends = [f"{tat} / 1000" for n, tat in enumerate(tats) if not any(windows[n : n + 1])]
    ends += [_in_us(_window_bounds(window, ts)[1]) for window in windows if window]
    last = ends[0] if len(ends) == 1 else f"greatest({', '.join(ends)})"
    return f"to_timestamp(({last} + {LAST_US}) / 1e6::float8)"


# -- reading results -----------------------------------------------------------------------


def _read_charged(result: Result, shape: Shape) -> Arrival | None:
    if not result.ntuples:
        return None
    column = result.get_value
    now = (int.from_bytes(column(0, 1) or b"", "big") + EPOCH_2000_US) * 1000
    value, stamp = column(0, 0) or b"", column(0, 2)
    if isinstance(shape, int):
        return Arrival(True, now, tuple(map(int, value.split())), stamp)
    return WindowArrival(True, now, value, column(0, 3), stamp)


class HitReader:
    """Reads a hit's answer. A denial with data that would admit lost a race: nothing happened."""

    __slots__ = ("caps", "incs", "shape")

    def __init__(self, incs: Sequence[int], caps: Sequence[int], shape: Shape) -> None:
        self.incs: Sequence[int] = incs
        self.caps: Sequence[int] = caps
        self.shape: Shape = shape

    def __call__(self, result: Result) -> Arrival | Signal:
        arrival = _read_arrival(result, 0, self.shape)
        if arrival.charged:
            return arrival
        now = arrival.now
        for tat, inc, cap in zip(arrival.tats, self.incs, self.caps, strict=True):
            if tat + inc - now > cap:
                return arrival
        return Raced(arrival)


class ManyReader:
    """Reads the arrival times of several rows, by row."""

    __slots__ = ("shapes",)

    def __init__(self, shapes: dict[bytes, Shape]) -> None:
        self.shapes: dict[bytes, Shape] = shapes

    def __call__(self, result: Result) -> dict[bytes, Arrival]:
        arrivals = {}
        for n in range(result.ntuples):
            row = result.get_value(n, 5) or b""
            arrivals[row] = _read_arrival(result, n, self.shapes[row], 6)
        return arrivals


def hashed(key: str) -> str:
    """What stands for a long key in a row's: "#:", so that no short one equals it, and a hash."""
    return f"#:{blake2b(key.encode(errors='surrogatepass'), digest_size=24).hexdigest()}"


_read_usage = rows_of(
    BucketUsage,
    lambda name: unquote(as_text(name)),
    _codec.decode_int,
    lambda idle: max(0.0, _codec.decode_float8(idle)),
    _codec.decode_float8,
    as_bytes,
)


def _read_changed_or_raced(result: Result) -> bool | Signal:
    column = result.get_value
    if column(0, 0) == b"\1":
        return True
    return _RACED if column(0, 1) == b"\1" else False


_RACED = Raced(False)


def _read_arrival(result: Result, n: int, rates: Shape, windows: int = 5) -> Arrival:
    """Read a row of an answer; `windows` is the column of what `_told` tells."""
    column = result.get_value
    now = int.from_bytes(column(n, 2) or b"", "big", signed=True) * 1000
    value = column(n, 1)
    tats: Sequence[int]
    if not isinstance(rates, int):
        bounds = column(n, windows)
        charged = column(n, 0) == b"\1"
        return WindowArrival(charged, now, value, bounds, column(n, 3), column(n, 4))
    if value is None:
        tats = (now,) * rates
    elif rates == 1:
        tats = (max(int(value), now),)
    else:
        found = [max(int(tat), now) for tat in value.split()][:rates]
        tats = found + [now] * (rates - len(found))
    return Arrival(column(n, 0) == b"\1", now, tats, column(n, 3), column(n, 4))
