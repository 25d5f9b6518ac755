"""For Litestar: `LitestarStore`, for its response cache, rate limits and server-side sessions."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Self

from litestar.stores.base import NamespacedStore

from ..aio import AsyncStore

__all__ = ["LitestarStore"]


class LitestarStore(NamespacedStore):
    """A Litestar store on an `AsyncStore`: ``Litestar(stores={"sessions": LitestarStore(store)})``.

    Args:
        store: the store; it stays yours to close, for example in the application's lifespan.
    """

    __slots__ = ("_store",)

    def __init__(self, store: AsyncStore) -> None:
        self._store = store

    def with_namespace(self, namespace: str) -> Self:
        """Return a store of the keys under that namespace; `delete_all` here empties it too."""
        return type(self)(self._store.namespace(f"{namespace}_"))

    async def set(
        self, key: str, value: str | bytes, expires_in: int | timedelta | None = None
    ) -> None:
        """Write the value; `expires_in` is seconds or a timedelta."""
        await self._store.set(key, value, ttl=expires_in or None)

    async def get(self, key: str, renew_for: int | timedelta | None = None) -> bytes | None:
        """Return the value; with `renew_for` its time starts again, if it has one."""
        if renew_for is None:
            return await self._store.get(key)
        entry = await self._store.get_entry(key)
        if entry is None or entry.expires_at is None:
            return None if entry is None else entry.value
        return await self._store.get_and_touch(key, renew_for)

    async def delete(self, key: str) -> None:
        """Remove the key, if it is there."""
        await self._store.delete(key)

    async def delete_all(self) -> None:
        """Remove every key of this namespace and of those below it."""
        await self._store.clear()

    async def exists(self, key: str) -> bool:
        """Tell whether the key exists."""
        return await self._store.exists(key)

    async def expires_in(self, key: str) -> int | None:
        """Return the seconds left; None when there is no such key, or no end."""
        left = await self._store.ttl(key)
        return None if left is None or left == math.inf else int(left)
