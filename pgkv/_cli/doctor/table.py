"""Checks of the table. Those that read rows sample a large table."""

from __future__ import annotations

from collections import Counter
from typing import Any

import psycopg

from ..._engine.schema import _EXPECTED, companion
from ..._sql.evict import ROW_SIZE
from ..._sql.sample import sampled
from ...config import TableType, quote_identifier
from ...patterns.lock.sql import LOCKS, LOCKS_UNLOGGED
from ...patterns.overview import DEAD_ROWS, DEAD_SHARE, HOT_RATIO, HOT_UPDATES, OVER
from ...transforms import applied
from .. import console
from .examine import Check, Context, Result, fail, ok, warn

SAMPLED_PAGES = 2048  # 16 MB
EXPIRED_SHARE, EXPIRED_ROWS = 0.25, 1000


def describe(context: Context) -> dict[str, Any]:
    """Return what the catalogue and the statistics have about the table; nothing without one."""
    query = (
        "SELECT c.relkind::text, c.relpersistence::text, c.reltuples::float8, "
        "c.relpages, c.relnamespace::regnamespace::text AS schema, c.reloptions, "
        "pg_get_userbyid(c.relowner) AS owner, "
        "pg_has_role(current_user, c.relowner, 'USAGE') AS owned, "
        "(SELECT coalesce(json_object_agg(attname, format_type(atttypid, NULL)), '{}') FROM pg_attribute "
        "WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped) AS columns, "
        "EXISTS (SELECT FROM pg_index WHERE indrelid = c.oid AND indisunique AND indisvalid "
        "AND indpred IS NULL AND indnkeyatts = 1 AND indkey[0] = k.attnum) AS unique, "
        "(SELECT collname::text FROM pg_collation WHERE oid = k.attcollation) AS collation, "
        "coalesce(n_tup_upd, 0) AS updated, coalesce(n_tup_hot_upd, 0) AS hot, "
        "coalesce(n_live_tup, 0) AS live, coalesce(n_dead_tup, 0) AS dead, "
        "extract(epoch FROM clock_timestamp() - greatest(last_vacuum, last_autovacuum))::float8 "
        "AS since_vacuum, current_setting('autovacuum') AS autovacuum "
        "FROM pg_class c LEFT JOIN pg_stat_all_tables s ON s.relid = c.oid "
        "LEFT JOIN pg_attribute k ON k.attrelid = c.oid AND k.attname = 'key' "
        "WHERE c.oid = to_regclass(%s)"
    )
    try:
        return context.row(query, context.name)
    except psycopg.Error:
        return {}  # to_regclass refuses a schema that the role may not use: `missing` says so


def missing(context: Context) -> Result:
    """What to do about a table that does not exist."""
    if context.facts:
        kinds = {"v": "a view", "m": "a materialized view", "f": "a foreign table", "S": "a sequence",
                 "i": "an index", "c": "a type"}  # fmt: skip
        what = kinds.get(context.facts["relkind"], "something else")
        return fail(f"{context.name} is {what}", "choose another table name")
    wanted = context.config.schema
    seen = context.row(
        "SELECT coalesce(%s::text, current_schema()) AS schema, "
        "has_database_privilege(current_database(), 'CREATE') AS may_schema, current_user AS role",
        wanted,
    )
    name = seen["schema"]
    there = name and context.row("SELECT 1 AS x FROM pg_namespace WHERE nspname = %s", name)
    role = quote_identifier(seen["role"])
    ddl = "create it as another role with the DDL of `pgkv schema`"
    if not name:
        advice = "name a schema that exists (schema=..., --schema), or correct search_path"
        return fail("search_path names no schema that exists", advice)
    if not there:
        detail = f"the schema {name} does not exist"
        if seen["may_schema"]:
            return _unless_named(context, detail, "the first write creates it, with the table")
        return fail(detail, f"{ddl}, and GRANT USAGE on the schema to {role}")
    rights = context.row(
        "SELECT has_schema_privilege(%s, 'USAGE') AS usage, has_schema_privilege(%s, 'CREATE') AS make",
        name,
        name,
    )
    quoted = quote_identifier(name)
    if not rights["usage"]:
        advice = f"as its owner: GRANT USAGE ON SCHEMA {quoted} TO {role}"
        return fail(f"the role cannot use the schema {name}", advice)
    detail = f"{context.name} does not exist in {name}"
    if rights["make"]:
        advice = "the first write creates it; or run the DDL of `pgkv schema`"
        return _unless_named(context, detail, advice)
    advice = f"as the schema's owner: GRANT CREATE ON SCHEMA {quoted} TO {role}; or {ddl}"
    return fail(f"{detail}, and the role cannot create it", advice)


