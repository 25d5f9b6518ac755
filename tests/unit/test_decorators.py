"""What decorated functions look like to those who inspect them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

import pgkv
from pgkv.integrations.django.idempotency import idempotent as idempotent_view
from pgkv.integrations.django.ratelimit import ratelimit

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
    "django's ratelimit": ratelimit(pgkv.AsyncRateLimiter(NOWHERE, "9/s", name="views")),
    "django's idempotent": idempotent_view(pgkv.AsyncIdempotency(NOWHERE), scope=""),
}


@pytest.mark.parametrize("name", DECORATORS)
def test_an_async_function_remains_one(name: str) -> None:
    """Frameworks ask so whether to await what they were given, and with which parameters."""
    decorated = DECORATORS[name](work)
    assert inspect.iscoroutinefunction(decorated)
    assert inspect.signature(decorated) == inspect.signature(work)
    assert decorated.__name__ == "work"


@pytest.mark.parametrize("name", ["cached", "locked", "limited", "idempotent"])
def test_static_and_class_methods_remain_what_they_are(name: str) -> None:
    """The decorator may be above `@staticmethod` and `@classmethod`."""

    class Repo:
        @DECORATORS[name]
        @staticmethod
        async def alone(n: int, name: str) -> str:
            return name * n

        @DECORATORS[name]
        @classmethod
        async def whole(cls, n: int, name: str) -> str:
            return name * n

    for method in (Repo.alone, Repo().alone, Repo.whole, Repo().whole):
        assert inspect.iscoroutinefunction(method)
    assert list(inspect.signature(Repo().alone).parameters) == ["n", "name"]
    assert list(inspect.signature(Repo().whole).parameters) == ["n", "name"]


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
    assert list(inspect.signature(Repo.load).parameters) == ["self", "n"]
    assert list(inspect.signature(Repo().load).parameters) == ["n"]
    assert not hasattr(Repo().load, "invalidat")
