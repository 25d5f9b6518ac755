"""The fixtures themselves: what every other test here takes for granted."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from pgkv.testing import ServerClock
from tests.servers import Server

TIMES = "SELECT extract(epoch FROM clock_timestamp()), extract(epoch FROM statement_timestamp())"


def _times(conn: psycopg.Connection) -> tuple[float, float]:
    row = conn.execute(TIMES).fetchone()
    assert row is not None
    return float(row[0]), float(row[1])


def test_clock_moves_every_connection_at_once(dsn: str, clock: ServerClock) -> None:
    """A move is seen by the next statement of every connection, prepared or not, inside a frozen
    snapshot too.
    """
    with (
        psycopg.connect(dsn, autocommit=True, prepare_threshold=0) as one,
        psycopg.connect(dsn) as two,
    ):
        two.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        before = _times(one), _times(two)
        clock.advance(3600)
        after = _times(one), _times(two)
        for early, late in zip(before, after, strict=True):
            assert late[0] - early[0] == pytest.approx(3600, abs=30)
            assert late[1] - early[1] == pytest.approx(3600, abs=30)
        clock.advance(-1800)
        assert clock.offset == 1800.0
        clock.set_offset(-7200)
        assert _times(one)[0] - before[0][0] == pytest.approx(-7200, abs=30)
        assert clock.now().timestamp() - _times(one)[0] == pytest.approx(0, abs=30)


def test_real_clock_without_the_fixture(dsn: str) -> None:
    """A test that does not ask for the clock runs on PostgreSQL's own functions."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        row = conn.execute("SELECT 'clock_timestamp'::regproc::oid < 16384").fetchone()
        assert row == (True,)


def test_tables_go_into_the_schema_of_the_test(dsn: str) -> None:
    """An unqualified CREATE TABLE lands in a schema that is the test's alone."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("CREATE TABLE here (a int)")
        row = conn.execute(
            "SELECT 'here'::regclass::oid::regclass::text, current_schema() LIKE 't\\_%'"
        ).fetchone()
        assert row == ("here", True)


def test_clock_with_a_schema_of_its_own(dsn: str) -> None:
    """Without a schema's name ServerClock makes one and drops it, tables included."""
    with ServerClock(dsn) as clock, psycopg.connect(clock.dsn, autocommit=True) as conn:
        conn.execute("CREATE TABLE t (a int)")
        clock.advance(10)
        assert conn.execute("SELECT current_schema()").fetchone() == (clock.schema,)
    with psycopg.connect(dsn) as conn:
        assert conn.execute("SELECT to_regnamespace(%s)", [clock.schema]).fetchone() == (None,)


def test_a_server_to_break(make_server: Callable[..., Server]) -> None:
    """A server of the test's own can be killed, frozen and started again; only logged tables
    survive a kill.
    """
    server = make_server(settings={"work_mem": "5MB"})
    with server.connect() as conn:
        assert conn.execute("SHOW work_mem").fetchone() == ("5MB",)
        conn.execute("CREATE TABLE logged AS SELECT 1 AS a")
        conn.execute("CREATE UNLOGGED TABLE unlogged AS SELECT 1 AS a")
    count = "SELECT (SELECT count(*) FROM logged), (SELECT count(*) FROM unlogged)"

    server.restart()
    with server.connect() as conn:
        assert conn.execute(count).fetchone() == (1, 1)
        server.freeze()
        conn.pgconn.send_query(b"SELECT 1")
        conn.pgconn.flush()
        assert conn.pgconn.is_busy()
        server.thaw()
        while conn.pgconn.get_result():
            pass
        server.kill_backend(conn.info.backend_pid)
    with server.connect() as conn:
        assert conn.execute(count).fetchone() == (1, 0)
    server.kill()
    assert not server.accepts()
    server.start()
    with server.connect() as conn:
        assert conn.execute(count).fetchone() == (1, 0)


USER_TESTS = """
import sys

def test_nothing_is_imported():
    assert "psycopg" not in sys.modules and "pgkv.store" not in sys.modules

def test_expiry(pgkv_store, pgkv_clock):
    pgkv_store.set("k", "v", ttl=60)
    pgkv_clock.advance(61)
    assert pgkv_store.get("k") is None
    pgkv_store.set("left", "v")

def test_another(pgkv_store):
    assert pgkv_store.keys() == []
"""


def test_fixtures_for_users(dsn: str, tmp_path: Path) -> None:
    """The fixtures that pgkv brings give each test an empty store and a clock; a suite that uses
    none of them imports nothing."""
    (tmp_path / "test_user.py").write_text(USER_TESTS)
    options = ["-q", "-p", "no:cacheprovider", "-p", "pgkv._pytest", "-c", os.devnull]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--rootdir", ".", "test_user.py"],
        cwd=tmp_path,
        env=os.environ | {"PGKV_TEST_DSN": dsn, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "3 passed" in done.stdout, done.stdout + done.stderr
