"""`@locked`: at most one call of a function runs at a time, on any number of machines."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine
from typing import Any, Literal, ParamSpec, Protocol, TypeAlias, TypeVar, cast, overload

from ..._ops.codec import seconds, waiting
from ...aio import AsyncStore
from ...config import Seconds
from ...errors import ConfigError
from ...store import Store
from .._runtime.checks import OfArguments, named
from ..defaults import default_async_store, default_store
from .api import Acquirer, AsyncAcquirer, AsyncLock, Lock
from .sql import fence

F = TypeVar("F", bound=Callable[..., Any])

OnBusy: TypeAlias = Literal["wait", "skip", "raise"]
CHOICES = ("wait", "skip", "raise")
P = ParamSpec("P")
R = TypeVar("R")


class _OrNone(Protocol):
    """The decorated function also returns None, where it was skipped."""

    @overload
    def __call__(
        self, fn: Callable[P, Coroutine[Any, Any, R]], /
    ) -> Callable[P, Coroutine[Any, Any, R | None]]: ...
    @overload
    def __call__(self, fn: Callable[P, R], /) -> Callable[P, R | None]: ...


@overload
def locked(
    lock_or_name: Lock | AsyncLock | Acquirer | AsyncAcquirer | str | None = None,
    *,
    name: OfArguments[str] | None = None,
    store: Store | AsyncStore | None = None,
    ttl: Seconds = 30.0,
    on_busy: Literal["skip"],
) -> _OrNone: ...
@overload
def locked(
    lock_or_name: Lock | AsyncLock | Acquirer | AsyncAcquirer | str | None = None,
    *,
    name: OfArguments[str] | None = None,
    store: Store | AsyncStore | None = None,
    ttl: Seconds = 30.0,
    timeout: Seconds | None = None,
    on_busy: Literal["wait", "raise"] = "wait",
) -> Callable[[F], F]: ...
def locked(
    lock_or_name: Lock | AsyncLock | Acquirer | AsyncAcquirer | str | None = None,
    *,
    name: OfArguments[str] | None = None,
    store: Store | AsyncStore | None = None,
    ttl: Seconds = 30.0,
    timeout: Seconds | None = None,
    on_busy: OnBusy = "wait",
) -> Any:
    """Run the decorated function under a lock, plain or ``async``; also a static or class method,
    and an object with such a ``__call__``.

    ::

        @pgkv.locked("nightly-report", store=store, on_busy="skip")
        def report() -> None: ...

    Args:
        lock_or_name: a lock (or semaphore), async for an async function, or the name of one to make.
        name: instead of it, a function of the call's arguments that returns the name:
            ``name=lambda account, amount: f"account:{account}"``.
        store: for a name: where the lock lives; without it, the default store (`configure`).
        ttl: for a name: as of `Lock`.
        timeout: with ``on_busy="wait"``: seconds to wait; None waits without end.
        on_busy: what a call does while another runs: ``"wait"``, ``"skip"`` (it returns None), or
            ``"raise"`` (`LockTimeoutError` at once).

    Raises:
        ConfigError: the lock or store is async and the function is not, or the reverse, a setting is wrong, or `timeout` goes
            with an `on_busy` that does not wait.
        LockTimeoutError: (of the function) it was not granted in time.
        LeaseLostError: (of the function) the lease was lost while it ran; an async one was
            cancelled.
        InvalidValueError: `ttl` or `timeout` is not a duration.
        TypeError: it was given neither a lock nor a name, or decorates no function, or a generator,
            whose body runs after the call; (of the function) it returned a generator, or is plain
            and returned an awaitable.
    """
    if name is not None and (lock_or_name is not None or not callable(name)):
        raise TypeError("locked() takes a lock, its name, or name= with a function: one of them")
    if name is None and not isinstance(lock_or_name, str | Acquirer | AsyncAcquirer):
        raise TypeError(
            f"locked() needs a lock or the name of one, not {_what(lock_or_name)}; write "
            "@pgkv.locked('name') with the parentheses"
        )
    if on_busy not in CHOICES:
        raise ConfigError(f"on_busy must be 'wait', 'skip' or 'raise', not {on_busy!r}")
    if timeout is not None and on_busy != "wait":
        raise ConfigError(
            f"on_busy={on_busy!r} does not wait; give timeout= with on_busy='wait', which raises "
            "LockTimeoutError when it has passed"
        )
    longest = waiting(timeout) if on_busy == "wait" else 0.0
    seconds(ttl, endless="")

    def decorate(fn: F) -> F:
        if isinstance(fn, staticmethod | classmethod):
            return cast("F", type(fn)(decorate(fn.__func__)))
        if not callable(fn):
            raise TypeError(f"locked() decorates a function, not {_what(fn)}")
        called = [fn, getattr(fn, "__call__", None)]  # noqa: B004  # an object's own, for its kind
        if any(inspect.isgeneratorfunction(f) or inspect.isasyncgenfunction(f) for f in called):
            raise TypeError(_GENERATOR)
        is_async = any(map(inspect.iscoroutinefunction, called))
        if not is_async and isinstance(store or lock_or_name, AsyncStore | AsyncAcquirer):
            is_async = inspect.iscoroutinefunction(inspect.unwrap(fn))
        wanted, kind = (AsyncAcquirer, AsyncLock) if is_async else (Acquirer, Lock)
        if name is None and not isinstance(lock_or_name, str | wanted):
            what = "an async function" if is_async else "a plain function"
            raise ConfigError(
                f"locked() on {what} needs {named(kind.__name__)}, or the name of one, "
                f"not {_what(lock_or_name)}"
            )
        lock_of = functools.cache(lambda: _lock_of(lock_or_name, store, ttl, kind))
        # The default store of async functions is one of each event loop.
        changes = is_async and not store and isinstance(lock_or_name, str)
        now: Callable[[], Any] = lock_of.__wrapped__ if changes else lock_of

        def take(*args: Any, **kwargs: Any) -> Any:
            lock = _lock_of(name(*args, **kwargs), store, ttl, kind) if name else now()
            return lock.try_acquire() if on_busy == "skip" else lock.acquire(longest)

        return cast("F", (_locked_async if is_async else _locked)(fn, take))

    return decorate


_GENERATOR = "locked() cannot decorate a generator: its body runs after the call"


def _locked(fn: Callable[..., Any], take: Callable[[], Any]) -> Callable[..., Any]:
    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        lease = take(*args, **kwargs)
        if lease is None:
            return None
        with lease:
            answer = fn(*args, **kwargs)
            if inspect.isawaitable(answer):
                if inspect.iscoroutine(answer):
                    answer.close()
                raise TypeError(
                    f"{_what(fn)} returned an awaitable, which would run after the lock was "
                    "released: make it `async def`, or give locked() an AsyncLock or AsyncStore"
                )
            return _checked(answer)

    return run


def _checked(answer: Any) -> Any:
    if inspect.isgenerator(answer) or inspect.isasyncgen(answer):
        raise TypeError(_GENERATOR)
    return answer


def _locked_async(fn: Callable[..., Any], take: Callable[[], Any]) -> Callable[..., Any]:
    @functools.wraps(fn)
    async def run(*args: Any, **kwargs: Any) -> Any:
        lease = await take(*args, **kwargs)
        if lease is None:
            return None
        async with lease:
            answer = fn(*args, **kwargs)
            return _checked(await answer if inspect.isawaitable(answer) else answer)

    return run


def _what(given: object) -> str:
    # Also of what a bare @locked was put before.
    return getattr(given, "__qualname__", type(given).__name__)


def _lock_of(given: object, store: Any, ttl: Seconds, kind: type[Any]) -> Any:
    if isinstance(given, Acquirer | AsyncAcquirer):
        return given
    if store is None:
        store = default_store() if kind is Lock else default_async_store()
    return kind(store, given, ttl)


def fence_sql(table: str, column: str) -> str:
    """Return SQL for a trigger that refuses a write whose fencing token is lower than the row's
    last one.

    Every UPDATE of the table must then set `column` to ``lease.token`` (or leave it, which counts as
    the row's own). A holder that was paused past its lease, and replaced meanwhile by one that has
    written the row, is refused with SQLSTATE 55000; the row keeps what the newer holder wrote. The
    text may be run again. This is the check that Kleppmann's "How to do distributed locking" asks
    of the protected resource.

    It knows only what the row has seen: until the new holder writes it, the old one's write passes,
    as it would have a moment earlier. A token that says nothing (NULL) is refused.

    Args:
        table: its name, or ``schema.name``; quoted here.
        column: a BIGINT of it, with a default such as 0.
    """
    return fence(table, column)
