"""Time and expiry: a key whose time has passed by the server's clock does not exist."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

import pgkv
from pgkv.testing import ServerClock
from pgkv.types import CasStatus, IncrementResult
from tests.peers import Peer
from tests.variants import in_thread

MANUAL = pgkv.TtlCleanupStrategy.MANUAL
ON_READ = pgkv.TtlCleanupStrategy.ON_READ
DISABLED = pgkv.TtlCleanupStrategy.DISABLED

# What each call says of the key "k", which holds b"5" and whose time has passed.
READS: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "get": (lambda s: s.get("k"), None),
    "get_string": (lambda s: s.get_string("k"), None),
    "get_entry": (lambda s: s.get_entry("k"), None),
    "exists": (lambda s: s.exists("k"), False),
    "ttl": (lambda s: s.ttl("k"), None),
    "get_many": (lambda s: s.get_many(["k"]), {}),
    "get_many of an array": (lambda s: s.get_many(["k", *map(str, range(20))]), {}),
    "exists_many": (lambda s: s.exists_many(["k"]), set()),
    "keys": (lambda s: s.keys(), []),
    "scan": (lambda s: s.scan("k"), []),
    "count": (lambda s: s.count(), 0),
}
CHANGES: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "delete": (lambda s: s.delete("k"), False),
    "delete_many": (lambda s: s.delete_many(["k"]), 0),
    "delete_prefix": (lambda s: s.delete_prefix("k"), 0),
    "clear": (lambda s: s.clear(), 0),
    "expire": (lambda s: s.expire("k", 60), False),
    "expire_at": (lambda s: s.expire_at("k", datetime(2900, 1, 1, tzinfo=UTC)), False),
    "expire_many": (lambda s: s.expire_many(["k"], 60), 0),
    "persist": (lambda s: s.persist("k"), False),
    "get_and_touch": (lambda s: s.get_and_touch("k", 60), None),
    "get_and_delete": (lambda s: s.get_and_delete("k"), None),
    "compare_and_delete": (lambda s: s.compare_and_delete("k", b"5"), False),
    "set_xx": (lambda s: s.set_xx("k", b"6"), False),
    "increment if it exists": (lambda s: s.increment("k", only_if_exists=True), None),
    "increment beyond a bound": (
        lambda s: s.increment("k", 4, maximum=3),
        IncrementResult(0, applied=False),
    ),
}
# ... and what it holds afterwards, where the call writes.
WRITES: dict[str, tuple[Callable[[Any], Any], Any, bytes]] = {
    "set_nx": (lambda s: s.set_nx("k", b"6"), True, b"6"),
    "get_and_set": (lambda s: s.get_and_set("k", b"6"), None, b"6"),
    "increment": (lambda s: s.increment("k", 2), 2, b"2"),
    "decrement": (lambda s: s.decrement("k", 2), -2, b"-2"),
    "increment within": (
        lambda s: s.increment("k", 2, maximum=3),
        IncrementResult(2, applied=True),
        b"2",
    ),
    "append": (lambda s: s.append("k", b"6"), 1, b"6"),
    "increment_many": (lambda s: s.increment_many({"k": 2}), {"k": 2}, b"2"),
    "set_many": (lambda s: s.set_many({"k": b"6"}), 1, b"6"),
    "update": (
        lambda s: s.update("k", lambda old: b"none" if old is None else old),
        b"none",
        b"none",
    ),
}


async def expired(make_store: Any, clock: ServerClock, strategy: Any) -> Any:
    """A store whose key "k" holds b"5" and is past its time, its row still there."""
    store = await make_store(ttl_cleanup_strategy=strategy)
    await store.set("k", b"5", ttl=60)
    clock.advance(61)
    return store


@pytest.mark.parametrize("strategy", [ON_READ, MANUAL])
@pytest.mark.parametrize("name", READS)
async def test_reads_of_an_expired_key(
    make_store: Any, clock: ServerClock, name: str, strategy: Any
) -> None:
    """To every read, a key whose time has passed does not exist, whatever the strategy."""
    call, answer = READS[name]
    assert await call(await expired(make_store, clock, strategy)) == answer


@pytest.mark.parametrize("name", CHANGES)
async def test_changes_of_an_expired_key(make_store: Any, clock: ServerClock, name: str) -> None:
    """A call that changes a key finds none whose time has passed, and brings none back."""
    call, answer = CHANGES[name]
    store = await expired(make_store, clock, DISABLED)
    result = await call(store)
    assert result == answer
    assert type(result) is type(answer)
    assert await store.table("kv_store", ttl_cleanup_strategy=MANUAL).exists("k") is False


@pytest.mark.parametrize("strategy", [MANUAL, DISABLED])
@pytest.mark.parametrize("name", WRITES)
async def test_writes_over_an_expired_key(
    make_store: Any, clock: ServerClock, name: str, strategy: Any
) -> None:
    """A write takes a key whose time has passed for absent, and what it writes can be seen; under
    DISABLED too.
    """
    call, answer, value = WRITES[name]
    store = await expired(make_store, clock, strategy)
    assert await call(store) == answer
    visible = store.table("kv_store", ttl_cleanup_strategy=MANUAL)
    assert await visible.get("k") == value
    assert await visible.ttl("k") == math.inf


@pytest.mark.parametrize("strategy", [MANUAL, DISABLED])
async def test_compare_and_swap_on_an_expired_key(
    make_store: Any, clock: ServerClock, strategy: Any
) -> None:
    """CAS finds an expired key absent: its value does not match, None does."""
    store = await expired(make_store, clock, strategy)
    found = await store.compare_and_swap("k", b"5", b"6")
    assert (found.status, found.current, found.version) == (CasStatus.NOT_FOUND, None, None)
    assert (await store.compare_and_swap("k", None, b"7")).is_success
    assert await store.get("k") == b"7"


async def test_versions_of_an_expired_key_match_nothing(
    make_store: Any, clock: ServerClock
) -> None:
    """if_version finds no key whose time has passed; if_version=0 finds it absent."""
    store = await make_store(ttl_cleanup_strategy=MANUAL)
    version = await store.set("k", b"1", ttl=60)
    clock.advance(61)
    assert await store.set("k", b"2", if_version=version) is None
    assert await store.delete("k", if_version=version) is False
    assert await store.expire("k", 60, if_version=version) is False
    assert await store.set("k", b"3", if_version=0) > version


async def test_windows_on_expired_rows(make_store: Any, clock: ServerClock) -> None:
    """include_expired and stats() show rows whose time has passed and that nobody collected."""
    store = await expired(make_store, clock, MANUAL)
    await store.set("live", b"1")
    assert await store.keys(include_expired=True) == ["k", "live"]
    assert await store.scan(include_expired=True) == [("k", b"5"), ("live", b"1")]
    assert await store.count(include_expired=True) == 2
    stats = await store.stats()
    assert (stats.total_keys, stats.expired_keys) == (2, 1)


async def test_disabled_reads_return_expired_keys(make_store: Any, clock: ServerClock) -> None:
    """Under DISABLED reads return keys whose time has passed; their ttl is 0."""
    store = await expired(make_store, clock, DISABLED)
    assert await store.get("k") == b"5"
    assert await store.exists("k") is True
    assert await store.ttl("k") == 0.0
    assert await store.get_many(["k"]) == {"k": b"5"}
    assert await store.keys() == ["k"]
    assert await store.count() == 1
    entry = await store.get_entry("k")
    assert entry.is_expired()
    assert entry.ttl() == 0.0


async def test_a_key_ends_at_its_moment(store: Any, clock: ServerClock) -> None:
    """The moment itself is past: a key with a ttl of 600 is there a while before, not after 600 s."""
    await store.set("k", b"v", ttl=600)
    clock.advance(570)
    assert await store.get("k") == b"v"
    clock.advance(30)
    assert await store.get("k") is None


# -- whose clock -----------------------------------------------------------------------------


@pytest.mark.parametrize("hours", [-1, 1])
async def test_client_clock_an_hour_off(store: Any, clock: ServerClock, hours: int) -> None:
    """Between a client and a server whose clocks differ by an hour, every duration is right."""
    clock.set_offset(3600 * hours)
    await store.set("k", b"v", ttl=60)
    assert 30 < await store.ttl("k") <= 60
    entry = await store.get_entry("k")
    assert 30 < entry.ttl() <= 60
    assert not entry.is_expired()
    clock.advance(61)
    assert await store.get("k") is None


async def test_time_moves_inside_a_transaction(store: Any, clock: ServerClock) -> None:
    """Expiry in a transaction goes by the moment of each statement, not by its beginning."""
    async with store.transaction() as tx:
        await tx.set("old", b"v", ttl=60)
        clock.advance(61)
        assert await tx.get("old") is None
        assert await tx.set_nx("old", b"w", ttl=60) is True
        assert 30 < await tx.ttl("old") <= 60
        await tx.expire("old", 30)
        clock.advance(31)
        assert await tx.exists("old") is False


async def test_clock_stepping_back(store: Any, clock: ServerClock) -> None:
    """When the server's clock steps back, versions still rise and keys live the longer."""
    first = await store.set("k", b"1", ttl=60)
    clock.advance(-3600)
    second = await store.set("k", b"2", keep_ttl=True)
    assert second > first
    assert 3600 < await store.ttl("k") <= 3661


