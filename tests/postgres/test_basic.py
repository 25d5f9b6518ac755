"""One key: written, read, removed. What each call returns and when."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

import pgkv
from pgkv.testing import ServerClock
from pgkv.types import PoolStats
from tests.peers import Peer

BYTES = bytes(range(256))


async def test_set_then_get(store: Any) -> None:
    """What was set is what get returns, byte for byte."""
    await store.set("k", BYTES)
    assert await store.get("k") == BYTES


@pytest.mark.parametrize("value", [b"", bytearray(b"\0\xff"), memoryview(b"abc"), "žluť 🐎"])
async def test_values_come_back_as_bytes(store: Any, value: Any) -> None:
    """bytes, bytearray, memoryview and str go in; bytes come out; an empty value is a value."""
    await store.set("k", value)
    found = await store.get("k")
    assert type(found) is bytes
    assert found == (value.encode() if isinstance(value, str) else bytes(value))
    assert await store.exists("k")


@pytest.mark.parametrize(
    "key",
    ["k", " ", "a'b\"c;--", "ключ", "\U0001f40e", "\U0010ffff", "\x01\n\t\\", "%_", "k" * 1024],
)
async def test_any_text_is_a_key(store: Any, key: str) -> None:
    """A key is any text without NUL, and comes back as it went in."""
    await store.set(key, b"v")
    assert await store.get(key) == b"v"
    assert await store.keys() == [key]
    assert await store.delete(key)


async def test_large_value(store: Any) -> None:
    """Megabytes travel like bytes do."""
    value = BYTES * 20_000
    await store.set("k", value)
    assert await store.get("k") == value


async def test_get_of_an_absent_key(store: Any) -> None:
    """An absent key is None, or the default given, whatever that is."""
    assert await store.get("k") is None
    assert await store.get("k", b"d") == b"d"
    assert await store.get("k", 7) == 7


async def test_get_or_raise(store: Any) -> None:
    """get_or_raise returns the value, or raises a KeyError that names the key."""
    await store.set("there", b"v")
    assert await store.get_or_raise("there") == b"v"
    with pytest.raises(pgkv.NotFoundError, match="gone") as caught:
        await store.get_or_raise("gone")
    assert isinstance(caught.value, KeyError)


async def test_get_string(store: Any) -> None:
    """get_string decodes UTF-8; None without the key; other bytes are a SerializationError."""
    await store.set("text", "žluť")
    await store.set("bytes", b"\xff\xfe")
    assert await store.get_string("text") == "žluť"
    assert await store.get_string("absent") is None
    with pytest.raises(pgkv.SerializationError, match="bytes"):
        await store.get_string("bytes")


async def test_get_entry(store: Any, clock: ServerClock) -> None:
    """An entry carries value, version, expiry and the server's times."""
    before = clock.now()
    version = await store.set("k", b"v", ttl=60)
    entry = await store.get_entry("k")
    assert (entry.key, entry.value, entry.version) == ("k", b"v", version)
    assert before <= entry.created_at <= entry.updated_at <= entry.read_at <= clock.now()
    assert entry.expires_at - entry.created_at == pytest.approx(
        timedelta(seconds=60), abs=timedelta(milliseconds=1)
    )
    assert 30 < entry.ttl() <= 60
    assert not entry.is_expired()


async def test_get_entry_without_expiry(store: Any) -> None:
    """An entry that never expires has no expires_at, and its ttl is infinite."""
    await store.set("k", b"v")
    entry = await store.get_entry("k")
    assert entry.expires_at is None
    assert entry.ttl() == math.inf
    assert not entry.is_expired()
    assert await store.get_entry("absent") is None


async def test_times_of_an_entry(store: Any, clock: ServerClock) -> None:
    """created_at stays while the row lives; updated_at moves with each write of the value."""
    await store.set("k", b"1")
    first = await store.get_entry("k")
    clock.advance(10)
    await store.set("k", b"2")
    second = await store.get_entry("k")
    assert second.created_at == first.created_at
    assert second.updated_at - first.updated_at >= timedelta(seconds=10)


