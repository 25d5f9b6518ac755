"""Tables that are missing, foreign, forbidden or changed behind our back; statements that the
server has forgotten; questions and answers larger than any socket buffer."""

from __future__ import annotations

import asyncio
import multiprocessing
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pgkv import ConfigError, PgkvError, RetryPolicy, Store, TableNotFoundError, TableType
from tests.faults.proxy import Proxy, error_answer
from tests.faults.support import Crew, Witness, newest, until
from tests.servers import PATIENCE
from tests.variants import inside

MakeStore = Callable[..., Awaitable[Any]]


@newest
async def test_drop_under_load(make_store: MakeStore, witness: Witness) -> None:
    """Somebody drops the table again and again while callers work: no call fails."""
    store = await make_store(pool_max_size=4, pool_timeout=30, retry=RetryPolicy(deadline=60))
    running = True
    rounds = [0] * 8

    async def work(number: int) -> None:
        while running:
            await store.set(f"k{number}", b"v")
            assert await store.get(f"k{number}") in {b"v", None}
            await store.increment(f"n{number}")
            rounds[number] += 1

    async def drop() -> None:
        nonlocal running
        try:
            for _ in range(8):
                # A call makes the table three times at most: none meets as many of the drops.
                before = [done + 1 for done in rounds]
                await until(lambda: all(map(int.__gt__, rounds, before)), "all go on")  # noqa: B023  # awaited here
                await asyncio.to_thread(witness.conn.execute, "DROP TABLE IF EXISTS kv_store")
        finally:
            running = False

    await asyncio.gather(drop(), *(work(i) for i in range(8)))
    await store.set("k", b"v")
    assert await store.get("k") == b"v"


@newest
async def test_missing_without_auto_create(make_store: MakeStore, witness: Witness) -> None:
    """auto_create_table=False: TableNotFoundError, from connect() and from every operation, and
    nothing is created."""
    with pytest.raises(TableNotFoundError, match="create_table"):
        await make_store(auto_create_table=False)
    store = await make_store()
    careful = await make_store(auto_create_table=False)
    await careful.set("k", b"v")
    witness.conn.execute("DROP TABLE kv_store")
    calls: list[Callable[[], Awaitable[Any]]] = [
        lambda: careful.get("k"),
        lambda: careful.set("k", b"v"),
        lambda: careful.increment("n"),
        lambda: careful.set_many({"k": b"v"}),
        careful.keys,
    ]
    for call in calls:
        with pytest.raises(TableNotFoundError, match="kv_store"):
            await call()
    row = witness.conn.execute("SELECT to_regclass('kv_store')").fetchone()
    assert row == (None,)
    await store.set("k", b"v")
    assert await careful.get("k") == b"v"


def test_many_threads_create_at_once(dsn: str, witness: Witness) -> None:
    """Sixteen stores connect at once, to a table in a schema that are both missing: all succeed."""
    for _ in range(5):
        with Crew() as crew:
            for number in range(16):
                crew.start(_connect_and_set, dsn, number)
        assert witness.rows(table="fresh.kv_store") == 16
        witness.conn.execute("DROP SCHEMA fresh CASCADE")


