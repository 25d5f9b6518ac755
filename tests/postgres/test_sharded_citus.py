"""A store over a real Citus cluster: what every store and pattern does, moves under load, and the fence.

PGKV_TEST_CITUS_DSN names the coordinator; its role is a superuser on every node, and may make databases there.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

import pgkv
from pgkv._ops.op import BINARY, Statement
from pgkv._shards import cluster as module
from pgkv._shards import fences
from pgkv._shards.cluster import CitusCluster, administered
from pgkv._shards.slots import ANY
from pgkv._sql.table import read_nothing
from pgkv.cli import main
from pgkv.patterns.schema import tables
from tests import FULL, again, sharded
from tests.peers import until
from tests.postgres.test_sharded_behaviour import (
    MODULES,
    OF_ONE_SERVER,
    OWN_FIXTURES,
    leave_out,
)
from tests.servers import wait_until
from tests.variants import Variant, closing_all, inside

DSN = os.environ.get("PGKV_TEST_CITUS_DSN", "")
SLOTS = 4

pytestmark = pytest.mark.skipif(
    not DSN, reason="set PGKV_TEST_CITUS_DSN to the coordinator of a Citus cluster"
)


def nodes_of(dsn: str) -> list[str]:
    """The DSNs of all nodes, the coordinator's first, as its metadata know them."""
    with psycopg.connect(dsn) as conn:
        found = conn.execute(
            "SELECT nodename, nodeport FROM pg_dist_node WHERE noderole = 'primary' ORDER BY groupid"
        ).fetchall()
    params = conninfo_to_dict(dsn)
    params.pop("hostaddr", None)
    return [make_conninfo("", **(params | {"host": host, "port": port})) for host, port in found]


_made: list[str] = []  # databases


def make_cluster(count: int | None = None, made: Sequence[str] = ()) -> list[str]:
    """A database of the session's own as a cluster of the same nodes; their DSNs, the coordinator's first.

    Args:
        count: of how many nodes; None for all.
        made: the DSNs of one that gets more nodes.
    """
    known, made = len(made), [*made]
    name = str(conninfo_to_dict(made[0])["dbname"]) if made else f"pgkv_{secrets.token_hex(4)}"
    if not made:
        _made.append(name)
    for dsn in nodes_of(DSN)[known:count]:
        ask_none(dsn, f"CREATE DATABASE {name}")
        made.append(make_conninfo(dsn, dbname=name))
        ask_none(made[-1], "CREATE EXTENSION citus")
    for n, dsn in enumerate(made[known:], known):
        params = conninfo_to_dict(dsn)
        add = "citus_add_node" if n else "citus_set_coordinator_host"
        ask(made[0], f"SELECT {add}('{params['host']}', {params['port']})")
    return made