def _unless_named(context: Context, detail: str, advice: str) -> Result:
    """A warning, but a failure if the user named what does not exist: it may be mistyped."""
    if context.named:
        return fail(detail, f"check the name; if it is right, {advice}")
    return warn(detail, advice)


def table(context: Context) -> Result:
    """The table, and whether its rows survive a crash of the server."""
    facts = context.facts
    name = f"{facts['schema']}.{context.name}" if context.config.schema is None else context.name
    unlogged = facts["relpersistence"] == "u"
    if facts["relkind"] == "p":
        return warn(f"{name} is partitioned", "pgkv does not sweep partitions")
    if unlogged:
        return ok(f"{name}, UNLOGGED: fast, emptied by a crash of the server")
    if context.config.table_type is TableType.UNLOGGED:
        return ok(f"{name}, logged: survives a crash (writes cost more)")
    return ok(f"{name}, logged: survives a crash")


def columns(context: Context) -> Result:
    """Whether the columns are those of pgkv."""
    found = context.facts["columns"]
    wrong = [
        f"{name} is {found.get(name, 'missing')}"
        for name, types in _EXPECTED.items()
        if found.get(name) not in types and not (name == "version" and name not in found)
    ]
    if wrong:
        return fail("; ".join(wrong), "this is not a table of pgkv: choose another table name")
    if "version" not in found:
        detail = "no column version: the table was made by another client (the Rust crate pgkv)"
        if context.facts["owned"]:
            return warn(detail, "store.create_table() adds it, without a rewrite")
        advice = (
            f"as the owner ({context.facts['owner']}): ALTER TABLE {context.name} "
            "ADD COLUMN version BIGINT NOT NULL DEFAULT 1"
        )
        return fail(detail, advice)
    return ok(f"{len(_EXPECTED)} as expected")


def key_index(context: Context) -> Result:
    """Whether keys are unique: ON CONFLICT (key) needs that."""
    if not context.facts["unique"]:
        return fail(
            "no unique index on key: no write can work",
            f"ALTER TABLE {context.name} ADD PRIMARY KEY (key)",
        )
    return ok("the key is unique")


def lock_tables(context: Context) -> Result | None:
    """Lock tables of an early version have an index that makes them grow with every grant."""
    found = context.rows(
        "SELECT conrelid::regclass::text AS table, quote_ident(conname) AS name FROM pg_constraint "
        "WHERE contype = 'u' AND conrelid IN (to_regclass(%s), to_regclass(%s)) ORDER BY 1",
        *(companion(context.config, shape).quoted for shape in (LOCKS, LOCKS_UNLOGGED)),
    )
    if not found:
        return None
    drops = "; ".join(f"ALTER TABLE {row['table']} DROP CONSTRAINT {row['name']}" for row in found)
    detail = f"{', '.join(row['table'] for row in found)}: UNIQUE (key, version) is not needed"
    return warn(f"{detail}, and every grant writes to its index", drops)


