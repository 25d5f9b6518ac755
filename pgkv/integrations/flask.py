"""For Flask: `rate_limit` and `idempotent`, decorators of views, and `PgkvSessionInterface`, its session on the server."""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar, Unpack

import flask
from flask.json.tag import TaggedJSONSerializer
from flask.sessions import SessionInterface, SessionMixin
from werkzeug.exceptions import ServiceUnavailable

from .._observe import shown
from .._ops.drivers import drive
from ..errors import SessionError
from ..patterns.idempotency.api import Idempotency
from ..patterns.rate_limit.api import RateLimiter
from ..patterns.session.api import SessionStore
from ..patterns.session.data import KEEP, Session
from ..patterns.session.request import RequestSession
from ..patterns.web.idempotency import IdempotencyOptions, IdempotentRequests
from ..patterns.web.limit import STATUS, Guard, LimitOptions
from ..patterns.web.session import (
    OUTAGES,
    RETRY_AFTER,
    UNAVAILABLE,
    UNAVAILABLE_BODY,
    UNAVAILABLE_HEADERS,
    SessionHandler,
    SessionOptions,
    SessionSettings,
)
from ..patterns.web.wsgi import lazy_handler

__all__ = ["PgkvSessionInterface", "idempotent", "rate_limit"]

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
            decision = drive(guard.check(flask.request))
            if decision is not None and not decision.allowed:
                found, body = guard.refusal(environ, decision)
                return flask.Response(body, STATUS, found)

            def add(response: flask.Response) -> flask.Response:
                response.headers.update(guard.headers(environ))
                return response

            if decision is not None:
                flask.after_this_request(add)
            return flask.current_app.ensure_sync(view)(*args, **kwargs)

        return limited

    return decorate


# -- sessions ------------------------------------------------------------------------------


# What Flask's own sessions hold in addition to JSON: tuples, bytes, Markup, datetimes, UUIDs.
_TAGS = TaggedJSONSerializer()


def idempotent(
    idempotency: Idempotency[Any],
    *,
    scope: Callable[[Any], Any] | str,
    **options: Unpack[IdempotencyOptions],
) -> Callable[[Callable[P, R]], Callable[P, Any]]:
    """Run the decorated view once for an ``Idempotency-Key``: ``@app.post("/pay")``, then ``@idempotent(keys,
    scope=...)``.

    A retry gets the stored response; see `WSGIIdempotencyMiddleware`. A view that raises is not recorded.
    ``idempotent_attempt(flask.request).complete(response, conn)`` records it in the effect's transaction.

    Args:
        idempotency: an `Idempotency`.
        scope: a function of Flask's request that returns whose key it is, or ``""``.
        options: `methods`, `required`, `wait`, `max_request` and `max_body`: see
            :class:`~pgkv.patterns.web.idempotency.IdempotencyOptions`.
    """
    names = ("pgkv.integrations.flask.idempotent", "pgkv.integrations.fastapi.Idempotent")
    requests = IdempotentRequests(Idempotency, *names, idempotency, scope, options)

    def decorate(view: Callable[P, R]) -> Callable[P, Any]:
        @functools.wraps(view)
        def run(*args: P.args, **kwargs: P.kwargs) -> Any:
            request = flask.request
            answer = functools.partial(flask.current_app.ensure_sync(view), *args, **kwargs)
            return requests.run(
                request.environ,
                request.get_data,
                request,
                lambda: flask.make_response(answer()),
                flask.Response,
            )

        return run

    return decorate


