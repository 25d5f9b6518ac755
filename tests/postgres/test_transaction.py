"""transaction() and run_transaction(): together or not at all, and nothing behind the caller's back."""
# ruff: noqa: PT012  a transaction that fails has a body of several statements

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from psycopg import IsolationLevel
from psycopg.pq import TransactionStatus

import pgkv
from pgkv._engine._async.connection import AsyncPgConnection
from pgkv._engine._sync.connection import PgConnection
from pgkv._engine.sweep import Collector
from pgkv._ops.op import Op, Statement
from pgkv._sql import control
from pgkv._sql.table import read_nothing
from pgkv.testing import ServerClock
from tests.peers import Peer
from tests.variants import in_a_hurry


async def test_commit(store: Any, peer: Peer) -> None:
    """What a transaction writes is seen inside at once, and outside when it has ended."""
    async with store.transaction() as tx:
        await tx.set("a", b"1")
        await tx.set("b", b"2")
        assert await tx.get("a") == b"1"
        assert await store.get("a") is None
        assert peer.keys() == set()
    assert peer.keys() == {"a", "b"}


async def test_rollback_on_an_exception(store: Any, peer: Peer) -> None:
    """An exception in the body undoes all of it and goes on to the caller."""
    with pytest.raises(LookupError, match="mine"):
        async with store.transaction() as tx:
            await tx.set("a", b"1")
            raise LookupError("mine")
    assert peer.keys() == set()


async def test_every_operation_works_inside(store: Any, clock: ServerClock) -> None:
    """A transaction is a store: all operations, scans, views and batches work in it."""
    async with store.transaction() as tx:
        assert await tx.set_many({"a": b"1", "b": b"2", "n:x": b"3"}) == 3
        assert await tx.get_many(["a", "b"]) == {"a": b"1", "b": b"2"}
        assert await tx.increment("a") == 2
        assert await tx.increment_many({"a": 1}) == {"a": 3}
        assert (await tx.compare_and_swap("a", b"3", b"4")).is_success
        assert (await tx.compare_and_swap("new", None, b"4")).is_success
        assert await tx.get_and_set("a", b"5") == b"4"
        assert await tx.get_and_set("newer", b"5") is None
        assert await tx.update("a", lambda old: old + b"!") == b"5!"
        assert await tx.get_and_delete("newer") == b"5"
        assert await tx.set_nx("a", b"6") is False
        assert await tx.expire("a", 60) is True
        assert await tx.keys() == ["a", "b", "n:x", "new"]
        assert [key async for key in tx.iter_keys(page_size=1)] == ["a", "b", "n:x", "new"]
        assert await tx.namespace("n:").get("x") == b"3"
        assert await tx.delete_many(["b", "new"]) == 2
        assert await tx.delete_prefix("n:") == 1
        clock.advance(61)
        assert await tx.cleanup_expired() == 1
        assert await tx.count() == 0
        assert (await tx.stats()).total_keys == 0


async def test_savepoints(store: Any, peer: Peer) -> None:
    """A transaction in a transaction can be undone by itself."""
    async with store.transaction() as tx:
        await tx.set("outer", b"1")
        async with tx.transaction() as inner:
            await inner.set("kept", b"1")
        with pytest.raises(LookupError):
            async with tx.transaction() as inner:
                await inner.set("undone", b"1")
                async with inner.transaction() as innermost:
                    await innermost.set("undone too", b"1")
                raise LookupError
        assert await tx.keys() == ["kept", "outer"]
    assert peer.keys() == {"kept", "outer"}


async def test_use_after_commit(store: Any) -> None:
    """A transaction's store, and views of it, are refused after the commit."""
    async with store.transaction() as tx:
        await tx.set("a", b"1")
        view = tx.namespace("n:")
    for ended in (tx, view):
        with pytest.raises(pgkv.TransactionError, match=r"get: the transaction was committed"):
            await ended.get("a")
    with pytest.raises(pgkv.TransactionError):
        async with tx.transaction():
            pass


