"""`overview.py` asks the server about a store and the patterns on it: sizes, connections, locks, queues.

`Overviews(store).look()` is a flow that gives an `Overview`. All of its statements travel in one round
trip, only read, and cost the same however large the tables are: of a table of more than 64 pages a
sample is read, and its counts are estimates. A table that does not exist is not asked about.

    overviews = Overviews(store)
    frame = store._run(overviews.look(), 1.0)  # AsyncStore: await it; 1.0 s is the limit
    frame.server.connections, [(table.kind, table.rows) for table in frame.tables], frame.locks
    msgspec.json.encode(frame)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote

import msgspec

from .._engine.evict import evictor_of
from .._engine.schema import companion
from .._ops import codec as _codec
from .._ops.op import BINARY, TEXT, Flow, Op, Pipelined, Statement, send
from .._sql.evict import ROW_SIZE
from .._sql.sample import SAMPLE_PAGES, sampled
from .._sql.table import query
from ..errors import ConfigError, PgkvError
from .cache.sql import DIGEST_LENGTH, ENTRY
from .cache.sql import PREFIX as CACHE
from .lock.sql import MARK_LENGTH, name_and_slot, read_owner
from .queue.sql import STATE, STATES
from .rate_limit.sql import ROWS as BUCKETS
from .schema import SHAPES

TOP = 50  # rows of each list, at most
NAME_MAX = 40  # characters of the first part of a key
LOCK_PAGES = 512  # about 40,000 names
DEAD_MAX = 1_000  # dead jobs of one priority, at most, that are counted
# Finished jobs that no vacuum may remove yet come first in the index: with more of them it is not asked.
FINISHED_MAX = 20_000
# From where the doctor and the dashboard call for attention.
OLD_TRANSACTION = 300.0  # seconds: rows that died since cannot be reclaimed
DEAD_SHARE, DEAD_ROWS = 0.2, 10_000
HOT_RATIO, HOT_UPDATES = 0.8, 10_000
OVER = 1.25  # times the bound: eviction lags behind a burst of writes by less
# Of pg_stat_activity: who keeps rows that died from being reclaimed, by an open transaction.
HOLDS_BACK = (
    "pid <> pg_backend_pid() AND (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL) "
    "AND NOT starts_with(backend_type, 'autovacuum')"
)
NOW = "statement_timestamp()"


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """The server and the database. The last five count since the statistics were reset."""

    now: float  # its clock, in seconds since 1970
    version: str
    database: str
    role: str  # of the store's connection
    uptime: float  # seconds
    standby: bool  # it takes no writes
    max_connections: int
    connections: int  # of all databases
    oldest_transaction: float  # seconds, of those that the role may see: dead rows stay meanwhile
    notify_queue: float  # how full it is, 0.0 to 1.0
    commits: int
    rollbacks: int
    blocks_read: int  # from outside the server's memory
    blocks_hit: int


@dataclass(frozen=True, slots=True)
class ConnectionCount:
    """The connections to this database of one application in one state."""

    application: str
    state: str  # "not visible": another role's, without pg_read_all_stats
    count: int
    longest: float  # seconds for which one of them has been in it


@dataclass(frozen=True, slots=True)
class BlockedBackend:
    """A connection whose statement waits for a lock of the server."""

    pid: int
    application: str
    waits_for: str
    seconds: float  # since its statement began
    blockers: list[int]


@dataclass(frozen=True, slots=True)
class TableFacts:
    """A table, by the server's statistics. The last four count since these were reset."""

    kind: str  # "store", or a key of `schema.SHAPES`
    name: str  # as in SQL
    unlogged: bool
    sampled: bool  # a frame reads a part of it: what it says of its rows are estimates
    rows: int  # live ones, estimated
    dead: int  # row versions that vacuum has not removed yet, estimated
    bytes: int  # on disk, without indexes
    index_bytes: int
    vacuumed: float | None  # seconds ago
    inserted: int
    updated: int
    hot_updated: int  # updates that wrote to no index
    deleted: int