async def test_created_at_begins_anew_with_the_key(store: Any, clock: ServerClock) -> None:
    """A key that is written after its time has passed is a new one."""
    await store.set("k", b"1", ttl=60)
    first = await store.get_entry("k")
    clock.advance(61)
    await store.set("k", b"2")
    assert (await store.get_entry("k")).created_at > first.created_at


async def test_expire_and_persist_leave_updated_at_alone(store: Any, clock: ServerClock) -> None:
    """Changing the expiry is no write of the value: neither updated_at nor version moves."""
    await store.set("k", b"1")
    first = await store.get_entry("k")
    clock.advance(10)
    assert await store.expire("k", 60)
    assert await store.persist("k")
    assert await store.expire_at("k", clock.now() + timedelta(seconds=60))
    assert await store.get_and_touch("k", 60) == b"1"
    assert await store.expire_many(["k"], 60) == 1
    last = await store.get_entry("k")
    assert (last.updated_at, last.version) == (first.updated_at, first.version)


async def test_set_ex(store: Any, clock: ServerClock) -> None:
    """set_ex writes with a ttl and returns the version."""
    version = await store.set_ex("k", b"v", 60)
    assert (await store.get_entry("k")).version == version
    assert 30 < await store.ttl("k") <= 60


async def test_set_at(store: Any, clock: ServerClock) -> None:
    """set_at writes with a moment at which the key ends, in any time zone."""
    moment = clock.now() + timedelta(seconds=60)
    version = await store.set_at("k", b"v", moment.astimezone(timezone(timedelta(hours=5))))
    entry = await store.get_entry("k")
    assert entry.version == version
    assert entry.expires_at == moment
    assert entry.expires_at.utcoffset() == timedelta(0)


async def test_ttl_as_timedelta(store: Any) -> None:
    """A duration may be a timedelta."""
    await store.set("k", b"v", ttl=timedelta(minutes=2))
    assert 90 < await store.ttl("k") <= 120


async def test_set_nx(store: Any) -> None:
    """set_nx writes where there is no key, and leaves one that is there as it is."""
    assert await store.set_nx("k", b"1", ttl=60) is True
    assert await store.set_nx("k", b"2") is False
    assert await store.get("k") == b"1"
    assert 30 < await store.ttl("k") <= 60


async def test_set_nx_ex(store: Any) -> None:
    """set_nx_ex is set_nx with a ttl."""
    assert await store.set_nx_ex("k", b"1", 60) is True
    assert await store.set_nx_ex("k", b"2", 600) is False
    assert await store.get("k") == b"1"
    assert 30 < await store.ttl("k") <= 60


async def test_set_xx(store: Any) -> None:
    """set_xx writes only where the key is there, and clears or sets its ttl."""
    assert await store.set_xx("k", b"1") is False
    assert await store.get("k") is None
    await store.set("k", b"1", ttl=60)
    assert await store.set_xx("k", b"2") is True
    assert await store.ttl("k") == math.inf
    assert await store.set_xx("k", b"3", ttl=60) is True
    assert 30 < await store.ttl("k") <= 60
    assert await store.get("k") == b"3"


async def test_delete(store: Any) -> None:
    """delete tells whether the key was there."""
    await store.set("k", b"v")
    assert await store.delete("k") is True
    assert await store.delete("k") is False
    assert await store.get("k") is None


async def test_delete_if_version(store: Any) -> None:
    """delete with if_version removes that version and no other."""
    version = await store.set("k", b"v")
    assert await store.delete("k", if_version=version + 1) is False
    assert await store.delete("k", if_version=version) is True
    assert await store.delete("k", if_version=version) is False


async def test_exists(store: Any) -> None:
    """exists tells whether the key is there."""
    assert await store.exists("k") is False
    await store.set("k", b"")
    assert await store.exists("k") is True


async def test_get_and_touch(store: Any) -> None:
    """get_and_touch returns the value and renews its ttl; None without the key."""
    assert await store.get_and_touch("k", 60) is None
    await store.set("k", b"v", ttl=50)
    assert await store.get_and_touch("k", 100) == b"v"
    assert 70 < await store.ttl("k") <= 100


