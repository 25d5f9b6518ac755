"""Many keys at once: all or nothing, one snapshot, any size."""

from __future__ import annotations

from typing import Any

import pytest

import pgkv
from pgkv._sql import batch
from tests.peers import Peer

REFUSE = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'refused' USING ERRCODE = 'P0001'; END $$;
CREATE TRIGGER refuse BEFORE {event} ON kv_store FOR EACH ROW WHEN ({row}.key = 'k49')
    EXECUTE FUNCTION refuse();
"""
KEYS = [f"k{n:02}" for n in range(50)]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are cut into chunks of 7 keys."""
    monkeypatch.setattr(batch, "CHUNK_ROWS", 7)


async def test_get_many(store: Any) -> None:
    """get_many returns those keys that exist, with their values."""
    await store.set_many({"a": b"1", "b": b""})
    assert await store.get_many(["a", "b", "c", "a"]) == {"a": b"1", "b": b""}
    assert await store.get_many(iter(["a"])) == {"a": b"1"}


@pytest.mark.parametrize("count", [1, 8, 9, 5001])
async def test_get_many_of_any_size(store: Any, count: int) -> None:
    """Few keys and many give the same answer."""
    items = {f"k{n}": b"%d" % n for n in range(count)}
    await store.set_many(items)
    assert await store.get_many([*items, "absent"]) == items
    assert await store.exists_many([*items, "absent"]) == set(items)


async def test_set_many(store: Any) -> None:
    """set_many takes a mapping or pairs and returns how many distinct keys it wrote."""
    assert await store.set_many({"a": b"1", "b": "ž"}) == 2
    assert await store.set_many((k, b"2") for k in "bc") == 2
    assert await store.get_many("abc".__iter__()) == {"a": b"1", "b": b"2", "c": b"2"}


async def test_set_many_last_of_a_repeated_key_wins(store: Any) -> None:
    """Of a key given several times the last value counts, and it counts as one."""
    assert await store.set_many([("a", b"1"), ("b", b"x"), ("a", b"2")]) == 2
    assert await store.get("a") == b"2"


async def test_set_many_beyond_a_chunk(store: Any) -> None:
    """A batch of any size is written whole."""
    items = {f"k{n}": b"%d" % n for n in range(12_001)}
    assert await store.set_many(items) == 12_001
    assert await store.count() == 12_001
    assert await store.delete_many(items) == 12_001


async def test_set_many_with_large_values(store: Any) -> None:
    """Chunks are bounded in bytes, too."""
    items = {f"k{n}": bytes([n]) * 3_000_000 for n in range(7)}
    assert await store.set_many(items) == 7
    assert await store.get_many(items) == items


async def test_empty_batches(store: Any, operations: list[tuple[str, str, int]]) -> None:
    """A batch of nothing does nothing and sends nothing."""
    operations.clear()
    assert await store.get_many([]) == {}
    assert await store.exists_many([]) == set()
    assert await store.set_many({}) == 0
    assert await store.delete_many([]) == 0
    assert await store.expire_many([], 60) == 0
    assert await store.increment_many({}) == {}
    assert operations == []


async def test_delete_many(store: Any) -> None:
    """delete_many returns how many of the keys were there, each counted once."""
    await store.set_many({"a": b"1", "b": b"2", "c": b"3"})
    assert await store.delete_many(["a", "b", "a", "x"]) == 2
    assert await store.keys() == ["c"]


async def test_exists_many(store: Any) -> None:
    """exists_many returns those keys that exist."""
    await store.set_many({"a": b"", "b": b"2"})
    assert await store.exists_many(["a", "b", "x"]) == {"a", "b"}


async def test_expire_many(store: Any) -> None:
    """expire_many gives every key that exists the ttl and returns how many those are."""
    await store.set_many({"a": b"1", "b": b"2"})
    assert await store.expire_many(["a", "b", "a", "x"], 60) == 2
    assert 30 < await store.ttl("a") <= 60
    assert 30 < await store.ttl("b") <= 60


