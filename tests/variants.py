"""Both variants of pgkv behind one interface, so that a behaviour test is written once, as `async
def`.

The asynchronous variant is used as it is. The blocking one is wrapped in `Threaded`, whose methods
are awaited as AsyncStore's are and run in threads, so that `asyncio.gather` races real calls in
both.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import importlib
import inspect
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from pgkv import PgkvError

# Names that differ from "a call to await": in both variants these return at once ...
VIEWS = {"namespace", "table", "typed", "using", "on"}
PLAIN = {"check", "pool_stats", "remaining", "headers", "cache_key", "limit", "slot_of"}
# ... these return (async) iterators ...
ITERATORS = {"iter_keys", "iter_items"}
# ... and these something to be awaited or entered.
MANAGERS = {"transaction", "acquire", "acquire_many", "pipeline", "once", "watch"}
# Results that have blocking methods of their own.
WRAPPED = {
    "Store",
    "ShardedStore",
    "TypedStore",
    "Lock",
    "Lease",
    "Leases",
    "Semaphore",
    "Leader",
    "Queue",
    "Job",
    "Worker",
    "RateLimiter",
    "Reservation",
    "SessionStore",
    "Idempotency",
    "Attempt",
    "Watch",
}

# One thread per racing call: with fewer, a caller that waits could keep the one it waits for from
# running.
_threads = ThreadPoolExecutor(max_workers=256, thread_name_prefix="blocking-variant")
_END = object()


async def in_thread(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """asyncio.to_thread with enough threads."""
    context = contextvars.copy_context()
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(_threads, lambda: context.run(function, *args, **kwargs))


@contextlib.contextmanager
def in_a_hurry(store: Any, seconds: float) -> Iterator[None]:
    """Meanwhile a call of the store may take that long. What is arranged before, and asked afterwards,
    has the default: a loaded machine takes its time for it."""
    channel = inside(store)._channel
    usual, channel._timeout = channel._timeout, seconds
    try:
        yield
    finally:
        channel._timeout = usual


def hurries(store: Any) -> Iterator[float]:
    """Ever more seconds for a call that is to wait at the server until its time has passed: a loaded
    machine may not even send it within the first. Whoever saw it sent leaves the loop."""
    for seconds in (1.0, 5.0, 20.0):
        with in_a_hurry(store, seconds):
            yield seconds
    raise AssertionError("it was never sent")


def was_sent(error: PgkvError) -> bool:
    """Whether a call of `hurries` that ran out of time was at the server; then its message says so."""
    if error.outcome_unknown:
        assert "may still have happened" in str(error)
    return error.outcome_unknown


def inside(thing: Any) -> Any:
    """The object itself, whose private attributes a test may look at or set."""
    return thing._target if isinstance(thing, Threaded) else thing


class Threaded:
    """A blocking object of pgkv in the clothes of its asynchronous twin."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            setattr(self._target, name, value)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        if not callable(value) or name in PLAIN:
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            loop = asyncio.get_running_loop()
            args = tuple(_outward(arg, loop) for arg in args)
            kwargs = {key: _outward(arg, loop) for key, arg in kwargs.items()}
            if name in VIEWS:
                return _inward(value(*args, **kwargs))
            if name in ITERATORS:
                return _iterate(value, args, kwargs)
            if name in MANAGERS:
                return _Manager(value, args, kwargs)
            return _await(value, args, kwargs)

        return call

    async def __aenter__(self) -> Any:
        return _inward(await in_thread(self._target.__enter__))

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> Any:
        return await in_thread(self._target.__exit__, kind, exc, tb)

    def __iter__(self) -> Iterator[Any]:
        return map(_inward, self._target)

    def __aiter__(self) -> AsyncIterator[Any]:
        return _iterate(iter, (self._target,), {})

    def __repr__(self) -> str:
        return f"Threaded({self._target!r})"


class _Manager:
    """What transaction() and acquire() return: awaited it gives the object, entered it also ends
    it.
    """

    def __init__(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._call = (function, args, kwargs)
        self._manager: Any = None

    def __await__(self) -> Generator[Any, None, Any]:
        return _await(*self._call).__await__()

    async def __aenter__(self) -> Any:
        function, args, kwargs = self._call
        self._manager = await in_thread(function, *args, **kwargs)
        return _inward(await in_thread(self._manager.__enter__))

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> Any:
        return await in_thread(self._manager.__exit__, kind, exc, tb)


async def _await(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    return _inward(await in_thread(function, *args, **kwargs))


async def _iterate(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> AsyncIterator[Any]:
    iterator = await in_thread(function, *args, **kwargs)
    try:
        while (item := await in_thread(next, iterator, _END)) is not _END:
            yield item
    finally:
        await in_thread(getattr(iterator, "close", lambda: None))


def _inward(value: Any) -> Any:
    if type(value) is list:  # take_many's jobs
        return [_inward(each) for each in value]
    return Threaded(value) if type(value).__name__ in WRAPPED else value


def _outward(value: Any, loop: asyncio.AbstractEventLoop) -> Any:
    """Arguments for the blocking object: wrappers taken off, `async def` callbacks run on the
    test's loop.
    """
    if isinstance(value, Threaded):
        return value._target
    if type(value) in (list, tuple):  # hit_many's limiters
        return type(value)(_outward(each, loop) for each in value)
    if not inspect.iscoroutinefunction(value):
        return value

    def blocking(*args: Any) -> Any:
        result = asyncio.run_coroutine_threadsafe(value(*map(_inward, args)), loop).result()
        return inside(result)

    return blocking


def _pgkv() -> Any:
    return importlib.import_module("pgkv")  # untyped: names are put together below


@dataclass(frozen=True, slots=True)
class Variant:
    """Makes pgkv's objects in one variant; what it returns is used as the asynchronous one."""

    name: str  # "sync" or "async"

    def make(self, what: str, *args: Any, **kwargs: Any) -> Any:
        """`variant.make("Lock", store, "billing", ttl=30)` is pgkv.Lock(...), wrapped, or
        pgkv.AsyncLock(...).
        """
        pgkv = _pgkv()
        if self.name == "async":
            return getattr(pgkv, f"Async{what}")(*args, **kwargs)
        plain = [inside(arg) for arg in args]
        plain_kwargs = {key: inside(arg) for key, arg in kwargs.items()}
        return Threaded(getattr(pgkv, what)(*plain, **plain_kwargs))

    async def connect(self, dsn: str, **config: Any) -> Any:
        """Store.connect, wrapped, or AsyncStore.connect."""
        pgkv = _pgkv()
        if self.name == "async":
            return await pgkv.AsyncStore.connect(dsn, **config)
        return Threaded(await in_thread(pgkv.Store.connect, dsn, **config))


def available() -> list[str]:
    """The variants that pgkv has."""
    return ["sync", "async"] if hasattr(_pgkv(), "AsyncStore") else ["sync"]


@contextlib.contextmanager
def closing_all(runner: asyncio.Runner) -> Iterator[list[Any]]:
    """A list of stores or connections, which are closed at the end on that loop, the last one first."""
    made: list[Any] = []
    yield made

    async def close() -> None:
        for each in made[::-1]:
            await each.close()

    runner.run(close())