async def test_if_version(store: Any) -> None:
    """set with if_version writes that version's successor, or nothing and returns None."""
    first = await store.set("k", b"1")
    second = await store.set("k", b"2", if_version=first)
    assert second > first
    assert await store.set("k", b"3", if_version=first) is None
    assert await store.get("k") == b"2"


async def test_if_version_zero_means_absent(store: Any) -> None:
    """if_version=0 writes only where there is no key."""
    version = await store.set("k", b"1", if_version=0)
    assert version > 0
    assert await store.set("k", b"2", if_version=0) is None
    assert await store.get("k") == b"1"


async def test_if_version_never_creates(store: Any) -> None:
    """A version that was seen does not match a key that is gone."""
    version = await store.set("k", b"1")
    await store.delete("k")
    assert await store.set("k", b"2", if_version=version) is None
    assert await store.exists("k") is False


async def test_if_version_with_expiry(store: Any, clock: ServerClock) -> None:
    """if_version goes with ttl, expires_at and keep_ttl; without them the ttl is cleared."""
    version = await store.set("k", b"1", ttl=60)
    version = await store.set("k", b"2", keep_ttl=True, if_version=version)
    assert 30 < await store.ttl("k") <= 60
    version = await store.set("k", b"3", if_version=version)
    assert await store.ttl("k") == math.inf
    version = await store.set("k", b"4", ttl=50, if_version=version)
    assert 20 < await store.ttl("k") <= 50
    moment = clock.now() + timedelta(seconds=90)
    await store.set("k", b"5", expires_at=moment, if_version=version)
    assert (await store.get_entry("k")).expires_at == moment


async def test_expire_if_version(store: Any) -> None:
    """expire with if_version touches that version only, and does not change it."""
    version = await store.set("k", b"v")
    assert await store.expire("k", 60, if_version=version + 1) is False
    assert await store.ttl("k") == math.inf
    assert await store.expire("k", 60, if_version=version) is True
    assert await store.set("k", b"w", if_version=version) is not None


async def test_persist(store: Any) -> None:
    """persist removes the expiry; True when the key exists, also without one before."""
    assert await store.persist("k") is False
    await store.set("k", b"v", ttl=60)
    assert await store.persist("k") is True
    assert await store.ttl("k") == math.inf
    assert await store.persist("k") is True


async def test_ttl(store: Any) -> None:
    """ttl is seconds left, inf without an expiry, None without the key."""
    assert await store.ttl("k") is None
    await store.set("k", b"v")
    assert await store.ttl("k") == math.inf
    assert await store.expire("k", 3600.5) is True
    left = await store.ttl("k")
    assert isinstance(left, float)
    assert 3570 < left <= 3600.5


async def test_expire_of_an_absent_key(store: Any) -> None:
    """expire and expire_at of an absent key are False and make none."""
    assert await store.expire("k", 60) is False
    assert await store.expire_at("k", datetime(2100, 1, 1, tzinfo=UTC)) is False
    assert await store.exists("k") is False


async def test_ping(store: Any) -> None:
    """ping returns the seconds of a round trip."""
    assert 0 < await store.ping() < 30
    assert 0 < await store.ping(timeout=30) < 30


async def test_now(store: Any, clock: ServerClock) -> None:
    """now is the server's clock."""
    clock.advance(3600)
    assert abs((await store.now() - clock.now()).total_seconds()) < 60


async def test_pool_stats(make_store: Any) -> None:
    """pool_stats counts connections, and sends nothing."""
    store = await make_store(pool_max_size=3)
    await store.set("k", b"v")
    assert store.pool_stats() == PoolStats(1, 1, 0, 3)
    async with store.transaction() as tx:
        await tx.get("k")
        busy = store.pool_stats()
        with pytest.raises(pgkv.TransactionError, match="ask the store it came from"):
            tx.pool_stats()
    assert (busy.size, busy.idle) == (1, 0)


async def test_version_is_what_the_row_has(store: Any, peer: Peer) -> None:
    """set returns the version that the row has in the table."""
    version = await store.set("k", b"v")
    assert peer.one("SELECT version FROM kv_store WHERE key = 'k'") == version