def collation(context: Context) -> Result:
    """Whether scans by prefix can use the key's index."""
    found = context.facts["collation"]
    if found == "C":
        return ok('"C": scans use the index')
    name = "the database's" if found == "default" else f'"{found}"'
    advice = (
        "at a quiet time (it locks the table and rebuilds its index): "
        f'ALTER TABLE {context.name} ALTER COLUMN key TYPE text COLLATE "C"'
    )
    detail = f"{name}: results are correct, but scans by prefix read the whole table"
    if context.version >= 150000 and found == "default":
        version = context.row(
            "SELECT datcollversion AS made, pg_database_collation_actual_version(oid) AS now "
            "FROM pg_database WHERE datname = current_database()"
        )
        if version["made"] != version["now"]:
            detail += f"; its library changed from {version['made']} to {version['now']}"
            advice = (
                f"at once: REINDEX TABLE {context.name} (an index in an old order misses keys); "
                + advice
            )
            return fail(detail, advice)
    return warn(detail, advice)


def rights(context: Context) -> Result:
    """The role's rights on the table."""
    seen = context.row(
        "SELECT current_user AS role, row_security_active(t) AS filtered, "
        "(SELECT string_agg(r, ', ') FROM unnest('{SELECT,INSERT,UPDATE,DELETE}'::text[]) r "
        "WHERE NOT has_table_privilege(t, r)) AS lacking FROM to_regclass(%s) t",
        context.name,
    )
    if seen["lacking"]:
        role = quote_identifier(seen["role"])
        return fail(
            f"the role {seen['role']} lacks {seen['lacking']}",
            f"as the table's owner: GRANT {seen['lacking']} ON {context.name} TO {role}",
        )
    if seen["filtered"]:
        detail = (
            f"row-level security applies to the role {seen['role']}: policies hide and refuse rows"
        )
        advice = f"as the table's owner: ALTER TABLE {context.name} DISABLE ROW LEVEL SECURITY"
        return warn(detail, advice)
    if not context.facts["owned"]:
        return ok(
            "reads and writes; truncate(), vacuum() and recreate_table() need the table's owner"
        )
    return ok("all: the role owns the table")


def owner_and_triggers(context: Context) -> Result:
    """Whether other roles can run code here: a trigger runs with the rights of the role that writes,
    and a table found through search_path may have been created by any role."""
    seen = context.row(
        "SELECT (r.rolsuper OR d.datdba = c.relowner OR pg_has_role(c.relowner, 'MEMBER')) AS known, "
        "ARRAY(SELECT quote_ident(tgname) FROM pg_trigger WHERE tgrelid = c.oid "
        "AND NOT tgisinternal AND tgname <> 'pgkv_fence' ORDER BY 1) AS triggers "
        "FROM pg_class c JOIN pg_roles r ON r.oid = c.relowner, pg_database d "
        "WHERE c.oid = to_regclass(%s) AND d.datname = current_database()",
        context.name,
    )
    owner, schema = context.facts["owner"], context.facts["schema"]
    if seen["triggers"]:
        names = ", ".join(seen["triggers"])
        drop = "; ".join(f"DROP TRIGGER {name} ON {context.name}" for name in seen["triggers"])
        detail = f"the table has triggers, which run with your rights: {names} (owner: {owner})"
        return warn(detail, f"if they are not yours: {drop}")
    if context.config.schema is None and not seen["known"]:
        detail = (
            f"the table was found through search_path; its owner {owner} is not one of your roles"
        )
        advice = (
            "if you trust that role, name the schema (schema=..., --schema); if not, it may have "
            f"created the table there: REVOKE CREATE ON SCHEMA {schema} FROM it, or from PUBLIC"
        )
        return warn(detail, advice)
    return ok(f"owned by {owner}, no triggers")


def indexes(context: Context) -> Result:
    """Indexes on other columns than the key: each update has to write to them."""
    found = context.rows(
        "SELECT DISTINCT i.indexrelid::regclass::text AS index, "
        "array_agg(DISTINCT a.attname::text) AS columns FROM pg_index i "
        "JOIN pg_depend d ON d.classid = 'pg_class'::regclass AND d.objid = i.indexrelid "
        "AND d.refclassid = 'pg_class'::regclass AND d.refobjid = i.indrelid "
        "JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = d.refobjsubid "
        "WHERE i.indrelid = to_regclass(%s) AND a.attname NOT IN ('key', 'created_at') "
        "GROUP BY 1 ORDER BY 1",
        context.name,
    )
    if found:
        names = "; ".join(f"{row['index']} on {', '.join(row['columns'])}" for row in found)
        drop = "; ".join(f"DROP INDEX CONCURRENTLY {row['index']}" for row in found)
        advice = f"pgkv does not need it: {drop} (a Rust client creates it again)"
        return warn(f"{names}: no update can be heap-only", advice)
    return ok("no index slows down updates")


