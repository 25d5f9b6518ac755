"""Races, arranged: another client holds the row, and the statement has to wait and look again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

import pgkv
from pgkv._ops.op import Op, Raced
from pgkv.types import CasStatus, IncrementResult
from tests.peers import Peer
from tests.variants import Variant


@pytest.fixture
def race(store: Any, peer: Peer, witness: Peer) -> Callable[[str, Callable[[Any], Any]], Any]:
    """`await race(change, call)` makes the peer's uncommitted change, starts the call, commits when
    the call waits for it, and returns the call's answer.
    """

    async def run(change: str, call: Callable[[Any], Any], *, commit: bool = True) -> Any:
        peer.conn.autocommit = False
        peer.run(change)
        waiting = asyncio.ensure_future(call(store))
        await witness.until_waiting()
        if commit:
            peer.conn.commit()
        else:
            peer.conn.rollback()
        return await waiting

    return run


UPDATE = "UPDATE kv_store SET value = 'theirs', version = version + 1 WHERE key = 'k'"
INSERT = "INSERT INTO kv_store (key, value) VALUES ('k', 'theirs')"
DELETE = "DELETE FROM kv_store WHERE key = 'k'"


async def test_cas_that_meets_a_change(race: Any, store: Any) -> None:
    """A CAS whose row changes while it waits is a mismatch that shows the new value, never the
    expected one.
    """
    await store.set("k", b"1")
    found = await race(UPDATE, lambda s: s.compare_and_swap("k", b"1", b"2"))
    assert (found.status, found.current) == (CasStatus.MISMATCH, b"theirs")
    assert await store.get("k") == b"theirs"


async def test_cas_that_meets_a_write_of_the_same_value(race: Any, store: Any) -> None:
    """A CAS whose row is written while it waits, but keeps the expected value, succeeds."""
    await store.set("k", b"1")
    same = "UPDATE kv_store SET value = '1', version = version + 1 WHERE key = 'k'"
    assert (await race(same, lambda s: s.compare_and_swap("k", b"1", b"2"))).is_success


async def test_cas_of_none_that_meets_an_insert(race: Any, store: Any) -> None:
    """A CAS(None) that loses to an insert is a mismatch with the winner's value."""
    found = await race(INSERT, lambda s: s.compare_and_swap("k", None, b"2"))
    assert (found.status, found.current) == (CasStatus.MISMATCH, b"theirs")


async def test_cas_that_meets_a_delete(race: Any, store: Any) -> None:
    """A CAS whose row is deleted while it waits finds none."""
    await store.set("k", b"1")
    found = await race(DELETE, lambda s: s.compare_and_swap("k", b"1", b"2"))
    assert found.is_not_found


async def test_get_and_set_that_meets_an_insert(race: Any, store: Any) -> None:
    """get_and_set on an absent key that is inserted meanwhile returns what it replaced."""
    assert await race(INSERT, lambda s: s.get_and_set("k", b"2")) == b"theirs"
    assert await store.get("k") == b"2"


async def test_get_and_set_that_meets_a_change(race: Any, store: Any) -> None:
    """get_and_set returns the value it replaced, not the one its snapshot shows."""
    await store.set("k", b"1")
    assert await race(UPDATE, lambda s: s.get_and_set("k", b"2")) == b"theirs"


async def test_get_and_set_that_meets_a_delete(race: Any, store: Any) -> None:
    """get_and_set whose row is deleted meanwhile replaced nothing."""
    await store.set("k", b"1")
    assert await race(DELETE, lambda s: s.get_and_set("k", b"2")) is None
    assert await store.get("k") == b"2"


async def test_get_and_delete_that_meets_a_change(race: Any, store: Any) -> None:
    """get_and_delete returns the value it removed, not the one its snapshot shows."""
    await store.set("k", b"1")
    assert await race(UPDATE, lambda s: s.get_and_delete("k")) == b"theirs"


async def test_set_nx_that_meets_an_insert(race: Any, store: Any) -> None:
    """set_nx that waits for another's insert loses to it."""
    assert await race(INSERT, lambda s: s.set_nx("k", b"2")) is False
    assert await store.get("k") == b"theirs"


async def test_set_nx_that_meets_a_rollback(race: Any, store: Any) -> None:
    """set_nx that waits for another's insert wins when that is undone."""
    assert await race(INSERT, lambda s: s.set_nx("k", b"2"), commit=False) is True
    assert await store.get("k") == b"2"


async def test_if_version_that_meets_a_change(race: Any, store: Any) -> None:
    """if_version judges the newest row, not the one its snapshot shows."""
    version = await store.set("k", b"1")
    assert await race(UPDATE, lambda s: s.set("k", b"2", if_version=version)) is None
    assert await store.get("k") == b"theirs"


