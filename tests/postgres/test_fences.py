"""The way of a store over Citus, on plain servers with stand-ins for what it reads of Citus' catalog: its writes
go behind a fence, and without one they are lost. The real thing is in test_sharded_citus."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from psycopg import pq

import pgkv
from pgkv._engine.results import without_fences
from pgkv._ops.op import BINARY, Op, Statement
from pgkv._shards import fences
from pgkv._shards.sql import Relation
from pgkv._sql.batch import CHUNK_ROWS
from pgkv._sql.table import read_nothing
from pgkv.patterns.lock.api import statements_of
from pgkv.patterns.lock.sql import LockStatements
from tests import again, sharded
from tests.peers import caller_connection, until
from tests.postgres.test_sharded_behaviour import (
    MODULES,
    OF_ONE_SERVER,
    OWN_FIXTURES,
    leave_out,
)
from tests.servers import Server, UserServer, wait_until
from tests.variants import Variant, closing_all, inside

SLOTS = 4


@pytest.fixture(scope="module")
def citus(server: Server | UserServer) -> sharded.CitusStandIn:
    """Two nodes with four slots."""
    if isinstance(server, UserServer):
        pytest.skip("changes the catalog: not on the server of PGKV_TEST_DSN")
    made = sharded.databases(server.dsn, [f"c_{secrets.token_hex(4)}" for _ in range(2)])
    return sharded.CitusStandIn(made, SLOTS)


@pytest.fixture
def make_store(
    citus: sharded.CitusStandIn, variant: Variant, dsn: str, event_loop_runner: asyncio.Runner
) -> Iterator[Callable[..., Coroutine[Any, Any, Any]]]:
    """`await make_store()` is a store over both."""
    del dsn  # its fixture looks for connections that are left open: after the stores were closed
    with closing_all(event_loop_runner) as made:

        async def make(**config: Any) -> Any:
            assert "dsn" not in config
            made.append(await sharded.connect(variant, citus.dsns, **config))
            return made[-1]

        yield make
    citus.clear()


LEFT_OUT = {
    "test_lock__clearing_the_store_frees_no_lock": "what stands for a table here is a view: it has no TRUNCATE",
    "test_cached__a_missing_table_is_made": "there are only the tables of the default names",
}
again.adopt(globals(), MODULES, own=OWN_FIXTURES, left_out=LEFT_OUT, one_in=60)
leave_out(globals(), OF_ONE_SERVER | {"clock"})


@pytest.fixture
def keys(citus: sharded.CitusStandIn) -> Iterator[list[str]]:
    """A key of each slot, all at home again afterwards."""
    with pgkv.Store.sharded(citus.dsns) as store:
        yield [next(k for k in map(str, range(99)) if store.slot_of(k) == n) for n in range(SLOTS)]
        for slot, shard in enumerate(store.shards()):
            home, now = slot % 2, int(shard.node.partition(":")[2])
            if home != now:
                citus.move(slot, now, home, lambda: None)
    citus.clear()


def unfenced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fence that lets everything pass."""
    nothing = Statement("fence", "SELECT $1::bigint", (BINARY,), read_nothing, writes=False)
    monkeypatch.setattr(fences, "FENCE", nothing)


@pytest.mark.parametrize("fenced", [True, False])
async def test_an_increment_by_an_old_route_counts(
    citus: sharded.CitusStandIn,
    keys: list[str],
    variant: Variant,
    monkeypatch: pytest.MonkeyPatch,
    *,
    fenced: bool,
) -> None:
    """After a move the old node still has the relation. Without the fence increments there are acknowledged and
    lost: that shows what this test can see."""
    if not fenced:
        unfenced(monkeypatch)
    async with await sharded.connect(variant, citus.dsns) as store:
        assert await store.increment(keys[1]) == 1
        citus.move(1, 1, 0, lambda: None)
        assert await store.increment(keys[1]) == 2
        async with store.pipeline() as p:
            both = p.increment(keys[1]), p.increment(keys[0])
        assert [each.result() for each in both] == [3, 1]
        async with await sharded.connect(variant, citus.dsns) as other:
            assert await other.get(keys[1]) == (b"3" if fenced else b"1")
            assert (await store.shards())[1].node == "node:0"