async def test_increment_many(store: Any) -> None:
    """increment_many adds each delta and returns the sums; an absent key counts as 0."""
    await store.set("a", b"5")
    assert await store.increment_many({"a": 2, "b": -3}) == {"a": 7, "b": -3}
    assert await store.get_many(["a", "b"]) == {"a": b"7", "b": b"-3"}


async def test_batches_of_a_namespace(store: Any) -> None:
    """In a namespace batches take and return keys without its prefix."""
    inner = store.namespace("n:")
    await inner.set_many({"a": b"1", "b": b"2"})
    assert await inner.increment_many({"a": 1}) == {"a": 2}
    assert await inner.get_many(["a", "b"]) == {"a": b"2", "b": b"2"}
    assert await inner.exists_many(["a", "n:a"]) == {"a"}
    assert await inner.expire_many(["a"], 60) == 1
    assert await store.keys() == ["n:a", "n:b"]
    assert await inner.delete_many(["a", "b"]) == 2


@pytest.mark.parametrize(
    ("event", "row", "call"),
    [
        ("INSERT", "NEW", lambda s: s.set_many(dict.fromkeys(["new", *KEYS], b"2"))),
        ("UPDATE", "NEW", lambda s: s.set_many(dict.fromkeys(KEYS, b"2"))),
        ("UPDATE", "NEW", lambda s: s.increment_many(dict.fromkeys(KEYS, 1))),
        ("UPDATE", "NEW", lambda s: s.expire_many(KEYS, 60)),
        ("DELETE", "OLD", lambda s: s.delete_many(KEYS)),
    ],
    ids=["set_many new", "set_many", "increment_many", "expire_many", "delete_many"],
)
async def test_a_batch_is_all_or_nothing(
    store: Any, peer: Peer, small_chunks: None, event: str, row: str, call: Any
) -> None:
    """When the last of several chunks fails, the ones before it are undone."""
    await store.set_many(dict.fromkeys(KEYS, b"1"))
    before = peer.run("SELECT * FROM kv_store ORDER BY key")
    peer.run(REFUSE.format(event=event, row=row))
    with pytest.raises(pgkv.QueryError) as caught:
        await call(store)
    assert caught.value.sqlstate == "P0001"
    assert peer.run("SELECT * FROM kv_store ORDER BY key") == before


async def test_increment_many_refuses_a_value_that_is_no_integer(
    store: Any, small_chunks: None
) -> None:
    """One value that is no integer, in any chunk, and no key is incremented."""
    await store.set_many({**dict.fromkeys(KEYS, b"1"), "k30": b"word"})
    with pytest.raises(pgkv.InvalidValueError, match="not a signed 64-bit integer"):
        await store.increment_many(dict.fromkeys(KEYS, 1))
    assert set((await store.get_many(KEYS)).values()) == {b"1", b"word"}


async def test_increment_many_refuses_an_overflow(store: Any) -> None:
    """One sum beyond 64 bits, and no key is incremented."""
    await store.set("b", str(2**63 - 1))
    with pytest.raises(pgkv.InvalidValueError, match="64-bit range"):
        await store.increment_many({"a": 1, "b": 1})
    assert await store.exists("a") is False
    assert await store.increment_many({"b": -1}) == {"b": 2**63 - 2}


async def test_batches_sort_their_keys(store: Any, peer: Peer) -> None:
    """Keys are inserted in the order of their bytes, whatever order the caller has."""
    keys = ["b", "ž", "a", "\U0001f40e", "B", "aa"]
    await store.set_many([(key, b"") for key in keys])
    stored = [row[0] for row in peer.run("SELECT key FROM kv_store ORDER BY ctid")]
    assert stored == sorted(keys, key=str.encode)


async def test_a_round_trip_for_thousands_of_keys(
    store: Any, operations: list[tuple[str, str, int]]
) -> None:
    """A batch is one statement, not one per key."""
    operations.clear()
    await store.set_many({f"k{n}": b"v" for n in range(5000)})
    await store.get_many([f"k{n}" for n in range(5000)])
    await store.delete_many([f"k{n}" for n in range(5000)])
    assert [name for name, *_ in operations] == ["set_many", "get_many", "delete_many"]