@dataclass(frozen=True, slots=True)
class Share:
    """A part of the store's table, by a sample.

    `kind` is ``"key"``, ``"function"`` (entries of cached functions), ``"cache"`` (their tags and
    generations) or ``"limiter"`` (buckets that are not full).
    """

    kind: str
    name: str | None  # function, limiter, or a key's first part: "user:", or "" for none
    rows: int  # the expired ones included
    bytes: int
    expired: int


@dataclass(frozen=True, slots=True)
class HeldLock:
    """A lock, or a semaphore's slot, that is held."""

    name: str
    slot: int | None
    owner: str
    token: int
    age: float
    remaining: float
    waiters: int  # of a lock that is not fair those who have waited for a second
    metadata: Any


@dataclass(frozen=True, slots=True)
class SessionCounts:
    """Sessions by a sample."""

    live: int
    with_user: int  # of those that live
    expired: int


@dataclass(frozen=True, slots=True)
class IdempotencyCounts:
    """Idempotency keys by a sample."""

    done: int
    running: int
    expired: int


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """The jobs of a queue by state, by a sample. The dead ones are counted, 1,000 of each priority, where
    the table has few dead rows; else a queue that the sample has not met is missing."""

    queue: str
    waiting: int
    delayed: int
    running: int
    dead: int
    oldest: float  # seconds for which a waiting job has been due


@dataclass(frozen=True, slots=True)
class Overview:
    """One frame: what the server says at one moment. Lists have at most 50 rows."""

    server: ServerFacts
    connections: list[ConnectionCount]
    blocked: list[BlockedBackend]
    tables: list[TableFacts]  # those that exist
    kinds: list[Share]  # the whole of each kind, without a name
    keys: list[Share]
    functions: list[Share]
    limiters: list[Share]
    locks: list[HeldLock]  # the oldest first
    locks_held: int
    sessions: SessionCounts | None  # None: there is no such table
    idempotency: IdempotencyCounts | None
    queues: list[QueueDepth]  # the deepest first
    refused: dict[str, str]  # by the kind of table: why the server told nothing
    max_entries: int | None  # the store's bound
    max_bytes: int | None
    evicted: int  # rows, by this process
    seconds: float  # for the answer


