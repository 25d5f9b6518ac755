"""Fixtures of the fault tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pgkv.patterns._runtime import lease
from tests.faults.support import Standby, Witness
from tests.servers import Server, UserServer


@pytest.fixture
def witness(dsn: str) -> Iterator[Witness]:
    """Looks at the server from the test's own schema."""
    seen = Witness(dsn)
    yield seen
    seen.conn.close()


@pytest.fixture
def renewed_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases are renewed after a moment, and again after a failure, long before they end."""
    monkeypatch.setattr(lease, "RENEW_SHARE", 0.01)
    monkeypatch.setattr(lease, "RETRY_MAX", 0.2)


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


@pytest.fixture
def pair(make_server: Callable[..., Server]) -> Iterator[tuple[Server, Standby, str]]:
    """A server, its replica, and a DSN that finds whichever of them takes writes."""
    primary = make_server()
    standby = Standby(primary)
    places = [conninfo_to_dict(dsn) for dsn in (primary.dsn, standby.dsn)]
    yield (
        primary,
        standby,
        make_conninfo(
            host=",".join(str(place["host"]) for place in places),
            port=",".join(str(place["port"]) for place in places),
            user="postgres",
            dbname="postgres",
            target_session_attrs="read-write",
        ),
    )
    standby.remove()
