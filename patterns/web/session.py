"""One request's dealings with its session, apart from ASGI, WSGI or Flask.

A `Visit` knows the token that the request brought and the session that the program sees. At the
head of the response it is settled: what changed is saved, and it is known which cookie to send.
"""

from __future__ import annotations

from ... import _observe
from ..._ops.op import Flow
from ...errors import SessionGoneError
from ..session.data import Session
from ..session.flows import SessionFlows
from ..session.request import RequestSession
from .cookie import Cookie


class Visit:
    """The session of one request.

    Args:
        flows: the operations on sessions.
        cookie: the application's.
        token: what the request brought, None for nothing of the right form.
        data: what the program will see.
    """

    def __init__(
        self, flows: SessionFlows, cookie: Cookie, token: str | None, data: RequestSession
    ) -> None:
        self.flows = flows
        self.cookie = cookie
        self.token = token
        self.data = data
        self._browser = token or ""  # the token that the browser has, or will have
        self._dropped = False  # a save was refused: whatever else this request changes is late too
        self._closed = False  # the head of the response is on its way

    def open(self) -> Flow[Session]:
        """Load the session, once; without a live one it is a new one that nobody stored yet."""
        found = None
        if self.token is not None and not self.data.is_loaded:
            found = yield from self.flows.load(self.token)
        if not self.data.is_loaded:  # another task of this request may have been faster
            self.data.fill(found or Session({}))
        session = self.data._session
        assert session is not None
        return session

    def settle(self) -> Flow[None]:
        """Save what the program changed. A session that ended meanwhile stays ended."""
        session = self.data._session
        accessed = self.data.accessed
        if session is None or not accessed:
            return  # what nobody touched did not change, deep inside neither
        try:
            if self.data.cleared:
                yield from self._begin_again(session)
            elif session.id:
                yield from self._save(session)
            else:
                yield from self._store_new(session)
        finally:
            self.data.accessed = accessed

    def _save(self, session: Session) -> Flow[None]:
        if self._dropped:
            return
        try:
            yield from self.flows.save(session, "merge")
        except SessionGoneError as error:
            # The session ended, or moved on, while this request was under way. The change must
            # not bring it back, and a cookie from here would overwrite the newer one.
            self._dropped = True
            _observe.warning("pgkv.session.dropped", reason=error.reason)
        else:
            self._browser = session.id

    def _store_new(self, session: Session) -> Flow[None]:
        if not dict.__len__(self.data) and session.user_id is None:
            return
        if self._closed:
            # The token could not reach the browser any more.
            _observe.warning("pgkv.session.dropped", reason="response started")
            return
        yield from self.flows.save(session, "merge")
        self._browser = session.id

    def _begin_again(self, session: Session) -> Flow[None]:
        """After clear() or destroy(): that session is over, what is there now begins another."""
        if session.id:
            if not session._ended:
                yield from self.flows.destroy(session.id)
            self._browser = ""
        self.data.cleared = False
        fresh = self.data._session = Session(self.data)
        yield from self._store_new(fresh)

    # -- the response's head

    def headers(self) -> list[tuple[str, str]]:
        """Return the Set-Cookie header if one is due. To be called once, after `settle`."""
        self._closed = True
        if self._browser == (self.token or ""):
            return []
        return [("Set-Cookie", self.cookie.set(self._browser))]

    @property
    def is_private(self) -> bool:
        """Whether the response depends on the session."""
        return self.data.accessed or self._browser != (self.token or "")
