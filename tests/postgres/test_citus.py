"""Where Citus would break pgkv's promises silently, a store says so. Stand-ins for Citus' catalog are enough: it is
only read."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

import pgkv
from pgkv._cli.doctor.examine import examine
from tests import sharded
from tests.servers import Server, UserServer
from tests.variants import Variant

CATALOG = """
SET allow_system_table_mods = on;
CREATE TABLE pg_catalog.pg_dist_local_group (groupid INTEGER);
CREATE TABLE pg_catalog.pg_dist_partition (logicalrelid REGCLASS, partmethod "char");
GRANT SELECT ON pg_catalog.pg_dist_local_group, pg_catalog.pg_dist_partition TO PUBLIC;
INSERT INTO pg_catalog.pg_dist_local_group VALUES (0);
"""


@pytest.fixture(scope="module")
def citus(server: Server | UserServer) -> str:
    """A database that looks like one of a coordinator, without sharding."""
    if isinstance(server, UserServer):
        pytest.skip("changes the catalog: not on the server of PGKV_TEST_DSN")
    (dsn,) = sharded.databases(server.dsn, [f"citus_{secrets.token_hex(4)}"])
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(CATALOG)
    return dsn


@pytest.fixture
def conn(citus: str) -> Iterator[psycopg.Connection[Any]]:
    """Changes the stand-ins."""
    with psycopg.connect(citus, autocommit=True) as conn:
        yield conn
        conn.execute("UPDATE pg_catalog.pg_dist_local_group SET groupid = 0")
        conn.execute("DELETE FROM pg_catalog.pg_dist_partition")


def said(dsn: str) -> tuple[str, str]:
    """What the doctor says of the server."""
    found = next(each for each in examine(pgkv.Config(dsn)) if each.check == "server")
    return found.status, f"{found.detail} {found.advice}"


async def test_local_tables_are_ordinary(citus: str, variant: Variant) -> None:
    """On a coordinator a store works as anywhere."""
    store = await variant.connect(citus)
    await store.set("k", "v")
    await store.close()
    assert said(citus)[0] == "ok"


async def test_a_worker_is_refused(
    citus: str, conn: psycopg.Connection[Any], variant: Variant
) -> None:
    """Its tables would be on that server alone."""
    conn.execute("UPDATE pg_catalog.pg_dist_local_group SET groupid = 3")
    with pytest.raises(
        pgkv.ConfigError, match=r"worker .* \(group 3\).* connect to the coordinator"
    ):
        await variant.connect(citus)
    status, text = said(citus)
    assert (status, "worker" in text, "coordinator" in text) == ("fail", True, True)


async def test_a_table_that_is_distributed_by_key_is_refused(
    citus: str, conn: psycopg.Connection[Any], variant: Variant
) -> None:
    """Statements there lose what they promise; a table of a distributed schema, and another one, may be."""
    await (await variant.connect(citus)).close()
    conn.execute("INSERT INTO pg_catalog.pg_dist_partition VALUES ('kv_store', 'n')")
    await (await variant.connect(citus)).close()
    conn.execute("UPDATE pg_catalog.pg_dist_partition SET partmethod = 'h'")
    with pytest.raises(pgkv.ConfigError, match="undistribute_table"):
        await variant.connect(citus)
    status, text = said(citus)
    assert (status, "kv_store" in text, "undistribute_table" in text) == ("fail", True, True)
    await (await variant.connect(citus, table_name="other")).close()
