"""Locks under real processes that are stopped, killed, and whose server crashes."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

import pgkv
from pgkv._ops.op import Flow, pause
from pgkv.patterns.lock import flows
from tests.faults.lock_history import read, violations
from tests.faults.support import Witness, newest, renewed
from tests.servers import LATE, Server, wait_until

pytestmark = newest
ROOT = Path(__file__).resolve().parents[2]


class Worker:
    """A process of `lock_worker`."""

    def __init__(self, *args: object) -> None:
        command = [sys.executable, "-m", "tests.faults.lock_worker", *map(str, args)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def hear(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def say(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        return self._process.wait(300)

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


@pytest.fixture
def worker() -> Iterator[Callable[..., Worker]]:
    """worker("holder", dsn, ...) starts one; none outlives the test."""
    made: list[Worker] = []

    def make(*args: object) -> Worker:
        made.append(Worker(*args))
        return made[-1]

    yield make
    for each in made:
        each.end()


# -- 1: histories


def test_histories_are_those_of_a_fenced_mutex(
    dsn: str, worker: Callable[..., Worker], tmp_path: Path
) -> None:
    """Eight processes, three locks, random calls and timeouts: linearizable."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    with pgkv.Store.connect(dsn) as store:
        pgkv.Lock(store, "a").holder()
    paths = [tmp_path / f"{number}.jsonl" for number in range(8)]
    workers = [worker("storm", dsn, path, seed + n, 5) for n, path in enumerate(paths)]
    assert [each.wait() for each in workers] == [0] * 8
    history = read(paths)
    wrong = violations(history)
    if wrong:
        kept = Path("/tmp") / f"pgkv-history-{seed}"
        shutil.copytree(tmp_path, kept)
        pytest.fail(f"seed {seed}, history in {kept}:\n" + "\n".join(wrong[:10]))
    grants = [each for each in history if each.kind == "acquire" and each.ok]
    assert len(grants) > 40
    assert len({each.process for each in grants}) == 8


# -- 2: a paused holder


@pytest.mark.parametrize(
    ("resource", "lost"),
    [("file", True), ("file-fenced", False), ("table", False), ("fenced-table", False)],
)
def test_a_paused_holder(
    dsn: str, worker: Callable[..., Worker], tmp_path: Path, resource: str, lost: bool
) -> None:
    """A holder that is stopped past its lease and then writes: without a check of its token an
    update is lost (the control), with one, or under guard(), none."""
    path = tmp_path / "resource"
    path.write_text("0 0", "utf-8")
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("CREATE TABLE resource (n int, fence bigint)")
        conn.execute("INSERT INTO resource VALUES (0, 0)")
        if resource == "fenced-table":
            conn.execute(pgkv.fence_sql("resource", "fence").encode())
        paused, other = worker("writer", dsn, resource, path), worker("writer", dsn, resource, path)
        written = 0
        for _ in range(2):
            paused.say()
            assert paused.hear() == "holding"
            paused.signal(signal.SIGSTOP)
            other.say()
            if resource == "table":
                # The guard holds it off until the paused one has ended its transaction.
                time.sleep(1.2)
                paused.signal(signal.SIGCONT)
                paused.say()
                written += paused.hear() == "written"
                assert other.hear() == "holding"
                other.say()
                written += other.hear() == "written"
            else:
                assert other.hear() == "holding"
                other.say()
                written += other.hear() == "written"
                paused.signal(signal.SIGCONT)
                paused.say()
                written += paused.hear() == "written"
        if resource.startswith("file"):
            final = int(path.read_text("utf-8").split()[0])
        else:
            row = conn.execute("SELECT n FROM resource").fetchone()
            assert row is not None
            final = row[0]
    assert written >= 2
    assert (final < written) is lost, f"{written} writes were acknowledged, {final} are there"


# -- 3: deaths


