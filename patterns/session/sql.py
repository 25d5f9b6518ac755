"""Statements of the session table. The secret token never comes here: `id` is its hash.

A row is a session or, with a successor, a stub: what a rotation leaves under the old id when it has
moved the row to a new one. A stub is never changed. It can be read until its ``ends_at``, the end of
the rotation's grace, while its session lives under the successor's id; after that it only leads
`destroy` to the session.

Every statement judges whether a session is alive by ``expires_at`` alone, which is kept at the
earlier of the idle and the absolute end. Writes whose loss in a crash costs a second of data set
``synchronous_commit = off`` for their own transaction; writes whose loss would revive a session
wait for the disk. Inside a caller's transaction neither is set, because it would affect its commit.

A session with lifetimes of its own has them in ``meta``, in seconds: ``[metadata, idle, absolute]``,
null where the store's holds. The ``meta`` of any other session is its metadata alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from operator import attrgetter
from typing import Literal, NamedTuple

from ..._ops import codec as _codec
from ..._ops.lazy import cached_property
from ..._ops.op import BINARY, TEXT, Expired, Op, Raced, Result, Signal, Statement
from ..._sql.sweep import Sweep
from ..._sql.table import STATEMENT_US, micros, read_count, read_found
from ...config import Config, Table, TableShape
from .._runtime.sql import ASYNC, NOW, as_bytes, rows_of
from .data import SessionInfo, read_document, values_of

SESSIONS = TableShape(
    "_sessions",
    """\
    id         BYTEA PRIMARY KEY,
    user_id    TEXT COLLATE "C",
    data       JSONB NOT NULL,
    version    BIGINT NOT NULL,
    created_at TIMESTAMPTZ NOT NULL,
    seen_at    TIMESTAMPTZ NOT NULL,
    expires_at TIMESTAMPTZ NOT NULL,
    ends_at    TIMESTAMPTZ NOT NULL,
    successor  BYTEA,
    meta       JSONB""",
    fillfactor=70,
    indexes=(("user", "(user_id)"),),
)

LIST_MAX = 1_000  # sessions of one user that a listing shows
# A role or database may have set it to off; every other setting is at least as strict as asked.
DURABLE = (
    "set_config('synchronous_commit', "
    "coalesce(nullif(current_setting('synchronous_commit'), 'off'), 'on'), true)"
)

METADATA = "CASE jsonb_typeof(s.meta) WHEN 'array' THEN nullif(s.meta->0, 'null') ELSE s.meta END"
OWN_IDLE, OWN_ABSOLUTE = "(s.meta->>1)::float8", "(s.meta->>2)::float8"

# What a load tells besides; the second for the middleware (`timed`).
MORE = (
    "s.meta->>1",
    f"concat_ws(' ', extract(epoch from seen_at), extract(epoch from {NOW}), s.meta->>1)",
)
RACED_OR_ROTATED = "CASE WHEN successor IS NULL THEN 'raced' ELSE 'rotated' END"
# How often a statement that met a concurrent change is asked again. A save and a rotation know
# their outcome the second time; a destroy can meet another rotation each time.
REPEATS = 50
# The least seconds that a stub is kept: a destroy that waited for the rotation finds the session
# through it, however late the rotation commits.
STUB_KEPT = 600

Mode = Literal["merge", "error", "last_wins"]


class Loaded(NamedTuple):
    """A live row, as a load saw it."""

    user_id: str | None
    data: bytes
    version: int
    created_at: datetime
    expires_at: datetime
    moved: bool  # it is a stub
    idle: float | None = None  # its own idle timeout
    times: tuple[float, float] | None = None  # (of the use before this one, now), since 1970


_NEVER = datetime.fromtimestamp(0, UTC)
LOOK_AGAIN = Loaded(None, b"", 0, _NEVER, _NEVER, moved=False)


class Outcome(NamedTuple):
    """How a save or a rotation ended.

    `status` is ``"done"``, ``"conflict"``, ``"rotated"`` or ``"gone"``. `before` is the version that
    a merge found.
    """

    status: str
    version: int = 0
    expires_at: datetime | None = None
    before: int = 0


class NewLifetimes(NamedTuple):
    """What a session is given in seconds: None leaves it, and 0 makes it the store's."""

    idle: float | None
    absolute: float | None

    def encoded(self) -> tuple[bytes | None, bytes | None]:
        """The parameters of a statement."""
        idle, absolute = (None if each is None else _codec.encode_interval(each) for each in self)
        return idle, absolute


