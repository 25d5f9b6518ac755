"""Rate limits per route for FastAPI: `rate_limit` makes a dependency."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Unpack

from fastapi import HTTPException, Request, Response, WebSocketException
from fastapi.requests import HTTPConnection

from .._ops.drivers import drive_async
from ..patterns.rate_limit.api import AsyncRateLimiter
from ..patterns.rate_limit.policy import Decision
from ..patterns.web.asgi import POLICY_VIOLATION, is_websocket_without_denials
from ..patterns.web.limit import STATUS, Guard, LimitOptions, Verdict, problem

__all__ = ["RateLimited", "problem_response", "rate_limit"]


class RateLimited(HTTPException):
    """The 429 of a limited route. FastAPI's own handler answers it with the problem as ``detail``;
    register `problem_response` for a body of problem+json.

    Attributes:
        decision: the :class:`Decision`.
    """

    body: bytes
    decision: Decision

    def __init__(self, guard: Guard, request: HTTPConnection, verdict: Verdict) -> None:
        headers, self.body = guard.refusal(request, verdict)
        self.all_headers = headers
        self.decision = verdict.decision
        sent = {
            name: value
            for name, value in headers.items()
            if name not in ("Content-Type", "Content-Length")  # of the body that is not sent here
        }
        super().__init__(STATUS, detail=problem(verdict.decision), headers=sent)


def rate_limit(
    limiter: AsyncRateLimiter | Callable[[Any], Any],
    **options: Unpack[LimitOptions],
) -> Callable[[HTTPConnection, Response], Awaitable[None]]:
    """Return a dependency that limits a route, a router or an application.

    ::

        @app.get("/search", dependencies=[Depends(rate_limit(limiter))])
        async def search(): ...

    Headers are added where the route returns data; FastAPI drops them where it returns a `Response`
    of its own. Functions get FastAPI's `Request`; of a WebSocket route, whose handshakes are limited
    too, its `WebSocket`.

    Args:
        limiter: an :class:`AsyncRateLimiter`, or a function of the request that returns one, or
            None to let the request pass.
        options: `key`, `cost`, `limits`, `exempt`, `headers`, `on_error` and `shadow`: see
            :class:`~pgkv.patterns.web.limit.LimitOptions`.

    Raises:
        ConfigError: a setting is wrong, or the limiter is blocking.
        RateLimited: (of the dependency) the request is refused.
    """
    guard = Guard(
        AsyncRateLimiter,
        "pgkv.integrations.fastapi.rate_limit",
        "pgkv.integrations.flask.rate_limit",
        limiter,
        options,
    )

    async def dependency(request: HTTPConnection, response: Response) -> None:
        verdict = await drive_async(guard.check(request))
        if verdict is not None and verdict.refuse:
            if is_websocket_without_denials(request.scope):
                raise WebSocketException(POLICY_VIOLATION, "rate limit")
            raise RateLimited(guard, request, verdict)
        if guard.is_shown(verdict):
            response.headers.update(guard.headers(request))

    return dependency


async def problem_response(_request: Request, error: Exception) -> Response:
    """Return the response to a `RateLimited`, the `error`, with a body of problem+json:
    ``app.add_exception_handler(RateLimited, problem_response)``."""
    assert isinstance(error, RateLimited)
    return Response(error.body, STATUS, error.all_headers)
