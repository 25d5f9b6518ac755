"""Fixtures for pytest, which finds this module by its entry point. Each imports what it needs when a
test asks for it, so a suite that uses none of them pays nothing.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .store import Store
    from .testing import ServerClock


@pytest.fixture(scope="session")
def pgkv_server() -> Iterator[str]:
    """The DSN of a PostgreSQL server for tests: ``PGKV_TEST_DSN``, or else an embedded server in a
    temporary directory, which ends with the session."""
    if dsn := os.environ.get("PGKV_TEST_DSN"):
        yield dsn
        return
    from . import embedded

    directory = Path(tempfile.mkdtemp(prefix="pgkv-"))
    directory.chmod(0o711)  # for root the server runs under another account
    try:
        server = embedded.start(directory / "pg", settings={"fsync": "off"})
        yield server.dsn
        server.close()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def pgkv_clock(pgkv_server: str) -> Iterator[ServerClock]:
    """The server's clock, which the test can move, in a schema of the test's own; see
    `pgkv.testing.ServerClock`. Its ``dsn`` is for further stores, also async ones."""
    from .testing import ServerClock

    with ServerClock(pgkv_server) as clock:
        yield clock


@pytest.fixture
def pgkv_store(pgkv_clock: ServerClock) -> Iterator[Store]:
    """An empty store of the test's own, which reads the time from `pgkv_clock`."""
    from .store import Store

    with Store.connect(pgkv_clock.dsn) as store:
        yield store
