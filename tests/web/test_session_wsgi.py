"""WSGISessionMiddleware and Flask's session behind a threaded server."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import flask
import httpx
import pytest

import pgkv
from pgkv.integrations.flask import PgkvSessionInterface
from pgkv.patterns.session.data import new_token
from tests import servers
from tests.faults.proxy import certificate
from tests.faults.support import newest
from tests.web.running import client, wsgi

pytestmark = newest
Operations = list[str]


@pytest.fixture
def operations() -> Iterator[Operations]:
    """The names of all operations of all stores."""
    seen: Operations = []
    remove = pgkv.on_operation(lambda name, *_: seen.append(name.removeprefix("session_")))
    yield seen
    remove()


@pytest.fixture
def sessions(dsn: str) -> Iterator[pgkv.SessionStore]:
    """A session store."""
    with pgkv.Store.connect(dsn) as store:
        sessions = pgkv.SessionStore(store)
        sessions.create_table()
        yield sessions


def flask_app(sessions: pgkv.SessionStore, **options: Any) -> flask.Flask:
    """The same site as in the ASGI tests, as Flask programs are written."""
    app = flask.Flask(__name__)
    app.session_interface = PgkvSessionInterface(sessions, **{"secure": False, **options})
    gate, arrived = threading.Event(), threading.Event()
    app.extensions["gate"], app.extensions["arrived"] = gate, arrived

    @app.get("/plain")
    def plain() -> str:
        return "plain"

    @app.get("/read")
    def read() -> Any:
        return dict(flask.session)

    @app.get("/put")
    def put() -> str:
        flask.session.update(flask.request.args)
        return "ok"

    @app.get("/nested")
    def nested() -> str:
        flask.session.setdefault("cart", []).append(1)
        return "ok"

    @app.get("/held")
    def held() -> str:
        flask.session["held"] = True
        arrived.set()
        gate.wait(20)
        return "ok"

    @app.get("/login")
    def login() -> str:
        sessions.rotate(flask.session, user_id=flask.request.args["user"])
        flask.session["role"] = "member"
        return "ok"

    @app.get("/logout")
    def logout() -> str:
        sessions.destroy(flask.session)
        return "bye"

    @app.get("/clear")
    def clear() -> str:
        flask.session.clear()
        flask.session.update(flask.request.args)
        return "ok"

    @app.get("/flash")
    def flash() -> str:
        flask.flash("hello", "info")
        return "ok"

    @app.get("/flashed")
    def flashed() -> Any:
        return flask.jsonify(flask.get_flashed_messages(with_categories=True))

    @app.get("/bad")
    def bad() -> str:
        flask.session["bad"] = object()
        return "never sent"

    @app.get("/static-page")
    def exempt() -> str:
        return str(len(flask.session))

    return app


@pytest.fixture
def browser(sessions: pgkv.SessionStore) -> Iterator[httpx.Client]:
    """A client of the Flask application."""
    with wsgi(flask_app(sessions)) as address, client(address) as browser:
        yield browser


def token_of(browser: httpx.Client) -> str:
    return browser.cookies["session"]


def test_queries_per_request(browser: httpx.Client, operations: Operations) -> None:
    """What does not touch the session costs none, with or without a cookie."""

    def cost(path: str) -> Operations:
        operations.clear()
        assert browser.get(path).status_code == 200
        return operations.copy()

    assert cost("/plain") == cost("/read") == []
    assert not browser.cookies
    assert cost("/put?a=1") == ["create"]
    assert cost("/plain") == []
    assert cost("/read") == ["load"]
    assert cost("/put?a=1") == ["load"]
    assert cost("/put?a=2") == ["load", "save"]
    assert cost("/login?user=ada") == ["load", "rotate", "save"]
    assert cost("/logout") == ["load", "destroy"]
    assert not browser.cookies


def test_flask_sessions(browser: httpx.Client) -> None:
    """flask.session works as ever: nested changes, flashed messages, several requests."""
    response = browser.get("/put?name=Ada")
    assert response.headers["set-cookie"] == (
        f"session={token_of(browser)}; Path=/; HttpOnly; SameSite=Lax"
    )
    assert response.headers["cache-control"] == "private"
    assert response.headers["vary"] == "Cookie"
    assert "vary" not in browser.get("/plain").headers
    for _ in range(2):
        browser.get("/nested")
    assert browser.get("/read").json() == {"name": "Ada", "cart": [1, 1]}
    browser.get("/flash")
    assert browser.get("/flashed").json() == [["info", "hello"]]
    assert browser.get("/flashed").json() == []


def test_fixation_and_replay(browser: httpx.Client) -> None:
    """A chosen token is not adopted, a login changes the token, a logout ends it."""
    chosen = new_token()
    browser.cookies.set("session", chosen, domain="127.0.0.1", path="/")
    browser.get("/put?a=1")
    planted = token_of(browser)
    assert planted != chosen
    browser.get("/login?user=ada")
    stolen = token_of(browser)
    assert stolen != planted
    assert "Max-Age=0" in browser.get("/logout").headers["set-cookie"]
    assert not browser.cookies
    for token in (chosen, planted, stolen):
        assert browser.get("/read", headers={"cookie": f"session={token}"}).json() == {}


def test_clear_begins_another_session(browser: httpx.Client) -> None:
    """Flask's tutorial logs in by clear() and a key: that changes the token here."""
    browser.get("/put?a=1")
    before = token_of(browser)
    browser.get("/clear?user_id=1")
    assert token_of(browser) != before
    assert browser.get("/read").json() == {"user_id": "1"}
    browser.get("/clear")
    assert not browser.cookies