@pytest.mark.parametrize("fenced", [True, False])
async def test_an_increment_during_a_move_waits(
    citus: sharded.CitusStandIn,
    keys: list[str],
    monkeypatch: pytest.MonkeyPatch,
    *,
    fenced: bool,
) -> None:
    """Between the copy and the new placement it waits for the move's lock, and then goes where the slot went."""
    if not fenced:
        unfenced(monkeypatch)
    with pgkv.Store.sharded(citus.dsns) as store:
        store.increment(keys[2])
        answers: list[int] = []
        worker = threading.Thread(target=lambda: answers.append(store.increment(keys[2])))

        def meanwhile() -> None:
            worker.start()
            waits = "SELECT count(*) > 0 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            with psycopg.connect(citus.dsns[0], autocommit=True) as conn:
                wait_until(
                    lambda: bool(answers) or conn.execute(waits).fetchone() == (True,),
                    "it is acknowledged, or waits",
                )

        citus.move(2, 0, 1, meanwhile)
        worker.join(30)
        assert answers == [2]
    with pgkv.Store.sharded(citus.dsns) as store:
        assert store.get(keys[2]) == (b"2" if fenced else b"1")


async def test_a_transaction_holds_its_slot(
    citus: sharded.CitusStandIn, keys: list[str], variant: Variant
) -> None:
    """A move waits for it. One that begins by an old route fails, may be repeated, and is repeated elsewhere."""
    async with await sharded.connect(variant, citus.dsns) as store:
        held = "SELECT lock_shard_metadata(7, ARRAY[1100::bigint])"
        with psycopg.connect(citus.dsns[1], autocommit=True) as conn:
            conn.execute("SET lock_timeout = '100ms'")
            async with store.on(keys[1]).transaction() as tx:
                assert await tx.get(keys[1]) is None  # a read, too
                with pytest.raises(psycopg.errors.LockNotAvailable):
                    conn.execute(held)
            conn.execute(held)
        citus.move(1, 1, 0, lambda: None)
        with pytest.raises(pgkv.TableNotFoundError, match="on another node by now") as caught:
            async with store.on(keys[1]).transaction() as tx:
                await tx.increment(keys[1])
        assert caught.value.retryable
        citus.move(1, 0, 1, lambda: None)

        async def work(tx: Any) -> int:
            return int(await tx.increment(keys[1]))

        assert await store.on(keys[1]).run_transaction(work) == 1


async def test_old_snapshots_are_refused(
    citus: sharded.CitusStandIn, keys: list[str], variant: Variant
) -> None:
    """One that is older than a move would see the placement of before it."""
    async with await sharded.connect(variant, citus.dsns) as store:
        one = store.on(keys[0])
        with pytest.raises(pgkv.ConfigError, match="no REPEATABLE READ on a Citus slot"):
            await one.run_transaction(
                lambda tx: tx.get(keys[0]), isolation=psycopg.IsolationLevel.REPEATABLE_READ
            )
        conn = await caller_connection(variant, citus.dsns[0])
        try:
            async with conn.transaction():
                await conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                with pytest.raises(pgkv.ConfigError, match="no REPEATABLE READ on a Citus slot"):
                    await one.using(conn).set(keys[0], "v")
        finally:
            await conn.close()


async def test_placements_are_checked(citus: sharded.CitusStandIn, variant: Variant) -> None:
    """`auto` finds Citus; a number of slots that is wrong, a DSN given twice and a server without Citus are said."""
    dsns = citus.dsns
    async with await sharded.connect(variant, dsns[:1], placement="citus", slots=SLOTS) as store:
        assert len(await store.shards()) == SLOTS
    with pytest.raises(pgkv.ConfigError, match="has 4 slots, not 5"):
        await sharded.connect(variant, dsns, slots=5)
    with pytest.raises(pgkv.ConfigError, match="lead to one node of Citus"):
        await sharded.connect(variant, [dsns[0], dsns[0]])
    plain = psycopg.conninfo.make_conninfo(dsns[0], dbname="postgres")
    with pytest.raises(pgkv.ConfigError, match="no slots on Citus"):
        await sharded.connect(variant, [plain], placement="citus")


