"""`dashboard(store, authorize=...)`: a page that shows what a store and its patterns hold, for ASGI and
WSGI.

It only reads, and answers GET and HEAD. It needs no script and loads nothing: the style sheet and the
drawings are in the page, and its Content-Security-Policy allows nothing else. It shows names (of tables,
locks, queues, functions, limiters, the first part of keys) and counts, never a value, a token or a whole
key. While the server does not answer, it shows the last frame, with status 503.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from http import HTTPStatus
from time import monotonic
from typing import Any, TypeAlias, overload

from .._observe import shown
from .._ops.op import Flow, call
from ..aio import AsyncStore
from ..errors import ConfigError, PgkvError
from ..patterns.overview import Overview, Overviews
from ..patterns.web.asgi import answer, encoded
from ..patterns.web.request import HttpRequest
from ..store import Store
from ._page import HISTORY, RELOAD, Point, page, point_of

__all__ = ["ASGIDashboard", "WSGIDashboard", "dashboard"]

Authorize: TypeAlias = Callable[[HttpRequest], Any]
Response: TypeAlias = "tuple[HTTPStatus, dict[str, str], bytes]"

TIMEOUT = 1.0  # seconds for an answer of the server
FRESH = 1.0  # seconds for which all visitors see the same frame
POINTS = int(HISTORY)  # at most one a second
POLICY = (
    "default-src 'none'; style-src 'nonce-{}'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


class _Dashboard:
    """What the ASGI and the WSGI application share: everything but their protocols."""

    def __init__(self, store: Any, authorize: Authorize) -> None:
        self._store = store
        self._authorize = authorize
        self._overviews = Overviews(store)
        self._points: deque[Point] = deque(maxlen=POINTS)
        self._frame: Overview | None = None
        self._failure: Exception | None = None
        self._asked = -FRESH

    @shown
    def __repr__(self) -> str:
        return str(self._store._config.table.quoted)

    def _respond(self, request: HttpRequest) -> Flow[Response]:
        """Answer one request. What else `authorize` raises is for the application's error handling."""
        try:
            allowed = yield from call(self._authorize, request)
        except PgkvError:
            return _plain(503, "The database does not answer, so access could not be checked.")
        if allowed is not True:
            return _plain(403, "authorize() did not return True for this request.")
        if request.path != "/":
            return _plain(404, "There is nothing at this path.")
        if request.method not in ("GET", "HEAD"):
            return _plain(405, "This page only reads.", Allow="GET, HEAD")
        yield from self._look()
        nonce = secrets.token_urlsafe(16)
        query = request.scope.get("query_string", b"") or request.scope.get("QUERY_STRING", "")
        paused = query in (b"pause", "pause")
        text = page(self._frame, self._points, self._failure, self._store, nonce, paused)
        headers = {"Content-Security-Policy": POLICY.format(nonce)}
        if self._failure is not None:
            headers["Retry-After"] = str(RELOAD)
        return _response(503 if self._failure else 200, text, "text/html", headers)

    def _look(self) -> Flow[None]:
        """Take a frame, unless another visitor's is fresh or under way."""
        now = monotonic()
        if now - self._asked < FRESH and (self._frame is not None or self._failure is not None):
            return
        self._asked = now
        try:
            frame = yield from self._overviews.look()
        except (PgkvError, TimeoutError) as error:
            self._failure = error.with_traceback(None)
        else:
            self._points.append(point_of(self._frame, frame, now))
            self._frame, self._failure = frame, None


def _plain(status: int, text: str, **headers: str) -> Response:
    return _response(status, f"{text}\n", "text/plain", headers)


def _response(status: int, text: str, kind: str, headers: dict[str, str]) -> Response:
    body = text.encode()
    return (
        HTTPStatus(status),
        {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            **headers,
        },
        body,
    )


class WSGIDashboard(_Dashboard):
    """The page as a WSGI application."""

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        """Serve one request."""
        request = HttpRequest(environ)
        status, headers, body = self._store._run(self._respond(request), TIMEOUT)
        start_response(f"{status.value} {status.phrase}", list(headers.items()))
        return [] if request.method == "HEAD" else [body]


class ASGIDashboard(_Dashboard):
    """The page as an ASGI application."""

    async def __call__(
        self,
        scope: Any,
        receive: Callable[[], Awaitable[Any]],
        send: Callable[[Any], Awaitable[None]],
    ) -> None:
        """Serve one request; refuse a WebSocket."""
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        if scope["type"] != "http":
            return
        request = HttpRequest(scope)
        status, headers, body = await self._store._run(self._respond(request), TIMEOUT)
        body = b"" if request.method == "HEAD" else body
        await answer(scope, send, status.value, encoded(headers.items()), body)


@overload
def dashboard(store: Store, *, authorize: Authorize | None = None) -> WSGIDashboard: ...
@overload
def dashboard(store: AsyncStore, *, authorize: Authorize | None = None) -> ASGIDashboard: ...
def dashboard(
    store: Store | AsyncStore, *, authorize: Authorize | None = None
) -> WSGIDashboard | ASGIDashboard:
    """Return the page as an application to mount: WSGI for a `Store`, ASGI for an `AsyncStore`.

    ``app.mount("/pgkv", dashboard(store, authorize=is_admin))``. Every visitor's request is one round
    trip to the server, at most one a second, which costs the same however large the tables are.

    Args:
        store: what is shown. Of a namespace only its own names are shown, but the sizes and connections
            are those of the whole tables and the database.
        authorize: called with each request; the page is shown if it returns True, and to no one else
            (403). It gets a mapping, the ASGI scope or WSGI environ, that also has ``headers``,
            ``path``, ``method`` and ``client``. Under ASGI it may be async.

    Raises:
        ConfigError: there is no `authorize`: such a page must never be public by mistake. Or `store` is
            no store, or a sharded one.
    """
    if not callable(authorize):
        raise ConfigError(
            "dashboard() needs authorize=, a function of the request that returns True for those who "
            "may see the page"
        )
    if isinstance(store, AsyncStore):
        return ASGIDashboard(store, authorize)
    if isinstance(store, Store):
        return WSGIDashboard(store, authorize)
    raise ConfigError(f"dashboard() needs a Store or an AsyncStore, not {type(store).__name__}")
