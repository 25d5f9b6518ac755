"""Values that are there already: served stale, refreshed early, kept in memory."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

import pgkv
from pgkv.patterns.cache import flows as _cached_core
from pgkv.testing import ServerClock
from tests.cached import cached_in, invalidate_tag
from tests.peers import Peer, until
from tests.variants import Variant, in_thread, inside

MakeStore = Callable[..., Coroutine[Any, Any, Any]]


async def test_stale_values_are_served_while_one_refresh_runs(
    make_store: MakeStore, variant: Variant, clock: ServerClock
) -> None:
    """Past its ttl a value is served at once, one refresh runs behind all callers of all processes,
    and past ttl + stale it is a miss."""
    gate = asyncio.Event()
    gate.set()
    calls: list[int] = []

    async def f() -> int:
        calls.append(1)
        me = len(calls)
        await gate.wait()
        return me

    options = {"ttl": 600, "stale": 300, "beta": 0}
    one, two = [cached_in(variant, await make_store(), **options)(f) for _ in range(2)]
    await one()
    clock.advance(601)
    gate.clear()
    assert await asyncio.gather(*(each() for each in (one, two) for _ in range(10))) == [1] * 20

    def refreshing() -> int:
        return sum(len(each._core.flights.refreshing) for each in (one, two))

    # Both look before the new value is stored. A later look would refresh it once more, if it were older by
    # then than its computation took.
    await until(lambda: len(calls) == 2 and refreshing() == 1, "one refreshes, the other does not")
    assert (await one.peek()).stale
    gate.set()
    await until(lambda: one.cache_info().fills + two.cache_info().fills == 2, "it is stored")
    assert [await one(), await two()] == [2, 2]
    assert one.cache_info().stale_hits + two.cache_info().stale_hits == 20
    clock.advance(901)
    assert await one() == 3
    assert len(calls) == 3


async def test_a_refresh_that_fails_leaves_the_stale_value(
    store: Any, variant: Variant, clock: ServerClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Stale-if-error: callers get the old value, the failure is counted, logged with the function's
    name and without its message, and tried again."""
    calls: list[int] = []

    @cached_in(variant, store, stale=1000, beta=0)
    async def f() -> int:
        calls.append(1)
        if len(calls) == 2:
            raise LookupError("of a user")
        return len(calls)

    await f()
    clock.advance(61)
    assert await f() == 1
    await until(lambda: "refresh_failed" in caplog.text, "the refresh fails")
    assert f.cache_info().errors == 1
    assert f"pgkv.cached.refresh_failed function={f.name} error=LookupError\n" in caplog.text

    # Its lease is given up right after.
    async def again() -> bool:
        await f()
        return bool(f.cache_info().fills == 2)

    async with asyncio.timeout(60):
        while not await again():
            await asyncio.sleep(0.005)
    assert await f() == len(calls) == 3


async def test_a_refresh_runs_in_the_context_of_its_call(
    store: Any, variant: Variant, clock: ServerClock
) -> None:
    """A refresh behind the callers sees the context variables of the call that met the stale value:
    where key= reads one, no caller is served another one's value. So do ttl= and condition=."""
    tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="acme")
    seen: list[str] = []
    options: dict[str, Any] = {
        "store": inside(store),
        "store_timeout": 20,
        "stale": 1000,
        "beta": 0,
        "key": lambda month: (tenant.get(), month),
        "condition": lambda _: bool(note()),
    }

    def note() -> int:
        seen.append(tenant.get())
        return 60

    def ttl(result: list[str], month: str) -> float:
        return note()

    load: Any
    if variant.name == "async":

        @pgkv.cached(ttl, **options, name="invoices, in a task")
        async def load(month: str) -> list[str]:
            return [tenant.get(), month]

    else:

        @pgkv.cached(ttl, **options, name="invoices, in a thread")
        def load(month: str) -> list[str]:
            return [tenant.get(), month]

    async def as_tenant(name: str) -> list[str]:
        tenant.set(name)
        if variant.name == "async":
            return await load("May")  # type: ignore[no-any-return]  # a list
        return await asyncio.to_thread(load, "May")

    for name in ("umbrella", "initech"):
        assert await asyncio.create_task(as_tenant(name)) == [name, "May"]
        clock.advance(61)
        assert await asyncio.create_task(as_tenant(name)) == [name, "May"]  # stale: refreshed
        await until(lambda: not load._core.flights.refreshing, "the refresh ends")
        assert await asyncio.create_task(as_tenant(name)) == [name, "May"]
        assert set(seen) == {name}
        seen.clear()
    assert load.cache_info().fills == 4


