"""`cli.py` is the ``pgkv`` command: thin functions over `Store`.

A command is a function whose first parameter is a `Call` and which returns its exit code;
`register` gives it the options that all of them take, before or after the command's name.
Exit codes: 0 done, 1 not found or not done, 2 wrong usage, 3 the store is unavailable. Errors are
one line on standard error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import islice
from typing import Annotated, Any, TypeAlias

import typer

from ._cli import cache as _cache_command
from ._cli import console
from ._cli import locks as _cli_locks
from ._cli.command import DONE, NOT_FOUND, Call, Seconds, app, duration, main, register
from ._engine.sweep import sweep_all
from .config import Pooler, TableType
from .errors import NotFoundError
from .patterns.schema import schema_sql

TERMINAL_LIMIT = 100  # rows of a scan on a terminal, unless --limit says otherwise
PAGE_KEYS, PAGE_ITEMS = 5000, 500  # rows fetched at a time: values may be large

Key: TypeAlias = Annotated[str, typer.Argument(metavar="KEY", help="The key.")]


def get(call: Call, key: Key) -> int:
    """Write a key's value to standard output, byte for byte.

    With --json also its version and times; a value that is not UTF-8 comes in base64. Exit code 1:
    there is no such key.

    **Example:** `pgkv get user:1 > user.bin`
    """
    with call.store() as store:
        if call.json:
            entry = store.get_entry(key)
            if entry is None:
                raise NotFoundError(f"no such key: {key!r}")
            ends = entry.expires_at
            console.say_json(
                {
                    "key": key,
                    **console.json_value(entry.value),
                    "version": entry.version,
                    "ttl": None if ends is None else round(entry.ttl(), 3),
                    "expires_at": None if ends is None else ends.isoformat(),
                    "created_at": entry.created_at.isoformat(),
                    "updated_at": entry.updated_at.isoformat(),
                }
            )
            return DONE
        value = store.get_or_raise(key)
    sys.stdout.flush()
    sys.stdout.buffer.write(value)
    if console.on_terminal() and not value.endswith(b"\n"):
        console.say("")  # for the prompt; a pipe gets nothing but the value
    return DONE


def set_(
    call: Call,
    key: Key,
    value: Annotated[
        str, typer.Argument(metavar="VALUE", help="The value; - reads standard input, as bytes.")
    ],
    ttl: Annotated[
        Seconds,
        typer.Option("--ttl", metavar="TIME", parser=duration,
                     help="Let it end after so long: 90 (seconds), 15m, 1h30m, 7d."),
    ] = None,
    keep_ttl: Annotated[bool, typer.Option("--keep-ttl", help="Leave its expiry as it is.")] = False,
    nx: Annotated[bool, typer.Option("--nx", help="Only if there is no such key.")] = False,
    xx: Annotated[bool, typer.Option("--xx", help="Only if the key exists.")] = False,
    if_version: Annotated[
        int | None,
        typer.Option("--if-version", metavar="N", min=0,
                     help="Only if the key has this version (see get --json); 0: if absent."),
    ] = None,
) -> int:  # fmt: skip
    """Write a value. Without --ttl an earlier expiry is cleared.

    Exit code 1: the condition did not hold, and nothing was written. A value that begins with a
    dash goes after --.

    **Example:** `pgkv set greeting hello --ttl 15m`

    **Example:** `tar c src | pgkv set backup -`

    **Example:** `pgkv set balance -- -5`
    """
    if nx + xx + (if_version is not None) > 1:
        raise typer.BadParameter("give at most one of --nx, --xx and --if-version")
    if keep_ttl and (nx or xx or ttl is not None):
        raise typer.BadParameter("--keep-ttl does not go with --ttl, --nx and --xx")
    data = sys.stdin.buffer.read() if value == "-" else os.fsencode(value)
    new: int | None = None
    with call.store(create=True) as store:
        if nx:
            written = store.set_nx(key, data, ttl=ttl)
        elif xx:
            written = store.set_xx(key, data, ttl=ttl)
        else:
            new = store.set(key, data, ttl=ttl, keep_ttl=keep_ttl, if_version=if_version)
            written = new is not None
    if call.json:
        console.say_json({"key": key, "written": written, "version": new})
    elif not written:
        why = "exists" if nx else "does not exist" if xx else "has another version"
        console.fail("", f"not written: the key {key!r} {why}", as_json=False)
    return DONE if written else NOT_FOUND


def delete(
    call: Call,
    keys: Annotated[list[str] | None, typer.Argument(metavar="KEY", help="The keys.")] = None,
    prefix: Annotated[
        str | None,
        typer.Option("--prefix", "-p", metavar="TEXT", help="Every key that begins with this."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> int:
    """Remove one key, several, or all with a prefix.

    Asks first when it is more than one key, unless --yes is given. Exit code 1: nothing was there.

    **Example:** `pgkv delete user:1`

    **Example:** `pgkv delete --prefix session: --yes`
    """
    if bool(keys) == (prefix is not None):
        raise typer.BadParameter("give keys, or --prefix")
    many = list(dict.fromkeys(keys or ()))
    with call.store() as store:
        if prefix is not None:
            what = f"begin with {prefix!r}" if prefix else "there are"
            _confirm(yes, lambda: f"Remove all {store.count(prefix):,} keys that {what}?")
            count = store.delete_prefix(prefix)
        else:
            _confirm(yes or len(many) == 1, lambda: f"Remove {len(many)} keys?")
            count = store.delete_many(many)
    if call.json:
        console.say_json({"deleted": count})
    elif prefix is not None or len(many) > 1:
        console.say(f"deleted {count:,}")
    elif not count:
        console.fail("", f"no such key: {many[0]!r}", as_json=False)
    return DONE if count else NOT_FOUND


def _confirm(given: bool, question: Callable[[], str]) -> None:
    if given:
        return
    if not sys.stdin.isatty():
        raise typer.BadParameter("this removes more than one key: confirm with --yes")
    if not typer.confirm(question(), err=True):
        raise typer.Exit(NOT_FOUND)


def scan(
    call: Call,
    prefix: Annotated[
        str, typer.Option("--prefix", "-p", metavar="TEXT", help="Keys that begin with this.")
    ] = "",
    limit: Annotated[
        int | None,
        typer.Option("--limit", "-l", metavar="N", min=0,
                     help=f"At most so many; 0: all. Default: all, on a terminal {TERMINAL_LIMIT}."),
    ] = None,
    values: Annotated[
        bool, typer.Option("--values/--keys", help="Keys and values, or keys alone.")
    ] = True,
) -> int:  # fmt: skip
    r"""List keys and values in the order of the keys' bytes.

    On a terminal a table; in a pipe lines of key, tab, value, in which `\n`, `\t`, `\\` and `\xHH`
    stand for what would break a line; with --json one object a line. Memory stays constant.

    **Example:** `pgkv scan --prefix user: --limit 20`

    **Example:** `pgkv scan --keys | wc -l`
    """
    people = console.on_terminal() and not call.json
    most = TERMINAL_LIMIT if limit is None and people else limit or None
    with call.store() as store:
        found: Iterator[Any]
        if values:
            found = store.iter_items(
                prefix, page_size=min(most + 1 if most else PAGE_ITEMS, PAGE_ITEMS)
            )
        else:
            found = ((key, None) for key in store.iter_keys(prefix, page_size=PAGE_KEYS))
        rows = islice(found, most)
        if people:
            columns = ("key", "value") if values else ("key",)
            cells = [
                (console.one_line(k), *([console.preview(v)] if values else [])) for k, v in rows
            ]
            console.out().print(console.table(columns, cells))
        else:
            for key, value in rows:
                if call.json:
                    console.say_json({"key": key, **(console.json_value(value) if values else {})})
                else:
                    rest = f"\t{console.one_line(value)}" if values else ""
                    console.say(console.one_line(key) + rest)
        if limit is None and most is not None and next(found, None) is not None:
            console.note(f"These are the first {most}; --limit 0 shows all.")
    return DONE


def stats(call: Call) -> int:
    """Show how much the table holds and how well it is kept. Reads all of it.

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
    console.show_pairs(
        {
            "keys": f"{found.total_keys:,}",
            "expired, not yet collected": f"{found.expired_keys:,}{share}",
            "values": console.size(found.total_value_bytes),
            "average value": console.size(found.avg_value_bytes),
            "largest value": console.size(found.max_value_bytes),
            "table on disk": console.size(found.table_size_bytes),
            "indexes on disk": console.size(found.index_size_bytes),
            "dead row versions": f"{found.dead_tuples:,}",
            "heap-only updates": "no updates yet" if ratio is None else f"{ratio:.1%}",
        },
        title=title,
    )
    return DONE


