"""Adapters pass the tests of the projects they adapt to.

Each suite of `suites/` runs in a process of its own, with pytest settings of its own. Those of Django
come with its source distribution, those of dogpile.cache and LangChain with what is installed. Of
cachelib, py-key-value, limits, Flask and Starlette they stand in the repository only: they run after
`make upstream`, or where PGKV_UPSTREAM names a folder with checkouts of these.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from tests.servers import Server, UserServer, installed

SUITES = Path(__file__).with_name("suites")
ROOT = SUITES.parents[2]
UPSTREAM = Path(os.environ.get("PGKV_UPSTREAM") or ROOT / ".servers" / "upstream")
NEWEST = "dsn" if os.environ.get("PGKV_TEST_DSN") else max(installed(), default=None)
pytestmark = [
    pytest.mark.parametrize("server", [pytest.param(NEWEST, id=f"{NEWEST}")], indirect=True),
    pytest.mark.skipif(NEWEST is None, reason="no PostgreSQL here; set PGKV_TEST_DSN"),
]


def needs(project: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not (UPSTREAM / project).exists(), reason=f"no checkout of {project} here: make upstream"
    )


@pytest.fixture
def suite_dsn(server: Server | UserServer) -> Iterator[str]:
    """A database of the suite's own."""
    name = f"suite_{secrets.token_hex(6)}"
    with psycopg.connect(server.dsn, autocommit=True) as conn:
        conn.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        yield make_conninfo(server.dsn, dbname=name)
        conn.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def run(dsn: str, *command: str | Path, cwd: Path = ROOT, path: str = "") -> str:
    """Run a suite in its own process; return what it printed."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={
            **os.environ,
            "PGKV_SUITE_DSN": dsn,
            "PGKV_UPSTREAM": str(UPSTREAM),
            "PYTHONPATH": path,
        },
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-8000:]
    return output


def passed(dsn: str, *arguments: str | Path, cwd: Path = ROOT, path: str = "") -> int:
    """Run a suite of pytest; return how many tests passed."""
    options = ("-P", "-m", "pytest", "-c", SUITES / "pytest.ini")
    [count] = re.findall(r"(\d+) passed", run(dsn, *options, *arguments, cwd=cwd, path=path))
    return int(count)


def test_pgkv_in_a_django_project(suite_dsn: str) -> None:
    assert passed(suite_dsn, SUITES / "django_suite.py") >= 29


def test_dogpiles_backend_serializer_and_mutex(suite_dsn: str) -> None:
    assert passed(suite_dsn, SUITES / "dogpile_suite.py") == 31


def test_langchains_byte_stores(suite_dsn: str) -> None:
    assert passed(suite_dsn, SUITES / "langchain_suite.py") == 24


def test_other_adapters(suite_dsn: str) -> None:
    assert passed(suite_dsn, SUITES / "adapters_suite.py") >= 31


def django_tests(where: Path) -> Path:
    """The folder `tests` of the source distribution of the Django that is installed."""
    command = ["download", "--quiet", "--no-deps", "--no-binary=:all:", "--no-build-isolation"]
    subprocess.run(
        [sys.executable, "-m", "pip", *command, "--dest", where, f"django=={version('django')}"],
        check=True,
        timeout=400,
    )
    [packed] = where.glob("*.tar.gz")
    with tarfile.open(packed) as tar:
        tar.extractall(where, filter="data")
    [tests] = where.glob("*/tests")
    return tests


@pytest.mark.packaging
@pytest.mark.timeout(1000)  # a download, and then its tests
def test_djangos_own(suite_dsn: str, tmp_path: Path) -> None:
    """55 tests of its caches and 65 of its sessions."""
    tests = django_tests(tmp_path)
    for app, name in (("cache", "django_cache.py"), ("sessions_tests", "django_sessions.py")):
        shutil.copy(SUITES / name, tests / app / "test_pgkv.py")
    modules = ("cache.test_pgkv", "sessions_tests.test_pgkv")
    output = run(suite_dsn, "runtests.py", "--parallel=1", *modules, cwd=tests)
    assert "Ran 120 tests" in output


@needs("cachelib")
def test_cachelibs_own(suite_dsn: str) -> None:
    assert passed(suite_dsn, SUITES / "cachelib_suite.py") >= 13


@needs("py-key-value")
def test_py_key_values_own(suite_dsn: str) -> None:
    assert passed(suite_dsn, SUITES / "keyvalue_suite.py") >= 132


@needs("limits")
def test_limits_own(suite_dsn: str) -> None:
    """Its strategies, one by one and with many threads or tasks at once, and its storages; blocking and
    async."""
    names = ("test_strategy", "aio/test_strategy", "test_storage", "aio/test_storage")
    modules = [f"tests/{name}.py" for name in (*names, "integration/test_concurrency")]
    options = ("-p", "limits_plugin", "-o", "python_files=test_*.py", "--rootdir=.")
    assert passed(suite_dsn, *options, *modules, cwd=UPSTREAM / "limits", path=str(SUITES)) >= 113


# What Flask's tests ask of its own session that this one does otherwise, or that is not about sessions.
FLASK_LEFT_OUT = {
    "test_session_path": "SESSION_COOKIE_* are not read: their defaults are not safe",
    "test_session_using_application_root": "SESSION_COOKIE_* are not read",
    "test_session_using_session_settings": "SESSION_COOKIE_* are not read",
    "test_session_using_samesite_attribute": "SESSION_COOKIE_* are not read",
    "test_missing_session": "no SECRET_KEY is needed",
    "test_session_secret_key_fallbacks": "no SECRET_KEY is needed",
    "test_session_transactions_no_null_sessions": "no SECRET_KEY is needed",
    "test_session_expiration": "the cookie has Max-Age in place of Expires",
    "test_session_cookie_setting": "the cookie is sent again when a third of its life has gone",
    "test_session_refresh_vary": "an answer that reads and writes no session depends on no cookie",
    "test_bad_environ_raises_bad_request": "fails with Flask's own session too, with this Werkzeug",
}


@needs("flask")
def test_flasks_own(suite_dsn: str) -> None:
    """All of Flask's tests but those of its command."""
    left_out = f"not ({' or '.join(FLASK_LEFT_OUT)})"
    options = ("-p", "flask_plugin", "-o", "python_files=test_*.py", "--rootdir=.", "-k", left_out)
    where = UPSTREAM / "flask"
    done = passed(
        suite_dsn, *options, "tests", "--ignore=tests/test_cli.py", cwd=where, path=str(SUITES)
    )
    assert done >= 419


STARLETTE_LEFT_OUT = {
    "test_session_expires": "max_age=-1 is refused: a cookie that is over at once is a mistake",
    "test_session_cookie_subpath": "it looks for path=; the cookie has Path=",
    "test_domain_cookie": "it looks for domain=; the cookie has Domain=",
    "trio": "pgkv runs on asyncio",
}


@needs("starlette")
def test_starlettes_own(suite_dsn: str) -> None:
    """Its tests of the session middleware."""
    left_out = f"not ({' or '.join(STARLETTE_LEFT_OUT)})"
    plugins = ("-p", "starlette_plugin", "-p", "anyio")
    options = (*plugins, "-o", "python_files=test_*.py", "--rootdir=.", "-k", left_out)
    where = UPSTREAM / "starlette"
    file = "tests/middleware/test_session.py"
    assert passed(suite_dsn, *options, file, cwd=where, path=str(SUITES)) == 4
