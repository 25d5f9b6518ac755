"""Tables: made, found, named, verified; the DDL for migration tools; upkeep."""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

import pgkv
from tests.peers import Peer, until
from tests.variants import Variant

KIND = "SELECT relpersistence FROM pg_class WHERE oid = 'kv_store'::regclass"


def relation(peer: Peer, name: str) -> Any:
    return peer.one("SELECT to_regclass(%s)::text", f'"{name}"')


async def test_connect_makes_the_table(store: Any, peer: Peer) -> None:
    """connect() makes the table: UNLOGGED, keys under the C collation, no index but the key's."""
    assert peer.one(KIND) == "u"
    columns = peer.run(
        "SELECT attname, format_type(atttypid, NULL), attnotnull FROM pg_attribute"
        " WHERE attrelid = 'kv_store'::regclass AND attnum > 0 ORDER BY attnum"
    )
    assert columns == [
        ("key", "text", True),
        ("value", "bytea", True),
        ("expires_at", "timestamp with time zone", False),
        ("created_at", "timestamp with time zone", True),
        ("updated_at", "timestamp with time zone", True),
        ("version", "bigint", True),
    ]
    assert peer.one("SELECT count(*) FROM pg_index WHERE indrelid = 'kv_store'::regclass") == 1
    collation = "SELECT attcollation::regcollation::text FROM pg_attribute WHERE attname = 'key'"
    assert peer.one(collation + " AND attrelid = 'kv_store'::regclass") == '"C"'


async def test_regular_tables(make_store: Any, peer: Peer) -> None:
    """TableType.REGULAR makes a table that is logged."""
    await make_store(table_type=pgkv.TableType.REGULAR)
    assert peer.one(KIND) == "p"


async def test_an_existing_table_is_used_as_it_is(make_store: Any, peer: Peer) -> None:
    """Connecting again changes nothing, whatever type the newcomer asks for."""
    first = await make_store()
    await first.set("k", b"v")
    second = await make_store(table_type=pgkv.TableType.REGULAR)
    assert await second.get("k") == b"v"
    assert peer.one(KIND) == "u"


async def test_updates_are_heap_only(make_store: Any, peer: Peer) -> None:
    """Changing values and expiries touches no index: nearly every update is heap-only."""
    store = await make_store(pool_max_size=1)
    await store.set_many({f"k{n}": b"v" for n in range(100)})
    for n in range(20):
        await store.set(f"k{n}", b"w", ttl=60 + n)
        await store.expire(f"k{n}", 90)
    # A connection tells its counts when it ends.
    await store.close()
    query = "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'kv_store'"
    query += " AND schemaname = current_schema()"
    await until(lambda: peer.run(query)[0][0] == 40, "the statistics arrive")
    assert peer.run(query)[0][1] >= 36


NAMES = [
    'quo"te',
    "sp ace",
    "semi;colon--",
    "ünï \U0001f40e",
    "UPPER",
    "select",
    "a'b",
    "x" * 54,
    "$1",
    "%s",
]


@pytest.mark.parametrize("name", NAMES)
async def test_any_name(make_store: Any, peer: Peer, name: str) -> None:
    """A table may have any name, and every kind of operation works on it."""
    store = await make_store(table_name=name)
    await store.set("k", b"1", ttl=60)
    assert await store.increment("k") == 2
    assert await store.get_many(["k"]) == {"k": b"2"}
    assert await store.keys("k") == ["k"]
    assert (await store.stats()).total_keys == 1
    assert await store.cleanup_expired() == 0
    await store._execute(store._sql.sweep_alone(0))
    await store.vacuum()
    await store.analyze()
    await store.truncate()
    await store.recreate_table()
    assert await store.delete_prefix("") == 0
    assert peer.one("SELECT count(*) FROM pg_tables WHERE tablename = %s", name) == 1


