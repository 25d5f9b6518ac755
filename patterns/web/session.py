"""The session of one request, independent of ASGI, WSGI and Flask.

`SessionSettings` are an adapter's options. A `SessionHandler` holds the tokens of the request and
the session that the program sees. Before the head of the response is sent it settles: it saves the
changes and determines the cookie to send.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any, Final, Generic, Literal, TypeAlias, TypeVar, Unpack

from ... import _observe
from ..._observe import shown
from ..._ops.op import Flow
from ...config import Seconds, require_seconds
from ...errors import (
    ConfigError,
    ConflictError,
    OperationTimeoutError,
    PgkvError,
    QueryError,
    SessionGoneError,
    StoreUnavailableError,
)
from .._runtime.checks import require
from ..session.data import Session
from ..session.flows import SessionFlows
from ..session.request import RequestSession
from .cookie import Cookie, CookieOptions, made_private
from .request import Exempt, exemption

A = TypeVar("A")
S = TypeVar("S")

OnSessionError: TypeAlias = Literal["503", "anonymous", "raise"]

TIMEOUT = 5.0
FAILED = "the session could not be loaded or saved"
# The errors `on_error` handles. A wrong argument or a missing right is no outage.
OUTAGES: Final = (StoreUnavailableError, OperationTimeoutError, QueryError, ConflictError)

UNAVAILABLE: Final = 503
RETRY_AFTER: Final = 5
UNAVAILABLE_BODY: Final = json.dumps(
    {"type": "about:blank", "title": "Service Unavailable", "status": UNAVAILABLE}
).encode()
UNAVAILABLE_HEADERS: Final = {
    "Retry-After": str(RETRY_AFTER),
    "Cache-Control": "no-store",
    "Content-Type": "application/problem+json",
    "Content-Length": str(len(UNAVAILABLE_BODY)),
}


class SessionOptions(CookieOptions, total=False):
    """The options of session middleware: those of `CookieOptions`, and its use of the database.

    Attributes:
        exempt: paths within the application that have no session (each with all below it), or a
            function of the ASGI scope or WSGI environ that is true for requests without one.
        timeout: seconds that each statement may take, connecting and repeats included. Default 5,
            and never more than the store's `operation_timeout`; None for that.
        on_error: when the database does not answer in time: ``"503"`` (the default) answers 503 with
            ``Retry-After``; ``"anonymous"`` serves a request whose session cannot be read without
            one, keeps nothing that the program puts into it, and leaves the cookie alone (a change
            that cannot be saved is still answered with 503); ``"raise"`` raises the error.
    """

    exempt: Exempt
    timeout: Seconds | None
    on_error: OnSessionError


class SessionSettings:
    """A session store and the options of an adapter, checked once. `twin` is the adapter for stores of
    the other class."""

    def __init__(
        self,
        store_class: type[Any],
        adapter: str,
        twin: str,
        sessions: Any,
        options: SessionOptions,
    ) -> None:
        require(sessions, store_class, adapter, twin)
        given: dict[str, Any] = {"timeout": TIMEOUT, "on_error": "503", "exempt": None, **options}
        self.sessions = sessions
        self.flows: SessionFlows = sessions._flows
        self.is_exempt: Callable[[Any, str], bool] = exemption(given.pop("exempt"))
        timeout = given.pop("timeout")
        longest = self.flows.config.operation_timeout
        self.timeout: float = (
            longest if timeout is None else min(longest, require_seconds("timeout", timeout))
        )
        self.on_error: OnSessionError = given.pop("on_error")
        if self.on_error not in ("503", "anonymous", "raise"):
            raise ConfigError(
                f"on_error must be '503', 'anonymous' or 'raise', not {self.on_error!r}"
            )
        self.cookie: Cookie = Cookie(**given)

    def facts(self) -> str:
        return f"cookie={self.cookie.name!r} sessions={self.sessions!r}"

    def run(self, flow: Flow[Any]) -> Any:
        """Run a flow within the timeout; for an async store, return the coroutine that does."""
        return self.sessions._store._run(flow, self.timeout)

    def answers(self, error: PgkvError) -> bool:
        """Whether a request with this failure is answered with 503."""
        return self.on_error != "raise" and isinstance(error, OUTAGES)


class SessionAdapter(Generic[A, S]):
    """What the middleware of ASGI and that of WSGI have in common."""

    _names: tuple[type[Any], str, str]  # its class of session stores, its name, and its twin's

    def __init__(self, app: A, *, sessions: S, **options: Unpack[SessionOptions]) -> None:
        self.app = app
        self._settings = SessionSettings(*self._names, sessions, options)

    @shown
    def __repr__(self) -> str:
        return self._settings.facts()


class SessionHandler:
    """The session of one request: `data` is what the program sees.

    Attributes:
        failure: the error that prevented loading or saving the session.
        closed: the head of the response is on its way.
    """

    def __init__(
        self, settings: SessionSettings, cookies: Iterable[str], data: RequestSession
    ) -> None:
        self.settings = settings
        self.data = data
        self.failure: PgkvError | None = None
        self._tokens = settings.cookie.find(cookies)
        # The token that the browser has, and the one that it will have.
        self._had = self._browser = self._tokens[0] if self._tokens else ""
        self._dropped = False  # a save was refused: later changes of this request are refused too
        self.closed: bool = False
        self._cookie: list[tuple[str, str]] | None = None  # of the response's head

    def open(self) -> Flow[Session]:
        """Load the session, once. Without a live session, return a new one that is not stored
        yet."""
        if not self.data.is_loaded:
            found = None
            if self._tokens:
                try:
                    found = yield from self._find()
                    self.failure = None
                except OUTAGES as error:
                    self._fail(error)
                    if self.settings.on_error != "anonymous":
                        raise
            if not self.data.is_loaded:  # another task of this request may have been faster
                self.data.fill(found or Session({}))
        session = self.data._session
        assert session is not None
        return session

    def _find(self) -> Flow[Session | None]:
        """The first live session; one that a rotation has replaced is used only if there is no
        other."""
        moved = None
        for token in self._tokens:
            session = yield from self.settings.flows.load(token, timed=True)
            if session is not None:
                if not session._moved:
                    self._had = self._browser = token
                    return session
                moved = moved or session
        if moved is not None:
            self._had = self._browser = moved.id
        return moved

    def _fail(self, error: PgkvError) -> None:
        self.failure = error
        _observe.warning("pgkv.session.unavailable", error=type(error).__name__)

    def settle(self) -> Flow[None]:
        """Save the program's changes. A session that ended meanwhile stays ended."""
        session = self.data._session
        accessed = self.data.accessed
        if session is None or not accessed:
            return  # an untouched session has not changed, not even in nested values
        try:
            if self.data.cleared:
                yield from self._begin_again(session)
            elif session.id:
                yield from self._save(session)
            else:
                yield from self._store_new(session)
        except OUTAGES as error:
            self._fail(error)
            raise
        finally:
            self.data.accessed = accessed

    def _save(self, session: Session) -> Flow[None]:
        if self._dropped:
            return
        try:
            yield from self.settings.flows.save(session, "merge")
        except SessionGoneError as error:
            # The session ended, or moved on, while this request was under way. The change must
            # not bring it back, and a cookie from here would overwrite the newer one.
            self.drop(error.reason)
        else:
            self._browser = session.id

    def _store_new(self, session: Session) -> Flow[None]:
        if self._dropped or (not dict.__len__(self.data) and session.user_id is None):
            return
        if self.closed:
            self.drop("response started")  # the token could not reach the browser any more
        elif self.failure is not None and self._had:
            # Its own session could not be read: a new one would take that one's place.
            self.drop("unavailable")
        else:
            yield from self.settings.flows.save(session, "merge")
            self._browser = session.id

    def _begin_again(self, session: Session) -> Flow[None]:
        """After clear() or destroy(): end that session, and store the present data as a new one.

        This also ends the sessions of all tokens that the browser sent, even if none was found: the
        tokens may have been replaced, or their sessions could not be read.
        """
        tokens = {*self._tokens, session.id}
        if session._ended:
            tokens.discard(session.id)
        for token in tokens - {""}:
            yield from self.settings.flows.destroy(token)
        self._browser, self._tokens = "", []
        self._dropped = self.data.cleared = False
        self.failure = None
        fresh = self.data._session = Session(self.data)
        yield from self._store_new(fresh)

    def drop(self, reason: str) -> None:
        """Drop the program's changes, and log that."""
        self._dropped = True
        _observe.warning("pgkv.session.dropped", reason=reason)

    # -- the response's head

    def head(
        self, headers: Iterable[tuple[str, str]], *, cached: bool = True
    ) -> list[tuple[str, str]]:
        """Return the headers of the response with the cookie, if one is due, and with those that keep
        it out of shared caches if it depends on the session, and may be `cached`. Call it after
        `settle`; a second head gets the same cookie."""
        self.closed = True
        if self._cookie is None:
            self._cookie = self._due()
        found = [*headers, *self._cookie]
        return made_private(found) if cached and (self.data.accessed or self._cookie) else found

    def _due(self) -> list[tuple[str, str]]:
        if self._browser == self._had and not self._renews():
            return []
        session = self.data._session
        own = session.idle_timeout if session is not None and session.id == self._browser else None
        return [("Set-Cookie", self.settings.cookie.set(self._browser, own))]

    def _renews(self) -> bool:
        """Whether to send the cookie again: it does not end while the session is used, and lives as
        long as the session may go unused where that was changed."""
        session = self.data._session
        if session is None or session.id != self._browser or session._moved or not session.id:
            return False
        age = session.idle_timeout or self.settings.cookie.max_age
        return session._has_new_life or (age is not None and session._enters_period(age / 3))
