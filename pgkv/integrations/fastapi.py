"""Dependencies of FastAPI's routes: `rate_limit`, and `Idempotent`, which hands a route its attempt."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any, Unpack

from fastapi import HTTPException, Request, Response, WebSocketException
from fastapi.requests import HTTPConnection

from .._ops.drivers import drive_async
from ..patterns.idempotency.api import AsyncAttempt, AsyncIdempotency
from ..patterns.rate_limit.api import AsyncRateLimiter
from ..patterns.rate_limit.policy import Decision
from ..patterns.web.asgi import POLICY_VIOLATION, is_websocket_without_denials
from ..patterns.web.idempotency import (
    IdempotencyOptions,
    IdempotentRequests,
    RefusedRequest,
    StoredResponse,
)
from ..patterns.web.limit import STATUS, Guard, LimitOptions, problem
from ..patterns.web.request import HttpRequest

__all__ = [
    "Answered",
    "Idempotent",
    "RateLimited",
    "answered_response",
    "problem_response",
    "rate_limit",
]


class RateLimited(HTTPException):
    """The 429 of a limited route. FastAPI's own handler answers it with the problem as ``detail``;
    register `problem_response` for a body of problem+json.

    Attributes:
        decision: the :class:`Decision`.
    """

    body: bytes
    decision: Decision

    def __init__(self, guard: Guard, request: HTTPConnection, decision: Decision) -> None:
        headers, self.body = guard.refusal(request, decision)
        self.all_headers = headers
        self.decision = decision
        sent = {
            name: value
            for name, value in headers.items()
            if name not in ("Content-Type", "Content-Length")  # of the body that is not sent here
        }
        super().__init__(STATUS, detail=problem(decision), headers=sent)


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
        decision = await drive_async(guard.check(request))
        if decision is not None and not decision.allowed:
            if is_websocket_without_denials(request.scope):
                raise WebSocketException(POLICY_VIOLATION, "rate limit")
            raise RateLimited(guard, request, decision)
        if decision is not None:
            response.headers.update(guard.headers(request))

    return dependency


async def problem_response(_request: Request, error: Exception) -> Response:
    """Return the response to a `RateLimited`, the `error`, with a body of problem+json:
    ``app.add_exception_handler(RateLimited, problem_response)``."""
    assert isinstance(error, RateLimited)
    return Response(error.body, STATUS, error.all_headers)


class Answered(HTTPException):
    """What `Idempotent` answers without running the route: the stored response, or a problem. Register
    `answered_response` for it: FastAPI's own handler would put the body into a ``detail``."""

    def __init__(self, response: StoredResponse) -> None:
        self.response = response
        super().__init__(response.status, detail=(response.body or b"").decode("utf-8", "replace"))


async def answered_response(_request: Request, error: Exception) -> Response:
    """Return the response of an `Answered`, the `error`: ``app.add_exception_handler(Answered,
    answered_response)``."""
    assert isinstance(error, Answered)
    status, headers, body = error.response
    return Response(body, status, dict(headers))


class Idempotent:
    """A dependency that runs a route once for an ``Idempotency-Key``, and hands it its attempt.

    ::

        @app.post("/payments")
        async def pay(order: Order, attempt: Annotated[AsyncAttempt, Depends(once)]):
            async with pool.connection() as conn:
                response = JSONResponse(await charge(conn, order))
                await attempt.complete(response, conn)
            return response

    A retry gets the response that the route gave to ``complete``; a route that completes nothing is recorded
    without one, and its retry gets 409. A route that raises is not recorded. The attempt is None where a
    request has no key. The body of a form cannot be compared: use the middleware there.

    Args:
        idempotency: an `AsyncIdempotency`.
        scope: a function of the request that returns whose key it is, or ``""``.
        options: `methods`, `required`, `wait`, `max_request` and `max_body`: see
            :class:`~pgkv.patterns.web.idempotency.IdempotencyOptions`.

    Raises:
        ConfigError: a setting is wrong, or the idempotency is not async.
        Answered: (of the dependency) the route does not run.
    """

    def __init__(
        self,
        idempotency: AsyncIdempotency[Any],
        *,
        scope: Callable[[Any], Any] | str,
        **options: Unpack[IdempotencyOptions],
    ) -> None:
        names = ("pgkv.integrations.fastapi.Idempotent", "pgkv.integrations.flask.idempotent")
        self._requests = IdempotentRequests(AsyncIdempotency, *names, idempotency, scope, options)

    async def __call__(self, request: Request) -> AsyncGenerator[AsyncAttempt[Any] | None]:
        """Give the route its attempt."""
        async with AsyncExitStack() as stack:
            seen = HttpRequest(request.scope)
            flow = self._requests.claim(seen, request.body, stack.enter_async_context, request)
            try:
                attempt = await drive_async(flow)
            except RefusedRequest as refused:
                raise Answered(refused.response) from None
            yield attempt
            if attempt is not None:
                self._requests.give(attempt, StoredResponse(200, [], None))
