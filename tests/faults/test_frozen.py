"""A server that is silent: deadlines hold for whole calls, statements are cancelled, and no answer
ever reaches the wrong question."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from psycopg.conninfo import make_conninfo

from pgkv import OperationTimeoutError, RetryPolicy, Store, StoreUnavailableError
from tests.faults.support import Witness, newest, until
from tests.servers import LATE, Server, wait_until
from tests.variants import hurries, in_a_hurry, was_sent

MakeStore = Callable[..., Awaitable[Any]]
pytestmark = newest
ABANDON = 1.2  # seconds that the cancel request may add, and a little


async def test_blocked_call_is_cancelled(make_store: MakeStore, witness: Witness) -> None:
    """A write that waits for a row lock ends at operation_timeout; its statement does not go on
    and the write never happens."""
    store = await make_store()
    await store.set("k", b"old")
    with witness.lock("k"):
        for seconds in hurries(store):
            started = time.monotonic()
            with pytest.raises(OperationTimeoutError) as caught:
                await store.set("k", b"new")
            assert 0.9 * seconds < time.monotonic() - started < seconds + ABANDON + LATE
            if was_sent(caught.value):
                break
        await until(lambda: not witness.active(), "the statement is cancelled")
        assert await store.get("k") == b"old"
    assert await store.get("k") == b"old"


async def test_deadline_in_a_transaction(make_store: MakeStore, witness: Witness) -> None:
    """In a transaction too; the transaction is over then, and says so."""
    store = await make_store()
    await store.set_many({"k": b"old", "other": b"old"})
    with witness.lock("k"):
        with in_a_hurry(store, 1.0), pytest.raises(OperationTimeoutError):
            async with store.transaction() as tx:
                await tx.set("other", b"new")
                await tx.set("k", b"new")
        assert await store.get("other") == b"old"
        await until(lambda: not witness.active(), "the statement is cancelled")
    assert await store.get("k") == b"old"


async def test_deadline_over_many_statements(make_store: MakeStore, witness: Witness) -> None:
    """A batch in chunks has one deadline for all its statements."""
    store = await make_store()
    await store.set("k9999", b"old")
    with witness.lock("k9999"):
        started = time.monotonic()
        with in_a_hurry(store, 0.3), pytest.raises(OperationTimeoutError):
            await store.set_many({f"k{i:04}": b"new" for i in range(10_000)})
        assert time.monotonic() - started < 0.3 + ABANDON + LATE
    assert await store.count() == 1


async def test_ping_with_a_timeout_of_its_own(
    make_server: Callable[..., Server], make_store: MakeStore
) -> None:
    """ping(timeout) fails in that time on a frozen server."""
    server = make_server()
    store = await make_store(dsn=server.dsn, operation_timeout=60, connect_timeout=60)
    server.freeze()
    try:
        started = time.monotonic()
        with pytest.raises(OperationTimeoutError):
            await store.ping(timeout=0.2)
        assert time.monotonic() - started < 0.2 + ABANDON + LATE
    finally:
        server.thaw()
    assert await store.ping() < 30


async def test_frozen_server(make_server: Callable[..., Server], make_store: MakeStore) -> None:
    """operation_timeout holds for the whole call: sending, waiting for a connection, connecting,
    every repeat. Afterwards no later answer belongs to an earlier question."""
    server = make_server()
    store = await make_store(
        dsn=server.dsn,
        pool_max_size=2,
        connect_timeout=60,
        retry=RetryPolicy(attempts=10),
    )
    await store.set_many({f"k{i}": b"%d" % i for i in range(50)})

    async def ask(i: int) -> tuple[float, BaseException | None]:
        started = time.monotonic()
        try:
            assert await store.get(f"k{i}") == b"%d" % i
        except (OperationTimeoutError, StoreUnavailableError) as error:
            return time.monotonic() - started, error
        return time.monotonic() - started, None

    for limit in hurries(store):
        server.freeze()
        try:
            outcomes = await asyncio.gather(*(ask(i) for i in range(12)))
        finally:
            server.thaw()
        seconds = [passed for passed, _ in outcomes]
        errors = [error for _, error in outcomes]
        print(sorted(seconds), {type(error).__name__ for error in errors})
        assert all(error is not None for error in errors)
        assert max(seconds) < limit + ABANDON + LATE
        if any("may still have happened" in str(error) for error in errors):
            break
    for _ in range(4):
        outcomes = await asyncio.gather(*(ask(i) for i in range(50)))
        assert [error for _, error in outcomes if error] == []


async def test_frozen_while_connecting(
    make_server: Callable[..., Server], make_store: MakeStore
) -> None:
    """The first connection to a silent server fails within the shorter of connect_timeout and
    operation_timeout, and nothing is said to have happened."""
    server = make_server()
    dsn = make_conninfo(server.dsn, connect_timeout=60)  # libpq's: the store's own is what ends it
    server.freeze()
    try:
        for shorter in ("connect_timeout", "operation_timeout"):
            options = {"connect_timeout": 60, "operation_timeout": 60, shorter: 0.4}
            started = time.monotonic()
            with pytest.raises((StoreUnavailableError, OperationTimeoutError)) as caught:
                await make_store(dsn=dsn, retry=None, **options)
            assert time.monotonic() - started < 0.4 + ABANDON + LATE
            assert not caught.value.outcome_unknown
    finally:
        server.thaw()
    store = await make_store(dsn=server.dsn)
    await store.set("k", b"v")


CHILD = """
import signal, sys, time
import pgkv
signal.signal(signal.SIGINT, signal.default_int_handler)
store = pgkv.Store.connect(sys.argv[1], application_name="child", pool_max_size=1)
store.get("free")
print("ready", flush=True)
try:
    {blocked}
