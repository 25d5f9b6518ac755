"""Cached functions in both variants behind one interface: tests write the function and the calls as
`async def`, once."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any

import pgkv
from tests.variants import Threaded, Variant, in_thread, inside

PATIENT = {"store_timeout": 20.0}  # a busy machine is no outage


class Awaited:
    """A blocking cached function, awaited like an async one. Calls run in threads."""

    def __init__(self, function: Any) -> None:
        self.function = function

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return await in_thread(self.function, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.function, name)
        if name in {"invalidate", "refresh", "peek", "cache_clear"}:
            return lambda *args, **kwargs: in_thread(value, *args, **kwargs)
        if name == "using":
            return lambda conn: Awaited(value(inside(conn)))
        return value


def cached_in(
    variant: Variant, store: Any, ttl: Any = 60, **options: Any
) -> Callable[[Callable[..., Any]], Any]:
    """`@cached_in(variant, store)` decorates an `async def` in the test's variant."""
    options = {"store": store, **PATIENT, **options}

    def decorate(fn: Callable[..., Any]) -> Any:
        # Each parametrization of a test defines its function again, closing over lists of its own.
        suffix = "" if variant.name == "async" else ".blocking"
        options.setdefault("name", f"{fn.__module__}.{fn.__qualname__}{suffix}")
        if variant.name == "async":
            return pgkv.cached(ttl, **options)(fn)
        if isinstance(options["store"], Threaded):
            options["store"] = options["store"]._target
        loop = asyncio.get_running_loop()

        @functools.wraps(fn)
        def blocking(*args: Any, **kwargs: Any) -> Any:
            return asyncio.run_coroutine_threadsafe(fn(*args, **kwargs), loop).result()

        blocking.__qualname__ += ".blocking"  # as its name
        return Awaited(pgkv.cached(ttl, **options)(blocking))

    return decorate


async def invalidate_tag(variant: Variant, tag: str, store: Any, conn: Any = None) -> None:
    """`pgkv.invalidate_tag` in the test's variant."""
    if variant.name == "async":
        await pgkv.invalidate_tag(tag, store=store, conn=conn)
        return
    conn = inside(conn)
    await in_thread(pgkv.invalidate_tag, tag, store=store._target, conn=conn)
