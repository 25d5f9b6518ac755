"""Fixtures of the fault tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.support import Witness


@pytest.fixture
def witness(dsn: str) -> Iterator[Witness]:
    """Looks at the server from the test's own schema."""
    seen = Witness(dsn)
    yield seen
    seen.conn.close()
