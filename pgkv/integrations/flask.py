"""For Flask: `rate_limit`, a decorator of views, and `PgkvSessionInterface`, its session on the server."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import flask

from .._ops.drivers import drive
from ..patterns.rate_limit.api import RateLimiter
from ..patterns.rate_limit.options import OnError
from ..patterns.web.exempt import Exempt
from ..patterns.web.limit import STATUS, Guard, Headers, Limits
from ..patterns.web.wsgi import perform
from .flask_session import PgkvSessionInterface

__all__ = ["PgkvSessionInterface", "rate_limit"]

P = ParamSpec("P")
R = TypeVar("R")


def rate_limit(
    limiter: RateLimiter | Callable[[Any], Any],
    *,
    key: Callable[[Any], Any] | str | None = None,
    cost: Callable[[Any], Any] | int = 1,
    limits: Limits = None,
    exempt: Exempt = None,
    headers: Headers = "draft",
    on_error: OnError = "open",
    shadow: bool = False,
) -> Callable[[Callable[P, R]], Callable[P, Any]]:
    """Return a decorator that limits a view, below the route's::

        @app.get("/search")
        @rate_limit(limiter)
        def search(): ...

    A refused request gets 429 with ``Retry-After`` and a problem+json body; the view is not called.
    Functions get Flask's `request`. Async views work.

    Args:
        limiter: a :class:`RateLimiter`, or a function of the request that returns one, or None to
            let the request pass.
        key: see :class:`RateLimitMiddleware`.
        cost: tokens, or a function of the request; 0 lets it pass.
        limits: rates instead of the limiter's, or a function of the request.
        exempt: paths (each with all below it), or a function that is true for requests to let pass.
        headers: ``"draft"``, ``"x"`` or None.
        on_error: ``"open"``, ``"closed"`` or ``"raise"``.
        shadow: decide, count and log, never refuse.

    Raises:
        ConfigError: a setting is wrong.
    """
    guard = Guard(
        RateLimiter,
        "pgkv.integrations.flask.rate_limit",
        "pgkv.integrations.fastapi.rate_limit",
        limiter=limiter,
        key=key,
        cost=cost,
        limits=limits,
        exempt=exempt,
        headers=headers,
        on_error=on_error,
        shadow=shadow,
    )

    def decorate(view: Callable[P, R]) -> Callable[P, Any]:
        @functools.wraps(view)
        def limited(*args: P.args, **kwargs: P.kwargs) -> Any:
            verdict = drive(guard.check(flask.request), perform)
            if verdict is not None and verdict.refuse:
                found, body = guard.refusal(verdict)
                return flask.Response(body, STATUS, found)
            added = guard.headers(verdict)

            def add(response: flask.Response) -> flask.Response:
                response.headers.update(added)
                return response

            if added:
                flask.after_this_request(add)
            return flask.current_app.ensure_sync(view)(*args, **kwargs)

        return limited

    return decorate
