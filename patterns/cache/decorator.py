"""`cached`: keep what a function returns, in PostgreSQL, for all processes.

The decorator and its settings. `flows` says what a call does, `function` what the
decorator returns, and `defaults` which store it uses by default.
"""

from __future__ import annotations

import inspect
import math
import sys
import typing
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from types import FrameType, SimpleNamespace
from typing import Any, Literal, ParamSpec, TypeVar, overload

import psycopg

from ..._engine.caller import unwrap
from ..._observe import shown
from ..._ops import codec as _codec
from ...aio import AsyncStore
from ...config import Seconds
from ...errors import ConfigError, InvalidKeyError
from ...store import Store
from .._runtime import switch as _switch
from .._runtime.checks import OfArguments, require
from ..defaults import default_async_store, default_store
from .call import CacheOptions, Ttl, context_of
from .envelope import Codec, SignedPickle, TypedCodec
from .flows import FunctionCache
from .function import (
    AsyncCachedFunction,
    Binds,
    CachedFunction,
    steps_inside,
)
from .identity import Definition, claim
from .key import Binder, signature_of
from .l1 import L1
from .sql import TAG

P = ParamSpec("P")
R = TypeVar("R")

NAME_MAX = 400  # bytes of a function's name in its keys
UNTIL = "None keeps it until it is invalidated"
PARENTHESES = "write @pgkv.cached(ttl=...) with the parentheses"


class Decorator:
    """What ``cached(...)`` returns: decorates one function, sync or async."""

    def __init__(self, options: CacheOptions) -> None:
        self._options = options

    @shown
    def __repr__(self) -> str:
        return f"of cached({self._options.facts()}), to be put before a function"

    @overload
    def __call__(  # type: ignore[overload-overlap]  # where both fit, the first is meant
        self, fn: Callable[P, Coroutine[Any, Any, R]], /
    ) -> AsyncCachedFunction[P, R]: ...
    @overload
    def __call__(self, fn: Callable[P, R], /) -> CachedFunction[P, R]: ...
    def __call__(self, fn: Any = None, /, *args: Any, **kwargs: Any) -> Any:
        # More, or nothing, is a call of what a bare @cached was put before.
        if args or kwargs or fn is None:
            raise TypeError("cached() has decorated nothing yet: " + PARENTHESES)
        return _decorate(fn, self._options, sys._getframe(1))


