"""A real PgBouncer in front of a test's server."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests import servers

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
needed = pytest.mark.skipif(
    PROGRAM is None, reason="no pgbouncer here (on Debian and Ubuntu: apt install pgbouncer)"
)


@contextlib.contextmanager
def started(dsn: str, *settings: str, connect_query: str = "", **conninfo: str) -> Iterator[str]:
    """Start one in front of the server that `dsn` names; gives the DSN through it.

    `settings` are lines of its configuration, `connect_query` is run on each of its connections to
    the server, and `conninfo` goes into the DSN.
    """
    assert PROGRAM is not None
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
    process = subprocess.Popen([PROGRAM, "-q", str(file)], stderr=subprocess.DEVNULL)
    try:
        through = make_conninfo(
            host=str(directory), port=6432, dbname="db", user="postgres", **conninfo
        )
        servers.wait_until(
            lambda: servers.takes_connections(through), "PgBouncer listens", seconds=10
        )
        yield through
    finally:
        process.kill()
        process.wait()