@pytest.fixture(scope="session")
def nodes() -> Iterator[list[str]]:
    """A cluster with four slots and all tables."""
    made = make_cluster()
    with cluster(made) as found:
        found.init(SLOTS, tables(pgkv.Config(made[0], schema=ANY)))
    yield made
    for dsn in nodes_of(DSN):
        for name in _made:
            ask_none(dsn, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


def cluster(nodes: list[str]) -> CitusCluster:
    """Connections for administration."""
    found = administered([pgkv.Config(nodes[0], schema=ANY)], "citus")
    assert isinstance(found, CitusCluster)
    return found


def clear(nodes: list[str]) -> None:
    """Empty every table."""
    with psycopg.connect(nodes[0], autocommit=True) as conn:
        for (name,) in conn.execute(
            "SELECT logicalrelid::text FROM pg_dist_partition WHERE logicalrelid::text ~ '^pgkv_[0-9]'"
        ).fetchall():
            conn.execute(f"DELETE FROM {name}")


@pytest.fixture
def make_store(
    request: pytest.FixtureRequest,
    nodes: list[str],
    variant: Variant,
    event_loop_runner: asyncio.Runner,
) -> Iterator[Callable[..., Coroutine[Any, Any, Any]]]:
    """`await make_store()` is a store over the cluster."""
    with closing_all(event_loop_runner) as made:

        async def make(**config: Any) -> Any:
            dsns = [nodes[0]]
            if (dsn := config.pop("dsn", None)) is not None:
                options = conninfo_to_dict(dsn).get("options")
                dsns = [make_conninfo(each, options=options) for each in nodes]
            made.append(await sharded.connect(variant, config.pop("dsns", dsns), **config))
            return made[-1]

        yield make
    clear(nodes)


again.adopt(globals(), MODULES, own=OWN_FIXTURES, left_out={}, one_in=12)
leave_out(globals(), OF_ONE_SERVER | {"clock"})


# -- what only Citus can show


@pytest.fixture
def only_mover() -> Iterator[None]:
    """No other process of the tests moves slots meanwhile: what Citus makes on a server for a move has a name
    that does not tell the database."""
    with psycopg.connect(DSN, autocommit=True) as conn:
        conn.execute("SELECT pg_advisory_lock(hashtext('pgkv tests'))")
        yield


@pytest.fixture
def admin(nodes: list[str], only_mover: None) -> Iterator[CitusCluster]:
    """Connections for administration; the slots are empty before, and in order afterwards."""
    del only_mover
    with cluster(nodes) as found:
        clear(nodes)
        yield found
        assert found.check() == []


@pytest.fixture(scope="module")
def logged(nodes: list[str]) -> list[str]:
    """The same cluster, with another database whose tables are all logged: only those move while clients write."""
    made = make_cluster()
    with cluster(made) as found:
        config = pgkv.Config(made[0], schema=ANY, table_type=pgkv.TableType.REGULAR)
        kept = [each for each in tables(config) if each.type is pgkv.TableType.REGULAR]
        found.init(2, kept)
    return made


def quiet(slot: int, step: str, copied: int) -> None:
    """A progress that is not shown."""


def elsewhere(admin: CitusCluster, slot: int) -> str:
    """A worker that does not have the slot."""
    home = admin.shards()[slot].node
    return next(name for name in admin.names[1:] if name != home)


async def storm(
    nodes: list[str], variant: Variant, moving: Callable[[], None], **config: Any
) -> dict[str, tuple[int, int]]:
    """Increments, locks and sessions while slots move; of each counter what was counted and what is there."""
    stop = asyncio.Event()
    counted = dict.fromkeys((f"c{n}" for n in range(12)), 0)
    held: set[str] = set()
    async with await sharded.connect(variant, nodes[:1], operation_timeout=30, **config) as store:

        async def count(keys: list[str]) -> None:
            while not stop.is_set():
                for key in keys:
                    await store.increment(key)
                    counted[key] += 1

        async def hold(name: str) -> None:
            lock = variant.make("Lock", store, name, ttl=30, fair=False)
            while not stop.is_set():
                # A waiter looks again after some seconds where it did not hear of the release.
                async with lock.acquire(timeout=120):
                    assert name not in held
                    held.add(name)
                    await asyncio.sleep(0.002)
                    held.remove(name)
                await asyncio.sleep(0.05)

        keys = sorted(counted)
        tasks = [
            *(asyncio.ensure_future(count(keys[n::3])) for n in range(3)),
            *(asyncio.ensure_future(hold(f"l{n // 2}")) for n in range(4)),
            asyncio.ensure_future(sharded.visit(variant.make("SessionStore", store), stop)),
        ]
        try:
            await asyncio.to_thread(moving)
        finally:
            stop.set()
            await asyncio.gather(*tasks)
        found = await store.get_many(keys)
    return {key: (counted[key], int(found[key])) for key in keys}


@pytest.mark.usefixtures("only_mover")
@pytest.mark.parametrize("mode", ["block_writes", "force_logical"])
async def test_a_storm_over_moves(
    request: pytest.FixtureRequest, variant: Variant, mode: str
) -> None:
    """While Citus moves slots, every increment counts once, no lock has two holders, sessions keep what was
    saved. UNLOGGED tables are moved with writers waiting, logged ones while they write."""
    online = mode == "force_logical"
    nodes = request.getfixturevalue("logged" if online else "nodes")
    with cluster(nodes) as admin:

        def moving() -> None:
            for _ in range(3 if FULL else 1):
                for slot in range(admin.slots):
                    assert admin.move(slot, elsewhere(admin, slot), quiet)

        clear(nodes)
        table_type = pgkv.TableType.REGULAR if online else pgkv.TableType.UNLOGGED
        found = await storm(nodes, variant, moving, table_type=table_type)
    assert {key: there for key, (_, there) in found.items()} == {
        key: counted for key, (counted, _) in found.items()
    }
    assert min(counted for counted, _ in found.values()) > 0


@pytest.mark.parametrize("fenced", [True, False])
async def test_an_increment_by_an_old_route_counts(
    nodes: list[str],
    admin: CitusCluster,
    variant: Variant,
    monkeypatch: pytest.MonkeyPatch,
    *,
    fenced: bool,
) -> None:
    """For some seconds Citus leaves the relation where it was. Without the fence increments there are
    acknowledged and lost, unless they come after that."""
    if not fenced:
        nothing = Statement("fence", "SELECT $1::bigint", (BINARY,), read_nothing, writes=False)
        monkeypatch.setattr(fences, "FENCE", nothing)
    lost = 0
    async with await sharded.connect(variant, nodes[:1]) as store:
        slot = store.slot_of("k")
        for _ in range(4):
            await store.set("k", "0")
            assert admin.move(slot, elsewhere(admin, slot), quiet)
            assert await store.increment("k") == 1
            async with await sharded.connect(variant, nodes[:1]) as other:
                lost += await other.get("k") == b"0"
    assert (lost == 0) is fenced


async def test_a_plain_read_by_an_old_route(
    nodes: list[str], admin: CitusCluster, variant: Variant
) -> None:
    """While the node that a slot has left has not committed the move, as the last one, it answers a plain read
    with what the slot held. A read in a transaction waits for that commit, and is repeated at the new owner."""
    async with await sharded.connect(variant, nodes[:1], operation_timeout=60) as store:
        slot = store.slot_of("k")
        await store.set("k", "0")
        home = admin.shards()[slot].node
        old = next(dsn for dsn in nodes if "{host}:{port}".format(**conninfo_to_dict(dsn)) == home)
        shards = [
            shard
            for (shard,) in ask(
                old,
                "SELECT shardid FROM pg_dist_shard JOIN pg_class c ON c.oid = logicalrelid "
                f"WHERE relnamespace = 'pgkv_{slot:02d}'::regnamespace",
            )
        ]
        placed = "UPDATE pg_dist_placement SET groupid = %s WHERE shardid = ANY(%s::bigint[])"
        locked = "SELECT lock_shard_metadata(7, %s::bigint[])"
        assert admin.move(slot, elsewhere(admin, slot), quiet)
        with (
            psycopg.connect(old, autocommit=True) as conn,
            psycopg.connect(old, autocommit=True) as look,
        ):
            query = (
                "SELECT p.groupid, g.groupid FROM pg_dist_placement p, pg_dist_local_group g "
                "WHERE shardid = %s"
            )
            ((new, own),) = conn.execute(query, [shards[0]]).fetchall()
            assert new != own
            with conn.transaction():  # as before its commit: it still counts itself as the owner
                conn.execute(locked, [shards])
                conn.execute(placed, [own, shards])
            with conn.transaction():
                conn.execute(locked, [shards])
                async with await sharded.connect(variant, nodes[:1]) as other:
                    assert await other.increment("k") == 1
                assert await store.get("k") == b"0"
                reading = asyncio.ensure_future(
                    store.on("k").run_transaction(lambda tx: tx.get("k"))
                )
                waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND database IS NOT NULL"
                await until(lambda: look.execute(waits).fetchone() != (0,), "it waits")
                conn.execute(placed, [new, shards])
            assert await reading == b"1"
        assert await store.get("k") == b"1"


async def test_an_open_transaction_holds_the_move(
    nodes: list[str], admin: CitusCluster, variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mover steps back, so that others are not kept waiting behind it, and gives up in the end."""
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    async with await sharded.connect(variant, nodes[:1]) as store:
        slot = store.slot_of("k")
        to = elsewhere(admin, slot)
        async with store.on("k").transaction() as tx:
            await tx.increment("k")
            with pytest.raises(pgkv.StoreUnavailableError, match="stay open"):
                await asyncio.to_thread(admin.move, slot, to, quiet)
            assert await store.increment("{k}other") == 1
        assert admin.move(slot, to, quiet)
        assert not admin.move(slot, to, quiet)
        assert await store.increment("k") == 2
        with pytest.raises(pgkv.ConfigError, match="there is no node"):
            admin.move(slot, "elsewhere:1", quiet)


async def test_the_fence_refuses(nodes: list[str], admin: CitusCluster, variant: Variant) -> None:
    """On every node but the owner, in an old snapshot, and for a shard that is not there; a role without any
    right to the tables may call it."""
    ((shard, group),) = ask(
        nodes[0],
        "SELECT shardid, groupid FROM pg_dist_shard JOIN pg_dist_placement USING (shardid) "
        "WHERE logicalrelid = 'pgkv_00.kv_store'::regclass",
    )
    for dsn in nodes:
        with psycopg.connect(dsn, autocommit=True) as conn:
            (own,) = conn.execute("SELECT groupid FROM pg_dist_local_group").fetchone() or (None,)
            if own == group:
                conn.execute("SELECT pgkv_map.fence(%s)", (shard,))
                conn.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
                with pytest.raises(psycopg.Error) as caught, conn.transaction():
                    conn.execute("SELECT pgkv_map.fence(%s)", (shard,))
                assert caught.value.sqlstate == "PK002"
            else:
                with pytest.raises(psycopg.Error) as caught:
                    conn.execute("SELECT pgkv_map.fence(%s)", (shard,))
                assert caught.value.sqlstate == "PK001"
            with pytest.raises(psycopg.Error) as caught:
                conn.execute("SELECT pgkv_map.fence(1)")
    async with await sharded.connect(variant, nodes[:1]) as store:
        with pytest.raises(pgkv.ConfigError, match="no REPEATABLE READ on a Citus slot"):
            await store.on("k").run_transaction(
                lambda tx: tx.get("k"), isolation=psycopg.IsolationLevel.REPEATABLE_READ
            )


def ask(dsn: str, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(dsn, autocommit=True) as conn:
        return conn.execute(query).fetchall()


async def test_a_mover_is_killed(nodes: list[str], admin: CitusCluster, variant: Variant) -> None:
    """Its session ends in the middle: the owner goes on, nothing is lost or left prepared, and the move can
    be repeated."""
    async with await sharded.connect(variant, nodes[:1], operation_timeout=30) as store:
        slot = store.slot_of("k")
        keys = [key for key in map(str, range(2000)) if store.slot_of(key) == slot]
        await store.set_many(dict.fromkeys(keys, "v" * 1000))
        to = elsewhere(admin, slot)
        killed: list[str] = []

        def kill(slot: int, step: str, copied: int) -> None:
            if not killed:
                killed.append(step)
                ask(
                    nodes[0],
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE "
                    "'SELECT citus_schema_move%' AND pid <> pg_backend_pid()",
                )

        with pytest.raises(pgkv.PgkvError):
            await asyncio.to_thread(admin.move, slot, to, kill)
        assert killed
        assert await store.increment("{k}n") == 1
        assert len(await store.get_many(keys)) == len(keys)
        for dsn in nodes:
            assert ask(dsn, "SELECT gid FROM pg_prepared_xacts") == []

        def again() -> bool:
            try:
                return admin.move(slot, to, quiet)
            except pgkv.PgkvError:  # Citus still removes what the first one left
                return False

        wait_until(again, "the move is repeated")
        assert await store.increment("{k}n") == 2
        assert len(await store.get_many(keys)) == len(keys)


async def test_without_the_coordinator(
    nodes: list[str], admin: CitusCluster, variant: Variant
) -> None:
    """A worker has the metadata too: stores open, and operations and fresh routes go on."""
    away = make_conninfo(nodes[0], port="1")
    async with await sharded.connect(variant, [away, nodes[1]]) as store:
        keys = [next(k for k in map(str, range(99)) if store.slot_of(k) == n) for n in range(SLOTS)]
        for key in keys:
            assert await store.increment(key) == 1
        assert admin.move(0, elsewhere(admin, 0), quiet)
        assert await store.increment(keys[0]) == 2
        assert len(await store.get_many(keys)) == SLOTS


async def test_a_node_gets_another_address(
    nodes: list[str], admin: CitusCluster, variant: Variant
) -> None:
    """As when its standby has taken over: programs find it with the placement, or when the old address fails."""
    params = conninfo_to_dict(nodes[1])
    if params["host"] != "127.0.0.1":
        pytest.skip("needs a node with two names")

    def rename(host: str) -> None:
        ask(nodes[0], f"SELECT citus_update_node(nodeid, '{host}', nodeport) FROM pg_dist_node "
                      f"WHERE nodeport = {params['port']}")  # fmt: skip
        synced = "SELECT bool_and(metadatasynced) FROM pg_dist_node"
        wait_until(lambda: ask(nodes[0], synced) == [(True,)], "the nodes know it")

    async with await sharded.connect(variant, nodes[:1]) as store:
        inner = inside(store)._channel.router
        slot = next(
            n for n, row in enumerate(inner.homes) if row.home.endswith(f":{params['port']}")
        )
        key = next(k for k in map(str, range(99)) if store.slot_of(k) == slot)
        assert await store.increment(key) == 1
        rename("localhost")
        try:
            closing = inner.channels[slot]._pool.close()  # as one that cannot connect any more
            if closing is not None:
                await closing
            assert await store.increment(key) == 2
            assert inner.homes[slot].home == f"localhost:{params['port']}"
        finally:
            rename("127.0.0.1")
        assert (await store.shards())[slot].node == f"127.0.0.1:{params['port']}"
        assert await store.increment(key) == 3


@pytest.mark.usefixtures("only_mover")
async def test_a_node_is_added(nodes: list[str], variant: Variant) -> None:
    """After `init` it has the fence, and takes slots; a store that is open already finds it."""
    if len(nodes) < 3:
        pytest.skip("needs two workers")
    made = make_cluster(2)
    with cluster(made) as admin:
        assert admin.init(2, tables(pgkv.Config(made[0], schema=ANY))) == 2
        async with await sharded.connect(variant, made[:1]) as store:
            key = next(k for k in map(str, range(99)) if store.slot_of(k) == 0)
            assert await store.increment(key) == 1
            new = make_cluster(3, made)[-1]
            assert admin.init(None, tables(pgkv.Config(made[0], schema=ANY))) == 0
            params = conninfo_to_dict(new)
            assert admin.move(0, f"{params['host']}:{params['port']}", quiet)
            assert await store.increment(key) == 2
            assert {shard.node for shard in await store.shards()} == {*admin.names[1:]}


def test_the_command_line(
    nodes: list[str], admin: CitusCluster, capfd: pytest.CaptureFixture[str]
) -> None:
    """`pgkv shards` lists, checks, makes what is missing, and moves, all at the coordinator."""

    def run(*args: str, dsn: str = nodes[0]) -> tuple[int, list[Any]]:
        code = main(["shards", *args, "--dsn", dsn, "--json"])
        return code, [json.loads(line) for line in capfd.readouterr().out.splitlines()]

    names = admin.names
    assert run("init") == (0, [{"made": 0, "slots": SLOTS, "servers": names}])
    assert run("init", "--slots", "5")[0] == 2
    assert run("check") == (0, [])
    code, found = run()
    assert (code, len(found)) == (0, SLOTS)
    assert {each["node"] for each in found} == {*names[1:]}
    assert all(each["bytes"] > 0 for each in found)
    to = elsewhere(admin, 0)
    for how in (["--online"], ["--drop", "--yes"]):
        assert run("move", "0", "--to", to, *how)[0] == 2
    assert run("move", "0", "--to", to) == (0, [{"moved": 1}])
    assert run("move", "0", "--to", to) == (0, [{"moved": 0}])
    assert run("resume")[0] == 2
    assert run("check", dsn=nodes[1])[0] == 2  # a worker's


async def test_tables_are_made_at_the_coordinator(nodes: list[str], variant: Variant) -> None:
    """One that is missing is made in its slot, and dropped and made again by `recreate_table`."""
    async with await sharded.connect(variant, nodes[:1]) as store:
        extra = store.table("extra")
        await extra.set_many({f"k{n}": "v" for n in range(20)})
        assert await extra.count() == 20
        async with await sharded.connect(variant, nodes[:1]) as other:
            await extra.recreate_table()
            assert await extra.count() == 0
            await other.table("extra").set("k1", "w")
        assert await extra.get("k1") == b"w"
        async with extra.on("k1").transaction() as tx:
            assert await tx.increment("{k1}n") == 1
        for each in range(SLOTS):
            ask_none(nodes[0], f"DROP TABLE pgkv_{each:02d}.extra")


def ask_none(dsn: str, command: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(command)
