"""SessionMiddleware behind uvicorn: what Starlette's and FastAPI's applications may rely on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from fastapi import Depends, FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from websockets.sync.client import connect

import pgkv
from pgkv.patterns.session.data import new_token
from pgkv.testing import ServerClock
from tests import servers
from tests.faults.proxy import certificate
from tests.faults.support import newest
from tests.peers import Peer
from tests.servers import PATIENCE
from tests.web.running import asgi, client
from tests.web.site import Site

pytestmark = newest
Operations = list[str]
Serve = Callable[..., httpx.Client]


@pytest.fixture
def peer(dsn: str) -> Iterator[Peer]:
    """Another client of the test's schema."""
    client = Peer(dsn)
    yield client
    client.conn.close()


@pytest.fixture
def witness(dsn: str) -> Iterator[Peer]:
    """A second one, that watches while the first holds locks."""
    client = Peer(dsn)
    yield client
    client.conn.close()


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
def serve(dsn: str) -> Iterator[Callable[..., tuple[Site, httpx.Client]]]:
    """`site, browser = serve(autoload=False)`."""
    with contextlib.ExitStack() as stack:

        def run(framework: str = "starlette", **options: Any) -> tuple[Site, httpx.Client]:
            site = Site(dsn, framework, **options)
            address = stack.enter_context(asgi(site.app))
            return site, stack.enter_context(client(address))

        yield run


@pytest.fixture(params=["starlette", "fastapi"])
def browser(request: pytest.FixtureRequest, serve: Any) -> httpx.Client:
    """A client of an application in either framework."""
    return serve(request.param)[1]  # type: ignore[no-any-return]  # see `serve`


def token_of(browser: httpx.Client) -> str:
    return browser.cookies["session"]


def get(browser: httpx.Client, path: str, headers: Any) -> httpx.Response:
    """A request of another browser."""
    return httpx.get(browser.base_url.join(path), headers=headers, timeout=PATIENCE)


def test_queries_per_request(browser: httpx.Client, operations: Operations) -> None:
    """No cookie: none. A cookie: one. A change: one more. What is empty is not stored."""

    def cost(path: str) -> Operations:
        operations.clear()
        assert browser.get(path).status_code == 200
        return operations.copy()

    assert cost("/plain") == cost("/read") == []
    assert not browser.cookies
    assert cost("/put?a=1") == ["create"]
    assert cost("/plain") == cost("/read") == ["load"]
    assert cost("/put?a=1") == ["load"]
    assert cost("/put?a=2") == ["load", "save"]
    assert cost("/login?user=ada") == ["load", "rotate", "save"]
    assert cost("/logout") == ["load", "destroy"]
    assert not browser.cookies
    browser.cookies.set("session", new_token())
    assert cost("/read") == ["load"]
    browser.cookies.set("session", "nonsense")
    assert cost("/read") == []


def test_a_session_lives_on_the_server(browser: httpx.Client) -> None:
    """What one request puts in, the next reads; the cookie is a random token and no data."""
    response = browser.get("/put?name=Ada")
    assert response.headers["set-cookie"] == (
        f"session={token_of(browser)}; Path=/; HttpOnly; SameSite=Lax"
    )
    assert browser.get("/read").json() == {"name": "Ada"}
    assert "set-cookie" not in browser.get("/put?b=2").headers
    assert browser.get("/read").json() == {"name": "Ada", "b": "2"}


def test_what_caches_are_told(browser: httpx.Client) -> None:
    """A response that depends on the session is private and varies; another is left alone."""
    assert "vary" not in browser.get("/plain").headers
    for path, expected in (("/read", "private"), ("/put?a=1", "max-age=60, private")):
        headers = browser.get(path).headers
        assert headers["vary"] == "Cookie"
        assert headers["cache-control"] == expected
    assert "cache-control" not in browser.get("/plain").headers


