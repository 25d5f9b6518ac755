"""What the fault tests share: which server, who is connected to it, and storms of calls."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from pgkv._embedded.cluster import Cluster
from pgkv.errors import PgkvError
from tests import servers

_one = "dsn" if os.environ.get("PGKV_TEST_DSN") else max(servers.installed(), default="dsn")
# For faults to which the server's version is all one: the suite is long enough.
newest = pytest.mark.parametrize(
    "server",
    [pytest.param(_one, id="dsn" if _one == "dsn" else f"pg{_one}")],
    indirect=True,
    scope="session",
)


class Witness:
    """Somebody who looks at the server, kills backends and holds row locks."""

    def __init__(self, dsn: str) -> None:
        self.name = str(conninfo_to_dict(dsn).get("application_name") or "pgkv")
        self.conn = psycopg.connect(dsn, autocommit=True, application_name="witness")
        self._dsn = dsn

    def backends(self, name: str | None = None) -> list[int]:
        """The process ids of a store's connections."""
        query = "SELECT pid FROM pg_stat_activity WHERE application_name = %s ORDER BY pid"
        return [pid for (pid,) in self.conn.execute(query, [name or self.name])]

    def active(self, name: str | None = None) -> list[str]:
        """What a store's connections are executing now, waiting included."""
        query = (
            "SELECT query FROM pg_stat_activity WHERE application_name = %s AND state = 'active'"
        )
        return [text for (text,) in self.conn.execute(query, [name or self.name])]

    def waiting(self, name: str | None = None) -> int:
        """How many of a store's connections wait for a lock."""
        query = (
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE application_name = %s AND wait_event_type = 'Lock'"
        )
        row = self.conn.execute(query, [name or self.name]).fetchone()
        assert row is not None
        return int(row[0])

    def terminate(self, name: str | None = None) -> int:
        """End a store's connections; returns when they are gone."""
        pids = self.backends(name)
        self.conn.execute("SELECT pg_terminate_backend(pid) FROM unnest(%s::int[]) pid", [pids])
        servers.wait_until(lambda: not set(pids) & set(self.backends(name)), "backends end")
        return len(pids)

    @contextlib.contextmanager
    def lock(self, key: str, table: str = "kv_store") -> Iterator[psycopg.Connection]:
        """Hold the row lock of a key that exists."""
        with psycopg.connect(self._dsn, application_name="witness") as conn:
            rows = conn.execute(f"SELECT 1 FROM {table} WHERE key = %s FOR UPDATE", [key])
            assert rows.fetchone() == (1,)
            yield conn
            conn.rollback()

    def rows(self, where: str = "true", table: str = "kv_store") -> int:
        """How many rows the table has, expired ones too."""
        row = self.conn.execute(f"SELECT count(*) FROM {table} WHERE {where}").fetchone()
        assert row is not None
        return int(row[0])


@dataclass
class Tally:
    """How the calls of a storm ended."""

    done: int = 0
    unknown: int = 0
    refused: int = 0
    errors: list[BaseException] = field(default_factory=list)

    def note(self, error: PgkvError) -> None:
        self.unknown += error.outcome_unknown
        self.refused += not error.outcome_unknown
        self.errors.append(error)


class Crew:
    """Threads whose failures are the test's.

    Used as a context manager: leaving it waits for all and raises the first failure.
    """

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []
        self.results: list[Any] = []

    def start(self, function: Callable[..., Any], *args: Any) -> threading.Thread:
        def run() -> None:
            try:
                self.results.append(function(*args))
            except BaseException as error:
                self._errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def join(self, seconds: float = 300.0) -> None:
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                raise TimeoutError(f"a thread still runs after {seconds:g} s")
        if self._errors:
            raise self._errors[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            self.join()


async def until(
    condition: Callable[[], bool], what: str, seconds: float = servers.PATIENCE
) -> None:
    """wait_until, while the event loop goes on."""
    await asyncio.to_thread(servers.wait_until, condition, what, seconds)


def renewed(lease: Any) -> Callable[[], bool]:
    """Whether the server has given it more time since."""
    until = lease._until
    return lambda: bool(lease._until > until)


def exit_code(pid: int, seconds: float = 120.0) -> int:
    """Wait for a forked child; kill it when it does not end."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"the child did not end within {seconds:g} s")


def one(dsn: str, query: str) -> Any:
    """The only value that a query returns."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        row = conn.execute(query.encode()).fetchone()
    assert row is not None
    return row[0]


class Standby:
    """An asynchronous replica of a test's server."""

    def __init__(self, primary: servers.Server) -> None:
        self._primary = primary
        self._cluster = Cluster.open(servers.new_directory("standby"), primary.binaries)
        account = servers.server_account()
        subprocess.run(
            [
                *(f"{primary.binaries.directory}/pg_basebackup", "--write-recovery-conf"),
                *("--checkpoint=fast", "--dbname", primary.dsn, "--pgdata", self._cluster.pgdata),
            ],
            check=True,
            capture_output=True,
            cwd="/tmp",
            user=account.uid if account else None,
            group=account.gid if account else None,
            extra_groups=[] if account else None,
        )
        self.dsn = self._cluster.start(primary.settings)

    def catch_up(self) -> None:
        """Wait until it has everything that the primary has."""
        written = one(self._primary.dsn, "SELECT pg_current_wal_lsn()::text")
        replayed = f"SELECT pg_last_wal_replay_lsn() >= '{written}'::pg_lsn"
        servers.wait_until(lambda: bool(one(self.dsn, replayed)), "the standby catches up")

    def cut_off(self) -> None:
        """What the primary does from now on does not reach it."""
        self._cluster.stop("fast")

    def promote(self) -> None:
        """Make it the primary."""
        self._cluster.start(self._primary.settings)
        assert one(self.dsn, "SELECT pg_promote()")

    def remove(self) -> None:
        self._cluster.stop("immediate")
