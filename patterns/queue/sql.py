"""The statements of queues: put, take, acknowledge, put back, renew, inspect.

A job is one row. No column holds its state: it waits while `due_at` and `leased_until` have passed,
runs while `leased_until` lies ahead, and is dead when `due_at` is infinite. So the job of a dead
worker comes back by itself, and a lease, which changes no indexed column, stays heap-only.

* A take skips what is locked and what is leased, in the order of the index, from the `marks` on: the
  index entries of finished jobs, which an old snapshot keeps, lie before these. It chooses rows by
  ctid and joins nothing: no statistics make its plan read the table.
* A plan made while the table was small, which may read all of it, stays with its connection. So what
  finds a job has another text, and gets another plan, when the table has grown by a factor of eight.
* A take and a renewal do not wait for the disk: lost in a crash they cost a second run, never a job.
* ``again`` notes that a job was put while one of its key ran. Whatever ends that run then puts the job
  back for a run of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from struct import Struct
from typing import Any, NamedTuple, TypeAlias

from ..._ops import codec as _codec
from ..._ops.lazy import cached_property
from ..._ops.op import BINARY, TEXT, Op, Param, Raced, Result, Signal, Statement
from ..._sql.table import STATEMENT_US, read_changed, read_count
from ...config import Table, TableShape
from .._runtime.lease import EXPIRED, GONE, LOCKED, RELEASED, RENEWED, REPLACED
from .._runtime.sql import ASYNC, EPOCH, NOW, as_bytes, as_text, row_of, rows_of

JOBS = TableShape(
    "_jobs",
    """\
    id           BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    queue        TEXT COLLATE "C" NOT NULL,
    priority     SMALLINT NOT NULL,
    due_at       TIMESTAMPTZ NOT NULL,
    leased_until TIMESTAMPTZ NOT NULL DEFAULT 'epoch',
    token        BIGINT NOT NULL DEFAULT 0,
    attempt      SMALLINT NOT NULL DEFAULT 0,
    max_attempts SMALLINT NOT NULL,
    created_at   TIMESTAMPTZ NOT NULL,
    payload      BYTEA NOT NULL,
    dedupe       TEXT COLLATE "C",
    again        BOOLEAN NOT NULL DEFAULT FALSE,
    error        TEXT""",
    fillfactor=70,
    indexes=(
        ("ready", "(queue, priority, due_at)"),
        ("dedupe", "UNIQUE (queue, dedupe) WHERE dedupe IS NOT NULL AND due_at < 'infinity'"),
    ),
)
# A table of its own: a process that forgets durable=False must not share one that a crash empties.
JOBS_UNLOGGED = replace(JOBS, suffix="_jobs_u")

CHANNEL = b"pgkv_jobs"  # one for a database; its payloads name table and queue
PRIORITIES = range(9, -1, -1)  # high to low
REPEATS = 10  # of a statement that met a job in flight
FIRST = _codec.INT8_MIN  # the binary timestamp before all others; the largest is 'infinity'
NEVER = _codec.INT8_MAX
INT2_OID, TIMESTAMPTZ_OID = 21, 1184

LIVES = "due_at < 'infinity'"
MINE = f"id = $1 AND token = $2 AND {LIVES} AND leased_until > {EPOCH}"
STATES = ("waiting", "delayed", "running", "dead")
STATE = (
    f"CASE WHEN due_at = 'infinity' THEN 'dead' WHEN leased_until > {NOW} THEN 'running' "
    f"WHEN due_at > {NOW} THEN 'delayed' ELSE 'waiting' END"
)


class Taken(NamedTuple):
    """A job that was taken: `due_at` as a binary timestamp, `NEVER` for one that is dead now."""

    id: int
    priority: int
    token: int
    attempt: int
    due_at: int
    dedupe: str | None
    payload: bytes


class Look(NamedTuple):
    """What a take found.

    Attributes:
        jobs: the highest priority first, of each the earliest.
        now: the server's clock, as a binary timestamp.
        size: of the table, in bytes.
        next_due: seconds until another job is due, as far as is known; None without one.
    """

    jobs: list[Taken]
    now: int
    size: int
    next_due: float | None


class JobInfo(NamedTuple):
    """A job, as one read saw it.

    Attributes:
        id: its number.
        state: ``"waiting"``, ``"delayed"``, ``"running"`` or ``"dead"``.
        priority: 9 is taken first.
        attempt: how often it was taken.
        max_attempts: after which it is dead.
        created_at: when it was put (UTC, the server's clock).
        due_at: when it is or was due; of a dead one the last moment there is.
        dedupe: its key.
        error: of its last failure.
        payload: the bytes.
    """

    id: int
    state: str
    priority: int
    attempt: int
    max_attempts: int
    created_at: datetime
    due_at: datetime
    dedupe: str | None
    error: str | None
    payload: bytes


class QueueStats(NamedTuple):
    """The jobs of a queue by state.

    Attributes:
        queue: its name.
        waiting: due, and not taken.
        delayed: not due yet.
        running: taken, and their lease has not ended.
        dead: buried, or out of attempts.
        oldest: seconds for which the longest waiting job has been due.
    """

    queue: str
    waiting: int
    delayed: int
    running: int
    dead: int
    oldest: float


class JobStatements:
    """All statements of one table of jobs.

    Args:
        table: that table.
        inside: for a caller's transaction, whose commit they must not relax.
        notify: a put inside a transaction wakes waiting processes.
    """

    def __init__(self, table: Table, *, inside: bool = False, notify: bool = False) -> None:
        self.table = table
        self.t: str = table.quoted
        self.inside = inside
        logged = table.shape != JOBS_UNLOGGED
        self.relaxed = ASYNC if logged and not inside else "NULL"
        literal = self.t.replace("'", "''")
        notifying = f"pg_notify('{CHANNEL.decode()}', '{literal}' || $1)"
        self.told: str = f", (SELECT {notifying})" if inside and notify else ""
        self.notifying = notifying
        self.sized: str = f"pg_relation_size('{literal}'::regclass)"
        # A shard of Citus has no identity of its own: the sequence is the table's.
        next_id = f"pgkv_map.next_id('{literal}'), "
        self.next_id: tuple[str, str] = ("", "") if table.fences is None else ("id, ", next_id)
        self._made: dict[tuple[str, int], Statement[Any]] = {}

    def _statement(
        self, name: str, sql: str, formats: tuple[int, ...], decode: Any, **options: Any
    ) -> Statement[Any]:
        return Statement(name, sql, formats, decode, table=self.table, **options)

    def _planned(
        self, size: int, name: str, sql: Callable[[], str], formats: tuple[int, ...], decode: Any,
        **options: Any,
    ) -> Statement[Any]:  # fmt: skip
        """The statement for a table of about that size, made once for each factor of eight."""
        shape = max(0, size >> 16).bit_length() // 3
        key = name, shape
        statement = self._made.get(key)
        if statement is None:
            statement = self._statement(
                name.partition(" ")[0], f"/* {shape} */ {sql()}", formats, decode, **options
            )
            statement = self._made.setdefault(key, statement)
        return statement

    def payload(self, queue: bytes) -> bytes:
        """What a notification about a queue says."""
        return self.t.encode() + queue

    @cached_property
    def _notify(self) -> Statement[None]:
        return self._statement(
            "queue_notify", f"SELECT {self.notifying}", (TEXT,), _read_nothing, writes=False
        )

    def notify(self, queue: bytes) -> Op[None]:
        """Wake processes that wait for jobs of a queue."""
        return Op(self._notify, (queue,))

    # -- putting. None is repeated when its reply was lost: the job may have been done already.

    def _inserted(self, payload: str, due: str, source: str, dedupe: str = "NULL") -> str:
        column, value = self.next_id
        return (
            f"INSERT INTO {self.t} AS t ({column}queue, payload, due_at, priority, max_attempts, "
            f"created_at, dedupe) SELECT {value}$1, {payload}, {due}, $5::smallint, $6::smallint, n.c, {dedupe} "
            f"FROM {source}"
        )

    @cached_property
    def _put(self) -> Statement[list[int]]:
        sql = self._inserted("$2", _due("n.c"), "(SELECT clock_timestamp() c) n")
        return self._make_put("queue_put", sql)

    @cached_property
    def _put_many(self) -> Statement[list[int]]:
        # A microsecond apart, they are taken in their order without the id in the index.
        due = _due("n.c") + " + (u.i - 1) * interval '1 microsecond'"
        source = (
            "(SELECT clock_timestamp() c) n CROSS JOIN unnest($2::bytea[]) WITH ORDINALITY u(v, i) "
            "ORDER BY u.i"
        )
        return self._make_put("queue_put_many", self._inserted("u.v", due, source))

    def _make_put(self, name: str, insert: str) -> Statement[list[int]]:
        sql = f"{insert} RETURNING id"
        if self.told:
            sql = f"WITH i AS ({sql}) SELECT id{self.told} FROM i"
        return self._statement(name, sql, (TEXT, *(BINARY,) * 5), _read_ids)

    def _put_deduped(self) -> str:
        # A job that waits runs after this put; one that runs must run again, and so must one whose
        # lease is over, for its ack would still count. Inside a transaction the waiting one is locked:
        # taken before the commit, it would run on what was there before.
        # No row: the job was taken, or its run ended, between the two looks at it.
        lock = " FOR NO KEY UPDATE" if self.inside else ""
        insert = self._inserted("$2", _due("n.c"), "(SELECT clock_timestamp() c) n", "$7")
        return (
            f"WITH o AS MATERIALIZED (SELECT id FROM {self.t} WHERE queue = $1 AND dedupe = $7 "
            f"AND {LIVES} AND (leased_until = {EPOCH} OR again){lock}), "
            f"i AS ({insert} WHERE NOT EXISTS (SELECT 1 FROM o) "
            f"ON CONFLICT (queue, dedupe) WHERE dedupe IS NOT NULL AND {LIVES} "
            "DO UPDATE SET again = TRUE, payload = EXCLUDED.payload "
            f"WHERE t.leased_until > {EPOCH} AND NOT t.again RETURNING id, again) "
            f"SELECT id, CASE WHEN again THEN 'again' ELSE 'new' END, {self.sized}{self.told} FROM i "
            f"UNION ALL SELECT id, 'waiting', {self.sized}{', NULL' if self.told else ''} FROM o"
        )

    def put(
        self, queue: bytes, payload: bytes, due: Due, dedupe: bytes | None = None, size: int = 0
    ) -> Op[Any]:
        """Insert a job; its id, or with a key its id, what became of the put, and the table's size, of
        which `size` was the last known."""
        if dedupe is None:
            return Op(self._put, (queue, payload, *due))
        formats = (TEXT, *(BINARY,) * 5, TEXT)
        statement = self._planned(
            size, "queue_put key", self._put_deduped, formats, _read_put, repeats=REPEATS
        )
        return Op(statement, (queue, payload, *due, dedupe))

    def put_many(self, queue: bytes, payloads: Sequence[bytes], due: Due) -> Op[list[int]]:
        """Insert jobs to be taken in this order; their ids."""
        return Op(self._put_many, (queue, _codec.encode_array(payloads, _codec.BYTEA_OID), *due))

    # -- taking

    def _take(self) -> str:
        ready = (
            f"SELECT ctid k FROM {self.t} WHERE queue = $1 AND priority = m.p AND due_at >= m.m "
            f"AND due_at <= {NOW} AND leased_until <= {NOW} ORDER BY due_at LIMIT $4 "
            "FOR UPDATE SKIP LOCKED"
        )
        due = (
            f"SELECT due_at d FROM {self.t} WHERE queue = $1 AND priority = p.p "
            f"AND due_at > {NOW} AND {LIVES} ORDER BY due_at LIMIT 1"
        )
        fresh = "NOT again AND attempt >= max_attempts"
        return (
            f"WITH n AS MATERIALIZED (SELECT {self.relaxed}), "
            "k AS MATERIALIZED (SELECT x.k FROM unnest($2::smallint[], $3::timestamptz[]) m(p, m) "
            f"CROSS JOIN LATERAL ({ready}) x LIMIT $4), "
            f"u AS (UPDATE {self.t} SET leased_until = {NOW} + $5::float8 * interval '1 second', "
            f"attempt = CASE WHEN again THEN 1 WHEN {fresh} THEN attempt ELSE attempt + 1 END, "
            f"token = greatest(token + 1, {STATEMENT_US}), again = FALSE, "
            f"due_at = CASE WHEN {fresh} THEN 'infinity' ELSE due_at END "
            f"FROM n WHERE ctid = ANY(ARRAY(SELECT k FROM k)) AND leased_until <= {NOW} "
            "RETURNING id, priority, token, attempt, due_at, dedupe, payload) "
            f"SELECT u.*, {NOW}, (SELECT {self.sized}), NULL::float8 FROM u UNION ALL "
            f"SELECT NULL, NULL, NULL, NULL, NULL, NULL, NULL, {NOW}, {self.sized}, "
            f"(SELECT extract(epoch FROM min(x.d) - {NOW}) FROM unnest($2::smallint[]) p(p) "
            f"CROSS JOIN LATERAL ({due}) x)::float8 WHERE NOT EXISTS (SELECT 1 FROM u)"
        )

    def take(self, queue: bytes, marks: Sequence[int], n: int, lease: float, size: int) -> Op[Look]:
        """Lease up to `n` due jobs: the highest priority first, of each the earliest from its mark
        on. `size` is that of the table when it was last read."""
        formats = (TEXT, *(BINARY,) * 4)
        statement = self._planned(
            size, "queue_take", self._take, formats, _read_look, retry_safe=True
        )
        at = _codec.encode_array([_codec.encode_int8(mark) for mark in marks], TIMESTAMPTZ_OID)
        params = (queue, _PRIORITIES, at, _codec.encode_int8(n), _codec.encode_float8(lease))
        return Op(statement, params)

    # -- ending a run

    def _ack(self) -> str:
        return f"DELETE FROM {self.t} WHERE id = $1 AND token = $2"

    def _ack_deduped(self) -> str:
        return (
            f"WITH d AS (DELETE FROM {self.t} WHERE id = $1 AND token = $2 AND NOT again RETURNING 1), "
            f"u AS (UPDATE {self.t} SET again = FALSE, attempt = 0, due_at = {NOW}, "
            f"leased_until = {EPOCH} WHERE id = $1 AND token = $2 AND again RETURNING 1) "
            "SELECT CASE WHEN EXISTS (SELECT 1 FROM d) THEN 'done' "
            "WHEN EXISTS (SELECT 1 FROM u) THEN 'again' "
            f"WHEN EXISTS (SELECT 1 FROM {self.t} WHERE id = $1 AND token = $2) THEN 'raced' "
            "ELSE 'lost' END"
        )

    def ack(self, id: int, token: int, *, deduped: bool, size: int = 0) -> Op[str]:
        """End a job for good: ``"done"``; ``"again"`` (put meanwhile, it waits); ``"lost"``. `size` as
        of `take`."""
        if deduped:
            statement = self._planned(
                size, "queue_ack key", self._ack_deduped, (BINARY, BINARY), _read_outcome,
                retry_safe=True, repeats=REPEATS,
            )  # fmt: skip
        else:
            statement = self._planned(
                size, "queue_ack", self._ack, (BINARY, BINARY), _read_acked, retry_safe=True
            )
        return Op(statement, (_codec.encode_int8(id), _codec.encode_int8(token)))

    @cached_property
    def _ack_many(self) -> Statement[list[int]]:
        sql = (
            f"WITH k AS MATERIALIZED (SELECT id, token FROM {self.t} WHERE id = ANY($1::bigint[]) "
            "ORDER BY id FOR UPDATE) "
            f"DELETE FROM {self.t} WHERE id = ANY(ARRAY(SELECT k.id FROM k JOIN "
            "unnest($1::bigint[], $2::bigint[]) u(id, token) USING (id, token))) RETURNING id"
        )
        return self._statement("queue_ack_many", sql, (BINARY, BINARY), _read_ids, retry_safe=True)

    def ack_many(self, jobs: Sequence[tuple[int, int]]) -> Op[list[int]]:
        """End jobs without a key for good: (id, token) of each; the ids of those that were held."""
        ids, tokens = (_codec.encode_int8s(each[column] for each in jobs) for column in (0, 1))
        return Op(self._ack_many, (ids, tokens))

    def _put_back(self) -> str:
        dead = "$5::bool OR ($4::smallint = 0 AND attempt >= max_attempts)"
        return (
            f"UPDATE {self.t} SET leased_until = {EPOCH}, error = coalesce($3, error), again = FALSE, "
            "attempt = CASE WHEN again THEN 0 ELSE greatest(attempt - $4::smallint, 0) END, "
            f"due_at = CASE WHEN again THEN {NOW} WHEN {dead} THEN 'infinity' "
            f"ELSE {NOW} + $6::float8 * interval '1 second' END "
            f"WHERE {MINE} RETURNING CASE WHEN due_at = 'infinity' THEN 'dead' ELSE 'waiting' END"
        )

    def put_back(
        self,
        id: int,
        token: int,
        error: str | None,
        *,
        delay: float,
        free: bool = False,
        dead: bool = False,
        size: int = 0,
    ) -> Op[str]:
        """End a run without success. `free`: it does not count as an attempt. ``"waiting"``;
        ``"dead"`` (asked for, or its attempts are used up); ``"lost"``."""
        int8 = _codec.encode_int8
        text = None if error is None else error.replace("\0", "").encode("utf-8", "replace")
        params = (
            int8(id), int8(token), text, _int2(free), bytes([dead]), _codec.encode_float8(delay),
        )  # fmt: skip
        formats = (BINARY, BINARY, TEXT, BINARY, BINARY, BINARY)
        statement = self._planned(
            size, "queue_put_back", self._put_back, formats, _read_outcome, retry_safe=True
        )
        return Op(statement, params)

    @cached_property
    def _renew(self) -> Statement[dict[int, int]]:
        sql = (
            f"WITH n AS MATERIALIZED (SELECT {self.relaxed}), u AS (SELECT * FROM "
            "unnest($1::bigint[], $2::bigint[], $3::float8[]) u(id, token, ttl)), "
            f"k AS MATERIALIZED (SELECT id, token FROM {self.t} t WHERE id = ANY($1::bigint[]) "
            f"AND {LIVES} AND leased_until > {NOW} "
            "AND EXISTS (SELECT 1 FROM u WHERE u.id = t.id AND u.token = t.token) "
            "ORDER BY id FOR NO KEY UPDATE SKIP LOCKED), "
            f"r AS (UPDATE {self.t} t SET leased_until = {NOW} + u.ttl * interval '1 second' "
            "FROM n, k JOIN u USING (id, token) WHERE t.id = ANY(ARRAY(SELECT id FROM k)) "
            "AND t.id = k.id AND t.token = k.token RETURNING t.id) "
            f"SELECT u.id, CASE WHEN r.id IS NOT NULL THEN {RENEWED} WHEN t.id IS NULL THEN {GONE} "
            f"WHEN t.token <> u.token THEN {REPLACED} WHEN t.leased_until = {EPOCH} "
            f"OR t.due_at = 'infinity' THEN {RELEASED} WHEN t.leased_until > {NOW} THEN {LOCKED} "
            f"ELSE {EXPIRED} END FROM u LEFT JOIN r ON r.id = u.id "
            f"LEFT JOIN {self.t} t ON t.id = u.id AND t.id = ANY($1::bigint[])"
        )
        return self._statement(
            "queue_renew", sql, (BINARY, BINARY, BINARY), _read_renewed, retry_safe=True
        )

    def renew(self, leases: Sequence[tuple[int, int, float]]) -> Op[dict[int, int]]:
        """Extend leases: (id, token, seconds from now). For each id, what became of it."""
        float8 = _codec.encode_float8
        ttls = _codec.encode_array([float8(ttl) for _, _, ttl in leases], _codec.FLOAT8_OID)
        ids = _codec.encode_int8s(key for key, *_ in leases)
        tokens = _codec.encode_int8s(token for _, token, _ in leases)
        return Op(self._renew, (ids, tokens, ttls))

    # -- inspecting

    @cached_property
    def _stats(self) -> Statement[list[QueueStats]]:
        counts = ", ".join(f"count(*) FILTER (WHERE s = '{state}')" for state in STATES)
        sql = (
            f"SELECT queue, {counts}, coalesce(extract(epoch FROM {NOW} - min(due_at) "
            f"FILTER (WHERE s = 'waiting')), 0)::float8 FROM (SELECT queue, due_at, {STATE} s "
            f"FROM {self.t} WHERE ($1::text IS NULL OR queue = $1) AND starts_with(queue, $2)) j "
            "GROUP BY queue ORDER BY queue"
        )
        return self._statement(
            "queue_stats", sql, (TEXT, TEXT), _read_stats, retry_safe=True, writes=False
        )

    def stats(self, queue: bytes | None, prefix: bytes = b"") -> Op[list[QueueStats]]:
        """Count the jobs of one queue, or of all whose names begin with `prefix`."""
        return Op(self._stats, (queue, prefix))

    @cached_property
    def _jobs(self) -> Statement[list[JobInfo]]:
        sql = (
            f"SELECT id, {STATE} s, priority, attempt, max_attempts, created_at, due_at, dedupe, "
            f"error, payload FROM {self.t} WHERE queue = $1 AND ($2::text IS NULL OR {STATE} = $2) "
            "ORDER BY priority DESC, due_at, id LIMIT $3"
        )
        return self._statement(
            "queue_jobs", sql, (TEXT, TEXT, BINARY), _read_jobs, retry_safe=True, writes=False
        )

    def jobs(self, queue: bytes, state: str | None, limit: int) -> Op[list[JobInfo]]:
        """List jobs of a queue, of one state or of all, in the order in which they would be taken."""
        wanted = None if state is None else state.encode()
        return Op(self._jobs, (queue, wanted, _codec.encode_int8(limit)))

    @cached_property
    def _cancel(self) -> Statement[bool]:
        sql = (
            f"DELETE FROM {self.t} WHERE queue = $1 AND id = $2 "
            f"AND (leased_until <= {NOW} OR due_at = 'infinity')"
        )
        return self._statement("queue_cancel", sql, (TEXT, BINARY), read_changed)

    def cancel(self, queue: bytes, id: int) -> Op[bool]:
        """Delete a job that does not run."""
        return Op(self._cancel, (queue, _codec.encode_int8(id)))

    @cached_property
    def _retry(self) -> Statement[bool]:
        sql = (
            f"UPDATE {self.t} SET due_at = {NOW}, leased_until = {EPOCH}, attempt = 0 "
            "WHERE queue = $1 AND id = $2 AND due_at = 'infinity'"
        )
        return self._statement("queue_retry", sql, (TEXT, BINARY), read_changed, savepoint=True)

    def retry(self, queue: bytes, id: int) -> Op[bool]:
        """Let a dead job wait again, with all its attempts."""
        return Op(self._retry, (queue, _codec.encode_int8(id)))

    @cached_property
    def _purge(self) -> Statement[int]:
        sql = (
            f"DELETE FROM {self.t} WHERE ctid = ANY(ARRAY(SELECT ctid FROM {self.t} "
            "WHERE queue = $1 AND due_at = 'infinity' LIMIT $2 FOR UPDATE SKIP LOCKED)) "
            "AND due_at = 'infinity'"
        )
        return self._statement("queue_purge", sql, (TEXT, BINARY), read_count, retry_safe=True)

    def purge(self, queue: bytes, limit: int) -> Op[int]:
        """Delete dead jobs; how many."""
        return Op(self._purge, (queue, _codec.encode_int8(limit)))


# -- parameters and results ----------------------------------------------------------------


def _due(clock: str) -> str:
    return f"coalesce($4::timestamptz, {clock} + $3::float8 * interval '1 second')"


_int2 = Struct("!h").pack
_PRIORITIES = _codec.encode_array([_int2(priority) for priority in PRIORITIES], INT2_OID)
_int, _float8, _moment = _codec.decode_int, _codec.decode_float8, _codec.decode_moment
Due: TypeAlias = tuple[Param, Param, Param, Param]


def due_params(delay: float, at: bytes | None, priority: int, max_attempts: int) -> Due:
    """The parameters of a put: due after `delay` seconds, or at that binary timestamp."""
    return _codec.encode_float8(delay), at, _int2(priority), _int2(max_attempts)


def _text_or_none(raw: bytes | None) -> str | None:
    return None if raw is None else raw.decode()


def _together(*columns: Any) -> tuple[Any, ...]:
    return columns


def _read_nothing(result: Result) -> None:
    """A notification was sent."""


_read_ids = rows_of(int, _int)
_read_row = row_of(_together, _int, as_text, _int)
_read_taken = rows_of(Taken, *(_int,) * 5, _text_or_none, as_bytes)
_read_codes = rows_of(_together, _int, _int)
_read_stats = rows_of(QueueStats, as_text, *(_int,) * 4, _float8)
_read_jobs = rows_of(
    JobInfo, _int, as_text, _int, _int, _int, _moment, _moment, _text_or_none, _text_or_none, as_bytes
)  # fmt: skip


def _read_put(result: Result) -> tuple[Any, ...] | Signal:
    return _read_row(result) or Raced()


def _read_look(result: Result) -> Look:
    value = result.get_value
    jobs = [] if value(0, 0) is None else _read_taken(result)
    jobs.sort(key=lambda job: (-job.priority, job.due_at, job.id))
    now, size, left = (value(0, column) for column in (7, 8, 9))
    return Look(jobs, _int(now), _int(size), None if left is None else _float8(left))


def _read_acked(result: Result) -> str:
    return "done" if result.command_tuples else "lost"


def _read_outcome(result: Result) -> str | Signal:
    outcome = as_text(result.get_value(0, 0)) if result.ntuples else "lost"
    return Raced() if outcome == "raced" else outcome


def _read_renewed(result: Result) -> dict[int, int]:
    return dict(_read_codes(result))
