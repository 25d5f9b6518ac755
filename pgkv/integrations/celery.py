"""For Celery: results of tasks in PostgreSQL: ``result_backend = "pgkv+postgresql://..."``.

The extra's entry point registers the scheme; elsewhere name the class:
``result_backend = "pgkv.integrations.celery.CeleryBackend"``.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from celery.backends.base import KeyValueStoreBackend

from .._ops.lazy import cached_property
from ..config import TableType
from ..store import Store

__all__ = ["CeleryBackend"]


class CeleryBackend(KeyValueStoreBackend):
    """Celery's result backend: results, groups and chords in the table ``celery_results``.

    The table is logged, so results survive a crash of the server. Fields of `Config` go into
    ``result_backend_transport_options = {"pgkv": {...}}``.

    Args:
        app: the Celery application.
        url: the DSN, after ``pgkv+``.
        expires: seconds or a timedelta; Celery's ``result_expires`` by default.
        kwargs: Celery's.
    """

    app: Any  # missing in Celery's stubs
    implements_incr = True  # so that a chord's end is counted, not polled
    supports_native_join = True

    @staticmethod
    def key_t(key: str | bytes) -> str:  # type: ignore[override]  # the stubs know bytes only
        """Return a key as text; Celery's are bytes."""
        return key if isinstance(key, str) else bytes(key).decode()

    def __init__(
        self,
        app: Any,
        url: str | None = None,
        expires: float | timedelta | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(app, **{**kwargs, "expires": expires})
        self.url = url
        self.expires: float | None = self.prepare_expires(expires, type=int)

    @cached_property
    def _store(self) -> Store:
        options = {"table_name": "celery_results", "table_type": TableType.REGULAR}
        options |= self.app.conf.get("result_backend_transport_options", {}).get("pgkv", {})
        return Store.connect(self.url, **options)  # type: ignore[arg-type]  # checked by Config

    def get(self, key: str) -> bytes | None:
        """Return the value, or None."""
        return self._store.get(key)

    def mget(self, keys: Sequence[str]) -> list[bytes | None]:
        """Return the values in the order of the keys."""
        found = self._store.get_many(keys)
        return [found.get(key) for key in keys]

    def set(self, key: str, value: bytes | str) -> None:
        """Write the value; it ends after ``result_expires``."""
        self._store.set(key, value, ttl=self.expires or None)

    def delete(self, key: str) -> None:
        """Remove the key, if it is there."""
        self._store.delete(key)

    def incr(self, key: str) -> int:
        """Add 1 to an integer, atomically."""
        return self._store.increment(key)

    def expire(self, key: str, value: int) -> None:
        """Give the key a new ttl in seconds."""
        self._store.expire(key, value)

    def cleanup(self) -> None:
        """Delete expired results; ``celery beat`` calls it daily."""
        self._store.cleanup_expired()