class Overviews:
    """Looks at one store, again and again. It remembers which tables there are.

    Args:
        store: a `Store` or `AsyncStore`. Of a namespace it shows the keys and names in it only.

    Raises:
        ConfigError: the store is sharded.
    """

    def __init__(self, store: Any) -> None:
        self._channel, self._sql = store._channel, store._sql
        if getattr(self._channel, "slot", 0) is None:
            raise ConfigError(
                "an overview is of one server, and a sharded store has several: give it store.on(key), "
                "the store of that key's slot"
            )
        config = store._config
        self._tables = {"store": config.table.quoted} | {
            kind: companion(config, shape, durable=logged).quoted
            for kind, (_, shape, logged) in SHAPES.items()
        }
        self._found: dict[str, TableFacts] = {}
        self._made: dict[tuple[str, int, bool], Op[Any]] = {}
        kinds, names = (
            [each.encode() for each in part] for part in zip(*self._tables.items(), strict=True)
        )
        arrays = _codec.encode_array(kinds), _codec.encode_array(names)
        self._server: Op[Any] = Op(_SERVER)
        self._sizes: Op[list[TableFacts]] = Op(_SIZES, arrays)

    def look(self) -> Flow[Overview]:
        """Ask for one frame: one round trip, and a second one where a table is new.

        Raises:
            PgkvError: the server did not answer.
        """
        started = time.monotonic()
        before = self._found
        first = [self._server, self._sizes, *map(self._op, before.values())]
        server, tables, *rest = yield from send(Pipelined(first, sync_each=True))
        for answer in (server, tables):
            if isinstance(answer, PgkvError):
                raise answer
        answers = dict(zip(before, rest, strict=True))
        self._found = found = {each.kind: each for each in tables}
        if new := [kind for kind in found if kind not in before]:
            ops = [self._op(found[kind]) for kind in new]
            more = yield from send(Pipelined(ops, sync_each=True))
            answers |= zip(new, more, strict=True)
        refused = {
            kind: str(answers.pop(kind)).partition(": ")[2]
            for kind in found
            if isinstance(answers[kind], PgkvError)
        }
        answers = {kind: answer for kind, answer in answers.items() if kind in found}
        shares: list[Share] = answers.get("store", [])
        named = {
            kind: [each for each in shares if each.kind == kind and each.name is not None][:TOP]
            for kind in ("key", "function", "limiter")
        }
        waiters: dict[str, int] = dict(answers.get("tickets", ()))
        held = [answers[kind] for kind in ("locks", "locks_unlogged") if kind in answers]
        locks = [_held_lock(waiters, *row) for _, rows in held for row in rows]
        queues: list[QueueDepth] = answers.get("jobs", []) + answers.get("jobs_unlogged", [])
        evictor = evictor_of(self._channel, self._sql)
        config = self._sql.config
        return Overview(
            server=server[0],
            connections=server[1],
            blocked=server[2],
            tables=tables,
            kinds=[each for each in shares if each.name is None],
            keys=named["key"],
            functions=named["function"],
            limiters=[replace(each, name=unquote(str(each.name))) for each in named["limiter"]],
            locks=sorted(locks, key=lambda lock: -lock.age)[:TOP],
            locks_held=sum(count for count, _ in held),
            sessions=answers.get("sessions"),
            idempotency=answers.get("idempotency"),
            queues=sorted(queues, key=lambda each: -each.waiting - each.running - each.dead)[:TOP],
            refused=refused,
            max_entries=config.max_entries,
            max_bytes=config.max_bytes,
            evicted=0 if evictor is None else evictor.evicted,
            seconds=time.monotonic() - started,
        )

    def _op(self, table: TableFacts) -> Op[Any]:
        """What is asked about a table. A plan that was made while the table was small, which may read
        all of it, stays with its connection: so each factor of eight has a text of its own."""
        is_finished = table.kind.startswith("jobs") and table.dead > FINISHED_MAX
        key = table.kind, table.bytes.bit_length() // 3, is_finished
        if key not in self._made:
            make, type_ = _QUESTIONS["finished" if is_finished else table.kind]
            sql = f"/* {key[1]} */ {make(self._tables[table.kind])}"
            params = (self._sql.prefix_bytes,) if "$1" in sql else ()
            self._made[key] = Op(
                _statement(f"overview_{table.kind}", sql, type_, *(TEXT for _ in params)), params
            )
        return self._made[key]


def rates_between(before: Overview, after: Overview) -> dict[str, Any]:
    """Return what happened per second between two frames, where the statistics were not reset: commits,
    rollbacks, the share of blocks found in memory, and by table its writes and the share of updates
    that were heap-only."""
    old, new = before.server, after.server
    seconds = max(0.001, new.now - old.now)
    read, hit = new.blocks_read - old.blocks_read, new.blocks_hit - old.blocks_hit
    known = {table.kind: table for table in before.tables}
    tables = {}
    for table in after.tables:
        if (was := known.get(table.kind)) is not None:
            updated = table.updated - was.updated
            changes = table.inserted - was.inserted + updated + table.deleted - was.deleted
            tables[table.kind] = {
                "changes": max(0.0, changes / seconds),
                "hot": (table.hot_updated - was.hot_updated) / updated if updated > 0 else None,
            }
    return {
        "seconds": seconds,
        "commits": max(0.0, (new.commits - old.commits) / seconds),
        "rollbacks": max(0.0, (new.rollbacks - old.rollbacks) / seconds),
        "hit_ratio": hit / (read + hit) if read >= 0 and hit > 0 else None,
        "tables": tables,
    }


