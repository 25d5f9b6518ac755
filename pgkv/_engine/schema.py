"""The tables: their DDL, and how a missing one comes (back) into being.

UNLOGGED tables vanish in ways that logged ones do not (some managed servers drop them on
fail-over), so creation is no set-up step but part of every operation: `ensure` runs whenever the
server says "no such table". It never alters the type of a column and never drops anything.
"""

from __future__ import annotations

from .. import _observe
from .._ops.op import TEXT, Flow, Op, Result, Statement, do
from .._sql.table import command, query
from ..config import Config, Table, TableShape, TableType, quote_identifier, short_identifier
from ..errors import ConfigError, PgkvError, QueryError, StoreUnavailableError

# DDL waits for open transactions; it must not make other clients wait behind it.
LOCK_TIMEOUT = "SET LOCAL lock_timeout = '2s'; "
CREATED_BY_ANOTHER = ("42P07", "42710", "42P06", "23505", "XX000")

_VERSION_DEFAULT = "(extract(epoch from clock_timestamp()) * 1000000)::bigint"
# Churn leaves dead versions; waiting for a fifth of a large table to die would be waiting too long.
_AUTOVACUUM = (
    "autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000, "
    "autovacuum_vacuum_cost_delay = 0, autovacuum_vacuum_insert_scale_factor = 0.05"
)

STORE = TableShape(
    "",
    f"""\
    key        TEXT COLLATE "C" PRIMARY KEY,
    value      BYTEA NOT NULL,
    expires_at TIMESTAMPTZ,
    created_at TIMESTAMPTZ NOT NULL DEFAULT NOW(),
    updated_at TIMESTAMPTZ NOT NULL DEFAULT NOW(),
    version    BIGINT NOT NULL DEFAULT {_VERSION_DEFAULT}""",
    fillfactor=80,
)

USED_AT = "used_at    TIMESTAMPTZ"  # of a bounded table: when a read marked the row

# What a column of a store must be; the Rust crate's tables lack only the version.
_EXPECTED = {
    "key": ("text", "character varying"),
    "value": ("bytea",),
    "expires_at": ("timestamp with time zone",),
    "created_at": ("timestamp with time zone",),
    "updated_at": ("timestamp with time zone",),
    "version": ("bigint",),
}


def create_sql(table: Table) -> str:
    """Return the commands that create the table where it is missing."""
    return "\n".join(create_commands(table))


def create_commands(table: Table) -> list[str]:
    """The same, one by one."""
    shape = table.shape or STORE
    columns = shape.columns + (f",\n    {USED_AT}" if table.bounded else "")
    unlogged = "UNLOGGED " if table.type is TableType.UNLOGGED else ""
    commands = [
        f"CREATE {unlogged}TABLE IF NOT EXISTS {table.quoted} (\n{columns}\n) "
        f"WITH (fillfactor = {shape.fillfactor}, {_AUTOVACUUM});"
    ]
    for name, definition in shape.indexes:
        unique = "UNIQUE " if definition.startswith("UNIQUE ") else ""
        index = quote_identifier(short_identifier(f"{table.name}_{name}"))
        commands.append(
            f"CREATE {unique}INDEX IF NOT EXISTS {index} "
            f"ON {table.quoted} {definition.removeprefix('UNIQUE ')};"
        )
    return commands


def create_schema_sql(schema: str) -> str:
    """The command that creates the schema where it is missing."""
    name = quote_identifier(schema)
    literal = "'" + name.replace("'", "''") + "'"
    tag = "$pgkv$"
    while tag in name:
        tag = f"{tag[:-1]}_$"
    # Asked first: IF NOT EXISTS demands the right to create even where it does nothing.
    return (
        f"DO {tag} BEGIN IF to_regnamespace({literal}) IS NULL "
        f"THEN CREATE SCHEMA IF NOT EXISTS {name}; END IF; END {tag};"
    )


def companion(config: Config, shape: TableShape, *, durable: bool = True) -> Table:
    """Return the table of that shape that goes with a store's own."""
    return Table(
        short_identifier(config.table_name + shape.suffix),
        config.schema,
        TableType.REGULAR if durable else TableType.UNLOGGED,
        shape,
        config.auto_create_table,
        fences=config.table.fences,
    )


# -- flows ---------------------------------------------------------------------------------


def ensure(table: Table) -> Flow[None]:
    """Create the table, or add what an older or foreign one lacks.

    Raises:
        ConfigError: a table of that name exists and is not pgkv's, or a right is missing.
    """
    for attempt in range(3):
        columns = yield from do(_columns(table))
        commands = _missing(table, columns)
        if not commands:
            return
        if table.schema is not None:
            commands = f"{create_schema_sql(table.schema)} {commands}"
        try:
            yield from do(_script("create_table", commands))
        except PgkvError as error:
            if attempt == 2 or error._sqlstate not in CREATED_BY_ANOTHER:
                raise _explained(error, table) from error.__cause__
        else:
            _observe.info("pgkv.table.create", table=table.quoted)


