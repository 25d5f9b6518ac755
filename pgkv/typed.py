"""`TypedStore`: a store whose values are of one Python type.

A thin layer: a serializer and a store's own operations. It knows a store by a small protocol, and
nothing of connections.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from ._observe import shown
from ._ops.serialize import CodecName, Serializer
from ._settings import refuse_pickle
from .types import CasResult, CasStatus, KeyValue

if TYPE_CHECKING:
    from .config import Seconds

T = TypeVar("T")


class ByteStore(Protocol):
    """What a `TypedStore` needs of the store below it."""

    def get(self, key: str, /) -> bytes | None: ...
    def get_or_raise(self, key: str, /) -> bytes: ...
    def set(
        self, key: str, value: bytes, /, *, ttl: Seconds | None, if_version: int | None
    ) -> int | None: ...
    def set_nx(self, key: str, value: bytes, /, *, ttl: Seconds | None) -> bool: ...
    def get_many(self, keys: Iterable[str], /) -> dict[str, bytes]: ...
    def set_many(self, items: Iterable[tuple[str, bytes]], /, *, ttl: Seconds | None) -> int: ...
    def delete(self, key: str, /, *, if_version: int | None) -> bool: ...
    def compare_and_swap(
        self, key: str, expected: bytes | None, new: bytes, /, *, ttl: Seconds | None
    ) -> CasResult: ...
    def update(
        self,
        key: str,
        fn: Callable[[bytes | None], bytes],
        /,
        *,
        ttl: Seconds | None,
        attempts: int,
    ) -> bytes: ...
    def iter_items(self, prefix: str, /, *, page_size: int) -> Iterator[KeyValue]: ...


class AsyncByteStore(Protocol):
    """What an `AsyncTypedStore` needs of the store below it."""

    async def get(self, key: str, /) -> bytes | None: ...
    async def get_or_raise(self, key: str, /) -> bytes: ...
    async def set(
        self, key: str, value: bytes, /, *, ttl: Seconds | None, if_version: int | None
    ) -> int | None: ...
    async def set_nx(self, key: str, value: bytes, /, *, ttl: Seconds | None) -> bool: ...
    async def get_many(self, keys: Iterable[str], /) -> dict[str, bytes]: ...
    async def set_many(
        self, items: Iterable[tuple[str, bytes]], /, *, ttl: Seconds | None
    ) -> int: ...
    async def delete(self, key: str, /, *, if_version: int | None) -> bool: ...
    async def compare_and_swap(
        self, key: str, expected: bytes | None, new: bytes, /, *, ttl: Seconds | None
    ) -> CasResult: ...
    async def update(
        self,
        key: str,
        fn: Callable[[bytes | None], Awaitable[bytes]],
        /,
        *,
        ttl: Seconds | None,
        attempts: int,
    ) -> bytes: ...
    def iter_items(self, prefix: str, /, *, page_size: int) -> AsyncIterator[KeyValue]: ...


@dataclass(frozen=True, slots=True)
class TypedCasResult(Generic[T]):
    """The outcome of a typed `compare_and_swap`; true when it succeeded. See `CasResult`.

    Attributes:
        status: SUCCESS, MISMATCH or NOT_FOUND.
        current: the value now stored, None when there is no such key.
        version: that value's version, or None.
    """

    status: CasStatus
    current: T | None
    version: int | None

    @property
    def is_success(self) -> bool:
        """The new value was written."""
        return self.status is CasStatus.SUCCESS

    @property
    def is_mismatch(self) -> bool:
        """Another value was found; nothing changed."""
        return self.status is CasStatus.MISMATCH

    @property
    def is_not_found(self) -> bool:
        """A value was expected and there is no such key; nothing changed."""
        return self.status is CasStatus.NOT_FOUND

    def __bool__(self) -> bool:
        return self.is_success

    def __repr__(self) -> str:
        return (
            f"TypedCasResult(status={self.status}, current={self.current!r}, "
            f"version={self.version})"
        )


class _Typed(Generic[T]):
    """What both colours share: the type, and the way of values to bytes and back."""

    def __init__(self, store: Any, type_: Any, codec: CodecName) -> None:
        self._store = store
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

    def _typed_result(self, key: str, result: CasResult) -> TypedCasResult[T]:
        current = self._decode_or_none(key, result.current)
        return TypedCasResult(result.status, current, result.version)


class TypedStore(_Typed[T]):
    """A store of values of one type; made by `Store.typed`.

    A stored value that does not fit the type raises `SerializationError`, which names the key and
    the path inside the value: never a half-built object. Everything else is as in `Store`.
    """

    _store: ByteStore

    def get(self, key: str) -> T | None:
        """Return the value, or None when there is no such key."""
        return self._decode_or_none(key, self._store.get(key))

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
        return self._store.set(key, self._encode(key, value), ttl=ttl, if_version=if_version)

    def set_nx(self, key: str, value: T, *, ttl: Seconds | None = None) -> bool:
        """Write the value if there is no such key; True if it was written."""
        return self._store.set_nx(key, self._encode(key, value), ttl=ttl)

    def get_many(self, keys: Iterable[str]) -> dict[str, T]:
        """Return the values of those keys that exist, read in one snapshot."""
        return self._decode_all(self._store.get_many(keys))

    def set_many(
        self, items: Mapping[str, T] | Iterable[tuple[str, T]], *, ttl: Seconds | None = None
    ) -> int:
        """Write all pairs or none; return how many distinct keys."""
        return self._store.set_many(self._encode_all(items), ttl=ttl)

    def delete(self, key: str, *, if_version: int | None = None) -> bool:
        """Remove the key. True if it was there."""
        return self._store.delete(key, if_version=if_version)

    def compare_and_swap(
        self, key: str, expected: T | None, new: T, *, ttl: Seconds | None = None
    ) -> TypedCasResult[T]:
        """Write `new` if the value is `expected` (None: if there is no such key).

        The encoded forms are compared: keys of objects are written in a fixed order, so equal
        values have equal forms as long as the type's definition does not change.
        """
        old = None if expected is None else self._encode(key, expected)
        result = self._store.compare_and_swap(key, old, self._encode(key, new), ttl=ttl)
        return self._typed_result(key, result)

    def update(
        self,
        key: str,
        fn: Callable[[T | None], T],
        *,
        ttl: Seconds | None = None,
        attempts: int = 100,
    ) -> T:
        """Write ``fn(current)``, repeated until nobody changed the value in between.

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

    _store: AsyncByteStore

    async def get(self, key: str) -> T | None:
        return self._decode_or_none(key, await self._store.get(key))

    async def get_or_raise(self, key: str) -> T:
        return self._decode(key, await self._store.get_or_raise(key))

    async def set(
        self,
        key: str,
        value: T,
        *,
        ttl: Seconds | None = None,
        if_version: int | None = None,
    ) -> int | None:
        return await self._store.set(key, self._encode(key, value), ttl=ttl, if_version=if_version)

    async def set_nx(self, key: str, value: T, *, ttl: Seconds | None = None) -> bool:
        return await self._store.set_nx(key, self._encode(key, value), ttl=ttl)

    async def get_many(self, keys: Iterable[str]) -> dict[str, T]:
        return self._decode_all(await self._store.get_many(keys))

    async def set_many(
        self, items: Mapping[str, T] | Iterable[tuple[str, T]], *, ttl: Seconds | None = None
    ) -> int:
        return await self._store.set_many(self._encode_all(items), ttl=ttl)

    async def delete(self, key: str, *, if_version: int | None = None) -> bool:
        return await self._store.delete(key, if_version=if_version)

    async def compare_and_swap(
        self, key: str, expected: T | None, new: T, *, ttl: Seconds | None = None
    ) -> TypedCasResult[T]:
        old = None if expected is None else self._encode(key, expected)
        result = await self._store.compare_and_swap(key, old, self._encode(key, new), ttl=ttl)
        return self._typed_result(key, result)

    async def update(
        self,
        key: str,
        fn: Callable[[T | None], T | Awaitable[T]],
        *,
        ttl: Seconds | None = None,
        attempts: int = 100,
    ) -> T:
        async def apply(raw: bytes | None) -> bytes:
            new = fn(self._decode_or_none(key, raw))
            return self._encode(key, await new if inspect.isawaitable(new) else new)

        return self._decode(key, await self._store.update(key, apply, ttl=ttl, attempts=attempts))

    async def iter_items(
        self, prefix: str = "", *, page_size: int = 1000
    ) -> AsyncIterator[tuple[str, T]]:
        async for key, raw in self._store.iter_items(prefix, page_size=page_size):
            yield key, self._decode(key, raw)


def document(mirror: type, original: type) -> None:
    """Give each undocumented method the docstring of the one it mirrors."""
    for name, member in vars(mirror).items():
        twin = inspect.getattr_static(original, name, None)
        function = member.__func__ if isinstance(member, classmethod) else member
        source = twin.__func__ if isinstance(twin, classmethod) else twin
        if inspect.isfunction(function) and source is not None and not function.__doc__:
            function.__doc__ = source.__doc__


document(AsyncTypedStore, TypedStore)
