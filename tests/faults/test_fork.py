"""fork(): the child opens connections of its own and never touches its parent's."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import psycopg_pool
import pytest

from pgkv import Store, TransactionError, TtlCleanupStrategy
from tests.faults.support import Crew, Witness, exit_code, newest
from tests.servers import PATIENCE, wait_until

pytestmark = [
    newest,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork() here"),
    # From 3.12 Python warns of fork() in a process with threads: that is the subject here.
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]


def in_child(work: Callable[[], Any]) -> int:
    """Run it in a forked child; the child's process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _are(witness: Witness, backends: list[int]) -> bool:
    return witness.backends() == backends


def test_parent_and_child_go_on(dsn: str, witness: Witness) -> None:
    """After the fork both work, in turns and at once, with right answers; the child has backends of
    its own, and when it ends, the parent's connections are as they were."""
    with Store.connect(dsn, pool_max_size=3) as store:
        store.set("k", b"parent")
        parents = witness.backends()

        def work() -> None:
            key = f"child {os.getpid()}"
            for i in range(100):
                store.set(key, b"%d" % i)
                assert store.get(key) == b"%d" % i
                assert store.get("k") == b"parent"
            store.increment("n")

        children = [in_child(work) for _ in range(3)]
        for i in range(300):
            store.set("own", b"%d" % i)
            assert store.get("own") == b"%d" % i
        assert [exit_code(pid) for pid in children] == [0, 0, 0]
        assert store.get("n") == b"3"
        assert set(parents) <= set(witness.backends())
        wait_until(lambda: len(witness.backends()) <= 3, "the children's connections end")


def test_a_watcher_is_its_parents(dsn: str) -> None:
    """In the child the parent's iterator ends, and one of its own works; the parent's goes on."""
    with Store.connect(dsn, notify=True) as store, store.watch("k", poll=None) as events:

        def work() -> None:
            assert list(events) == []
            with store.watch("k", poll=None) as own:
                store.set("k", b"child")
                assert own.next(60) is not None
            store.close()  # what it says of its writes is sent a moment later, or now

        store.set("other", b"waits to be told")
        assert exit_code(in_child(work), 90) == 0
        assert events.next(60) is not None
        store.set("k", b"parent")
        assert events.next(60) is not None


@pytest.mark.parametrize("how", ["exit", "close", "collect"])
def test_the_child_leaves_the_parents_connections_alone(
    dsn: str, witness: Witness, how: str
) -> None:
    """When the child exits, closes the store, or throws it away and collects garbage, with or
    without having used it, the parent's backends live on."""
    for use in (False, True):
        store = Store.connect(dsn, pool_min_size=3, pool_max_size=3)
        wait_until(lambda: len(witness.backends()) == 3, "the pool fills")
        parents = witness.backends()
        holder = [store]

        def work(use: bool = use, holder: list[Store] = holder) -> None:
            nonlocal store
            if use:
                holder[0].set("k", b"child")
            if how == "close":
                holder[0].close()
            if how == "collect":
                holder.clear()
                del store
                gc.collect()
                gc.collect()

        pid = in_child(work)
        assert exit_code(pid) == 0
        # The server takes a moment to notice the end of the child's own.
        wait_until(partial(_are, witness, parents), "only the parent's are left")
        for i in range(20):
            store.set("k", b"%d" % i)
            assert store.get("k") == b"%d" % i
        assert witness.backends() == parents
        store.close()
        wait_until(lambda: not witness.backends(), "the parent's connections end")


SCRIPT = """
import os, sys
import pgkv
store = pgkv.Store.connect(sys.argv[1], pool_min_size=2, ttl_cleanup_strategy=pgkv.TtlCleanupStrategy.BACKGROUND)
store.set("k", b"parent")
pid = os.fork()
if not pid:
    assert store.get("k") == b"parent"
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
for _ in range(20):
    assert store.get("k") == b"parent"
print(store._channel._pool._pool.get_stats().get("connections_lost", 0))
store.close()
"""


def test_a_child_that_ends_as_a_program_does(dsn: str) -> None:
    """sys.exit() in the child, with the interpreter's whole end, disturbs nothing and hangs
    nowhere."""
    import subprocess

    # As of Python 3.12 forking a program with threads draws a warning, which is none of ours.
    command = [sys.executable, "-W", "ignore:This process:DeprecationWarning", "-c", SCRIPT, dsn]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "0", "")