async def test_increment_that_meets_a_change(race: Any, store: Any) -> None:
    """increment adds to the newest value."""
    await store.set("k", b"1")
    assert (
        await race(
            "UPDATE kv_store SET value = '40' WHERE key = 'k'", lambda s: s.increment("k", 2)
        )
        == 42
    )


async def test_bounds_that_meet_a_change(race: Any, store: Any) -> None:
    """A bounded increment judges the newest value, and a refusal shows one at which it was due."""
    await store.set("k", b"9")
    change = "UPDATE kv_store SET value = '10' WHERE key = 'k'"
    refused = await race(change, lambda s: s.increment("k", maximum=10))
    assert (refused.value, refused.applied) == (10, False)
    assert not refused
    change = "UPDATE kv_store SET value = '4' WHERE key = 'k'"
    applied = await race(change, lambda s: s.increment("k", 5, maximum=10))
    assert (applied.value, bool(applied)) == (9, True)


async def test_bounds_that_meet_an_insert(race: Any) -> None:
    """A bounded increment of a key inserted meanwhile is refused by the value it then has."""
    insert = "INSERT INTO kv_store (key, value) VALUES ('k', '10')"
    assert await race(insert, lambda s: s.increment("k", maximum=10)) == IncrementResult(10, False)


async def test_bounds_that_meet_a_delete(race: Any, store: Any) -> None:
    """A bounded increment whose key is deleted meanwhile begins at 0; with only_if_exists, not."""
    await store.set("k", b"9")
    assert await race(DELETE, lambda s: s.increment("k", 2, maximum=10)) == IncrementResult(2, True)
    assert await race(DELETE, lambda s: s.increment("k", only_if_exists=True)) is None
    assert await store.exists("k") is False


async def test_append_that_meets_a_change(race: Any, store: Any) -> None:
    """append adds to the newest value."""
    await store.set("k", b"1")
    assert await race(UPDATE, lambda s: s.append("k", b"+")) == 7
    assert await store.get("k") == b"theirs+"


async def test_delete_if_version_that_meets_a_change(race: Any, store: Any) -> None:
    """delete with if_version spares a row that changed while it waited."""
    version = await store.set("k", b"1")
    assert await race(UPDATE, lambda s: s.delete("k", if_version=version)) is False


async def test_delete_many_that_meets_a_delete(race: Any, store: Any) -> None:
    """delete_many does not count a row that was deleted while it waited."""
    await store.set_many({"k": b"1", "l": b"1"})
    assert await race(DELETE, lambda s: s.delete_many(["k", "l"])) == 1


async def test_update_that_meets_a_change(race: Any, store: Any) -> None:
    """update() whose write waited and lost calls fn again with the newest value."""
    await store.set("k", b"1")
    assert await race(UPDATE, lambda s: s.update("k", lambda old: old + b"!")) == b"theirs!"


async def test_a_conflict_that_never_ends(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CAS that raced a hundred times in a row gives up with a ConflictError."""
    calls = []

    def raced(_: Any) -> Raced:
        calls.append(1)
        return Raced()

    op: Op[Any] = store._sql.compare_and_swap("k", b"1", b"2")
    with pytest.raises(pgkv.ConflictError, match="100 attempts"):
        await store._execute(Op(op.statement, op.params, raced))
    assert len(calls) == 101


@asynccontextmanager
async def reader(call: Callable[[], Any]) -> AsyncIterator[list[Any]]:
    """Calls over and over while the body runs, collecting the answers."""
    answers: list[Any] = []
    done = asyncio.Event()

    async def read() -> None:
        while not done.is_set():
            answers.append(await call())

    task = asyncio.ensure_future(read())
    try:
        yield answers
    finally:
        done.set()
        await task


async def test_get_many_is_one_snapshot(store: Any) -> None:
    """Keys that are always written together are always read together."""
    keys = [f"k{n}" for n in range(20)]
    await store.set_many(dict.fromkeys(keys, b"0"))
    async with reader(lambda: store.get_many(keys)) as answers:
        written = 0
        while len(answers) < 30 or written < 30:
            await store.set_many(dict.fromkeys(keys, b"%d" % written))
            written += 1
    assert all(len(set(answer.values())) == 1 and len(answer) == 20 for answer in answers)


async def test_who_opens_a_store_waits_for_a_connection_only(variant: Variant, dsn: str) -> None:
    """Of several first operations at once none waits until the time to connect is over, though the
    others may have taken the pool's first connection before it looked.
    """
    for _ in range(5):
        store = variant.make("Store", pgkv.Config(dsn, connect_timeout=60, operation_timeout=60))
        async with asyncio.timeout(20):
            assert await asyncio.gather(*(store.get("k") for _ in range(4))) == [None] * 4
        await store.close()