@newest
def test_many_processes_create_at_once(dsn: str, witness: Witness) -> None:
    """The same by processes."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_connect_and_set, args=(dsn, i)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(PATIENCE)
        assert worker.exitcode == 0
    assert witness.rows(table="fresh.kv_store") == 4
    witness.conn.execute("DROP SCHEMA fresh CASCADE")


def _connect_and_set(dsn: str, number: int) -> None:
    with Store.connect(dsn, schema="fresh", pool_max_size=1) as store:
        store.set(f"k{number}", b"v")


async def test_missing_rights(make_store: MakeStore, witness: Witness, limited: str) -> None:
    """A role that may not create gets the DDL to run; one that may not write gets the GRANT; with
    both, everything works, the role still unable to create."""
    with pytest.raises(ConfigError, match=r"(?s)CREATE UNLOGGED TABLE.*kv_store"):
        await make_store(dsn=limited)
    owner = await make_store()
    await owner.set("k", b"v")
    store = await make_store(dsn=limited)  # the table exists: nothing to create
    with pytest.raises(ConfigError, match=r'GRANT SELECT, INSERT, UPDATE, DELETE ON "kv_store"'):
        await store.get("k")
    witness.conn.execute(f"GRANT SELECT ON kv_store TO r_{witness.name}")
    assert await store.get("k") == b"v"
    with pytest.raises(ConfigError, match="GRANT"):
        await store.set("k", b"w")
    witness.conn.execute(f"GRANT INSERT, UPDATE, DELETE ON kv_store TO r_{witness.name}")
    await store.set("k", b"w")
    assert await store.increment("n") == 1
    assert await store.delete("k")
    assert await store.cleanup_expired() == 0


@newest
@pytest.mark.parametrize(
    "ddl",
    [
        "CREATE TABLE kv_store (a int)",
        "CREATE TABLE kv_store (key int primary key, value bytea, expires_at timestamptz,"
        " created_at timestamptz, updated_at timestamptz, version bigint)",
        "CREATE TABLE kv_store (key text primary key, value jsonb, expires_at timestamptz,"
        " created_at timestamptz, updated_at timestamptz)",
        "CREATE VIEW kv_store AS SELECT 1 AS a",
    ],
    ids=["other columns", "other key", "other value", "view"],
)
async def test_a_foreign_table(make_store: MakeStore, witness: Witness, ddl: str) -> None:
    """A table of that name which is not ours is refused with the reason and left as it is."""
    witness.conn.execute(ddl)
    columns = "SELECT attname, atttypid FROM pg_attribute WHERE attrelid = 'kv_store'::regclass"
    before = witness.conn.execute(columns).fetchall()
    with pytest.raises(ConfigError, match="not a pgkv table"):
        await make_store()
    assert witness.conn.execute(columns).fetchall() == before


# -- what the server forgot, or was told ---------------------------------------------------


FORGET = ["DISCARD ALL", "DEALLOCATE ALL"]


@newest
@pytest.mark.parametrize("command", FORGET)
async def test_forgotten_statements(make_store: MakeStore, command: str) -> None:
    """Prepared statements that vanish behind our back are prepared again, in every kind of call."""
    store = await make_store(pool_max_size=1)

    async def forget() -> None:
        """Over the store's own connection, as a pooler or a hook would."""
        inner = inside(store)
        link = inner._channel._pool.idle[0]
        # Not in a thread: the loop's reader would take the answer away from it.
        link.pgconn.exec_(command.encode())

    for expected in (1, 2, 3):
        await forget()
        assert await store.increment("n") == expected
        await forget()
        assert await store.get("n") == b"%d" % expected
        await forget()
        assert await store.set_many({f"k{i}": b"v" for i in range(5001)}) == 5001
        await forget()
        async with store.pipeline() as pipe:
            one, two = await _maybe(pipe.get("n")), await _maybe(pipe.set("k", b"w"))
        assert (await _maybe(one.result()), bool(await _maybe(two.result()))) == (
            b"%d" % expected,
            True,
        )


@newest
@pytest.mark.parametrize("command", FORGET)
async def test_a_transaction_begins_with_a_forgotten_statement(
    make_store: MakeStore, command: str
) -> None:
    """Its first operation is refused with it, and is prepared when the transaction is repeated."""
    store = await make_store(pool_max_size=1)
    runs: list[str] = []

    async def fn(tx: Any) -> None:
        runs.append("")
        await tx.increment("n")

    await store.run_transaction(fn)  # prepares it
    inner = inside(store)
    inner._channel._pool.idle[0].pgconn.exec_(command.encode())
    await store.run_transaction(fn)
    assert (len(runs), await store.get("n")) == (3, b"2")


