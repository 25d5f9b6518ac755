"""``pgkv dashboard``: the page of `pgkv.integrations.dashboard`, for this machine."""

from __future__ import annotations

import contextlib
import secrets
import sys
from collections.abc import Callable, Iterable
from http.cookies import CookieError, SimpleCookie
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from .command import DONE, Invocation, option

if TYPE_CHECKING:
    from ..patterns.web.request import HttpRequest
    from ..store import Store

LOOPBACK = "127.0.0.1"


def dashboard(
    call: Invocation,
    port: int = option("--port N", "Default: a free one.", 0, min=0, max=65535),
) -> int:
    """Show the store and its patterns on a page in the browser, until Ctrl-C. It only reads.

    The page is served to this machine only. The printed address holds a token that works once: the
    browser that opens it first may look.

    **Example:** `pgkv dashboard`
    """
    with (
        call.store() as store,
        make_server(
            LOOPBACK, port, lambda *_: [], server_class=_Threaded, handler_class=_Quiet
        ) as server,
    ):
        door = Door(store, server.server_port)
        server.set_app(door)
        url = f"http://{LOOPBACK}:{server.server_port}/?token={door.token}"
        call.answer({"url": url}, f"{url}\nCtrl-C ends it.")
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    return DONE


class _Threaded(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Print no line for each request: the first one has the token."""


class Door:
    """The page as a WSGI application, behind a token that works once.

    Args:
        store: what is shown.
        port: of the server. Requests with another name in Host are refused: a page of another site
            can have its name lead to this machine.
    """

    def __init__(self, store: Store, port: int) -> None:
        from ..integrations.dashboard import dashboard as make

        self.token: str = secrets.token_urlsafe(32)
        self._tokens = {self.token: True}  # two requests at once cannot both pop it
        self._hosts = {f"{name}:{port}" for name in (LOOPBACK, "localhost")}
        self._cookie = f"pgkv-{port}"  # browsers share cookies among the ports of a host
        self._secret = secrets.token_urlsafe(32)
        self._page = make(store, authorize=self._may_look)

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        given = parse_qs(environ.get("QUERY_STRING", "")).get("token", [""])[0]
        is_here = environ.get("HTTP_HOST") in self._hosts
        if is_here and environ["REQUEST_METHOD"] == "GET" and self._tokens.pop(given, False):
            cookie = f"{self._cookie}={self._secret}; Path=/; HttpOnly; SameSite=Strict"
            headers = {"Location": "/", "Set-Cookie": cookie, "Referrer-Policy": "no-referrer"}
            start("303 See Other", [*headers.items(), ("Content-Length", "0")])
            return []
        return self._page(environ, start)

    def _may_look(self, request: HttpRequest) -> bool:
        try:
            cookie = SimpleCookie(request.headers.get("cookie", "")).get(self._cookie)
        except CookieError:
            return False
        given = "" if cookie is None else cookie.value
        return request.headers.get("host") in self._hosts and secrets.compare_digest(
            given.encode(), self._secret.encode()
        )
