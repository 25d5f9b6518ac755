"""For LangChain: `LangChainStore`, a byte store, for example of `CacheBackedEmbeddings`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence

from langchain_core.stores import BaseStore

from ._both import SyncAndAsync

__all__ = ["LangChainStore"]


class LangChainStore(SyncAndAsync, BaseStore[str, bytes]):
    """LangChain's `ByteStore`: each call is one statement.

    Args:
        store: for ``mget`` and its like.
        astore: for ``amget`` and its like: an `AsyncStore` of the same table.

    Raises:
        ConfigError: neither is given.
    """

    def mget(self, keys: Sequence[str]) -> list[bytes | None]:
        """Return the values in the order of the keys, None where there is none."""
        found = self._store.get_many(keys)
        return [found.get(key) for key in keys]

    async def amget(self, keys: Sequence[str]) -> list[bytes | None]:
        """See `mget`."""
        found = await self._astore.get_many(keys)
        return [found.get(key) for key in keys]

    def mset(self, key_value_pairs: Sequence[tuple[str, bytes]]) -> None:
        """Write all pairs or none."""
        self._store.set_many(key_value_pairs)

    async def amset(self, key_value_pairs: Sequence[tuple[str, bytes]]) -> None:
        """See `mset`."""
        await self._astore.set_many(key_value_pairs)

    def mdelete(self, keys: Sequence[str]) -> None:
        """Remove all the keys."""
        self._store.delete_many(keys)

    async def amdelete(self, keys: Sequence[str]) -> None:
        """See `mdelete`."""
        await self._astore.delete_many(keys)

    def yield_keys(self, *, prefix: str | None = None) -> Iterator[str]:
        """Iterate over the keys with a prefix."""
        yield from self._store.iter_keys(prefix or "")

    async def ayield_keys(self, *, prefix: str | None = None) -> AsyncIterator[str]:
        """See `yield_keys`."""
        async for key in self._astore.iter_keys(prefix or ""):
            yield key
