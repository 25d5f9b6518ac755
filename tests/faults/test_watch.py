"""`store.watch` through crashes of the server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from pgkv import TableType
from pgkv._watch import source as _source
from tests.faults.support import newest
from tests.servers import Server

pytestmark = newest


async def test_a_crash_that_empties_the_table(
    make_server: Callable[..., Server], make_store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An UNLOGGED table comes back empty: a resync, and each key is gone. A logged one keeps its keys: a
    resync, and what is written after it. While the server is away a watcher waits."""
    monkeypatch.setattr(_source, "POLL_DEAF", 0.2)
    server = make_server()
    store = await make_store(dsn=server.dsn, notify=True)
    kept = await make_store(
        dsn=server.dsn, table_name="kept", table_type=TableType.REGULAR, notify=True
    )
    await store.set("k", b"1")
    await kept.set("k", b"1")
    async with store.watch("k") as events, kept.watch("k", poll=None) as logged:
        waiting = [asyncio.ensure_future(each.next(timeout=120)) for each in (events, logged)]
        await asyncio.to_thread(server.kill)
        await asyncio.sleep(0.5)  # some reads fail
        assert not any(each.done() for each in waiting)
        await asyncio.to_thread(server.start)
        first, second = await asyncio.gather(*waiting)
        # Reads, which may succeed before the connection listens again, find what is gone.
        others = [(await events.next(timeout=120)).kind] if first else []
        assert sorted([first.kind, *others]) == ["gone", "resync"]
        assert second.kind == "resync"
        await kept.set("k", b"2")
        assert (await logged.next(timeout=120)).kind == "set"