def test_a_request_in_flight_at_logout(
    sessions: pgkv.SessionStore, caplog: pytest.LogCaptureFixture
) -> None:
    """Its change is dropped with one event and revives nothing."""
    app = flask_app(sessions)
    with wsgi(app) as address, client(address) as browser:
        browser.get("/put?a=1")
        cookie = {"cookie": f"session={token_of(browser)}"}
        answers: list[httpx.Response] = []
        url = browser.base_url.join("/held")
        thread = threading.Thread(
            target=lambda: answers.append(httpx.get(url, headers=cookie, timeout=30))
        )
        thread.start()
        assert app.extensions["arrived"].wait(20)
        browser.get("/logout")
        app.extensions["gate"].set()
        thread.join(20)
        assert answers[0].status_code == 200
        assert "set-cookie" not in answers[0].headers
        assert caplog.text.count("pgkv.session.dropped") == 1
        assert browser.get("/read", headers=cookie).json() == {}


def test_data_that_is_no_json(browser: httpx.Client) -> None:
    """It is an error, and the session stays as it was."""
    browser.get("/put?a=1")
    assert browser.get("/bad").status_code == 500
    assert browser.get("/read").json() == {"a": "1"}


def test_exempt_paths(sessions: pgkv.SessionStore, operations: Operations) -> None:
    """On an exempt path no query is made, and using the session is an error."""
    app = flask_app(sessions, exempt=["/static-page"])
    with wsgi(app) as address, client(address) as browser:
        browser.get("/put?a=1")
        operations.clear()
        assert browser.get("/static-page").status_code == 500
        assert operations == []


def test_over_https(sessions: pgkv.SessionStore, tmp_path: Path) -> None:
    """By default the cookie has the __Host- prefix and every flag, and comes back over https."""
    pytest.importorskip("cryptography")
    app = flask_app(sessions, secure=True)
    with wsgi(app, certificate(tmp_path)) as address, client(address, tls=True) as browser:
        response = browser.get("/put?a=1")
        token = browser.cookies["__Host-session"]
        assert response.headers["set-cookie"] == (
            f"__Host-session={token}; Path=/; Secure; HttpOnly; SameSite=Lax"
        )
        assert browser.get("/read").json() == {"a": "1"}


# -- plain WSGI --------------------------------------------------------------------------------


def plain_app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """An application without a framework, which goes on changing the session while it answers."""
    path, session = environ["PATH_INFO"], environ.get("pgkv.session")
    headers = [("Content-Type", "text/plain"), ("Vary", "Accept")]
    if path == "/none":
        start_response("200 OK", headers)
        yield str(session is None).encode()
        return
    assert session is not None
    if path == "/put":
        session["n"] = session.get("n", 0) + 1
    if path == "/error":
        session["n"] = -1
        try:
            start_response("200 OK", headers)
            raise RuntimeError("on purpose")
        except RuntimeError:
            start_response("500 Oh", headers, sys.exc_info())
            yield b"oh"
            return
    start_response("200 OK", headers)
    if path == "/stream":
        yield b"   "
        session["streamed"] = True
    yield json.dumps(dict(session) if path != "/idle" else {}).encode()


def test_plain_wsgi(sessions: pgkv.SessionStore, operations: Operations) -> None:
    """environ["pgkv.session"] loads at first touch, is saved at the head and again at the end."""
    app: Any = pgkv.WSGISessionMiddleware(
        plain_app, sessions=sessions, secure=False, exempt=["/none"]
    )
    with contextlib.ExitStack() as stack:
        browser = stack.enter_context(client(stack.enter_context(wsgi(app))))
        assert browser.get("/none").text == "True"
        assert browser.get("/idle").json() == {}
        response = browser.get("/put")
        assert response.json() == {"n": 1}
        assert response.headers["vary"] == "Accept, Cookie"
        operations.clear()
        assert browser.get("/idle").json() == {}
        assert operations == []
        assert browser.get("/stream").json() == {"n": 1, "streamed": True}
        # The end of the response is saved after the client has read it.
        servers.wait_until(lambda: operations == ["load", "save"], "the end is saved")
        assert browser.get("/put").json() == {"n": 2, "streamed": True}
        assert browser.get("/error").status_code == 500
        assert browser.get("/read").json() == {"n": -1, "streamed": True}


def test_the_head_is_replaced_with_its_cookie(sessions: pgkv.SessionStore) -> None:
    """start_response called a second time, for an error, still hands out the token."""
    app: Any = pgkv.WSGISessionMiddleware(plain_app, sessions=sessions, secure=False)
    heads: list[Any] = []
    environ = {"PATH_INFO": "/error", "REQUEST_METHOD": "GET", "wsgi.version": (1, 0)}
    body = app(environ, lambda *head: heads.append(head))
    assert b"".join(body) == b"oh"
    body.close()
    first, second = (dict(head[1])["Set-Cookie"] for head in heads)
    assert first == second


async def test_async_stores_are_refused(dsn: str) -> None:
    """Without an event loop an AsyncSessionStore could not be awaited."""
    sessions: Any = pgkv.AsyncSessionStore(pgkv.AsyncStore(pgkv.Config(dsn)))
    for make in (
        lambda: pgkv.WSGISessionMiddleware(plain_app, sessions=sessions),
        lambda: PgkvSessionInterface(sessions),
    ):
        with pytest.raises(pgkv.ConfigError, match="needs a SessionStore"):
            make()