def hot_updates(context: Context) -> Result:
    """The share of updates that wrote to no index."""
    count = context.facts["updated"]
    if count < HOT_UPDATES:
        return ok(f"{console.count(count, 'update')} so far, too few for a ratio")
    ratio = context.facts["hot"] / count
    detail = f"{ratio:.1%} of {console.count(count, 'update')}"
    if ratio < HOT_RATIO:
        fill = int(_option(context.facts, "fillfactor", "100"))
        advice = (
            "if an index or an old transaction is reported above, that is the cause; else leave more "
            f"room on the pages (fillfactor is {fill}): ALTER TABLE {context.name} SET (fillfactor = "
            f"{max(fill - 20, 40)}), then VACUUM FULL {context.name}"
        )
        return warn(detail, advice)
    return ok(detail)


def dead_rows(context: Context) -> Result:
    """Dead row versions that vacuum has not removed yet."""
    live, dead, since = (context.facts[name] for name in ("live", "dead", "since_vacuum"))
    when = "not vacuumed yet" if since is None else f"vacuumed {console.duration(since)} ago"
    detail = f"{live:,} live, {dead:,} dead (estimates), {when}"
    own = _option(context.facts, "autovacuum_enabled", "true")
    if context.facts["autovacuum"] == "off" or own in ("false", "off"):
        advice = f"turn autovacuum on again: ALTER TABLE {context.name} RESET (autovacuum_enabled), autovacuum = on"
        return warn(f"{detail}, autovacuum is off", advice)
    # A new table waits for autovacuum's first round: until then much can be dead.
    enough = 10 * DEAD_ROWS if since is None else DEAD_ROWS
    if dead > enough and dead > DEAD_SHARE * (dead + live):
        advice = f"VACUUM {context.name}; if they return, look for old transactions (see above)"
        return warn(detail, advice)
    return ok(detail)


def _of_a_sample(seen: dict[str, Any]) -> str:
    return " (a sample)" if seen["scale"] > 1 else ""


def expired_rows(context: Context) -> Result:
    """Expired rows that have not been collected."""
    seen = context.row(
        "SELECT count(*) AS n, count(*) FILTER (WHERE expires_at <= statement_timestamp()) "
        "AS expired, coalesce(max(scale), 1) AS scale "
        f"FROM {sampled(context.name, 'expires_at', SAMPLED_PAGES)} s"
    )
    share = seen["expired"] / seen["n"] if seen["n"] else 0.0
    detail = f"{share:.1%} of {console.count(seen['n'], 'row')}" + _of_a_sample(seen)
    if share > EXPIRED_SHARE and seen["n"] >= EXPIRED_ROWS:
        advice = (
            "run `pgkv sweep`; if they return: ttl_cleanup_strategy=BACKGROUND, or `pgkv sweep` "
            "from cron"
        )
        return warn(detail, advice)
    return ok(detail)


