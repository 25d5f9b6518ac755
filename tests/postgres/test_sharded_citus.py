"""A store over a real Citus cluster: what every store and pattern does, moves under load, and the fence.

PGKV_TEST_CITUS_DSN names the coordinator; its role is a superuser on every node, and may make databases there.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

import pgkv
from pgkv._shards.cluster import CitusCluster, administered
from pgkv._shards.slots import ANY
from pgkv.patterns.schema import tables
from tests import again, sharded
from tests.postgres.test_sharded_behaviour import (
    MODULES,
    OF_ONE_SERVER,
    OWN_FIXTURES,
    leave_out,
)
from tests.variants import Variant, closing_all

DSN = os.environ.get("PGKV_TEST_CITUS_DSN", "")
SLOTS = 4

pytestmark = pytest.mark.skipif(
    not DSN, reason="set PGKV_TEST_CITUS_DSN to the coordinator of a Citus cluster"
)


def nodes_of(dsn: str) -> list[str]:
    """The DSNs of all nodes, the coordinator's first, as its metadata know them."""
    with psycopg.connect(dsn) as conn:
        found = conn.execute(
            "SELECT nodename, nodeport FROM pg_dist_node WHERE noderole = 'primary' ORDER BY groupid"
        ).fetchall()
    params = conninfo_to_dict(dsn)
    params.pop("hostaddr", None)
    return [make_conninfo("", **(params | {"host": host, "port": port})) for host, port in found]


@pytest.fixture(scope="session")
def nodes() -> Iterator[list[str]]:
    """A database of the session's own as a cluster of the same nodes; their DSNs, the coordinator's first."""
    name = f"pgkv_{secrets.token_hex(4)}"
    made = []
    for dsn in nodes_of(DSN):
        with psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        made.append(make_conninfo(dsn, dbname=name))
        with psycopg.connect(made[-1], autocommit=True) as conn:
            conn.execute("CREATE EXTENSION citus")
    with psycopg.connect(made[0], autocommit=True) as conn:
        for n, dsn in enumerate(made):
            params = conninfo_to_dict(dsn)
            add = "citus_add_node" if n else "citus_set_coordinator_host"
            conn.execute(f"SELECT {add}(%s, %s)", (params["host"], int(str(params["port"]))))
    with cluster(made) as found:
        found.init(SLOTS, tables(pgkv.Config(made[0], schema=ANY)))
    yield made
    for dsn in nodes_of(DSN):
        with psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def cluster(nodes: list[str]) -> CitusCluster:
    """Connections for administration."""
    found = administered([pgkv.Config(nodes[0], schema=ANY)], "citus")
    assert isinstance(found, CitusCluster)
    return found


def clear(nodes: list[str]) -> None:
    """Empty every table."""
    with psycopg.connect(nodes[0], autocommit=True) as conn:
        for (name,) in conn.execute(
            "SELECT logicalrelid::text FROM pg_dist_partition WHERE logicalrelid::text ~ '^pgkv_[0-9]'"
        ).fetchall():
            conn.execute(f"DELETE FROM {name}")


@pytest.fixture
def make_store(
    request: pytest.FixtureRequest,
    nodes: list[str],
    variant: Variant,
    event_loop_runner: asyncio.Runner,
) -> Iterator[Callable[..., Coroutine[Any, Any, Any]]]:
    """`await make_store()` is a store over the cluster."""
    with closing_all(event_loop_runner) as made:

        async def make(**config: Any) -> Any:
            dsns = [nodes[0]]
            if (dsn := config.pop("dsn", None)) is not None:
                options = conninfo_to_dict(dsn).get("options")
                dsns = [make_conninfo(each, options=options) for each in nodes]
            made.append(await sharded.connect(variant, config.pop("dsns", dsns), **config))
            return made[-1]

        yield make
    clear(nodes)


again.adopt(globals(), MODULES, own=OWN_FIXTURES, left_out={}, one_in=12)
leave_out(globals(), OF_ONE_SERVER | {"clock"})