def test_a_killed_holder_is_followed(
    dsn: str,
    worker: Callable[..., Worker],
    witness: Witness,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """kill -9 of the holder: the next one is granted within ttl + 1 s, with a larger token."""
    for name in ("POLL_FIRST", "POLL_MAX"):  # it sleeps no longer than the lease lasts
        monkeypatch.setattr(flows, name, 60.0)
    dead = worker("holder", dsn, "n", 1)
    token = int(dead.hear())
    dead.signal(signal.SIGKILL)
    killed = time.monotonic()
    wait_until(lambda: not witness.backends(), "no renewal of it has the row")
    with pgkv.Store.connect(dsn) as store, pgkv.Lock(store, "n").acquire(timeout=90) as lease:
        assert time.monotonic() - killed < 2 + LATE
        assert lease.token > token


def test_a_fleet_elects_again(dsn: str, worker: Callable[..., Worker]) -> None:
    """kill -9 of the leader: another one leads within ttl + 1 s, in a higher term."""
    with pgkv.Store.connect(dsn) as store:
        lock = pgkv.Lock(store, "cron")
        fleet = {
            each._process.pid: each for each in (worker("leader", dsn, "cron", 1) for _ in range(3))
        }
        term = leading = 0

        def elected() -> bool:
            nonlocal term, leading
            info = lock.holder()
            pid = int(info.owner.rpartition(":")[2]) if info else 0
            if info is None or info.token <= term or pid not in fleet:
                return False
            term, leading = info.token, pid
            return True

        wait_until(elected, "one is elected")
        for _ in range(2):
            fleet.pop(leading).signal(signal.SIGKILL)
            killed = time.monotonic()
            wait_until(elected, "another one is elected")
            assert time.monotonic() - killed < 2.2 + LATE


def test_grants_survive_crashes_of_the_server(make_server: Callable[..., Server]) -> None:
    """A killed backend, an immediate stop, a kill of the postmaster, a restart: durable grants are
    there afterwards, nobody else is granted the name, and tokens rise strictly."""
    server = make_server()
    rounds: list[Callable[[], None]] = [
        lambda: server.restart("immediate"),
        lambda: server.restart("fast"),
        lambda: _kill_the_server(server),
        lambda: _kill_a_backend(server),
    ]
    last = 0
    retry = pgkv.RetryPolicy(attempts=100, deadline=100.0)
    with pgkv.Store.connect(server.dsn, retry=retry, operation_timeout=100) as store:
        lock = pgkv.Lock(store, "n", ttl=600)
        for crash in rounds:
            lease = lock.acquire(timeout=60)
            assert lease.token > last
            last = lease.token
            crash()
            assert lock.try_acquire() is None, "the grant survived"
            lease.extend(600)
            # A release may be lost in a crash, so end it for certain.
            assert lease.release()
        for _ in range(5):
            with lock.acquire(timeout=60) as each:
                assert each.token > last
                last = each.token


def _kill_the_server(server: Server) -> None:
    server.kill()
    server.start()


def _kill_a_backend(server: Server) -> None:
    with server.connect() as conn:
        row = conn.execute("SELECT pg_backend_pid()").fetchone()
        assert row is not None
        server.kill_backend(row[0])


def test_an_unlogged_grant_does_not_survive(make_server: Callable[..., Server]) -> None:
    """durable=False: a crash frees every name at once (the stated limit); tokens still rise."""
    server = make_server()
    with pgkv.Store.connect(server.dsn) as store:
        lock = pgkv.Lock(store, "n", ttl=30, durable=False)
        lease = lock.acquire()
        server.restart("immediate")
        second = lock.acquire(timeout=60)
        assert second.token > lease.token
        with pytest.raises(pgkv.LeaseLostError):
            lease.extend(30)


# -- forks, clocks, pools


@pytest.mark.usefixtures("renewed_often")
def test_a_forked_child_holds_nothing(dsn: str) -> None:
    """A lease is lost in a forked child, whose own locks work; the parent's goes on."""
    with pgkv.Store.connect(dsn) as store:
        lock = pgkv.Lock(store, "n", ttl=60)
        with lock.acquire() as lease:
            pid = os.fork()
            if not pid:
                code = 1
                try:
                    assert lease.is_lost
                    assert pgkv.Lock(store, "n").try_acquire() is None
                    with pgkv.Lock(store, "child").acquire() as own:
                        wait_until(renewed(own), "it is renewed")
                        own.check()
                    code = 0
                finally:
                    os._exit(code)
            assert os.waitpid(pid, 0)[1] == 0
            wait_until(renewed(lease), "it is renewed")
            lease.check()


def _leave(lease: pgkv.Lease) -> None:
    with pytest.raises(pgkv.LeaseLostError), lease:
        pass


def _lost(call: Callable[[pgkv.Lease], object]) -> Callable[[pgkv.Lease], None]:
    def check(lease: pgkv.Lease) -> None:
        with pytest.raises(pgkv.LeaseLostError) as error:
            call(lease)
        assert error.value.reason == "forked"

    return check


def _release_by_signal(lease: pgkv.Lease) -> None:
    signal.signal(signal.SIGTERM, lambda *_: lease.release())
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)