def _held_lock(
    waiters: dict[str, int], key: str, row: str, token: int, age: float, remaining: float
) -> HeldLock:
    name, slot = name_and_slot(key)
    owner, metadata = read_owner(bytes.fromhex(row))
    return HeldLock(name, slot, owner, token, age, remaining, waiters.get(name, 0), metadata)


# -- statements: each answers with one JSON document ---------------------------------------


def _statement(name: str, sql: str, type_: Any, *formats: int) -> Statement[Any]:
    decode = msgspec.json.Decoder(type_).decode
    return query(name, sql, lambda result: decode(result.get_value(0, 0) or b"null"), *formats)


def _seconds_since(moment: str) -> str:
    return f"greatest(0, extract(epoch FROM {NOW} - {moment}))::float8"


def _list(rows: str) -> str:
    return f"(SELECT coalesce(json_agg(r), '[]') FROM ({rows}) r)"


_SERVER = _statement(
    "overview_server",
    "WITH a AS MATERIALIZED (SELECT * FROM pg_stat_activity WHERE pid <> pg_backend_pid() "
    "AND datname = current_database() AND coalesce(backend_type, 'client backend') = 'client backend') "
    "SELECT json_build_array((SELECT row_to_json(r) FROM (SELECT "
    f"extract(epoch FROM {NOW})::float8 AS now, current_setting('server_version') AS version, "
    "current_database() AS database, current_user AS role, "
    f"{_seconds_since('pg_postmaster_start_time()')} AS uptime, pg_is_in_recovery() AS standby, "
    "current_setting('max_connections')::int AS max_connections, "
    "(SELECT sum(numbackends)::int FROM pg_stat_database) AS connections, "
    f"(SELECT {_seconds_since('min(xact_start)')} FROM pg_stat_activity WHERE {HOLDS_BACK}) "
    "AS oldest_transaction, "
    "pg_notification_queue_usage() AS notify_queue, xact_commit AS commits, "
    "xact_rollback AS rollbacks, blks_read AS blocks_read, blks_hit AS blocks_hit "
    "FROM pg_stat_database WHERE datname = current_database()) r), "
    + _list(
        "SELECT coalesce(application_name, '') AS application, coalesce(state, 'not visible') AS state, "
        f"count(*), max({_seconds_since('state_change')}) AS longest "
        f"FROM a GROUP BY 1, 2 ORDER BY 3 DESC LIMIT {TOP}"
    )
    + ", "
    + _list(
        "SELECT pid, coalesce(application_name, '') AS application, wait_event AS waits_for, "
        f"{_seconds_since('query_start')} AS seconds, pg_blocking_pids(pid) AS blockers "
        f"FROM a WHERE wait_event_type = 'Lock' ORDER BY query_start LIMIT {TOP}"
    )
    + ")::text",
    tuple[ServerFacts, list[ConnectionCount], list[BlockedBackend]],
)

_SIZES = _statement(
    "overview_tables",
    "SELECT coalesce(json_agg(r), '[]')::text FROM (SELECT kind, quoted AS name, "
    "relpersistence = 'u' AS unlogged, "
    f"pages > CASE WHEN kind LIKE 'locks%' THEN {LOCK_PAGES} ELSE {SAMPLE_PAGES} END AS sampled, "
    "(CASE WHEN live > 0 THEN live WHEN pages = 0 OR relpages = 0 THEN 0 "
    "ELSE reltuples::float8 / relpages * pages END)::int8 AS rows, "
    "pg_stat_get_dead_tuples(c.oid) AS dead, "
    "pg_table_size(c.oid) AS bytes, pg_indexes_size(c.oid) AS index_bytes, "
    f"extract(epoch FROM {NOW} - greatest(pg_stat_get_last_vacuum_time(c.oid), "
    "pg_stat_get_last_autovacuum_time(c.oid)))::float8 AS vacuumed, "
    "pg_stat_get_tuples_inserted(c.oid) AS inserted, "
    "pg_stat_get_tuples_updated(c.oid) AS updated, "
    "pg_stat_get_tuples_hot_updated(c.oid) AS hot_updated, "
    "pg_stat_get_tuples_deleted(c.oid) AS deleted "
    "FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS t (kind, quoted, n) "
    "JOIN pg_class c ON c.oid = to_regclass(quoted) CROSS JOIN LATERAL (SELECT "
    "pg_relation_size(c.oid) / current_setting('block_size')::int8 AS pages, "
    "pg_stat_get_live_tuples(c.oid) AS live) p ORDER BY n) r",
    list[TableFacts],
    BINARY,
    BINARY,
)