async def test_invalidated_values_are_not_served_stale(
    store: Any, variant: Variant, clock: ServerClock
) -> None:
    """stale bridges the end of a ttl, not an invalidation."""
    calls: list[int] = []

    @cached_in(variant, store, stale=1000, beta=0, tags=("t",))
    async def f() -> int:
        calls.append(1)
        return len(calls)

    await f()
    await f.invalidate()
    assert await f() == 2
    await invalidate_tag(variant, "t", store)
    assert await f() == 3
    await f.cache_clear()
    assert await f() == 4


@pytest.mark.parametrize("stale", [0, 30])
async def test_early_refresh(
    store: Any, variant: Variant, clock: ServerClock, monkeypatch: pytest.MonkeyPatch, stale: int
) -> None:
    """XFetch: the dice decide by compute time, beta and the time left. The caller whom they choose
    gets the new value, or with `stale` the old one while it is computed behind him."""
    calls: list[int] = []

    @cached_in(variant, store, ttl=600, stale=stale, beta=100.0)
    async def f() -> int:
        calls.append(1)
        await asyncio.sleep(0.12)
        return len(calls)

    await f()
    clock.advance(300)
    # compute * beta * -ln(1 - r) >= left: 300 s are, but for what a busy machine takes. So it is for
    # r = 0.01 where the computation took that long, for the other one from 0.087 s on.
    monkeypatch.setattr(_cached_core, "random", lambda: 0.01)
    assert await f() == 1
    assert len(calls) == 1
    monkeypatch.setattr(_cached_core, "random", lambda: 1 - 1e-15)
    assert await f() == (1 if stale else 2)
    await until(lambda: f.cache_info().fills == 2, "stored")
    monkeypatch.setattr(_cached_core, "random", lambda: 0.01)
    assert await f() == 2
    assert len(calls) == 2


