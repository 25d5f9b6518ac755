"""Collecting expired rows: soon, quietly, never what is alive, and in nobody's way."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pgkv import TtlCleanupStrategy
from tests.faults.support import Witness, newest, until
from tests.servers import LATE, PATIENCE

MakeStore = Callable[..., Awaitable[Any]]
EXPIRED = "expires_at <= pg_catalog.statement_timestamp()"


@pytest.fixture
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write is followed by a sweep."""
    for module in ("_engine._sync.channel", "_engine._async.channel"):
        monkeypatch.setattr(f"pgkv.{module}.SWEEP_CHANCE", 1.0)


async def expired_rows(store: Any, witness: Witness, count: int, prefix: str = "old") -> list[str]:
    """Write rows whose time has passed."""
    keys = [f"{prefix}{i:04}" for i in range(count)]
    await store.set_many(dict.fromkeys(keys, b"v"), ttl=3600)
    # By another hand, all at once: with a short ttl the sweep after that write might find them over.
    past = "statement_timestamp() - interval '1 second'"
    witness.conn.execute(f"UPDATE kv_store SET expires_at = {past} WHERE key = ANY(%s)", [keys])
    return keys


def inserted_expired(witness: Witness, count: int) -> None:
    """The like without the store: no write of it asks for a sweep."""
    witness.conn.execute(
        "INSERT INTO kv_store (key, value, expires_at) SELECT 'old' || lpad(n::text, 4, '0'), "
        "repeat('v', 200)::bytea, statement_timestamp() - interval '1 second' "
        "FROM generate_series(0, %s) n",
        [count - 1],
    )


async def test_a_read_collects(make_store: MakeStore, witness: Witness) -> None:
    """ON_READ: an expired row that a read met is deleted soon; those that nobody read are not."""
    store = await make_store()
    keys = await expired_rows(store, witness, 40)
    assert await store.get(keys[0]) is None
    await until(lambda: witness.rows() == 39, "one row is deleted")
    assert await store.get_many(keys[:20]) == {}
    await until(lambda: witness.rows() == 20, "those that were read are deleted")
    assert await store.get_entry(keys[20]) is None
    await store.exists(keys[21])
    await asyncio.sleep(0.1)
    assert 18 <= witness.rows() <= 19 + 1


async def test_a_fresh_value_is_never_collected(make_store: MakeStore, witness: Witness) -> None:
    """A value written between the read and the deletion, or by others at that moment, stays."""
    store = await make_store(pool_max_size=4, pool_timeout=60, operation_timeout=60)
    for _ in range(5):
        keys = await expired_rows(store, witness, 200)

        async def read_and_write(key: str) -> None:
            assert await store.get(key) is None
            await store.set(key, b"fresh")

        await asyncio.gather(*(read_and_write(key) for key in keys))
        # What was queued is worked off when a row read after the others is gone.
        last = await expired_rows(store, witness, 1, prefix="last")
        await store.get(last[0])
        await until(lambda: witness.rows("key LIKE 'last%'") == 0, "the queue is empty")
        assert len(await store.get_many(keys)) == 200
        await store.truncate()


async def test_a_locked_row_is_skipped(make_store: MakeStore, witness: Witness) -> None:
    """Somebody holds an expired row's lock: the reader does not wait, nor does the collector, and
    other rows are collected."""
    store = await make_store(pool_max_size=2)
    keys = await expired_rows(store, witness, 3)
    with witness.lock(keys[0]):
        started = time.monotonic()
        assert await store.get_many(keys) == {}
        assert time.monotonic() - started < 1 + LATE
        await until(lambda: witness.rows() == 1, "the others are deleted")
        assert witness.waiting() == 0
    assert await store.get(keys[0]) is None
    await until(lambda: witness.rows() == 0, "the last one is deleted")


@pytest.mark.usefixtures("_eager")
async def test_writes_sweep(make_store: MakeStore, witness: Witness) -> None:
    """Rows that nobody reads again go when others write; what lives stays."""
    store = await make_store()
    await expired_rows(store, witness, 500)
    await store.set("alive", b"v", ttl=60)
    await store.set("for ever", b"v")

    async def written() -> None:
        await store.set("other", b"v")
        while witness.rows(EXPIRED):
            await store.set("other", b"v")
            await asyncio.sleep(0.01)

    await asyncio.wait_for(written(), PATIENCE)
    assert await store.keys() == ["alive", "for ever", "other"]


@pytest.mark.usefixtures("_eager")
async def test_a_sweep_goes_on_while_it_pays(make_store: MakeStore, witness: Witness) -> None:
    """Batches leave more expired rows than a sweep's chunk holds: one write has all of them swept."""
    store = await make_store()
    await store.create_table()
    inserted_expired(witness, 10_000)
    await store.set("alive", b"v")
    await until(lambda: witness.rows() == 1, "all are swept")


