"""`cached` under faults: stampedes across processes, a killed leader, an outage, a fork."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

import pgkv
from pgkv._engine import breaker as _breaker
from pgkv.patterns.cache.call import _breakers
from tests.cached import cached_in
from tests.faults.support import Witness, exit_code, newest
from tests.servers import LATE, PATIENCE, Server, wait_until
from tests.variants import Variant, inside

ROOT = Path(__file__).parents[2]
MakeStore = Callable[..., Any]

# One of the processes: reports that it is ready, waits to be let go, calls from many threads (or
# tasks), and prints what they got. `runs` gets a row for every run of the function.
PROGRAM = """
import asyncio, sys, threading, time
import psycopg, pgkv
dsn, variant, threads, seconds, lease = sys.argv[1], sys.argv[2], *map(float, sys.argv[3:6])

def ran():
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("INSERT INTO runs VALUES (pg_backend_pid(), %s)", [__import__("os").getpid()])

options = dict(compute_timeout=lease, max_wait=60, store_timeout=30)
if variant == "sync":
    store = pgkv.Store.connect(dsn)

    @pgkv.cached(60, store=store, **options)
    def f(n: int) -> str:
        ran()
        time.sleep(seconds)
        return f"value {n}"

    print("ready", flush=True)
    sys.stdin.readline()
    answers = []
    crew = [threading.Thread(target=lambda: answers.append(f(1))) for _ in range(int(threads))]
    for each in crew: each.start()
    for each in crew: each.join()
    store.close()
else:
    async def main():
        async with pgkv.AsyncStore.connect(dsn) as store:

            @pgkv.cached(60, store=store, **options)
            async def f(n: int) -> str:
                await asyncio.to_thread(ran)
                await asyncio.sleep(seconds)
                return f"value {n}"

            print("ready", flush=True)
            await asyncio.to_thread(sys.stdin.readline)
            return await asyncio.gather(*(f(1) for _ in range(int(threads))))

    answers = asyncio.run(main())
print(sorted(answers) == ["value 1"] * int(threads), flush=True)
"""


class Fleet:
    """Processes that run the same cached function."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.members: list[subprocess.Popen[str]] = []
        with psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute(
                "CREATE TABLE runs (backend int, process int, at timestamptz DEFAULT clock_timestamp())"
            )

    def start(
        self, count: int, variant: str, *, threads: int, seconds: float, lease: float
    ) -> None:
        new = [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, self.dsn, variant, str(threads), str(seconds), str(lease)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
            for _ in range(count)
        ]  # fmt: skip
        self.members += new
        for each in new:
            assert each.stdout is not None
            assert each.stdout.readline() == "ready\n"

    def go(self, members: list[subprocess.Popen[str]] | None = None) -> None:
        for each in self.members if members is None else members:
            assert each.stdin is not None
            each.stdin.write("\n")
            each.stdin.flush()

    def runs(self) -> list[int]:
        with psycopg.connect(self.dsn, autocommit=True) as conn:
            return [pid for (pid,) in conn.execute("SELECT process FROM runs ORDER BY at")]

    def finish(self, members: list[subprocess.Popen[str]]) -> None:
        for each in members:
            output, _ = each.communicate(timeout=PATIENCE)
            assert output == "True\n"
            assert each.returncode == 0

    def close(self) -> None:
        for each in self.members:
            if each.poll() is None:
                each.kill()
            each.communicate()


@pytest.fixture
def fleet(dsn: str) -> Iterator[Fleet]:
    processes = Fleet(dsn)
    yield processes
    processes.close()


@newest
@pytest.mark.parametrize("variant_name", ["sync", "async"])
def test_stampede_of_8_processes_with_8_callers_each(fleet: Fleet, variant_name: str) -> None:
    """On one cold key: the function runs once, everybody gets its value."""
    fleet.start(8, variant_name, threads=8, seconds=0.2, lease=30)
    fleet.go()
    fleet.finish(fleet.members)
    assert len(fleet.runs()) == 1


