"""Checks of the server and the connection to it."""

from __future__ import annotations

import select
import time
from datetime import UTC, datetime
from typing import Any

import psycopg
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row

from ...config import Pooler
from ...patterns.overview import HOLDS_BACK, OLD_TRANSACTION
from ...patterns.schema import tables
from .. import console
from .examine import Check, Context, Result, fail, ok, warn

OLDEST_MAJOR = 14
SLOT_AGE = 10_000_000  # transactions that a replication slot may hold back
CLOCK_SECONDS = 1.0
ANSWER_TIMEOUT = 3  # seconds for the answer of a second session


def server(context: Context) -> Result:
    """The server's version, and the database's encoding."""
    seen = context.row(
        "SELECT current_setting('server_version') AS v, current_database() AS d, "
        "current_setting('server_encoding') AS encoding, "
        "to_regclass('pg_catalog.pg_dist_local_group') IS NOT NULL AS citus"
    )
    detail = f"PostgreSQL {seen['v']}, database {seen['d']}"
    if context.version < OLDEST_MAJOR * 10_000:
        advice = f"upgrade: pgkv needs PostgreSQL {OLDEST_MAJOR} or newer"
        return fail(detail, advice)
    if seen["citus"]:
        group = context.row("SELECT groupid FROM pg_catalog.pg_dist_local_group")["groupid"]
        if group:
            advice = "connect to the coordinator: a table made here would be on this server alone"
            return fail(f"{detail}, a worker of a Citus cluster (group {group})", advice)
        found = context.row(
            "SELECT coalesce(string_agg(logicalrelid::regclass::text, ', '), '') AS tables "
            "FROM pg_catalog.pg_dist_partition WHERE partmethod <> 'n' AND logicalrelid = ANY ("
            "SELECT to_regclass(name) FROM unnest(%s::text[]) name)",
            [table.quoted for table in tables(context.config)],
        )["tables"]
        if found:
            advice = "pgkv's promises do not hold there: SELECT undistribute_table('...') for each"
            return fail(f"{detail}: Citus has distributed by key {found}", advice)
    if seen["encoding"] != "UTF8":
        detail += f", encoding {seen['encoding']}"
        advice = "keys with characters outside that encoding are refused: use a database in UTF8"
        return warn(detail, advice)
    return ok(detail)


def read_only(context: Context) -> Result:
    """Whether the server accepts writes."""
    seen = context.row(
        "SELECT pg_is_in_recovery() AS standby, "
        "current_setting('transaction_read_only') = 'on' AS read_only"
    )
    if seen["standby"]:
        advice = "give the primary's DSN (several hosts: target_session_attrs=read-write)"
        detail = "this is a standby: it accepts no writes, and UNLOGGED tables cannot be read on it"
        return fail(detail, advice)
    if seen["read_only"]:
        advice = (
            "find where default_transaction_read_only is set: ALTER ROLE, ALTER DATABASE, the "
            "DSN's options, or a provider's reaction to a full disk"
        )
        return fail("transactions are read-only", advice)
    return ok("the server accepts writes")


def pooler(context: Context) -> Result:
    """Whether the connection goes through a pooler such as PgBouncer, and in which mode."""
    told = context.config.pooler is Pooler.TRANSACTION
    advice = "set pooler=pgkv.Pooler.TRANSACTION (on the command line --pooler transaction)"
    if context.refuses_settings:
        return fail("a pooler is in between and refuses the settings of a session", advice)
    announced = context.conn.info.backend_pid
    pids = [_backend(context.conn) for _ in range(3)]
    if len(set(pids)) > 1 or _is_shared(context, pids[-1]):
        detail = "a pooler in transaction mode is in between: sessions share server processes"
        if not told:
            return fail(detail, advice)
        return ok(detail + ", as configured")
    if announced not in pids:
        # A pooler invents the process id (and key) with which its client can cancel.
        detail = "a pooler is in between; it was not seen to share server processes"
        if told:
            return ok(detail + ", configured for transaction mode")
        return warn(detail, "in session mode there is nothing to do; in transaction mode " + advice)
    if told:
        advice = "leave pooler at Pooler.NONE here: prepared statements are faster"
        return warn("a pooler is configured, but none was found", advice)
    return ok("a direct connection")


def _backend(conn: psycopg.Connection[dict[str, Any]]) -> int:
    row = conn.execute("SELECT pg_backend_pid() AS pid").fetchone()
    return int(row["pid"]) if row else 0


def _is_shared(context: Context, pid: int) -> bool:
    """Whether a second session is given the server process that served the first."""
    try:
        second = psycopg.connect(
            f"{context.conninfo} connect_timeout={ANSWER_TIMEOUT}",
            autocommit=True,
            prepare_threshold=None,
            row_factory=dict_row,
        )
    except psycopg.OperationalError:
        return False  # a pooler in session mode may have no server process to spare
    with second:
        return any(_soon(second) in (pid, _backend(context.conn)) for _ in range(3))