# -- which expiry a write leaves -------------------------------------------------------------


async def test_set_clears_an_earlier_ttl(store: Any) -> None:
    """set without a ttl makes the key last for ever."""
    await store.set("k", b"1", ttl=60)
    await store.set("k", b"2")
    assert await store.ttl("k") == math.inf


async def test_keep_ttl(store: Any, clock: ServerClock) -> None:
    """keep_ttl keeps a live key's expiry, its having none included."""
    await store.set("k", b"1", ttl=60)
    moment = (await store.get_entry("k")).expires_at
    clock.advance(10)
    await store.set("k", b"2", keep_ttl=True)
    assert (await store.get_entry("k")).expires_at == moment
    await store.persist("k")
    await store.set("k", b"3", keep_ttl=True)
    assert await store.ttl("k") == math.inf


async def test_keep_ttl_without_a_live_key(make_store: Any, clock: ServerClock) -> None:
    """keep_ttl on an absent or expired key keeps nothing: the key never expires."""
    store = await expired(make_store, clock, MANUAL)
    for key in ("k", "absent"):
        await store.set(key, b"6", keep_ttl=True)
        assert await store.ttl(key) == math.inf


async def test_set_many_sets_or_clears_every_ttl(store: Any) -> None:
    """set_many gives each of its keys the ttl, or takes it away."""
    await store.set("a", b"0", ttl=10)
    await store.set_many({"a": b"1", "b": b"2"}, ttl=60)
    assert 30 < await store.ttl("a") <= 60
    assert 30 < await store.ttl("b") <= 60
    await store.set_many([("a", b"3")])
    assert await store.ttl("a") == math.inf


