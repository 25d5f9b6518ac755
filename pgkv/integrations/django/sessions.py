"""Django's sessions in PostgreSQL: ``SESSION_ENGINE = "pgkv.integrations.django.sessions"``.

The table is logged: a crash of the server ends no session. Its rows are named by the SHA-256 of
the sessions' keys: a copy of the table is no login. The server's clock ends a session. With the
setting ``PGKV_SESSIONS = {"LOCATION": "default", "OPTIONS": {...}}`` it is elsewhere.

A session of a user has a second row that names it, written in the same transaction: that is how
`logout` finds all of a user's sessions. It is written before a session can be found, so none
escapes a `logout` that comes after its login.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from typing import Any

from django.conf import settings
from django.contrib.auth import SESSION_KEY
from django.contrib.sessions.backends.base import CreateError, SessionBase, UpdateError

from ...aio import AsyncStore
from ...config import Config, TableType
from ...store import Store
from .stores import STORES, config_for

__all__ = ["DjangoSession", "SessionStore", "alogout", "logout"]


def config() -> Config:
    """Return the settings of the store of sessions."""
    given = getattr(settings, "PGKV_SESSIONS", {})
    options = {"table_name": "pgkv_sessions", "table_type": TableType.REGULAR}
    return config_for(given.get("LOCATION", ""), {**options, **given.get("OPTIONS", {})})


def make_table() -> None:
    """Make the table if it is missing; ``manage.py migrate`` does it."""
    with Store(config()) as store:
        store.create_table()


def _name(session_key: str | None) -> str:
    return "s:" + hashlib.sha256((session_key or "").encode()).hexdigest()


def _owner(user: Any) -> str:
    # As django.contrib.auth keeps it in the session. The length first: one id may begin another.
    pk = user._meta.pk.value_to_string(user) if hasattr(user, "_meta") else str(user)
    return f"u:{len(pk)}:{pk}:"


class DjangoSession(SessionBase):
    """The session of a request; Django makes it.

    Args:
        session_key: what the cookie held.
    """

    modified: bool
    # Django's, and missing in its stubs:
    _get_new_session_key: Callable[[], str]
    _aget_new_session_key: Callable[[], Awaitable[str]]
    _get_session: Callable[..., dict[str, Any]]
    _aget_session: Callable[..., Awaitable[dict[str, Any]]]

    def __init__(self, session_key: str | None = None) -> None:
        super().__init__(session_key)
        self._config = config()

    @property
    def _store(self) -> Store:
        return STORES.get(self._config)

    async def _astore(self) -> AsyncStore:
        return await STORES.get_async(self._config)

    def _loaded(self, data: bytes | None) -> dict[str, Any]:
        if data is None:
            self._session_key = None
            return {}
        return self.decode(data.decode())

    def _queue(self, pipe: Any, data: dict[str, Any], age: float, must_create: bool) -> Any:
        """Queue the statements of a save; return the handle that tells whether it was written, or
        None for a session whose time is over before it begins."""
        name = _name(self.session_key)
        if age <= 0:
            pipe.delete(name)
            return None
        if user := data.get(SESSION_KEY):
            pipe.set(_owner(user) + name, b"", ttl=age)
        write = pipe.set_nx if must_create else pipe.set_xx
        return write(name, self.encode(data), ttl=age)

    def load(self) -> dict[str, Any]:
        """Return the data; an empty dict, and no key, if the session is unknown or over."""
        return self._loaded(self._store.get(_name(self.session_key)))

    async def aload(self) -> dict[str, Any]:
        """See `load`."""
        return self._loaded(await (await self._astore()).get(_name(self.session_key)))

    def exists(self, session_key: str) -> bool:
        """Tell whether there is such a session."""
        return bool(session_key) and self._store.exists(_name(session_key))

    async def aexists(self, session_key: str) -> bool:
        """See `exists`."""
        return bool(session_key) and await (await self._astore()).exists(_name(session_key))

    def create(self) -> None:
        """Give this session a new key, and store it empty."""
        while True:
            self._session_key = self._get_new_session_key()
            try:
                self.save(must_create=True)
            except CreateError:
                continue
            self.modified = True
            return

    async def acreate(self) -> None:
        """See `create`."""
        while True:
            self._session_key = await self._aget_new_session_key()
            try:
                await self.asave(must_create=True)
            except CreateError:
                continue
            self.modified = True
            return

    def save(self, must_create: bool = False) -> None:
        """Store the data; the session's time starts again.

        Args:
            must_create: only as a new session.

        Raises:
            UpdateError: the session has ended meanwhile; a late save never revives it.
            CreateError: there is one of this key.
        """
        if self.session_key is None:
            return self.create()
        data, age = self._get_session(no_load=must_create), self.get_expiry_age()
        with self._store.pipeline(atomic=True) as pipe:
            written = self._queue(pipe, data, age, must_create)
        return _check(written, must_create)

    async def asave(self, must_create: bool = False) -> None:
        """See `save`."""
        if self.session_key is None:
            return await self.acreate()
        data, age = await self._aget_session(no_load=must_create), await self.aget_expiry_age()
        async with (await self._astore()).pipeline(atomic=True) as pipe:
            written = self._queue(pipe, data, age, must_create)
        return _check(written, must_create)

    def delete(self, session_key: str | None = None) -> None:
        """End this session, or another."""
        if key := session_key or self.session_key:
            self._store.delete(_name(key))

    async def adelete(self, session_key: str | None = None) -> None:
        """See `delete`."""
        if key := session_key or self.session_key:
            await (await self._astore()).delete(_name(key))

    @classmethod
    def clear_expired(cls) -> None:
        """Delete the rows of ended sessions now; ``manage.py clearsessions`` calls it."""
        STORES.get(config()).cleanup_expired()

    @classmethod
    async def aclear_expired(cls) -> None:
        """See `clear_expired`."""
        await (await STORES.get_async(config())).cleanup_expired()


SessionStore = DjangoSession  # the name by which Django asks for it


def _check(written: Any, must_create: bool) -> None:
    if written is not None and not written.result():
        raise CreateError if must_create else UpdateError


def logout(user: Any, keep: SessionBase | None = None) -> int:
    """End all sessions of a user: "log out everywhere", or after a change of password.

    Args:
        user: a user, or the text of its primary key.
        keep: a session that stays: ``request.session``.

    Returns:
        How many were alive.
    """
    store, owner = STORES.get(config()), _owner(user)
    names = _ended(store.keys(owner), owner, keep)
    ended = store.delete_many(names)
    store.delete_many(owner + name for name in names)
    return ended


async def alogout(user: Any, keep: SessionBase | None = None) -> int:
    """See `logout`."""
    store, owner = await STORES.get_async(config()), _owner(user)
    names = _ended(await store.keys(owner), owner, keep)
    ended = await store.delete_many(names)
    await store.delete_many(owner + name for name in names)
    return ended


def _ended(found: list[str], owner: str, keep: SessionBase | None) -> list[str]:
    kept = _name(keep.session_key) if keep is not None and keep.session_key else ""
    return [name for key in found if (name := key.removeprefix(owner)) != kept]
