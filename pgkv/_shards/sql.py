"""The statements of a sharded store: those of every store, cut into parts for their slots, and those
of the map.

Each server has the whole map in the schema ``pgkv_map``. A slot is where its schema has its name; the
map points the way. A server whose row is older than another's does not know yet.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple, TypeAlias, TypeVar
from zlib import crc32

from .._engine.schema import create_sql
from .._ops.codec import encode_array, whole
from .._ops.lazy import cached_property
from .._ops.op import BINARY, Op, Result, Statement
from .._sql import Statements
from .._sql.table import command, query, read_nothing
from ..config import Config, Table, quote_identifier
from ..types import ScanOptions
from .slots import ANY, Slots, schema_of

T = TypeVar("T")
Parts: TypeAlias = list[tuple[int, Op[Any]]]

MARK = f'"{ANY}".'


# -- operations on several slots -------------------------------------------------------------


class Spread(Op[T]):
    """An operation whose parts are in several slots.

    Args:
        statement: of any part.
        parts: each with its slot, one or more for each, in the order of the slots; or what makes them.
        join: makes one answer of theirs; without one their statement's.
        by_slot: the keys of each slot, where `unite` makes one statement of several slots' on one server.
        unite: from the keys of each of its slots.
    """

    __slots__ = ("_parts", "by_slot", "join", "unite")

    def __init__(
        self,
        statement: Statement[Any],
        parts: Parts | Callable[[], Parts],
        join: Callable[[list[Any]], T] | None = None,
        by_slot: dict[int, list[bytes]] | None = None,
        unite: Callable[[list[tuple[int, list[bytes]]]], Op[T]] | None = None,
    ) -> None:
        super().__init__(statement, ())
        self._parts = parts
        self.join: Any = join or statement.join
        self.by_slot: dict[int, list[bytes]] = by_slot or {}
        self.unite = unite

    @property
    def parts(self) -> Parts:
        """Each part with its slot."""
        if callable(self._parts):
            self._parts = self._parts()
        return self._parts


def located(statement: Statement[T], slot: int) -> Statement[T]:
    """The statement for one slot."""
    name = f'"{schema_of(slot)}".'
    table = statement.table
    return replace(
        statement,
        sql=statement.sql.replace(MARK, name),
        sql_18=statement.sql_18 and statement.sql_18.replace(MARK, name),
        table=table and replace(table, schema=schema_of(slot)),
    )


class InSlot:
    """The statements of a table, for one slot of it.

    Args:
        sql: those for any slot.
        slot: which.
    """

    def __init__(self, sql: Any, slot: int) -> None:
        self._sql = sql
        self._slot = slot
        self._made: dict[Statement[Any], Statement[Any]] = {}
        self.table: Table = replace(sql.table, schema=schema_of(slot))
        self.t: str = self.table.quoted

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._sql, name)
        if not callable(value):
            return value

        def call(*args: Any) -> Any:
            answer = value(*args)
            return self.at(answer) if isinstance(answer, Op) else answer

        return call

    def sweep_alone(self, page: int) -> Op[tuple[int, int, int]]:
        """As of `Sweep`: each slot's table is swept by one process at a time."""
        op = self.at(self._sql.sweep_alone(page))
        return Op(op.statement, (*op.params[:-1], self.t.encode()))

    def at(self, op: Op[T]) -> Op[T]:
        """That operation in the slot."""
        statement = self._made.get(op.statement)
        if statement is None:
            statement = self._made[op.statement] = located(op.statement, self._slot)
        return Op(statement, op.params, None if op.decode is op.statement.decode else op.decode)