def changes(table: Table) -> Flow[str]:
    """The commands that turn a table of an earlier version into today's; empty when it is missing,
    or nothing is to be done."""
    columns = yield from do(_columns(table))
    if not columns:
        return ""
    surplus: list[str] = yield from do(Op(_SURPLUS, (table.quoted.encode(),)))
    drop = "".join(f"ALTER TABLE {table.quoted} DROP CONSTRAINT {name}; " for name in surplus)
    return f"{_missing(table, columns)}{drop}".strip()


def change(table: Table, commands: str) -> Flow[None]:
    """Run what `changes` found, in one transaction, which waits no longer than 2 s for the table.

    Raises:
        ConfigError: the role does not own the table.
        StoreUnavailableError: another transaction holds it.
    """
    try:
        yield from do(_script("migrate", commands))
    except PgkvError as error:
        raise _explained(error, table) from error.__cause__


def recreate(table: Table) -> Flow[None]:
    """Drop the table with everything in it and create it again, in one transaction."""
    commands = f"DROP TABLE IF EXISTS {table.quoted}; {create_sql(table)}"
    yield from do(_script("recreate_table", commands))


# Lock tables of 0.1 had a second index: with it no update is heap-only.
_SURPLUS: Statement[list[str]] = query(
    "migrate",
    "SELECT quote_ident(conname) FROM pg_constraint WHERE conrelid = to_regclass($1) "
    "AND contype = 'u' AND pg_get_constraintdef(oid) = 'UNIQUE (key, version)'",
    lambda result: [(result.get_value(n, 0) or b"").decode() for n in range(result.ntuples)],
    TEXT,
)


def _columns(table: Table) -> Op[dict[str, str]]:
    statement = Statement(
        "create_table",
        "SELECT attname::text, format_type(atttypid, NULL) FROM pg_attribute "
        "WHERE attrelid = to_regclass($1) AND attnum > 0 AND NOT attisdropped",
        (TEXT,),
        _read_columns,
        retry_safe=True,
        writes=False,
        table=table,
    )
    return Op(statement, (table.quoted.encode(),))


def _read_columns(result: Result) -> dict[str, str]:
    return {
        (result.get_value(row, 0) or b"").decode(): (result.get_value(row, 1) or b"").decode()
        for row in range(result.ntuples)
    }


def complete_columns() -> dict[str, str]:
    """What `_columns` finds where nothing is missing."""
    return {name: types[0] for name, types in _EXPECTED.items()} | {"used_at": ""}


def _missing(table: Table, columns: dict[str, str]) -> str:
    """The commands that turn what is there into what is needed; empty when nothing is."""
    if not columns:
        return create_sql(table)
    if table.shape is not None:
        return ""
    for name, types in _EXPECTED.items():
        found = columns.get(name)
        if found is None and name != "version":
            raise ConfigError(
                f"the table {table.quoted} exists but is not a pgkv table: it has no column "
                f"{name}; choose another table_name"
            )
        if found is not None and found not in types:
            raise ConfigError(
                f"the table {table.quoted} exists but is not a pgkv table: its column {name} "
                f"is {found}, not {types[0]}; choose another table_name"
            )
    add = f"ALTER TABLE {table.quoted} ADD COLUMN IF NOT EXISTS"
    used_at = f"{add} {USED_AT}; " if table.bounded and "used_at" not in columns else ""
    if "version" in columns:
        return used_at
    # A constant default rewrites no row; 0 would mean "absent" to if_version. New rows, also
    # those of clients that know no version, then start at the clock.
    return (
        f"{used_at}{add} version BIGINT NOT NULL DEFAULT 1; "
        f"ALTER TABLE {table.quoted} ALTER COLUMN version SET DEFAULT {_VERSION_DEFAULT};"
    )


def _script(name: str, commands: str) -> Op[None]:
    return Op(command(name, LOCK_TIMEOUT + commands))


def _explained(error: PgkvError, table: Table) -> PgkvError:
    if isinstance(error, ConfigError) and error._sqlstate == "42501":
        return ConfigError(
            f"the table {table.quoted} is missing and the database role may not create it. "
            f"Run this as a role that may, and set auto_create_table=False:\n{create_sql(table)}"
        )
    if isinstance(error, QueryError) and error.sqlstate == "55P03":
        return _busy(table)
    return error


def _busy(table: Table) -> StoreUnavailableError:
    return StoreUnavailableError(
        f"the table {table.quoted} could not be altered within 2 s: another transaction holds it"
    )
