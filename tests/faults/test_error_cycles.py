"""An error that was dealt with is gone, with all that its traceback holds: a lease, a value, a connection."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import pgkv


@pytest.fixture
def _no_collector() -> Iterator[None]:
    """Only reference counts free anything."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Held:
    """What a caller's frame holds."""


def failing(call: Callable[[], Any]) -> weakref.ref[Held]:
    """Make a call that fails, in a frame that holds something."""
    held = Held()
    try:
        call()
    except pgkv.PgkvError:
        return weakref.ref(held)
    raise AssertionError("it did not fail")


CALLS: dict[str, Callable[[Any], Any]] = {
    "a table is missing": lambda store: store.get("k"),
    "the server refuses": lambda store: store.increment("word"),
    "a pipeline fails": lambda store: store.increment_many({"word": 1}),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.usefixtures("_no_collector")
def test_threads(dsn: str, name: str) -> None:
    """A failed call of a Store leaves no cycle of an error and its frames."""
    exists = name != "a table is missing"
    with pgkv.Store(pgkv.Config(dsn, auto_create_table=exists)) as store:
        if exists:
            store.set("word", b"x")
        held = failing(lambda: CALLS[name](store))
        assert held() is None


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.usefixtures("_no_collector")
def test_tasks(dsn: str, name: str) -> None:
    """The same for an AsyncStore."""
    exists = name != "a table is missing"

    async def fails(store: Any) -> weakref.ref[Held]:
        held = Held()
        try:
            await CALLS[name](store)
        except pgkv.PgkvError:
            return weakref.ref(held)
        raise AssertionError("it did not fail")

    async def main() -> None:
        async with pgkv.AsyncStore(pgkv.Config(dsn, auto_create_table=exists)) as store:
            if exists:
                await store.set("word", b"x")
            held = await fails(store)
            assert held() is None

    asyncio.run(main())