def cached(
    ttl: Ttl,
    *,
    key: OfArguments[Any] | None = None,
    ignore: Iterable[str] = (),
    name: str | None = None,
    version: int | str = 1,
    namespace: str | None = None,
    tags: Iterable[str] = (),
    stale: Seconds = 0,
    beta: float = 1.0,
    jitter: float = 0.0,
    lock: bool = True,
    compute_timeout: Seconds = 30.0,
    max_wait: Seconds = 30.0,
    condition: Callable[[Any], bool] | None = None,
    on_error: Literal["call", "raise"] = "call",
    store_timeout: Seconds = 0.25,
    codec: Literal["json", "msgpack"] | SignedPickle = "json",
    l1: L1 | None = None,
    store: Store | AsyncStore | None = None,
) -> Decorator:
    """Cache a function's results, in a table that all processes share.

    ``@pgkv.cached(ttl=60)`` decorates a function, an ``async def``, or a method. ``f(1)``,
    ``f(a=1)`` and ``f()`` with that default share an entry; ``1``, ``True``, ``1.0`` and ``"1"`` do
    not. None and falsy results are cached, exceptions are not.

    Guarantees: after ``invalidate()`` has returned, no call that begins later sees an older value,
    and a computation that began before does not bring one back; inside a transaction
    (``using(conn)``) the same from its commit. Of the callers who miss a key one computes, in this
    process and across processes; if it dies, one other takes over after `compute_timeout`; if it fails,
    the next one tries. No call waits longer than `max_wait` for another.

    Limits: a function that reads from a replica, or from a snapshot older than the call, can store
    what is old. An entry in an UNLOGGED table is gone after a crash of the server: a cache is then
    cold, never wrong. With `l1`, other processes see an invalidation within its ttl.

    Args:
        ttl: seconds for which a value is fresh; None: until it is invalidated. A callable gets the
            result and the arguments and returns that; 0 or less means "do not store this one".
        key: maps the arguments (without `ignore`) to what stands for them in the key.
        ignore: names of parameters that do not count (connections, loggers).
        name: what the entries are kept under; None for the function's module and qualified name. Two
            functions need two names: those made in a loop or by another function, lambdas of one
            module, wrappers without ``functools.wraps``.
        version: of what the function computes: change it when its meaning changes.
        namespace: put before the function's name, to keep deployments in one table apart.
        tags: templates such as ``"user:{user_id}"``; see `invalidate_tag`. Entries with tags live
            at most 30 days.
        stale: seconds beyond `ttl` for which the old value is served at once, while a thread or
            task in the background (few of them, with the arguments of the call that met it)
            computes a new one.
        beta: how eagerly a value is refreshed before its end (XFetch: Vattani et al., VLDB 2015);
            larger is earlier, 0 never. One caller, chosen at random, computes while the
            others are served; with `stale` it happens in the background.
        jitter: shorten each ttl by a random part of at most this share (0 to 1), so that entries
            made together do not end together.
        lock: let other processes wait for the one that computes. False: each of them computes, and
            only the first stores.
        compute_timeout: seconds after which another caller replaces a process that died while it
            computed. Extended for as long as the function runs.
        max_wait: seconds that a call waits for another caller's result; then it computes itself,
            and does not store.
        condition: gets the result; a false answer means "do not store this one".
        on_error: ``"call"``: when the store cannot be reached, call the function (and after repeated
            failures leave the store alone for a while); ``"raise"``: raise.
        store_timeout: seconds for each call of the store within a cached call.
        codec: ``"json"``, ``"msgpack"``, or a `SignedPickle`. With a return annotation the first
            two give back values of that type, checked.
        l1: a first level in memory.
        store: a `Store` for functions, an `AsyncStore` for async ones; None for the default one,
            see `configure`.

    Raises:
        TypeError: (when decorating) a generator; a method without ``key=``, ``ignore=("self",)`` or
            a ``__cache_key__()`` in its class; a parameter named that does not exist; a function
            under the name of another one. (When called) an argument has no stable encoding; names
            the parameter.
        ConfigError: a setting is wrong, or there is no default store.
        InvalidValueError: a duration is not positive.
        SerializationError: (when called) the result cannot be written by the codec, or does not fit
            the return annotation.
    """
    tags, ignore = _names("tags", tags), _names("ignore", ignore)
    for what, fn in (("key", key), ("condition", condition)):
        if fn is not None and not callable(fn):
            raise ConfigError(f"cached: {what} must be a function, not {type(fn).__name__}")
    given: object = name
    if given is not None and not (isinstance(given, str) and given):
        raise ConfigError("cached: name must be a string that is not empty, such as 'users.load'")
    if on_error not in ("call", "raise"):
        raise ConfigError(f"cached: on_error must be 'call' or 'raise', not {on_error!r}")
    if not _is_number(jitter, 1.0):
        raise ConfigError(f"cached: jitter must be at least 0 and less than 1, not {jitter!r}")
    if not _is_number(beta, math.inf):
        raise ConfigError(f"cached: beta must be a number of 0 or more, not {beta!r}")
    if not isinstance(codec, SignedPickle) and codec not in ("json", "msgpack"):
        raise ConfigError(
            f"cached: codec must be 'json', 'msgpack' or a SignedPickle, not {codec!r}"
        )
    if l1 is not None and not isinstance(l1, L1):
        raise ConfigError(f"cached: l1 must be an L1, not {type(l1).__name__}")
    options = CacheOptions(
        key=key, ignore=ignore, name=name, version=version, namespace=namespace, tags=tags,
        codec=codec, l1=l1, store=store,
        ttl=ttl if ttl is None or callable(ttl) else _codec.seconds(ttl, endless=UNTIL),
        stale=_codec.seconds(stale, "stale", zero=True),
        beta=float(beta),
        jitter=float(jitter),
        lock=bool(lock),
        compute_timeout=_codec.seconds(compute_timeout, "compute_timeout"),
        max_wait=_codec.seconds(max_wait, "max_wait"),
        condition=condition,
        on_error=on_error,
        store_timeout=_codec.seconds(store_timeout, "store_timeout"),
    )  # fmt: skip
    return Decorator(options)


