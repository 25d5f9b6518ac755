"""`directory.py` opens files and directories that another account may replace at any moment.

Root runs servers for other accounts, in directories that those accounts own. So a path is walked step
by step, each directory opened relative to the one before and without following symbolic links, and
what was opened is checked, never a name. Nothing outside is then written or given away.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ..errors import ConfigError
from .binaries import Account, is_root

_DIRECTORY = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)
_FILE = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # a FIFO must not block
_LINKS_MAX = 40


def resolve(name: str) -> str:
    """Return the absolute path without symbolic links.

    For root only links that root made are followed: those of another account could lead anywhere.

    Raises:
        ConfigError: another account's link is on the path.
    """
    if not is_root():
        return os.path.realpath(name)
    parts = os.path.join(os.getcwd(), name).split("/")[::-1]  # noqa: PTH109,PTH118  # not normalised
    path, links = "/", 0
    while parts:
        part = parts.pop()
        if part in ("", "."):
            continue
        if part == "..":
            path = os.path.dirname(path)  # noqa: PTH120
            continue
        step = os.path.join(path, part)  # noqa: PTH118
        target = _target_of(step)
        if target is None:
            path = step
            continue
        links += 1
        if links > _LINKS_MAX:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), step)
        parts += target.split("/")[::-1]
        if target.startswith("/"):
            path = "/"
    return path


def _target_of(step: str) -> str | None:
    """Return where a link of root's leads; None if it is no link, or does not exist."""
    try:
        before = os.lstat(step)
        if not stat.S_ISLNK(before.st_mode):
            return None
        target = os.readlink(step)  # noqa: PTH115  # a str is wanted
        after = os.lstat(step)
    except FileNotFoundError:
        return None
    same = (before.st_ino, before.st_ctime_ns) == (after.st_ino, after.st_ctime_ns)
    if before.st_uid or not same:
        raise ConfigError(
            f"{step!r} is a symbolic link of another account, which root does not follow: name the"
            " directory itself"
        )
    return target


@contextlib.contextmanager
def opened(path: Path, *, make_for: Account | None = None, make: bool = False) -> Iterator[int]:
    """Open a directory, given by a path without symbolic links; a descriptor of it.

    Args:
        path: absolute, as `resolve` returns it.
        make_for: the account that gets the directories that are made; None for our own.
        make: make the directories that do not exist.
    """
    if not is_root():
        for each in [path, *path.parents][::-1] if make else ():
            if not each.exists():
                with contextlib.suppress(FileExistsError):
                    each.mkdir(mode=0o700)
        fd = os.open(path, _DIRECTORY)
    else:
        fd = os.open("/", _DIRECTORY)
        try:
            for part in path.parts[1:]:
                if make:
                    make_directory(fd, part, make_for)
                following = _open_directory(fd, part)
                os.close(fd)
                fd = following
        except BaseException:
            os.close(fd)
            raise
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def opened_below(directory: int, name: str) -> Iterator[int]:
    fd = _open_directory(directory, name)
    try:
        yield fd
    finally:
        os.close(fd)


def _open_directory(directory: int, name: str) -> int:
    try:
        return os.open(name, _DIRECTORY, dir_fd=directory)
    except OSError as exc:
        raise _explained(exc, directory, name) from exc


def make_directory(directory: int, name: str, account: Account | None) -> None:
    """Make a directory of mode 0700 within an open one, for the account; leave one that exists."""
    try:
        os.mkdir(name, 0o700, dir_fd=directory)
    except FileExistsError:
        return
    with opened_below(directory, name) as fd:
        give(fd, account)


def give(fd: int, account: Account | None) -> None:
    """Give an open directory of root's to the account, if it is empty."""
    if account and os.fstat(fd).st_uid == 0 and not os.listdir(fd):
        os.fchown(fd, account.uid, account.gid)


def open_file(directory: int, name: str, flags: int, account: Account | None) -> int:
    """Open a regular file within an open directory. With O_CREAT a new one is given to the account.

    Raises:
        ConfigError: it is a link, not a regular file, or another account's.
    """
    if flags & os.O_CREAT:
        with contextlib.suppress(FileExistsError):
            fd = os.open(name, flags | os.O_EXCL | _FILE, 0o600, dir_fd=directory)
            if account:
                os.fchown(fd, account.uid, account.gid)
            return fd
    try:
        fd = os.open(name, flags & ~os.O_CREAT | _FILE, dir_fd=directory)
    except OSError as exc:
        raise _explained(exc, directory, name) from exc
    info = os.fstat(fd)
    # A file of root's with one name is nowhere else. An empty one was left by a start that was killed.
    is_roots = info.st_uid == 0 and info.st_nlink == 1
    is_ours = account is None or info.st_uid == account.uid or is_roots
    if account and is_roots and info.st_size == 0:
        os.fchown(fd, account.uid, account.gid)
    if not stat.S_ISREG(info.st_mode) or not is_ours:
        os.close(fd)
        owner = "" if account is None else f" of the account {account.name!r}"
        raise ConfigError(
            f"{name!r} in the directory of an embedded server is not a regular file{owner}: remove it"
        )
    return fd


def _explained(exc: OSError, directory: int, name: str) -> OSError | ConfigError:
    """An error that says so, if the name is a symbolic link."""
    with contextlib.suppress(OSError):
        if stat.S_ISLNK(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
            return ConfigError(
                f"{name!r} in the directory of an embedded server is a symbolic link: pgkv follows"
                " none there; put the whole directory elsewhere instead"
            )
    return exc
