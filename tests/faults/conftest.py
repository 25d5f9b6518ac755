"""Fixtures of the fault tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from psycopg.conninfo import make_conninfo

from tests.faults.support import Witness
from tests.servers import Server, UserServer


@pytest.fixture
def witness(dsn: str) -> Iterator[Witness]:
    """Looks at the server from the test's own schema."""
    seen = Witness(dsn)
    yield seen
    seen.conn.close()


@pytest.fixture
def limited(dsn: str, server: Server | UserServer, witness: Witness) -> Iterator[str]:
    """A conninfo of a role that may use the schema, and nothing in it."""
    if isinstance(server, UserServer):
        pytest.skip("makes a role: not on the server of PGKV_TEST_DSN")
    schema = witness.name
    role = f"r_{schema}"
    witness.conn.execute(f"CREATE ROLE {role} LOGIN")
    witness.conn.execute(f"GRANT USAGE ON SCHEMA {schema} TO {role}")
    yield make_conninfo(dsn, user=role)
    witness.conn.execute(f"DROP OWNED BY {role}")
    witness.conn.execute(f"DROP ROLE {role}")
