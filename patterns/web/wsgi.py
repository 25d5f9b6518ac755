"""`WSGIRateLimitMiddleware`: a rate limit before a WSGI application (Flask, Django, Bottle ...)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from ..._observe import shown
from ..._ops.drivers import call, drive
from ..._ops.op import Call
from ..rate_limit.api import RateLimiter
from ..rate_limit.options import OnError
from .exempt import Exempt
from .limit import STATUS, Guard, Headers, HttpRequest, Limits, heard_by_servers

__all__ = ["WSGIRateLimitMiddleware"]

StartResponse: TypeAlias = "Callable[..., Any]"
App: TypeAlias = "Callable[[dict[str, Any], StartResponse], Iterable[bytes]]"


class WSGIRateLimitMiddleware:
    """:class:`RateLimitMiddleware` for WSGI: ``app.wsgi_app = WSGIRateLimitMiddleware(app.wsgi_app,
    limiter=...)``.

    The same options; functions are sync and get the environ, with the same names on it.

    Args:
        app: the WSGI application.
        limiter: a :class:`RateLimiter`, or a function of the request that returns one, or None.
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

    def __init__(
        self,
        app: App,
        *,
        limiter: RateLimiter | Callable[[Any], Any],
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
            RateLimiter,
            "WSGIRateLimitMiddleware",
            "RateLimitMiddleware",
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

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        with heard_by_servers():
            verdict = drive(self._guard.check(HttpRequest(environ)), perform)
        if verdict is not None and verdict.refuse:
            headers, body = self._guard.refusal(verdict)
            start_response(f"{STATUS} Too Many Requests", list(headers.items()))
            return [body]
        added = list(self._guard.headers(verdict).items())
        if not added:
            return self.app(environ, start_response)

        def starting(status: str, headers: list[tuple[str, str]], *more: Any) -> Any:
            return start_response(status, [*headers, *added], *more)

        return self.app(environ, starting)


def perform(step: Any) -> Any:
    """Perform a step of a guard's flow."""
    assert isinstance(step, Call)
    return call(step)
