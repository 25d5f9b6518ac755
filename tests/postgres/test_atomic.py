"""Counters, compare-and-swap, exchange, update and versions: what one caller alone sees."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any
from unittest.mock import ANY

import pytest

import pgkv
from pgkv.testing import ServerClock
from pgkv.types import CasStatus, IncrementResult
from tests.peers import Peer

MAX, MIN = 2**63 - 1, -(2**63)


# -- integers --------------------------------------------------------------------------------


async def test_increment(store: Any) -> None:
    """increment adds to the decimal text of an integer; an absent key counts as 0."""
    assert await store.increment("k") == 1
    assert await store.increment("k", 41) == 42
    assert await store.increment("k", -50) == -8
    assert await store.increment("k", 0) == -8
    assert await store.get("k") == b"-8"


async def test_decrement(store: Any) -> None:
    """decrement subtracts."""
    assert await store.decrement("k") == -1
    assert await store.decrement("k", -11) == 10
    assert await store.decrement("new", 5, ttl=60) == -5
    assert 30 < await store.ttl("new") <= 60


async def test_integers_over_the_whole_range(store: Any) -> None:
    """Sums are exact over the signed 64-bit range, its ends included."""
    assert await store.increment("k", MAX) == MAX
    assert await store.increment("k", MIN) == -1
    assert await store.increment("k", -MAX) == MIN
    assert await store.get("k") == b"-9223372036854775808"
    assert await store.increment("k", MAX) == -1


@pytest.mark.parametrize(("value", "delta"), [(MAX, 1), (MIN, -1), (MAX, MAX), (MIN, MIN)])
async def test_overflow_changes_nothing(store: Any, value: int, delta: int) -> None:
    """A sum beyond 64 bits raises and leaves value, version and expiry as they were."""
    await store.set("k", str(value), ttl=60)
    before = await store.get_entry("k")
    with pytest.raises(pgkv.InvalidValueError, match="64-bit range; nothing was changed"):
        await store.increment("k", delta)
    after = await store.get_entry("k")
    assert (after.value, after.version, after.expires_at) == (
        before.value,
        before.version,
        before.expires_at,
    )


@pytest.mark.parametrize(
    "value",
    [
        b"", b"word", b" 7 ", b"7\n", b"+7", b"1_000", b"0x1F", b"1e3", b"1.0", b"--1", b"-", b"\xff",
        b"\xd9\xa1", b"1\x002", b"12345678901234567890", b"9" * 19, b"1\\0",
    ],
)  # fmt: skip
async def test_what_is_no_integer(store: Any, value: bytes) -> None:
    """Only -?[0-9]{1,19} within 64 bits counts as an integer; anything else raises, unchanged."""
    await store.set("k", value)
    with pytest.raises(pgkv.InvalidValueError, match="nothing was changed") as caught:
        await store.increment("k")
    assert caught.value.__cause__ is None
    assert await store.get("k") == value


@pytest.mark.parametrize(("value", "total"), [(b"007", 8), (b"-0", 1), (b"-1", 0)])
async def test_what_is_an_integer(store: Any, value: bytes, total: int) -> None:
    """Leading zeros and a negative zero are integers."""
    await store.set("k", value)
    assert await store.increment("k") == total
    assert await store.get("k") == b"%d" % total


async def test_bounds(store: Any) -> None:
    """A sum beyond a bound is refused, unchanged; an absent key counts as 0."""
    within = {"minimum": 0, "maximum": 10}
    assert await store.increment("k", 4, **within) == IncrementResult(4, applied=True)
    before = await store.get_entry("k")
    for delta in (7, -5, MAX, MIN):
        assert await store.increment("k", delta, **within) == IncrementResult(4, applied=False)
    assert await store.get_entry("k") == replace(before, read_at=ANY)
    assert await store.increment("k", 6, **within) == IncrementResult(10, applied=True)
    assert await store.increment("new", 11, **within) == IncrementResult(0, applied=False)
    assert await store.exists("new") is False
    assert await store.increment("k", -30, maximum=10) == IncrementResult(-20, applied=True)
    assert await store.increment("new", ttl=60, **within) == IncrementResult(1, applied=True)
    assert 30 < await store.ttl("new") <= 60


async def test_a_sum_that_returns_within_bounds(store: Any) -> None:
    """A delta that is itself beyond a bound is added where the sum is within."""
    await store.set("k", "-50", ttl=60)
    assert await store.increment("k", 60, maximum=20) == IncrementResult(10, applied=True)
    assert 30 < await store.ttl("k") <= 60


async def test_increment_if_it_exists(store: Any) -> None:
    """With only_if_exists no key is created; a live one is counted, and keeps its expiry."""
    assert await store.increment("k", only_if_exists=True) is None
    bounded = await store.increment("k", only_if_exists=True, maximum=5)
    assert bounded == IncrementResult(None, applied=False)
    assert await store.exists("k") is False
    await store.set("k", "41", ttl=60)
    assert await store.increment("k", only_if_exists=True) == 42
    assert 30 < await store.ttl("k") <= 60
    bounded = await store.increment("k", only_if_exists=True, maximum=42)
    assert bounded == IncrementResult(42, applied=False)


@pytest.mark.parametrize("options", [{"only_if_exists": True}, {"minimum": 0}, {"maximum": 0}])
async def test_bounds_of_what_is_no_integer(store: Any, options: Any) -> None:
    """Overflow without a bound on that side, and what is no integer, raise and change nothing."""
    await store.set("k", b"word")
    with pytest.raises(pgkv.InvalidValueError, match="not a signed 64-bit integer"):
        await store.increment("k", **options)
    assert await store.get("k") == b"word"
    await store.set("k", str(MIN if "maximum" in options else MAX))
    with pytest.raises(pgkv.InvalidValueError, match="64-bit range; nothing was changed"):
        await store.increment("k", -1 if "maximum" in options else 1, **options)


async def test_bounds_in_a_pipeline(store: Any) -> None:
    """Bounded increments and appends travel in a pipeline, also in an atomic one."""
    for atomic in (False, True):
        async with store.pipeline(atomic=atomic) as p:
            handles = [p.increment("k", maximum=3) for _ in range(3)]
            absent = p.increment("none", only_if_exists=True)
            text = p.append("text", b"ab")
        assert [h.result().value for h in handles] == ([3] * 3 if atomic else [1, 2, 3])
        assert absent.result() is None
        assert text.result() == (4 if atomic else 2)


async def test_bounds_hold_against_many(store: Any) -> None:
    """Of 30 concurrent sales of a stock of 10 ten are sold, and the stock ends at 0."""
    await store.set("k", "10")
    sales = await asyncio.gather(*(store.increment("k", -1, minimum=0) for _ in range(30)))
    assert sorted(sale.value for sale in sales if sale) == list(range(10))
    assert {sale.value for sale in sales if not sale} == {0}
    assert await store.get("k") == b"0"


async def test_append(store: Any, make_store: Any) -> None:
    """append adds bytes and tells the length; a ttl applies to a key that it creates."""
    assert await store.append("k", b"ab", ttl=60) == 2
    assert await store.append("k", "\u00e7", ttl=900) == 4
    assert await store.get("k") == "ab\u00e7".encode()
    assert 30 < await store.ttl("k") <= 60
    small = await make_store(max_value_size=5)
    version = (await store.get_entry("k")).version
    with pytest.raises(pgkv.InvalidValueError, match=r"exceed max_value_size; nothing was changed"):
        await small.append("k", b"12")
    assert (await store.get_entry("k")).version == version
    assert await small.append("k", b"1") == 5


async def test_appends_lose_nothing(store: Any) -> None:
    """Concurrent appends are all in the value, each in one piece."""
    pieces = [b"<%d>" % n for n in range(30)]
    lengths = await asyncio.gather(*(store.append("k", piece) for piece in pieces))
    value = await store.get("k")
    assert max(lengths) == len(value)
    assert all(value[:at].endswith(piece) for at, piece in zip(lengths, pieces, strict=True))


# -- compare and swap ------------------------------------------------------------------------


async def test_compare_and_swap(store: Any) -> None:
    """CAS writes where the value is the expected one, and tells the new version."""
    await store.set("k", b"1")
    done = await store.compare_and_swap("k", b"1", b"2")
    assert done
    assert done.is_success
    assert not done.is_mismatch
    assert not done.is_not_found
    entry = await store.get_entry("k")
    assert (done.status, done.current, done.version) == (CasStatus.SUCCESS, b"2", entry.version)


async def test_compare_and_swap_mismatch(store: Any) -> None:
    """On a mismatch CAS tells what it found, and changes nothing."""
    version = await store.set("k", b"1")
    found = await store.compare_and_swap("k", b"0", b"2")
    assert not found
    assert found.is_mismatch
    assert (found.status, found.current, found.version) == (CasStatus.MISMATCH, b"1", version)
    assert (await store.get_entry("k")).version == version


async def test_compare_and_swap_not_found(store: Any) -> None:
    """A value expected of an absent key is NOT_FOUND, and makes no key."""
    found = await store.compare_and_swap("k", b"1", b"2")
    assert not found
    assert found.is_not_found
    assert (found.current, found.version) == (None, None)
    assert await store.exists("k") is False


async def test_compare_and_swap_of_an_absent_key(store: Any) -> None:
    """expected=None writes where there is no key; otherwise it tells what there is."""
    done = await store.compare_and_swap("k", None, b"")
    assert done.is_success
    again = await store.compare_and_swap("k", None, b"2")
    assert (again.status, again.current, again.version) == (CasStatus.MISMATCH, b"", done.version)


async def test_compare_and_swap_with_text(store: Any) -> None:
    """Values of CAS may be str; an empty one is not None."""
    await store.set("k", "")
    assert await store.compare_and_swap("k", "", "ž")
    assert await store.compare_and_swap("k", "ž", b"")
    assert not await store.compare_and_swap("k", None, b"x")


async def test_compare_and_swap_to_the_same_value(store: Any) -> None:
    """Swapping a value for itself is a write: the version rises."""
    version = await store.set("k", b"1")
    done = await store.compare_and_swap("k", b"1", b"1")
    assert done.is_success
    assert done.version > version


async def test_compare_and_delete(store: Any) -> None:
    """compare_and_delete removes the key only while it holds the expected value."""
    await store.set("k", b"1")
    assert await store.compare_and_delete("k", b"2") is False
    assert await store.compare_and_delete("k", "1") is True
    assert await store.compare_and_delete("k", b"1") is False


async def test_get_and_set(store: Any) -> None:
    """get_and_set returns the value before, None without one, an empty one as empty."""
    assert await store.get_and_set("k", b"") is None
    assert await store.get_and_set("k", b"2") == b""
    assert await store.get("k") == b"2"


async def test_get_and_delete(store: Any) -> None:
    """get_and_delete removes the key and returns what it held."""
    assert await store.get_and_delete("k") is None
    await store.set("k", b"")
    assert await store.get_and_delete("k") == b""
    assert await store.exists("k") is False


# -- update ----------------------------------------------------------------------------------


async def test_update(store: Any) -> None:
    """update writes what fn makes of the current value (None without one) and returns it."""
    assert await store.update("k", lambda old: b"1" if old is None else b"?") == b"1"
    assert await store.update("k", lambda old: old + b"2") == b"12"
    assert await store.update("k", lambda _: "text") == b"text"


async def test_update_calls_again_after_a_change(store: Any, peer: Peer) -> None:
    """When the value changed in between, fn is called again with the new one."""
    await store.set("k", b"0")
    seen: list[bytes] = []

    def fn(old: bytes) -> bytes:
        seen.append(old)
        if len(seen) < 3:
            peer.run("UPDATE kv_store SET value = %s, version = version + 1", b"%d" % len(seen))
        return old + b"!"

    assert await store.update("k", fn) == b"2!"
    assert seen == [b"0", b"1", b"2"]


async def test_update_notices_a_value_that_came_back(store: Any, peer: Peer) -> None:
    """A value changed and changed back in between counts as changed."""
    await store.set("k", b"0")
    calls = []

    def fn(old: bytes) -> bytes:
        calls.append(old)
        if len(calls) == 1:
            peer.run("UPDATE kv_store SET version = version + 2")
        return b"1"

    await store.update("k", fn)
    assert calls == [b"0", b"0"]


async def test_update_of_a_key_deleted_or_made_in_between(store: Any, peer: Peer) -> None:
    """update follows the key out of being and into it."""
    await store.set("k", b"0")
    seen: list[bytes | None] = []

    def fn(old: bytes | None) -> bytes:
        seen.append(old)
        if len(seen) == 1:
            peer.run("DELETE FROM kv_store")
        if len(seen) == 2:
            peer.run("INSERT INTO kv_store (key, value) VALUES ('k', 'x')")
        return b"new"

    assert await store.update("k", fn) == b"new"
    assert seen == [b"0", None, b"x"]


async def test_update_gives_up(store: Any, peer: Peer) -> None:
    """After its attempts update raises a retryable ConflictError and has changed nothing."""
    await store.set("k", b"0")
    calls = []

    def fn(old: bytes) -> bytes:
        calls.append(old)
        peer.run("UPDATE kv_store SET value = 'theirs', version = version + 1")
        return b"ours"

    with pytest.raises(pgkv.ConflictError, match="3 attempts") as caught:
        await store.update("k", fn, attempts=3)
    assert caught.value.retryable
    assert len(calls) == 3
    assert await store.get("k") == b"theirs"


async def test_update_passes_exceptions_on(store: Any) -> None:
    """An exception of fn reaches the caller, and nothing is written."""
    await store.set("k", b"0")

    def fn(_: bytes) -> bytes:
        raise LookupError("fn's own")

    with pytest.raises(LookupError, match="fn's own"):
        await store.update("k", fn)
    assert await store.get("k") == b"0"


# -- versions --------------------------------------------------------------------------------


async def test_every_write_raises_the_version(store: Any) -> None:
    """The version rises strictly with every write of the value, also of equal bytes."""
    versions = [await store.set("k", b"1")]

    async def after(_: Any) -> None:
        versions.append((await store.get_entry("k")).version)

    await after(await store.set("k", b"1"))
    await after(await store.set("k", b"1", keep_ttl=True))
    await after(await store.set_xx("k", b"1"))
    await after(await store.set_many({"k": b"1"}))
    await after(await store.increment("k", 0))
    await after(await store.increment_many({"k": 0}))
    await after(await store.compare_and_swap("k", b"1", b"1"))
    await after(await store.get_and_set("k", b"1"))
    await after(await store.update("k", lambda old: old))
    assert sorted(set(versions)) == versions


async def test_a_denied_write_leaves_the_version(store: Any) -> None:
    """What does not write does not change the version."""
    version = await store.set("k", b"1")
    await store.set_nx("k", b"2")
    await store.compare_and_swap("k", b"0", b"2")
    await store.compare_and_swap("k", None, b"2")
    await store.set("k", b"2", if_version=version + 1)
    await store.set("k", b"2", if_version=0)
    assert (await store.get_entry("k")).version == version


async def test_the_version_after_a_removal_is_new(store: Any, clock: ServerClock) -> None:
    """After delete, expiry or truncation the next row's version is none that was seen before."""
    seen = {await store.set("k", b"1")}
    for remove in (
        lambda: store.delete("k"),
        lambda: store.get_and_delete("k"),
        store.clear,
        store.truncate,
        store.recreate_table,
    ):
        await remove()
        version = await store.set("k", b"1", ttl=60)
        assert version not in seen
        seen.add(version)
    clock.advance(61)
    version = await store.set("k", b"1")
    assert version not in seen


async def test_the_version_is_the_clock_or_one_more(store: Any, clock: ServerClock) -> None:
    """A new row starts at the server's clock in microseconds; a clock behind adds one."""
    before = clock.now().timestamp()
    first = await store.set("k", b"1")
    assert before * 1e6 - 10 <= first <= clock.now().timestamp() * 1e6 + 10
    clock.advance(-60)
    assert await store.set("k", b"2") == first + 1
    assert await store.set("k", b"3", if_version=first + 1) == first + 2
    assert await store.set_many({"k": b"4"}) == 1
    assert (await store.get_entry("k")).version == first + 3