@newest
def test_a_killed_leader_has_one_successor(fleet: Fleet) -> None:
    """kill -9 while the function runs: it runs once more, by one successor, when the lease ends."""
    fleet.start(1, "sync", threads=8, seconds=600, lease=1.5)
    fleet.start(3, "sync", threads=8, seconds=0.6, lease=60)  # none is late with its lease
    leader, *others = fleet.members
    fleet.go([leader])
    wait_until(lambda: len(fleet.runs()) == 1, "the leader computes")
    fleet.go(others)
    leader.send_signal(signal.SIGKILL)
    died = time.monotonic()
    wait_until(lambda: len(fleet.runs()) == 2, "a successor computes")
    took = time.monotonic() - died
    fleet.finish(others)
    runs = fleet.runs()
    assert len(runs) == 2
    assert runs[0] == leader.pid != runs[1]
    assert took < 1.5 + LATE


async def test_an_outage_costs_little_and_ends(
    make_server: Callable[..., Server],
    make_store: MakeStore,
    variant: Variant,
    monkeypatch: pytest.MonkeyPatch,
    operations: list[tuple[str, str, int]],
) -> None:
    """While the server is down calls run the function, after a few failures without a stall; with
    on_error="raise" they raise. When it is back the cache is."""
    monkeypatch.setattr(_breaker, "PAUSE_FIRST", 3600.0)
    server = make_server()
    store = await make_store(dsn=server.dsn)
    raising_store = await make_store(dsn=server.dsn)
    calls: list[int] = []

    async def f(n: int) -> int:
        calls.append(n)
        return n

    cached = cached_in(variant, store)(f)
    raising = cached_in(variant, raising_store, on_error="raise")(f)
    assert [await cached(1), await cached(1), await raising(1)] == [1, 1, 1]
    assert len(calls) == 1
    server.stop()
    operations.clear()
    for _ in range(_breaker.FAILURES_MAX):
        started = time.monotonic()
        assert await cached(1) == 1
        assert time.monotonic() - started < 3 + LATE
    assert len(operations) == cached.cache_info().errors == _breaker.FAILURES_MAX
    for _ in range(5):
        assert await cached(2) == 2
    assert len(operations) == _breaker.FAILURES_MAX, "the store is left alone"
    with pytest.raises(pgkv.StoreUnavailableError):
        await raising(1)
    with pytest.raises(pgkv.PgkvError):
        await cached.invalidate(1)
    server.start()
    breaker = _breakers[inside(store)._bare]
    breaker._pause = breaker._until = 0.0
    before = cached.cache_info()
    deadline = time.monotonic() + PATIENCE
    while cached.cache_info().hits == before.hits and time.monotonic() < deadline:
        await cached(3)
        await asyncio.sleep(0.01)
    assert cached.cache_info().hits > before.hits


@newest
async def test_a_frozen_store_costs_the_timeout(
    make_store: MakeStore, variant: Variant, witness: Witness
) -> None:
    """A server that does not answer (here: a locked table) delays a call by store_timeout, not by
    the store's own operation_timeout."""
    store = await make_store()  # makes the table

    @cached_in(variant, store, store_timeout=0.3)
    async def f() -> int:
        return 1

    with psycopg.connect(witness._dsn) as conn:
        conn.execute("LOCK TABLE kv_store IN ACCESS EXCLUSIVE MODE")
        started = time.monotonic()
        assert await f() == 1
        assert 0.25 < time.monotonic() - started < 3 + LATE
        conn.rollback()
    assert f.cache_info().errors == 1