async def test_use_after_rollback(store: Any) -> None:
    """A transaction's store is refused after the rollback."""
    with pytest.raises(LookupError):
        async with store.transaction() as tx:
            raise LookupError
    with pytest.raises(pgkv.TransactionError, match="rolled back"):
        await tx.get("a")


async def test_use_of_a_savepoint_after_its_end(store: Any) -> None:
    """A savepoint's store is refused after its end, while the transaction goes on."""
    async with store.transaction() as tx:
        async with tx.transaction() as inner:
            await inner.set("a", b"1")
        with pytest.raises(pgkv.TransactionError):
            await inner.get("a")
        assert await tx.get("a") == b"1"


@pytest.mark.parametrize(
    "call",
    [
        lambda tx: tx.increment("word"),
        lambda tx: tx.increment_many({"other": 1, "word": 1}),
        lambda tx: tx.increment("max"),
    ],
    ids=["increment", "increment_many", "overflow"],
)
async def test_a_refused_value_does_not_abort(store: Any, peer: Peer, call: Any) -> None:
    """An increment refused for its value leaves the transaction as it was, fit to commit."""
    await store.set_many({"word": b"x", "max": str(2**63 - 1)})
    async with store.transaction() as tx:
        await tx.set("mine", b"1")
        with pytest.raises(pgkv.InvalidValueError):
            await call(tx)
        await tx.set("mine too", b"1")
    assert peer.keys() == {"word", "max", "mine", "mine too"}


async def test_a_failed_statement_fails_the_transaction(store: Any, peer: Peer) -> None:
    """After a failed statement the rest is refused, and the end is an error, not a silent undoing."""
    peer.run("ALTER TABLE kv_store ADD CONSTRAINT no CHECK (key <> 'no')")
    with pytest.raises(pgkv.TransactionError, match="rolled back"):
        async with store.transaction() as tx:
            await tx.set("a", b"1")
            with pytest.raises(pgkv.InvalidValueError):
                await tx.set("no", b"1")
            with pytest.raises(pgkv.TransactionError, match="roll it back"):
                await tx.get("a")
    assert peer.keys() == set()


async def test_a_failed_statement_in_a_savepoint(store: Any, peer: Peer) -> None:
    """A savepoint confines a failed statement."""
    peer.run("ALTER TABLE kv_store ADD CONSTRAINT no CHECK (key <> 'no')")
    async with store.transaction() as tx:
        await tx.set("a", b"1")
        with pytest.raises(pgkv.InvalidValueError):
            async with tx.transaction() as inner:
                await inner.set("no", b"1")
        await tx.set("b", b"1")
    assert peer.keys() == {"a", "b"}


async def test_nothing_is_healed_inside(store: Any, peer: Peer) -> None:
    """A table that is missing inside a transaction is not made there."""
    with pytest.raises(pgkv.TableNotFoundError):
        async with store.transaction() as tx:
            peer.run("DROP TABLE kv_store")
            await tx.set("a", b"1")
    assert peer.one("SELECT to_regclass('kv_store')") is None


async def test_the_table_is_made_beforehand(make_store: Any, peer: Peer, store: Any) -> None:
    """A transaction is no bad first use of a table that does not exist yet."""
    other = store.table("other")
    async with other.transaction() as tx:
        await tx.set("a", b"1")
    assert await other.get("a") == b"1"


