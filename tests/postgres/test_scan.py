"""Ranges of keys: order, prefixes, pages."""

from __future__ import annotations

from typing import Any

import pytest

import pgkv
from pgkv import KeyValue, ScanOptions
from tests.peers import Peer

# In the order of their bytes, which is that of their code points.
WORDS = [
    "A1", "B", "a", "a1", "a2", "aa", "ab", "b", "b%", "b_", "bx", "z", "é", "\ud7ff", "\ue000",
    "\uffff", "\U00010000", "\U0010fffe", "\U0010ffff", "\U0010ffffa", "\U0010ffff\U0010ffff",
]  # fmt: skip


async def fill(store: Any, keys: list[str]) -> None:
    await store.set_many({key: key.encode() for key in keys})


async def test_order_is_that_of_the_bytes(store: Any) -> None:
    """keys and scan go in the order of the keys' UTF-8 bytes."""
    await fill(store, WORDS[::-1])
    assert sorted(WORDS, key=str.encode) == WORDS
    assert await store.keys() == WORDS
    assert await store.scan() == [KeyValue(key, key.encode()) for key in WORDS]


@pytest.mark.parametrize("prefix", ["a", "b", "b%", "A", "\ud7ff", "\U0010ffff", "nothing", ""])
async def test_prefix(store: Any, prefix: str) -> None:
    """A prefix selects exactly the keys that begin with it; '%' and '_' mean themselves."""
    await fill(store, WORDS)
    wanted = [key for key in WORDS if key.startswith(prefix)]
    assert await store.keys(prefix) == wanted
    assert [row.key for row in await store.scan(prefix)] == wanted
    assert await store.count(prefix) == len(wanted)
    assert [key async for key in store.iter_keys(prefix, page_size=2)] == wanted
    assert await store.delete_prefix(prefix) == len(wanted)
    assert await store.keys() == [key for key in WORDS if not key.startswith(prefix)]


async def test_bounds(store: Any) -> None:
    """start is inclusive, end and after are exclusive."""
    await fill(store, list("abcde"))
    assert await store.keys(start="b") == list("bcde")
    assert await store.keys(end="d") == list("abc")
    assert await store.keys(after="b") == list("cde")
    assert await store.keys(start="b", end="d") == list("bc")
    assert await store.keys(start="d", after="b") == list("de")
    assert await store.keys(start="b", after="b") == list("cde")
    assert await store.keys(start="d", end="b") == []
    assert await store.keys(start="", end="") == []


async def test_bounds_within_a_prefix(store: Any) -> None:
    """Bounds are whole keys, and cut a prefix's range down, never out of it."""
    await fill(store, WORDS)
    assert await store.keys("a", start="a1", end="aa") == ["a1", "a2"]
    assert await store.keys("a", start="A", end="z") == ["a", "a1", "a2", "aa", "ab"]
    assert await store.keys("a", after="zz") == []
    assert await store.keys("a", after="A") == ["a", "a1", "a2", "aa", "ab"]


async def test_limit_and_offset(store: Any) -> None:
    """limit and offset count rows; a limit of 0 gives none, one beyond the end all."""
    await fill(store, list("abcde"))
    assert await store.keys(limit=2) == list("ab")
    assert await store.keys(limit=2, offset=3) == list("de")
    assert await store.keys(offset=4) == ["e"]
    assert await store.keys(offset=9) == []
    assert await store.keys(limit=0) == []
    assert await store.keys(limit=10**30) == list("abcde")
    assert await store.keys(offset=10**30) == []


async def test_scan_options(store: Any) -> None:
    """A ScanOptions stands in place of the keywords."""
    await fill(store, list("abcde"))
    options = ScanOptions(start="b", limit=2, offset=1)
    assert await store.keys(options) == ["c", "d"]
    assert await store.scan(options) == [("c", b"c"), ("d", b"d")]


async def test_key_value(store: Any) -> None:
    """A row is a KeyValue, a pair with names."""
    await store.set("k", b"v")
    (row,) = await store.scan()
    assert (row.key, row.value) == ("k", b"v")
    assert dict(await store.scan()) == {"k": b"v"}