class ShardedStatements(Statements):
    """All statements of one key-value table in all slots, for keys under one prefix."""

    mergeable = {}  # noqa: RUF012  # operations on many keys are not of one slot

    def __init__(self, config: Config, prefix: str = "") -> None:
        super().__init__(config, prefix)
        self.slots: Slots = config.shards  # type: ignore[attr-defined]  # a ShardedConfig
        self._of_slots: dict[int, Statements] = {}

    @cached_property
    def every(self) -> list[InSlot]:
        """These statements in each slot, for operations on several."""
        return [InSlot(self, slot) for slot in range(self.slots.count)]

    def of_slot(self, slot: int) -> Statements:
        """The statements of the store of one slot, made once."""
        found = self._of_slots.get(slot)
        if found is None:
            own: Any = {"schema": schema_of(slot), "shards": Slots(self.slots.count, slot)}
            made = Statements(replace(self.config, **own), self.prefix)
            found = self._of_slots.setdefault(slot, made)
        return found

    def _keys_by_slot(self, keys: Sequence[bytes]) -> dict[int, list[bytes]]:
        count, of = self.slots.count, self.slots.of
        found: list[list[bytes]] = [[] for _ in range(count)]
        for key in keys:
            found[of(key) if b"{" in key else crc32(key) % count].append(key)
        return {slot: few for slot, few in enumerate(found) if few}

    def parted(self, keys: list[bytes], make: Callable[[list[bytes]], list[Op[T]]]) -> list[Op[T]]:
        """The operations on sorted keys: one, of which each slot has a part."""
        by_slot = self._keys_by_slot(keys)
        every = self.every
        parts = [(slot, every[slot].at(op)) for slot, few in by_slot.items() for op in make(few)]
        return [Spread(parts[0][1].statement, parts)] if parts else []

    def _get_many(self, raw: list[bytes]) -> Op[dict[str, bytes]]:
        return self._reading(raw, super()._get_many, lambda: self._make_get_many(0))

    def _exist_many(self, raw: list[bytes]) -> Op[set[str]]:
        return self._reading(raw, super()._exist_many, lambda: self._exists_many)

    def _reading(
        self,
        raw: list[bytes],
        make: Callable[[list[bytes]], Op[T]],
        of_array: Callable[[], Statement[T]],
    ) -> Spread[T]:
        """A read of keys: a statement for each slot, or one for each server."""
        keys = self._keys_by_slot(raw)

        def unite(chosen: list[tuple[int, list[bytes]]]) -> Op[T]:
            slots = tuple(slot for slot, _ in chosen)
            statement = self.made((make.__name__, slots), lambda: _all_of(of_array(), slots))
            return Op(statement, [encode_array(few) for _, few in chosen])

        every = self.every
        return Spread(
            self.made(make.__name__, of_array),
            lambda: [(slot, every[slot].at(make(few))) for slot, few in keys.items()],
            None,
            keys,
            unite,
        )

    def _scan(
        self,
        name: str,
        columns: str,
        decode: Callable[[Result], Any],
        options: ScanOptions,
    ) -> Op[Any]:
        offset = whole("offset", options.offset, 0)
        most = None if options.limit is None else whole("limit", options.limit, 0) + offset
        op = super()._scan(name, columns, decode, replace(options, limit=most, offset=0))

        def join(answers: list[list[Any]]) -> list[Any]:
            return sorted(chain.from_iterable(answers))[offset:][: options.limit]

        parts = [(slot, sql.at(op)) for slot, sql in enumerate(self.every)]
        return Spread(parts[0][1].statement, parts, join)


def _all_of(statement: Statement[T], slots: Sequence[int]) -> Statement[T]:
    """One statement that reads in several slots, with an array of keys for each."""
    text = " UNION ALL ".join(
        located(statement, slot).sql.replace("$1", f"${n}") for n, slot in enumerate(slots, 1)
    )
    formats = statement.formats * len(slots)
    return replace(statement, sql=text, sql_18=None, formats=formats, table=None)


# -- the map -------------------------------------------------------------------------------------