def test_fixation(browser: httpx.Client) -> None:
    """A token that the client chose is never adopted; a login changes the token it had."""
    chosen = new_token()
    browser.cookies.set("session", chosen, domain="127.0.0.1", path="/")
    browser.get("/put?a=1")
    planted = token_of(browser)
    assert planted != chosen
    browser.get("/login?user=ada")
    assert token_of(browser) != planted
    assert browser.get("/read").json() == {"a": "1", "role": "member"}
    attacker = browser.get("/read", headers={"cookie": f"session={planted}"})
    assert attacker.json() == {"a": "1"}


@pytest.mark.parametrize("path", ["/logout", "/clear"])
def test_replay_after_logout(browser: httpx.Client, path: str) -> None:
    """A logout takes the cookie away and ends the session: a copy of the token is worth nothing."""
    browser.get("/login?user=ada")
    stolen = token_of(browser)
    assert "Max-Age=0" in browser.get(path).headers["set-cookie"]
    assert not browser.cookies
    assert browser.get("/read", headers={"cookie": f"session={stolen}"}).json() == {}


@pytest.mark.parametrize("path", ["/clear?user=ada", "/logout_with_a_word"])
def test_clear_begins_another_session(browser: httpx.Client, path: str) -> None:
    """What is put in after clear() or destroy() goes into a new session under a new token."""
    browser.get("/put?a=1")
    before = token_of(browser)
    browser.get(path)
    assert token_of(browser) != before
    assert len(browser.get("/read").json()) == 1
    assert browser.get("/read", headers={"cookie": f"session={before}"}).json() == {}


def test_bad_cookies(browser: httpx.Client) -> None:
    """Tampered, cut, huge, non-ASCII and duplicate cookies are no session, and no error."""
    browser.get("/put?a=1")
    token = token_of(browser)
    other = new_token()
    flipped = token[:-1] + ("A" if token[-1] != "A" else "B")
    for cookie, expected in {
        f"session={token}": {"a": "1"},
        f"session={flipped}": {},
        f"session={token[:20]}": {},
        f"session={'x' * 1_000_000}": {},
        f"session={token}; session={other}": {"a": "1"},
        f"session={other}; session={token}": {"a": "1"},
        f"session={token}; session={token}": {"a": "1"},
        f"session=junk; session={token}": {"a": "1"},
        "session=": {},
        ";;=;session": {},
    }.items():
        response = get(browser, "/read", {"cookie": cookie})
        assert (response.status_code, response.json()) == (200, expected), cookie[:60]
    raw = [(b"cookie", b"session=\xe9\xff" + token.encode())]
    assert get(browser, "/read", raw).json() == {}


def test_parallel_requests(serve: Any) -> None:
    """Requests under way at the same time change different keys, and none is lost."""
    site, browser = serve()
    browser.get("/put?start=1")
    names = [f"p{n}" for n in range(6)]
    for name in names:
        site.gates[name], site.arrived[name] = threading.Event(), threading.Event()
    cookie = {"cookie": f"session={token_of(browser)}"}
    threads = [
        threading.Thread(
            target=httpx.get,
            args=(browser.base_url.join(f"/held?me={name}"),),
            kwargs={"headers": cookie, "timeout": PATIENCE},
        )
        for name in names
    ]
    for thread in threads:
        thread.start()
    assert all(site.arrived[name].wait(PATIENCE) for name in names)
    for name in names:
        site.gates[name].set()
    for thread in threads:
        thread.join(PATIENCE)
    assert browser.get("/read").json() == {"start": "1"} | dict.fromkeys(names, "held")


