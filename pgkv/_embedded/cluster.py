"""`cluster.py` runs PostgreSQL on one data directory: it makes data, starts, stops.

It knows nothing of the users of the server: `embedded.py` decides when it starts and stops, and
describes the layout of the directory. Nothing here runs on Windows.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import signal
import socket
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from psycopg.conninfo import make_conninfo
from psycopg.pq import Conninfo, Ping

from ..errors import ConfigError, StoreUnavailableError
from .binaries import (
    Account,
    Binaries,
    account_of,
    exists,
    find_binaries,
    is_root,
    may_be_server,
    run,
)
from .directory import give, make_directory, open_file, opened, opened_below

START_TIMEOUT: Final = 120.0  # seconds; recovery replays up to max_wal_size (1 GB) of log
STOP_TIMEOUT: Final = 60.0  # seconds; the last checkpoint writes out shared_buffers
LOG_LIMIT: Final = 16 * 1024 * 1024

# Given on the command line, so that each start brings them up to date; `settings` of start() come
# after them.
_SETTINGS: Final[Mapping[str, str]] = {
    "listen_addresses": "",
    "port": "5432",  # names the socket; no port is opened
    "unix_socket_permissions": "0700",
    "max_connections": "200",
    # Keys that are written once and expire leave dead rows as fast as a store runs.
    "autovacuum_naptime": "5s",
    "cluster_name": "pgkv",
    "log_checkpoints": "off",
    "log_error_verbosity": "terse",  # DETAIL lines would quote keys
    "logging_collector": "off",
}
# 103: sun_path on macOS; Linux allows 107.
_SOCKET_PATH_MAX: Final = 103
_NO_PROCESS: Final = b"99999999"  # above every system's largest process id
_BUFFERS_MIN, _BUFFERS_MAX, _BUFFERS_SHARE = 128, 4096, 0.25  # megabytes, and of the memory
_CGROUP: Final = Path("/sys/fs/cgroup/memory.max")  # of a container
_PLAIN: Final = re.compile(r"[A-Za-z0-9_./+-]+")
# What the environment or a service file of libpq may say of another server, and what holds here.
_OWN_PARAMETERS: Final[Mapping[str, str]] = {
    "hostaddr": "",
    "sslmode": "disable",
    "sslrootcert": "",
    "sslnegotiation": "postgres",
    "sslcertmode": "allow",
    "channel_binding": "disable",
    "gssencmode": "disable",
    "requirepeer": "",
    "require_auth": "",
    "target_session_attrs": "any",
    "load_balance_hosts": "disable",
    "min_protocol_version": "3.0",
}
_PING_TIMEOUT: Final = 5.0  # seconds
_STARTUP: Final = b"\0\x03\0\0user\0postgres\0database\0postgres\0\0"  # protocol 3.0
_STARTING_UP: Final = b"C57P03\0"  # the SQLSTATE cannot_connect_now


@dataclass(frozen=True, slots=True)
class _Postmaster:
    pid: int
    port: str
    socket_directory: str
    status: str  # "starting", "ready", "stopping"

    @property
    def dsn(self) -> str:
        """How to connect. Where the environment has parameters of other servers, with our own."""
        variables = {each.keyword.decode(): each.envvar for each in Conninfo.parse(b"")}
        own = {
            keyword: value
            for keyword, value in _OWN_PARAMETERS.items()
            if (variable := variables.get(keyword)) is not None
            and ("PGSERVICE" in os.environ or variable.decode() in os.environ)
        }
        return make_conninfo(
            host=self.socket_directory, port=self.port, user="postgres", dbname="postgres", **own
        )


def ping(server: _Postmaster) -> Ping:
    """Whether it takes connections. libpq's own ping would obey the environment."""
    answer = b""
    try:
        with socket.socket(socket.AF_UNIX) as conn:
            conn.settimeout(_PING_TIMEOUT)
            conn.connect(os.fsencode(f"{server.socket_directory}/.s.PGSQL.{server.port}"))
            conn.sendall((len(_STARTUP) + 4).to_bytes(4) + _STARTUP)
            while not answer.startswith(b"R") and (part := conn.recv(4096)):
                answer += part
    except (OSError, ValueError):  # no server listens there; not yet written
        pass
    if not answer:
        return Ping.NO_RESPONSE
    return Ping.REJECT if _STARTING_UP in answer else Ping.OK


def shared_buffers() -> int:
    """Megabytes: a quarter of the memory of the machine, or of its container. They are used as pages
    are read into them."""
    memory = _BUFFERS_MIN << 20
    with contextlib.suppress(OSError, ValueError):  # unknown here
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit
        memory = min(memory, int(_CGROUP.read_text("ascii")))
    return max(_BUFFERS_MIN, min(_BUFFERS_MAX, int(memory * _BUFFERS_SHARE) >> 20))


