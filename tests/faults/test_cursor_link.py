"""Without poll(), or on a psycopg whose internals have changed, everything crosses ordinary cursors:
the same answers, deadlines and promises."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import psycopg
import psycopg_pool
import pytest

from pgkv import (
    CasStatus,
    InvalidValueError,
    OperationTimeoutError,
    RetryPolicy,
    Store,
    StoreUnavailableError,
    TransactionError,
)
from pgkv._engine._sync.cursor_connection import CursorConnection
from tests.faults import test_callers, test_exhaustion, test_tables
from tests.faults.proxy import Proxy
from tests.faults.support import Witness, newest
from tests.servers import LATE, Server, wait_until

pytestmark = newest


@pytest.fixture(autouse=True)
def _cursors(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pool", "transaction"):
        monkeypatch.setattr(f"pgkv._engine._sync.{module}.connection_class", CursorConnection)


@pytest.fixture
def cursor_store(dsn: str) -> Iterator[Store]:
    with Store.connect(dsn) as store:
        assert isinstance(store._channel._pool.idle[0], CursorConnection)  # type: ignore[union-attr]  # PoolChannel's
        yield store


def test_every_kind_of_operation(cursor_store: Store) -> None:
    """Reads, writes, batches, atomic operations, scans, upkeep, transactions, pipelines."""
    store = cursor_store
    assert store.set("k", b"\0\xff") > 0
    assert store.get("k") == b"\0\xff"
    assert store.get("none") is None
    assert store.set("t", "text", ttl=60)
    assert 59 < (store.ttl("t") or 0) <= 60
    assert store.set_nx("k", b"x") is False
    assert store.increment("n", 5) == 5
    with pytest.raises(InvalidValueError):
        store.increment("k")
    assert store.compare_and_swap("k", b"\0\xff", b"v").status is CasStatus.SUCCESS
    assert store.compare_and_swap("k", b"x", b"y").current == b"v"
    assert store.get_and_set("k", b"w") == b"v"
    assert store.update("k", lambda value: (value or b"") + b"!") == b"w!"
    many = {f"m{i:04}": b"%d" % i for i in range(5001)}
    assert store.set_many(many) == 5001
    assert store.get_many(many) == many
    assert store.increment_many({"a": 1, "b": 2}) == {"a": 1, "b": 2}
    assert list(store.iter_keys("m", page_size=1000)) == sorted(many)
    assert store.delete_many(many) == 5001
    entry = store.get_entry("k")
    assert entry is not None
    assert entry.value == b"w!"
    with store.transaction() as tx:
        tx.set("k", b"tx")
        with pytest.raises(InvalidValueError):
            tx.increment("k")
        with pytest.raises(ZeroDivisionError), tx.transaction() as inner:
            inner.set("k", b"inner")
            raise ZeroDivisionError
    assert store.get("k") == b"tx"
    store.vacuum()
    store.analyze()
    assert store.stats().total_keys == 5
    assert store.cleanup_expired() == 0
    store.truncate()
    assert store.count() == 0


def test_pipelines(cursor_store: Store) -> None:
    """A pipeline: what is refused is refused alone, or, atomic, with everything else."""
    store = cursor_store
    store.set("word", b"x")
    with store.pipeline() as pipe:
        one, bad, two = pipe.set("a", b"1"), pipe.increment("word"), pipe.get("a")
    assert one.result()
    assert two.result() == b"1"
    with pytest.raises(InvalidValueError):
        bad.result()
    with pytest.raises(Exception, match=r".") as caught:
        with store.pipeline(atomic=True) as pipe:
            done, bad = pipe.set("b", b"1"), pipe.increment("word")
        done.result()
    assert isinstance(caught.value, InvalidValueError | TransactionError)
    assert store.get("b") is None


def test_deadline(dsn: str, witness: Witness) -> None:
    """A blocked statement ends at operation_timeout, is cancelled, and its connection is not used
    again."""
    with Store.connect(dsn, operation_timeout=0.3) as store:
        store.set("k", b"old")
        with witness.lock("k"):
            started = time.monotonic()
            with pytest.raises(OperationTimeoutError, match="may still have happened"):
                store.set("k", b"new")
            assert 0.28 < time.monotonic() - started < 1.5 + LATE
            wait_until(lambda: not witness.active(), "the statement is cancelled")
        assert store.get("k") == b"old"


def test_deadlines_that_come_with_the_answer(dsn: str) -> None:
    """Deadlines that pass just as answers arrive: a late cancel request hits no other call."""
    with Store.connect(dsn, pool_max_size=2) as store:
        store.set_many({f"k{i}": b"%d" % i for i in range(100)})
        outcomes = [0, 0]
        for i in range(300):
            try:
                store.ping(timeout=0.0003 + 0.00001 * (i % 60))
                outcomes[0] += 1
            except OperationTimeoutError:
                outcomes[1] += 1
            assert store.get(f"k{i % 100}") == b"%d" % (i % 100)
        print(outcomes)


def test_frozen_server(make_server: Callable[..., Server]) -> None:
    """A silent server: the deadline holds though the cancel request is not answered either."""
    server = make_server()
    with Store.connect(server.dsn, operation_timeout=0.3, retry=None) as store:
        store.set("k", b"v")
        server.freeze()
        try:
            started = time.monotonic()
            with pytest.raises((OperationTimeoutError, StoreUnavailableError)):
                store.get("k")
            assert time.monotonic() - started < 2.5 + LATE
        finally:
            server.thaw()
        assert store.get("k") == b"v"


def test_interrupt(cursor_store: Store, witness: Witness) -> None:
    """Ctrl-C during a blocked call: KeyboardInterrupt soon, the statement cancelled, right answers
    afterwards."""
    store = cursor_store
    store.set("k", b"old")
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        wait_until(lambda: witness.waiting() == 1, "the call is blocked")
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    with witness.lock("k"):
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            store.set("k", b"new")
        thread.join()
        wait_until(lambda: not witness.active(), "the statement is cancelled")
        for i in range(20):
            store.set(f"n{i}", b"%d" % i)
            assert store.get(f"n{i}") == b"%d" % i
    assert store.get("k") == b"old"


def test_kills(cursor_store: Store, witness: Witness) -> None:
    """Killed while idle: the next call works."""
    for expected in range(1, 5):
        witness.terminate()
        assert cursor_store.increment("n") == expected


def test_lost_answers(dsn: str) -> None:
    """A lost answer: set is repeated, increment raises as unknown."""
    with Proxy(dsn) as proxy, Store.connect(proxy.dsn, retry=RetryPolicy(wait_initial=0)) as store:
        store.set("key-1", b"1")
        proxy.arm(b"key-1")
        assert store.set("key-1", b"2")
        proxy.arm(b"key-1")
        with pytest.raises(StoreUnavailableError) as caught:
            store.increment("key-1")
        assert caught.value.outcome_unknown
        assert store.get("key-1") == b"3"


@pytest.mark.parametrize("autocommit", [True, False])
def test_a_callers_pool(dsn: str, witness: Witness, autocommit: bool) -> None:
    """What is written over a caller's pool is committed; its connections keep their mode."""
    test_callers.test_a_callers_pool(dsn, witness, autocommit, close_returns=False)


