"""`on_error="miss"`: while the server is away, reads of a cache find nothing and writes are dropped."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

import psycopg
import pytest

import pgkv
from pgkv._engine import breaker as _breaker
from tests.servers import PATIENCE, Server
from tests.variants import Variant

MakeStore = Callable[..., Coroutine[Any, Any, Any]]

# What each call says while the server is away.
MISSES: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "get": (lambda s: s.get("k", b"default"), b"default"),
    "get_string": (lambda s: s.get_string("k"), None),
    "get_entry": (lambda s: s.get_entry("k"), None),
    "exists": (lambda s: s.exists("k"), False),
    "ttl": (lambda s: s.ttl("k"), None),
    "get_many": (lambda s: s.get_many(["k", "j"]), {}),
    "exists_many": (lambda s: s.exists_many(["k"]), set()),
    "set": (lambda s: s.set("k", b"2"), 0),
    "set with ttl": (lambda s: s.set("k", b"2", ttl=60), 0),
    "set_many": (lambda s: s.set_many({"k": b"2", "j": b"2"}), 0),
    "delete": (lambda s: s.delete("k"), False),
    "delete_many": (lambda s: s.delete_many(["k"]), 0),
    "expire": (lambda s: s.expire("k", 60), False),
    "expire_many": (lambda s: s.expire_many(["k"], 60), 0),
    "persist": (lambda s: s.persist("k"), False),
    "typed get": (lambda s: s.typed(int).get("k"), None),
    "typed set_many": (lambda s: s.typed(int).set_many({"k": 1}), 0),
}
RAISE: dict[str, Callable[[Any], Any]] = {
    "increment": lambda s: s.increment("k"),
    "decrement": lambda s: s.decrement("k"),
    "increment with a bound": lambda s: s.increment("k", maximum=9),
    "increment if there": lambda s: s.increment("k", only_if_exists=True),
    "increment_many": lambda s: s.increment_many({"k": 1}),
    "append": lambda s: s.append("k", b"2"),
    "compare_and_swap": lambda s: s.compare_and_swap("k", b"1", b"2"),
    "compare_and_delete": lambda s: s.compare_and_delete("k", b"1"),
    "update": lambda s: s.update("k", lambda _: b"2"),
    "set if_version": lambda s: s.set("k", b"2", if_version=7),
    "set_nx": lambda s: s.set_nx("k", b"2"),
    "set_xx": lambda s: s.set_xx("k", b"2"),
    "delete if_version": lambda s: s.delete("k", if_version=7),
    "get_and_set": lambda s: s.get_and_set("k", b"2"),
    "get_and_delete": lambda s: s.get_and_delete("k"),
    "keys": lambda s: s.keys(),
    "count": lambda s: s.count(),
    "delete_prefix": lambda s: s.delete_prefix("k"),
}

# What is built on such a store: a miss would be a second holder, a session that is signed out, a
# limit that is none, work done twice.
PATTERNS: dict[str, tuple[str, dict[str, Any], Callable[[Any], Any]]] = {
    "acquire": ("Lock", {"name": "n"}, lambda lock: lock.acquire(timeout=0)),
    "try_acquire": ("Lock", {"name": "n"}, lambda lock: lock.try_acquire()),
    "holder": ("Lock", {"name": "n"}, lambda lock: lock.holder()),
    "semaphore": ("Semaphore", {"name": "n", "slots": 2}, lambda it: it.try_acquire()),
    "create": ("SessionStore", {}, lambda sessions: sessions.create({"a": 1})),
    "load": ("SessionStore", {}, lambda sessions: sessions.load("x" * 43)),
    "session exists": ("SessionStore", {}, lambda sessions: sessions.exists("x" * 43)),
    "destroy_user": ("SessionStore", {}, lambda sessions: sessions.destroy_user("u")),
    "hit": (
        "RateLimiter",
        {"rates": "1/s", "name": "l", "timeout": 20},
        lambda limiter: limiter.hit("u"),
    ),
    "put": ("Queue", {"name": "q"}, lambda queue: queue.put(b"1")),
}


@pytest.mark.parametrize("coalesce", [False, True])
async def test_misses(
    make_server: Callable[..., Server],
    make_store: MakeStore,
    variant: Variant,
    coalesce: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Plain reads and writes are misses while the server is away, at no cost after a few; all else
    raises, and so does a table of the same store that did not ask for it. When the server is back the
    next call finds what is there."""
    monkeypatch.setattr(_breaker, "PAUSE_FIRST", 0.2)
    monkeypatch.setattr(_breaker, "PAUSE_MAX", 0.2)
    server = make_server()
    options = {"coalesce": coalesce, "table_type": pgkv.TableType.REGULAR, "retry": None}
    store = await make_store(dsn=server.dsn, on_error="miss", **options)
    strict = store.table("strict", on_error="raise")
    await strict.create_table()
    assert await store.set("k", b"1") > 0
    server.stop()
    with caplog.at_level(logging.WARNING, "pgkv"):
        for call, missed in MISSES.values():
            assert await call(store) == missed
    lines = [each.getMessage() for each in caplog.records if "pgkv.store.missed" in each.message]
    assert len(lines) == 1
    assert "operation=get reason=" in lines[0]
    later = time.monotonic() + _breaker.LOG_AGAIN
    monkeypatch.setattr(_breaker, "monotonic", lambda: later)
    with caplog.at_level(logging.WARNING, "pgkv"):
        await store.get("k")
    again = [each.getMessage() for each in caplog.records if "pgkv.store.missed" in each.message]
    assert again[1:][0].endswith(f"missed={len(MISSES)}"), "a minute later it tells how many"
    for call in RAISE.values():
        with pytest.raises(pgkv.StoreUnavailableError):
            await call(store)
    for what, options, call in PATTERNS.values():
        with pytest.raises(pgkv.StoreUnavailableError):
            await call(variant.make(what, store, **options))
    for call, _ in (MISSES["get"], MISSES["set"]):
        with pytest.raises(pgkv.StoreUnavailableError):
            await call(strict)
    with pytest.raises(pgkv.StoreUnavailableError):
        async with store.pipeline() as pipeline:
            pipeline.get("k")
    server.start()
    deadline = time.monotonic() + PATIENCE
    while await store.get("k") is None and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    assert await store.get("k") == b"1"
    assert await store.set("k", b"2") > 0