@newest
async def test_a_server_that_always_forgets(make_store: MakeStore, dsn: str) -> None:
    """Behind a transaction pooler that pgkv was not told of, statements vanish all the time: an
    error that says what to set, not a call without end."""
    with Proxy(dsn) as proxy:
        store = await make_store(dsn=proxy.dsn, retry=None)
        gone = proxy.arm(
            b"key-1",
            replace=error_answer("26000", "prepared statement does not exist"),
            before=True,
            end="nothing",
            times=50,
        )
        with pytest.raises(PgkvError, match=r"Pooler\.TRANSACTION"):
            await store.get("key-1")
        assert gone.met == 2
        await store.close()


async def _maybe(value: Any) -> Any:
    return await value if asyncio.iscoroutine(value) or asyncio.isfuture(value) else value


async def test_changed_columns(make_store: MakeStore, witness: Witness) -> None:
    """ALTER TABLE that changes a result's type, or rebuilds the table: plans are made anew, nothing
    is noticed."""
    store = await make_store(pool_max_size=2, retry=None)
    await store.set("k", b"v")
    entry = await store.get_entry("k")
    for ddl in (
        "ALTER TABLE kv_store ALTER COLUMN key TYPE varchar(2000)",
        "ALTER TABLE kv_store ALTER COLUMN key TYPE text",
        "ALTER TABLE kv_store ADD COLUMN extra int",
        "ALTER TABLE kv_store DROP COLUMN extra",
    ):
        witness.conn.execute(ddl)
        assert await store.get("k") == b"v"
        assert await store.get_entry("k") == entry or (await store.get_entry("k")).value == b"v"
        assert [item.key for item in await store.scan()] == ["k"]
        assert await store.keys() == ["k"]
        assert await store.get_many(["k"]) == {"k": b"v"}
    async with store.transaction() as tx:
        assert await tx.get("k") == b"v"


async def test_recreated_with_another_type(make_store: MakeStore, witness: Witness) -> None:
    """The table is dropped and made again as a REGULAR one while a store knows it as UNLOGGED."""
    store = await make_store(retry=None)
    await store.set("k", b"v")
    other = await make_store(table_type=TableType.REGULAR)
    await other.recreate_table()
    assert await store.get("k") is None
    await store.set("k", b"w")
    assert await store.get("k") == b"w"


# -- sizes ---------------------------------------------------------------------------------


@newest
async def test_huge_value(make_store: MakeStore) -> None:
    """60 MB there and back."""
    store = await make_store(operation_timeout=300)
    value = random.randbytes(1 << 20) * 60
    await store.set("k", value)
    assert await store.get("k") == value


@newest
async def test_huge_batches(make_store: MakeStore) -> None:
    """20,000 keys in one call, each way, and a pipeline whose questions and answers both fill the
    socket's buffers: nobody waits for the other."""
    store = await make_store(operation_timeout=300)
    items = {f"k{i:05}": b"%d" % i * 50 for i in range(20_000)}
    assert await store.set_many(items) == 20_000
    assert await store.get_many(items) == items
    assert await store.exists_many(items) == set(items)
    assert await store.delete_many(items) == 20_000
    big = b"x" * 100_000
    async with store.pipeline() as pipe:
        handles = []
        for i in range(150):
            await _maybe(pipe.set(f"p{i}", big))
            handles.append(await _maybe(pipe.get(f"p{i}")))
    assert [await _maybe(handle.result()) == big for handle in handles] == [True] * 150


@newest
async def test_a_refused_value_changes_nothing(make_store: MakeStore) -> None:
    """An error in the middle of a batch leaves all of it undone."""
    store = await make_store()
    await store.set("word", b"x")
    with pytest.raises(PgkvError):
        await store.increment_many({**{f"k{i}": 1 for i in range(6000)}, "word": 1})
    assert await store.count() == 1
