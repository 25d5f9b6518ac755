"""`_cluster.py` runs PostgreSQL on one data directory: it makes data, starts, stops.

It knows nothing of users of the server: who may start and stop it, and when, is the business of
`embedded.py`, which is also where the layout of the directory is described. Nothing here runs on
Windows.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import signal
import stat
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from psycopg.conninfo import make_conninfo
from psycopg.pq import PGconn, Ping

from ..errors import ConfigError, StoreUnavailableError
from .binaries import Account, Binaries, account_of, exists, find_binaries, is_root, may_signal, run

if sys.platform != "win32":
    pass

START_TIMEOUT: Final = (
    120.0  # seconds; recovery after a crash replays up to max_wal_size (1 GB) of log
)
STOP_TIMEOUT: Final = 60.0  # seconds; the last checkpoint writes out shared_buffers
LOG_LIMIT: Final = 16 * 1024 * 1024

# Given on the command line, so that each start brings them up to date; `settings` of start() come
# after them.
_SETTINGS: Final[Mapping[str, str]] = {
    "listen_addresses": "",
    "port": "5432",  # names the socket; no port is opened
    "unix_socket_permissions": "0700",
    "shared_buffers": "128MB",
    "max_connections": "200",
    "cluster_name": "pgkv",
    "log_checkpoints": "off",
    "log_error_verbosity": "terse",  # DETAIL lines would quote keys
    "logging_collector": "off",
}
# 103: sun_path on macOS; Linux allows 107.
_SOCKET_PATH_MAX: Final = 103
_NO_PROCESS: Final = b"99999999"  # above every system's largest process id
_PLAIN: Final = re.compile(r"[A-Za-z0-9_./+-]+")


@dataclass(frozen=True, slots=True)
class _Postmaster:
    pid: int
    port: str
    socket_directory: str
    status: str  # "starting", "ready", "stopping"

    @property
    def dsn(self) -> str:
        return make_conninfo(
            host=self.socket_directory, port=self.port, user="postgres", dbname="postgres"
        )

    def ping(self) -> Ping:
        if not self.socket_directory:  # not yet written; libpq would ask some other server
            return Ping.NO_RESPONSE
        return Ping(PGconn.ping(make_conninfo(self.dsn, connect_timeout=5).encode()))


@dataclass(slots=True)
class Cluster:
    """One data directory and the server on it, without a thought for its users. Not part of the
    public API.
    """

    root: Path
    account: Account | None
    binaries: Binaries | None = None  # found at the first start

    @classmethod
    def open(cls, root: str | os.PathLike[str], binaries: Binaries | None = None) -> Cluster:
        """Make the directory where there is none; check that the server's account reaches it."""
        path = Path(root)
        if (path / "PG_VERSION").exists():
            raise ConfigError(
                f"{os.fspath(root)!r} is a PostgreSQL data directory, which pgkv does not take"
                " over: name another path, or start that server and give its DSN"
            )
        account = account_of(path) if is_root() else None
        cluster = cls(path, account, binaries)
        for directory in [path, *path.parents][::-1]:
            if not directory.exists():
                cluster._make_directory(directory)
        info = path.stat()
        if account and info.st_uid == 0 and not any(path.iterdir()):
            # Empty, and named for this: as mkdtemp() makes them, closed to everybody but root.
            os.chown(path, account.uid, account.gid)
        cluster._check_reach()
        return cluster

    @property
    def pgdata(self) -> Path:
        return self.root / "pgdata"

    @property
    def log_path(self) -> Path:
        return self.root / "pgkv.log"

    def start(self, settings: Mapping[str, str]) -> str:
        """Start the server unless it runs, wait until it takes connections, return its DSN."""
        deadline = time.monotonic() + START_TIMEOUT
        launched = False
        while True:
            server = self._running()
            # "ready" is not enough: it also stands there while the server recovers from the crash
            # of one of its backends.
            if server and server.status == "ready" and server.ping() == Ping.OK:
                return server.dsn
            if server is None and launched:
                raise ConfigError(
                    f"the embedded server of {str(self.root)!r} ended while it started:"
                    f" {self._log_tail()}"
                )
            if server is None:
                self._prepare(settings)
                self._launch(settings, deadline)
                launched = True
            else:
                self._pause(deadline)

    def stop(self, mode: Literal["fast", "immediate"]) -> None:
        """Stop the server and wait for it, at most STOP_TIMEOUT; after that it goes on stopping by
        itself.
        """
        deadline = time.monotonic() + STOP_TIMEOUT
        if server := self.postmaster():
            with contextlib.suppress(ProcessLookupError):
                os.kill(server.pid, signal.SIGINT if mode == "fast" else signal.SIGQUIT)
            while self.postmaster() and time.monotonic() < deadline:
                time.sleep(0.01)
        with contextlib.suppress(OSError):
            self._short_socket_directory().rmdir()

    def postmaster(self) -> _Postmaster | None:
        """The running server of this directory; None when postmaster.pid is stale or missing."""
        server = self._read_pid_file()
        return server if server and self._runs_here(server.pid) else None

    def _running(self) -> _Postmaster | None:
        """`postmaster()`, or one that is no process of ours and answers all the same.

        That is another container's, on a directory that both have mounted. To start a second one
        would destroy the data.
        """
        server = self._read_pid_file()
        alive = server and (self._runs_here(server.pid) or server.ping() != Ping.NO_RESPONSE)
        return server if alive else None

    def _read_pid_file(self) -> _Postmaster | None:
        try:
            text = (self.pgdata / "postmaster.pid").read_text("utf-8", "surrogateescape")
            lines = text.splitlines() + [""] * 8
            return _Postmaster(int(lines[0]), lines[3], lines[4], lines[7].strip())
        except (FileNotFoundError, ValueError):  # missing; not yet written
            return None

    def _runs_here(self, pid: int) -> bool:
        """Whether pid is a server of this directory. Any process may have a dead one's number."""
        if not exists(pid) or not may_signal(pid):
            return False
        cwd = Path(f"/proc/{pid}/cwd")  # a server's working directory is its data directory
        try:
            return cwd.samefile(self.pgdata)
        except PermissionError:
            return True  # in doubt it runs: a second server would destroy the data
        except OSError:
            # A dead process has no cwd. Without /proc (macOS) the name must do.
            if Path("/proc/self/cwd").exists():
                return False
            return "postgres" in run("/bin/ps", "-o", "comm=", "-p", str(pid)).stdout

    def _prepare(self, settings: Mapping[str, str]) -> None:
        """Choose binaries; initdb where there is no data."""
        try:
            wanted = int((self.pgdata / "PG_VERSION").read_text().strip())
        except FileNotFoundError:
            wanted = None
        if self.binaries is None or (wanted and self.binaries.major != wanted):
            self.binaries = find_binaries(self.account, wanted, self.root)
        if wanted is None:
            # Under another name first: a killed initdb leaves nothing that looks like data.
            new = self.root / "pgdata.new"
            if new.exists():
                shutil.rmtree(new)
            self._make_directory(new)
            # Data that a crash of the machine may lose need not reach the disk now.
            no_sync = ["--no-sync"] if settings.get("fsync") == "off" else []
            done = run(
                f"{self.binaries.directory}/initdb", f"--pgdata={new}", "--username=postgres",
                "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-instructions", *no_sync,
                account=self.account,
            )  # fmt: skip
            if done.returncode:
                raise ConfigError(
                    f"initdb could not make {str(self.pgdata)!r}: {done.stderr.strip()}"
                )
            new.rename(self.pgdata)
        self._disarm_stale_locks()

    def _disarm_stale_locks(self) -> None:
        """PostgreSQL does not start while lock files that a crash left name a living process.

        That may be any process by now, or the dead server, where nobody has reaped it.
        """
        with contextlib.suppress(FileNotFoundError):
            (self._socket_directory() / ".s.PGSQL.5432.lock").unlink()
        stale = self._read_pid_file()
        if stale and may_signal(stale.pid):
            # Its other lines must stay: from them PostgreSQL knows the shared memory that backends
            # of the dead server may still be using.
            with (self.pgdata / "postmaster.pid").open("r+b") as file:
                rest = file.read().partition(b"\n")[2]
                file.seek(0)
                file.write(_NO_PROCESS + b"\n" + rest)
                file.truncate()

    def _launch(self, settings: Mapping[str, str], deadline: float) -> None:
        assert self.binaries is not None
        options = {
            **_SETTINGS,
            "unix_socket_directories": str(self._socket_directory()),
            **settings,
        }
        command = [f"{self.binaries.directory}/postgres", "-D", os.fspath(self.pgdata)]
        for name, value in options.items():
            command += ["-c", f"{name}={value}"]
        with contextlib.suppress(FileNotFoundError):
            if self.log_path.stat().st_size > LOG_LIMIT:
                self.log_path.replace(self.root / "pgkv.log.1")
        log = os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        try:
            if self.account:
                os.fchown(log, self.account.uid, self.account.gid)
            while True:
                begin = os.fstat(log).st_size
                # Through a shell that leaves it behind, so that it is not our child to be reaped.
                leave_behind = ("/bin/sh", "-c", '"$@" >&2 & echo $!', "sh")
                pid = int(run(*leave_behind, *command, account=self.account, log=log).stdout)
                try:
                    while exists(pid):
                        server = self.postmaster()
                        if server and server.pid == pid:
                            return
                        self._pause(deadline)
                except BaseException:
                    # Before it has a postmaster.pid the next start would not know of it.
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGTERM)
                    raise
                tail = self._log_tail(begin)
                if "pre-existing shared memory block" not in tail:
                    raise ConfigError(
                        f"the embedded server of {str(self.root)!r} did not start: {tail}"
                    )
                self._pause(deadline)  # backends that outlived a killed server are about to notice
        finally:
            os.close(log)

    def _pause(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            raise StoreUnavailableError(
                f"the embedded server of {str(self.root)!r} was not ready after"
                f" {START_TIMEOUT:.0f} s: {self._log_tail()}"
            )
        time.sleep(0.01)

    def _log_tail(self, begin: int = 0) -> str:
        try:
            with self.log_path.open("rb") as log:
                log.seek(max(begin, self.log_path.stat().st_size - 2000))
                return (
                    f"{self.log_path} ends with:\n{log.read().decode('utf-8', 'replace').strip()}"
                )
        except OSError as exc:
            return f"{self.log_path} cannot be read: {exc.strerror}"

    def _short_socket_directory(self) -> Path:
        uid = self.account.uid if self.account else os.getuid()
        name = hashlib.sha256(os.fsencode(self.root)).hexdigest()[:16]
        return Path(f"/tmp/pgkv-{uid}-{name}")  # noqa: S108 - _socket_directory checks whose it is

    def _socket_directory(self) -> Path:
        """The data directory, or one in /tmp where its path is too long, or has characters that
        libpq would interpret.
        """
        path = os.fspath(self.pgdata)
        if _PLAIN.fullmatch(path) and len(path) + len("/.s.PGSQL.5432") <= _SOCKET_PATH_MAX:
            return self.pgdata
        # The same name each time, so that crashes leave one at most. Anybody may make names in
        # /tmp: hence the check.
        short = self._short_socket_directory()
        self._make_directory(short)
        info = short.lstat()
        owner = self.account.uid if self.account else os.getuid()
        if (
            not stat.S_ISDIR(info.st_mode)
            or info.st_uid != owner
            or stat.S_IMODE(info.st_mode) != 0o700
        ):
            raise ConfigError(
                f"{short} must be a directory of mode 0700 of uid {owner}: somebody else made it;"
                " remove it"
            )
        return short

    def _make_directory(self, path: Path) -> None:
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            return
        if self.account:
            os.chown(path, self.account.uid, self.account.gid)

    def _check_reach(self) -> None:
        if self.account is None:
            return
        script = 'for d; do [ -x "$d" ] || { printf %s "$d"; exit 1; }; done'
        way = map(os.fspath, [self.root, *self.root.parents][::-1])
        if closed := run("/bin/sh", "-c", script, "sh", *way, account=self.account).stdout:
            raise ConfigError(
                f"PostgreSQL does not run as root, and the account {self.account.name!r} that it"
                f" would run as cannot enter {closed!r}: choose a path that it can reach, such as"
                " one under /var/lib, or run as another user"
            )