async def test_mistakes_are_no_misses(make_store: MakeStore, store: Any, dsn: str) -> None:
    """Bad input, a closed store and a missing table raise."""
    lenient = await make_store(on_error="miss", auto_create_table=False)
    await store.recreate_table()
    await lenient.get("k")
    with psycopg.connect(dsn) as conn:
        conn.execute("DROP TABLE kv_store")
    with pytest.raises(pgkv.TableNotFoundError):
        await lenient.get("k")
    with pytest.raises(pgkv.InvalidKeyError):
        await lenient.get("")
    await lenient.close()
    with pytest.raises(pgkv.StoreUnavailableError, match="closed"):
        await lenient.get("k")


async def test_a_circuit_that_is_open_asks_no_server(
    variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After five failures in a row reads are misses at once, until the pause is over."""
    monkeypatch.setattr(_breaker, "PAUSE_FIRST", 30.0)
    nowhere = "postgresql://nobody@127.0.0.1:1/nowhere?connect_timeout=1"
    store = variant.make("Store", pgkv.Config(nowhere, on_error="miss", retry=None))
    asked: list[str] = []
    remove = pgkv.on_operation(lambda name, *_: asked.append(name))
    try:
        for _ in range(_breaker.FAILURES_MAX + 20):
            assert await store.get("k") is None
    finally:
        remove()
    assert len(asked) == _breaker.FAILURES_MAX
    await store.close()
