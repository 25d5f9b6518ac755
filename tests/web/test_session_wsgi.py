"""WSGISessionMiddleware and Flask's session behind a threaded server."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import flask
import httpx
import pytest
from flask.sessions import SecureCookieSessionInterface
from markupsafe import Markup
from psycopg.conninfo import make_conninfo

import pgkv
from pgkv.integrations.flask import PgkvSessionInterface
from pgkv.patterns.session.data import new_token
from pgkv.testing import ServerClock
from tests import servers
from tests.faults.proxy import certificate
from tests.faults.support import newest
from tests.servers import PATIENCE
from tests.web.running import client, wsgi

pytestmark = newest
TYPES = {
    "tuple": (1, (2, [3])),
    "bytes": b"\0x",
    "markup": Markup("<b>bold</b>"),
    "id": uuid.UUID(int=7),
    "moment": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    "plain": {"a": [None, True, 1.5, "text"]},
    "looks tagged": {" t": [1]},
}
Operations = list[str]


@pytest.fixture
def operations() -> Iterator[Operations]:
    """The names of all operations on sessions; sweeps come when they like."""
    seen: Operations = []

    def note(name: str, *_: Any) -> None:
        if name.startswith("session_"):
            seen.append(name.removeprefix("session_"))

    remove = pgkv.on_operation(note)
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
    # timeout: the store's, since a busy machine is no outage.
    options = {"secure": False, "timeout": None, **options}
    app.session_interface = PgkvSessionInterface(sessions, **options)
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
        gate.wait(PATIENCE)
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

    @app.get("/flashed-as-is")
    def flashed_as_is() -> str:
        return repr(flask.get_flashed_messages(with_categories=True))

    @app.get("/types")
    def types() -> str:
        if "put" in flask.request.args:
            flask.session["values"] = TYPES
        return repr(flask.session.get("values"))

    @app.get("/state/<what>")
    def state(what: str) -> Any:
        if what == "read":
            flask.session.get("a")
        elif what == "set":
            flask.session["a"] = 1
        elif what == "pop":
            flask.session.pop("missing", None)
        elif what == "default":
            flask.session.setdefault("a", 1)
        session: Any = flask.session
        return flask.jsonify([session.accessed, session.modified, session.new])

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


def test_values_of_flasks_own_session(browser: httpx.Client) -> None:
    """What Flask's session holds comes back as it went in, flashed messages as the tuples they are;
    a value that is the same again is no change."""
    expected = repr(TYPES)
    assert browser.get("/types?put").text == expected
    assert browser.get("/types").text == expected
    browser.get("/flash")
    assert browser.get("/flashed-as-is").text == "[('info', 'hello')]"


def test_unchanged_values_of_flasks_own_are_not_saved(
    browser: httpx.Client, operations: Operations
) -> None:
    """Reading them, or setting them to what they are, costs no save."""
    browser.get("/types?put")
    operations.clear()
    browser.get("/types")
    browser.get("/types?put")
    assert operations == ["load", "load"]


def test_what_a_flask_session_says_of_itself(sessions: pgkv.SessionStore) -> None:
    """accessed and modified are as those of Flask's own session, request by request; new is true
    until the session was stored."""
    ours, own = flask_app(sessions), flask_app(sessions)
    own.session_interface = SecureCookieSessionInterface()
    own.secret_key = "any"
    browsers = ours.test_client(), own.test_client()
    for what, is_new in {
        "nothing": True,
        "read": True,
        "set": True,
        "read again": False,
        "pop": False,
        "default": False,
        "set again": False,
    }.items():
        path = f"/state/{what.split()[0]}"
        answers: list[Any] = [browser.get(path).json for browser in browsers]
        (*state, new), (*expected, _) = answers
        assert (state, new) == (expected, is_new), what


def test_several_cookies_of_one_name(sessions: pgkv.SessionStore, browser: httpx.Client) -> None:
    """The first whose session is alive counts: an old cookie beside the new one locks nobody out."""
    old, new = (sessions.create({"n": n}, user_id="bob") for n in range(2))
    sessions.destroy(old)
    cookie = {"cookie": f"session={old.id}; session={new.id}"}
    assert browser.get("/read", headers=cookie).json() == {"n": 1}
    browser.get("/logout", headers=cookie)
    assert sessions.load(new.id) is None


def test_the_cookie_of_an_active_user_is_sent_again(
    sessions: pgkv.SessionStore, clock: ServerClock
) -> None:
    """With max_age, once a third of that time has passed."""
    app = flask_app(sessions, max_age=3000)
    with wsgi(app) as address, client(address) as browser:
        first = browser.get("/put?a=1").headers["set-cookie"]
        clock.advance(900)
        assert "set-cookie" not in browser.get("/read").headers
        clock.advance(200)
        assert browser.get("/read").headers["set-cookie"] == first
        assert "set-cookie" not in browser.get("/read").headers


def test_permanent_sessions_of_flask(sessions: pgkv.SessionStore, clock: ServerClock) -> None:
    """`session.permanent` gives session and cookie PERMANENT_SESSION_LIFETIME, also to one that is
    begun by clear() and to one that is not stored yet; False takes it back."""
    app = flask_app(sessions)
    app.permanent_session_lifetime = timedelta(days=31)

    @app.get("/permanent/<value>")
    def permanent(value: str) -> Any:
        if value == "clear":
            flask.session.clear()
        flask.session.permanent = value != "no"
        flask.session.setdefault("n", 1)
        return [flask.session.permanent, flask.session.new]

    with wsgi(app) as address, client(address) as browser:
        response = browser.get("/permanent/yes")
        assert response.json() == [True, True]
        assert "; Max-Age=2678400; " in response.headers["set-cookie"]
        again = browser.get("/permanent/yes")
        assert (again.json(), again.headers.get("set-cookie")) == ([True, False], None)
        clock.advance(20 * 86400)
        assert "; Max-Age=2678400; " in browser.get("/permanent/yes").headers["set-cookie"]
        old = token_of(browser)
        response = browser.get("/permanent/clear")
        assert "; Max-Age=2678400; " in response.headers["set-cookie"]
        assert token_of(browser) != old
        response = browser.get("/permanent/no")
        assert response.json() == [False, False]
        assert "Max-Age" not in response.headers["set-cookie"]
        clock.advance(1860)
        assert sessions.load(token_of(browser)) is None


def test_an_error_handler_answers_an_outage(dsn: str) -> None:
    """The 503 is an exception of Flask's, which the application may answer in its own way."""
    store = pgkv.Store(pgkv.Config(make_conninfo(dsn, host="127.0.0.1", port=9)))
    app = flask_app(pgkv.SessionStore(store))
    app.register_error_handler(503, lambda _error: ("one moment", 503))
    app.testing = True
    answer = app.test_client(use_cookies=False).get(
        "/read", headers={"cookie": f"session={new_token()}"}
    )
    assert (answer.status_code, answer.text) == (503, "one moment")


def test_a_transaction_of_flasks_test_client(sessions: pgkv.SessionStore) -> None:
    """Tests of a program prepare its session as ever."""
    app = flask_app(sessions)
    browser = app.test_client()
    with browser.session_transaction() as session:
        session["a"] = (1, 2)
    assert browser.get("/read").json == {"a": [1, 2]}


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
            target=lambda: answers.append(httpx.get(url, headers=cookie, timeout=PATIENCE))
        )
        thread.start()
        assert app.extensions["arrived"].wait(PATIENCE)
        browser.get("/logout")
        app.extensions["gate"].set()
        thread.join(PATIENCE)
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
        plain_app, sessions=sessions, secure=False, timeout=None, exempt=["/none"]
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
    app: Any = pgkv.WSGISessionMiddleware(plain_app, sessions=sessions, secure=False, timeout=None)
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
