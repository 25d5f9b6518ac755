"""The servers: an embedded PostgreSQL with its defaults and, where they are installed, a Redis and a
memcached, all on unix sockets in a temporary directory."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pymemcache  # type: ignore[import-untyped]  # has no types
import redis
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pgkv import embedded
from tests.benchmarks.placement import server_pids
from tests.benchmarks.relay import relayed

START_TIMEOUT = 60.0
# As pgkv's default table: nothing is written to disk.
REDIS_SETTINGS = {"port": "0", "save": "", "appendonly": "no"}


@dataclass(frozen=True, slots=True)
class Peer:
    """A server beside PostgreSQL."""

    socket: str
    pid: int


@dataclass(frozen=True, slots=True)
class Services:
    """What runs; None for what is not installed."""

    dsn: str
    redis: Peer | None
    memcached: Peer | None

    def pids(self) -> list[int]:
        """Their processes now, with the one that later ones descend from: a store may open another
        connection at any time, for a sweep."""
        peers = [each.pid for each in (self.redis, self.memcached) if each]
        return server_pids(self.dsn) + peers

    @contextmanager
    def behind_a_link(self) -> Iterator[Services]:
        """The same, reached over a relay that makes a round trip last 0.2 ms longer."""
        with tempfile.TemporaryDirectory(prefix="pgkv-link-") as name:
            directory = Path(name)
            parts = conninfo_to_dict(self.dsn)
            socket_name = f".s.PGSQL.{parts['port']}"
            paths = {directory / socket_name: Path(str(parts["host"])) / socket_name}
            near = {}
            for each in (self.redis, self.memcached):
                if each:
                    near[each] = Peer(str(directory / Path(each.socket).name), each.pid)
                    paths[Path(near[each].socket)] = Path(each.socket)
            with relayed(paths):
                yield Services(
                    make_conninfo(self.dsn, host=name),
                    self.redis and near[self.redis],
                    self.memcached and near[self.memcached],
                )

    def versions(self) -> dict[str, str]:
        """What they are."""
        with psycopg.connect(self.dsn) as conn:
            found = {"PostgreSQL": conn.execute("SHOW server_version").fetchall()[0][0]}
        if self.redis:
            with redis.Redis(unix_socket_path=self.redis.socket) as client:
                found["Redis"] = client.info("server")["redis_version"]
        if self.memcached:
            with closing(memcached_client(self.memcached.socket)) as client:
                found["memcached"] = client.version().decode()
        return found


def memcached_client(path: str) -> Any:
    """pymemcache's client, which waits for the answer to a write as everybody else's does."""
    return pymemcache.Client(f"unix:{path}", default_noreply=False)


@contextmanager
def running() -> Iterator[Services]:
    """Start them; stop them at the end."""
    with ExitStack() as stack:
        directory = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="pgkv-bench-"))
        ).resolve()
        directory.chmod(0o755)  # under root the server runs as somebody else
        server = stack.enter_context(embedded.start(directory / "pg"))
        yield Services(
            server.dsn,
            stack.enter_context(_redis(directory / "redis.sock")),
            stack.enter_context(_memcached(directory / "memcached.sock")),
        )


def _redis(path: Path) -> AbstractContextManager[Peer | None]:
    settings = {**REDIS_SETTINGS, "unixsocket": str(path)}
    options = [part for name, value in settings.items() for part in (f"--{name}", value)]
    return peer("redis-server", options, path)


def _memcached(path: Path) -> AbstractContextManager[Peer | None]:
    # Under root it starts only when told as whom to run.
    return peer("memcached", ["-s", str(path), "-u", "root"], path)


@contextmanager
def peer(name: str, options: list[str], path: Path) -> Iterator[Peer | None]:
    """Run a server that listens at `path`; None where there is no such program."""
    program = shutil.which(name)
    if program is None:
        yield None
        return
    process = subprocess.Popen([program, *options], cwd=path.parent, stdout=subprocess.DEVNULL)
    try:
        _await(path)
        yield Peer(str(path), process.pid)
    finally:
        process.terminate()
        process.wait()


def _await(path: Path) -> None:
    """Until somebody listens there."""
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except OSError:
                if time.monotonic() > deadline:
                    raise
            else:
                return
        time.sleep(0.02)