def test_which_statements_are_fenced() -> None:
    """A plain read keeps its name, whatever else is sent has the relation; a payload's word stays."""
    found = fences.Fences()
    found.learn({'"pgkv_00"."t"': Relation(7, "pgkv_00.t_7")})
    table = pgkv.Config("postgresql:///", schema="pgkv_00", table_name="t").table

    def plan(text: str) -> Any:
        return found.plan(Statement("s", text, (), read_nothing, table))

    assert plan('SELECT value FROM "pgkv_00"."t" WHERE key = $1').plain
    for text in (
        'SELECT value FROM "pgkv_00"."t" WHERE key = $1 FOR UPDATE',
        'WITH x AS (DELETE FROM "pgkv_00"."t") SELECT 1',
        'SELECT pg_relation_size(\'"pgkv_00"."t"\'::regclass)',
    ):
        made = plan(text)
        assert not made.plain
        assert "pgkv_00.t_7" in made.statement.sql
        assert '"t"' not in made.statement.sql
    told = plan('INSERT INTO "pgkv_00"."t" SELECT pg_notify(\'c\', \'"pgkv_00"."t"\' || $1)')
    assert told.statement.sql.startswith("INSERT INTO pgkv_00.t_7 SELECT")
    assert told.statement.sql.count('"pgkv_00"."t"') == 1
    assert plan("SELECT 1") is None
    with pytest.raises(pgkv.TableNotFoundError):
        plan('DELETE FROM "pgkv_00"."other"')
    named = Statement("s", "SELECT to_regclass($1)", (), read_nothing, table)
    op = found.plan(named)
    assert op is not None
    assert op.of(Op(named, [b'"pgkv_00"."t"'])).params == [b"pgkv_00.t_7"]


def test_whose_result_a_refused_fence_is() -> None:
    """It answers for the operations of its slot. What was aborted with them has its own result."""
    refused, aborted = pq.ExecStatus.FATAL_ERROR, pq.ExecStatus.PIPELINE_ABORTED
    results: Any = [
        SimpleNamespace(status=int(status))
        for status in (pq.ExecStatus.TUPLES_OK, refused, aborted, aborted, aborted)
    ]
    found = without_fences(results, [0, 1, None])
    assert [[*map(id, results)].index(id(each)) for each in found] == [2, 1, 4]
    assert without_fences(results[2:], [None] * 3) == results[2:]


async def test_a_fence_that_waits_too_long(
    citus: sharded.CitusStandIn, keys: list[str], variant: Variant
) -> None:
    """With a lock_timeout of the connection's it is asked again, until the move ends."""
    dsns = [
        psycopg.conninfo.make_conninfo(dsn, options="-c lock_timeout=20ms") for dsn in citus.dsns
    ]
    async with await sharded.connect(variant, dsns, retry=None) as store:
        with psycopg.connect(citus.dsns[0]) as conn:
            conn.execute("SELECT lock_shard_metadata(7, ARRAY[1000::bigint])")
            waiting = asyncio.ensure_future(asyncio.wait_for(store.increment(keys[0]), 30))
            done, _ = await asyncio.wait([waiting], timeout=0.2)
            assert not done
        assert await waiting == 1


async def test_jobs_have_ids(
    citus: sharded.CitusStandIn, keys: list[str], variant: Variant
) -> None:
    """A shard has no identity of its own: they come from a function that asks the table's sequence."""
    async with await sharded.connect(variant, citus.dsns) as store:
        queue = variant.make("Queue", store, "q")
        first = await queue.put(b"1")
        assert (await queue.put(b"2")).id == first.id + 1
        assert (await queue.take()).payload == b"1"
    assert keys


async def test_statements_are_of_their_cluster(
    citus: sharded.CitusStandIn, keys: list[str], variant: Variant
) -> None:
    """A store that comes after another one, over tables of the same names, does not get statements with the
    other's relations: those are told nothing any more."""
    for _ in range(2):
        async with await sharded.connect(variant, citus.dsns) as store:
            inner = inside(store)
            lock = variant.make("Lock", store, keys[0])
            async with lock.acquire():
                pass
            found = statements_of(inner._in_slot(0), LockStatements, durable=True)
            assert found.table.fences is inner._channel.router.fences


async def test_a_batch_that_fails_in_the_middle(
    citus: sharded.CitusStandIn, keys: list[str], variant: Variant
) -> None:
    """Operations that stand for themselves are committed one by one. When a table is dropped in the middle,
    those before have happened: the error says so, and none is repeated."""
    a, b, text = (f"{{{keys[0]}}}{name}" for name in ("a", "b", "text"))
    (shard, name), (gone, its_name) = citus.shards[0][0], citus.shards[2][0]
    async with await sharded.connect(variant, citus.dsns, operation_timeout=60) as store:
        await store.set_many({b: "0", text: "no number", keys[2]: "0"})

        async def send() -> list[Any]:
            with pytest.raises(
                pgkv.StoreUnavailableError, match="before it have happened"
            ) as caught:
                async with store.pipeline() as p:
                    handles = [p.increment(key) for key in (a, text, b, keys[2])]
            assert caught.value.outcome_unknown
            return handles

        with (
            psycopg.connect(citus.dsns[0]) as held,
            psycopg.connect(citus.dsns[0], autocommit=True) as conn,
        ):
            held.execute(f"SELECT FROM {name}_{shard} WHERE key = %s FOR UPDATE", [b])
            sending = asyncio.ensure_future(send())
            waits = (
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                "AND wait_event_type = 'Lock'"
            )
            await until(lambda: conn.execute(waits).fetchone() == (1,), "the third one waits")
            conn.execute("DELETE FROM pg_catalog.pg_dist_shard WHERE shardid = %s", [gone])
            try:
                await store.shards()  # reads what is there now
                held.rollback()
                handles = await sending
            finally:
                conn.execute(
                    "INSERT INTO pg_catalog.pg_dist_shard VALUES (%s, %s)", [its_name, gone]
                )
        for each in handles:
            with pytest.raises(pgkv.StoreUnavailableError, match="before it have happened"):
                each.result()
        found = await store.get_many([a, b, keys[2]])
        assert found == {a: b"1", b: b"1", keys[2]: b"0"}


