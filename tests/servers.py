"""Real PostgreSQL servers that tests start, stop, kill and freeze.

`installed()` says which versions this machine has; `Server` is one server of one of them, on a copy
of a data directory that initdb made once per version. Starting one takes some 0.3 s.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import psycopg

from pgkv._embedded.binaries import (
    Account,
    Binaries,
    account_of,
    binary_directories,
    exists,
    is_root,
    version_of,
)
from pgkv._embedded.cluster import Cluster

# What makes a test server fast: a crash of the machine may lose it. A crash of the server alone
# loses nothing by it.
THROWAWAY: Mapping[str, str] = {"fsync": "off", "full_page_writes": "off"}
TEMPLATES = "PGKV_TESTS_TEMPLATES"
ONLY = os.environ.get("PGKV_TEST_POSTGRES", "")  # a major version: tests run on it, and on no other
SMALL: Mapping[str, str] = {"shared_buffers": "32MB", "max_connections": "150"}


# Seconds by which a loaded machine may be late with what takes an instant. An upper bound of a test
# includes them. What it rules out must take longer: operation_timeout does, and what the test arranges.
# The 10 s that are the default of connect_timeout and of pool_timeout are shorter: a test sets these to 60.
LATE = 20.0
# Seconds for what comes by itself, a request, a thread, a program that starts: only a defect takes that long.
PATIENCE = 90.0


def wait_until(condition: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    """Poll a condition; a deadline, not a sleep, decides."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.005)


def takes_connections(dsn: str) -> bool:
    """Whether what the DSN names answers: a socket's file is there before anybody listens on it."""
    try:
        psycopg.connect(dsn, connect_timeout=2).close()
    except psycopg.OperationalError as error:
        # PgBouncer that refuses a setting has answered.
        return "startup parameter" in str(error)
    return True


def server_account() -> Account | None:
    """Whom servers run as, when the tests run as root."""
    return account_of() if is_root() else None


@cache
def installed() -> dict[int, Binaries]:
    """The newest-first binaries of each major version found here, or those of PGKV_TEST_POSTGRES."""
    found: dict[int, Binaries] = {}
    fetched = (Path(__file__).parents[1] / ".servers").glob("npm/node_modules/*/*/native/bin")
    for directory in (*binary_directories(), *map(str, fetched)):
        with contextlib.suppress(OSError):
            major = version_of(directory, server_account())
            found.setdefault(major, Binaries(directory, major))
    if ONLY:
        if int(ONLY) not in found:
            raise LookupError(
                f"PGKV_TEST_POSTGRES: no PostgreSQL {ONLY} here, only {sorted(found)}"
            )
        return {int(ONLY): found[int(ONLY)]}
    return dict(sorted(found.items(), reverse=True))


@cache
def base_directory() -> Path:
    """Where servers live: in /tmp, because pytest's tmp_path is closed to the account that servers
    run as under root.
    """
    path = Path(tempfile.mkdtemp(prefix="pgkv-tests-", dir="/tmp"))
    path.chmod(0o755)
    return path


def remove_base_directory() -> None:
    """At the end of the session."""
    if base_directory.cache_info().currsize:
        shutil.rmtree(base_directory(), ignore_errors=True)


def new_directory(name: str = "server", within: Path | None = None) -> Path:
    """An empty directory that a server's account can use."""
    path = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=within or base_directory()))
    if account := server_account():
        os.chown(path, account.uid, account.gid)
    return path


def share_templates() -> None:
    """Processes that this one starts use the data directories of this one."""
    os.environ.setdefault(TEMPLATES, str(new_directory("templates")))