def bound(context: Context) -> Result | None:
    """Whether a table with a bound is within it."""
    config = context.config
    if not config.bounded:
        return None
    if "used_at" not in context.facts["columns"]:
        detail = "no column used_at: the table was made without a bound"
        if context.facts["owned"]:
            return ok("made without a bound: the first eviction adds the column used_at")
        alter = f"ALTER TABLE {context.name} ADD COLUMN used_at TIMESTAMPTZ"
        return fail(detail, f"as the owner ({context.facts['owner']}): {alter}")
    seen = context.row(
        "SELECT count(*) AS n, coalesce(sum(size), 0)::int8 AS size, count(used_at) AS marked, "
        "coalesce(max(scale), 1) AS scale "
        f"FROM {sampled(context.name, f'{ROW_SIZE} AS size, used_at', SAMPLED_PAGES)} s"
    )
    rows, size = round(seen["n"] * seen["scale"]), round(seen["size"] * seen["scale"])
    of = [
        (f"{rows:,} of {config.max_entries:,} keys", rows, config.max_entries),
        (f"{console.size(size)} of {console.size(config.max_bytes or 0)}", size, config.max_bytes),
    ]
    detail = ", ".join(text for text, _, most in of if most) + _of_a_sample(seen)
    if seen["n"]:
        detail += f", {seen['marked'] / seen['n']:.0%} were read since they were written"
    if any(most and have > OVER * most for _, have, most in of):
        advice = (
            "run `pgkv evict`; if it returns, no process that writes has this bound, or all have "
            "ttl_cleanup_strategy=MANUAL, or rows that limiters and cached functions need fill it"
        )
        return warn(detail, advice)
    return ok(detail)


def transforms(context: Context) -> Result | None:
    """Which transforms the values were stored with, and so which encryption keys are in use."""
    forms = context.rows(
        "SELECT form, count(*) AS n FROM "
        f"{sampled(context.name, 'substring(value from 1 for 6) AS form', SAMPLED_PAGES)} s "
        "GROUP BY 1"
    )
    counts: Counter[tuple[str, ...]] = Counter()
    for row in forms:
        counts[applied(bytes(row["form"]))] += row["n"]
    if not counts.keys() - {()}:
        return None
    detail = ", ".join(f"{n:,} {' + '.join(form) or 'plain'}" for form, n in counts.most_common())
    keys = {each for form in counts for each in form if each.startswith("aes:")}
    if len(keys) > 1:
        return warn(
            f"{detail}, of a sample", "run `pgkv rewrite`, and remove a key of which no row is left"
        )
    return ok(f"{detail}, of a sample")


def emptied(context: Context) -> Result | None:
    """Whether a crash of the server emptied the UNLOGGED table.

    The server keeps no record of that. But a crash empties the file and leaves the catalogue as the
    last vacuum or analyze wrote it; everything else that shrinks a table (vacuum, TRUNCATE) corrects
    both.
    """
    facts = context.facts
    if facts["relpersistence"] != "u":
        return None
    pages = context.row(
        "SELECT pg_relation_size(to_regclass(%s)) / current_setting('block_size')::int8 AS n",
        context.name,
    )["n"]
    if facts["reltuples"] > 0 and facts["relpages"] > pages:
        detail = (
            "very likely yes: when last vacuumed or analyzed it had about "
            f"{console.count(round(facts['reltuples']), 'row')} on "
            f"{console.count(facts['relpages'], 'page')}, now it has {console.count(pages, 'page')}"
        )
        advice = (
            "load the data again; data that must survive a crash belongs in a table of "
            "table_type=TableType.REGULAR. The server's log has the time and cause of the crash"
        )
        return warn(detail, advice)
    if facts["relpages"] == 0 or facts["reltuples"] < 0:
        return ok("no sign of a crash (shown from the first vacuum or analyze on)")
    return ok("no sign of a crash since the last vacuum or analyze")


def _option(facts: dict[str, Any], name: str, default: str) -> str:
    for option in facts["reloptions"] or ():
        found, _, value = option.partition("=")
        if found == name:
            return str(value)
    return default


CHECKS: dict[str, Check] = {
    "table": table,
    "columns": columns,
    "unique key": key_index,
    "lock tables": lock_tables,
    "key's collation": collation,
    "rights": rights,
    "owner and triggers": owner_and_triggers,
    "index on expires_at": indexes,
    "heap-only updates": hot_updates,
    "dead rows": dead_rows,
    "expired rows": expired_rows,
    "bound": bound,
    "transforms": transforms,
    "emptied by a crash": emptied,
}