@pytest.mark.parametrize(
    ("meanwhile", "reason"), [("/login?user=ada", "rotated"), ("/logout", "gone")]
)
def test_a_request_in_flight(
    serve: Any, caplog: pytest.LogCaptureFixture, meanwhile: str, reason: str
) -> None:
    """A request that was under way at a login or logout ends well; its change is dropped with one
    event, it revives nothing and sends no cookie."""
    site, browser = serve()
    browser.get("/put?a=1")
    site.gates["me"], site.arrived["me"] = threading.Event(), threading.Event()
    answers: list[httpx.Response] = []
    cookie = {"cookie": f"session={token_of(browser)}"}
    thread = threading.Thread(target=lambda: answers.append(get(browser, "/held?me=me", cookie)))
    thread.start()
    assert site.arrived["me"].wait(PATIENCE)
    browser.get(meanwhile)
    site.gates["me"].set()
    thread.join(PATIENCE)
    assert answers[0].status_code == 200
    assert "set-cookie" not in answers[0].headers
    assert caplog.text.count("pgkv.session.dropped") == 1
    assert f"reason={reason}" in caplog.text
    expected = {"a": "1", "role": "member"} if reason == "rotated" else {}
    assert browser.get("/read").json() == expected


async def test_a_logout_that_waited_for_a_rotation(serve: Any, peer: Peer, witness: Peer) -> None:
    """/logout is answered after another request rotated the session: no cookie reads as the user."""
    _, browser = serve()
    browser.get("/login?user=ada")
    cookie = {"cookie": f"session={token_of(browser)}"}

    def ask(path: str) -> asyncio.Future[httpx.Response]:
        return asyncio.ensure_future(asyncio.to_thread(get, browser, path, cookie))

    with peer.conn.transaction():
        peer.run("SELECT 1 FROM kv_store_sessions FOR UPDATE")
        renewing = ask("/renew")
        await witness.until_waiting(1)
        leaving = ask("/logout")
        await witness.until_waiting(2)
    renewed, left = await renewing, await leaving
    assert (renewed.status_code, left.status_code) == (200, 200)
    for token in (token_of(browser), dict(renewed.cookies).get("session", "")):
        assert read_with(browser, token) == {}


