"""The commands about a whole table: ``stats``, ``sweep``, ``evict``, ``rewrite``, ``schema``, ``migrate``."""

from __future__ import annotations

from dataclasses import asdict

import typer

from .._engine.schema import change, changes
from .._engine.sweep import sweep_all
from ..config import TableType
from . import console
from .command import (
    DONE,
    MAX_BYTES,
    MAX_ENTRIES,
    NOT_FOUND,
    PREFIX,
    Invocation,
    argument,
    flag,
    load_object,
    option,
)


def stats(call: Invocation) -> int:
    """Show the size of the table and its health. Reads the whole table.

    **Example:** `pgkv stats --json`
    """
    with call.store() as store:
        found = store.stats()
        title = store._config.table.quoted
    if call.json:
        console.say_json(asdict(found))
        return DONE
    ratio = found.hot_update_ratio
    share = f" ({found.expired_keys / found.total_keys:.0%})" if found.total_keys else ""
    pairs = {
        "keys": f"{found.total_keys:,}",
        "expired, not yet collected": f"{found.expired_keys:,}{share}",
        "values": console.size(found.total_value_bytes),
        "average value": console.size(found.avg_value_bytes),
        "largest value": console.size(found.max_value_bytes),
        "table on disk": console.size(found.table_size_bytes),
        "indexes on disk": console.size(found.index_size_bytes),
        "dead row versions": f"{found.dead_tuples:,}",
        "heap-only updates": "no updates yet" if ratio is None else f"{ratio:.1%}",
    }
    console.show_table(("", ""), pairs.items(), title=title)
    return DONE


def sweep(
    call: Invocation,
    limit: int | None = option("--limit -l N", "Stop after N rows.", min=1),
) -> int:
    """Delete expired rows in short steps that block no other client.

    Run it from cron with ttl_cleanup_strategy MANUAL. The other strategies need no command.
    It processes the whole table, also with --namespace.

    **Example:** `pgkv sweep`

    **Example:** `pgkv sweep --table kv_store_sessions`
    """
    with call.store() as store, console.progress(quiet=call.json) as bar:
        task = bar.add_task("pages", total=None)
        removed = store._run(
            sweep_all(
                store._sql, limit, lambda done, total: bar.update(task, completed=done, total=total)
            )
        )
    return call.answer({"deleted": removed}, f"deleted {console.count(removed, 'expired row')}")


def evict(
    call: Invocation,
    max_entries: int | None = MAX_ENTRIES,
    max_bytes: int | None = MAX_BYTES,
) -> int:
    """Delete the oldest keys of a cache until it is within a bound.

    Rows that rate limiters and cached functions need are kept. It processes the whole table, also
    with --namespace.

    **Example:** `pgkv evict --table cache --max-entries 100000`
    """
    if max_entries is None and max_bytes is None:
        raise typer.BadParameter("give --max-entries or --max-bytes")
    with call.store(max_entries=max_entries, max_bytes=max_bytes) as store:
        removed = store.evict()
    return call.answer({"deleted": removed}, f"evicted {console.count(removed, 'key')}")


def rewrite(
    call: Invocation,
    transforms: str = argument("MODULE:NAME", "The list of transforms in your program."),
    prefix: str = PREFIX,
) -> int:
    """Bring stored values to the present transforms, after a new encryption key was put first.

    The module is found from the working directory. Programs may go on reading and writing. A call
    that was interrupted can be repeated.

    **Example:** `pgkv rewrite app.settings:TRANSFORMS --table secrets`
    """
    steps = load_object(transforms, "MODULE:NAME, such as app.settings:TRANSFORMS")
    with call.store(transforms=steps) as store, console.progress(quiet=call.json) as bar:
        task = bar.add_task("values", total=None)
        count = store.rewrite(prefix, progress=lambda done: bar.update(task, completed=done))
    return call.answer({"rewritten": count}, f"rewrote {console.count(count, 'value')}")


def schema(
    call: Invocation,
    regular: bool = flag("--regular", "A logged table, which survives a server crash."),
    locks: bool = flag("--locks/--no-locks", "With the tables of locks.", True),
    sessions: bool = flag("--sessions/--no-sessions", "With the table of sessions.", True),
    idempotency: bool = flag(
        "--idempotency/--no-idempotency", "With the table of idempotency keys.", True
    ),
    queues: bool = flag("--queues/--no-queues", "With the tables of queues.", True),
    watch: bool = flag("--watch", "With triggers that tell watchers of every writer."),
) -> int:
    """Print the DDL of the tables, for a migration tool. Needs no server.

    With auto_create_table=False this DDL is all that is needed. It can be run more than once.

    **Example:** `pgkv schema --table cache | psql "$PGKV_DSN"`
    """
    from .._watch.api import watch_sql
    from ..patterns.schema import schema_sql

    named = Invocation(dsn=call.dsn or "postgresql://", table=call.table, schema=call.schema)
    kind = TableType.REGULAR if regular else TableType.UNLOGGED
    sql = schema_sql(
        named.config(table_type=kind), locks=locks, sessions=sessions, idempotency=idempotency,
        queues=queues,
    )  # fmt: skip
    if watch:
        sql += "\n" + watch_sql(named.config())
    if call.json:
        console.say_json({"sql": sql})
    else:
        console.write(sql.encode())
    return DONE


def migrate(
    call: Invocation,
    dry_run: bool = flag("--dry-run", "Print the SQL. Exit code 1 if there is any."),
) -> int:
    """Bring the tables of an earlier version up to this one. Programs of both may run meanwhile.

    Tables that do not exist are left to the first write, or to `pgkv schema`.

    **Example:** `pgkv migrate --dry-run`
    """
    from ..patterns.schema import tables

    with call.store() as store:
        found = {table: store._run(changes(table)) for table in tables(store._config)}
        found = {table: commands for table, commands in found.items() if commands}
        for table, commands in () if dry_run else found.items():
            store._run(change(table, commands))
    text = "\n".join(found.values()) or "nothing to do"
    call.answer({"sql": list(found.values()), "done": not dry_run}, text)
    return NOT_FOUND if dry_run and found else DONE