def _soon(conn: psycopg.Connection[dict[str, Any]]) -> int | None:
    """`_backend`, or None where a pooler in session mode has no server process to spare."""
    raw = conn.pgconn
    if raw.transaction_status != TransactionStatus.IDLE:
        return None
    raw.send_query(b"SELECT pg_backend_pid()")
    found = None
    while select.select([raw.socket], [], [], ANSWER_TIMEOUT)[0]:
        raw.consume_input()
        while not raw.is_busy():
            result = raw.get_result()
            if result is None:
                return found
            found = int(result.get_value(0, 0) or 0) if result.ntuples else None
    return None


def pool(context: Context) -> Result:
    """Whether the server has room for the store's connections."""
    seen = context.row(
        "SELECT current_setting('max_connections')::int"
        " - current_setting('superuser_reserved_connections')::int"
        " - coalesce(current_setting('reserved_connections', true), '0')::int AS slots, "
        "(SELECT coalesce(sum(numbackends), 0)::int FROM pg_stat_database) AS used, "
        "(SELECT rolconnlimit FROM pg_roles WHERE rolname = current_user) AS role_limit, "
        "(SELECT datconnlimit FROM pg_database WHERE datname = current_database()) AS db_limit, "
        "current_setting('idle_session_timeout') AS idle"
    )
    most = context.config.pool_max_size
    limits = [n for n in (seen["role_limit"], seen["db_limit"]) if n is not None and n >= 0]
    ceiling = min([seen["slots"], *limits])
    free = ceiling - seen["used"]
    detail = (
        f"pool_max_size {most}, {seen['used']} of {console.count(ceiling, 'connection')} in use"
    )
    if most > ceiling:
        advice = (
            f"lower pool_max_size below {ceiling}, or raise max_connections (or the role's limit)"
        )
        return fail(detail, advice)
    if most > free:
        advice = (
            "processes x pool_max_size must stay below the server's limit: lower pool_max_size "
            "(two per server core serve most loads), or put a pooler in front"
        )
        return warn(detail, advice)
    if seen["idle"] != "0":
        advice = "ALTER ROLE ... SET idle_session_timeout = 0, so that the store need not reconnect"
        return warn(f"{detail}, idle sessions end after {seen['idle']}", advice)
    return ok(detail)


def clock(context: Context) -> Result:
    """The difference between this machine's clock and the server's. Only the server's decides expiry."""
    best, offset = float("inf"), 0.0
    for _ in range(3):
        asked, ticks = datetime.now(UTC), time.monotonic()
        answer = context.row("SELECT clock_timestamp() AS now")["now"]
        trip = time.monotonic() - ticks
        if trip < best:
            best, offset = trip, (answer - asked).total_seconds() - trip / 2
    way = "ahead of" if offset >= 0 else "behind"
    detail = f"the server is {console.duration(abs(offset))} {way} this machine (give or take {console.duration(best / 2)})"
    if abs(offset) - best / 2 > CLOCK_SECONDS:
        advice = (
            "run NTP on both. A ttl is not affected (only the server's clock counts); times "
            "computed here for expire_at() or expires_at= are wrong by this difference"
        )
        return warn(detail, advice)
    return ok(detail)


def transactions(context: Context) -> Result:
    """The oldest snapshot. Rows that died after it cannot be reclaimed."""
    oldest = context.row(
        "SELECT pid, state, extract(epoch FROM clock_timestamp() - xact_start)::float8 AS age "
        f"FROM pg_stat_activity WHERE xact_start IS NOT NULL AND {HOLDS_BACK} "
        "ORDER BY xact_start LIMIT 1"
    )
    others = context.row(
        "SELECT (SELECT extract(epoch FROM clock_timestamp() - min(prepared))::float8 "
        "FROM pg_prepared_xacts) AS prepared, "
        "(SELECT max(age(xmin)) FROM pg_replication_slots) AS slot_age, "
        "(SELECT count(*)::int FROM pg_stat_activity WHERE backend_type IS NULL "
        "OR query = '<insufficient privilege>') AS hidden"
    )
    unseen = others["hidden"]
    limit = (
        f" ({console.count(unseen, 'session')} of other roles hidden; GRANT pg_read_all_stats shows them)"
        if unseen
        else ""
    )
    age = oldest.get("age") or 0.0
    if others["prepared"] is not None and others["prepared"] > max(age, OLD_TRANSACTION):
        detail = f"a prepared transaction is {console.duration(others['prepared'])} old"
        return warn(detail, "COMMIT PREPARED or ROLLBACK PREPARED it (pg_prepared_xacts)")
    if age > OLD_TRANSACTION:
        detail = f"process {oldest['pid']} ({oldest['state']}) has a transaction open for {console.duration(age)}"
        advice = (
            "rows that died since cannot be reclaimed, and updates slow down. End it: "
            f"SELECT pg_terminate_backend({oldest['pid']}); to prevent it: "
            "idle_in_transaction_session_timeout"
        )
        return warn(detail + limit, advice)
    if (others["slot_age"] or 0) > SLOT_AGE:
        detail = f"a replication slot holds back {others['slot_age']:,} transactions"
        return warn(detail, "drop the slot if its standby is gone (pg_replication_slots)")
    detail = f"the oldest is {console.duration(age)} old" if oldest else "no transaction is open"
    return ok(detail + limit)


CHECKS: dict[str, Check] = {
    "server": server,
    "writes": read_only,
    "pooler": pooler,
    "pool": pool,
    "clock": clock,
    "oldest transaction": transactions,
}