def _store(table: str) -> str:
    columns = f"key, {ROW_SIZE} AS size, coalesce(expires_at <= {NOW}, false) AS dead"
    bucket = f"split_part(key, '{BUCKETS}', 2)"  # of a limiter's name these are escaped
    for mark in ":#~":
        bucket = f"split_part({bucket}, '{mark}', 1)"
    # A pattern in a namespace has keys with the namespace's prefix.
    return (
        "WITH k AS (SELECT *, CASE WHEN position('pgkv:' in key) = 0 THEN 'key' "
        f"WHEN position('{BUCKETS}' in key) > 0 THEN 'limiter' "
        f"WHEN position('{ENTRY}' in key) > 0 THEN 'function' "
        f"WHEN position('{CACHE}' in key) > 0 THEN 'cache' ELSE 'key' END AS kind FROM "
        f"(SELECT scale, size, dead, substr(key, length($1::text) + 1) AS key "
        f"FROM {sampled(table, columns)} s WHERE starts_with(key, $1)) s), "
        f"n AS (SELECT scale, size, dead, kind, CASE kind WHEN 'limiter' THEN {bucket} "
        f"WHEN 'function' THEN left(split_part(key, '{ENTRY}', 2), {-DIGEST_LENGTH - 1}) "
        f"WHEN 'key' THEN CASE WHEN position(':' in key) BETWEEN 2 AND {NAME_MAX} "
        "THEN split_part(key, ':', 1) || ':' ELSE '' END ELSE '' END AS name FROM k) "
        "SELECT "
        + _list(
            "SELECT kind, name, sum(scale)::int8 AS rows, sum(size * scale)::int8 AS bytes, "
            "coalesce(sum(scale) FILTER (WHERE dead), 0)::int8 AS expired FROM n "
            "GROUP BY GROUPING SETS ((kind), (kind, name)) "
            f"ORDER BY name IS NOT NULL, rows DESC, name LIMIT {4 * TOP}"
        )
        + "::text"
    )


def _locks(table: str) -> str:
    of = sampled(table, "key, value, version, updated_at, expires_at", LOCK_PAGES)
    return (
        f"WITH h AS MATERIALIZED (SELECT * FROM {of} s WHERE starts_with(key, $1) "
        f"AND expires_at > {NOW} AND expires_at < 'infinity') SELECT json_build_array("
        "(SELECT coalesce(sum(scale), 0)::int8 FROM h), (SELECT coalesce(json_agg(r), '[]') FROM ("
        "SELECT json_build_array(substr(key, length($1::text) + 1), encode(value, 'hex'), version, "
        f"{_seconds_since('updated_at')}, extract(epoch FROM expires_at - {NOW})::float8) AS r "
        f"FROM h ORDER BY updated_at LIMIT {TOP}) r))::text"
    )


def _tickets(table: str) -> str:
    return (
        "SELECT coalesce(json_agg(json_build_array(name, waiters)), '[]')::text FROM ("
        f"SELECT left(substr(key, length($1::text) + 1), {-MARK_LENGTH}) AS name, "
        f"sum(scale)::int8 AS waiters FROM {sampled(table, 'key, expires_at')} s "
        f"WHERE starts_with(key, $1) AND expires_at > {NOW} GROUP BY 1) t"
    )


