"""Sessions in front of an application while the database is away, silent, or goes in between."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flask
import httpx
import pytest
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

import pgkv
from pgkv.integrations.flask import PgkvSessionInterface
from tests import FULL, servers
from tests.faults.support import newest
from tests.servers import PATIENCE, Server
from tests.web.conftest import Serve, lifespan_of

pytestmark = newest
TIMEOUT = 0.5
# Of a busy machine, and of a blocking store that asks the server to stop, for a second, for each
# connection that was under way. Without a timeout it is 30 s.
SLACK = 5.0
KINDS = ["asgi", "load_session", "wsgi", "flask"]
MODES = ["503", "anonymous", "raise"]
EACH = [
    (kind, mode)
    for n, kind in enumerate(KINDS)
    for m, mode in enumerate(MODES)
    if FULL or (n + m) % 3 != 2 or (kind, mode) == ("flask", "raise")
]


class Pages:
    """What the applications do, by path; /held waits before it ends."""

    def __init__(self) -> None:
        self.arrived, self.gate = threading.Event(), threading.Event()

    def answer(self, path: str, session: Any) -> Any:
        if path == "/put":
            session["n"] = session.get("n", 0) + 1
        elif path == "/clear":
            session.clear()
        elif path == "/held":
            session["held"] = True
            self.arrived.set()
            self.gate.wait(PATIENCE)
        return dict(session) if path != "/plain" else {}


def asgi_app(pages: Pages, dsn: str, options: Any, *, autoload: bool) -> Any:
    store = pgkv.AsyncStore(pgkv.Config(dsn))
    sessions = pgkv.AsyncSessionStore(store)

    async def load(request: Request) -> None:
        if not autoload:
            await pgkv.load_session(request)

    async def page(request: Request) -> JSONResponse:
        await load(request)
        return JSONResponse(await run_in_thread(request))

    async def run_in_thread(request: Request) -> Any:
        return await run_in_threadpool(pages.answer, request.url.path, request.session)

    async def plain(_request: Request) -> JSONResponse:
        return JSONResponse({})

    paths = [Route(f"/{name}", page) for name in ("read", "put", "clear", "held")]
    app = Starlette(routes=[*paths, Route("/plain", plain)], lifespan=lifespan_of(store))
    app.add_middleware(
        pgkv.SessionMiddleware, sessions=sessions, secure=False, autoload=autoload, **options
    )
    return app


def wsgi_app(pages: Pages, sessions: pgkv.SessionStore, options: Any) -> Any:

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        body = json.dumps(pages.answer(environ["PATH_INFO"], environ["pgkv.session"])).encode()
        start_response("200 OK", [("Content-Type", "application/json")])
        yield body

    return pgkv.WSGISessionMiddleware(app, sessions=sessions, secure=False, **options)


def flask_app(pages: Pages, sessions: pgkv.SessionStore, options: Any) -> Any:
    app = flask.Flask("test")
    app.session_interface = PgkvSessionInterface(sessions, secure=False, **options)
    for path in ("/read", "/put", "/clear", "/held", "/plain"):
        app.add_url_rule(path, path, lambda path=path: pages.answer(path, flask.session))
    return app


@pytest.fixture
def make_client(
    serve_asgi: Serve, serve_wsgi: Serve
) -> Iterator[Callable[..., tuple[httpx.Client, Pages]]]:
    """`client, pages = make_client("flask", dsn, on_error="503")`."""

    def make(kind: str, dsn: str, **options: Any) -> tuple[httpx.Client, Pages]:
        pages = Pages()
        options = {"timeout": TIMEOUT, **options}
        if kind in ("asgi", "load_session"):
            return serve_asgi(asgi_app(pages, dsn, options, autoload=kind == "asgi")), pages
        store = pgkv.Store(pgkv.Config(dsn))
        stores.append(store)
        made = wsgi_app if kind == "wsgi" else flask_app
        return serve_wsgi(made(pages, pgkv.SessionStore(store), options)), pages

    stores: list[pgkv.Store] = []
    yield make
    for store in stores:
        store.close()


def timed(client: httpx.Client, path: str) -> httpx.Response:
    started = time.monotonic()
    answer = client.get(path)
    assert time.monotonic() - started < TIMEOUT + SLACK
    return answer


def answered(client: httpx.Client, path: str, mode: str = "503") -> Any:
    """The page's own answer: a request that also connects may not do so in time on a loaded machine, and is
    answered as in an outage."""
    answers: list[httpx.Response] = []

    def good() -> bool:
        answers.append(client.get(path))
        is_anonymous = mode == "anonymous" and answers[-1].json() == {}
        return answers[-1].status_code == 200 and not is_anonymous

    servers.wait_until(good, "it is answered", PATIENCE)
    return answers[-1].json()


@pytest.mark.parametrize(("kind", "mode"), EACH)
def test_outage(
    make_server: Callable[..., Server],
    make_client: Callable[..., tuple[httpx.Client, Pages]],
    caplog: pytest.LogCaptureFixture,
    kind: str,
    mode: str,
) -> None:
    """A request whose session cannot be read is answered as `on_error` says, in time, and never
    loses its session: it is there when the database is back. A logout is not answered as done."""
    server = make_server()
    client, _ = make_client(kind, server.dsn, on_error=mode)
    before = answered(client, "/put")  # counts more than once where a save's answer came late
    cookies = dict(client.cookies)
    server.stop()
    caplog.clear()
    answers = [timed(client, "/read" if n % 2 else "/put") for n in range(6)]
    logout = timed(client, "/clear")
    plain = timed(client, "/plain")
    if mode == "503":
        assert {answer.status_code for answer in [*answers, logout]} == {503}
        for answer in (answers[0], logout):
            assert answer.headers["retry-after"] == "5"
        assert plain.status_code == (503 if kind == "asgi" else 200)
    elif mode == "anonymous":
        assert [answer.json() for answer in answers] == [{"n": 1}, {}] * 3
        assert logout.status_code == 503
        assert plain.status_code == 200
        assert caplog.text.count("pgkv.session.dropped reason=unavailable") == 3
    else:
        assert {answer.status_code for answer in [*answers, logout]} == {500}
    assert not any("set-cookie" in answer.headers for answer in answers)
    for event in ("pgkv.session.unavailable", "pgkv.session.dropped", "pgkv.retry"):
        assert caplog.text.count(event) <= 10
    server.start()
    assert dict(client.cookies) == cookies
    assert answered(client, "/read", mode) == before
    assert answered(client, "/clear") == {}
    assert not client.cookies


@pytest.mark.parametrize("kind", KINDS)
def test_silence(
    make_server: Callable[..., Server],
    make_client: Callable[..., tuple[httpx.Client, Pages]],
    kind: str,
) -> None:
    """A server that no longer answers costs a request the timeout, and is answered with 503."""
    server = make_server()
    client, _ = make_client(kind, server.dsn)
    before = answered(client, "/put")
    server.freeze()
    try:
        assert {timed(client, "/read").status_code for _ in range(3)} == {503}
    finally:
        server.thaw()
    assert answered(client, "/read") == before


@pytest.mark.parametrize(("kind", "mode"), EACH)
def test_a_change_that_cannot_be_saved(
    make_server: Callable[..., Server],
    make_client: Callable[..., tuple[httpx.Client, Pages]],
    kind: str,
    mode: str,
) -> None:
    """The database goes after the session was read: no response says that the change was made."""
    server = make_server()
    client, pages = make_client(kind, server.dsn, on_error=mode, timeout=None)
    answered(client, "/put")
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(client.get("/held")))
    thread.start()
    assert pages.arrived.wait(PATIENCE)
    server.stop()
    pages.gate.set()
    thread.join(PATIENCE)
    assert answers[0].status_code == (500 if mode == "raise" else 503)
    assert "held" not in answers[0].text