UNCHANGED = NewLifetimes(None, None)


@dataclass(frozen=True, slots=True)
class Lifetimes:
    idle: float
    absolute: float
    touch: float


class SessionStatements(Sweep):
    """All statements of one store's session table; `inside`: for a caller's transaction."""

    def __init__(self, config: Config, table: Table, lifetimes: Lifetimes, *, inside: bool) -> None:
        super().__init__(config)
        self.table = table
        self.t: str = self.table.quoted
        self.lifetimes = lifetimes
        self._idle = _codec.encode_interval(lifetimes.idle)
        self._absolute = _codec.encode_interval(lifetimes.absolute)
        self._touch = _codec.encode_interval(lifetimes.touch)
        self._looks = bool(lifetimes.touch)  # before it loads
        # A relation of one row to join, and a condition on rows that are to be deleted: an
        # expression that nothing refers to would not be evaluated.
        self._lazily = "(SELECT 1) n" if inside else f"(SELECT {ASYNC}) n"
        self._and_lazily = "" if inside else f", {ASYNC}"
        self._strictly = "(SELECT 1) n" if inside else f"(SELECT {DURABLE}) n"
        self._if_strictly = "" if inside else f" AND {DURABLE} IS NOT NULL"

    # -- one session

    @cached_property
    def _create(self) -> Statement[tuple[int, datetime, datetime] | None]:
        return self.statement(
            "session_create",
            f"WITH n AS MATERIALIZED (SELECT clock_timestamp() AS ts{self._and_lazily}) "
            f"INSERT INTO {self.t} (id, user_id, data, version, created_at, seen_at, expires_at, "
            f"ends_at, meta) SELECT $1, $2, $3::jsonb, {micros('n.ts')},"
            " n.ts, n.ts, least(n.ts + $5::interval, n.ts + $6::interval), n.ts + $6::interval, "
            "$4::jsonb FROM n ON CONFLICT (id) DO NOTHING RETURNING version, expires_at, created_at",
            (BINARY, TEXT, TEXT, TEXT, BINARY, BINARY),
            _read_created,
        )

    def create(
        self,
        id: bytes,
        user_id: str | None,
        data: bytes,
        meta: bytes | None,
        own: NewLifetimes = UNCHANGED,
    ) -> Op[tuple[int, datetime, datetime] | None]:
        """Insert: version, expiry, creation; None if there is such an id."""
        user = None if user_id is None else user_id.encode()
        idle = _codec.encode_interval(own.idle) if own.idle else self._idle
        absolute = _codec.encode_interval(own.absolute) if own.absolute else self._absolute
        if own.idle or own.absolute:
            kept = ",".join(f"{each:.6f}" if each else "null" for each in own)
            meta = b"[%b,%b]" % (meta or b"null", kept.encode())
        return Op(self._create, (id, user, data, meta, idle, absolute))

    @cached_property
    def _load(self) -> list[Statement[Loaded | None]]:
        return [self._make_load(more) for more in MORE]

    @cached_property
    def _look(self) -> list[Statement[Loaded | None]]:
        return [self._make_look(more) for more in MORE]

    def _make_look(self, more: str) -> Statement[Loaded | None]:
        # NULL in the first column: a stub, or a use to be noted.
        return self.reading(
            "session_load",
            f"SELECT CASE WHEN successor IS NULL AND (expires_at <= {NOW} OR seen_at > {NOW} - $2::interval)"
            f" THEN expires_at > {NOW} END, {more}, user_id, data::text, version, created_at, "
            f"least(expires_at, ends_at) FROM {self.t} s WHERE id = $1",
            (BINARY, BINARY),
            lambda result: (
                LOOK_AGAIN
                if result.ntuples and result.get_value(0, 0) is None
                else self._read_loaded(result)
            ),
            one_key=True,
        )

    def look(self, id: bytes, *, timed: bool = False) -> Op[Loaded | None]:
        """What mostly answers a load, for much less: LOOK_AGAIN where it does not. It notes no use."""
        return Op(self._look[timed], (id, self._touch))

    def _make_load(self, more: str) -> Statement[Loaded | None]:
        # One column for what few sessions have: another one would cost each load.
        state = f"CASE WHEN successor IS NOT NULL THEN 'moved' ELSE {more} END"
        # The touch locks nothing that is locked, so a load never waits; and it locks nothing at
        # all within touch_interval, so a load then takes no transaction id.
        return self.reading(
            "session_load",
            "WITH c AS MATERIALIZED ("
            "SELECT user_id, data, version, created_at, least(expires_at, ends_at) AS expires_at, "
            f"{state} AS state, expires_at > {NOW} AS live FROM {self.t} s WHERE id = $1 AND {self._readable}), "
            f"k AS MATERIALIZED (SELECT id FROM {self.t} WHERE id = $1 AND successor IS NULL "
            f"AND expires_at > {NOW} AND seen_at <= {NOW} - $3::interval "
            "FOR NO KEY UPDATE SKIP LOCKED), "
            f"u AS (UPDATE {self.t} s SET seen_at = {NOW}, "
            f"{_ends('$2')} FROM k, {self._lazily} "
            "WHERE s.id = k.id RETURNING s.expires_at) "
            "SELECT live, state, user_id, CASE WHEN live THEN data::text END, version, created_at, "
            "coalesce((SELECT expires_at FROM u), expires_at) FROM c",
            (BINARY, BINARY, BINARY),
            self._read_loaded,
            # A touch changes no answer: a load is repeated, and counted, as a read.
            one_key=not self._looks,  # each load is counted once
        )

    def load(self, id: bytes, *, timed: bool = False) -> Op[Loaded | None]:
        """Read a live session, and note its use once per touch_interval; `timed`: with `times`."""
        return Op(self._load[timed], (id, self._idle, self._touch))

    @property
    def _readable(self) -> str:
        """Of a row s that has not expired: no stub, or one in its grace whose session is alive."""
        return (
            f"(successor IS NULL OR ends_at > {NOW} AND EXISTS (SELECT 1 FROM {self.t} h "
            f"WHERE h.id = s.successor AND h.successor IS NULL AND h.expires_at > {NOW}))"
        )

    @cached_property
    def _exists(self) -> Statement[bool]:
        return self.reading(
            "session_exists",
            f"SELECT 1 FROM {self.t} s WHERE id = $1 AND expires_at > {NOW} AND {self._readable}",
            (BINARY,),
            read_found,
        )

    def exists(self, id: bytes) -> Op[bool]:
        """Whether a load would find a session; notes no use."""
        return Op(self._exists, (id,))

    def _read_loaded(self, result: Result) -> Loaded | Signal | None:
        if not result.ntuples:
            return None
        column = result.get_value
        if column(0, 0) != b"\1":
            return Expired(None) if self.collects else None
        user, state = column(0, 2), column(0, 1)
        loaded = Loaded(
            None if user is None else user.decode(),
            column(0, 3) or b"{}",
            _codec.decode_int(column(0, 4)),
            _codec.decode_moment(column(0, 5)),
            _codec.decode_moment(column(0, 6)),
            state == b"moved",
        )
        if state is None or loaded.moved:
            return loaded
        known = [float(each) for each in state.split()]
        return loaded._replace(
            times=(known[0], known[1]) if len(known) > 1 else None,
            idle=known[-1] if len(known) != 2 else None,
        )

    def save(
        self,
        id: bytes,
        mode: Mode,
        version: int,
        changed: bytes,
        removed: list[bytes],
        own: NewLifetimes = UNCHANGED,
    ) -> Op[Outcome]:
        """Update, never insert: a session that ended stays ended.

        Args:
            id: the token's hash.
            mode: ``"merge"`` sends what changed, the others the whole document.
            version: what ``"error"`` requires.
            changed: the changed keys with their values, or the document.
            removed: (merge) the keys to take away.
            own: lifetimes.
        """
        params: tuple[bytes | None, ...] = (id, changed, self._idle)
        if mode == "merge":
            params += (_codec.encode_array(removed),)
        elif mode == "error":
            params += (_codec.encode_int8(version),)
        timed = own != UNCHANGED
        if timed:
            params += (self._absolute, *own.encoded())
        return Op(self.shaped(self._make_save, mode, timed), params)

    def _make_save(self, mode: Mode, timed: bool) -> Statement[Outcome]:
        live = f"id = $1 AND successor IS NULL AND expires_at > {NOW}"
        data, count, status = "$2::jsonb", 4, RACED_OR_ROTATED
        if mode == "merge":
            data = "(s.data - $4::text[]) || $2::jsonb"
        elif mode == "error":
            live += " AND s.version = $4::bigint"
            status = (
                "CASE WHEN successor IS NOT NULL THEN 'rotated' "
                "WHEN version <> $4::bigint THEN 'conflict' ELSE 'raced' END"
            )
        else:
            count = 3
        given = (f"${count + 2}", f"${count + 3}") if timed else ()
        update = (
            f"UPDATE {self.t} s SET data = {data}, "
            f"version = greatest(s.version + 1, {STATEMENT_US}), seen_at = {NOW}, "
            f"{_ends('$3', f'${count + 1}', given)} FROM"
        )
        # The second half sees the statement's snapshot, the UPDATE the newest row: "live and not
        # changed" means that another transaction was faster. Asked again, the row tells.
        then = (
            " SELECT 'done', version, expires_at, before FROM u UNION ALL "
            f"SELECT {status}, version, expires_at, version FROM {self.t} "
            f"WHERE id = $1 AND expires_at > {NOW} AND NOT EXISTS (SELECT 1 FROM u)"
        )
        sql = (
            f"WITH u AS ({update} {self._lazily} WHERE {live} "
            f"RETURNING s.version, s.expires_at, s.version AS before){then}"
        )
        sql_18 = None
        if mode == "merge":
            # Which version the merge found tells whether the caller still knows the whole document.
            # Before 18 RETURNING has no old row; there the row is locked first, which also reads it.
            sql = (
                f"WITH o AS MATERIALIZED (SELECT id, version FROM {self.t} WHERE {live} "
                f"FOR NO KEY UPDATE), u AS ({update} o, {self._lazily} "
                f"WHERE s.id = o.id RETURNING s.version, s.expires_at, o.version AS before){then}"
            )
            sql_18 = (
                f"WITH u AS ({update} {self._lazily} WHERE {live} "
                f"RETURNING new.version, new.expires_at, old.version AS before){then}"
            )
        formats = (BINARY, TEXT, *(BINARY,) * (count - 2 + 3 * timed))
        options = {"repeats": REPEATS, "sql_18": sql_18}
        return self.statement("session_save", sql, formats, _read_outcome, **options)

    def rotate(
        self,
        id: bytes,
        new_id: bytes,
        changed: bytes,
        removed: list[bytes],
        *,
        grace: float,
        user: tuple[str | None] | None,
        own: NewLifetimes = UNCHANGED,
    ) -> Op[Outcome]:
        """Move the row to a new id and leave a stub under the old one.

        Args:
            id: the old token's hash.
            new_id: the new token's hash.
            changed: changed keys with their values, merged in.
            removed: keys to take away.
            grace: seconds for which the stub can be read.
            user: the new user in a tuple; None keeps the one there is.
            own: lifetimes.
        """
        params: tuple[bytes | None, ...] = (
            id, new_id, changed, _codec.encode_array(removed), _codec.encode_interval(grace), self._idle
        )  # fmt: skip
        timed = own != UNCHANGED
        if timed:
            params += (self._absolute, *own.encoded())
        elif user is not None:
            params += (self._absolute,)
        if user is not None:
            params += (None if user[0] is None else user[0].encode(),)
        return Op(self.shaped(self._make_rotate, timed, user is not None), params)

    def _make_rotate(self, timed: bool, of_user: bool) -> Statement[Outcome]:
        given = ("$8", "$9") if timed else ()
        to = restarts = ""
        formats: tuple[int, ...] = (
            BINARY,
            BINARY,
            TEXT,
            *(BINARY,) * (6 if timed else 3 + of_user),
        )
        if of_user:
            formats += (TEXT,)
            user = f"${len(formats)}"
            to, restarts = f"user_id = {user}, ", f"s.user_id IS DISTINCT FROM {user}"
        # The row itself moves: a statement that waits for the row of a user still finds it.
        # The stub tells a repeated rotation that it had happened, when its first answer was lost,
        # and leads a destroy to the session, also one that waited for this statement.
        stub = (
            f"INSERT INTO {self.t} (id, user_id, data, version, created_at, seen_at, expires_at, "
            "ends_at, successor) SELECT o.id, o.user_id, "
            "CASE WHEN $5::interval > interval '0' THEN o.data ELSE '{}' END, o.version, "
            f"o.created_at, o.seen_at, {NOW} + greatest($5::interval, interval '{STUB_KEPT} s'), "
            f"least(o.expires_at, {NOW} + $5::interval), $2 FROM o, u"
        )
        return self.statement(
            "session_rotate",
            f"WITH o AS MATERIALIZED (SELECT * FROM {self.t} WHERE id = $1 AND successor IS NULL "
            f"AND expires_at > {NOW} FOR UPDATE), "
            f"u AS (UPDATE {self.t} s SET id = $2, {to}"
            "data = (s.data - $4::text[]) || $3::jsonb, "
            f"version = greatest(s.version + 1, {STATEMENT_US}), seen_at = {NOW}, "
            f"{_ends('$6', '$7', given, restarts)} "
            f"FROM o, {self._strictly} WHERE s.id = o.id "
            f"RETURNING s.version, s.expires_at, o.version AS before), st AS ({stub}) "
            "SELECT 'done', version, expires_at, before FROM u UNION ALL "
            f"SELECT 'done', h.version, h.expires_at, 0 FROM {self.t} s JOIN {self.t} h "
            "ON h.id = s.successor WHERE s.id = $1 AND s.successor = $2 UNION ALL "
            f"SELECT {RACED_OR_ROTATED}, version, "
            f"expires_at, version FROM {self.t} WHERE id = $1 AND successor IS DISTINCT FROM $2 "
            f"AND expires_at > {NOW} AND NOT EXISTS (SELECT 1 FROM u)",
            formats,
            _read_outcome,
            retry_safe=True,
            repeats=REPEATS,
        )

    def _make_destroy(self, more: tuple[int, ...]) -> Statement[bool]:
        condition = " AND user_id = $2" if more else ""
        # The token's row may be a stub: it leads to the session, over several rotations as well.
        # A row that is there and was not deleted has just been moved or deleted by another
        # transaction, for whose end this statement waited: asked again, the stub leads on.
        return self.statement(
            "session_destroy",
            f"WITH RECURSIVE {self._chain('$1')}, "
            f"e AS MATERIALIZED (SELECT id FROM chain WHERE successor IS NULL{condition}), "
            f"gone AS (DELETE FROM {self.t} s USING e WHERE s.id = e.id{self._if_strictly} "
            f"RETURNING s.expires_at > {NOW} AS live) SELECT coalesce(bool_or(live), false), "
            "EXISTS (SELECT 1 FROM e) AND count(*) = 0 FROM gone",
            (BINARY, *more),
            _read_destroyed,
            retry_safe=True,
            repeats=REPEATS,
        )

    def _chain(self, id: str) -> str:
        """The row of an id and those to which it leads: stubs, and at the end the session."""
        return (
            f"chain AS (SELECT id, user_id, successor FROM {self.t} WHERE id = {id} UNION ALL "
            f"SELECT h.id, h.user_id, h.successor FROM chain c JOIN {self.t} h ON h.id = c.successor)"
        )

    def destroy(self, id: bytes, *user_id: str) -> Op[bool]:
        """End a session, or only if it is that user's; whether it was alive."""
        formats = (TEXT,) * len(user_id)
        params = (id, *(each.encode() for each in user_id))
        return Op(self.shaped(self._make_destroy, formats), params)

    # -- a user's sessions

    @cached_property
    def _destroy_user(self) -> Statement[tuple[int, bool]]:
        # A rotation that this statement waits for has moved a row: the row is deleted under its new
        # id, and its stub is only visible to another statement. Or it has given the row to another
        # user.
        kept = "ARRAY(SELECT id FROM chain)"
        return self.statement(
            "session_destroy_user",
            f"WITH RECURSIVE {self._chain('$2')}, f AS MATERIALIZED (SELECT id FROM {self.t} "
            f"WHERE user_id = $1 AND id <> ALL ({kept})), "
            f"gone AS (DELETE FROM {self.t} WHERE user_id = $1 AND id <> ALL ({kept})"
            f"{self._if_strictly} RETURNING id, expires_at, successor) SELECT count(*) "
            f"FILTER (WHERE expires_at > {NOW} AND successor IS NULL), "
            "EXISTS (SELECT 1 FROM f WHERE id NOT IN (SELECT id FROM gone)) FROM gone",
            (TEXT, BINARY),
            _read_ended,
            retry_safe=True,
            join=lambda parts: (sum(n for n, _ in parts), any(raced for _, raced in parts)),
        )

    def destroy_user(self, user_id: str, keep: bytes | None) -> Op[tuple[int, bool]]:
        """End a user's sessions but one: how many were alive, and whether to ask again, because
        others changed some of them at the same time."""
        return Op(self._destroy_user, (user_id.encode(), keep))

    @cached_property
    def _list_user(self) -> Statement[list[SessionInfo]]:
        return self.reading(
            "session_list",
            f"SELECT id, created_at, seen_at, expires_at, ends_at, ({METADATA})::text, "
            f"{NOW} FROM {self.t} s WHERE user_id = $1 AND successor IS NULL AND expires_at > {NOW} "
            f"ORDER BY seen_at DESC, id LIMIT {LIST_MAX}",
            (TEXT,),
            _read_listed,
            join=_latest,
        )

    def list_user(self, user_id: str) -> Op[list[SessionInfo]]:
        return Op(self._list_user, (user_id.encode(),))

    # -- upkeep

    @cached_property
    def _collect(self) -> Statement[int]:
        return self.reading(
            "session_collect",
            f"DELETE FROM {self.t} WHERE id IN (SELECT id FROM {self.t} WHERE id = ANY($1::bytea[])"
            f" AND expires_at <= {NOW} FOR UPDATE SKIP LOCKED) AND expires_at <= {NOW}",
            (BINARY,),
            read_count,
            retried=False,
        )

    def collect(self, keys: Iterable[bytes]) -> Op[int]:
        return Op(self._collect, (_codec.encode_array(sorted(set(keys)), _codec.BYTEA_OID),))