@pytest.mark.parametrize("schema", ['quo"te', "quo'te", "sp ace;", "ünï", "UPPER", "$pgkv$"])
async def test_any_schema(make_store: Any, peer: Peer, schema: str) -> None:
    """A schema may have any name and is made with the table."""
    unique = f"{schema}{peer.one('SELECT pg_backend_pid()')}"
    try:
        store = await make_store(schema=unique)
        await store.set("k", b"v")
        assert await store.get("k") == b"v"
        await store.recreate_table()
        found = peer.run("SELECT schemaname FROM pg_tables WHERE schemaname = %s", unique)
        assert found == [(unique,)]
    finally:
        drop = sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(unique))
        peer.conn.execute(drop)


async def test_schema_sql_is_all_that_is_needed(make_store: Any, peer: Peer, store: Any) -> None:
    """The output of schema_sql, run by a migration tool, twice, is all that a store needs with
    auto_create_table=False.
    """
    config = pgkv.Config("postgresql://", table_name='migra"ted', auto_create_table=False)
    script = pgkv.schema_sql(config)
    for _ in range(2):
        peer.conn.execute(script.encode())
    for name in ('migra"ted', 'migra"ted_locks', 'migra"ted_sessions'):
        assert peer.one("SELECT count(*) FROM pg_tables WHERE tablename = %s", name) == 1
    migrated = await make_store(table_name='migra"ted', auto_create_table=False)
    assert await migrated.set("k", b"v", if_version=0) > 0
    assert await migrated.increment("n", ttl=60) == 1
    same = (
        "SELECT attname, atttypid, attnotnull, attcollation, pg_get_expr(adbin, adrelid)"
        " FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum"
        " WHERE attrelid = to_regclass(%s) AND attnum > 0 ORDER BY attnum"
    )
    assert peer.run(same, '"migra""ted"') == peer.run(same, "kv_store")


async def test_a_long_name_loses_no_table_and_no_index(peer: Peer) -> None:
    """PostgreSQL cuts names of more than 63 bytes, by which the index of sessions would have the name of
    its table, and not be made: what is added to a table's name is shortened instead, differently
    for each."""
    both: set[str] = set()
    for name in ("é" * 26 + "ab", "é" * 26 + "ac"):
        script = pgkv.schema_sql(pgkv.Config("postgresql://", table_name=name))
        for _ in range(2):
            peer.conn.execute(script.encode())
        named = re.findall(r'(?:TABLE|INDEX) IF NOT EXISTS "([^"]+)"', script)
        assert len(named) == len(set(named)) >= 13
        for each in named:
            assert peer.one("SELECT count(*) FROM pg_class WHERE relname::text = %s", each) == 1
        assert not both & set(named)
        both |= set(named)


async def test_no_index_depends_on_the_servers_libraries(peer: Peer) -> None:
    """Every text in an index is ordered by the C collation: a new C library or ICU orders no other."""
    peer.conn.execute(pgkv.schema_sql(pgkv.Config("postgresql://")).encode())
    indexed = peer.run(
        "SELECT DISTINCT t.relname, c.collname FROM pg_index i JOIN pg_class t ON t.oid = indrelid"
        " CROSS JOIN unnest(indcollation) AS used JOIN pg_collation c ON c.oid = used"
        " WHERE t.relnamespace = current_schema()::regnamespace ORDER BY 1"
    )
    names = (
        "", "_idempotency", "_jobs", "_jobs_u", "_locks", "_locks_u", "_sessions", "_tickets",
    )  # fmt: skip
    assert indexed == [(f"kv_store{name}", "C") for name in names]


async def test_schema_sql_with_a_schema(peer: Peer) -> None:
    """schema_sql makes the schema, and leaves out what is not wanted."""
    config = pgkv.Config("postgresql://", schema="s", table_type=pgkv.TableType.REGULAR)
    script = pgkv.schema_sql(config, locks=False, sessions=False, queues=False)
    assert 'CREATE SCHEMA IF NOT EXISTS "s"' in script.partition("\n")[0]
    assert 'CREATE TABLE IF NOT EXISTS "s"."kv_store"' in script
    assert "_locks" not in script
    assert "_sessions" not in script
    assert "_sessions" in pgkv.schema_sql(config, locks=False)
    assert "_locks" in pgkv.schema_sql(config, sessions=False)