def _is_number(given: object, below: float) -> bool:
    return isinstance(given, int | float) and not isinstance(given, bool) and 0 <= given < below


def _names(what: str, given: object) -> tuple[str, ...]:
    if isinstance(given, Iterable) and not isinstance(given, str):
        found = tuple(given)
        if all(isinstance(each, str) for each in found):
            return found
    raise ConfigError(f"cached: {what} must be a tuple of strings, such as ('name',)")


def _decorate(fn: Any, given: CacheOptions, frame: FrameType) -> Any:
    binds: Binds = "instance"
    if isinstance(fn, staticmethod | classmethod):
        binds = "nothing" if isinstance(fn, staticmethod) else "class"
        fn = fn.__func__
    if not callable(fn) or not hasattr(fn, "__qualname__"):
        raise TypeError(
            f"cached() decorates a function, not {type(fn).__name__}; {PARENTHESES}, below other "
            "decorators such as @property"
        )
    if inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
        raise TypeError(
            f"cached {fn.__qualname__}(): a generator cannot be cached, because reading it uses it "
            "up; return a list"
        )
    is_async = inspect.iscoroutinefunction(fn)
    if binds == "instance":
        _check_self(fn, given, frame)
    if given.store is not None:
        _check_store(given.store, f"cached {fn.__qualname__}()", is_async=is_async)
    name = _name_of(fn, given)
    definition = Definition(fn, given.key, given.ignore, frame)
    named = given.name is not None
    captured = b"" if named else definition.captured
    binder = Binder(fn, name, given.ignore, given.key, given.tags, captured)
    claim(name, definition, fn.__qualname__, named=named)
    make_codec = lambda: _codec_for(fn, given.codec)  # noqa: E731  # named for its line
    core = FunctionCache(fn, name, binder, make_codec, given, is_async=is_async)
    kind: Any = AsyncCachedFunction if is_async else CachedFunction
    return kind(core, given.store, binds)


def _check_store(store: object, who: str, *, is_async: bool) -> None:
    if is_async:
        require(store, AsyncStore, f"{who}, an async function,", "a plain def")
    else:
        require(store, Store, f"{who}, a plain function,", "async def")


def _name_of(fn: Any, given: CacheOptions) -> str:
    # What multiprocessing's spawn calls a program's own module, in the children.
    module = "__main__" if fn.__module__ == "__mp_main__" else fn.__module__
    name = f"{given.name or f'{module}.{fn.__qualname__}'}:{given.version}"
    if given.namespace is not None:
        name = f"{given.namespace}:{name}"
    if len(name.encode()) > NAME_MAX:
        raise ConfigError(
            f"cached {fn.__qualname__}(): its name with module, namespace and version is longer than "
            f"{NAME_MAX} bytes; give it a shorter one with name="
        )
    return name


def _check_self(fn: Any, given: CacheOptions, frame: FrameType) -> None:
    """A method's object counts only where it says by what."""
    first = next(iter(signature_of(fn).parameters), None)
    if first != "self" or "self" in given.ignore or given.key is not None:
        return
    # The class does not exist yet; the names that its body binds are known all the same.
    body = frame.f_code
    if "__qualname__" not in frame.f_locals or "__cache_key__" in body.co_names:
        return
    raise TypeError(
        f"cached {fn.__qualname__}(): `self` has to say what of it counts. Define __cache_key__() in "
        "the class (an inherited one: __cache_key__ = Base.__cache_key__), say key=, or leave it out "
        "with ignore=('self',): then all objects share their entries"
    )