async def test_an_early_refresh_that_fails_serves_the_valid_value(
    store: Any, variant: Variant, clock: ServerClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller has a valid value without it."""
    calls: list[int] = []

    @cached_in(variant, store, ttl=600, beta=1000)
    async def f() -> int:
        calls.append(1)
        await asyncio.sleep(0.05)
        if len(calls) > 1:
            raise LookupError
        return 1

    await f()
    clock.advance(300)
    monkeypatch.setattr(_cached_core, "random", lambda: 1 - 1e-9)
    assert await f() == 1
    assert len(calls) == 2
    assert f.cache_info().errors == 1


# -- the first level -------------------------------------------------------------------------


async def test_a_hit_in_l1_costs_no_query(
    make_store: MakeStore, variant: Variant, operations: list[tuple[str, str, int]]
) -> None:
    """Each caller gets a value of its own."""
    # Nobody listens here, so that nothing is forgotten when a listener begins.
    store = await make_store(pooler=pgkv.Pooler.TRANSACTION)

    @cached_in(variant, store, l1=pgkv.L1(ttl=60))
    async def f(n: int) -> list[int]:
        return [n]

    await f(1)
    operations.clear()
    first = await f(1)
    first.append(2)
    assert await f(1) == [1]
    assert operations == []
    assert f.cache_info().hits == 2


async def test_l1_sees_its_own_invalidations_at_once(store: Any, variant: Variant) -> None:
    """invalidate, invalidate_tag, cache_clear and refresh in this process."""
    calls: list[int] = []

    @cached_in(variant, store, l1=pgkv.L1(ttl=600), tags=("t",))
    async def f() -> int:
        calls.append(1)
        return len(calls)

    assert await f() == 1
    await f.invalidate()
    assert await f() == 2
    await f.cache_clear()
    assert await f() == 3
    await invalidate_tag(variant, "t", store)
    assert await f() == 4
    await f.refresh()
    assert await f() == 5


@pytest.mark.parametrize("how", ["key", "tag"])
@pytest.mark.parametrize("end", ["commit", "rollback", "close"])
async def test_l1_and_an_invalidation_inside_a_transaction(
    make_store: MakeStore, variant: Variant, connect: Any, peer: Peer, how: str, end: str
) -> None:
    """Calls before the end of the transaction do not bring the old value back into the first level,
    neither one that began before the end and is late: after a commit no call of this process sees
    it. Then the level is used again."""
    # Nobody listens: what holds here holds without a notification.
    store = await make_store(pooler=pgkv.Pooler.TRANSACTION)
    peer.run("CREATE TABLE data AS SELECT 1 AS v")
    level, other = pgkv.L1(ttl=600), pgkv.L1(ttl=600)
    late: list[tuple[Any, ...]] = []

    async def load() -> int:
        return peer.one("SELECT v FROM data")  # type: ignore[no-any-return]  # an int

    cached, twin = [
        cached_in(variant, store, l1=each, tags=("t",))(load) for each in (level, other)
    ]
    assert [await cached(), await twin()] == [1, 1]
    conn = await connect()
    await conn.execute("UPDATE data SET v = 2")
    if how == "tag":
        await invalidate_tag(variant, "t", store, conn)
    else:
        await cached.using(conn).invalidate()
    put = level.put

    def put_late(*args: Any) -> None:
        late.append(args)

    for _ in range(2):
        assert [await cached(), await twin()] == [1, 1]
    assert (len(level), len(other)) == (0, 0)
    level.put = put_late  # type: ignore[method-assign,assignment]  # a call that has read and is not done yet
    assert await cached() == 1
    level.put = put  # type: ignore[method-assign]
    await getattr(conn, end)()
    for args in late:
        put(*args)
    expected = 2 if end == "commit" else 1
    for _ in range(3):
        assert [await cached(), await twin()] == [expected, expected]
    assert (len(level), len(other)) == (1, 1)


@pytest.mark.parametrize("how", ["plain", "transaction", "tag", "clear"])
async def test_l1_hears_of_other_processes(
    make_store: MakeStore, variant: Variant, connect: Any, how: str
) -> None:
    """An invalidation elsewhere reaches a first level by NOTIFY, long before its ttl; inside a
    transaction with its commit."""
    calls: list[int] = []

    async def f() -> int:
        calls.append(1)
        return len(calls)

    stores = [await make_store() for _ in range(2)]
    levels = [pgkv.L1(ttl=600), pgkv.L1(ttl=600)]
    here, there = [
        cached_in(variant, store, l1=level, tags=("t",))(f)
        for store, level in zip(stores, levels, strict=True)
    ]
    assert [await here(), await here()] == [1, 1]
    # The listener forgets everything when it begins to listen: wait for a level that stays.
    for _ in range(6000):
        if len(levels[0]) and levels[0].epoch:
            break
        await asyncio.sleep(0.01)
        await here()
    assert len(levels[0]) == 1
    before = levels[0].epoch
    if how == "plain":
        await there.invalidate()
    elif how == "clear":
        await there.cache_clear()
    elif how == "tag":
        await invalidate_tag(variant, "t", stores[1])
    else:
        conn = await connect()
        await there.using(conn).invalidate()
        await conn.commit()
    await until(lambda: levels[0].epoch > before, "the news arrive")

    async with asyncio.timeout(60):
        while await here() == 1:
            await asyncio.sleep(0.01)
    assert await here() == 2


async def test_without_news_l1_ends_by_its_ttl(
    make_store: MakeStore, variant: Variant, peer: Peer
) -> None:
    """Behind a pooler nobody listens: an old value is served for the level's ttl at most."""
    pooled = await make_store(pooler=pgkv.Pooler.TRANSACTION)

    @cached_in(variant, pooled, l1=pgkv.L1(ttl=0.3))
    async def f() -> int:
        return peer.one("SELECT v FROM data")  # type: ignore[no-any-return]  # an int

    peer.run("CREATE TABLE data AS SELECT 1 AS v")
    await f()
    peer.run("UPDATE data SET v = 2")
    peer.run("UPDATE kv_store SET expires_at = to_timestamp(0)")
    assert peer.one("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%%'") == 0
    async with asyncio.timeout(60):
        while await f() == 1:
            await asyncio.sleep(0.01)
    assert await f() == 2


# -- default stores and tests ----------------------------------------------------------------


async def test_default_store(dsn: str, variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resolved at the first call: configure(dsn) makes a store in the function's variant; a loop's
    own is closed with it; without one the error says what to do."""
    monkeypatch.delenv("PGKV_DSN", raising=False)
    monkeypatch.delenv("DATABASE_URL", raising=False)

    @pgkv.cached(60, store_timeout=20)
    def f(n: int) -> int:
        return n

    @pgkv.cached(60, store_timeout=20)
    async def g(n: int) -> int:
        return n

    def check() -> None:
        pgkv.configure(None)
        for call in (lambda: f(1), lambda: asyncio.run(_awaited(g, 1))):
            with pytest.raises(pgkv.ConfigError, match=r"configure.*PGKV_DSN.*store="):
                call()
        try:
            monkeypatch.setenv("PGKV_DSN", dsn)
            assert f(1) == f(1) == 1
            pgkv.configure(dsn)
            assert f(1) == 1
            assert f.cache_info().hits == 2
            for _ in range(2):  # two loops, one store each
                assert asyncio.run(_awaited(g, 1)) == 1
            assert g.cache_info().hits == 1
        finally:
            pgkv.configure(None)

    await in_thread(check)


async def _awaited(fn: Any, *args: Any) -> Any:
    return await fn(*args)


async def test_the_wrong_variant_of_store_is_refused(store: Any, variant: Variant) -> None:
    """A sync function needs a Store, an async one an AsyncStore: said when decorating, or by
    configure()'s first call."""
    plain = inside(store)
    try:
        pgkv.configure(plain)
        if variant.name == "async":

            def f() -> int:
                return 1

            with pytest.raises(pgkv.ConfigError, match="needs a Store"):
                pgkv.cached(60, store=plain)(f)
            with pytest.raises(pgkv.ConfigError, match=r"needs a Store.*AsyncStore only"):
                await in_thread(pgkv.cached(60)(f))
        else:

            async def g() -> int:
                return 1

            with pytest.raises(pgkv.ConfigError, match="needs an AsyncStore"):
                pgkv.cached(60, store=plain)(g)
            with pytest.raises(pgkv.ConfigError, match="needs an AsyncStore"):
                await pgkv.cached(60)(g)()
    finally:
        pgkv.configure(None)


async def test_disabled(store: Any, variant: Variant) -> None:
    """Inside pgkv.testing.disabled() cached functions are the functions themselves, and no helper
    asks a store."""
    from pgkv.testing import disabled

    calls: list[int] = []

    @cached_in(variant, store)
    async def f() -> int:
        calls.append(1)
        return len(calls)

    with disabled():
        assert [await f(), await f()] == [1, 2]
        await f.invalidate()
        assert await f.peek() is None
    assert [await f(), await f()] == [3, 3]