FIRST_CALLS: dict[str, Callable[[Any], object]] = {
    "release": lambda lease: lease.release(),
    "leave": _leave,
    "check": _lost(lambda lease: lease.check()),
    "extend": _lost(lambda lease: lease.extend(60)),
    "guard": _lost(lambda lease: lease.guard(vars(lease)["conn"])),
    "is_lost": lambda lease: lease.is_lost,
    "remaining": lambda lease: lease.remaining(),
    "repr": repr,
    "SIGTERM": _release_by_signal,
    "collect": lambda lease: gc.collect(),
}


@pytest.mark.parametrize("kind", ["Lock", "Semaphore"])
@pytest.mark.parametrize("first", FIRST_CALLS)
def test_a_child_frees_nothing_whatever_it_calls_first(dsn: str, first: str, kind: str) -> None:
    """Whichever method of an inherited lease a forked child calls first: it is lost there, its
    release frees nothing, and the parent holds the name."""
    with pgkv.Store.connect(dsn) as store, psycopg.connect(dsn) as conn:
        lock: Any = pgkv.Lock(store, "n") if kind == "Lock" else pgkv.Semaphore(store, "n", 1)
        lease: Any = lock.acquire()
        lease.conn = conn
        pid = os.fork()
        if not pid:
            code = 1
            try:
                FIRST_CALLS[first](lease)
                assert not lease.release()
                assert lease.is_lost
                assert lease.remaining() == 0
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        assert lock.try_acquire() is None
        lease.check()
        assert lease.release()


async def test_a_child_of_asyncio_frees_nothing(dsn: str) -> None:
    """The same of an AsyncLease, in a loop of the child's own."""
    async with pgkv.AsyncStore.connect(dsn) as store:
        lock = pgkv.AsyncLock(store, "n")
        lease = await lock.acquire()
        pid = os.fork()
        if not pid:
            code = 1
            try:
                release = lease.release()
                with pytest.raises(StopIteration) as end:
                    release.send(None)
                assert end.value.value is False
                assert lease.is_lost
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        assert await lock.try_acquire() is None
        assert await lease.release()


def test_a_child_forked_during_acquire_asks_for_itself(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process forks while it waits for the lock (in a signal handler, say), and both go on
    waiting: they are never granted the same lease, and neither releases the other's."""
    with pgkv.Store.connect(dsn) as store, pgkv.Store.connect(dsn) as other:
        holder = pgkv.Lock(other, "n").acquire()
        lock = pgkv.Lock(store, "n")
        children: list[int] = []

        def wait(_: object, seconds: float) -> Flow[None]:
            if not children:
                children.append(os.fork())
                if children[0]:
                    holder.release()
            yield from pause(seconds)

        monkeypatch.setattr(lock._runtime, "wait", wait)
        code = 1
        try:
            with lock.acquire(timeout=60) as lease:
                for _ in range(30):
                    info = lock.holder()
                    assert info is not None
                    assert (info.token, info.owner) == (lease.token, lease.owner)
                    assert lease.owner.endswith(f":{os.getpid()}")
                    time.sleep(0.01)
            code = 0
        finally:
            if children == [0]:
                os._exit(code)
        assert os.waitpid(children[0], 0)[1] == 0


@pytest.mark.usefixtures("renewed_often")
def test_the_clients_wall_clock_does_not_matter(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client whose clock is an hour off, either way, holds and waits as any other."""
    real = time.time
    for offset in (3600, -3600):
        monkeypatch.setattr(time, "time", lambda offset=offset: real() + offset)
        with pgkv.Store.connect(dsn) as store, pgkv.Lock(store, "n").acquire(60) as lease:
            wait_until(renewed(lease), "it is renewed")
            lease.check()
            info = pgkv.Lock(store, "n").holder()
            assert info is not None
            assert 0 < info.remaining() <= 30
            assert pgkv.Lock(store, "n").try_acquire() is None


@pytest.mark.usefixtures("renewed_often")
def test_an_exhausted_pool_loses_no_lease(dsn: str) -> None:
    """While the application holds every pooled connection renewals go on."""
    with pgkv.Store.connect(dsn, pool_max_size=1) as store:
        lease = pgkv.Lock(store, "n").acquire()
        with store.transaction() as tx:
            tx.set("k", "v")
            for _ in range(2):
                wait_until(renewed(lease), "it is renewed")
            lease.check()
        assert lease.release()


def test_an_abandoned_lease_ends_by_its_ttl(dsn: str) -> None:
    """A lease that nobody can release any more is not renewed for ever."""
    with pgkv.Store.connect(dsn) as store:
        lock = pgkv.Lock(store, "n", ttl=0.9)
        token = lock.acquire().token
        with lock.acquire(timeout=60) as lease:
            assert lease.token > token