async def test_increment_counts_in_a_fixed_window(store: Any, clock: ServerClock) -> None:
    """increment applies its ttl only when it makes the key; on an expired one it starts again."""
    assert await store.increment("k", ttl=600) == 1
    clock.advance(400)
    assert await store.increment("k", ttl=600) == 2
    assert 150 < await store.ttl("k") <= 200
    clock.advance(201)
    assert await store.increment("k", ttl=600) == 1
    assert 550 < await store.ttl("k") <= 600


async def test_increment_keeps_a_live_key_without_expiry(store: Any) -> None:
    """A live key that never expires goes on so, whatever ttl an increment names."""
    await store.set("k", b"5")
    assert await store.increment("k", ttl=60) == 6
    assert await store.increment_many({"k": 1}, ttl=60) == {"k": 7}
    assert await store.ttl("k") == math.inf


async def test_increment_many_counts_in_fixed_windows(store: Any, clock: ServerClock) -> None:
    """increment_many applies its ttl to the keys it makes, and to no other."""
    await store.increment_many({"a": 1}, ttl=600)
    clock.advance(400)
    assert await store.increment_many({"a": 1, "b": 1}, ttl=600) == {"a": 2, "b": 1}
    assert 150 < await store.ttl("a") <= 200
    assert 550 < await store.ttl("b") <= 600
    clock.advance(300)
    assert await store.increment_many({"a": 1, "b": 1}, ttl=600) == {"a": 1, "b": 2}


async def test_compare_and_swap_keeps_the_expiry(store: Any) -> None:
    """CAS keeps the expiry unless it is given one; update() likewise."""
    await store.set("k", b"1", ttl=60)
    await store.compare_and_swap("k", b"1", b"2")
    assert 30 < await store.ttl("k") <= 60
    await store.compare_and_swap("k", b"2", b"3", ttl=600)
    assert 570 < await store.ttl("k") <= 600
    await store.update("k", lambda old: old + b"!")
    assert 570 < await store.ttl("k") <= 600
    await store.update("k", lambda old: old + b"!", ttl=50)
    assert 20 < await store.ttl("k") <= 50