def test_a_callers_pool_after_a_transaction(dsn: str) -> None:
    """Also after a transaction that was rolled back."""
    with psycopg_pool.ConnectionPool(dsn, min_size=1, max_size=1, open=True) as pool:
        store = Store.from_pool(pool)
        store.create_table()
        for _ in range(3):
            with pytest.raises(ZeroDivisionError), store.transaction() as tx:
                tx.set("k", b"v")
                raise ZeroDivisionError
            store.set("n", b"1")
            with pool.connection() as conn:
                assert conn.autocommit is False
        assert store.keys() == ["n"]


def test_a_callers_connection(dsn: str, cursor_store: Store) -> None:
    """using(): the caller's transaction, savepoints, refusals, two threads."""
    test_callers.test_commit_and_rollback(dsn, cursor_store)
    cursor_store.truncate()
    test_callers.test_autocommit(dsn, cursor_store)
    cursor_store.truncate()
    with psycopg.connect(dsn) as conn:
        assert cursor_store.using(conn).set("k", b"v")


def test_storm(dsn: str, witness: Witness, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool under a storm."""
    test_exhaustion.test_storm_with_expiring_leases_and_kills(dsn, witness, monkeypatch)


def test_forgotten_and_huge(
    make_store: Callable[..., Awaitable[Any]], event_loop_runner: asyncio.Runner, variant: Any
) -> None:
    """Batches larger than the socket's buffers."""
    if variant.name == "async":
        pytest.skip("AsyncStore has no such fallback")
    event_loop_runner.run(test_tables.test_huge_batches(make_store))