@pytest.mark.parametrize("page_size", [1, 2, 20, 21, 22, 1000])
async def test_iterators_return_everything_once(store: Any, page_size: int) -> None:
    """iter_keys and iter_items give each row once, whatever the size of the pages."""
    await fill(store, WORDS)
    assert [key async for key in store.iter_keys(page_size=page_size)] == WORDS
    items = [item async for item in store.iter_items(page_size=page_size)]
    assert items == [(key, key.encode()) for key in WORDS]


async def test_iterators_page(store: Any, operations: list[tuple[str, str, int]]) -> None:
    """iter_keys reads a page when it is needed, not all at once."""
    await fill(store, list("abcdef"))
    operations.clear()
    seen = []
    async for key in store.iter_keys(page_size=2):
        seen.append(key)
        if key == "c":
            break
    assert seen == list("abc")
    assert [name for name, *_ in operations] == ["keys", "keys"]


async def test_iterator_while_keys_change(store: Any) -> None:
    """Keys removed and written behind the iterator neither stop nor repeat it."""
    await fill(store, list("abcdef"))
    seen = []
    async for key in store.iter_keys(page_size=2):
        seen.append(key)
        await store.delete(key)
        await store.set("A" + key, b"")
        if key == "b":
            await store.set("bb", b"")
    assert seen == ["a", "b", "bb", "c", "d", "e", "f"]


async def test_iter_expired(store: Any, clock: Any) -> None:
    """Iterators leave out keys whose time has passed, and pages stay full of live ones."""
    await fill(store, list("abcdef"))
    await store.expire_many(list("ace"), 60)
    clock.advance(61)
    assert [key async for key in store.iter_keys(page_size=1)] == list("bdf")


async def test_scans_keep_to_their_namespace(store: Any) -> None:
    """In a namespace prefix, bounds and results are without its prefix."""
    await fill(store, ["m", "n", "n:a", "n:b", "n:c", "n;", "o"])
    inner = store.namespace("n:")
    assert await inner.keys() == list("abc")
    assert await inner.keys(start="b") == list("bc")
    assert await inner.keys(end="b") == ["a"]
    assert await inner.keys(after="a", limit=1) == ["b"]
    assert await inner.scan("b") == [("b", b"n:b")]
    assert await inner.count() == 3
    assert [key async for key in inner.iter_keys(page_size=1)] == list("abc")
    assert await inner.keys(end="") == []


async def test_delete_prefix_counts_live_and_removes_all(
    store: Any, clock: Any, peer: Peer
) -> None:
    """delete_prefix removes expired rows as well, and counts those that were live."""
    await store.set("a1", b"", ttl=60)
    await store.set("a2", b"")
    await store.set("b", b"", ttl=60)
    clock.advance(61)
    assert await store.delete_prefix("a") == 1
    assert peer.keys() == {"b"}


async def test_clear(store: Any, clock: Any, peer: Peer) -> None:
    """clear removes every row, expired ones too, and counts the live ones."""
    await store.set("a", b"", ttl=60)
    await store.set("b", b"")
    clock.advance(61)
    assert await store.clear() == 1
    assert peer.keys() == set()


async def test_a_prefix_uses_the_primary_key(store: Any, peer: Peer) -> None:
    """A prefix scan is a range of the primary key's index, a limit ends it early."""
    await store.set_many({f"k{n:05}": b"" for n in range(5000)})
    await store.analyze()
    op = store._sql.keys(ScanOptions(prefix="k01", limit=10))
    plan = "\n".join(
        row[0]
        for row in peer.run(
            "EXPLAIN "
            + op.statement.sql.replace("$1", "10")
            .replace("$2", "0")
            .replace("$3", "'k01'")
            .replace("$4", "'k02'")
        )
    )
    assert "Index" in plan
    assert "Sort" not in plan
    assert "key >= 'k01'" in plan


async def test_count_of_everything(store: Any) -> None:
    """count without a prefix counts all keys."""
    await fill(store, WORDS)
    assert await store.count() == len(WORDS)
    assert await store.count("a") == 5


@pytest.mark.parametrize("page_size", [0, -1, True, 1.5, "2"])
async def test_page_size(store: Any, page_size: Any) -> None:
    """A page has one row or more; another size is refused before the first page."""
    with pytest.raises(pgkv.InvalidValueError, match="page_size"):
        async for _ in store.iter_keys(page_size=page_size):
            pass