@newest
async def test_the_functions_own_errors_are_no_outage(
    make_store: MakeStore, variant: Variant
) -> None:
    """A function that raises pgkv's own errors (it may use a store itself) is not called again, and
    opens no circuit."""
    store = await make_store()
    calls: list[int] = []

    @cached_in(variant, store)
    async def f() -> int:
        calls.append(1)
        raise pgkv.StoreUnavailableError("its own")

    for _ in range(7):
        with pytest.raises(pgkv.StoreUnavailableError, match="its own"):
            await f()
    assert len(calls) == 7
    assert f.cache_info().errors == 0


@newest
@pytest.mark.parametrize("on_error", ["call", "raise"])
@pytest.mark.parametrize("wrong", ["right", "loop", "transaction"])
async def test_what_the_program_does_wrong_is_no_outage(
    make_store: MakeStore,
    variant: Variant,
    limited: str,
    witness: Witness,
    on_error: str,
    wrong: str,
) -> None:
    """A missing right, a store of another event loop, a view of a transaction that has ended: raised
    by every call, whatever on_error says. The function is not called and no circuit opens."""
    if wrong == "loop" and variant.name == "sync":
        pytest.skip("threads share a store")
    store = await make_store()
    await store.set("k", b"v")  # the table exists
    if wrong == "right":
        store = await make_store(dsn=limited)
    calls: list[int] = []

    async def f() -> int:
        calls.append(1)
        return 1

    error: type[Exception] = pgkv.ConfigError
    if wrong == "transaction":
        error = pgkv.TransactionError
        async with store.transaction() as view:
            store = view
    cached = cached_in(variant, store, on_error=on_error)(f)
    if wrong == "loop":
        assert await cached() == 1
        calls.clear()

    async def call() -> int:
        if wrong == "loop":
            return await asyncio.to_thread(lambda: asyncio.run(_awaited(cached)))
        return await cached()  # type: ignore[no-any-return]  # an int

    for _ in range(7):
        with pytest.raises(error):
            await call()
    assert not calls
    assert cached.cache_info().errors == 0
    if wrong == "right":
        witness.conn.execute(
            f"GRANT SELECT, INSERT, UPDATE, DELETE ON kv_store TO r_{witness.name}"
        )
        assert [await cached(), await cached()] == [1, 1]
        assert len(calls) == 1


async def _awaited(fn: Any) -> Any:
    return await fn()


@newest
async def test_a_crash_of_the_server_makes_the_cache_cold(
    make_server: Callable[..., Server], make_store: MakeStore, variant: Variant
) -> None:
    """An UNLOGGED table comes back empty: a fill that was under way is refused, nothing old shows."""
    server = make_server()
    store = await make_store(dsn=server.dsn)
    gate, begun = asyncio.Event(), asyncio.Event()
    calls: list[int] = []

    @cached_in(variant, store, store_timeout=20)
    async def f() -> int:
        calls.append(1)
        begun.set()
        await gate.wait()
        return len(calls)

    call = asyncio.ensure_future(f())
    await begun.wait()
    await asyncio.to_thread(server.stop, "immediate")
    await asyncio.to_thread(server.start)
    gate.set()
    assert await call == 1
    assert f.cache_info().fills == 0
    assert [await f(), await f()] == [2, 2]


@newest
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_forked_during_a_computation_does_not_wait_for_it(dsn: str) -> None:
    """The parent's flights and threads do not exist in the child: it waits for the lease only."""
    with pgkv.Store.connect(dsn) as store:
        gate, begun = threading.Event(), threading.Event()

        @pgkv.cached(60, store=store, store_timeout=20, max_wait=0.2, stale=60)
        def f(n: int) -> int:
            if n == 1:
                begun.set()
                gate.wait(20)
            return n

        thread = threading.Thread(target=f, args=(1,))
        thread.start()
        assert begun.wait(20)
        pid = os.fork()
        if not pid:
            gate.set()
            os._exit(0 if f(2) == 2 and f(1) == 1 else 1)
        try:
            assert exit_code(pid) == 0
        finally:
            gate.set()
            thread.join(20)
        assert f(1) == 1
