"""Sharded stores for tests: their servers are databases of one server, unless a test breaks them."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

import pgkv
from pgkv._engine.schema import create_sql
from pgkv._shards.admin import Servers
from pgkv._shards.slots import ANY, schema_of
from pgkv._shards.sql import CITUS_FENCE
from pgkv.patterns.schema import tables
from tests.servers import wait_until
from tests.variants import Threaded, Variant, in_thread


def databases(dsn: str, names: Sequence[str]) -> list[str]:
    """Make those databases, and return their DSNs."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        for name in names:
            conn.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    return [make_conninfo(dsn, dbname=name) for name in names]


@contextlib.contextmanager
def database(dsn: str) -> Iterator[str]:
    """A database of its own, for a while."""
    name = f"sharded_{secrets.token_hex(4)}"
    yield databases(dsn, [name])[0]
    with psycopg.connect(dsn, autocommit=True) as conn:
        drop = sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name))

        def dropped() -> bool:
            try:
                conn.execute(drop)
            except psycopg.errors.ObjectInUse:  # the server waits five seconds for their end
                return False
            return True

        wait_until(dropped, "the connections to the database end")


def cluster(dsns: Sequence[str]) -> Servers:
    """Connections for administration."""
    return Servers([pgkv.Config(dsn, schema=ANY) for dsn in dsns])


def init(dsns: Sequence[str], slots: int | None) -> int:
    """Make the slots and all tables."""
    with cluster(dsns) as servers:
        return servers.init(slots, tables(pgkv.Config(dsns[0], schema=ANY)))


async def connect(variant: Variant, dsns: Sequence[str], **config: Any) -> Any:
    """A sharded store; used as an AsyncStore."""
    if variant.name == "async":
        return await pgkv.AsyncStore.sharded(dsns, **config)
    return Threaded(await in_thread(pgkv.Store.sharded, dsns, **config))


CLEAR = """
DO $$ DECLARE name text; BEGIN
FOR name IN SELECT format('%I.%I', schemaname, tablename) FROM pg_tables WHERE schemaname ~ '^pgkv_[0-9]+$' LOOP
  EXECUTE 'DELETE FROM ' || name;
END LOOP; END $$
"""


def clear(dsns: Sequence[str]) -> None:
    """Empty every table."""
    for dsn in dsns:
        with psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute(CLEAR)


# What of Citus' catalog the placement and the fence read. The lock is an advisory one, of a database.
CITUS_CATALOG = """
SET allow_system_table_mods = on;
CREATE TABLE pg_catalog.pg_dist_local_group (groupid INTEGER);
CREATE TABLE pg_catalog.pg_dist_node (
  groupid INTEGER, nodename TEXT, nodeport INTEGER, noderole TEXT DEFAULT 'primary', isactive BOOLEAN DEFAULT true);
CREATE TABLE pg_catalog.pg_dist_shard (logicalrelid REGCLASS, shardid BIGINT);
CREATE TABLE pg_catalog.pg_dist_placement (shardid BIGINT, groupid INTEGER);
CREATE FUNCTION pg_catalog.lock_shard_metadata(mode INTEGER, shards BIGINT[]) RETURNS void LANGUAGE sql AS
  $$ SELECT CASE mode WHEN 5 THEN pg_advisory_xact_lock_shared(s) ELSE pg_advisory_xact_lock(s) END
     FROM unnest(shards) s $$;
CREATE FUNCTION pg_catalog.shard_name(t REGCLASS, shard BIGINT) RETURNS text STABLE LANGUAGE sql AS
  $$ SELECT format('%I.%I', n.nspname, c.relname || '_' || shard)
     FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = t $$;
CREATE SCHEMA pgkv_map;
CREATE TABLE pgkv_map.settings (slots INTEGER);
CREATE SEQUENCE pgkv_map.ids;
CREATE FUNCTION pgkv_map.next_id(text) RETURNS bigint LANGUAGE sql AS $$ SELECT nextval('pgkv_map.ids') $$
"""