async def test_a_schema_that_is_there_already(make_store: Any, peer: Peer, dsn: str) -> None:
    """Where the schema is there, CREATE on it is enough, for schema_sql and for a store; a role that
    would have to make it needs CREATE on the database.
    """
    schema = peer.one("SELECT current_schema()")
    role = f"maker_{schema}"
    peer.run(f"CREATE ROLE {role} LOGIN; GRANT USAGE, CREATE ON SCHEMA {schema} TO {role}")
    restricted = make_conninfo(dsn, user=role)
    try:
        migration = psycopg.connect(restricted, autocommit=True)
        with contextlib.closing(migration):
            for _ in range(2):
                config = pgkv.Config(restricted, schema=schema, table_name="migrated")
                migration.execute(pgkv.schema_sql(config).encode())
            missing = pgkv.schema_sql(pgkv.Config(restricted, schema=f"{schema}_2"))
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                migration.execute(missing.encode())
        store = await make_store(dsn=restricted, schema=schema)
        assert await store.set("k", b"v") is not None
        with pytest.raises(pgkv.ConfigError, match="may not create"):
            await make_store(dsn=restricted, schema=f"{schema}_2")
    finally:
        peer.run(f"DROP OWNED BY {role}; DROP ROLE {role}")


async def test_no_table_and_none_to_be_made(make_store: Any, peer: Peer) -> None:
    """Without auto_create_table connect() says that there is no table, and makes none."""
    with pytest.raises(pgkv.TableNotFoundError, match=r"kv_store.*does not exist"):
        await make_store(auto_create_table=False)
    assert relation(peer, "kv_store") is None