async def test_compare_and_swap_of_an_absent_key_takes_the_ttl(store: Any) -> None:
    """CAS(None) makes the key with the ttl it is given, or with none."""
    await store.compare_and_swap("a", None, b"1", ttl=60)
    await store.compare_and_swap("b", None, b"1")
    assert 30 < await store.ttl("a") <= 60
    assert await store.ttl("b") == math.inf


async def test_get_and_set_clears_the_ttl(store: Any) -> None:
    """get_and_set clears the expiry unless it is given one."""
    await store.set("k", b"1", ttl=60)
    assert await store.get_and_set("k", b"2") == b"1"
    assert await store.ttl("k") == math.inf
    assert await store.get_and_set("k", b"3", ttl=60) == b"2"
    assert 30 < await store.ttl("k") <= 60


@pytest.mark.parametrize("past", [timedelta(seconds=1), timedelta(days=365 * 900)])
async def test_moment_already_past(make_store: Any, clock: ServerClock, past: timedelta) -> None:
    """A moment already past by the server's clock ends the key; the call counts as done."""
    store = await make_store(ttl_cleanup_strategy=MANUAL)
    moment = clock.now() - past
    version = await store.set("k", b"1")
    assert await store.set("k", b"2", expires_at=moment) > version
    assert await store.exists("k") is False
    await store.set("k", b"3")
    assert await store.expire_at("k", moment) is True
    assert await store.exists("k") is False
    assert isinstance(await store.set_at("absent", b"4", moment), int)
    assert await store.exists("absent") is False


async def test_far_moments(store: Any) -> None:
    """The last moment that Python knows is a moment like any other."""
    moment = datetime.max.replace(tzinfo=UTC)
    await store.set("k", b"v", expires_at=moment)
    assert (await store.get_entry("k")).expires_at == moment
    assert await store.ttl("k") > 1e11


async def test_tiny_ttl(make_store: Any, clock: ServerClock) -> None:
    """The smallest ttl is a microsecond, never "at once for ever": the key ends."""
    store = await make_store(ttl_cleanup_strategy=MANUAL)
    await store.set("k", b"v", ttl=1e-9)
    clock.advance(0.001)
    assert await store.exists("k") is False


async def test_moments_beyond_python(store: Any, peer: Peer) -> None:
    """An expiry that others set beyond Python's years is read as the nearest moment there is."""
    await store.set("k", b"v")
    peer.run("UPDATE kv_store SET expires_at = 'infinity'")
    assert (await store.get_entry("k")).expires_at == datetime.max.replace(tzinfo=UTC)
    assert await store.get("k") == b"v"
    assert await store.ttl("k") == math.inf


# -- a statement that waited -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        (lambda s: s.increment("k", 2), 2),
        (lambda s: s.increment("k", 2, maximum=3), IncrementResult(2, applied=True)),
        (lambda s: s.increment_many({"k": 2}), {"k": 2}),
    ],
    ids=["increment", "increment within", "increment_many"],
)
async def test_increment_that_waited_past_the_expiry(
    make_store: Any, clock: ServerClock, peer: Peer, witness: Peer, call: Any, answer: Any
) -> None:
    """An increment that waited for a row until that had expired starts again, so that its sum can
    be seen.
    """
    store = await make_store(ttl_cleanup_strategy=MANUAL)
    await store.set("k", b"5", ttl=60)
    with peer.conn.transaction():
        peer.run("SELECT FROM kv_store WHERE key = 'k' FOR UPDATE")
        waiting = asyncio.ensure_future(call(store))
        await witness.until_waiting()
        clock.advance(61)
    assert await waiting == answer
    assert await store.get("k") == b"2"


async def test_a_read_waits_for_nobody(store: Any, peer: Peer) -> None:
    """A row that another transaction holds is read as it was."""
    await store.set("k", b"1")
    with peer.conn.transaction():
        peer.run("UPDATE kv_store SET value = 'x'")
        assert await store.get("k") == b"1"
        assert await store.get_many(["k"]) == {"k": b"1"}
        assert await store.count() == 1


async def test_rows_of_others_without_any_times(store: Any, peer: Peer) -> None:
    """A row that another program inserted with key and value only is a key like any other."""
    await in_thread(peer.run, "INSERT INTO kv_store (key, value) VALUES ('k', 'v')")
    entry = await store.get_entry("k")
    assert (entry.value, entry.expires_at) == (b"v", None)
    assert entry.version > 0
