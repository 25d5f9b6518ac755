"""A server of several is silent, is killed, or is away at the start: only its slots suffer."""

from __future__ import annotations

import asyncio
import functools
import os
import secrets
import time
from collections.abc import Callable
from typing import Any

import pytest

import pgkv
from pgkv._shards.moves import move
from tests import sharded
from tests.faults.support import Standby, exit_code, newest
from tests.faults.test_fork import in_child
from tests.servers import LATE, Server
from tests.variants import Variant, in_thread, inside

pytestmark = newest
# What the healthy server does takes an instant. A loaded machine takes longer, and is no fault of a server.
DEADLINE = 5.0


async def test_only_its_slots_suffer(
    server: Server, make_server: Callable[..., Server], variant: Variant
) -> None:
    """The others answer meanwhile, what meets it ends by the deadline, and it comes back by itself: empty
    where its tables are UNLOGGED and it was killed."""
    theirs = make_server()
    dsns = [*sharded.databases(server.dsn, [f"f_{secrets.token_hex(4)}"]), theirs.dsn]
    sharded.init(dsns, 2)
    patient = {"retry": None, "operation_timeout": 60, "connect_timeout": 60}
    store = await sharded.connect(variant, dsns, **patient)
    hasty = await sharded.connect(variant, dsns, **patient | {"operation_timeout": DEADLINE})
    async with store, hasty:
        nodes = [shard.node for shard in await store.shards()]
        keys = [
            next(k for k in map(str, range(99)) if nodes[store.slot_of(k)] == name)
            for name in ("n1", "n2")
        ]
        await store.set_many(dict.fromkeys(keys, "v"))
        assert await hasty.get_many(keys) == dict.fromkeys(keys, b"v")  # it has its connections
        inner = inside(store)

        async def fails(work: Any) -> Exception:
            started = time.monotonic()
            with pytest.raises((pgkv.OperationTimeoutError, pgkv.StoreUnavailableError)) as caught:
                await work
            assert time.monotonic() - started < DEADLINE + 1.5 + LATE
            return caught.value

        theirs.freeze()
        try:
            stuck = [
                asyncio.ensure_future(fails(hasty.get(keys[1]))),
                asyncio.ensure_future(fails(hasty.get_many(keys))),
            ]
            for n in range(20):
                assert await store.increment(f"{{{keys[0]}}}n") == n + 1
            with pytest.raises((pgkv.OperationTimeoutError, pgkv.StoreUnavailableError)):
                async with hasty.pipeline() as p:
                    answered, lost = p.increment(f"{{{keys[0]}}}n"), p.get(keys[1])
            assert answered.result() == 21
            with pytest.raises((pgkv.OperationTimeoutError, pgkv.StoreUnavailableError)):
                lost.result()
            await asyncio.gather(*stuck)
        finally:
            theirs.thaw()
        assert await store.get_many(keys) == dict.fromkeys(keys, b"v")

        theirs.kill()
        await fails(store.get(keys[1]))
        await fails(store.scan())
        cleared = functools.partial(pgkv.invalidate_tag, "t", store=inner)
        await fails(cleared() if variant.name == "async" else in_thread(cleared))
        assert await store.get(keys[0]) == b"v"
        found = {shard.slot: shard.bytes > 0 for shard in await store.shards()}
        assert found == {store.slot_of(keys[0]): True, store.slot_of(keys[1]): False}
        late = await sharded.connect(variant, dsns, retry=None)
        async with late:
            assert await late.get(keys[0]) == b"v"
            error = await fails(late.get(keys[1]))
            assert "slot" in str(error)
            theirs.restart()
            assert await late.get(keys[1]) is None  # UNLOGGED
            assert await late.get_many(keys) == {keys[0]: b"v"}
        await store.set(keys[1], "again")
        assert await store.get_many(keys) == {keys[0]: b"v", keys[1]: b"again"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork() here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_follows_a_move(server: Server) -> None:
    """Also where a thread of its parent reads the map at that moment: the child has no such thread."""
    dsns = sharded.databases(server.dsn, [f"f_{secrets.token_hex(4)}" for _ in range(2)])
    sharded.init(dsns, 2)
    with pgkv.Store.sharded(dsns) as store:
        slot = store.slot_of("k")
        store.increment("k")
        store._channel.router._reading.add(slot)
        with sharded.cluster(dsns) as servers:
            servers.read()
            to = next(each for each in ("n1", "n2") if each != servers.homes()[slot].home)
            move(servers, slot, to, lambda *_: None)

        def work() -> None:
            assert store.increment("k") == 2

        assert exit_code(in_child(work)) == 0
        store._channel.router._reading.clear()
        assert store.increment("k") == 3


async def test_a_server_is_replaced_by_its_standby(
    server: Server, pair: tuple[Server, Standby, str], variant: Variant
) -> None:
    """Its slots fail in the meantime and the others go on. Then they are where the DSN leads, without what
    was UNLOGGED; the map and every other server need no word about it."""
    primary, standby, dsn = pair
    dsns = [*sharded.databases(server.dsn, [f"f_{secrets.token_hex(4)}"]), dsn]
    sharded.init(dsns, 2)
    store = await sharded.connect(variant, dsns, operation_timeout=60.0)
    async with store:
        logged = store.table("logged", table_type=pgkv.TableType.REGULAR)
        nodes = [shard.node for shard in await store.shards()]
        here, there = (
            next(k for k in map(str, range(99)) if nodes[store.slot_of(k)] == name)
            for name in ("n1", "n2")
        )
        for each in (store, logged):
            await each.set_many({here: "v", there: "v"})
        await asyncio.to_thread(standby.catch_up)
        await asyncio.to_thread(primary.kill)
        waiting = asyncio.ensure_future(logged.get(there))
        for n in range(20):
            assert await store.increment(f"{{{here}}}n") == n + 1
        with pytest.raises(pgkv.StoreUnavailableError):
            await waiting
        await asyncio.to_thread(standby.promote)
        assert await logged.get_many([here, there]) == {here: b"v", there: b"v"}
        assert await store.get_many([here, there]) == {here: b"v"}
        await store.set(there, "w")
        assert [shard.state for shard in await store.shards()] == ["live", "live"]
    with sharded.cluster(dsns) as servers:
        assert servers.check() == []