async def test_a_table_made_is_logged_once(
    variant: Variant, make_store: Any, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    """pgkv.table.create is logged when a table was made, and only then: not by a process that finds
    it, be it in its first transaction or under a lock.
    """

    def logged() -> list[str]:
        found = [
            each.getMessage() for each in caplog.records if "table.create" in each.getMessage()
        ]
        caplog.clear()
        return found

    async def use(store: Any) -> None:
        async with store.transaction() as tx:
            await tx.set("k", b"v")
        for _ in range(2):
            lease = await variant.make("Lock", store, "n", fair=True).acquire()
            await lease.release()

    caplog.set_level("INFO", logger="pgkv")
    names = ["kv_store", "kv_store_locks", "kv_store_tickets"]
    made = [f'pgkv.table.create table="{name}"' for name in names]
    await use(await make_store())
    assert sorted(logged()) == made
    await use(await make_store())
    assert logged() == []
    peer.run("DROP TABLE kv_store")
    await use(await make_store())
    assert logged() == made[:1]


async def test_a_missing_table_is_made_again(store: Any, peer: Peer) -> None:
    """A table that vanished is made again by whatever operation misses it."""
    calls: list[Any] = [
        lambda: store.get("k"),
        lambda: store.set("k", b"v"),
        lambda: store.increment("n"),
        lambda: store.set_many({f"k{n}": b"" for n in range(6000)}),
        store.keys,
        lambda: store.update("k", lambda _: b"w"),
        store.cleanup_expired,
    ]
    for call in calls:
        peer.run("DROP TABLE kv_store")
        await call()
        assert relation(peer, "kv_store") is not None


async def test_a_missing_table_that_may_not_be_made(
    make_store: Any, store: Any, peer: Peer
) -> None:
    """Without auto_create_table a table that vanished is the caller's to make."""
    other = await make_store(auto_create_table=False)
    peer.run("DROP TABLE kv_store")
    with pytest.raises(pgkv.TableNotFoundError, match="create_table"):
        await other.get("k")
    await other.create_table()
    assert await other.get("k") is None


async def test_many_make_the_table_at_once(variant: Variant, dsn: str) -> None:
    """Of processes that all start at once every one finds the table made."""
    stores = await asyncio.gather(*(variant.connect(dsn, table_name="new") for _ in range(12)))
    try:
        sums = await asyncio.gather(*(each.increment("k") for each in stores))
        assert sorted(sums) == list(range(1, 13))
    finally:
        for each in stores:
            await each.close()


async def test_many_miss_the_table_at_once(store: Any, peer: Peer) -> None:
    """Of operations that all miss the table every one succeeds."""
    peer.run("DROP TABLE kv_store")
    sums = await asyncio.gather(*(store.increment("k") for _ in range(24)))
    assert sorted(sums) == list(range(1, 25))


async def test_a_role_without_rights(make_store: Any, peer: Peer, dsn: str) -> None:
    """A role that may not create the table, or not write to it, is told what to run."""
    schema = peer.one("SELECT current_schema()")
    role = f"reader_{schema}"
    peer.run(f"CREATE ROLE {role} LOGIN")
    peer.run(f"GRANT USAGE ON SCHEMA {schema} TO {role}")
    restricted = make_conninfo(dsn, user=role)
    try:
        with pytest.raises(pgkv.ConfigError, match="CREATE UNLOGGED TABLE IF NOT EXISTS"):
            await make_store(dsn=restricted)
        first = await make_store()
        await first.set("k", b"v")
        with pytest.raises(pgkv.ConfigError, match=r'GRANT SELECT, .* ON "kv_store"'):
            await make_store(dsn=restricted, auto_create_table=False)
        peer.run(f"GRANT SELECT ON kv_store TO {role}")
        reader = await make_store(dsn=restricted)  # the table is there: nothing to create
        assert await reader.get("k") == b"v"
        with pytest.raises(pgkv.ConfigError, match="lacks a right"):
            await reader.set("k", b"w")
        with pytest.raises(pgkv.ConfigError, match=r'GRANT TRUNCATE ON "kv_store"'):
            await reader.truncate()
        peer.run(f"GRANT TRUNCATE ON kv_store TO {role}")
        await reader.truncate()
    finally:
        peer.run(f"DROP OWNED BY {role}")
        peer.run(f"DROP ROLE {role}")


# -- upkeep ----------------------------------------------------------------------------------


async def test_recreate_table(store: Any, peer: Peer) -> None:
    """recreate_table leaves an empty table of the wanted shape, whatever was there."""
    await store.set("k", b"v")
    peer.run("ALTER TABLE kv_store DROP COLUMN version")
    await store.recreate_table()
    assert await store.count() == 0
    assert await store.set("k", b"v") > 0


async def test_a_changed_table_is_prepared_again(store: Any, peer: Peer) -> None:
    """Statements prepared for a table that changed meanwhile go on working."""
    await store.set("k", b"v")
    assert await store.get("k") == b"v"
    await store.scan()
    peer.run("ALTER TABLE kv_store ADD COLUMN note text")
    peer.run('ALTER TABLE kv_store ALTER COLUMN key TYPE varchar COLLATE "C"')
    assert await store.get("k") == b"v"
    assert await store.scan() == [("k", b"v")]


async def test_truncate(store: Any) -> None:
    """truncate empties the table."""
    await store.set_many({"a": b"", "b": b""})
    assert await store.truncate() is None
    assert await store.count() == 0


async def test_truncate_waits_a_bounded_time(make_store: Any, peer: Peer) -> None:
    """truncate gives up on a table that a transaction holds, retryable, instead of blocking all."""
    store = await make_store(retry=None)
    with peer.conn.transaction():
        peer.run("SELECT FROM kv_store")
        with pytest.raises(pgkv.QueryError) as caught:
            await store.truncate()
    assert caught.value.sqlstate == "55P03"
    assert caught.value.retryable


async def test_stats(store: Any) -> None:
    """stats tells what the table holds and takes."""
    await store.set_many({"a": b"12", "b": b"1234"})
    stats = await store.stats()
    assert (stats.total_keys, stats.expired_keys) == (2, 0)
    assert (stats.total_value_bytes, stats.max_value_bytes, stats.avg_value_bytes) == (6, 4, 3.0)
    assert stats.table_size_bytes > 0
    assert stats.index_size_bytes > 0
    assert stats.dead_tuples >= 0
    assert stats.hot_update_ratio is None or 0 <= stats.hot_update_ratio <= 1


async def test_stats_of_an_empty_table(store: Any) -> None:
    """An empty table has no values and a mean of 0."""
    stats = await store.stats()
    assert (stats.total_keys, stats.total_value_bytes, stats.avg_value_bytes) == (0, 0, 0.0)
    assert stats.max_value_bytes == 0


async def test_vacuum_and_analyze(store: Any, peer: Peer) -> None:
    """vacuum and analyze run, and leave the data alone."""
    await store.set("k", b"v")
    assert await store.vacuum() is None
    assert await store.analyze() is None
    assert await store.get("k") == b"v"
    assert peer.one("SELECT reltuples FROM pg_class WHERE oid = 'kv_store'::regclass") == 1


async def test_upkeep_by_a_role_that_may_not(make_store: Any, peer: Peer, dsn: str) -> None:
    """vacuum and analyze that the server would skip, with a warning, say so; a member of the
    owner and (PostgreSQL 17) a role with MAINTAIN may.
    """
    schema = peer.one("SELECT current_schema()")
    role, owner = f"worker_{schema}", f"owner_{schema}"
    it = "WHERE oid = 'kv_store'::regclass"
    await make_store()
    peer.run(f"CREATE ROLE {role} LOGIN; CREATE ROLE {owner}")
    peer.run(f"GRANT USAGE, CREATE ON SCHEMA {schema} TO {role}, {owner}")
    peer.run(f"GRANT SELECT ON kv_store TO {role}; ALTER TABLE kv_store OWNER TO {owner}")
    try:
        store = await make_store(dsn=make_conninfo(dsn, user=role))
        for refused in (store.vacuum, store.analyze):
            with pytest.raises(pgkv.ConfigError, match=r'does not own "kv_store".*GRANT MAINTAIN'):
                await refused()
        rights = [f"{owner} TO {role}"]
        if peer.conn.info.server_version >= 170000:
            rights.append(f"MAINTAIN ON kv_store TO {role}")
        for right in rights:
            peer.run(f"GRANT {right}")
            for allowed in (store.vacuum, store.analyze):
                peer.run(f"UPDATE pg_class SET reltuples = -1 {it}")
                await allowed()
                assert peer.one(f"SELECT reltuples FROM pg_class {it}") == 0
            peer.run(f"REVOKE {right.replace(' TO ', ' FROM ')}")
    finally:
        peer.run(f"DROP OWNED BY {role}, {owner} CASCADE; DROP ROLE {role}, {owner}")


async def test_upkeep_of_the_whole_table_is_not_a_namespaces(store: Any) -> None:
    """truncate, vacuum and recreate_table are refused on a namespace; clear keeps to it."""
    inner = store.namespace("n:")
    await store.set_many({"n:a": b"", "b": b""})
    for call in (inner.truncate, inner.vacuum, inner.recreate_table):
        with pytest.raises(pgkv.ConfigError, match="whole table"):
            await call()
    assert await inner.clear() == 1
    assert await store.keys() == ["b"]


async def test_errors_are_never_psycopgs(store: Any, peer: Peer) -> None:
    """Whatever the server refuses arrives as a PgkvError with the SQLSTATE."""
    peer.run("ALTER TABLE kv_store DROP COLUMN updated_at")
    with pytest.raises(pgkv.QueryError) as caught:
        await store.set("k", b"v")
    assert caught.value.sqlstate == "42703"
    assert isinstance(caught.value.__cause__, psycopg.Error)