except KeyboardInterrupt:
    print(f"interrupted {{time.monotonic():.3f}}", flush=True)
for i in range(200):
    assert store.set(f"n{{i}}", b"%d" % i)
    assert store.get(f"n{{i}}") == b"%d" % i, i
assert store.get("k") == b"old"
print("right", flush=True)
store.close()
"""


@pytest.mark.parametrize(
    "blocked",
    [
        'store.set("k", b"new")',
        'store.delete_many(["k", "free"])',
        'store.set_many({"k": b"new", **{f"x{i}": b"" for i in range(6000)}})',
        'store.update("k", lambda value: b"new")',
        'with store.transaction() as tx: tx.set("free", b""); tx.set("k", b"new")',
    ],
    ids=["set", "delete_many", "chunks", "update", "transaction"],
)
def test_interrupt(witness: Witness, dsn: str, blocked: str) -> None:
    """Ctrl-C during a blocked call raises KeyboardInterrupt soon, the statement does not go on, and
    the store gives right answers afterwards."""
    dsn = make_conninfo(dsn, application_name="child")
    with Store.connect(dsn) as store:
        store.set("k", b"old")
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD.format(blocked=blocked), dsn],
        stdout=subprocess.PIPE,
        text=True,
    )
    with child, witness.lock("k"):
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            wait_until(lambda: witness.waiting("child") == 1, "the child waits for the lock")
            sent = time.monotonic()
            child.send_signal(signal.SIGINT)
            word, moment = child.stdout.readline().split()
            assert word == "interrupted"
            assert float(moment) - sent < 1 + LATE
            assert child.stdout.readline() == "right\n"
            # The lock is held: what it waited for cannot have come.
            wait_until(lambda: witness.waiting("child") == 0, "the statement is cancelled")
            assert child.wait(60) == 0
        finally:
            child.kill()


# Each round has keys of its own: the statement that a signal cut off may still run in the next one.
# Between two rounds a signal only counts for the next one: there nothing could catch its exception.
STORM = """
import signal, sys
import pgkv
armed = late = False
def interrupt(number, frame):
    global armed, late
    late = not armed
    if armed:
        armed = False
        raise KeyboardInterrupt
signal.signal(signal.SIGINT, interrupt)
store = pgkv.Store.connect(sys.argv[1], application_name="child", pool_max_size=2, pool_timeout=30)
i = 0
print("ready", flush=True)
for round in range(60):
    try:
        armed = True
        if late:
            signal.raise_signal(signal.SIGINT)
        while True:
            i += 1
            key = "k%d:%d" % (round, i % 7)
            store.set(key, b"%d" % i)
            assert store.get(key) == b"%d" % i, i
    except KeyboardInterrupt:
        print("x", flush=True)
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("right", flush=True)
store.close()
"""


def test_interrupts_at_any_moment(dsn: str) -> None:
    """Ctrl-C that falls anywhere in a call, sixty times, loses no connection of a pool of two and
    mixes up no answers."""
    child = subprocess.Popen(
        [sys.executable, "-c", STORM, dsn],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with child:
        try:
            assert child.stdout is not None
            assert child.stderr is not None
            assert child.stdout.readline() == "ready\n"
            line = "x\n"
            pause = 0.001
            while line == "x\n":
                pause = pause * 1.37 % 0.01
                time.sleep(pause)
                child.send_signal(signal.SIGINT)
                line = child.stdout.readline()
            assert line == "right\n", child.stderr.read()
            assert child.wait(60) == 0
        finally:
            child.kill()


def test_interrupt_of_a_waiter(dsn: str) -> None:
    """Ctrl-C while waiting in the pool's queue loses no connection: whatever is released later
    reaches those who still wait."""
    with Store.connect(dsn, pool_max_size=1, pool_timeout=30) as store:
        store.set("k", b"v")
        pool: Any = store._channel._pool  # type: ignore[union-attr]  # a pool's channel

        def interrupt() -> None:
            wait_until(lambda: len(pool.waiters) == 1, "it waits")
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

        for _ in range(5):
            with store.transaction() as tx:
                tx.ping()
                sender = threading.Thread(target=interrupt)
                sender.start()
                with pytest.raises(KeyboardInterrupt):
                    store.get("k")
                sender.join()
            started = time.monotonic()
            assert store.get("k") == b"v"
            assert time.monotonic() - started < 2 + LATE
