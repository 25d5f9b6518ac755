"""Middleware for WSGI applications (Flask, Django, Bottle ...): `WSGIRateLimitMiddleware` and
`WSGISessionMiddleware`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias, Unpack

from ..._observe import shown
from ..._ops.drivers import drive
from ...config import Seconds
from .._runtime.colour import require
from ..rate_limit.api import RateLimiter
from ..session.api import SessionStore
from ..session.request import RequestSession
from .cookie import Cookie, SameSite, private, varying
from .limit import STATUS, Guard, LimitOptions, heard_by_servers
from .request import Exempt, HttpRequest, exemption
from .session import Visit

__all__ = ["WSGIRateLimitMiddleware", "WSGISessionMiddleware"]

Environ: TypeAlias = "dict[str, Any]"
HeaderList: TypeAlias = "list[tuple[str, str]]"
StartResponse: TypeAlias = "Callable[..., Any]"
App: TypeAlias = "Callable[[Environ, StartResponse], Iterable[bytes]]"


class WSGIRateLimitMiddleware:
    """:class:`RateLimitMiddleware` for WSGI: ``app.wsgi_app = WSGIRateLimitMiddleware(app.wsgi_app,
    limiter=...)``.

    The same options; functions are sync and get the environ, with the same names on it.

    Args:
        app: the WSGI application.
        limiter: a :class:`RateLimiter`, or a function of the request that returns one, or None to
            let the request pass.
        options: `key`, `cost`, `limits`, `exempt`, `headers`, `on_error` and `shadow`: see
            :class:`~pgkv.patterns.web.limit.LimitOptions`.

    Raises:
        ConfigError: a setting is wrong.
    """

    def __init__(
        self,
        app: App,
        *,
        limiter: RateLimiter | Callable[[Any], Any],
        **options: Unpack[LimitOptions],
    ) -> None:
        self.app = app
        self._guard = Guard(
            RateLimiter, "WSGIRateLimitMiddleware", "RateLimitMiddleware", limiter, options
        )

    @shown
    def __repr__(self) -> str:
        return f"limiter={self._guard.limiter!r}"

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        """Serve one request, or refuse it."""
        with heard_by_servers():
            verdict = drive(self._guard.check(HttpRequest(environ)))
        if verdict is not None and verdict.refuse:
            headers, body = self._guard.refusal(environ, verdict)
            start_response(f"{STATUS} Too Many Requests", list(headers.items()))
            return [body]
        if not self._guard.is_shown(verdict):
            return self.app(environ, start_response)

        def starting(status: str, headers: HeaderList, *more: Any) -> Any:
            added = self._guard.headers(environ)
            names = {name.lower() for name in added}
            others = [each for each in headers if each[0].lower() not in names]
            return start_response(status, [*others, *added.items()], *more)

        return self.app(environ, starting)


# -- sessions ------------------------------------------------------------------------------

_SESSION = "pgkv.session"


class WSGISessionMiddleware:
    """Sessions on the server for any WSGI application: ``environ["pgkv.session"]`` is a dict.

    It loads itself at first touch, so a request that does not use it costs no query, and neither
    does one without a session cookie. What changed is saved, merged key by key with parallel
    requests, when the application calls ``start_response``; what changes later, when the response
    has been sent.

    At a login call ``sessions.rotate(environ["pgkv.session"], user_id=...)``; at a logout
    ``sessions.destroy(environ["pgkv.session"])``.

    Args:
        app: the application.
        sessions: a `SessionStore`.
        cookie: its name; ``__Host-`` keeps sibling domains from setting it.
        secure: False for plain-http development: drops the prefix and the Secure flag.
        same_site: ``"lax"``, ``"strict"`` or ``"none"``.
        path: of the cookie.
        domain: of the cookie; None for this host alone.
        max_age: seconds for which the browser keeps the cookie; None: until it closes.
        exempt: paths without a session (each with all below it), or a function of the environ.

    Raises:
        ConfigError: the settings make no cookie that browsers take, or `sessions` is async.
    """

    def __init__(
        self,
        app: App,
        *,
        sessions: SessionStore,
        cookie: str = "__Host-session",
        secure: bool = True,
        same_site: SameSite = "lax",
        path: str = "/",
        domain: str | None = None,
        max_age: Seconds | None = None,
        exempt: Exempt = None,
    ) -> None:
        require(sessions, SessionStore, "WSGISessionMiddleware", "SessionMiddleware")
        self.app = app
        self._sessions = sessions
        self._cookie = Cookie(
            cookie, secure=secure, same_site=same_site, path=path, domain=domain, max_age=max_age
        )
        self._is_exempt = exemption(exempt)

    @shown
    def __repr__(self) -> str:
        return f"cookie={self._cookie.name!r} sessions={self._sessions!r}"

    def __call__(self, environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Serve one request."""
        if _SESSION in environ or self._is_exempt(environ, environ.get("PATH_INFO") or "/"):
            return self.app(environ, start_response)
        visit = lazy_visit(self._sessions, self._cookie, environ, RequestSession)
        environ[_SESSION] = visit.data
        cookies: list[HeaderList] = []  # what the first head carried: a second one replaces it

        def start_settled(status: str, headers: HeaderList, exc_info: Any = None) -> Any:
            if not cookies:
                self._sessions._run(visit.settle())
                cookies.append(visit.headers())
            headers = [*headers, *cookies[0]]
            if visit.is_private:
                headers = made_private(headers)
            return start_response(status, headers, *([exc_info] if exc_info else []))

        return _Body(self.app(environ, start_settled), lambda: self._sessions._run(visit.settle()))


class _Body:
    """The application's response; at its end what the session still holds is saved."""

    def __init__(self, inner: Iterable[bytes], finish: Callable[[], None]) -> None:
        self._inner = inner
        self._finish = finish

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._inner)

    def close(self) -> None:
        try:
            self._finish()
        finally:
            if hasattr(self._inner, "close"):
                self._inner.close()


def lazy_visit(
    sessions: SessionStore, cookie: Cookie, environ: Environ, kind: type[RequestSession]
) -> Visit:
    """Return a request's visit, whose session loads itself at first touch."""
    header = environ.get("HTTP_COOKIE")
    token = cookie.find([header] if header else [])

    def load() -> None:
        sessions._run(visit.open())

    visit = Visit(sessions._flows, cookie, token, kind(load))
    return visit


def made_private(headers: HeaderList) -> HeaderList:
    """Return a response's headers with what keeps it out of shared caches."""
    for name, revise in (("Vary", varying), ("Cache-Control", private)):
        found = [value for each, value in headers if each.lower() == name.lower()]
        headers = [header for header in headers if header[0].lower() != name.lower()]
        headers.append((name, revise(", ".join(found))))
    return headers
