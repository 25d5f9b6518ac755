"""For py-key-value, the store of FastMCP and others: `KeyValueStore`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from key_value.aio._utils.managed_entry import ManagedEntry  # where its own stores take it from
from key_value.aio.stores.base import BaseContextManagerStore, BaseDestroyCollectionStore

from ..aio import AsyncStore

__all__ = ["KeyValueStore"]


class KeyValueStore(BaseDestroyCollectionStore, BaseContextManagerStore):
    """py-key-value's store on an `AsyncStore`. Batches are one statement; the server's clock ends
    what has a ttl.

    Args:
        store: the store; it stays yours to close.
        default_collection: the collection of calls that name none.
        options: those of py-key-value's own stores: ``seed``, the sanitization strategies.
    """

    def __init__(
        self, store: AsyncStore, *, default_collection: str | None = None, **options: Any
    ) -> None:
        super().__init__(
            client_provided_by_user=True,
            default_collection=default_collection,
            stable_api=True,
            **options,
        )
        self._store = store

    def _of(self, collection: str) -> AsyncStore:
        # Quoted, so that "a:" with the key "b" and "a" with ":b" are two.
        return self._store.namespace(collection.replace("\\", "\\\\").replace(":", "\\:") + "::")

    def _dumps(self, entry: ManagedEntry, key: str, collection: str) -> str:
        return self._serialization_adapter.dump_json(entry, key=key, collection=collection)

    def _loads(self, data: bytes | None) -> ManagedEntry | None:
        return None if data is None else self._serialization_adapter.load_json(data.decode())

    async def _get_managed_entry(self, *, collection: str, key: str) -> ManagedEntry | None:
        return self._loads(await self._of(collection).get(key))

    async def _get_managed_entries(
        self, *, collection: str, keys: Sequence[str]
    ) -> list[ManagedEntry | None]:
        found = await self._of(collection).get_many(keys)
        return [self._loads(found.get(key)) for key in keys]

    async def _put_managed_entry(
        self, *, collection: str, key: str, managed_entry: ManagedEntry
    ) -> None:
        data = self._dumps(managed_entry, key, collection)
        await self._of(collection).set(key, data, expires_at=managed_entry.expires_at)

    async def _put_managed_entries(
        self,
        *,
        collection: str,
        keys: Sequence[str],
        managed_entries: Sequence[ManagedEntry],
        ttl: float | None,
        created_at: datetime,  # noqa: ARG002  # in the entries
        expires_at: datetime | None,  # noqa: ARG002  # in the entries
    ) -> None:
        entries = zip(keys, managed_entries, strict=True)
        items = {key: self._dumps(entry, key, collection) for key, entry in entries}
        await self._of(collection).set_many(items, ttl=ttl)

    async def _delete_managed_entry(self, *, collection: str, key: str) -> bool:
        return await self._of(collection).delete(key)

    async def _delete_managed_entries(self, *, collection: str, keys: Sequence[str]) -> int:
        return await self._of(collection).delete_many(keys)

    async def _delete_collection(self, *, collection: str) -> bool:
        return await self._of(collection).clear() > 0
