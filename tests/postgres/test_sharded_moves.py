"""Moving the slots of a sharded store: nothing that was acknowledged is lost, wherever the mover dies."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator
from time import monotonic
from typing import Any

import psycopg
import pytest

import pgkv
from pgkv._engine.flows import PIPELINE_MAX
from pgkv._shards import moves, placement
from pgkv._shards.admin import Servers
from pgkv._shards.moves import How
from pgkv._shards.placement import Router
from pgkv._shards.sql import WAKE_WAITERS
from pgkv._sql.batch import CHUNK_ROWS
from pgkv.patterns.lock.sql import CHANNEL as LOCK_CHANNEL
from pgkv.patterns.queue.sql import CHANNEL as QUEUE_CHANNEL
from tests import FULL, sharded
from tests.peers import until
from tests.postgres.test_sharded import SLOTS, rows
from tests.servers import Server, UserServer, wait_until
from tests.variants import Variant, inside

STEPS = {
    How.COPY: ("marked", "locked", "copying", "copied", "handed over", "live", "told"),
    How.ONLINE: (
        "marked",
        "copying",
        "following",
        "locked",
        "copied",
        "handed over",
        "live",
        "told",
    ),
    How.DROP: ("marked", "copied", "live"),
}
KILLS = [
    pytest.param(how, step, id=f"{how.value}-{step}")
    for how in STEPS
    for step in STEPS[how]
    if FULL or how is How.ONLINE or (how, step) in ((How.COPY, "copied"), (How.DROP, "live"))
]


@pytest.fixture(scope="module")
def dsns(server: Server | UserServer) -> list[str]:
    """Three servers with six slots; the third one has none at first."""
    if isinstance(server, UserServer):
        pytest.skip("makes databases: not on the server of PGKV_TEST_DSN")
    made = sharded.databases(server.dsn, [f"m_{secrets.token_hex(4)}" for _ in range(3)])
    sharded.init(made[:2], SLOTS)
    sharded.init(made, None)
    return made


@pytest.fixture
def servers(dsns: list[str]) -> Iterator[Servers]:
    """Connections for administration; everything is emptied and in order afterwards."""
    with sharded.cluster(dsns) as found:
        yield found
        assert found.check() == []
    sharded.clear(dsns)


def test_waiters_are_woken_by_their_channels() -> None:
    """The names that a move notifies are those of the patterns."""
    names = ",".join(each.decode() for each in (LOCK_CHANNEL, QUEUE_CHANNEL))
    assert f"'{{{names}}}'" in WAKE_WAITERS


def quiet(slot: int, step: str, copied: int) -> None:
    """A progress that is not shown."""


def elsewhere(servers: Servers, slot: int) -> str:
    """A server that does not have the slot."""
    servers.read()
    home = servers.homes()[slot].home
    return next(each.name for each in servers.servers if each.name != home)


@pytest.mark.parametrize("how", [How.COPY, How.ONLINE], ids=str)
def test_a_slot_moves_with_all_that_it_has(servers: Servers, dsns: list[str], how: How) -> None:
    """Rows with their versions and expiries, identities that go on, indexes, options and rights."""
    shown = (
        "SELECT c.relname, c.relpersistence, c.reloptions, (SELECT array_agg((attname, "
        "format_type(atttypid, atttypmod), attnotnull, attidentity, attcollation::regcollation) "
        "ORDER BY attnum) FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0), "
        "ARRAY(SELECT pg_get_indexdef(indexrelid) FROM pg_index WHERE indrelid = c.oid ORDER BY 1), "
        "ARRAY(SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = c.oid "
        "AND contype <> 'n' ORDER BY 1), c.relacl FROM pg_class c WHERE relnamespace = "
        "to_regnamespace(%s) AND relkind = 'r' ORDER BY 1"
    )
    with pgkv.Store.sharded(dsns, pool_min_size=0) as store:
        key = next(k for k in map(str, range(99)) if store.slot_of(k) == 1)
        store.set(key, "v", ttl=1000)
        store.table("extra", max_entries=600).set(key, "v")
        entry = store.get_entry(key)
        assert entry is not None
        before = entry.value, entry.version, entry.expires_at
        name = next(n for n in map(str, range(99)) if store.slot_of(n) == 1)
        queue = pgkv.Queue(store, name)
        first = queue.put(b"1").id
        pgkv.Lock(store, name).acquire().release()
        token = 1 << 60  # further than the clock, by which tokens begin
        servers.named(servers.homes()[1].home).execute(
            "UPDATE pgkv_01.kv_store_locks SET version = %s", token
        )
        home = servers.named(servers.homes()[1].home)
        home.execute("GRANT SELECT ON pgkv_01.kv_store TO PUBLIC")
        found = home.execute(shown, "pgkv_01").fetchall()
        for to in ("n3", "n2", home.name):
            moves.move(servers, 1, to, quiet, how)
            assert servers.named(to).execute(shown, "pgkv_01").fetchall() == found
            assert [s.node for s in store.shards()][1] == to
            entry = store.get_entry(key)
            assert entry is not None
            assert (entry.value, entry.version, entry.expires_at) == before
        assert not moves.move(servers, 1, home.name, quiet)
        assert queue.put(b"2").id == first + 1
        assert [job.payload for job in queue.take_many(9)] == [b"1", b"2"]
        with pgkv.Lock(store, name).acquire() as lease:
            assert lease.token == token + 1


@pytest.mark.parametrize(
    ("how", "fenced"), [(How.COPY, True), (How.COPY, False), (How.ONLINE, True)], ids=str
)
def test_the_lock_is_the_fence(
    servers: Servers, dsns: list[str], monkeypatch: pytest.MonkeyPatch, how: How, *, fenced: bool
) -> None:
    """An increment in the moment between copy and hand-over waits, and counts. Without the lock it is
    acknowledged and lost: that shows what this test can see."""
    if not fenced:
        monkeypatch.setattr(moves, "_lock", lambda *_: None)
    with pgkv.Store.sharded(dsns) as store:
        key = next(k for k in map(str, range(99)) if store.slot_of(k) == 2)
        store.increment(key)
        answers: list[int] = []
        worker = threading.Thread(target=lambda: answers.append(store.increment(key)))

        def progress(slot: int, step: str, copied: int) -> None:
            if step == "copied":
                worker.start()
                source = servers.named(servers.homes()[2].home)
                waits = (
                    "SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = current_database() "
                    "AND wait_event_type = 'Lock'"
                )
                with psycopg.connect(source.conninfo, autocommit=True) as conn:
                    wait_until(
                        lambda: bool(answers) or conn.execute(waits).fetchone() == (True,),
                        "it is acknowledged, or waits",
                    )

        moves.move(servers, 2, elsewhere(servers, 2), progress, how)
        worker.join(90)
        assert answers == [2]
        assert store.get(key) == (b"2" if fenced else b"1")


@pytest.mark.parametrize("noted", [True, False])
def test_changes_during_the_copy_arrive(
    servers: Servers, dsns: list[str], monkeypatch: pytest.MonkeyPatch, *, noted: bool
) -> None:
    """Whatever is written while an online move copies: rows that are new, changed, deleted or emptied away,
    and two that exchange a unique value. Without the notes the copy is as it was."""
    if not noted:
        monkeypatch.setattr(moves._Move, "_catch_up", lambda _: 0)
    with pgkv.Store.sharded(dsns) as store:
        new, changed, gone, *_ = [f"{{2}}{n}" for n in range(3)]
        slot = store.slot_of(new)
        queue = pgkv.Queue(store, next(n for n in map(str, range(99)) if store.slot_of(n) == slot))
        first = queue.put(b"1", dedupe="unique")
        emptied = store.table("emptied")
        for each in (store, emptied):
            each.set_many({changed: "old", gone: "old"})

        seen: set[str] = set()

        def progress(slot: int, step: str, copied: int) -> None:
            if step in seen:
                return
            seen.add(step)
            if step == "following":  # a truncation waits for the copy's transaction
                emptied.on(new).truncate()
            elif step == "copying":
                store.set_many({new: "new", changed: "new"})
                store.delete(gone)
                queue.cancel(first.id)
                queue.put(b"2", dedupe="unique")

        moves.move(servers, slot, elsewhere(servers, slot), progress, How.ONLINE)
        expected = {new: b"new", changed: b"new"} if noted else {changed: b"old", gone: b"old"}
        assert store.get_many([new, changed, gone]) == expected
        assert emptied.exists(gone) is not noted
        assert [job.payload for job in queue.take_many(9)] == [b"2" if noted else b"1"]
        emptied.recreate_table()


def test_what_an_online_move_cannot_follow(servers: Servers, dsns: list[str]) -> None:
    """A table that is dropped meanwhile, or has no primary key: the slot stays, with nothing left over."""
    with pgkv.Store.sharded(dsns) as store:
        key = next(k for k in map(str, range(99)) if store.slot_of(k) == 4)
        extra = store.table("extra_2").on(key)
        extra.set(key, "v")
        source = servers.named(servers.homes()[4].home)

        def progress(slot: int, step: str, copied: int) -> None:
            if step == "following":
                with psycopg.connect(source.conninfo, autocommit=True) as conn:
                    conn.execute("DROP TABLE pgkv_04.extra_2")

        to = elsewhere(servers, 4)
        with pytest.raises(pgkv.StoreUnavailableError, match="made or dropped meanwhile"):
            moves.move(servers, 4, to, progress, How.ONLINE)
        source.execute("CREATE TABLE pgkv_04.other (n INTEGER)")
        with pytest.raises(pgkv.ConfigError, match=r"pgkv_04\.other has no primary key"):
            moves.move(servers, 4, to, quiet, How.ONLINE)
        source.execute("DROP TABLE pgkv_04.other")
        servers.read()
        assert servers.check() == []
        triggers = "SELECT count(*) FROM pg_trigger WHERE tgname ~ 'pgkv'"
        assert source.execute(triggers).fetchone() == (0,)


def test_an_online_move_whose_target_dies(servers: Servers, dsns: list[str]) -> None:
    """The slot stays where it is, without the triggers that cost its clients time; `resume` drops
    the copy that is left."""
    to, source = servers.named(elsewhere(servers, 4)), servers.named(servers.homes()[4].home)

    def progress(slot: int, step: str, copied: int) -> None:
        if step == "following":
            to.conn.close()

    with pgkv.Store.sharded(dsns) as store:
        key = next(k for k in map(str, range(99)) if store.slot_of(k) == 4)
        store.increment(key)
        with pytest.raises(pgkv.StoreUnavailableError):
            moves.move(servers, 4, to.name, progress, How.ONLINE)
        triggers = "SELECT count(*) FROM pg_trigger WHERE tgname ~ 'pgkv'"
        assert source.execute(triggers).fetchone() == (0,)
        assert store.increment(key) == 2
        with sharded.cluster(dsns) as again:
            assert moves.resume(again, 4, quiet)
            assert again.homes()[4].home == source.name
            assert moves.move(again, 4, to.name, quiet, How.ONLINE)
        assert store.increment(key) == 3


def test_a_client_without_rights_writes_during_the_copy(servers: Servers, dsns: list[str]) -> None:
    """Its changes are noted with the rights of the mover."""
    source = servers.named(servers.homes()[2].home)
    seen: list[int] = []
    role = f"client_{secrets.token_hex(4)}"
    source.execute(f"CREATE ROLE {role}")
    source.execute(f"GRANT USAGE ON SCHEMA pgkv_02 TO {role}")
    source.execute(f"GRANT INSERT ON pgkv_02.kv_store TO {role}")

    def progress(slot: int, step: str, copied: int) -> None:
        if step == "following" and not seen:
            with psycopg.connect(source.conninfo) as conn:
                conn.execute(f"SET ROLE {role}")
                conn.execute("INSERT INTO pgkv_02.kv_store (key, value) VALUES ('k', 'v')")
            seen.append(1)

    to = servers.named(elsewhere(servers, 2))
    moves.move(servers, 2, to.name, progress, How.ONLINE)
    assert to.execute("SELECT key FROM pgkv_02.kv_store").fetchall() == [("k",)]
    to.execute(f"DROP OWNED BY {role}")
    to.execute(f"DROP ROLE {role}")


def test_the_session_of_a_mover(dsns: list[str]) -> None:
    """It waits for the disk, and no statement's snapshot is older than its lock, whatever the DSN sets."""
    options = r"-c synchronous_commit=off -c default_transaction_isolation=repeatable\ read"
    slack = [psycopg.conninfo.make_conninfo(dsn, options=options) for dsn in dsns]
    with sharded.cluster(slack) as servers:
        for server in servers.servers:
            assert server.conn.execute("SHOW synchronous_commit").fetchone() == ("on",)
            with server.conn.transaction():
                row = server.conn.execute("SHOW transaction_isolation").fetchone()
            assert row == ("read committed",)


