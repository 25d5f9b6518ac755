"""Middleware for ASGI applications (Starlette, FastAPI, Quart ...): `RateLimitMiddleware` and
`SessionMiddleware`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, TypeAlias, Unpack

from ..._ops.drivers import drive_async, shielded
from ...errors import PgkvError, SessionError
from ..rate_limit.api import AsyncRateLimiter
from ..session.api import AsyncSessionStore
from ..session.data import Session
from ..session.request import RequestSession
from .limit import STATUS, LimitAdapter, heard_by_servers
from .request import HttpRequest, path_of
from .session import (
    FAILED,
    OUTAGES,
    UNAVAILABLE,
    UNAVAILABLE_BODY,
    UNAVAILABLE_HEADERS,
    SessionAdapter,
    SessionHandler,
    SessionOptions,
)

Scope: TypeAlias = "MutableMapping[str, Any]"
Message: TypeAlias = "MutableMapping[str, Any]"
Receive: TypeAlias = "Callable[[], Awaitable[Message]]"
Send: TypeAlias = "Callable[[Message], Awaitable[None]]"
App: TypeAlias = "Callable[[Any, Receive, Send], Awaitable[None]]"

# The messages that carry a response's head.
_HEADS = ("http.response.start", "websocket.accept", "websocket.http.response.start")
POLICY_VIOLATION = 1008  # the refusal of a WebSocket; before accept() servers answer 403


class RateLimitMiddleware(LimitAdapter[App, AsyncRateLimiter]):
    """Refuse requests beyond a rate: ``app.add_middleware(RateLimitMiddleware, limiter=...)``.

    A refused request gets 429 with ``Retry-After`` and a problem+json body, and never reaches the
    application. The handshake of a WebSocket counts as a request; its messages do not.

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

    _names = AsyncRateLimiter, "RateLimitMiddleware", "WSGIRateLimitMiddleware"

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Serve one connection, or refuse it."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        with heard_by_servers():
            decision = await drive_async(self._guard.check(HttpRequest(scope)))
        if decision is not None and not decision.allowed:
            headers, body = self._guard.refusal(scope, decision)
            if scope["type"] == "websocket":
                await receive()  # the handshake
            await answer(scope, send, STATUS, encoded(headers.items()), body)
            return
        if decision is None:
            await self.app(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            if message["type"] in _HEADS:
                added = encoded(self._guard.headers(scope).items())
                names = {name for name, _ in added}
                others = [
                    each for each in message.get("headers", ()) if each[0].lower() not in names
                ]
                message["headers"] = others + added
            await send(message)

        await self.app(scope, receive, sending)


def encoded(headers: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]


def is_websocket_without_denials(scope: Any) -> bool:
    """Whether a refusal can only close the connection: the server sends no response to a
    handshake."""
    return scope["type"] == "websocket" and "websocket.http.response" not in (
        scope.get("extensions") or {}
    )


async def answer(
    scope: Any, send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes
) -> None:
    """Send a whole response; to a WebSocket that is not accepted yet, a refusal."""
    kind = "http.response"
    if scope["type"] == "websocket":
        if is_websocket_without_denials(scope):
            await send({"type": "websocket.close", "code": POLICY_VIOLATION})
            return
        kind = "websocket.http.response"
    await send({"type": f"{kind}.start", "status": status, "headers": headers})
    await send({"type": f"{kind}.body", "body": body})


# -- sessions ------------------------------------------------------------------------------

_SESSION = "pgkv.session"


class SessionMiddleware(SessionAdapter[App, AsyncSessionStore]):
    """Sessions on the server for any ASGI application, in place of Starlette's own middleware.

    ``app.add_middleware(pgkv.SessionMiddleware, sessions=sessions)``; then ``request.session`` is a
    dict that is saved automatically before the head of the response is sent: only changed keys,
    merged with those of parallel requests. Later changes, by streaming responses and background
    tasks, are saved when these have ended.

    A request without a session cookie, or on an exempt path, costs no query; a request with a
    cookie costs exactly one, and one more if it changes something. An empty session is not stored
    and sets no cookie.

    At a login call ``await sessions.rotate(request.session, user_id=...)``; at a logout
    ``await sessions.destroy(request.session)`` or ``request.session.clear()``.

    When the application raises before it sends a response, nothing is saved. When the
    database does not answer, the request is answered with 503: see `on_error`. A WebSocket's session
    is loaded once, when it connects.

    Args:
        app: the application.
        sessions: an `AsyncSessionStore`.
        autoload: False leaves loading to ``await pgkv.load_session(request)``; before it,
            `request.session` raises `SessionError`.
        options: `cookie`, `secure`, `same_site`, `path`, `domain` and `max_age`: see
            :class:`~pgkv.patterns.web.cookie.CookieOptions`; `exempt`, `timeout` and `on_error`: see
            :class:`~pgkv.patterns.web.session.SessionOptions`.

    Raises:
        ConfigError: the settings make no cookie that browsers take, or `sessions` is not async.
    """

    # A blocking store would stop the event loop.
    _names = AsyncSessionStore, "SessionMiddleware", "WSGISessionMiddleware"

    def __init__(
        self,
        app: App,
        *,
        sessions: AsyncSessionStore,
        autoload: bool = True,
        **options: Unpack[SessionOptions],
    ) -> None:
        super().__init__(app, sessions=sessions, **options)
        self._autoload = autoload

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] not in ("http", "websocket") or _SESSION in scope:
            await self.app(scope, receive, send)
            return
        settings = self._settings
        cookies = [value.decode("latin-1") for name, value in scope["headers"] if name == b"cookie"]
        exempt = settings.is_exempt(scope, path_of(scope))
        data = RequestSession(_refuse_exempt if exempt else _refuse_unloaded)
        handler = SessionHandler(settings, cookies, data)
        scope["session"] = data
        scope[_SESSION] = handler
        replaced = False  # the response is the 503 from here, and not the application's

        async def send_settled(message: Message) -> None:
            nonlocal replaced
            if replaced:
                return
            if message["type"] in _HEADS:
                try:
                    await _settle(handler)
                except OUTAGES as error:
                    if not settings.answers(error):
                        raise
                    replaced = True
                    await _answer_unavailable(scope, send)
                    return
                given = [
                    (name.decode("latin-1"), value.decode("latin-1"))
                    for name, value in message.get("headers") or ()
                ]
                is_answer = message["type"] != "websocket.accept"
                message["headers"] = encoded(handler.head(given, cached=is_answer))
            await send(message)

        try:
            if self._autoload and not exempt:
                await settings.run(handler.open())
            await self.app(scope, receive, send_settled)
        except OUTAGES as error:
            # The error of load_session() is raised out of the application.
            if error is not handler.failure:
                raise
            if handler.closed or not settings.answers(error):
                with heard_by_servers(FAILED):
                    raise
            await _answer_unavailable(scope, send)
            return
        if replaced:
            return
        try:
            await _settle(handler)
        except OUTAGES as error:
            if not settings.answers(error):
                with heard_by_servers(FAILED):
                    raise
            handler.drop("unavailable")


async def _settle(handler: SessionHandler) -> None:
    """Save the program's changes; cancellations do not interrupt this."""
    settings = handler.settings
    try:
        await settings.run(handler.settle())
    except asyncio.CancelledError:
        handler.closed = True  # the response will not be sent: a new session is not stored
        with contextlib.suppress(PgkvError, TimeoutError):
            await shielded(settings.run(handler.settle()), settings.timeout)
        raise


async def _answer_unavailable(scope: Scope, send: Send) -> None:
    headers = encoded(UNAVAILABLE_HEADERS.items())
    await answer(scope, send, UNAVAILABLE, headers, UNAVAILABLE_BODY)


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

    Afterwards ``request.session`` can be used. Without a live session a new one is
    returned, which is stored once it holds data.

    Args:
        request: Starlette's or FastAPI's Request or WebSocket, or an ASGI scope.

    Raises:
        SessionError: there is no `SessionMiddleware` around the application.
    """
    scope = getattr(request, "scope", request)
    if _SESSION not in scope:
        raise SessionError("there is no pgkv.SessionMiddleware around this application")
    handler: SessionHandler = scope[_SESSION]
    handler.data.accessed = True
    session: Session = await handler.settings.run(handler.open())
    return session