@pytest.mark.usefixtures("_eager")
async def test_a_sweep_blocks_no_writer(make_store: MakeStore, witness: Witness) -> None:
    """Writers whose rows are being swept, or who hold locks that a sweep meets, are not kept
    waiting."""
    store = await make_store(pool_max_size=4, pool_timeout=30)
    await store.create_table()
    inserted_expired(witness, 300)
    slowest = 0.0
    with witness.lock("old0005"):

        async def write(number: int) -> None:
            nonlocal slowest
            for i in range(40):
                started = time.monotonic()
                await store.set(f"old{10 + (number * 40 + i) % 200:04}", b"fresh")
                slowest = max(slowest, time.monotonic() - started)

        await asyncio.gather(*(write(number) for number in range(5)))
        await until(lambda: witness.rows(EXPIRED) == 1, "all but the locked row are swept")
        assert witness.waiting() == 0
    assert slowest < LATE
    assert await store.count() == 200


async def test_sweeps_leave_transactions_alone(make_store: MakeStore, witness: Witness) -> None:
    """Inside transaction() nothing is collected: rows that are met stay."""
    store = await make_store(ttl_cleanup_strategy=TtlCleanupStrategy.ON_READ)
    keys = await expired_rows(store, witness, 5)
    async with store.transaction() as tx:
        assert await tx.get(keys[0]) is None
        assert await tx.get_many(keys) == {}
    await asyncio.sleep(0.1)
    assert witness.rows() == 5


@pytest.mark.usefixtures("_eager")
@pytest.mark.parametrize("strategy", [TtlCleanupStrategy.MANUAL, TtlCleanupStrategy.DISABLED])
async def test_only_by_hand(
    make_store: MakeStore, witness: Witness, strategy: TtlCleanupStrategy
) -> None:
    """MANUAL and DISABLED: neither reads nor writes collect; cleanup_expired() does, also up to a
    limit."""
    store = await make_store(ttl_cleanup_strategy=strategy)
    keys = await expired_rows(store, witness, 30)
    for key in keys[:5]:
        found = await store.get(key)
        assert (found is None) is (strategy is TtlCleanupStrategy.MANUAL)
    for i in range(20):
        await store.set(f"other{i}", b"v")
    await asyncio.sleep(0.1)
    assert witness.rows(EXPIRED) == 30
    assert await store.cleanup_expired(limit=7) == 7
    assert witness.rows(EXPIRED) == 23
    assert await store.cleanup_expired() == 23
    assert await store.count() == 20


CHILD = """
import sys, time
import pgkv
store = pgkv.Store.connect(sys.argv[1], ttl_cleanup_strategy=pgkv.TtlCleanupStrategy.BACKGROUND)
store.get("k")
print("ready", flush=True)
sys.stdin.readline()
store.close()
"""


@newest
async def test_background(make_store: MakeStore, witness: Witness, dsn: str) -> None:
    """BACKGROUND: nobody reads or writes, and the rows go, with a second process that sweeps too;
    when the one that swept is gone, the other goes on."""
    writer = await make_store(ttl_cleanup_strategy=TtlCleanupStrategy.MANUAL)
    sweeper = await make_store(ttl_cleanup_strategy=TtlCleanupStrategy.BACKGROUND)
    await sweeper.get("k")
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, dsn],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdout is not None
        assert await asyncio.to_thread(child.stdout.readline) == "ready\n"
        await writer.set("alive", b"v", ttl=60)
        await expired_rows_or_swept(writer, 2000)
        await until(lambda: witness.rows() == 1, "the rows are swept")
        await sweeper.close()
        await expired_rows_or_swept(writer, 500)
        await until(lambda: witness.rows() == 1, "the other process sweeps")
        await asyncio.to_thread(child.communicate, "\n", PATIENCE)
    assert child.returncode == 0


async def expired_rows_or_swept(store: Any, count: int) -> None:
    """Write rows that will have expired soon."""
    await store.set_many({f"old{i:04}": b"v" for i in range(count)}, ttl=0.001)


@newest
async def test_a_second_table_is_swept_too(make_store: MakeStore, witness: Witness) -> None:
    """A BACKGROUND table taken from a store that has been at work for a while is swept from its
    first operation on."""
    store = await make_store(ttl_cleanup_strategy=TtlCleanupStrategy.MANUAL)
    await store.set("k", b"v")
    other = store.table("other", ttl_cleanup_strategy=TtlCleanupStrategy.BACKGROUND)
    await other.create_table()
    await other.set_many({f"old{i}": b"v" for i in range(50)}, ttl=0.001)
    await until(lambda: witness.rows(table="other") == 0, "the rows are swept")


@newest
async def test_the_sweeper_survives(make_store: MakeStore, witness: Witness) -> None:
    """A sweep that failed, its connection killed or the table dropped, is not the last one."""
    from pgkv._engine import sweep

    patience, sweep.PATROL_RETRY = sweep.PATROL_RETRY, 0.05
    try:
        store = await make_store(ttl_cleanup_strategy=TtlCleanupStrategy.BACKGROUND)
        for _ in range(3):
            await asyncio.to_thread(witness.terminate)
            await expired_rows_or_swept(store, 20)
            await until(lambda: witness.rows() == 0, "the rows are swept")
        witness.conn.execute("DROP TABLE kv_store")
        await expired_rows_or_swept(store, 20)
        await until(lambda: witness.rows() == 0, "the rows are swept")
    finally:
        sweep.PATROL_RETRY = patience