MAP_DDL = """\
CREATE SCHEMA IF NOT EXISTS pgkv_map;
CREATE TABLE IF NOT EXISTS pgkv_map.settings (
    one   BOOLEAN PRIMARY KEY DEFAULT true CHECK (one),
    slots INTEGER NOT NULL,
    node  TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS pgkv_map.slots (
    slot   INTEGER PRIMARY KEY,
    home   TEXT NOT NULL,
    epoch  BIGINT NOT NULL,
    target TEXT
);"""
DURABLE = (
    "SELECT set_config('synchronous_commit', 'on', false) "
    "WHERE current_setting('synchronous_commit') = 'off'"
)
INIT_LOCK = "SELECT pg_advisory_xact_lock(hashtext('pgkv shards'))"
IS_SLOT = "nspname ~ '^pgkv_[0-9]{2,}(_in|_log|_out)?$'"
SCHEMAS = f"SELECT nspname FROM pg_namespace WHERE {IS_SLOT}"
HAS_MAP = "SELECT to_regclass('pgkv_map.slots') IS NOT NULL"
NAME_SERVER = "INSERT INTO pgkv_map.settings (slots, node) VALUES (%s, %s) ON CONFLICT DO NOTHING"
NEWER_ROW = (
    "INSERT INTO pgkv_map.slots AS s (slot, home, epoch) VALUES (%s, %s, %s) ON CONFLICT (slot) DO "
    "UPDATE SET home = EXCLUDED.home, epoch = EXCLUDED.epoch, target = NULL "
    "WHERE s.epoch < EXCLUDED.epoch"
)
MOVE_LOCK = "SELECT pg_try_advisory_lock(hashtext('pgkv shards move'), %s)"
MOVE_UNLOCK = "SELECT pg_advisory_unlock(hashtext('pgkv shards move'), %s)"
MARK_TARGET = "UPDATE pgkv_map.slots SET target = %s WHERE slot = %s AND home = %s AND epoch = %s"
CLEAR_TARGET = (
    "UPDATE pgkv_map.slots SET target = NULL WHERE slot = %s AND home = %s AND epoch = %s"
)
HAND_OVER = (
    "UPDATE pgkv_map.slots SET home = %s, epoch = epoch + 1, target = NULL "
    "WHERE slot = %s AND home = %s AND epoch = %s"
)
# All who wait for a lock or a job there look again, and find that the slot is gone.
WAKE_WAITERS = "SELECT pg_notify(each, '') FROM unnest('{pgkv_locks,pgkv_jobs}'::text[]) each"
SLOT_TABLES = (
    "SELECT relname FROM pg_class WHERE relnamespace = to_regnamespace(%s) AND relkind = 'r'"
)
# Each table of a slot: its name, whether it is UNLOGGED, the command that makes it in another schema, what
# follows when it has its rows (indexes, rights), and where its identity goes on.
DESCRIBE = """\
SELECT c.relname, c.relpersistence = 'u',
  format('CREATE %%sTABLE %%I.%%I (%%s)%%s', CASE c.relpersistence WHEN 'u' THEN 'UNLOGGED ' ELSE '' END,
    %(into)s::text, c.relname,
    (SELECT string_agg(format('%%I %%s%%s%%s%%s', a.attname, format_type(a.atttypid, a.atttypmod),
        CASE WHEN a.attcollation NOT IN (0, t.typcollation)
          THEN format(' COLLATE %%I.%%I', l.nspname, o.collname) ELSE '' END,
        CASE a.attidentity WHEN 'a' THEN ' GENERATED ALWAYS AS IDENTITY'
          WHEN 'd' THEN ' GENERATED BY DEFAULT AS IDENTITY'
          ELSE coalesce(' DEFAULT ' || pg_get_expr(d.adbin, d.adrelid), '') END,
        CASE WHEN a.attnotnull THEN ' NOT NULL' ELSE '' END), ', ' ORDER BY a.attnum)
      FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
      LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
      LEFT JOIN pg_collation o ON o.oid = a.attcollation LEFT JOIN pg_namespace l ON l.oid = o.collnamespace
      WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped)
    || coalesce((SELECT string_agg(format(', CONSTRAINT %%I %%s', conname, pg_get_constraintdef(oid)), '')
      FROM pg_constraint WHERE conrelid = c.oid AND contype IN ('p', 'u', 'c')), ''),
    coalesce(' WITH (' || array_to_string(c.reloptions, ', ') || ')', '')),
  ARRAY(SELECT replace(pg_get_indexdef(i.indexrelid), format(' ON %%I.', %(live)s::text),
        format(' ON %%I.', %(into)s::text))
      FROM pg_index i WHERE i.indrelid = c.oid
      AND NOT EXISTS (SELECT 1 FROM pg_constraint WHERE conindid = i.indexrelid))
    || ARRAY(SELECT format('GRANT %%s ON %%I.%%I TO %%s', x.privilege_type, %(into)s::text, c.relname,
        CASE x.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(x.grantee)) END)
      FROM aclexplode(c.relacl) x WHERE x.grantee <> c.relowner)
    || ARRAY(SELECT format('GRANT %%s ON SCHEMA %%I TO %%s', x.privilege_type, %(into)s::text,
        CASE x.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(x.grantee)) END)
      FROM aclexplode(n.nspacl) x WHERE x.grantee <> n.nspowner),
  (SELECT format('SELECT setval(pg_get_serial_sequence(%%L, %%L), %%s, %%L)',
        format('%%I.%%I', %(into)s::text, c.relname), a.attname,
        coalesce(pg_sequence_last_value(e.objid::regclass), 1),
        pg_sequence_last_value(e.objid::regclass) IS NOT NULL)
      FROM pg_attribute a JOIN pg_depend e ON e.refobjid = a.attrelid AND e.refobjsubid = a.attnum
        AND e.deptype = 'i' AND e.classid = 'pg_class'::regclass AND e.refclassid = 'pg_class'::regclass
      WHERE a.attrelid = c.oid AND a.attidentity <> '' LIMIT 1)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relnamespace = to_regnamespace(%(live)s) AND c.relkind = 'r' ORDER BY c.relname"""