def sweep(
    call: Call,
    limit: Annotated[
        int | None,
        typer.Option("--limit", "-l", metavar="N", min=1, help="Stop after so many rows."),
    ] = None,
) -> int:
    """Delete rows whose time has passed, in short steps that block nobody.

    Of use from cron with ttl_cleanup_strategy MANUAL; the other strategies collect by themselves.
    It sees to the whole table, also with --namespace.

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
    if call.json:
        console.say_json({"deleted": removed})
    else:
        console.say(f"deleted {removed:,} expired rows")
    return DONE


def schema(
    call: Call,
    regular: Annotated[
        bool, typer.Option("--regular", help="A logged table, which a server crash spares.")
    ] = False,
    locks: Annotated[
        bool, typer.Option("--locks/--no-locks", help="The locks' tables too.")
    ] = True,
    sessions: Annotated[
        bool, typer.Option("--sessions/--no-sessions", help="The sessions' table too.")
    ] = True,
) -> int:
    """Print the DDL of the tables, for a migration tool. Needs no server.

    With auto_create_table=False nothing else is needed. Running it twice does no harm.

    **Example:** `pgkv schema --table cache | psql "$PGKV_DSN"`
    """
    named = Call(dsn=call.dsn or "postgresql://", table=call.table, schema=call.schema)
    kind = TableType.REGULAR if regular else TableType.UNLOGGED
    sql = schema_sql(named.config(table_type=kind), locks=locks, sessions=sessions)
    if call.json:
        console.say_json({"sql": sql})
    else:
        sys.stdout.write(sql)
    return DONE


def doctor(call: Call) -> int:
    """Examine the server, the table and the way to them, and say what to do.

    Changes nothing. Looks at the store's own table, not at those of locks and sessions. Exit code
    1: something has to be mended.

    **Example:** `pgkv doctor --table cache --json`
    """
    from ._cli import doctor as _doctor

    findings = _doctor.examine(call.config())
    if call.json:
        healthy = all(finding.status != "fail" for finding in findings)
        console.say_json({"healthy": healthy, "findings": [asdict(each) for each in findings]})
    else:
        _doctor.show(findings)
    return NOT_FOUND if any(finding.status == "fail" for finding in findings) else DONE


def demo(
    call: Call,
    keys: Annotated[int, typer.Option("--keys", metavar="N", min=1000, hidden=True)] = 400_000,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, hidden=True)] = 3.0,
) -> int:
    """See pgkv at work, in less than a minute.

    Starts a temporary PostgreSQL of its own (extra `embedded`, or PostgreSQL's server programs),
    removed at the end. With --dsn it uses that server: tables of its own, dropped at the end.
    PGKV_DSN is left alone.

    **Example:** `pgkv demo`

    **Example:** `pgkv demo --dsn postgresql://user@host/db`
    """
    from ._cli import demo as _demo

    given = {"--table": call.table, "--namespace": call.namespace, "--timeout": call.timeout}
    for option, value in given.items():
        if value is not None:
            raise typer.BadParameter(f"the demo works on tables of its own: it takes no {option}")
    options: dict[str, Any] = {"schema": call.schema, "pooler": call.pooler or Pooler.NONE}
    done = _demo.run(call.dsn, options, _demo.Size(keys, seconds), as_json=call.json)
    return DONE if done else NOT_FOUND


# In this order the help shows them.
COMMANDS: dict[str, Callable[..., int]] = {
    "get": get,
    "set": set_,
    "delete": delete,
    "scan": scan,
    "stats": stats,
    "sweep": sweep,
    "doctor": doctor,
    "schema": schema,
    "locks": _cli_locks.locks,
    "lock": _cli_locks.lock,
    "cache": _cache_command.cache,
    "demo": demo,
}
for _name, _function in COMMANDS.items():
    register(_name, _function)

__all__ = ["app", "main"]