async def test_many_chunks_follow_their_slot(
    citus: sharded.CitusStandIn, keys: list[str], variant: Variant
) -> None:
    """A batch of one slot that takes several statements is sent by an old route, and happens where the slot is."""
    async with await sharded.connect(variant, citus.dsns) as store:
        deltas = {f"{{{keys[1]}}}{n}": 1 for n in range(CHUNK_ROWS + 1)}
        one = store.on(keys[1])
        assert await one.increment(f"{{{keys[1]}}}0") == 1
        citus.move(1, 1, 0, lambda: None)
        sums = await one.increment_many(deltas)
        assert [sums[key] for key in deltas] == [2] + [1] * CHUNK_ROWS
        async with await sharded.connect(variant, citus.dsns) as other:
            assert await other.get_many(deltas) == {key: b"%d" % sums[key] for key in deltas}


@contextlib.contextmanager
def leaving(
    citus: sharded.CitusStandIn, tmp_path: Path
) -> Iterator[tuple[list[str], Callable[[], None]]]:
    """DSNs, the first one by an address that its node leaves for another when the function is called: as when
    its standby takes over."""
    params = psycopg.conninfo.conninfo_to_dict(citus.dsns[0])
    old, here = tmp_path / "old", str(params["host"])
    old.symlink_to(here)
    told = "UPDATE pg_catalog.pg_dist_node SET nodename = %s, nodeport = %s WHERE groupid = 0"
    ended = "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = %s"
    with psycopg.connect(citus.dsns[1], autocommit=True) as conn:

        def leave() -> None:
            conn.execute(told, [here, params.get("port", "5432")])
            old.unlink()
            conn.execute(ended, [params["dbname"]])

        yield [psycopg.conninfo.make_conninfo(citus.dsns[0], host=str(old)), citus.dsns[1]], leave
        conn.execute(told, ["node", 0])


async def test_a_lease_is_renewed_at_another_address(
    citus: sharded.CitusStandIn, keys: list[str], variant: Variant, tmp_path: Path
) -> None:
    """The renewal fails at the old address, asks for the new one, and goes on there."""
    with leaving(citus, tmp_path) as (dsns, leave):
        store = await sharded.connect(variant, dsns)
        async with store, variant.make("Lock", store, keys[0], ttl=60).acquire() as lease:
            inner = inside(lease)
            background = inner._runtime.background()
            leave()
            for _ in range(2):
                end, inner._due = inner._until, 0.0
                await until(lambda: inner._until > end or lease.is_lost, "it is renewed")  # noqa: B023
            assert not lease.is_lost
            assert inner._runtime.background() is not background


@pytest.mark.parametrize("way", ["pipeline", "transaction", "many"])
async def test_the_next_try_is_at_another_address(
    citus: sharded.CitusStandIn, keys: list[str], variant: Variant, tmp_path: Path, way: str
) -> None:
    """What may have happened is not repeated; the failure is the reason to ask for the new address."""
    with leaving(citus, tmp_path) as (dsns, leave):
        store = await sharded.connect(variant, dsns, retry=None)
        async with store:

            async def work() -> None:
                if way == "pipeline":
                    async with store.pipeline() as p:
                        p.increment(keys[0])
                        p.increment(keys[1])
                elif way == "transaction":
                    async with store.on(keys[0]).transaction() as tx:
                        await tx.increment(keys[0])
                else:
                    await store.increment_many(dict.fromkeys(keys[:2], 1))

            await work()
            leave()
            with pytest.raises(pgkv.StoreUnavailableError):
                await work()
            await work()
            assert await store.get(keys[0]) == b"2"
