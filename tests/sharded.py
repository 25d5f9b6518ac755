"""Sharded stores for tests: their servers are databases of one server, unless a test breaks them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

import pgkv
from pgkv._shards.admin import Servers
from pgkv._shards.slots import ANY
from pgkv.patterns.schema import tables
from tests.variants import Threaded, Variant, in_thread


def databases(dsn: str, names: Sequence[str]) -> list[str]:
    """Make those databases, and return their DSNs."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        for name in names:
            conn.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    return [make_conninfo(dsn, dbname=name) for name in names]


def cluster(dsns: Sequence[str]) -> Servers:
    """Connections for administration."""
    return Servers([pgkv.Config(dsn, schema=ANY) for dsn in dsns])


def init(dsns: Sequence[str], slots: int | None) -> int:
    """Make the slots and all tables."""
    with cluster(dsns) as servers:
        return servers.init(slots, tables(pgkv.Config(dsns[0], schema=ANY)))


async def connect(variant: Variant, dsns: Sequence[str], **config: Any) -> Any:
    """A sharded store; used as an AsyncStore."""
    if variant.name == "async":
        return await pgkv.AsyncStore.sharded(dsns, **config)
    return Threaded(await in_thread(pgkv.Store.sharded, dsns, **config))


CLEAR = """
DO $$ DECLARE name text; BEGIN
FOR name IN SELECT format('%I.%I', schemaname, tablename) FROM pg_tables WHERE schemaname ~ '^pgkv_[0-9]+$' LOOP
  EXECUTE 'DELETE FROM ' || name;
END LOOP; END $$
"""


def clear(dsns: Sequence[str]) -> None:
    """Empty every table."""
    for dsn in dsns:
        with psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute(CLEAR)
