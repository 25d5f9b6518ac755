"""The one fork registry: in a forked child every lock is new, in a stated order, whoever held it."""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from pgkv import _fork
from tests.servers import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted([*(ROOT / "pgkv").rglob("*.py"), *(ROOT / "patterns").rglob("*.py")])

# From 3.12 Python warns of fork() in a process with threads: that is the subject here.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork() here")


def in_child(check: Callable[[], bool]) -> bool:
    """What `check` says in a forked child; False too where it hangs, if only while it is forked."""
    pid = os.fork()
    if not pid:
        os._exit(0 if check() else 1)
    return said_yes(pid)


def said_yes(pid: int) -> bool:
    """Whether a child ended well; one that does not end is killed."""
    deadline = time.monotonic() + PATIENCE
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status) == 0
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return False
        time.sleep(0.005)


def test_one_module_knows_of_fork() -> None:
    """os.register_at_fork occurs in pgkv/_fork.py and nowhere else."""
    found = {
        path.relative_to(ROOT).as_posix()
        for path in MODULES
        if "register_at_fork" in path.read_text(encoding="utf-8")
        and "pgkv/patterns" not in str(path)
    }
    assert found == {"pgkv/_fork.py"}


class Owner:
    def __init__(self) -> None:
        self._lock = _fork.new_lock(self)
        self.seen: list[str] = []

    def after_fork(self) -> None:
        with self._lock:
            self.seen.append("renewed")


class Staged:
    """Notes when it was renewed, and whether an owner's lock was new by then."""

    def __init__(self, name: str, log: list[str], owner: Owner, stage: int) -> None:
        self.name, self.log, self.owner = name, log, owner
        _fork.survives_fork(self, stage)

    def after_fork(self) -> None:
        free = self.owner._lock.acquire(blocking=False)
        self.log.append(f"{self.name} {free}")


@forks
def test_a_lock_that_another_thread_holds() -> None:
    """Another thread is inside while the process forks: the child's lock is free, the parent's is
    as it was, and what is renewed later may take it."""
    owner = _fork.survives_fork(Owner())
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with owner._lock:
            inside.set()
            leave.wait(PATIENCE)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(PATIENCE)
    try:
        assert in_child(lambda: owner._lock.acquire(blocking=False) and owner.seen == ["renewed"])
        assert not owner._lock.acquire(blocking=False)
    finally:
        leave.set()
        thread.join()


@forks
def test_the_forking_thread_holds_the_lock_itself() -> None:
    """Parent and child both leave the block as they entered it, and the child may enter again."""
    owner = Owner()

    def work() -> bool:
        return owner._lock.acquire(blocking=False)

    with owner._lock:
        pid = os.fork()
    if not pid:
        os._exit(0 if work() else 1)
    assert said_yes(pid)
    assert work()


@forks
def test_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks, then connections, then threads, whatever was registered first; one that fails does
    not keep the others from being renewed."""
    log: list[str] = []
    owner = Owner()

    class Failing:
        def after_fork(self) -> None:
            raise RuntimeError("of the test")

    kept = [
        Staged("threads", log, owner, _fork.THREADS),
        _fork.survives_fork(Failing(), _fork.LOCKS),
        Staged("connections", log, owner, _fork.CONNECTIONS),
    ]
    raised: list[str] = []
    # Python gives this hook what a function of register_at_fork raises.
    monkeypatch.setattr(sys, "unraisablehook", lambda seen: raised.append(repr(seen.exc_value)))
    assert in_child(
        lambda: (
            log == ["connections True", "threads True"]
            and any("of the test" in each for each in raised)
        )
    )
    assert log == []
    assert len(kept) == 3


def test_owners_are_collected() -> None:
    """The registry keeps nothing alive, and forgets who is gone."""
    before = {*_fork._entries}  # of others, some of which may end meanwhile
    owner = _fork.survives_fork(Owner())
    gone = weakref.ref(owner)
    assert len(own := _fork._entries.keys() - before) == 2
    del owner
    gc.collect()
    assert gone() is None
    assert not own & _fork._entries.keys()


# A lock that is made otherwise is neither renewed in a child nor free for a signal handler.
PLAIN = re.compile(r"threading\.(Lock|RLock|Condition)\(\)")
PLAIN_LOCKS = {
    "pgkv/_fork.py",  # makes them
    "pgkv/_engine/_sync/pool.py",  # renewed with the pool
    "pgkv/_engine/_sync/transaction.py",  # a child is refused before it gets there
    "patterns/_runtime/lease.py",  # of the turn: only tried, never waited for
}


def test_no_property_has_a_lock() -> None:
    """functools.cached_property holds a lock while it computes, before Python 3.12: ours does not."""
    found = [
        path.name
        for path in MODULES
        if re.search(
            r"functools import .*cached_property|@functools.cached_property",
            path.read_text(encoding="utf-8"),
        )
    ]
    assert not found


def test_locks_are_made_in_one_place() -> None:
    """Every lock of the process comes from `new_lock`, but for those listed with a reason."""
    found = {
        path.relative_to(ROOT).as_posix()
        for path in MODULES
        if PLAIN.search(path.read_text(encoding="utf-8")) and "pgkv/patterns" not in str(path)
    }
    assert found <= PLAIN_LOCKS
