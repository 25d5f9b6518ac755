"""Without poll(), as on Windows, a blocking store waits by select(): the same answers, deadlines and
interrupts."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from pgkv import OperationTimeoutError, Store
from tests.faults import test_tables
from tests.faults.support import Witness, newest
from tests.servers import LATE, wait_until
from tests.variants import hurries, was_sent

pytestmark = newest


@pytest.fixture(autouse=True)
def _select(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgkv._engine.wire.HAS_POLL", False)


@pytest.fixture
def select_store(dsn: str) -> Iterator[Store]:
    with Store.connect(dsn) as store:
        assert "wait" in store._channel._pool.idle[0].poll.__name__  # type: ignore[union-attr]  # PoolChannel's
        yield store


def test_deadline(dsn: str, witness: Witness) -> None:
    """A blocked statement ends at operation_timeout, is cancelled, and its connection is not used
    again."""
    with Store.connect(dsn) as store:
        store.set("k", b"old")
        with witness.lock("k"):
            for seconds in hurries(store):
                started = time.monotonic()
                with pytest.raises(OperationTimeoutError) as caught:
                    store.set("k", b"new")
                assert 0.9 * seconds < time.monotonic() - started < seconds + 1.2 + LATE
                if was_sent(caught.value):
                    break
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


def test_interrupt(select_store: Store, witness: Witness) -> None:
    """Ctrl-C during a blocked call: KeyboardInterrupt soon, the statement cancelled, right answers
    afterwards."""
    store = select_store
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


def test_kills(select_store: Store, witness: Witness) -> None:
    """Killed while idle: the next call works."""
    for expected in range(1, 5):
        witness.terminate()
        assert select_store.increment("n") == expected


def test_forgotten_and_huge(
    make_store: Callable[..., Awaitable[Any]], event_loop_runner: asyncio.Runner, variant: Any
) -> None:
    """Batches larger than the socket's buffers."""
    if variant.name == "async":
        pytest.skip("an event loop waits by itself")
    event_loop_runner.run(test_tables.test_huge_batches(make_store))