def _latest(parts: list[list[SessionInfo]]) -> list[SessionInfo]:
    rows = sorted(chain.from_iterable(parts), key=attrgetter("handle"))
    return sorted(rows, key=attrgetter("seen_at"), reverse=True)[:LIST_MAX]


def _ends(idle: str, absolute: str = "", given: Sequence[str] = (), restarts: str = "") -> str:
    """What sets the ends of a session that is used.

    Args:
        idle: the parameter of the store's idle timeout.
        absolute: of its absolute timeout, where that may start again.
        given: the parameters of `NewLifetimes`, one of which is not null.
        restarts: a condition under which the absolute timeout starts again.
    """
    own_idle, own_absolute, also, ends = OWN_IDLE, OWN_ABSOLUTE, "", "s.ends_at"
    if given:
        own_idle, own_absolute = _changed(given[0], OWN_IDLE), _changed(given[1], OWN_ABSOLUTE)
        also = f"meta = jsonb_build_array({METADATA}, {own_idle}, {own_absolute}), "
        restarts = f"{given[1]}::interval IS NOT NULL OR {restarts or 'false'}"
    if restarts:
        ends = (
            f"CASE WHEN {restarts} THEN {NOW} + {_own(own_absolute, absolute)} ELSE s.ends_at END"
        )
        also += f"ends_at = {ends}, "
    return f"{also}expires_at = least({NOW} + {_own(own_idle, idle)}, {ends})"