def test_multiprocessing_with_fork(dsn: str, witness: Witness) -> None:
    """multiprocessing's fork context: workers share the store object, and each has its own
    connection."""
    with Store.connect(dsn, pool_max_size=2) as store:
        store.set("n", b"0")
        context = multiprocessing.get_context("fork")
        workers = [context.Process(target=_count, args=(store,)) for _ in range(4)]
        for worker in workers:
            worker.start()
        for _ in range(100):
            store.increment("n")
        for worker in workers:
            worker.join(PATIENCE)
            assert worker.exitcode == 0
        assert store.get("n") == b"500"
        wait_until(lambda: len(witness.backends()) <= 2, "the workers' connections end")


def _count(store: Store) -> None:
    for _ in range(100):
        store.increment("n")


def test_an_inherited_transaction(dsn: str, witness: Witness) -> None:
    """The child's use of it, and its way out of the block, are TransactionErrors; the store itself
    works there, and the parent's transaction commits."""
    with Store.connect(dsn, pool_max_size=1) as store:
        manager = store.transaction()
        tx = manager.__enter__()
        tx.set("k", b"v")
        backends = witness.backends()

        def work() -> None:
            for use in (lambda: tx.get("k"), lambda: tx.set("k", b"w"), tx.transaction().__enter__):
                with pytest.raises(TransactionError, match="parent"):
                    use()
            with pytest.raises(TransactionError, match="parent"):
                manager.__exit__(None, None, None)
            assert store.get("k") is None  # not committed yet
            store.set("child", b"v")

        def fail() -> None:
            error = ValueError("the body's own")
            with pytest.raises(ValueError, match="the body's own"):
                if not manager.__exit__(ValueError, error, None):
                    raise error
            store.set("child", b"v")

        assert exit_code(in_child(work)) == 0
        assert exit_code(in_child(fail)) == 0
        wait_until(partial(_are, witness, backends), "the children's connections end")
        tx.set("more", b"v")
        manager.__exit__(None, None, None)
        assert store.get_many(["k", "more", "child"]) == dict.fromkeys(["k", "more", "child"], b"v")


def test_fork_while_other_threads_work(dsn: str) -> None:
    """A fork in the middle of other threads' calls, connections checked out and locks held, leaves
    the child with a store that works."""
    with Store.connect(dsn, pool_max_size=4) as store:
        running = True

        def work(number: int) -> None:
            while running:
                store.set(f"k{number}", b"%d" % number)
                assert store.get(f"k{number}") == b"%d" % number

        def child() -> None:
            for i in range(20):
                store.set("child", b"%d" % i)
                assert store.get("child") == b"%d" % i

        with Crew() as crew:
            try:
                for number in range(6):
                    crew.start(work, number)
                for _ in range(5):
                    assert exit_code(in_child(child)) == 0
            finally:
                running = False


def test_the_background_sweeper_works_in_the_child(dsn: str, witness: Witness) -> None:
    """BACKGROUND: a forked child that uses the store sweeps as well."""
    with Store.connect(dsn, ttl_cleanup_strategy=TtlCleanupStrategy.BACKGROUND) as store:
        store.set("k", b"v")

        def work() -> None:
            assert not [t for t in threading.enumerate() if t.name == "pgkv-sweep"]
            store.set("child", b"v")
            assert [t for t in threading.enumerate() if t.name == "pgkv-sweep"]

        assert [t for t in threading.enumerate() if t.name == "pgkv-sweep"]
        assert exit_code(in_child(work)) == 0


def test_a_pool_of_the_callers(dsn: str) -> None:
    """from_pool(): the caller makes the child's pool; a store over it works there while the parent
    goes on."""
    with psycopg_pool.ConnectionPool(dsn, min_size=1, max_size=2, open=True) as pool:
        store = Store.from_pool(pool)
        store.create_table()
        store.set("k", b"v")

        def work() -> None:
            with psycopg_pool.ConnectionPool(dsn, min_size=1, open=True) as own:
                assert Store.from_pool(own).get("k") == b"v"

        assert exit_code(in_child(work)) == 0
        for _ in range(20):
            assert store.get("k") == b"v"
