"""`TypedStore`: a store whose values are of one Python type.

A thin layer: a serializer, the store's statements and its channel.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from ._engine import flows as _flows
from ._engine._async.coalesce import AsyncChannel
from ._engine._sync.channel import Channel
from ._observe import shown
from ._ops.op import Flow
from ._ops.serialize import CodecName, Serializer
from ._settings import refuse_pickle
from ._sql import Statements
from ._sql.point import REPEATS
from .config import Seconds
from .errors import ConflictError
from .types import TypedCasResult

T = TypeVar("T")


class _Typed(Generic[T]):
    """What the sync and the async typed store share: values to bytes and back.

    Args:
        store: the `Store` or `AsyncStore` that keeps the bytes.
        type_: see `Store.typed`.
        codec: ``"json"`` or ``"msgpack"``.
    """

    def __init__(self, store: Any, type_: Any, codec: CodecName) -> None:
        self._store = store
        self._sql: Statements = store._sql
        self._channel = store._channel
        self._serializer: Serializer[T] = Serializer(type_, codec)

    @shown
    def __repr__(self) -> str:
        serializer = self._serializer
        return f"of {serializer.name} in {serializer.codec}, {self._store}"

    __reduce__ = refuse_pickle

    def _encode(self, key: str, value: T) -> bytes:
        return self._serializer.encode(key, value)

    def _decode(self, key: str, raw: bytes) -> T:
        return self._serializer.decode(key, raw)

    def _decode_or_none(self, key: str, raw: bytes | None) -> T | None:
        return None if raw is None else self._serializer.decode(key, raw)

    def _decode_all(self, found: dict[str, bytes]) -> dict[str, T]:
        return {key: self._decode(key, raw) for key, raw in found.items()}

    def _encode_all(
        self, items: Mapping[str, T] | Iterable[tuple[str, T]]
    ) -> Iterator[tuple[str, bytes]]:
        pairs = items.items() if isinstance(items, Mapping) else items
        return ((key, self._encode(key, value)) for key, value in pairs)

    def _swap(
        self, key: str, expected: T | None, new: T, ttl: Seconds | None
    ) -> Flow[TypedCasResult[T]]:
        wanted = None if expected is None else self._encode(key, expected)
        written = self._encode(key, new)
        result = yield from _flows.swap(self._sql, key, wanted, written, ttl)
        attempts = 1
        # The server compares bytes. Equal values may have others: a dict keeps its order.
        while (
            wanted is not None
            and result.is_mismatch
            and self._serializer.same(wanted, result.current or b"")
        ):
            if attempts == REPEATS:
                raise ConflictError(
                    f"compare_and_swap: {attempts} attempts in a row met concurrent changes; "
                    "nothing was changed"
                )
            attempts += 1
            result = yield from _flows.swap(self._sql, key, result.current, written, ttl)
        current = self._decode_or_none(key, result.current)
        return TypedCasResult(result.status, current, result.version)


class TypedStore(_Typed[T]):
    """A store of values of one type; made by `Store.typed`.

    A written value reads back as the same value, of the same types. A value that would change in
    part is refused with a `SerializationError` before anything is sent. Reading a stored value that
    does not fit the type raises the same error, and never returns a half-built object. Messages
    name the key and the path inside the value, not the data. Everything else is as in `Store`.
    """

    _channel: Channel

    def get(self, key: str) -> T | None:
        """Return the value, or None when there is no such key."""
        return self._decode_or_none(key, self._channel.execute(self._sql.get(key)))

    def get_or_raise(self, key: str) -> T:
        """Return the value.

        Raises:
            NotFoundError: there is no such key.
        """
        return self._decode(key, self._store.get_or_raise(key))

    def set(
        self,
        key: str,
        value: T,
        *,
        ttl: Seconds | None = None,
        if_version: int | None = None,
    ) -> int | None:
        """Write the value; return the new version. See `Store.set`."""
        op = self._sql.set(key, self._encode(key, value), ttl, if_version=if_version)
        return self._channel.execute(op)

    def set_nx(self, key: str, value: T, *, ttl: Seconds | None = None) -> bool:
        """Write the value if there is no such key; True if it was written."""
        return self._channel.execute(self._sql.set_nx(key, self._encode(key, value), ttl))

    def get_many(self, keys: Iterable[str]) -> dict[str, T]:
        """Return the values of those keys that exist, read in one snapshot."""
        op = self._sql.get_many(keys)
        return {} if op is None else self._decode_all(self._channel.execute(op))

    def set_many(
        self, items: Mapping[str, T] | Iterable[tuple[str, T]], *, ttl: Seconds | None = None
    ) -> int:
        """Write all pairs or none; return how many distinct keys."""
        count, ops = self._sql.set_many(self._encode_all(items), ttl)
        return self._channel.run(_flows.written(count, ops))

    def delete(self, key: str, *, if_version: int | None = None) -> bool:
        """Remove the key. True if it was there."""
        return self._channel.execute(self._sql.delete(key, if_version))

    def compare_and_swap(
        self, key: str, expected: T | None, new: T, *, ttl: Seconds | None = None
    ) -> TypedCasResult[T]:
        """Write `new` if the value is `expected` (None: if there is no such key).

        Values are compared, with their types, and not their encoded forms: the order in which a
        dict or a set was filled does not matter. Where the forms differ it takes a second round
        trip.

        Raises:
            ConflictError: a hundred attempts in a row met concurrent changes.
        """
        return self._channel.run(self._swap(key, expected, new, ttl))

    def update(
        self,
        key: str,
        fn: Callable[[T | None], T],
        *,
        ttl: Seconds | None = None,
        attempts: int = 100,
    ) -> T:
        """Write ``fn(current)``; repeated until no other client changed the value in between.

        See `Store.update` for what it does not notice.

        Args:
            key: the key.
            fn: maps the current value (None without one) to the new one. It may run several times.
            ttl: seconds; without it a live key keeps its expiry.
            attempts: how often to try.

        Returns:
            The value written.
        """

        def apply(raw: bytes | None) -> bytes:
            return self._encode(key, fn(self._decode_or_none(key, raw)))

        return self._decode(key, self._store.update(key, apply, ttl=ttl, attempts=attempts))

    def iter_items(self, prefix: str = "", *, page_size: int = 1000) -> Iterator[tuple[str, T]]:
        """Iterate over keys and values with a prefix, page by page."""
        for key, raw in self._store.iter_items(prefix, page_size=page_size):
            yield key, self._decode(key, raw)


class AsyncTypedStore(_Typed[T]):
    """A store of values of one type; made by `AsyncStore.typed`. See `TypedStore`."""

    _channel: AsyncChannel

    async def get(self, key: str) -> T | None:
        """Return the value, or None when there is no such key."""
        return self._decode_or_none(key, await self._channel.execute(self._sql.get(key)))

    async def get_or_raise(self, key: str) -> T:
        """Return the value, or raise `NotFoundError`."""
        return self._decode(key, await self._store.get_or_raise(key))

    async def set(
        self,
        key: str,
        value: T,
        *,
        ttl: Seconds | None = None,
        if_version: int | None = None,
    ) -> int | None:
        """Write the value; return the new version. See `Store.set`."""
        op = self._sql.set(key, self._encode(key, value), ttl, if_version=if_version)
        return await self._channel.execute(op)

    async def set_nx(self, key: str, value: T, *, ttl: Seconds | None = None) -> bool:
        """Write the value if there is no such key; True if it was written."""
        return await self._channel.execute(self._sql.set_nx(key, self._encode(key, value), ttl))

    async def get_many(self, keys: Iterable[str]) -> dict[str, T]:
        """Return the values of those keys that exist, read in one snapshot."""
        op = self._sql.get_many(keys)
        return {} if op is None else self._decode_all(await self._channel.execute(op))

    async def set_many(
        self, items: Mapping[str, T] | Iterable[tuple[str, T]], *, ttl: Seconds | None = None
    ) -> int:
        """Write all pairs or none; return how many distinct keys."""
        count, ops = self._sql.set_many(self._encode_all(items), ttl)
        return await self._channel.run(_flows.written(count, ops))

    async def delete(self, key: str, *, if_version: int | None = None) -> bool:
        """Remove the key. True if it was there."""
        return await self._channel.execute(self._sql.delete(key, if_version))

    async def compare_and_swap(
        self, key: str, expected: T | None, new: T, *, ttl: Seconds | None = None
    ) -> TypedCasResult[T]:
        """Write `new` if the value is `expected`; see `TypedStore.compare_and_swap`."""
        return await self._channel.run(self._swap(key, expected, new, ttl))

    async def update(
        self,
        key: str,
        fn: Callable[[T | None], T | Awaitable[T]],
        *,
        ttl: Seconds | None = None,
        attempts: int = 100,
    ) -> T:
        """Write ``fn(current)``, where `fn` may be async; see `TypedStore.update`."""

        async def apply(raw: bytes | None) -> bytes:
            new = fn(self._decode_or_none(key, raw))
            return self._encode(key, await new if inspect.isawaitable(new) else new)

        return self._decode(key, await self._store.update(key, apply, ttl=ttl, attempts=attempts))

    async def iter_items(
        self, prefix: str = "", *, page_size: int = 1000
    ) -> AsyncIterator[tuple[str, T]]:
        """Iterate over keys and values with a prefix, page by page."""
        async for key, raw in self._store.iter_items(prefix, page_size=page_size):
            yield key, self._decode(key, raw)
