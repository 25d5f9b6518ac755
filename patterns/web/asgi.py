"""Middleware for ASGI applications (Starlette, FastAPI, Quart ...): `RateLimitMiddleware` and
`SessionMiddleware`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias, Unpack

from ..._observe import shown
from ..._ops.drivers import drive_async
from ...config import Seconds
from ...errors import SessionError
from .._runtime.colour import require
from ..rate_limit.api import AsyncRateLimiter
from ..session.api import AsyncSessionStore
from ..session.data import Session
from ..session.request import RequestSession
from .cookie import Cookie, SameSite, private, varying
from .limit import STATUS, Guard, LimitOptions, heard_by_servers
from .request import Exempt, HttpRequest, exemption
from .session import Visit

__all__ = ["RateLimitMiddleware", "SessionMiddleware", "load_session"]

Scope: TypeAlias = "MutableMapping[str, Any]"
Message: TypeAlias = "MutableMapping[str, Any]"
Receive: TypeAlias = "Callable[[], Awaitable[Message]]"
Send: TypeAlias = "Callable[[Message], Awaitable[None]]"
App: TypeAlias = "Callable[[Any, Receive, Send], Awaitable[None]]"

# The messages that carry a response's head.
_HEADS = ("http.response.start", "websocket.accept", "websocket.http.response.start")
POLICY_VIOLATION = 1008  # how a WebSocket says no; before accept() servers answer 403


class RateLimitMiddleware:
    """Refuse requests beyond a rate: ``app.add_middleware(RateLimitMiddleware, limiter=...)``.

    A refused request gets 429 with ``Retry-After`` and a problem+json body, and never reaches the
    application. So does the handshake of a WebSocket; what passes over one is not counted.

    Functions may be sync or async. They get a mapping, the ASGI scope, that also has ``headers``,
    ``path``, ``method`` and ``client``.

    Args:
        app: the ASGI application.
        limiter: an :class:`AsyncRateLimiter` (a blocking one would stop the event loop), or a
            function of the request that returns one, or None to let the request pass.
        options: `key`, `cost`, `limits`, `exempt`, `headers`, `on_error` and `shadow`: see
            :class:`~pgkv.patterns.web.limit.LimitOptions`.

    Raises:
        ConfigError: a setting is wrong, or the limiter is blocking.
    """

    def __init__(
        self,
        app: App,
        *,
        limiter: AsyncRateLimiter | Callable[[Any], Any],
        **options: Unpack[LimitOptions],
    ) -> None:
        self.app = app
        self._guard = Guard(
            AsyncRateLimiter, "RateLimitMiddleware", "WSGIRateLimitMiddleware", limiter, options
        )

    @shown
    def __repr__(self) -> str:
        return f"limiter={self._guard.limiter!r}"

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Serve one connection, or refuse it."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        with heard_by_servers():
            verdict = await drive_async(self._guard.check(HttpRequest(scope)))
        if verdict is not None and verdict.refuse:
            headers, body = self._guard.refusal(scope, verdict)
            await _refuse(scope, receive, send, _encoded(headers), body)
            return
        if not self._guard.is_shown(verdict):
            await self.app(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            if message["type"] in _HEADS:
                added = _encoded(self._guard.headers(scope))
                names = {name for name, _ in added}
                others = [
                    each for each in message.get("headers", ()) if each[0].lower() not in names
                ]
                message["headers"] = others + added
            await send(message)

        await self.app(scope, receive, sending)


def _encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode()) for name, value in headers.items()]


def is_websocket_without_denials(scope: Any) -> bool:
    """Whether a refusal can only close the connection: the server sends no response to a
    handshake."""
    return scope["type"] == "websocket" and "websocket.http.response" not in (
        scope.get("extensions") or {}
    )


async def _refuse(
    scope: Any, receive: Receive, send: Send, headers: list[tuple[bytes, bytes]], body: bytes
) -> None:
    kind = "http.response"
    if scope["type"] == "websocket":
        await receive()  # the handshake
        if is_websocket_without_denials(scope):
            await send({"type": "websocket.close", "code": POLICY_VIOLATION})
            return
        kind = "websocket.http.response"
    await send({"type": f"{kind}.start", "status": STATUS, "headers": headers})
    await send({"type": f"{kind}.body", "body": body})


# -- sessions ------------------------------------------------------------------------------

_SESSION = "pgkv.session"


class SessionMiddleware:
    """Sessions on the server for any ASGI application, in place of Starlette's own middleware.

    ``app.add_middleware(pgkv.SessionMiddleware, sessions=sessions)``; then ``request.session`` is a
    dict that is saved by itself: changed keys only, merged with those of parallel requests, before
    the head of the response is sent. What streaming responses and background tasks change later
    is saved when they have ended.

    A request without a session cookie, or on an exempt path, costs no query; one with a cookie
    exactly one, and one more if it changes something. A session that nobody put anything into is
    not stored and sets no cookie.

    At a login call ``await sessions.rotate(request.session, user_id=...)``; at a logout
    ``await sessions.destroy(request.session)`` or ``request.session.clear()``.

    When the application raises, so that no response of its own is sent, nothing is saved. When the
    database cannot be reached, the request fails: it is never served as if it had no session.
    A WebSocket's session is that of the moment it connected.

    Args:
        app: the application.
        sessions: an `AsyncSessionStore`.
        cookie: its name; ``__Host-`` keeps sibling domains from setting it.
        secure: False for plain-http development: drops the prefix and the Secure flag.
        same_site: ``"lax"``, ``"strict"`` or ``"none"``.
        path: of the cookie.
        domain: of the cookie; None for this host alone.
        max_age: seconds for which the browser keeps the cookie; None: until it closes.
        exempt: paths without a session (each with all below it), or a function of the scope.
        autoload: False leaves loading to ``await pgkv.load_session(request)``; before it,
            `request.session` raises `SessionError`.

    Raises:
        ConfigError: the settings make no cookie that browsers take, or `sessions` is not async.
    """

    def __init__(
        self,
        app: App,
        *,
        sessions: AsyncSessionStore,
        cookie: str = "__Host-session",
        secure: bool = True,
        same_site: SameSite = "lax",
        path: str = "/",
        domain: str | None = None,
        max_age: Seconds | None = None,
        exempt: Exempt = None,
        autoload: bool = True,
    ) -> None:
        # A blocking one would stop the event loop.
        require(sessions, AsyncSessionStore, "SessionMiddleware", "WSGISessionMiddleware")
        self.app = app
        self._sessions = sessions
        self._cookie = Cookie(
            cookie, secure=secure, same_site=same_site, path=path, domain=domain, max_age=max_age
        )
        self._is_exempt = exemption(exempt)
        self._autoload = autoload

    @shown
    def __repr__(self) -> str:
        return f"cookie={self._cookie.name!r} sessions={self._sessions!r}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] not in ("http", "websocket") or _SESSION in scope:
            await self.app(scope, receive, send)
            return
        headers = (value for name, value in scope["headers"] if name == b"cookie")
        token = self._cookie.find(value.decode("latin-1") for value in headers)
        exempt = self._is_exempt(scope, scope["path"])
        data = RequestSession(_refuse_exempt if exempt else _refuse_unloaded)
        visit = Visit(self._sessions._flows, self._cookie, token, data)
        scope["session"] = data
        scope[_SESSION] = (visit, self._sessions)
        if self._autoload and not exempt:
            await self._sessions._run(visit.open())

        async def send_settled(message: Message) -> None:
            if message["type"] in _HEADS:
                await self._sessions._run(visit.settle())
                _amend(message, visit)
            await send(message)

        await self.app(scope, receive, send_settled)
        await self._sessions._run(visit.settle())


def _amend(head: Message, visit: Visit) -> None:
    """Put the cookie into the response's head, and what keeps it out of shared caches."""
    headers = [(name, value) for name, value in head.get("headers") or ()]
    headers += [(name.lower().encode(), text.encode()) for name, text in visit.headers()]
    if visit.is_private and head["type"] != "websocket.accept":
        for name, revise in ((b"vary", varying), (b"cache-control", private)):
            found = [value for each, value in headers if each.lower() == name]
            text = revise(b", ".join(found).decode("latin-1"))
            headers = [header for header in headers if header[0].lower() != name]
            headers.append((name, text.encode("latin-1")))
    head["headers"] = headers


def _refuse_unloaded() -> None:
    raise SessionError(
        "the session is not loaded: with autoload=False, call `await pgkv.load_session(request)` "
        "before using request.session"
    )


def _refuse_exempt() -> None:
    raise SessionError(
        "this path is exempt from sessions; call `await pgkv.load_session(request)` first, or take "
        "it out of exempt="
    )


async def load_session(request: Any) -> Session:
    """Load the session of a request, and return it; a second call costs nothing.

    Afterwards ``request.session`` can be used. Without a live session it is a new one, which is
    stored when something was put into it.

    Args:
        request: Starlette's or FastAPI's Request or WebSocket, or an ASGI scope.

    Raises:
        SessionError: there is no `SessionMiddleware` around the application.
    """
    scope = getattr(request, "scope", request)
    if _SESSION not in scope:
        raise SessionError("there is no pgkv.SessionMiddleware around this application")
    visit, sessions = scope[_SESSION]
    visit.data.accessed = True
    session: Session = await sessions._run(visit.open())
    return session
