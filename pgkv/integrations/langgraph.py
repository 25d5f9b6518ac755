"""For LangGraph: `LangGraphCache`, the cache of a graph's nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from langgraph.cache.base import BaseCache, FullKey, Namespace, ValueT
from langgraph.checkpoint.serde.base import SerializerProtocol

from ..aio import AsyncStore
from ..store import Store
from ._both import SyncAndAsync

__all__ = ["LangGraphCache"]


class LangGraphCache(SyncAndAsync, BaseCache[ValueT]):
    """LangGraph's cache: ``graph.compile(cache=LangGraphCache(store))``.

    Args:
        store: for ``invoke``.
        astore: for ``ainvoke``: an `AsyncStore` of the same table.
        serde: LangGraph's serializer of values.

    Raises:
        ConfigError: neither store is given.
    """

    def __init__(
        self,
        store: Store | None = None,
        *,
        astore: AsyncStore | None = None,
        serde: SerializerProtocol | None = None,
    ) -> None:
        SyncAndAsync.__init__(self, store, astore=astore)
        BaseCache.__init__(self, serde=serde)

    def get(self, keys: Sequence[FullKey]) -> dict[FullKey, ValueT]:
        """Return the values of those keys that exist."""
        names = {_name(key): key for key in keys}
        return self._loads(names, self._store.get_many(names))

    async def aget(self, keys: Sequence[FullKey]) -> dict[FullKey, ValueT]:
        """Return the values of those keys that exist."""
        names = {_name(key): key for key in keys}
        return self._loads(names, await self._astore.get_many(names))

    def set(self, pairs: Mapping[FullKey, tuple[ValueT, int | None]]) -> None:
        """Write the values, each with its ttl in seconds, in one statement per ttl."""
        for ttl, items in self._by_ttl(pairs).items():
            self._store.set_many(items, ttl=ttl)

    async def aset(self, pairs: Mapping[FullKey, tuple[ValueT, int | None]]) -> None:
        """Write the values, each with its ttl in seconds, in one statement per ttl."""
        for ttl, items in self._by_ttl(pairs).items():
            await self._astore.set_many(items, ttl=ttl)

    def clear(self, namespaces: Sequence[Namespace] | None = None) -> None:
        """Remove the values of those namespaces, or all."""
        for prefix in _prefixes(namespaces):
            self._store.delete_prefix(prefix)

    async def aclear(self, namespaces: Sequence[Namespace] | None = None) -> None:
        """Remove the values of those namespaces, or all."""
        for prefix in _prefixes(namespaces):
            await self._astore.delete_prefix(prefix)

    def _by_ttl(self, pairs: Mapping[FullKey, tuple[ValueT, int | None]]) -> Any:
        groups: dict[int | None, dict[str, bytes]] = {}
        for key, (value, ttl) in pairs.items():
            kind, data = self.serde.dumps_typed(value)
            groups.setdefault(ttl, {})[_name(key)] = kind.encode() + b":" + data
        return groups

    def _loads(
        self, names: Mapping[str, FullKey], found: Mapping[str, bytes]
    ) -> dict[FullKey, ValueT]:
        values = {}
        for name, stored in found.items():
            kind, _, data = stored.partition(b":")
            values[names[name]] = self.serde.loads_typed((kind.decode(), data))
        return values


def _name(key: FullKey) -> str:
    namespace, name = key
    return _prefix(namespace) + name


def _prefix(namespace: Namespace) -> str:
    # The length first: ("a",) must not begin the names of ("a", "b"), nor a part hold its end.
    parts = "".join(f"{len(part)}:{part}" for part in namespace)
    return f"langgraph:{len(namespace)}:{parts}:"


def _prefixes(namespaces: Sequence[Namespace] | None) -> list[str]:
    return ["langgraph:"] if namespaces is None else [_prefix(each) for each in namespaces]