async def test_nothing_is_collected_inside(
    store: Any, clock: ServerClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads that meet expired rows, and writes, have nothing swept from inside a transaction."""
    asked: list[object] = []
    monkeypatch.setattr(Collector, "collect", lambda self, keys: asked.append(keys))
    monkeypatch.setattr(Collector, "sweep", lambda self: asked.append("sweep"))
    await store.set("k", b"1", ttl=60)
    clock.advance(61)
    asked.clear()
    async with store.transaction() as tx:
        assert await tx.get("k") is None
        assert await tx.get_many(["k"]) == {}
        for n in range(300):
            await tx.set(f"n{n}", b"1")
    assert asked == []


async def conflict(tx: Any, peer: Peer) -> None:
    """Read under REPEATABLE READ, let the peer change it, write: 40001."""
    await tx.get("k")
    peer.run("UPDATE kv_store SET value = 'theirs', version = version + 1 WHERE key = 'k'")
    await tx.set("k", b"ours")


async def test_serialization_failures_reach_the_caller(
    store: Any, connect: Any, peer: Peer
) -> None:
    """A serialization failure is not repeated inside a transaction: it is raised, retryable."""
    await store.set("k", b"1")
    conn = await connect()
    await conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    with pytest.raises(pgkv.QueryError) as caught:
        await conflict(store.using(conn), peer)
    assert caught.value.sqlstate == "40001"
    assert caught.value.retryable
    await conn.rollback()


async def test_run_transaction(store: Any) -> None:
    """run_transaction calls the function in a transaction and returns its answer."""

    async def fn(tx: Any) -> str:
        await tx.set("a", b"1")
        return "answer"

    assert await store.run_transaction(fn) == "answer"
    assert await store.get("a") == b"1"


async def test_run_transaction_repeats_the_whole(store: Any, peer: Peer) -> None:
    """After a serialization failure the function runs again from its beginning, in a new
    transaction.
    """
    await store.set("k", b"1")
    seen: list[bytes] = []

    async def fn(tx: Any) -> None:
        seen.append(await tx.get("k"))
        if len(seen) == 1:
            await conflict(tx, peer)
        await tx.set("k", b"ours")

    await store.run_transaction(fn, isolation=IsolationLevel.REPEATABLE_READ)
    assert seen == [b"1", b"theirs"]
    assert await store.get("k") == b"ours"


async def test_run_transaction_gives_up(make_store: Any, peer: Peer) -> None:
    """After the policy's attempts the serialization failure is raised."""
    store = await make_store(retry=pgkv.RetryPolicy(attempts=3, wait_initial=0.001))
    await store.set("k", b"1")
    calls: list[int] = []

    async def fn(tx: Any) -> None:
        calls.append(1)
        await conflict(tx, peer)

    with pytest.raises(pgkv.QueryError) as caught:
        await store.run_transaction(fn, isolation=IsolationLevel.REPEATABLE_READ)
    assert caught.value.sqlstate == "40001"
    assert len(calls) == 3


async def test_run_transaction_does_not_repeat_the_callers_errors(store: Any) -> None:
    """An exception of the function's own undoes the transaction, once, and is raised."""
    calls: list[int] = []

    async def fn(tx: Any) -> None:
        calls.append(1)
        await tx.set("a", b"1")
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        await store.run_transaction(fn)
    assert len(calls) == 1
    assert await store.exists("a") is False


@pytest.mark.parametrize("level", list(IsolationLevel))
async def test_isolation(store: Any, level: IsolationLevel) -> None:
    """run_transaction runs at the isolation level it is given."""
    await store.set("k", b"1")

    async def fn(tx: Any) -> bool:
        await tx.get("k")
        await store.set("k", b"2")
        return bool(await tx.get("k") == b"1")

    repeatable = await store.run_transaction(fn, isolation=level)
    assert repeatable == (level >= IsolationLevel.REPEATABLE_READ)


async def test_isolation_belongs_to_the_outermost(store: Any) -> None:
    """A nested run_transaction cannot choose an isolation level."""
    async with store.transaction() as tx:

        async def fn(inner: Any) -> None:
            await inner.set("a", b"1")

        with pytest.raises(pgkv.TransactionError, match="outermost"):
            await tx.run_transaction(fn, isolation=IsolationLevel.SERIALIZABLE)
        await tx.run_transaction(fn)
    assert await store.get("a") == b"1"


async def test_read_committed_by_default(make_store: Any, dsn: str, peer: Peer) -> None:
    """A server whose default is SERIALIZABLE is asked for READ COMMITTED."""
    peer.run("ALTER ROLE CURRENT_USER SET default_transaction_isolation = 'serializable'")
    try:
        store = await make_store()
        await store.set("k", b"1")
        async with store.transaction() as tx:
            await tx.get("k")
            await store.set("k", b"2")
            assert await tx.get("k") == b"2"
    finally:
        peer.run("ALTER ROLE CURRENT_USER RESET default_transaction_isolation")


async def test_deadlocks_are_repeated_outside(
    store: Any, peer: Peer, witness: Peer, operations: list[tuple[str, str, int]]
) -> None:
    """A single operation that loses a deadlock is repeated, and succeeds."""

    await store.set_many({"a": b"1", "b": b"1"})
    peer.run("SET deadlock_timeout = '10s'")
    # The peer takes b, then wants a, which set_many holds while it wants b.
    with peer.conn.transaction():
        peer.run("SELECT FROM kv_store WHERE key = 'b' FOR UPDATE")
        waiting = asyncio.ensure_future(store.set_many({"a": b"2", "b": b"2"}))
        await witness.until_waiting()
        await asyncio.to_thread(peer.run, "SELECT FROM kv_store WHERE key = 'a' FOR UPDATE")
    assert await waiting == 2
    # Once or more: it may take a again before the peer wakes up.
    assert any(name == "set_many" and repeats for name, _, repeats in operations)


async def test_errors_of_psycopg_stay_inside(store: Any) -> None:
    """No error that leaves a transaction is psycopg's."""
    with pytest.raises(pgkv.PgkvError) as caught:
        async with store.transaction() as tx:
            await tx.table("absent", auto_create_table=False).get("k")
    assert not isinstance(caught.value, psycopg.Error)


# -- opened with the first operation


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operations that opened a transaction, and what was sent otherwise."""
    sent: list[str] = []
    for kind in (PgConnection, AsyncPgConnection):
        begin_with, execute = kind.begin_with, kind.execute

        def together(self: Any, begin: Any, op: Any, *rest: Any, _do: Any = begin_with) -> Any:
            sent.append(f"{begin.statement.name} and {op.statement.name}")
            return _do(self, begin, op, *rest)

        def alone(self: Any, op: Any, *rest: Any, _do: Any = execute, **options: Any) -> Any:
            sent.append(op.statement.name if self.prepares else f"{op.statement.name}, unprepared")
            return _do(self, op, *rest, **options)

        monkeypatch.setattr(kind, "begin_with", together)
        monkeypatch.setattr(kind, "execute", alone)
    return sent


async def test_it_opens_with_its_first_operation(store: Any, opened: list[str]) -> None:
    """One round trip for both, where the connection has prepared the statement; none where nothing is
    done."""
    await store.set("a", b"1")
    async with store.transaction() as tx:  # after this the store knows the table
        await tx.get("a")
    opened.clear()
    async with store.transaction() as tx:
        await tx.set("a", b"2")
        await tx.get("a")
    unprepared = [f"{name}, unprepared" for name in ("begin", "set", "get", "commit")]
    assert opened in (["begin and set", "get", "commit"], unprepared)
    assert await store.get("a") == b"2"
    opened.clear()
    async with store.transaction():
        pass
    with pytest.raises(LookupError):
        async with store.transaction():
            raise LookupError
    assert opened == []


async def test_a_first_operation_that_is_refused(store: Any, peer: Peer) -> None:
    """It fails the transaction, as any other does."""
    peer.run("ALTER TABLE kv_store ADD CONSTRAINT no CHECK (key <> 'no')")
    await store.set("a", b"1")
    with pytest.raises(pgkv.TransactionError, match="rolled back"):
        async with store.transaction() as tx:
            with pytest.raises(pgkv.InvalidValueError, match="set"):
                await tx.set("no", b"1")
            with pytest.raises(pgkv.TransactionError, match="roll it back"):
                await tx.set("b", b"1")
    async with store.transaction() as tx:
        with pytest.raises(pgkv.InvalidValueError):
            await tx.increment("a", 2**63)  # has a savepoint of its own
        await tx.set("c", b"1")
    assert peer.keys() == {"a", "c"}


async def test_a_transaction_that_cannot_begin(
    store: Any, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is done outside of it: not its first operation, nor the next."""
    await store.set("a", b"1")
    refused: Op[None] = Op(
        Statement("begin", "BEGIN ISOLATION LEVEL no", (), read_nothing, script=True)
    )
    monkeypatch.setattr(control, "begin", lambda *_: refused)
    with pytest.raises(pgkv.TransactionError, match="not begun"):
        async with store.transaction() as tx:
            with pytest.raises(pgkv.QueryError, match="begin"):
                await tx.set("a", b"2")
            with pytest.raises(pgkv.TransactionError, match="not begun"):
                await tx.set("b", b"2")
    assert await store.get_many(["a", "b"]) == {"a": b"1"}


def test_a_thread_that_comes_as_the_block_ends(dsn: str) -> None:
    """What it asks for is refused, and the connection goes back outside of a transaction."""
    waits = threading.Event()

    class Watched:
        """Tells of a thread that is about to wait for the lock."""

        def __init__(self, lock: Any) -> None:
            self.lock = lock

        def __enter__(self) -> None:
            if threading.current_thread() is not threading.main_thread():
                waits.set()
            self.lock.__enter__()

        def __exit__(self, *error: object) -> None:
            self.lock.__exit__(*error)

    with pgkv.Store.connect(dsn) as store, ThreadPoolExecutor(1) as pool:
        with store.transaction() as tx:
            channel: Any = tx._channel
            lock = channel._lock
            channel._lock = Watched(lock)
            lock.acquire()
            late = pool.submit(tx.set, "k", b"1")
            assert waits.wait(60)
        lock.release()
        with pytest.raises(pgkv.TransactionError):
            late.result(60)
        kept: Any = store._channel
        assert [each.pgconn.transaction_status for each in kept._pool.idle] == [
            TransactionStatus.IDLE
        ]
        assert store.get("k") is None


async def test_a_connection_lost_before_the_first_operation(
    store: Any, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing has happened, so that run_transaction repeats it."""
    pids: list[int] = []
    for kind in (PgConnection, AsyncPgConnection):

        def execute(self: Any, *rest: Any, _do: Any = kind.execute, **options: Any) -> Any:
            pids.append(self.pgconn.backend_pid)
            return _do(self, *rest, **options)

        monkeypatch.setattr(kind, "execute", execute)
    await store.set("a", b"1")
    await store.exists("a")  # prepared by `execute`
    runs: list[str] = []

    async def fn(tx: Any) -> None:
        if not runs:
            peer.run("SELECT pg_terminate_backend(%s, 10000)", pids[-1])
        runs.append("")
        await tx.set("a", b"2")

    await store.run_transaction(fn)
    assert (len(runs), await store.get("a")) == (2, b"2")


async def test_a_first_operation_that_is_late(make_store: Any, peer: Peer) -> None:
    """It ends in time, by its own name, and nothing of it stays."""
    store = await make_store()
    await store.set("a", b"1")
    with peer.conn.transaction():
        peer.run("SELECT FROM kv_store FOR UPDATE")
        with (
            in_a_hurry(store, 1.0),
            pytest.raises(pgkv.OperationTimeoutError, match="set") as caught,
        ):
            async with store.transaction() as tx:
                await tx.set("a", b"2")
    assert caught.value.outcome_unknown is False
    assert await store.get("a") == b"1"


async def test_a_first_operation_that_is_cancelled(dsn: str, peer: Peer) -> None:
    """The server stops it, and its row is free again."""
    async with pgkv.AsyncStore.connect(dsn) as store:
        await store.set("a", b"1")

        async def work() -> None:
            async with store.transaction() as tx:
                await tx.set("a", b"2")

        with peer.conn.transaction():
            peer.run("SELECT FROM kv_store FOR UPDATE")
            task = asyncio.create_task(work())
            await peer.until_waiting()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await store.set("a", b"3")
        assert await store.get("a") == b"3"


# -- nested ones of several threads or tasks

KEYS = ["bad", "nested", "plain", "k0", "k5999"]
KEPT = dict.fromkeys(KEYS[1:], b"1")
MANY = {f"k{i}": "1" for i in range(6000)}  # several statements, in a savepoint of their own


async def test_nested_ones_of_several_tasks(dsn: str) -> None:
    """A nested transaction that is rolled back undoes nothing that another task did: not its nested
    one, not its set_many(), not a plain operation."""
    inside, go = asyncio.Event(), asyncio.Event()
    async with pgkv.AsyncStore.connect(dsn) as store:
        async with store.transaction() as tx:

            async def fails() -> None:
                async with tx.transaction() as inner:
                    await inner.set("bad", "1")
                    inside.set()
                    await go.wait()
                    raise LookupError

            async def nests() -> None:
                async with tx.transaction() as inner:
                    await inner.set("nested", "1")

            failing = asyncio.create_task(fails())
            await inside.wait()
            works = (nests(), tx.set("plain", "1"), tx.set_many(MANY))
            others = [asyncio.create_task(work) for work in works]
            await asyncio.sleep(0.1)  # long enough for each to have been done, were it to be
            go.set()
            await asyncio.gather(*others)
            with pytest.raises(LookupError):
                await failing
        assert await store.get_many(KEYS) == KEPT


def test_nested_ones_of_several_threads(dsn: str) -> None:
    """As of tasks."""
    inside, go = threading.Event(), threading.Event()
    with pgkv.Store.connect(dsn) as store, ThreadPoolExecutor(4) as threads:
        with store.transaction() as tx:

            def fails() -> None:
                with tx.transaction() as inner:
                    inner.set("bad", "1")
                    inside.set()
                    assert go.wait(30)
                    raise LookupError

            def nests() -> None:
                with tx.transaction() as inner:
                    inner.set("nested", "1")

            failing = threads.submit(fails)
            assert inside.wait(30)
            others: list[Future[Any]] = [
                threads.submit(nests),
                threads.submit(tx.set, "plain", "1"),
                threads.submit(tx.set_many, MANY),
            ]
            time.sleep(0.1)  # long enough for each to have been done, were it to be
            go.set()
            for each in others:
                each.result(30)
            with pytest.raises(LookupError):
                failing.result(30)
        assert store.get_many(KEYS) == KEPT


async def test_a_nested_one_that_does_not_end(dsn: str) -> None:
    """Who waits for another task's nested transaction gets a TransactionError in the end, and so
    does who would commit around it."""
    inside, go = asyncio.Event(), asyncio.Event()

    async def stays(tx: Any) -> None:
        async with tx.transaction() as inner:
            await inner.set("inner", "1")
            inside.set()
            await go.wait()

    async with pgkv.AsyncStore.connect(dsn) as store:
        with (
            in_a_hurry(store, 1.0),
            pytest.raises(pgkv.TransactionError, match="another thread or task"),
        ):
            async with store.transaction() as tx:
                staying = asyncio.create_task(stays(tx))
                await inside.wait()
                with pytest.raises(pgkv.TransactionError, match="another thread or task"):
                    await tx.get("k")
        go.set()
        with pytest.raises(pgkv.TransactionError):
            await staying
        assert await store.get("inner") is None


def test_an_inner_view_ends_with_the_outer_one(dsn: str) -> None:
    """What a nested transaction returned is of no use after the end of the one around it."""
    with pgkv.Store.connect(dsn) as store:
        with store.transaction() as tx:
            nested = tx.transaction()
            inner = nested.__enter__()
            inner.set("k", "v")
        with pytest.raises(pgkv.TransactionError, match="committed"):
            inner.get("k")
        with pytest.raises(pgkv.TransactionError, match="committed"):
            nested.__exit__(None, None, None)
        assert store.get("k") == b"v"