def _own(seconds: str, of_store: str) -> str:
    return f"coalesce({seconds} * interval '1 s', {of_store}::interval)"


def _changed(given: str, before: str) -> str:
    return (
        f"CASE WHEN {given}::interval IS NULL THEN {before} "
        f"ELSE nullif(extract(epoch from {given}::interval), 0)::float8 END"
    )


_RACED = Raced()


def _read_created(result: Result) -> tuple[int, datetime, datetime] | None:
    if not result.ntuples:
        return None
    column = result.get_value
    return (
        _codec.decode_int(column(0, 0)),
        _codec.decode_moment(column(0, 1)),
        _codec.decode_moment(column(0, 2)),
    )


def _read_outcome(result: Result) -> Outcome | Signal:
    if not result.ntuples:
        return Outcome("gone")
    column = result.get_value
    if column(0, 0) == b"raced":
        return _RACED
    return Outcome(
        (column(0, 0) or b"").decode(),
        _codec.decode_int(column(0, 1)),
        _codec.decode_moment(column(0, 2)),
        _codec.decode_int(column(0, 3)),
    )


def _read_destroyed(result: Result) -> bool | Signal:
    return _RACED if result.get_value(0, 1) == b"\1" else result.get_value(0, 0) == b"\1"


def _read_ended(result: Result) -> tuple[int, bool]:
    return _codec.decode_int(result.get_value(0, 0)), result.get_value(0, 1) == b"\1"


_read_listed = rows_of(
    SessionInfo,
    lambda key: as_bytes(key).hex(),
    *(_codec.decode_moment,) * 4,
    lambda metadata: values_of(read_document(metadata or b"{}")),
    _codec.decode_moment,
)