class CitusStandIn:
    """Databases that look like the nodes of a Citus cluster: to a store and to the fence, not to a reader of
    a table that is elsewhere.

    Args:
        dsns: empty databases: one for each node.
        slots: how many; they alternate.
    """

    def __init__(self, dsns: Sequence[str], slots: int) -> None:
        self.dsns = dsns
        self.shards: dict[int, list[tuple[int, str]]] = {}
        made = [
            (slot, 1000 + 100 * slot + n, replace(table, schema=schema_of(slot)))
            for slot in range(slots)
            for n, table in enumerate(tables(pgkv.Config(dsns[0], schema=ANY)))
        ]
        for slot, shard, table in made:
            self.shards.setdefault(slot, []).append((shard, f"{table.schema}.{table.name}"))
        commands = [
            CITUS_CATALOG,
            CITUS_FENCE,
            f"INSERT INTO pgkv_map.settings VALUES ({slots})",
        ]
        commands += [
            f"INSERT INTO pg_dist_node VALUES ({group}, 'node', {group})"
            for group in range(len(dsns))
        ]
        for slot, shard, table in made:
            name = f"{table.schema}.{table.name}"
            commands += [
                f"CREATE SCHEMA IF NOT EXISTS {table.schema}",
                create_sql(replace(table, name=f"{table.name}_{shard}"))
                .replace("GENERATED ALWAYS AS IDENTITY ", "")
                .rstrip(";"),
                # What a read by the table's name finds on the owner.
                f"CREATE VIEW {name} AS SELECT * FROM {name}_{shard}",
                f"INSERT INTO pg_dist_shard VALUES ('{name}', {shard})",
                f"INSERT INTO pg_dist_placement VALUES ({shard}, {slot % len(dsns)})",
            ]
        for group, dsn in enumerate(dsns):
            with psycopg.connect(dsn, autocommit=True) as conn:
                own = f"INSERT INTO pg_dist_local_group VALUES ({group})"
                conn.execute(";".join([*commands, own]))

    def move(self, slot: int, source: int, target: int, meanwhile: Callable[[], object]) -> None:
        """Move a slot as Citus does: under its lock, with the old relations left behind for a while."""
        shards = [shard for shard, _ in self.shards[slot]]
        with contextlib.ExitStack() as stack:
            conns = [stack.enter_context(psycopg.connect(dsn)) for dsn in self.dsns]
            for conn in conns:
                conn.execute("SELECT lock_shard_metadata(7, %s)", (shards,))
            for shard, name in self.shards[slot]:
                conns[target].execute(f"DELETE FROM {name}_{shard}")
                with (
                    conns[source].cursor().copy(f"COPY {name}_{shard} TO STDOUT") as rows,
                    conns[target].cursor().copy(f"COPY {name}_{shard} FROM STDIN") as copied,
                ):
                    for data in rows:
                        copied.write(data)
            meanwhile()
            for conn in conns:
                conn.execute(
                    "UPDATE pg_catalog.pg_dist_placement SET groupid = %s WHERE shardid = ANY(%s)",
                    (target, shards),
                )

    def clear(self) -> None:
        """Empty every table."""
        for dsn in self.dsns:
            with psycopg.connect(dsn, autocommit=True) as conn:
                for parts in self.shards.values():
                    for shard, name in parts:
                        conn.execute(f"DELETE FROM {name}_{shard}")


async def visit(sessions: Any, stop: asyncio.Event) -> int:
    """Save a session and rotate it until then; each load finds what was saved last. Return how often."""
    session, n = await sessions.create({"n": 0}), 0
    while not stop.is_set():
        n += 1
        session.data["n"] = n
        await sessions.save(session)
        if n % 5 == 0:
            await sessions.rotate(session)
        assert (await sessions.load(session.id)).data["n"] == n
    return n