class FlaskSession(RequestSession, SessionMixin):  # the dict's methods come first
    """`flask.session`: the session's data, as a dict.

    Changes inside nested values are noticed by themselves; setting `modified` is not needed.
    """

    handler: SessionHandler
    accessed = False  # SessionMixin has it on the class; set per instance

    @property
    def new(self) -> bool:  # type: ignore[override]  # an attribute of SessionMixin
        """Whether the session was begun by this request."""
        return self.session.is_new

    @property
    def permanent(self) -> bool:
        """Whether the session has lifetimes of its own, and its cookie outlives the browser. Setting
        it gives it ``PERMANENT_SESSION_LIFETIME`` as its idle timeout, and as its absolute timeout
        where the store's is shorter."""
        idle = self.lifetimes[0]
        if idle is KEEP:
            idle = None if self.cleared else self.session.idle_timeout
        return idle is not None

    @permanent.setter
    def permanent(self, value: bool) -> None:
        if bool(value) != self.permanent:
            self.mark_modified()
            life = flask.current_app.permanent_session_lifetime
            longest = timedelta(seconds=self.handler.settings.flows.lifetimes.absolute)
            self.lifetimes: tuple[Any, Any] = (life, max(life, longest)) if value else (None, None)

    def mark_accessed(self) -> None:
        try:
            super().mark_accessed()
        except OUTAGES as error:
            if not self.handler.settings.answers(error):
                raise
            raise ServiceUnavailable(retry_after=RETRY_AFTER) from error

    def fill(self, session: Session) -> None:
        super().fill(session)
        dict.update(self, {key: _untagged(value) for key, value in dict.items(self)})

    def as_json(self) -> dict[str, Any]:
        return {key: _TAGS.tag(value) for key, value in dict.items(self)}


def _untagged(value: Any) -> Any:
    if isinstance(value, dict):
        return _TAGS.untag({key: _untagged(each) for key, each in value.items()})
    return [_untagged(each) for each in value] if isinstance(value, list) else value


class PgkvSessionInterface(SessionInterface):
    """Flask's session in PostgreSQL: ``app.session_interface = PgkvSessionInterface(sessions)``.

    ``flask.session`` then works as usual, but its data is in the server's table: the cookie holds
    only a random token. It loads at first touch: a request that does not use it costs no
    query. No `SECRET_KEY` is needed. Values are those of Flask's own session: JSON, tuples, bytes,
    Markup, datetimes (to the second) and UUIDs, in the same form; anything else is refused with its
    place.

    At a login call ``sessions.rotate(flask.session, user_id=...)``; at a logout
    ``sessions.destroy(flask.session)`` or ``flask.session.clear()``.

    Flask's own ``SESSION_COOKIE_*`` settings are not read, because their defaults are not safe.
    ``session.permanent = True`` gives a session ``PERMANENT_SESSION_LIFETIME``; the others have the
    timeouts of the `SessionStore`.

    Args:
        sessions: a `SessionStore`.
        options: `cookie`, `secure`, `same_site`, `path`, `domain`, `max_age` and `partitioned`: see
            :class:`~pgkv.patterns.web.cookie.CookieOptions`; `exempt` (there ``flask.session`` cannot
            be used), `timeout` and `on_error`: see
            :class:`~pgkv.patterns.web.session.SessionOptions`. The 503 is Flask's
            `ServiceUnavailable`, raised where the session is first used; the application may have
            an error handler for it.

    Raises:
        ConfigError: the settings make no cookie that browsers take, or `sessions` is async.
    """

    def __init__(self, sessions: SessionStore, **options: Unpack[SessionOptions]) -> None:
        self._settings = SessionSettings(
            SessionStore, "PgkvSessionInterface", "SessionMiddleware", sessions, options
        )

    @shown
    def __repr__(self) -> str:
        return self._settings.facts()

    def open_session(self, app: flask.Flask, request: flask.Request) -> FlaskSession:  # noqa: ARG002  # Flask's signature
        """Return the session of a `request` of the `app`; Flask calls it."""
        environ = request.environ
        handler = lazy_handler(self._settings, environ, FlaskSession)
        if self._settings.is_exempt(environ, request.path):
            handler.data = FlaskSession(_refuse_exempt)
        data: Any = handler.data
        data.handler = handler
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
        handler = session.handler
        try:
            self._settings.run(handler.settle())
        except OUTAGES as error:
            if not self._settings.answers(error):
                raise
            response.status_code = UNAVAILABLE
            response.direct_passthrough = False
            response.set_data(UNAVAILABLE_BODY)
            response.headers.update(UNAVAILABLE_HEADERS)
            return
        headers = handler.head(response.headers.items())
        response.headers.clear()
        response.headers.extend(headers)


def _refuse_exempt() -> None:
    raise SessionError("this path is exempt from sessions; take it out of exempt=")