def _codec_for(fn: Any, codec: Any) -> Codec:
    if isinstance(codec, SignedPickle):
        return codec
    what = f"cached {fn.__qualname__}()"
    try:
        returned = _return_type(fn)
    except NameError as error:
        why = f"{what}: the return annotation cannot be resolved ({error}); import it at run time"
    except TypeError as error:
        why = f"{what}: the return annotation cannot be resolved: {error}"
    else:
        try:
            return TypedCodec(returned, codec)
        except ConfigError as error:
            why = f"{what}: {error}; or use codec=pgkv.SignedPickle(key)"
    raise ConfigError(why)


def _return_type(fn: Any) -> Any:
    """Resolve the return annotation and no other: those of parameters may name what is imported
    for type checkers only."""
    annotations = _annotations_of(fn)
    if "return" not in annotations:
        return Any
    while hasattr(fn, "__wrapped__"):
        fn = fn.__wrapped__
    alone = SimpleNamespace(
        __annotations__={"return": annotations["return"]},
        __globals__=getattr(fn, "__globals__", {}),
        __type_params__=getattr(fn, "__type_params__", ()),
    )
    return typing.get_type_hints(alone, include_extras=True)["return"]


def _annotations_of(fn: Any) -> dict[str, Any]:
    if sys.version_info >= (3, 14):
        from annotationlib import Format, get_annotations

        return get_annotations(fn, format=Format.FORWARDREF)
    return getattr(fn, "__annotations__", None) or {}


# -- tags ----------------------------------------------------------------------------------


@overload
def invalidate_tag(
    tag: str,
    *,
    store: AsyncStore,
    conn: psycopg.AsyncConnection[Any] | None = None,
) -> Awaitable[None]: ...
@overload
def invalidate_tag(
    tag: str, *, store: None = None, conn: psycopg.AsyncConnection[Any]
) -> Awaitable[None]: ...
@overload
def invalidate_tag(tag: str, *, store: Store | None = None, conn: Any = None) -> None: ...
def invalidate_tag(tag: str, *, store: Any = None, conn: Any = None) -> Awaitable[None] | None:
    """Make every entry with that tag a miss, of all functions, in constant time.

    A generation row of the tag is raised; computations that began before are stored under the old
    generation, which no call accepts any more. Given an `AsyncStore` or an async connection, it has
    to be awaited.

    Args:
        tag: as the template gave it, such as ``"user:1"``.
        store: whose entries; None for the default store.
        conn: the caller's connection: then it commits or rolls back with the caller's transaction.

    Raises:
        ConfigError: there is no default store, or `conn` is no psycopg 3 connection, or is
            async where the store is sync, or the reverse.
        InvalidKeyError: `tag` is no str.
    """
    if isinstance(store, AsyncStore) or (store is None and _is_async_connection(conn)):
        return _invalidate_tag(tag, store, conn)
    if _switch.off:
        return None
    if store is None:
        store = default_store()
    require(store, Store, "invalidate_tag()", "awaiting it")
    inner = None if conn is None else unwrap(conn, psycopg.Connection, "invalidate_tag()")
    for each, flow in _steps(store, tag, inner):
        each._run(flow)
    return None


async def _invalidate_tag(tag: str, store: AsyncStore | None, conn: Any) -> None:
    if _switch.off:
        return
    if store is None:
        store = default_async_store()
    inner = None if conn is None else unwrap(conn, psycopg.AsyncConnection, "invalidate_tag()")
    for each, flow in _steps(store, tag, inner):
        await each._run(flow)


def _steps(store: Store | AsyncStore, tag: object, conn: Any) -> list[tuple[Any, Any]]:
    if not isinstance(tag, str):
        raise InvalidKeyError(f"a tag must be a str, not {type(tag).__name__}")
    context = context_of(store)
    return steps_inside(context, context.sql.cache_key(TAG, tag), "bump_tag", None, conn)


def _is_async_connection(conn: object) -> bool:
    if isinstance(conn, psycopg.AsyncConnection):
        return True
    return hasattr(conn, "sync_connection") or hasattr(conn, "sync_session")  # SQLAlchemy's
