"""The session store, sync and async: two thin classes over the flows in `flows`.

Middleware is in `pgkv.patterns.web`, Flask's interface in `pgkv.integrations.flask`. The store
follows the OWASP session management guidance:
https://cheatsheetseries.owasp.org/cheatsheets/Session_Management_Cheat_Sheet.html
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, Literal, Self, TypeVar

from ..._engine._async.transaction import AsyncBoundChannel
from ..._engine._sync.transaction import BoundChannel
from ..._observe import shown
from ..._ops.op import Flow
from ..._settings import refuse_pickle
from ...aio import AsyncStore
from ...config import Seconds
from ...store import Store
from .._runtime.checks import require
from .data import KEEP, Keep, Session, SessionInfo
from .flows import SessionFlows, session_from
from .sql import LOOK_AGAIN

T = TypeVar("T")
StoreT = TypeVar("StoreT", Store, AsyncStore)

MAX_DATA_SIZE = 1 << 20


class SessionView(Generic[StoreT]):
    """What `SessionStore` and `AsyncSessionStore` share."""

    # The class of store that is needed, the name of the class, and that of its twin.
    _needs: tuple[type[Any], str, str]

    def __init__(
        self,
        store: StoreT,
        *,
        idle_timeout: Seconds = 1800,
        absolute_timeout: Seconds = 43200,
        touch_interval: Seconds = 60,
        durable: bool = True,
        max_data_size: int = MAX_DATA_SIZE,
    ) -> None:
        require(store, *self._needs)
        flows = SessionFlows(
            store._config,
            idle_timeout=idle_timeout,
            absolute_timeout=absolute_timeout,
            touch_interval=touch_interval,
            durable=durable,
            max_data_size=max_data_size,
        )
        self._bind(store, flows)

    def _bind(self, store: StoreT, flows: SessionFlows) -> None:
        self._store: StoreT = store
        self._call: Any = store._bare.call
        inside = isinstance(store._bare, BoundChannel | AsyncBoundChannel)
        self._flows = flows.inside() if inside else flows
        store._bare.watch(self._flows.sql)

    @shown
    def __repr__(self) -> str:
        return self._flows.facts()

    __reduce__ = refuse_pickle

    def using(self, conn: Any) -> Self:
        """Return this store inside the caller's own connection and transaction.

        So a new password and `destroy_user` are committed together, or not at all. The caller's
        commit decides how durable that is.

        Args:
            conn: a psycopg connection of the same kind, sync or async, or Django's or SQLAlchemy's
                wrapper of one.
        """
        view = type(self).__new__(type(self))
        view._bind(self._store.using(conn), self._flows)
        return view


class SessionStore(SessionView[Store]):
    """Sessions in a PostgreSQL table of their own, for threads.

    A session is found by a random 256-bit token. The table holds only the token's SHA-256, so a copy
    of the database is no login. An unknown, expired or malformed token is None and creates nothing.

    **Guaranteed:** a session that was destroyed, or whose time has passed by the server's clock, is
    never alive again: not by a late `save`, not by a rotation at the same moment and, on a durable
    table, not after a crash of the server (only after a fail-over to an asynchronous replica that
    had not received its end). Requests that change different top-level keys at the same time lose
    nothing.

    **Not guaranteed:** that the last second of data survives a crash. `create`, `save` and the
    note of use do not wait for the disk; `destroy`, `destroy_user` and `rotate` do. With
    ``durable=False`` a crash of the server ends all sessions.

    One store serves any number of threads. Its table is ``<table_name>_sessions``. It is created
    when first needed, and its expired rows are collected by the store's own strategy.

    Args:
        store: the store. Inside ``store.transaction()`` pass that transaction's store.
        idle_timeout: seconds without use after which a session ends; it ends at most
            `touch_interval` earlier.
        absolute_timeout: seconds after which a session ends even if it is in use. It starts again
            when a rotation changes the user.
        touch_interval: seconds between two notes of use. A load within that time writes nothing.
            0 notes every load.
        durable: a logged table. False makes it UNLOGGED.
        max_data_size: bytes of a session's data as JSON, as one request knows it.

    Raises:
        ConfigError: a duration is out of range, or `store` is not a `Store`.
    """

    _needs = (Store, "SessionStore", "AsyncSessionStore")

    def _run(self, flow: Flow[T]) -> T:
        return self._store._run(flow)

    def create(
        self,
        data: Mapping[str, Any] | None = None,
        user_id: str | int | None = None,
        metadata: Mapping[str, Any] | None = None,
        *,
        idle_timeout: Seconds | None = None,
        absolute_timeout: Seconds | None = None,
    ) -> Session:
        """Make a session and store it.

        Args:
            data: JSON values by name. Tuples come back as lists.
            user_id: the user, for `list_user` and `destroy_user`; an int comes back as text.
            metadata: what a list of devices shows: a user agent, a truncated address. pgkv does
                not read it.
            idle_timeout: this session's own, kept in its row ("remember me"); None: the store's. The
                cookie of such a session lives as long.
            absolute_timeout: likewise; to be given with an `idle_timeout` beyond the store's.

        Returns:
            The `Session`; its `id` is the token for the cookie.

        Raises:
            InvalidValueError: something is not JSON (says where), or too large.
        """
        return self._run(
            self._flows.create(data, user_id, metadata, idle_timeout, absolute_timeout)
        )

    def load(self, token: str) -> Session | None:
        """Return the live session of that token, or None: unknown, ended, expired, malformed.

        One round trip, and a second one where the use has to be noted. It waits for no lock. A token
        of the wrong form costs none. During the grace of a rotation the old token still loads the session, read-only
        and as it was before.

        Args:
            token: what the cookie held; any value is accepted.

        Raises:
            SerializationError: another program wrote something else into the row.
        """
        look = self._flows.look(token)
        # `AsyncSessionStore.load` is this with an await.
        loaded = LOOK_AGAIN if look is None else self._call(look.statement, look.params)
        if loaded is LOOK_AGAIN:
            return self._run(self._flows.load(token, looked=look is not None))
        return None if loaded is None else session_from(token, loaded)

    def exists(self, token: str) -> bool:
        """Tell whether `load` would find a session, without noting a use.

        Args:
            token: what the cookie held; any value is accepted.
        """
        return self._run(self._flows.exists(token))

    def save(
        self,
        session: Session | Mapping[str, Any],
        on_conflict: Literal["merge", "error", "last_wins"] = "merge",
        *,
        idle_timeout: Seconds | Keep | None = KEEP,
        absolute_timeout: Seconds | Keep | None = KEEP,
    ) -> None:
        """Store what changed since the session was loaded or saved. An unchanged session costs no
        query.

        It never revives a session that has ended. One that was never stored is stored.

        Args:
            session: a `Session`, or the request's.
            on_conflict: ``"merge"`` sends changed and removed top-level keys only: of each key the
                last writer's value stays. ``"error"`` sends the whole document and is refused if
                another request saved in between. ``"last_wins"`` overwrites.
            idle_timeout: of this session from now on; None: the store's again. By default it stays.
            absolute_timeout: likewise, counted from now.

        Raises:
            SessionGoneError: it has ended (``reason="gone"``), or was rotated while this request
                had the old token (``"rotated"``). Nothing was saved.
            SessionConflictError: (``"error"``) another request saved it; load it again.
            InvalidValueError: something is not JSON (says where), or too large.
        """
        self._run(self._flows.save(session, on_conflict, idle_timeout, absolute_timeout))

    def rotate(
        self,
        session: Session | Mapping[str, Any],
        *,
        user_id: str | int | Keep | None = KEEP,
        grace: Seconds = 10,
        idle_timeout: Seconds | Keep | None = KEEP,
        absolute_timeout: Seconds | Keep | None = KEEP,
    ) -> None:
        """Give the session a new token: at every login and change of privilege.

        `session.id` is the new token afterwards; unsaved changes are stored along with it. For
        `grace` seconds the old token still loads the session as it was before, read-only, for
        requests that were on their way. A session that was never stored is stored.

        Args:
            session: a `Session`, or the request's.
            user_id: the user from now on; None for no user. By default the user stays. A change
                starts the absolute timeout again.
            grace: seconds; 0 ends the old token at once, for example after a suspected theft.
            idle_timeout: see `save`.
            absolute_timeout: see `save`; a change of the user starts it again in any case.

        Raises:
            SessionConflictError: another request rotated it at the same time, and won.
            SessionGoneError: it has ended.
        """
        self._run(self._flows.rotate(session, user_id, grace, idle_timeout, absolute_timeout))

    def destroy(self, token: str | Session | Mapping[str, Any]) -> bool:
        """End a session for good; True when it was alive. It is on disk when this returns.

        Args:
            token: the token, or a `Session` or the request's: then the middleware also takes the
                cookie away. A token that a rotation replaced in the last ten minutes ends the
                session as well.

        Raises:
            ConflictError: it was rotated during each of 50 attempts; it is alive.
        """
        return self._run(self._flows.destroy(token))

    def destroy_user(
        self, user_id: str | int, keep: Session | Mapping[str, Any] | None = None
    ) -> int:
        """End all sessions of a user: "log out everywhere", or after a change of password.

        Args:
            user_id: the user.
            keep: a session that stays, such as the current one.

        Returns:
            How many were alive.

        Raises:
            ConflictError: some were rotated during each of 50 attempts, and may be alive.
        """
        return self._run(self._flows.destroy_user(user_id, keep))

    def destroy_handle(self, handle: str, user_id: str | int) -> bool:
        """End one session that `list_user` showed, if it is that user's; True when it was alive.

        A handle that a rotation replaced in the last ten minutes ends the session as well.

        Args:
            handle: of its `SessionInfo`.
            user_id: the user it must belong to, so that a known handle does not end the session of
                another user.

        Raises:
            InvalidValueError: `user_id` is neither a str nor an int.
        """
        return self._run(self._flows.destroy_handle(handle, user_id))

    def list_user(self, user_id: str | int) -> list[SessionInfo]:
        """Return a user's live sessions, the last used first; at most 1,000.

        Args:
            user_id: the user.

        Raises:
            InvalidValueError: it is neither a str nor an int.
        """
        return self._run(self._flows.list_user(user_id))

    def purge(self, limit: int = 1000) -> int:
        """Delete up to `limit` expired rows now, in short chunks that wait for no lock.

        Only needed where the store's ``ttl_cleanup_strategy`` is MANUAL. It reads the whole table.

        Args:
            limit: rows.

        Returns:
            How many were deleted.
        """
        return self._run(self._flows.purge(limit))

    def create_table(self) -> None:
        """Create the table if it is missing. Operations do that too, but not inside a caller's
        transaction."""
        self._run(self._flows.create_table())


class AsyncSessionStore(SessionView[AsyncStore]):
    """Sessions in a PostgreSQL table of their own, for asyncio: `SessionStore`, awaited, over an
    `AsyncStore`."""

    _needs = (AsyncStore, "AsyncSessionStore", "SessionStore")

    async def _run(self, flow: Flow[T]) -> T:
        # As a flow even where it is one operation: flows are never coalesced, and a statement that
        # relaxes synchronous_commit must not share a transaction with another caller's write.
        return await self._store._run(flow)

    async def create(
        self,
        data: Mapping[str, Any] | None = None,
        user_id: str | int | None = None,
        metadata: Mapping[str, Any] | None = None,
        *,
        idle_timeout: Seconds | None = None,
        absolute_timeout: Seconds | None = None,
    ) -> Session:
        """Make a session and store it; see `SessionStore.create`."""
        return await self._run(
            self._flows.create(data, user_id, metadata, idle_timeout, absolute_timeout)
        )

    async def load(self, token: str) -> Session | None:
        """Return the live session of that token, or None; see `SessionStore.load`."""
        look = self._flows.look(token)
        loaded = LOOK_AGAIN if look is None else await self._call(look.statement, look.params)
        if loaded is LOOK_AGAIN:
            return await self._run(self._flows.load(token, looked=look is not None))
        return None if loaded is None else session_from(token, loaded)

    async def exists(self, token: str) -> bool:
        """Tell whether `load` would find a session, without noting a use."""
        return await self._run(self._flows.exists(token))

    async def save(
        self,
        session: Session | Mapping[str, Any],
        on_conflict: Literal["merge", "error", "last_wins"] = "merge",
        *,
        idle_timeout: Seconds | Keep | None = KEEP,
        absolute_timeout: Seconds | Keep | None = KEEP,
    ) -> None:
        """Store what changed since the session was loaded or saved; see `SessionStore.save`."""
        await self._run(self._flows.save(session, on_conflict, idle_timeout, absolute_timeout))

    async def rotate(
        self,
        session: Session | Mapping[str, Any],
        *,
        user_id: str | int | Keep | None = KEEP,
        grace: Seconds = 10,
        idle_timeout: Seconds | Keep | None = KEEP,
        absolute_timeout: Seconds | Keep | None = KEEP,
    ) -> None:
        """Give the session a new token; see `SessionStore.rotate`."""
        await self._run(self._flows.rotate(session, user_id, grace, idle_timeout, absolute_timeout))

    async def destroy(self, token: str | Session | Mapping[str, Any]) -> bool:
        """End a session for good; True when it was alive. See `SessionStore.destroy`."""
        return await self._run(self._flows.destroy(token))

    async def destroy_user(
        self, user_id: str | int, keep: Session | Mapping[str, Any] | None = None
    ) -> int:
        """End all sessions of a user but `keep`, and return how many were alive; see
        `SessionStore.destroy_user`."""
        return await self._run(self._flows.destroy_user(user_id, keep))

    async def destroy_handle(self, handle: str, user_id: str | int) -> bool:
        """End one of a user's sessions by its handle; True when it was alive."""
        return await self._run(self._flows.destroy_handle(handle, user_id))

    async def list_user(self, user_id: str | int) -> list[SessionInfo]:
        """Return a user's live sessions, the last used first; at most 1,000."""
        return await self._run(self._flows.list_user(user_id))

    async def purge(self, limit: int = 1000) -> int:
        """Delete up to `limit` expired rows now, and return how many; see `SessionStore.purge`."""
        return await self._run(self._flows.purge(limit))

    async def create_table(self) -> None:
        """Create the table if it is missing."""
        await self._run(self._flows.create_table())
