"""The default store of decorators: one per program, created when it is first needed.

`configure` chooses it; without `configure`, ``PGKV_DSN`` or ``DATABASE_URL`` does. Nothing is
resolved or connected before the first call that needs it, so decorated functions can be imported
anywhere.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import sys
import weakref
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import Any, Unpack

from .._fork import new_lock
from .._settings import options_of
from ..aio import AsyncStore
from ..config import Config, Options, dsn_from_environment
from ..errors import ConfigError
from ..store import Store

_lock = new_lock(sys.modules[__name__])
_given: Store | None = None
_given_async: AsyncStore | None = None
_dsn: str | None = None
_options: dict[str, Any] = {}
_made: Store | None = None
_made_async: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncStore] = (
    weakref.WeakKeyDictionary()
)


def configure(target: Store | AsyncStore | str | None = None, **config: Unpack[Options]) -> None:
    """Set the store that decorators use when they are given none.

    A `Store` serves sync functions, an `AsyncStore` async ones: call it once for each. A DSN serves
    both; the store is made when a function first needs it, and async functions get one `AsyncStore`
    per running event loop, closed when ``asyncio.run()`` ends. Connects to nothing itself.

    Args:
        target: a store, or a libpq URI, conninfo string or ``embedded:///path``; None forgets what
            was configured before, so that the environment (``PGKV_DSN``, else ``DATABASE_URL``)
            decides again, with `config` for the rest.
        **config: the fields of `Config`, for a DSN.

    Raises:
        ConfigError: a setting is wrong, or fields were given together with a store, which has
            its own.
    """
    global _given, _given_async, _dsn, _options, _made  # noqa: PLW0603  # a program has one default
    if isinstance(target, Store | AsyncStore):
        if config:
            raise ConfigError("configure(): a store has its settings already; give them to it")
        with _lock:
            if isinstance(target, Store):
                _given = target
            else:
                _given_async = target
        return
    if target is not None and not isinstance(target, str):
        raise ConfigError(
            f"configure() takes a Store, an AsyncStore or a DSN, not {type(target).__name__}"
        )
    options = options_of(config)
    if target is not None:
        Config(target, **options)  # a wrong setting is refused here, not at some later call
    with _lock:
        _given = _given_async = None
        _dsn, _options = target, options
        old, _made = _made, None
        _made_async.clear()  # those that exist are closed with their loops
    if old is not None:
        old.close()


def default_store() -> Store:
    """Return the default store for sync functions, created on first use.

    Raises:
        ConfigError: none was configured; says how.
    """
    global _made  # noqa: PLW0603  # as above
    if _given is not None:
        return _given
    if _made is None:
        with _lock:
            if _made is None:
                _made = Store(_config("a sync function needs a Store", _given_async))
    return _made


def default_async_store() -> AsyncStore:
    """Return the running loop's default store for async functions, created on first use.

    Raises:
        ConfigError: none was configured; says how.
    """
    if _given_async is not None:
        return _given_async
    loop = asyncio.get_running_loop()
    store = _made_async.get(loop)
    if store is None:
        store = AsyncStore(_config("an async function needs an AsyncStore", _given))
        _made_async[loop] = store
        close_with_loop(store, partial(_forget, store, loop))
    return store


def _forget(store: AsyncStore, loop: asyncio.AbstractEventLoop) -> None:
    # A store refers to its loop: as the entry's value it would keep its key alive.
    if _made_async.get(loop) is store:
        del _made_async[loop]


def _config(need: str, other: object) -> Config:
    if _dsn is None and other is not None:
        raise ConfigError(
            f"{need}, and configure() was given {type(other).__name__} only: "
            "call configure() with the other one too, or with a DSN, which serves both"
        )
    try:
        dsn = dsn_from_environment() if _dsn is None else _dsn
    except ConfigError as error:
        raise ConfigError(
            "there is no default store: call pgkv.configure(store_or_dsn), set PGKV_DSN, or give "
            f"the decorator a store= ({error})"
        ) from None
    return Config(dsn, **_options)


def close_with_loop(store: AsyncStore, forget: Callable[[], object]) -> None:
    """Close a store when the running loop ends; `forget` is called first."""

    # A loop that ends in order (asyncio.run, asyncio.Runner) closes the asynchronous generators
    # that were started on it: the only hook that asyncio offers.
    async def keep() -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            forget()
            await store.close()

    keeper = keep()
    store._keeper = keeper  # type: ignore[attr-defined]  # it lives as long as the store does
    # Its first step runs up to the yield without waiting for anything.
    with contextlib.suppress(StopIteration):
        keeper.__anext__().send(None)


def _close() -> None:
    if _made is not None:
        _made.close()


atexit.register(_close)