@cache
def _template(binaries: Binaries) -> Path:
    import fcntl  # no Windows has it, and no server of the tests'

    within = Path(os.environ.get(TEMPLATES) or base_directory())
    made = within / f"pg{binaries.major}"
    with (within / f"pg{binaries.major}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process makes it, the others wait
        if not made.exists():
            cluster = Cluster.open(new_directory("template", within), binaries)
            cluster.start({**SMALL, **THROWAWAY})
            cluster.stop("fast")
            cluster.root.rename(made)
    return made


def lay_out(root: Path, binaries: Binaries | None = None) -> None:
    """Make a directory of an embedded server that has run before."""
    binaries = binaries or next(iter(installed().values()))
    root.mkdir(exist_ok=True)
    if account := server_account():
        os.chown(root, account.uid, account.gid)
    subprocess.run(["cp", "-a", _template(binaries) / "pgdata", root], check=True)


@dataclass(frozen=True, slots=True)
class UserServer:
    """The server that PGKV_TEST_DSN names: used, never stopped."""

    dsn: str

    @property
    def is_ours(self) -> bool:
        return False


class Server:
    """One server of the tests' own. Its `dsn` stays the same across restarts; the role is a
    superuser.
    """

    def __init__(
        self,
        binaries: Binaries,
        *,
        durable: bool = False,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.binaries = binaries
        self.major = binaries.major
        self.settings = {**SMALL, **({} if durable else THROWAWAY), **(settings or {})}
        root = new_directory()
        lay_out(root, binaries)
        self._cluster = Cluster.open(root, binaries)
        self.dsn = self._cluster.start(self.settings)

    @property
    def is_ours(self) -> bool:
        return True

    @property
    def pid(self) -> int | None:
        """The postmaster's process id; None when it does not run."""
        server = self._cluster.postmaster()
        return server.pid if server else None

    def start(self) -> None:
        """Start it and wait until it takes connections; crash recovery included."""
        self._cluster.start(self.settings)

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """`fast` ends every connection and writes a checkpoint; `immediate` is a crash: UNLOGGED
        tables will be empty.
        """
        self._cluster.stop(mode)

    def restart(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        self.stop(mode)
        self.start()

    def kill(self) -> None:
        """kill -9 of the postmaster; its backends notice and end."""
        pid = self.pid
        assert pid is not None
        self._stop_postmaster(pid)
        children = self._children(pid)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: self.pid is None, "the killed postmaster ends")
        wait_until(
            lambda: not any(exists(child) for child in children), "the orphaned backends end"
        )

    def kill_backend(self, pid: int) -> None:
        """kill -9 of one backend: the server ends all others, recovers, empties UNLOGGED tables and
        goes on.
        """
        postmaster = self.pid
        assert postmaster is not None
        children = self._children(postmaster)
        assert pid in children, f"{pid} is no backend of this server"
        os.kill(pid, signal.SIGKILL)
        wait_until(
            lambda: not any(exists(child) for child in children), "the backends of before end"
        )
        wait_until(self.accepts, "the server recovers")

    def freeze(self) -> None:
        """SIGSTOP to every process of the server: connections stay open and silent, as when a
        network swallows packets.
        """
        postmaster = self.pid
        assert postmaster is not None
        self._stop_postmaster(postmaster)
        self._signal_all(signal.SIGSTOP)
        wait_until(lambda: {*self._states(postmaster).values()} <= {"T", "Z"}, "all stop")

    def thaw(self) -> None:
        """End freeze()."""
        self._signal_all(signal.SIGCONT)

    def accepts(self) -> bool:
        """Whether a connection can be made now."""
        return psycopg.pq.PGconn.ping(self.dsn.encode()) == psycopg.pq.Ping.OK

    def connect(self) -> psycopg.Connection:
        """An autocommit connection of the superuser."""
        return psycopg.connect(self.dsn, autocommit=True, application_name="tests")

    def log(self) -> str:
        return self._cluster.log_path.read_text("utf-8", "replace")

    def remove(self) -> None:
        """Stop it and delete its directory."""
        with contextlib.suppress(ProcessLookupError):
            self.thaw()
        self.stop("immediate")
        shutil.rmtree(self._cluster.root)

    def _stop_postmaster(self, pid: int) -> None:
        """From then on it starts no process that would be missed."""
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: self._states(pid)[pid] == "T", "the postmaster stops")

    def _signal_all(self, number: signal.Signals) -> None:
        if pid := self.pid:
            os.kill(pid, number)  # the first: a stopped postmaster starts no other process
            for child in self._children(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, number)

    @classmethod
    def _children(cls, pid: int) -> list[int]:
        return [child for child in cls._states(pid) if child != pid]

    @staticmethod
    def _states(pid: int) -> dict[int, str]:
        """The state of a process and of its children, as ps tells it: T is stopped."""
        table = subprocess.run(
            ["ps", "-A", "-o", "pid=,ppid=,state="], capture_output=True, text=True, check=True
        ).stdout
        rows = [line.split() for line in table.splitlines()]
        return {int(each): state[0] for each, parent, state in rows if str(pid) in (each, parent)}