# Each table of a slot, the columns of its primary key, and whether its changes are noted.
KEYS = """\
SELECT c.relname, ARRAY(SELECT quote_ident(attname) FROM pg_index, pg_attribute WHERE indrelid = c.oid
    AND indisprimary AND attrelid = c.oid AND attnum = ANY (indkey) ORDER BY attnum),
  EXISTS (SELECT FROM pg_trigger WHERE tgrelid = c.oid AND tgname = 'pgkv_move')
FROM pg_class c WHERE relnamespace = to_regnamespace(%s) AND relkind = 'r' ORDER BY 1"""
# The keys of rows that change are noted, with the rights of the mover.
NOTE_CHANGES = """\
CREATE UNLOGGED TABLE {log} AS SELECT {keys} FROM {live} LIMIT 0;
CREATE FUNCTION {log}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog
AS $note$ BEGIN
  IF TG_OP IN ('UPDATE', 'DELETE') THEN INSERT INTO {log} VALUES ({old}); END IF;
  IF TG_OP IN ('UPDATE', 'INSERT') THEN INSERT INTO {log} VALUES ({new}); END IF;
  IF TG_OP = 'TRUNCATE' THEN INSERT INTO {log} SELECT {keys} FROM {live}; END IF;
  RETURN NULL;
END $note$;
CREATE TRIGGER pgkv_move AFTER INSERT OR UPDATE OR DELETE ON {live} FOR EACH ROW EXECUTE FUNCTION {log}();
CREATE TRIGGER pgkv_move_all BEFORE TRUNCATE ON {live} EXECUTE FUNCTION {log}();"""
COUNT_NOTES = "SELECT count(*) FROM {log}"
CREATE_GONE = "CREATE TEMP TABLE pgkv_gone ON COMMIT DROP AS SELECT {keys} FROM {copy} LIMIT 0"
NOTED_KEYS = "(SELECT DISTINCT {keys} FROM {log})"
DELETE_GONE = "DELETE FROM {copy} WHERE ({keys}) IN (SELECT {keys} FROM pgkv_gone)"
NOTED_ROWS = "(SELECT * FROM {live} WHERE ({keys}) IN (SELECT {keys} FROM {log}))"
DELETE_NOTES = "DELETE FROM {log}"
_SCHEMA = "'pgkv_' || CASE WHEN s.slot < 10 THEN '0' ELSE '' END || s.slot"