@dataclass(slots=True)
class Cluster:
    """One data directory and the server on it, without its users. Not part of the public API."""

    root: Path
    account: Account | None
    binaries: Binaries | None = None  # found at the first start

    @classmethod
    def open(cls, root: str | os.PathLike[str], binaries: Binaries | None = None) -> Cluster:
        """Make the directory where there is none; check that the server's account reaches it."""
        path = Path(root)
        account = _account_for(path) if is_root() else None
        cluster = cls(path, account, binaries)
        with opened(path, make_for=account, make=True) as directory:
            if _exists(directory, "PG_VERSION"):
                raise ConfigError(
                    f"{os.fspath(root)!r} is a PostgreSQL data directory, which pgkv does not take"
                    " over: name another path, or start that server and give its DSN"
                )
            # Root's and empty, and named for this: as mkdtemp() makes it, closed to other accounts.
            give(directory, account)
        cluster._check_reach()
        return cluster

    @property
    def pgdata(self) -> Path:
        return self.root / "pgdata"

    @property
    def log_path(self) -> Path:
        return self.root / "pgkv.log"

    @contextlib.contextmanager
    def _directory(self) -> Iterator[int]:
        """Open the directory; for root, it must still be the account's, or root's."""
        with opened(self.root) as directory:
            owner = os.fstat(directory).st_uid
            if self.account and owner not in (0, self.account.uid):
                raise ConfigError(f"{str(self.root)!r} has a new owner: start again")
            yield directory

    @contextlib.contextmanager
    def _data(self) -> Iterator[int]:
        with self._directory() as directory, opened_below(directory, "pgdata") as data:
            yield data

    def open_file(self, name: str, flags: int) -> int:
        """Open a file of the directory; with O_CREAT make it, for the server's account."""
        with self._directory() as directory:
            return open_file(directory, name, flags, self.account)

    def _read_data(self, name: str) -> str:
        with self._data() as data:
            fd = open_file(data, name, os.O_RDONLY, self.account)
        with os.fdopen(fd, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()

    def start(self, settings: Mapping[str, str]) -> str:
        """Start the server unless it runs, wait until it takes connections, return its DSN. A start
        that fails stops what it started."""
        deadline = time.monotonic() + START_TIMEOUT
        launched = False
        try:
            while True:
                server = self._running()
                # "ready" is not enough: it also stands there while the server recovers from the
                # crash of one of its backends.
                if server and server.status == "ready" and ping(server) == Ping.OK:
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
        except BaseException:
            if launched:
                self.stop("immediate")
            raise

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
        alive = server and (self._runs_here(server.pid) or ping(server) != Ping.NO_RESPONSE)
        return server if alive else None

    def _read_pid_file(self) -> _Postmaster | None:
        try:
            lines = self._read_data("postmaster.pid").splitlines() + [""] * 8
            return _Postmaster(int(lines[0]), lines[3], lines[4], lines[7].strip())
        except ConfigError:
            raise  # a ValueError too
        except (FileNotFoundError, ValueError):  # missing; not yet written
            return None

    def _runs_here(self, pid: int) -> bool:
        """Whether pid is a server of this directory. Any process may have a dead one's number."""
        if not exists(pid) or not may_be_server(pid, self.account):
            return False
        try:
            with self._data() as data:  # a server's working directory is its data directory
                return os.path.samestat(Path(f"/proc/{pid}/cwd").stat(), os.fstat(data))
        except PermissionError:
            return True  # in doubt it runs: a second server would destroy the data
        except OSError:
            # A dead process has no cwd. Without /proc (macOS) the name must do.
            if Path("/proc/self/cwd").exists():
                return False
            return "postgres" in run("/bin/ps", "-o", "comm=", "-p", str(pid)).stdout

    def _prepare(self, settings: Mapping[str, str]) -> None:
        try:
            wanted = int(self._read_data("PG_VERSION").strip())
        except FileNotFoundError:
            wanted = None
        if self.binaries is None or (wanted and self.binaries.major != wanted):
            self.binaries = find_binaries(self.account, wanted, self.root)
        if wanted is None:
            # Under another name first: a killed initdb leaves nothing that looks like data.
            new = self.root / "pgdata.new"
            with self._directory() as directory:
                if _exists(directory, new.name):
                    shutil.rmtree(new.name, dir_fd=directory)
                make_directory(directory, new.name, self.account)
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
            with self._directory() as directory:
                os.rename(new.name, "pgdata", src_dir_fd=directory, dst_dir_fd=directory)
        self._disarm_stale_locks()

    def _disarm_stale_locks(self) -> None:
        """PostgreSQL does not start while lock files that a crash left name a living process.

        That may be any process by now, or the dead server, if it was not reaped.
        """
        with self._socket_directory() as sockets, contextlib.suppress(FileNotFoundError):
            os.unlink(".s.PGSQL.5432.lock", dir_fd=sockets)
        stale = self._read_pid_file()
        if stale and may_be_server(stale.pid, self.account):
            # Its other lines must stay: from them PostgreSQL knows the shared memory that backends
            # of the dead server may still be using.
            with self._data() as data:
                fd = open_file(data, "postmaster.pid", os.O_RDWR, self.account)
            with os.fdopen(fd, "r+b") as file:
                rest = file.read().partition(b"\n")[2]
                file.seek(0)
                file.write(_NO_PROCESS + b"\n" + rest)
                file.truncate()

    def _launch(self, settings: Mapping[str, str], deadline: float) -> None:
        assert self.binaries is not None
        options = {
            **_SETTINGS,
            "shared_buffers": f"{shared_buffers()}MB",
            "unix_socket_directories": self._socket_path(),
            **settings,
        }
        command = [f"{self.binaries.directory}/postgres", "-D", os.fspath(self.pgdata)]
        for name, value in options.items():
            command += ["-c", f"{name}={value}"]
        with self._directory() as directory, contextlib.suppress(FileNotFoundError):
            size = os.stat("pgkv.log", dir_fd=directory, follow_symlinks=False).st_size
            if size > LOG_LIMIT:
                os.replace("pgkv.log", "pgkv.log.1", src_dir_fd=directory, dst_dir_fd=directory)
        log = self.open_file("pgkv.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
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
                        if may_be_server(pid, self.account):
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
            with os.fdopen(self.open_file("pgkv.log", os.O_RDONLY), "rb") as log:
                log.seek(max(begin, os.fstat(log.fileno()).st_size - 2000))
                return (
                    f"{self.log_path} ends with:\n{log.read().decode('utf-8', 'replace').strip()}"
                )
        except ConfigError as exc:
            return str(exc)
        except OSError as exc:
            return f"{self.log_path} cannot be read: {exc.strerror}"

    def _short_socket_directory(self) -> Path:
        name = hashlib.sha256(os.fsencode(self.root)).hexdigest()[:16]
        tmp = os.path.realpath("/tmp")  # noqa: S108  # _socket_directory checks the owner
        return Path(tmp, f"pgkv-{self._owner}-{name}")

    @property
    def _owner(self) -> int:
        return self.account.uid if self.account else os.getuid()

    def _socket_path(self) -> str:
        """The data directory, or one in /tmp if its path is too long, or has characters that libpq
        would interpret."""
        path = os.fspath(self.pgdata)
        if _PLAIN.fullmatch(path) and len(path) + len("/.s.PGSQL.5432") <= _SOCKET_PATH_MAX:
            return path
        # The same name each time, so that crashes leave one at most.
        return os.fspath(self._short_socket_directory())

    @contextlib.contextmanager
    def _socket_directory(self) -> Iterator[int]:
        """Open the directory of `_socket_path`. Any account can make names in /tmp, so its owner and
        mode are checked."""
        path = Path(self._socket_path())
        if path == self.pgdata:
            with self._data() as data:
                yield data
            return
        with opened(path.parent) as tmp:
            make_directory(tmp, path.name, self.account)
            info = os.stat(path.name, dir_fd=tmp, follow_symlinks=False)
            if stat.S_ISDIR(info.st_mode):
                with opened_below(tmp, path.name) as sockets:
                    info = os.fstat(sockets)
                    if info.st_uid == self._owner and stat.S_IMODE(info.st_mode) == 0o700:
                        yield sockets
                        return
        raise ConfigError(
            f"{path} must be a directory of mode 0700 of uid {self._owner}: another program made it;"
            " remove it"
        )

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


def _account_for(path: Path) -> Account:
    """For root: the owner of the data, or of the directory, if it is another account."""
    try:
        with opened(path) as directory:
            owners = [os.fstat(directory)]
            with (
                contextlib.suppress(OSError, ConfigError),
                opened_below(directory, "pgdata") as data,
            ):
                owners.insert(0, os.fstat(data))
            return account_of(*owners)
    except FileNotFoundError:
        return account_of()


def _exists(directory: int, name: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        os.stat(name, dir_fd=directory, follow_symlinks=False)
        return True
    return False
