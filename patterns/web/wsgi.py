"""Middleware for WSGI applications (Flask, Django, Bottle ...): `WSGIRateLimitMiddleware` and
`WSGISessionMiddleware`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

from ..._ops.drivers import drive
from ..rate_limit.api import RateLimiter
from ..session.api import SessionStore
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
    SessionSettings,
)

Environ: TypeAlias = "dict[str, Any]"
HeaderList: TypeAlias = "list[tuple[str, str]]"
StartResponse: TypeAlias = "Callable[..., Any]"
App: TypeAlias = "Callable[[Environ, StartResponse], Iterable[bytes]]"


class WSGIRateLimitMiddleware(LimitAdapter[App, RateLimiter]):
    """:class:`RateLimitMiddleware` for WSGI: ``app.wsgi_app = WSGIRateLimitMiddleware(app.wsgi_app,
    limiter=...)``.

    It takes the same options. Functions are sync; they get the environ, with the same attributes.

    Args:
        app: the WSGI application.
        limiter: a :class:`RateLimiter`, or a function of the request that returns one, or None to
            let the request pass.
        options: `key`, `cost`, `limits`, `exempt`, `headers`, `on_error` and `shadow`: see
            :class:`~pgkv.patterns.web.limit.LimitOptions`.

    Raises:
        ConfigError: a setting is wrong.
    """

    _names = RateLimiter, "WSGIRateLimitMiddleware", "RateLimitMiddleware"

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        """Serve one request, or refuse it."""
        with heard_by_servers():
            decision = drive(self._guard.check(HttpRequest(environ)))
        if decision is not None and not decision.allowed:
            headers, body = self._guard.refusal(environ, decision)
            start_response(f"{STATUS} Too Many Requests", list(headers.items()))
            return [body]
        if decision is None:
            return self.app(environ, start_response)

        def starting(status: str, headers: HeaderList, *more: Any) -> Any:
            added = self._guard.headers(environ)
            names = {name.lower() for name in added}
            others = [each for each in headers if each[0].lower() not in names]
            return start_response(status, [*others, *added.items()], *more)

        return self.app(environ, starting)


# -- sessions ------------------------------------------------------------------------------

_SESSION = "pgkv.session"


class WSGISessionMiddleware(SessionAdapter[App, SessionStore]):
    """Sessions on the server for any WSGI application: ``environ["pgkv.session"]`` is a dict.

    The session loads when it is first used, so a request that does not use it costs no query, and
    neither does a request without a session cookie. Changes are saved when the application calls
    ``start_response``, merged key by key with parallel requests. Later changes are saved when the
    response has been sent.

    At a login call ``sessions.rotate(environ["pgkv.session"], user_id=...)``; at a logout
    ``sessions.destroy(environ["pgkv.session"])``.

    Args:
        app: the application.
        sessions: a `SessionStore`.
        options: `cookie`, `secure`, `same_site`, `path`, `domain` and `max_age`: see
            :class:`~pgkv.patterns.web.cookie.CookieOptions`; `exempt`, `timeout` and `on_error`: see
            :class:`~pgkv.patterns.web.session.SessionOptions`.

    Raises:
        ConfigError: the settings make no cookie that browsers take, or `sessions` is async.
    """

    _names = SessionStore, "WSGISessionMiddleware", "SessionMiddleware"

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Serve one request."""
        settings = self._settings
        if _SESSION in environ or settings.is_exempt(environ, path_of(environ)):
            return self.app(environ, start_response)
        handler = lazy_handler(settings, environ, RequestSession)
        environ[_SESSION] = handler.data
        response = _SettledResponse(handler, start_response)
        with response.answering():
            response.body = self.app(environ, response.start)
        return response


class _SettledResponse:
    """An application's response. Before its head is sent, and at its end, the session is saved."""

    def __init__(self, handler: SessionHandler, start_response: StartResponse) -> None:
        self.body: Iterable[bytes] = ()
        self._handler = handler
        self._start_response = start_response
        self._replaced = False  # by this middleware's 503

    def start(self, status: str, headers: HeaderList, exc_info: Any = None) -> Any:
        """What the application calls as ``start_response``. A second head replaces the first."""
        handler, settings = self._handler, self._handler.settings
        if self._replaced:
            return _write_nothing
        if not handler.closed:
            failure = handler.failure
            # The application turned the failed loading into an error page of its own.
            if failure is not None and settings.answers(failure) and status.startswith("500"):
                return self._answer_unavailable()
            try:
                settings.run(handler.settle())
            except OUTAGES as error:
                if not settings.answers(error):
                    raise
                return self._answer_unavailable()
        return self._start_response(
            status, handler.head(headers), *([exc_info] if exc_info else [])
        )

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Answer 503 instead of raising the failure of the session, where that is possible."""
        try:
            yield
        except OUTAGES as error:
            if error is not self._handler.failure:
                raise
            if self._handler.closed or not self._handler.settings.answers(error):
                with heard_by_servers(FAILED):
                    raise
            self._answer_unavailable()

    def _answer_unavailable(self) -> Any:
        self._replaced = True
        headers = list(UNAVAILABLE_HEADERS.items())
        self._start_response(f"{UNAVAILABLE} Service Unavailable", headers)
        return _write_nothing

    def __iter__(self) -> Iterator[bytes]:
        with self.answering():
            for chunk in self.body:
                if self._replaced:
                    break
                yield chunk
        if self._replaced:
            yield UNAVAILABLE_BODY

    def close(self) -> None:
        handler = self._handler
        try:
            if not self._replaced:
                handler.settings.run(handler.settle())
        except OUTAGES as error:
            if not handler.settings.answers(error):
                with heard_by_servers(FAILED):
                    raise
            handler.drop("unavailable")
        finally:
            if hasattr(self.body, "close"):
                self.body.close()


def _write_nothing(_data: bytes) -> None:
    pass


def lazy_handler(
    settings: SessionSettings, environ: Environ, kind: type[RequestSession]
) -> SessionHandler:
    """Return a request's handler, whose session loads when it is first used."""

    def load() -> None:
        settings.run(handler.open())

    handler = SessionHandler(settings, [environ.get("HTTP_COOKIE") or ""], kind(load))
    return handler
