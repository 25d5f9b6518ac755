"""A real PgBouncer in front of a test's server: one that is started, or that of PGKV_TEST_POOLER_DSN."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests import servers

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
FETCHED = Path(__file__).parents[1] / ".servers" / "pgbouncer.sh"  # by `make servers`
# In front of the server of PGKV_TEST_DSN, in transaction mode, with the same role, which is one of its
# admin_users. Tests set the role's search_path: one process runs them.
FOREIGN = os.environ.get("PGKV_TEST_POOLER_DSN", "")
needed = pytest.mark.skipif(
    PROGRAM is None and not FOREIGN,
    reason="no pgbouncer here (on Debian and Ubuntu: apt install pgbouncer)",
)


@cache
def _version(program: str) -> tuple[int, ...]:
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"PgBouncer (\d+)\.(\d+)", said.stdout)
    return tuple(map(int, found.groups())) if found else (0, 0)


@cache
def programs() -> dict[str, str]:
    """What is here, by whether it can keep prepared statements: "older" and "newer"."""
    if FOREIGN:
        return {"newer": ""}
    here = [*([str(FETCHED)] if FETCHED.exists() else []), *([PROGRAM] if PROGRAM else [])]
    return {"newer" if _version(each) >= (1, 21) else "older": each for each in here}


newer_needed = pytest.mark.skipif(
    FOREIGN != "" or "newer" not in programs(),
    reason="no PgBouncer 1.21 or newer here: make servers",
)


@contextlib.contextmanager
def started(
    dsn: str, *settings: str, program: str = "", connect_query: str = "", **conninfo: str
) -> Iterator[str]:
    """Start one in front of the server that `dsn` names; gives the DSN through it. `program` is
    "older" or "newer", where it is not all one.

    `settings` are lines of its configuration, `connect_query` is run on each of its connections to
    the server, and `conninfo` goes into the DSN.
    """
    path = programs()[program] if program else PROGRAM
    assert path is not None
    directory = servers.new_directory("pgbouncer")
    to = conninfo_to_dict(dsn)
    account = servers.server_account()
    file = directory / "pgbouncer.ini"
    query = f" connect_query='{connect_query}'" if connect_query else ""
    lines = [
        "[databases]",
        f"db = host={to['host']} port={to['port']} dbname={to['dbname']} user={to['user']}{query}",
        "[pgbouncer]",
        "listen_addr =",
        "listen_port = 6432",
        f"unix_socket_dir = {directory}",
        "auth_type = any",
        f"logfile = {directory}/log",
        *settings,
        *([f"user = {account.name}"] if account else []),
    ]
    file.write_text("\n".join(lines) + "\n")
    file.chmod(0o644)
    process = subprocess.Popen([path, "-q", str(file)], stderr=subprocess.DEVNULL)
    try:
        through = make_conninfo(
            host=str(directory), port=6432, dbname="db", user="postgres", **conninfo
        )
        servers.wait_until(lambda: servers.takes_connections(through), "PgBouncer listens")
        yield through
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def borrowed(dsn: str, schema: str) -> Iterator[str]:
    """The one of PGKV_TEST_POOLER_DSN, whose connections to the server work in that schema."""
    console = make_conninfo(FOREIGN, dbname="pgbouncer")
    database = conninfo_to_dict(FOREIGN)["dbname"]
    with (
        psycopg.connect(dsn, autocommit=True, application_name="tests") as conn,
        psycopg.connect(console, autocommit=True) as admin,
    ):
        conn.execute(
            sql.SQL("ALTER ROLE CURRENT_USER SET search_path = {}, pg_catalog").format(
                sql.Identifier(schema)
            )
        )
        try:
            yield make_conninfo(FOREIGN, application_name=schema)
        finally:
            conn.execute("ALTER ROLE CURRENT_USER RESET search_path")
            for command in ("KILL", "RESUME"):  # connections with the old setting end
                admin.execute(f"{command} {database}".encode())