def _counts(of: str, where: str, **counts: str) -> str:
    columns = ", ".join(
        f"coalesce(sum(scale) FILTER (WHERE {condition}), 0)::int8 AS {name}"
        for name, condition in counts.items()
    )
    return f"SELECT row_to_json(r)::text FROM (SELECT {columns} FROM {of} s WHERE {where}) r"


def _sessions(table: str) -> str:
    live = f"expires_at > {NOW} AND successor IS NULL"
    return _counts(
        sampled(table, "expires_at, user_id, successor"),
        "TRUE",
        live=live,
        with_user=f"{live} AND user_id IS NOT NULL",
        expired=f"expires_at <= {NOW}",
    )


def _idempotency(table: str) -> str:
    live = f"expires_at > {NOW}"
    return _counts(
        sampled(table, "key, expires_at, leased_until, result IS NULL AS unfinished"),
        "starts_with(key, $1)",
        done=f"{live} AND NOT unfinished",
        running=f"{live} AND unfinished AND leased_until > {NOW}",
        expired=f"expires_at <= {NOW}",
    )


def _jobs_sampled(table: str) -> str:
    states = ", ".join(
        f"coalesce(sum(scale) FILTER (WHERE state = '{state}'), 0)::int8 AS {state}"
        for state in STATES
    )
    return (
        f"SELECT queue, {states}, coalesce(max({_seconds_since('due_at')}) "
        "FILTER (WHERE state = 'waiting'), 0) AS oldest FROM (SELECT scale, queue, due_at, "
        f"{STATE} AS state FROM {sampled(table, 'queue, due_at, leased_until')} s "
        f"WHERE starts_with(queue, $1)) s GROUP BY queue ORDER BY sum(scale) DESC LIMIT {TOP}"
    )


def _jobs(table: str) -> str:
    # What is dead is few among many: it is counted in the index. So are the names found.
    dead = (
        "SELECT count(*) FROM generate_series(0, 9) p CROSS JOIN LATERAL (SELECT FROM "
        f"{table} j WHERE j.queue = q.queue AND priority = p::int2 AND due_at = 'infinity' "
        f"LIMIT {DEAD_MAX}) d"
    )
    return (
        f"WITH RECURSIVE n AS ((SELECT queue, 1 AS n FROM {table} WHERE queue >= $1 "
        f"ORDER BY queue LIMIT 1) UNION ALL SELECT (SELECT queue FROM {table} j "
        f"WHERE j.queue > n.queue ORDER BY queue LIMIT 1), n + 1 FROM n "
        f"WHERE queue IS NOT NULL AND n < {TOP}), s AS ({_jobs_sampled(table)}), "
        "q AS (SELECT queue FROM n WHERE starts_with(queue, $1) UNION SELECT queue FROM s) "
        f"SELECT q.queue, coalesce(waiting, 0) AS waiting, coalesce(delayed, 0) AS delayed, "
        f"coalesce(running, 0) AS running, coalesce(oldest, 0) AS oldest, ({dead}) AS dead "
        "FROM q LEFT JOIN s USING (queue)"
    )


def _queues(jobs: Callable[[str], str]) -> Callable[[str], str]:
    columns = (
        "substr(queue, length($1::text) + 1) AS queue, waiting, delayed, running, dead, oldest"
    )
    return lambda table: f"SELECT {_list(f'SELECT {columns} FROM ({jobs(table)}) j')}::text"


_HELD: Any = tuple[int, list[tuple[str, str, int, float, float]]]
_QUESTIONS: dict[str, tuple[Callable[[str], str], Any]] = {
    "store": (_store, list[Share]),
    "locks": (_locks, _HELD),
    "locks_unlogged": (_locks, _HELD),
    "tickets": (_tickets, list[tuple[str, int]]),
    "sessions": (_sessions, SessionCounts),
    "idempotency": (_idempotency, IdempotencyCounts),
    "jobs": (_queues(_jobs), list[QueueDepth]),
    "jobs_unlogged": (_queues(_jobs), list[QueueDepth]),
    "finished": (_queues(_jobs_sampled), list[QueueDepth]),
}