def test_a_move_can_give_up_what_a_crash_would(servers: Servers, dsns: list[str]) -> None:
    """UNLOGGED tables arrive empty, logged ones with their rows; what fences stays fenced."""
    with pgkv.Store.sharded(dsns) as store:
        key = next(k for k in map(str, range(99)) if store.slot_of(k) == 5)
        logged = store.table("logged", table_type=pgkv.TableType.REGULAR)
        for each in (store, logged):
            each.set(key, "v")
        lock = pgkv.Lock(store, key)
        with lock.acquire() as lease:
            token = lease.token
        moves.move(servers, 5, elsewhere(servers, 5), quiet, How.DROP)
        assert (store.get(key), logged.get(key)) == (None, b"v")
        with lock.acquire() as lease:
            assert lease.token > token
        logged.recreate_table()


KILLED = """
import os, signal, sys
from tests import sharded
from pgkv._shards import moves, placement
def progress(slot, step, copied):
    if step == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGKILL)
with sharded.cluster(sys.argv[5:]) as servers:
    moves.move(servers, int(sys.argv[3]), sys.argv[4], progress, moves.How(sys.argv[2]))
"""


@pytest.mark.parametrize(("how", "step"), KILLS)
def test_a_mover_is_killed(servers: Servers, dsns: list[str], how: How, step: str) -> None:
    """At any step: clients go on or wait, `check` shows it, `resume` finishes it, and no count is lost."""
    to = elsewhere(servers, 3)
    with pgkv.Store.sharded(dsns, operation_timeout=120) as store:
        keys = [k for k in map(str, range(300)) if store.slot_of(k) == 3]
        store.set_many(dict.fromkeys(keys, "1"))
        command = [sys.executable, "-c", KILLED, step, how.value, "3", to, *dsns]
        assert subprocess.run(command, check=False).returncode == -9
        answers: list[int] = []
        worker = threading.Thread(target=lambda: answers.append(store.increment(keys[0])))
        worker.start()

        def resumed() -> bool:
            try:  # the server may not have seen yet that the mover is gone
                return moves.resume(servers, 3, quiet)
            except pgkv.StoreUnavailableError:
                return False

        servers.read()
        assert any(each.slot == 3 for each in servers.check())
        wait_until(resumed, "the mover's sessions end")
        worker.join(150)
        kept = how is not How.DROP or step in STEPS[How.DROP][:2]  # else the resumed move copies
        assert answers == [2 if kept else 1]
        assert [s.node for s in store.shards()][3] == to
        assert store.get(keys[0]) == b"%d" % answers[0]
        assert len(store.get_many(keys)) == (len(keys) if kept else 1)
        assert not moves.resume(servers, 3, quiet)


