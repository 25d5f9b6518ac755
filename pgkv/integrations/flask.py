"""For Flask: `rate_limit`, a decorator of views, and `PgkvSessionInterface`, its session on the server."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, Unpack

import flask
from flask.sessions import SessionInterface, SessionMixin

from .._observe import shown
from .._ops.drivers import drive
from ..errors import SessionError
from ..patterns._runtime.colour import require
from ..patterns.rate_limit.api import RateLimiter
from ..patterns.session.api import SessionStore
from ..patterns.session.request import RequestSession
from ..patterns.web.cookie import Cookie, SameSite
from ..patterns.web.limit import STATUS, Guard, LimitOptions
from ..patterns.web.request import Exempt, exemption
from ..patterns.web.session import Visit
from ..patterns.web.wsgi import lazy_visit, made_private

if TYPE_CHECKING:
    from ..config import Seconds

__all__ = ["PgkvSessionInterface", "rate_limit"]

P = ParamSpec("P")
R = TypeVar("R")


def rate_limit(
    limiter: RateLimiter | Callable[[Any], Any],
    **options: Unpack[LimitOptions],
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
        options: `key`, `cost`, `limits`, `exempt`, `headers`, `on_error` and `shadow`: see
            :class:`~pgkv.patterns.web.limit.LimitOptions`.

    Raises:
        ConfigError: a setting is wrong.
    """
    guard = Guard(
        RateLimiter,
        "pgkv.integrations.flask.rate_limit",
        "pgkv.integrations.fastapi.rate_limit",
        limiter,
        options,
    )

    def decorate(view: Callable[P, R]) -> Callable[P, Any]:
        @functools.wraps(view)
        def limited(*args: P.args, **kwargs: P.kwargs) -> Any:
            environ = flask.request.environ
            verdict = drive(guard.check(flask.request))
            if verdict is not None and verdict.refuse:
                found, body = guard.refusal(environ, verdict)
                return flask.Response(body, STATUS, found)

            def add(response: flask.Response) -> flask.Response:
                response.headers.update(guard.headers(environ))
                return response

            if guard.is_shown(verdict):
                flask.after_this_request(add)
            return flask.current_app.ensure_sync(view)(*args, **kwargs)

        return limited

    return decorate


# -- sessions ------------------------------------------------------------------------------


class FlaskSession(RequestSession, SessionMixin):  # the dict's methods come first
    """`flask.session`: the session's data, as a dict.

    Changes inside nested values are noticed by themselves; setting `modified` is not needed.
    """

    visit: Visit
    accessed = False  # SessionMixin has it on the class; set per instance

    @property
    def new(self) -> bool:  # type: ignore[override]  # an attribute of SessionMixin
        """Whether the session was begun by this request."""
        return self.session.is_new


class PgkvSessionInterface(SessionInterface):
    """Flask's session in PostgreSQL: ``app.session_interface = PgkvSessionInterface(sessions)``.

    ``flask.session`` then works as ever, but keeps its data in the server's table: the cookie
    holds only a random token. It loads at first touch: a request that does not use it costs no
    query. No `SECRET_KEY` is needed. Values are JSON; what Flask's own session tags (datetimes,
    UUIDs, Markup) is refused with the place where it stands, and tuples come back as lists.

    At a login call ``sessions.rotate(flask.session, user_id=...)``; at a logout
    ``sessions.destroy(flask.session)`` or ``flask.session.clear()``.

    Flask's own ``SESSION_COOKIE_*`` settings are not read, because their defaults are not safe;
    nor are ``session.permanent`` and ``PERMANENT_SESSION_LIFETIME``: how long a session lives is
    said to the `SessionStore`.

    Args:
        sessions: a `SessionStore`.
        cookie: its name; ``__Host-`` keeps sibling domains from setting it.
        secure: False for plain-http development: drops the prefix and the Secure flag.
        same_site: ``"lax"``, ``"strict"`` or ``"none"``.
        path: of the cookie.
        domain: of the cookie; None for this host alone.
        max_age: seconds for which the browser keeps the cookie; None: until it closes.
        exempt: paths without a session, or a function of the environ. There ``flask.session``
            cannot be used.

    Raises:
        ConfigError: the settings make no cookie that browsers take, or `sessions` is async.
    """

    def __init__(
        self,
        sessions: SessionStore,
        *,
        cookie: str = "__Host-session",
        secure: bool = True,
        same_site: SameSite = "lax",
        path: str = "/",
        domain: str | None = None,
        max_age: Seconds | None = None,
        exempt: Exempt = None,
    ) -> None:
        require(sessions, SessionStore, "PgkvSessionInterface", "SessionMiddleware")
        self._sessions = sessions
        self._cookie = Cookie(
            cookie, secure=secure, same_site=same_site, path=path, domain=domain, max_age=max_age
        )
        self._is_exempt = exemption(exempt)

    @shown
    def __repr__(self) -> str:
        return f"cookie={self._cookie.name!r} sessions={self._sessions!r}"

    def open_session(self, app: flask.Flask, request: flask.Request) -> FlaskSession:  # noqa: ARG002  # Flask's signature
        """Return the session of a `request` of the `app`; Flask calls it."""
        environ = request.environ
        visit = lazy_visit(self._sessions, self._cookie, environ, FlaskSession)
        if self._is_exempt(environ, request.path):
            visit.data = FlaskSession(_refuse_exempt)
        data: Any = visit.data
        data.visit = visit
        return data  # type: ignore[no-any-return]  # it is one

    def save_session(
        self,
        app: flask.Flask,  # noqa: ARG002  # Flask's signature
        session: SessionMixin,
        response: flask.Response,
    ) -> None:
        """End a request of the `app`: save what changed of its `session`, and set the cookie in its
        `response`; Flask calls it."""
        assert isinstance(session, FlaskSession)
        visit = session.visit
        self._sessions._run(visit.settle())
        headers = list(response.headers.items())
        headers += visit.headers()
        if visit.is_private:
            response.headers.clear()
            response.headers.extend(made_private(headers))


def _refuse_exempt() -> None:
    raise SessionError("this path is exempt from sessions; take it out of exempt=")
