"""The servers: an embedded PostgreSQL with its defaults and, where it is installed, a Redis, both
on unix sockets in a temporary directory."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psycopg
import redis

from pgkv import embedded

START_TIMEOUT = 10.0


@dataclass(frozen=True, slots=True)
class Services:
    """What runs."""

    dsn: str
    redis_socket: str | None
    redis_pid: int | None

    def client_facing(self) -> list[int]:
        """The processes that answer clients now, and the one that later ones descend from: a
        store may open another connection at any time, for a sweep."""
        with psycopg.connect(self.dsn) as conn:
            rows = conn.execute(
                "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend'"
            ).fetchall()
        backends = [pid for (pid,) in rows]
        redis_server = [self.redis_pid] if self.redis_pid else []
        return backends + redis_server + parents(backends)

    def versions(self) -> dict[str, str]:
        """What they are."""
        with psycopg.connect(self.dsn) as conn:
            found = {"PostgreSQL": conn.execute("SHOW server_version").fetchall()[0][0]}
        if self.redis_socket:
            with redis.Redis(unix_socket_path=self.redis_socket) as client:
                found["Redis"] = client.info("server")["redis_version"]
        return found


def parents(pids: list[int]) -> list[int]:
    """The processes that started those; none where there is no /proc."""
    found: set[int] = set()
    for pid in pids:
        with suppress(OSError):  # it has ended
            status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
            found |= {int(line.split()[1]) for line in status.splitlines() if "PPid:" in line}
    return sorted(found)


@contextmanager
def running() -> Iterator[Services]:
    """Start them; stop them at the end."""
    with ExitStack() as stack:
        directory = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="pgkv-bench-"))
        ).resolve()
        directory.chmod(0o755)  # under root the server runs as somebody else
        server = stack.enter_context(embedded.start(directory / "pg"))
        program = shutil.which("redis-server")
        if program is None:
            yield Services(server.dsn, None, None)
            return
        socket = directory / "redis.sock"
        process = _start_redis(program, socket)
        stack.callback(process.wait)
        stack.callback(process.terminate)
        _await_redis(socket)
        yield Services(server.dsn, str(socket), process.pid)


def _start_redis(program: str, socket: Path) -> subprocess.Popen[bytes]:
    # As pgkv's default table: nothing is written to disk.
    settings = {"port": "0", "unixsocket": str(socket), "save": "", "appendonly": "no"}
    arguments = [part for name, value in settings.items() for part in (f"--{name}", value)]
    return subprocess.Popen([program, *arguments], cwd=socket.parent, stdout=subprocess.DEVNULL)


def _await_redis(socket: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    with redis.Redis(unix_socket_path=str(socket)) as client:
        while True:
            try:
                client.ping()
            except redis.ConnectionError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
            else:
                return