class MapRow(NamedTuple):
    """What one server's map says of a slot.

    Attributes:
        home: the name of the server that has it.
        epoch: rises with every move.
        target: where it is being moved to; empty where it is not.
        live: whether its schema is on the server that says this.
    """

    slot: int
    home: str
    epoch: int
    target: str = ""
    live: bool = False

    def replaces(self, known: MapRow, said_by: str) -> bool:
        """Whether it is newer; of equal ones its home's counts, which knows of a move."""
        return self.epoch > known.epoch or (self.epoch, self.home) == (known.epoch, said_by)


class NodeMap(NamedTuple):
    """One server's map: how many slots there are, its own name, and its rows."""

    slots: int
    node: str
    rows: list[MapRow]


def _read_map(result: Result) -> NodeMap | None:
    if not result.ntuples:
        return None

    def text(row: int, column: int) -> str:
        return (result.get_value(row, column) or b"").decode()

    rows = [
        MapRow(int(text(n, 2)), text(n, 3), int(text(n, 4)), text(n, 5), text(n, 6) == "true")
        for n in range(result.ntuples)
        if text(n, 2)
    ]
    return NodeMap(int(text(0, 0)), text(0, 1), rows)


READ_MAP: Statement[NodeMap | None] = query(
    "shards_map",
    "SELECT m.slots::text, m.node, s.slot::text, s.home, s.epoch::text, coalesce(s.target, ''), "
    f"(to_regnamespace({_SCHEMA}) IS NOT NULL)::text "
    "FROM pgkv_map.settings m LEFT JOIN pgkv_map.slots s ON true ORDER BY s.slot",
    _read_map,
)


def _read_sizes(result: Result) -> dict[str, int]:
    return {
        (result.get_value(n, 0) or b"").decode(): int(result.get_value(n, 1) or b"0")
        for n in range(result.ntuples)
    }


READ_SIZES: Statement[dict[str, int]] = query(
    "shards_sizes",
    "SELECT n.nspname::text, coalesce(sum(pg_total_relation_size(c.oid)), 0)::text "
    "FROM pg_namespace n LEFT JOIN pg_class c ON c.relnamespace = n.oid AND c.relkind = 'r' "
    f"WHERE {IS_SLOT} GROUP BY 1",
    _read_sizes,
)


# -- Citus ---------------------------------------------------------------------------------------


# In a sub-select: a call in the list itself is one that Citus might delegate, and plans again each time.
FENCE: Statement[None] = query("fence", "SELECT (SELECT pgkv_map.fence($1))", read_nothing, BINARY)
_NOT_PLAIN = re.compile(
    r"\(SELECT|\bctid\b|\bFOR |regclass|\bpg_\w+\(|set_config|TABLESAMPLE|UNION"
)


def is_plain_read(text: str) -> bool:
    """Whether a statement of one table only reads it, in a way that Citus forwards unchanged."""
    return text.startswith("SELECT ") and not _NOT_PLAIN.search(text)


class Relation(NamedTuple):
    """The shard of a slot's table.

    Attributes:
        shard: its id, which moves do not change.
        name: of its relation, quoted, the same on every node.
    """

    shard: int
    name: str


class NodeAddress(NamedTuple):
    """Where Citus' metadata say that a node is."""

    host: str
    port: str

    @property
    def name(self) -> str:
        """What the node is called in lists and by ``--to``."""
        return f"{self.host}:{self.port}"


