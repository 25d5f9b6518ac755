"""`cached`: keep what a function returns in PostgreSQL, for all processes."""

from .decorator import (
    L1,
    AsyncCachedFunction,
    CachedFunction,
    CachedValue,
    CacheInfo,
    SignedPickle,
    cached,
    cached_functions,
    invalidate_tag,
)

__all__ = [  # noqa: RUF022  # plain order, as in pgkv
    "AsyncCachedFunction",
    "CacheInfo",
    "CachedFunction",
    "CachedValue",
    "L1",
    "SignedPickle",
    "cached",
    "cached_functions",
    "invalidate_tag",
]