async def test_rotations_against_logouts(dsn: str) -> None:
    """A storm: for each of many users one request renews the token while another logs out. No token
    that a browser had or got reads as the user afterwards."""

    async def app(scope: Any, _receive: Any, send: Any) -> None:
        if scope["path"] == "/logout":
            await sessions.destroy(scope["session"])
        elif "role" in scope["session"]:
            await sessions.rotate(scope["session"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def ask(path: str, token: str) -> list[str]:
        """The tokens that the response sets; of a request that lost, none."""
        heads: list[Any] = []

        async def send(message: Any) -> None:
            heads.append(message)

        cookie = (b"cookie", f"session={token}".encode())
        scope = {"type": "http", "path": path, "headers": [cookie]}
        with contextlib.suppress(pgkv.SessionError):
            await middleware(scope, unused, send)
        set_cookies = [
            value.decode()
            for head in heads
            for name, value in head["headers"]
            if name == b"set-cookie"
        ]
        return [each.partition(";")[0].removeprefix("session=") for each in set_cookies]

    unused: Any = None
    # 80 requests share ten connections: on a busy machine the last of them waits for long.
    patient: Any = {"pool_timeout": PATIENCE, "operation_timeout": PATIENCE}
    async with pgkv.AsyncStore.connect(dsn, **patient) as store:
        sessions = pgkv.AsyncSessionStore(store)
        middleware = pgkv.SessionMiddleware(app, sessions=sessions, secure=False, timeout=None)
        for _ in range(5):
            made = [await sessions.create({"role": "member"}, user_id="u") for _ in range(40)]
            asked = [(path, each.id) for each in made for path in ("/renew", "/logout")]
            given = await asyncio.gather(*(ask(*each) for each in asked))
            tokens = [each.id for each in made] + [each for got in given for each in got]
            assert [await sessions.load(token) for token in tokens] == [None] * len(tokens)
            assert await sessions.list_user("u") == []


def read_with(browser: httpx.Client, *tokens: str) -> Any:
    """What the session of these cookies holds."""
    cookie = "; ".join(f"session={token}" for token in tokens)
    return get(browser, "/read", {"cookie": cookie}).json()


def test_several_cookies_of_one_name(browser: httpx.Client) -> None:
    """The first whose session is alive counts, and one that a login has replaced counts least; a
    logout ends the sessions of all."""
    tokens = []
    for name in ("a", "b"):
        browser.cookies.clear()
        browser.get(f"/put?{name}=1")
        tokens.append(token_of(browser))
    a, b = tokens
    assert read_with(browser, new_token(), a, b) == {"a": "1"}
    assert read_with(browser, b, new_token(), a) == {"b": "1"}
    browser.get("/login?user=ada")
    assert read_with(browser, b, token_of(browser)) == {"b": "1", "role": "member"}
    cookie = f"session={b}; session={token_of(browser)}; session={a}"
    left = get(browser, "/logout", {"cookie": cookie})
    assert "Max-Age=0" in left.headers["set-cookie"]
    for token in (a, b, token_of(browser)):
        assert read_with(browser, token) == {}


def test_a_logout_with_a_token_that_reads_no_more(browser: httpx.Client, dsn: str) -> None:
    """After a rotation without grace a logout by the old cookie ends the session all the same."""
    browser.get("/login?user=ada")
    before = token_of(browser)
    with pgkv.Store.connect(dsn) as store:
        sessions = pgkv.SessionStore(store)
        session = sessions.load(before)
        assert session is not None
        sessions.rotate(session, grace=0)
        assert browser.get("/logout").status_code == 200
        assert sessions.load(session.id) is None
    assert not browser.cookies


def test_the_cookie_of_an_active_user_is_sent_again(serve: Any, clock: ServerClock) -> None:
    """With max_age a browser gets its cookie again once a third of that time has passed, not with
    each response."""
    _, browser = serve(max_age=3000, touch_interval=3)
    assert "Max-Age=3000" in browser.get("/put?a=1").headers["set-cookie"]
    token = token_of(browser)
    for _ in range(6):
        clock.advance(700)
        assert "set-cookie" not in browser.get("/plain").headers
        clock.advance(290)
        response = browser.get("/plain")
        assert (
            response.headers.get("set-cookie") is None
            or "private" in response.headers["cache-control"]
        )
        clock.advance(20)
        browser.get("/plain")
    sent = []
    for _ in range(30):
        clock.advance(250)
        sent.append(browser.get("/plain").headers.get("set-cookie"))
    assert 7 <= sum(each is not None for each in sent) <= 8
    assert {each for each in sent if each} == {
        f"session={token}; Path=/; Max-Age=3000; HttpOnly; SameSite=Lax"
    }


@pytest.mark.parametrize("max_age", [None, 3000])
def test_the_cookie_lives_as_long_as_its_session(
    serve: Any, clock: ServerClock, max_age: float | None
) -> None:
    """A session that is remembered for 30 days has a cookie of 30 days, which is sent again when a
    third of them has gone; without lifetimes of its own it has the application's cookie."""
    _, browser = serve(max_age=max_age)
    usual = "" if max_age is None else "; Max-Age=3000"
    assert f"; Path=/{usual}; HttpOnly" in browser.get("/put?a=1").headers["set-cookie"]
    assert "; Max-Age=2592000; " in browser.get("/login?user=ada&days=30").headers["set-cookie"]
    sent = []
    for _ in range(30):
        clock.advance(4 * 86400)
        response = browser.get("/read")
        assert response.json()["a"] == "1"
        sent.append(response.headers.get("set-cookie"))
        assert "set-cookie" not in browser.get("/read").headers
    assert [sum(each is not None for each in sent[n : n + 10]) for n in (0, 10, 20)] == [4, 4, 4]
    assert {each for each in sent if each} == {
        f"session={token_of(browser)}; Path=/; Max-Age=2592000; HttpOnly; SameSite=Lax"
    }


@pytest.mark.parametrize("when", ["head", "body"])
async def test_cancelled_by_a_scope(dsn: str, when: str) -> None:
    """What the program changed is saved although a cancel scope cancels each await of the middleware."""
    async with pgkv.AsyncStore.connect(dsn) as store:
        sessions = pgkv.AsyncSessionStore(store)
        made = await sessions.create({"a": 1})

        async def app(scope: Any, receive: Any, send: Any) -> None:
            if when == "body":
                await send({"type": "http.response.start", "status": 200, "headers": []})
            scope["session"]["late"] = True
            cancel_scope.cancel()
            if when == "head":
                await send({"type": "http.response.start", "status": 200, "headers": []})

        async def ignore(*_message: Any) -> Any:
            pass

        middleware = pgkv.SessionMiddleware(app, sessions=sessions, secure=False, timeout=None)
        scope = {
            "type": "http",
            "path": "/",
            "headers": [(b"cookie", f"session={made.id}".encode())],
        }
        with anyio.CancelScope() as cancel_scope:
            await middleware(scope, ignore, ignore)
        assert cancel_scope.cancelled_caught
        loaded = await sessions.load(made.id)
        assert loaded is not None
        assert loaded.data == {"a": 1, "late": True}


@pytest.mark.parametrize(
    ("path", "exempt"),
    [("/api/static/a", True), ("/static/a", True), ("/api/api/static/a", False), ("/api", False)],
)
async def test_exempt_paths_are_those_of_the_application(dsn: str, path: str, exempt: bool) -> None:
    """Behind a proxy or a mount that puts a prefix before them, exempt paths are without it."""
    asked: list[Any] = []

    async def app(scope: Any, *_channels: Any) -> Any:
        with contextlib.suppress(pgkv.SessionError):
            asked.append(dict(scope["session"].items()))

    sessions = pgkv.AsyncSessionStore(pgkv.AsyncStore(pgkv.Config(dsn)))
    middleware = pgkv.SessionMiddleware(app, sessions=sessions, secure=False, exempt=["/static"])
    scope = {"type": "http", "path": path, "root_path": "/api", "headers": []}
    channel: Any = app
    await middleware(scope, channel, channel)
    assert asked == ([] if exempt else [{}])


def test_handlers_that_fail(browser: httpx.Client) -> None:
    """An exception saves nothing; an HTTP error that the framework answers saves like any answer;
    data that is no JSON is an error and leaves the session as it was."""
    browser.get("/put?a=1")
    assert browser.get("/fail").status_code == 500
    assert browser.get("/bad").status_code == 500
    assert browser.get("/read").json() == {"a": "1"}
    assert browser.get("/refuse").status_code == 403
    assert browser.get("/read").json() == {"a": "1", "refused": True}


@pytest.mark.parametrize("path", ["/stream", "/background"])
def test_changes_after_the_head(browser: httpx.Client, path: str) -> None:
    """What a streamed body or a background task changes is saved when it has ended."""
    browser.get("/put?a=1")
    assert browser.get(path).status_code == 200
    data = browser.get("/read").json()
    assert data.pop("head") == 1
    data = poll(lambda: browser.get("/read").json(), lambda data: len(data) == 3)
    assert {"a", "head"} < set(data)


def poll(ask: Callable[[], Any], done: Callable[[Any], bool]) -> Any:
    answers: list[Any] = []

    def condition() -> bool:
        answers.append(ask())
        return done(answers[-1])

    servers.wait_until(condition, "the answer comes")
    return answers[-1]


def test_a_new_session_after_the_head(
    browser: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    """A session begun when the cookie can no longer be sent is dropped with one event."""
    browser.get("/late")
    poll(lambda: caplog.text.count("pgkv.session.dropped"), lambda count: count == 1)
    assert not browser.cookies


def test_websockets(browser: httpx.Client, operations: Operations) -> None:
    """A WebSocket has the session of its cookie, can begin one, and saves what it changed."""
    address = f"ws://{browser.base_url.host}:{browser.base_url.port}/ws"
    with connect(address) as socket:
        assert json.loads(socket.recv()) == {"accepted": True}
        assert socket.response is not None
        cookie = socket.response.headers["set-cookie"].partition(";")[0]
        socket.send("hello")
        with contextlib.suppress(Exception):
            socket.recv()

    def read() -> Any:
        return browser.get("/read", headers={"cookie": cookie}).json()

    said = {"accepted": True, "said": "hello"}
    assert poll(read, lambda data: "said" in data) == said
    servers.wait_until(lambda: "save" in operations, "the first socket's save is told")
    operations.clear()
    with connect(address, additional_headers={"cookie": cookie}) as socket:
        assert json.loads(socket.recv()) == said
        assert operations == ["load"]
        socket.send("again")


def test_exempt_paths(serve: Any, operations: Operations) -> None:
    """An exempt path costs no query, refuses the session by name, and can still load it."""
    _, browser = serve(exempt=["/static"])
    browser.get("/put?a=1")
    operations.clear()
    assert browser.get("/static/plain").status_code == 200
    assert browser.get("/static/read").status_code == 500
    assert operations == []
    assert browser.get("/static/load").json() == {"a": "1", "loaded": False}
    assert operations == ["load", "save"]


def test_without_autoload(serve: Any, operations: Operations) -> None:
    """autoload=False: no query until `load_session`, then one; touching it before is an error."""
    _, browser = serve(autoload=False)
    assert browser.get("/load").json() == {"loaded": True}
    operations.clear()
    assert browser.get("/plain").status_code == 200
    assert browser.get("/read").status_code == 500
    assert operations == []
    assert browser.get("/load").json() == {"loaded": False}
    assert operations == ["load", "save"]
    assert browser.get("/load").json() == {"loaded": False}
    assert operations == ["load", "save", "load"]


def test_over_https(dsn: str, tmp_path: Path) -> None:
    """By default the cookie has the __Host- prefix and every flag, and comes back over https."""
    pytest.importorskip("cryptography")
    site = Site(dsn, secure=True)
    with asgi(site.app, certificate(tmp_path)) as address, client(address, tls=True) as browser:
        response = browser.get("/put?a=1")
        token = browser.cookies["__Host-session"]
        assert response.headers["set-cookie"] == (
            f"__Host-session={token}; Path=/; Secure; HttpOnly; SameSite=Lax"
        )
        assert browser.get("/read").json() == {"a": "1"}


def test_a_fastapi_application(dsn: str) -> None:
    """FastAPI's own ways: a dependency, a blocking endpoint, an included model."""
    store = pgkv.AsyncStore(pgkv.Config(dsn))
    sessions = pgkv.AsyncSessionStore(store)

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await store.close()

    app = FastAPI(lifespan=lifespan)
    app.add_middleware(pgkv.SessionMiddleware, sessions=sessions, secure=False, timeout=None)

    async def visits(request: Request) -> int:
        request.session["visits"] = request.session.get("visits", 0) + 1
        return int(request.session["visits"])

    counted = Depends(visits)

    def page(count: int = counted) -> dict[str, int]:
        return {"visits": count}

    app.get("/")(page)
    with asgi(app) as address, client(address) as browser:
        assert [browser.get("/").json()["visits"] for _ in range(3)] == [1, 2, 3]


def test_the_database_is_away(dsn: str) -> None:
    """While the database cannot be reached a request with a cookie fails; one without works."""
    site = Site("host=127.0.0.1 port=9 connect_timeout=1")
    with asgi(_without_lifespan(site.app)) as address, client(address) as browser:
        assert browser.get("/plain").status_code == 200
        headers = {"cookie": f"session={new_token()}"}
        assert browser.get("/read", headers=headers).status_code == 503


def _without_lifespan(app: Any) -> Any:
    async def served(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await app(scope, receive, send)

    return served


async def test_the_middleware_needs_an_async_store(dsn: str) -> None:
    """A blocking store in an event loop is refused when the application is built."""
    with pgkv.Store(pgkv.Config(dsn)) as store, pytest.raises(pgkv.ConfigError, match="Async"):
        pgkv.SessionMiddleware(Starlette(), sessions=pgkv.SessionStore(store))  # type: ignore[arg-type]  # the point
    with pytest.raises(pgkv.SessionError, match=r"no pgkv\.SessionMiddleware"):
        await pgkv.load_session({"type": "http"})
