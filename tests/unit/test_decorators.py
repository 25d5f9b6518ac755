"""What decorated functions look like to those who inspect them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

import pgkv

NOWHERE = pgkv.AsyncStore(pgkv.Config("postgresql://nowhere"))


async def work(n: int, name: str = "x") -> str:
    return name * n


DECORATORS: dict[str, Callable[[Any], Any]] = {
    "cached": pgkv.cached(60, store=NOWHERE),
    "locked": pgkv.locked("work", store=NOWHERE),
    "limited": pgkv.AsyncRateLimiter(NOWHERE, "9/s", name="work").limit(
        key=lambda n, name="x": name
    ),
    "idempotent": pgkv.idempotent(key=lambda n, name="x": name, store=NOWHERE),
}


@pytest.mark.parametrize("name", DECORATORS)
def test_an_async_function_remains_one(name: str) -> None:
    """Frameworks ask so whether to await what they were given, and with which parameters."""
    decorated = DECORATORS[name](work)
    assert inspect.iscoroutinefunction(decorated)
    assert inspect.signature(decorated) == inspect.signature(work)
    assert decorated.__name__ == "work"


def test_a_cached_method_is_one_too() -> None:
    """On the class and on an object."""

    class Repo:
        def __cache_key__(self) -> str:
            return "repo"

        @pgkv.cached(60, store=NOWHERE)
        async def load(self, n: int) -> int:
            return n

    assert inspect.iscoroutinefunction(Repo.load)
    assert inspect.iscoroutinefunction(Repo().load)