class Placement(NamedTuple):
    """What Citus' metadata say.

    Attributes:
        nodes: the address of each group of nodes; 0 is the coordinator's.
        owners: the group that has each slot.
        relations: of each table of a slot, by its quoted name.
    """

    nodes: dict[int, NodeAddress]
    owners: dict[int, int]
    relations: dict[str, Relation]


def _read_placement(result: Result) -> Placement:
    found = Placement({}, {}, {})
    for row in range(result.ntuples):
        group, schema, *rest = ((result.get_value(row, n) or b"").decode() for n in range(5))
        if not schema:
            found.nodes[int(group)] = NodeAddress(*rest[:2])
            continue
        table, relation, shard = rest
        found.owners[int(schema.removeprefix("pgkv_"))] = int(group)
        quoted = f"{quote_identifier(schema)}.{quote_identifier(table)}"
        found.relations[quoted] = Relation(int(shard), relation)
    return found


_SHARDS = (
    "FROM pg_catalog.pg_dist_placement p JOIN pg_catalog.pg_dist_shard s USING (shardid) "
    "JOIN pg_catalog.pg_class c ON c.oid = s.logicalrelid "
    "JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace AND n.nspname ~ '^pgkv_[0-9]{2,}$' "
)
READ_PLACEMENT: Statement[Placement] = query(
    "shards_placement",
    "SELECT groupid::text, '', nodename::text, nodeport::text, '' FROM pg_catalog.pg_dist_node "
    "WHERE noderole = 'primary' AND isactive UNION ALL "
    "SELECT p.groupid::text, n.nspname::text, c.relname::text, "
    f"pg_catalog.shard_name(c.oid, s.shardid), s.shardid::text {_SHARDS}",
    _read_placement,
)
CITUS_SIZES: Statement[dict[str, int]] = replace(  # of the slots that a node has
    READ_SIZES,
    sql="SELECT n.nspname::text, coalesce(sum(pg_total_relation_size(to_regclass("
    f"pg_catalog.shard_name(c.oid, s.shardid)))), 0)::text {_SHARDS} "
    "JOIN pg_catalog.pg_dist_local_group g USING (groupid) GROUP BY 1",
)
HAS_FENCE: Statement[bool] = query(
    "shards_fence",
    "SELECT to_regprocedure('pgkv_map.fence(bigint)') IS NOT NULL",
    lambda result: result.get_value(0, 0) == b"\x01",
)
READ_GROUP: Statement[tuple[int, int]] = query(
    "shards_group",
    "SELECT g.groupid::text, s.slots::text FROM pg_catalog.pg_dist_local_group g "
    "LEFT JOIN pgkv_map.settings s ON true",
    lambda result: (int(result.get_value(0, 0) or b"0"), int(result.get_value(0, 1) or b"0")),
)