def test_what_cannot_be_moved(servers: Servers, dsns: list[str], monkeypatch: Any) -> None:
    """A slot that is not there, one that an open transaction holds, one that is being moved."""
    with pytest.raises(pgkv.ConfigError, match="there are 0 to 5"):
        moves.move(servers, 6, "n1", quiet)
    with pytest.raises(pgkv.ConfigError, match="there are n1, n2, n3"):
        moves.move(servers, 0, "n4", quiet)
    to = elsewhere(servers, 0)
    with sharded.cluster(dsns) as others:

        def progress(slot: int, step: str, copied: int) -> None:
            if step == "locked":
                with pytest.raises(pgkv.StoreUnavailableError, match="another move of slot 0"):
                    moves.move(others, 0, to, quiet)

        moves.move(servers, 0, to, progress)
    monkeypatch.setattr(moves, "PATIENCE", 0.0)
    servers.read()
    home = servers.named(servers.homes()[0].home)
    with psycopg.connect(home.conninfo) as conn:
        conn.execute("SELECT FROM pgkv_00.kv_store")
        with pytest.raises(pgkv.StoreUnavailableError, match="stay open"):
            moves.move(servers, 0, elsewhere(servers, 0), quiet)


async def test_a_mover_that_waits_steps_back(
    servers: Servers, dsns: list[str], variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transaction that stays open holds up the move, and not the clients of the slot behind the move."""
    monkeypatch.setattr(moves, "LOCK_SECONDS", 0.1)
    waits = (
        "SELECT count(*) FROM pg_locks JOIN pg_database d ON d.oid = database WHERE NOT granted "
        "AND datname = current_database() AND mode = 'AccessExclusiveLock'"
    )
    store = await sharded.connect(variant, dsns, operation_timeout=60)
    async with store:
        await store.set_many({"{k}": "v", "{k}n": "0"})
        slot = store.slot_of("{k}")
        to, home = elsewhere(servers, slot), servers.named(servers.homes()[slot].home)
        with psycopg.connect(home.conninfo, autocommit=True) as look:
            async with store.on("{k}").transaction() as tx:
                await tx.set("{k}", "w")
                moving = asyncio.ensure_future(
                    asyncio.to_thread(moves.move, servers, slot, to, quiet)
                )
                for n in range(3):
                    await until(lambda: look.execute(waits).fetchone() != (0,), "the mover waits")
                    assert await store.increment("{k}n") == n + 1
                assert not moving.done()
            assert await moving
        assert await store.get_many(["{k}", "{k}n"]) == {"{k}": b"w", "{k}n": b"3"}


def test_a_slot_that_got_its_name_meanwhile(
    servers: Servers, dsns: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that met no table between a move's two commits, and reads the map after them, tries again: the
    table is not missing."""
    to, read = elsewhere(servers, 0), Router._read
    reading, moved = threading.Event(), threading.Event()

    def read_late(router: Router, node: Any, deadline: float) -> Any:
        if node.name == to:
            reading.set()
            assert moved.wait(30)
        return (yield from read(router, node, deadline))

    with pgkv.Store.sharded(dsns, auto_create_table=False, operation_timeout=30) as store:
        key = next(k for k in map(str, range(99)) if store.slot_of(k) == 0)
        worker = threading.Thread(target=store.increment, args=[key])

        def progress(slot: int, step: str, copied: int) -> None:
            if step == "handed over":
                worker.start()
                assert reading.wait(30)

        monkeypatch.setattr(Router, "_read", read_late)
        moves.move(servers, 0, to, progress)
        moved.set()
        worker.join(30)
        assert store.get(key) == b"1"


def test_a_slot_that_stays_between_two_servers(
    servers: Servers, dsns: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a mover dies after it has handed a slot over. A pipeline has the answers of all other slots, of
    its next server too, and the failure is that slot's; a batch has that failure, too."""
    read, to, reads = Router._read, elsewhere(servers, 0), 0

    def count(router: Router, node: Any, deadline: float) -> Any:
        nonlocal reads
        found = yield from read(router, node, deadline)
        reads += node.name == to
        return found

    def late() -> float:
        return monotonic() + (1000.0 if reads > 6 else 0.0)

    def progress(slot: int, step: str, copied: int) -> None:
        nonlocal reads
        if step != "handed over":
            return
        with (
            monkeypatch.context() as patched,
            # No connection knows a statement: to prepare one of the slot fails for all of them.
            pgkv.Store.sharded(dsns, operation_timeout=30, retry=None) as store,
        ):
            patched.setattr(Router, "_read", count)
            patched.setattr(placement, "monotonic", late)
            reads = 0
            with pytest.raises(pgkv.StoreUnavailableError, match=why), store.pipeline() as p:
                handles = [p.increment(key) for key in keys for _ in range(2)]
            for each in handles[:2]:
                with pytest.raises(pgkv.StoreUnavailableError, match=why):
                    each.result()
            assert [each.result() for each in handles[2:]] == [1, 2] * (SLOTS - 1)
            reads = 0
            with pytest.raises(pgkv.StoreUnavailableError, match=why):
                store.set_many(dict.fromkeys(keys, "v"))

    with pgkv.Store.sharded(dsns) as store:
        keys = [
            next(k for k in map(str, range(99)) if store.slot_of(k) == slot)
            for slot in range(SLOTS)
        ]
        why = "slot 0 was being moved"
        moves.move(servers, 1, to, quiet)
        moves.move(servers, 0, to, progress)
        assert store.get(keys[0]) is None


async def test_many_chunks_follow_their_slot(
    servers: Servers, dsns: list[str], variant: Variant
) -> None:
    """A batch of one slot that takes several statements, or is a pipeline of several, is sent by an old
    route, finds no table, and happens where the slot is now: once. So does a transaction that may be repeated."""
    store = await sharded.connect(variant, dsns)
    async with store:
        one = store.on("{k}")
        deltas = {f"{{k}}{n}": 1 for n in range(CHUNK_ROWS + 1)}
        assert await one.increment("{k}0") == 1
        slot = store.slot_of("{k}")
        for number, batch in enumerate((one, store)):
            await asyncio.to_thread(moves.move, servers, slot, elsewhere(servers, slot), quiet)
            sums = await batch.increment_many(deltas)
            assert [sums[key] for key in deltas] == [number + 2] + [number + 1] * CHUNK_ROWS
        await asyncio.to_thread(moves.move, servers, slot, elsewhere(servers, slot), quiet)
        async with one.pipeline(atomic=True) as p:
            handles = [p.increment("{k}0") for _ in range(PIPELINE_MAX + 1)]
        assert handles[-1].result() == PIPELINE_MAX + 4
        await asyncio.to_thread(moves.move, servers, slot, elsewhere(servers, slot), quiet)

        async def work(tx: Any) -> int:
            return int(await tx.increment("{k}0"))

        assert await one.run_transaction(work) == PIPELINE_MAX + 5


async def test_a_lease_is_renewed_where_its_slot_is(
    servers: Servers, dsns: list[str], variant: Variant
) -> None:
    """After a move its renewal finds no table, asks where the slot went, and goes on there."""
    store = await sharded.connect(variant, dsns)
    async with store, variant.make("Lock", store, "job", ttl=60).acquire() as lease:
        inner = inside(lease)
        slot, old = store.slot_of("job"), inner._runtime.background()
        await asyncio.to_thread(moves.move, servers, slot, elsewhere(servers, slot), quiet)
        for _ in range(2):
            until, inner._due = inner._until, 0.0
            async with asyncio.timeout(30):
                while inner._until <= until:
                    await asyncio.sleep(0.02)
        assert inner._runtime.background() is not old
        assert not lease.is_lost


@pytest.mark.parametrize("pattern", ["Lock", "Queue"])
async def test_waiters_hear_the_new_server(
    servers: Servers,
    dsns: list[str],
    variant: Variant,
    monkeypatch: pytest.MonkeyPatch,
    pattern: str,
) -> None:
    """Who waits for a lock or a job, and hears of it, hears of it after a move too, without looking from time
    to time."""
    for name in (
        "lock.flows.NOTIFIED_FIRST",
        "lock.flows.NOTIFIED_MAX",
        "queue.flows.POLL_NOTIFIED",
    ):
        monkeypatch.setattr(f"pgkv.patterns.{name}", 600.0)
    store = await sharded.connect(variant, dsns)
    async with store:
        slot = store.slot_of("job")
        options = {"ttl": 600} if pattern == "Lock" else {}  # the end of a lease is looked at, too
        waited = variant.make(pattern, store, "job", wakeup="notify", **options)
        lease = await waited.acquire() if pattern == "Lock" else None
        waiting = asyncio.ensure_future(
            waited.acquire(timeout=60) if lease else waited.take(timeout=60)
        )

        def is_heard() -> bool:
            home = servers.named(servers.homes()[slot].home)
            found = home.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                "AND query ~ '^LISTEN .*pgkv_(locks|jobs)'"
            )
            return found.fetchone() == (1,)

        servers.read()
        await asyncio.to_thread(wait_until, is_heard, "it listens")
        await asyncio.to_thread(moves.move, servers, slot, elsewhere(servers, slot), quiet)
        await asyncio.to_thread(wait_until, is_heard, "it listens to the new server")
        await (lease.release() if lease else waited.put("x"))
        got = await waiting
        assert got is not None
        await (got.release() if lease else got.ack())


@pytest.mark.parametrize("how", [How.COPY, How.ONLINE], ids=str)
async def test_a_storm_over_moves(
    servers: Servers, dsns: list[str], variant: Variant, how: How
) -> None:
    """While slots move around, every increment counts once, a lock never has two holders, and sessions
    keep what was saved."""
    stop = asyncio.Event()
    counted = dict.fromkeys((f"c{n}" for n in range(24)), 0)
    held: dict[str, int] = {}
    overlaps: list[str] = []

    def moving() -> None:
        for round_ in range(8 if FULL else 1):
            for slot in range(SLOTS):
                moves.move(servers, slot, f"n{(slot + round_) % 3 + 1}", quiet, how)

    async with contextlib.AsyncExitStack() as stack:
        stores = [
            await stack.enter_async_context(
                await sharded.connect(variant, dsns, operation_timeout=120)
            )
            for _ in range(2)
        ]

        async def count(store: Any, keys: list[str]) -> None:
            while not stop.is_set():
                for key in keys:
                    await store.increment(key)
                    counted[key] += 1

        async def hold(store: Any, name: str) -> None:
            lock = variant.make("Lock", store, name, ttl=30)
            while not stop.is_set():
                async with lock.acquire(timeout=120) as lease:
                    if name in held:
                        overlaps.append(name)
                    held[name] = lease.token
                    await asyncio.sleep(0.002)
                    del held[name]

        keys = sorted(counted)
        tasks = [
            *(asyncio.ensure_future(count(stores[n % 2], keys[n::4])) for n in range(4)),
            *(asyncio.ensure_future(hold(stores[n % 2], f"l{n // 2}")) for n in range(6)),
            *(
                asyncio.ensure_future(
                    sharded.visit(variant.make("SessionStore", stores[n % 2]), stop)
                )
                for n in range(2)
            ),
        ]
        try:
            await asyncio.to_thread(moving)
        finally:
            stop.set()
            await asyncio.gather(*tasks)
        assert overlaps == []
        values = await stores[0].get_many(keys)
        assert {key: int(values[key]) for key in keys} == counted
        assert min(counted.values()) > 0
    assert len(rows(dsns)) == len(keys)
