"""`RateLimitMiddleware`: a rate limit before an ASGI application (Starlette, FastAPI, Quart ...).

It judges a request before the application sees it and adds headers to the response. Bodies are
passed on untouched.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from ..._observe import shown
from ..._ops.drivers import call_async, drive_async
from ..._ops.op import Call
from ..rate_limit.api import AsyncRateLimiter
from ..rate_limit.options import OnError
from .exempt import Exempt
from .limit import STATUS, Guard, Headers, HttpRequest, Limits, heard_by_servers

__all__ = ["RateLimitMiddleware"]

Message: TypeAlias = "MutableMapping[str, Any]"
Receive: TypeAlias = "Callable[[], Awaitable[Message]]"
Send: TypeAlias = "Callable[[Message], Awaitable[None]]"
App: TypeAlias = "Callable[[Any, Receive, Send], Awaitable[None]]"

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
        key: a function of the request that returns its key, or None to let it pass; a string for
            one bucket for all. Without one: :func:`client_ip` with no trusted proxy.
        cost: tokens, or a function of the request; 0 lets it pass.
        limits: rates instead of the limiter's, or a function of the request: a user's plan.
        exempt: paths (each with all below it), or a function that is true for requests to let pass.
        headers: ``"draft"``, ``"x"`` or None; see :meth:`Decision.headers`.
        on_error: when the store does not answer: ``"open"`` lets the request pass, ``"closed"``
            refuses it (take it for logins), ``"raise"`` makes it a server error.
        shadow: decide, count and log ``pgkv.limit.shadow``, but never refuse nor add headers: to
            try a limit on live traffic.

    Raises:
        ConfigError: a setting is wrong, or the limiter is blocking.
    """

    def __init__(
        self,
        app: App,
        *,
        limiter: AsyncRateLimiter | Callable[[Any], Any],
        key: Callable[[Any], Any] | str | None = None,
        cost: Callable[[Any], Any] | int = 1,
        limits: Limits = None,
        exempt: Exempt = None,
        headers: Headers = "draft",
        on_error: OnError = "open",
        shadow: bool = False,
    ) -> None:
        self.app = app
        self._guard = Guard(
            AsyncRateLimiter,
            "RateLimitMiddleware",
            "WSGIRateLimitMiddleware",
            limiter=limiter,
            key=key,
            cost=cost,
            limits=limits,
            exempt=exempt,
            headers=headers,
            on_error=on_error,
            shadow=shadow,
        )

    @shown
    def __repr__(self) -> str:
        return f"limiter={self._guard.limiter!r}"

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        with heard_by_servers():
            verdict = await drive_async(self._guard.check(HttpRequest(scope)), perform)
        if verdict is not None and verdict.refuse:
            headers, body = self._guard.refusal(verdict)
            await _refuse(scope, receive, send, _encoded(headers), body)
            return
        added = _encoded(self._guard.headers(verdict))
        if not added:
            await self.app(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.accept"):
                message["headers"] = [*message.get("headers", ()), *added]
            await send(message)

        await self.app(scope, receive, sending)


async def perform(step: Any) -> Any:
    """Perform a step of a guard's flow."""
    assert isinstance(step, Call)
    return await call_async(step)


def _encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode()) for name, value in headers.items()]


async def _refuse(
    scope: Any, receive: Receive, send: Send, headers: list[tuple[bytes, bytes]], body: bytes
) -> None:
    kind = "http.response"
    if scope["type"] == "websocket":
        await receive()  # the handshake
        if "websocket.http.response" not in (scope.get("extensions") or {}):
            await send({"type": "websocket.close", "code": POLICY_VIOLATION})
            return
        kind = "websocket.http.response"
    await send({"type": f"{kind}.start", "status": STATUS, "headers": headers})
    await send({"type": f"{kind}.body", "body": body})