HAS_CITUS = "SELECT to_regclass('pg_catalog.pg_dist_node') IS NOT NULL"
CITUS_LOCAL = "SELECT groupid FROM pg_catalog.pg_dist_local_group"
CITUS_NODES = "SELECT groupid FROM pg_catalog.pg_dist_node WHERE noderole = 'primary' AND isactive"
CITUS_SETTINGS = (
    "SELECT to_regclass('pgkv_map.settings') IS NOT NULL",
    "SELECT coalesce(max(slots), 0) FROM pgkv_map.settings",
)
# The fence takes the lock that Citus' executor takes for a write, in its mode, and a move takes exclusively.
# Operators are named with their schema: the function has its owner's rights.
CITUS_FENCE = """\
CREATE OR REPLACE FUNCTION pgkv_map.fence(bigint) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER AS $pgkv$
BEGIN
  PERFORM pg_catalog.lock_shard_metadata(5, ARRAY[$1]);
  IF NOT EXISTS (SELECT FROM pg_catalog.pg_dist_placement p, pg_catalog.pg_dist_local_group g
      WHERE p.shardid OPERATOR(pg_catalog.=) $1 AND p.groupid OPERATOR(pg_catalog.=) g.groupid)
  THEN RAISE EXCEPTION 'pgkv: the slot is not here' USING ERRCODE = 'PK001';
  END IF;
  IF pg_catalog.current_setting('transaction_isolation') OPERATOR(pg_catalog.<>) 'read committed'
  THEN RAISE EXCEPTION 'pgkv: an old snapshot' USING ERRCODE = 'PK002';
  END IF;
END $pgkv$"""
# One command a string.
CITUS_SETUP: tuple[str, ...] = (
    "CREATE SCHEMA IF NOT EXISTS pgkv_map",
    "CREATE TABLE IF NOT EXISTS pgkv_map.settings (one BOOLEAN PRIMARY KEY DEFAULT true CHECK (one), "
    "slots INTEGER NOT NULL)",
    "SELECT create_reference_table('pgkv_map.settings') WHERE NOT EXISTS (SELECT FROM "
    "pg_catalog.pg_dist_partition WHERE logicalrelid = 'pgkv_map.settings'::regclass)",
    CITUS_FENCE,
    # Rights to a sequence do not reach the workers.
    "CREATE OR REPLACE FUNCTION pgkv_map.next_id(text) RETURNS bigint LANGUAGE sql SECURITY DEFINER AS "
    "$pgkv$ SELECT pg_catalog.nextval(pg_catalog.pg_get_serial_sequence($1, 'id')) $pgkv$",
)
CITUS_REPLICATE = "SELECT replicate_reference_tables()"
CITUS_COUNT = "INSERT INTO pgkv_map.settings (slots) VALUES (%s) ON CONFLICT DO NOTHING"
CITUS_PLAIN = (
    "SELECT nspname FROM pg_catalog.pg_namespace n WHERE nspname ~ '^pgkv_[0-9]{2,}$' AND NOT EXISTS "
    "(SELECT FROM pg_catalog.pg_dist_schema s WHERE s.schemaid = n.oid)"
)
CITUS_UNLOGGED = (
    "SELECT FROM pg_catalog.pg_class WHERE relnamespace = to_regnamespace(%s) AND relkind = 'r' "
    "AND relpersistence = 'u' LIMIT 1"
)
CITUS_MOVE = "SELECT citus_schema_move(%s::regnamespace, %s::text, %s::int, %s)"
CITUS_SELF = "SELECT citus_backend_gpid()"
# Citus shows the moves of all databases, with tables by their numbers.
_PROGRESS = (
    "FROM get_rebalance_progress() p JOIN pg_catalog.pg_stat_activity a ON a.pid = p.sessionid "
    "AND a.datname = current_database() JOIN pg_catalog.pg_class c ON c.oid = p.table_name "
    "JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace "
)
CITUS_MOVING = (
    "SELECT DISTINCT n.nspname::text, format('%s:%s to %s:%s', p.sourcename, p.sourceport, "
    f"p.targetname, p.targetport) {_PROGRESS} WHERE p.progress = 1"
)
CITUS_MOVING_STATUS = (
    f"SELECT max(p.status), sum(p.target_shard_size)::bigint {_PROGRESS} "
    "WHERE n.nspname = %s HAVING count(*) > 0"
)
CITUS_WAITS = "SELECT EXISTS (SELECT FROM citus_stat_activity WHERE global_pid = %s AND wait_event_type = 'Lock')"


def create_in_slot(table: Table, slot: int) -> Op[None]:
    """Create a table where the slot lives. The schema is never created here, and a move waits for this
    or prevents it: a client with an old map would otherwise give the slot a second home."""
    owned = (
        "PERFORM 1 FROM pgkv_map.slots s, pgkv_map.settings m WHERE "
        f"s.slot = {slot} AND s.home = m.node AND s.target IS NULL FOR SHARE OF s"
    )
    commands = create_sql(replace(table, schema=schema_of(slot)))
    text = (
        "SET LOCAL lock_timeout = '2s'; "
        f"DO $pgkv$ BEGIN {owned}; IF FOUND THEN {commands} END IF; END $pgkv$"
    )
    return Op(command("create_table", text))
