"""What adapters share whose contract has blocking and awaited methods on one object."""

from __future__ import annotations

from ..aio import AsyncStore
from ..errors import ConfigError
from ..store import Store


class SyncAndAsync:
    """A `Store` for blocking methods, an `AsyncStore` for awaited ones, or both.

    Args:
        store: the one.
        astore: the other, of the same table.

    Raises:
        ConfigError: neither is given.
    """

    def __init__(self, store: Store | None = None, *, astore: AsyncStore | None = None) -> None:
        if store is None and astore is None:
            raise ConfigError(
                f"{type(self).__name__} needs a Store, or astore= for its async methods"
            )
        self._given, self._agiven = store, astore

    @property
    def _store(self) -> Store:
        if self._given is None:
            raise ConfigError(
                f"blocking methods of {type(self).__name__} need its `store`, a Store"
            )
        return self._given

    @property
    def _astore(self) -> AsyncStore:
        if self._agiven is None:
            raise ConfigError(
                f"async methods of {type(self).__name__} need its `astore`, an AsyncStore"
            )
        return self._agiven
