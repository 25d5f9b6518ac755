"""Idempotency-Key behind real servers: one site in ASGI, WSGI, FastAPI, Flask and Django."""

from __future__ import annotations

import asyncio
import contextlib
import io
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flask
import httpx
import psycopg
import pytest
from fastapi import Depends, FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import pgkv
from pgkv.integrations.fastapi import Answered, Idempotent, answered_response
from pgkv.integrations.flask import idempotent as flask_idempotent
from pgkv.testing import ServerClock
from tests import servers
from tests.faults.support import newest
from tests.web.running import asgi, client, wsgi

pytestmark = newest


class Site:
    """Counts what its routes did, and lets them wait."""

    def __init__(self) -> None:
        self.runs: list[str] = []
        self.entered = threading.Event()
        self.go_on = threading.Event()
        self.status = 201

    def work(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        """Run a route: status, body, headers."""
        self.runs.append(path)
        if path == "/raise":
            raise ZeroDivisionError
        if path == "/slow":
            self.entered.set()
            assert self.go_on.wait(servers.PATIENCE)
        size = 5000 if path == "/big" else 0
        body = b'{"run": %d}' % len(self.runs) + b" " * size
        headers = {
            "Content-Type": "application/json",
            "Location": "/payments/1",
            "Set-Cookie": "session=secret",
            "X-Other": "x",
        }
        return self.status, body, headers


def starlette_app(site: Site, dsn: str, **options: Any) -> Any:
    """The site in ASGI."""

    async def route(request: Request) -> Response:
        await request.body()
        status, body, headers = await asyncio.to_thread(site.work, request.url.path)
        if request.url.path == "/stream":
            parts = [body[:3], body[3:6], body[6:]]

            async def chunks() -> Any:
                for part in parts:
                    yield part

            return StreamingResponse(chunks(), status, headers)
        return Response(body, status, headers)

    store = pgkv.AsyncStore(pgkv.Config(dsn))

    @contextlib.asynccontextmanager
    async def lifespan(_app: Any) -> Any:
        async with store:
            yield

    methods = ["GET", "POST"]
    app = Starlette(routes=[Route("/{name}", route, methods=methods)], lifespan=lifespan)
    keys = pgkv.AsyncIdempotency(store)
    app.add_middleware(pgkv.IdempotencyMiddleware, idempotency=keys, **options)
    return app


def wsgi_app(site: Site, store: pgkv.Store, **options: Any) -> Any:
    """The site in WSGI."""

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        status, body, headers = site.work(environ["PATH_INFO"])
        start_response(f"{status} Whatever", list(headers.items()))
        if environ["PATH_INFO"] == "/stream":
            return iter([body[:3], b"", body[3:6], body[6:]])
        return [body]

    keys = pgkv.Idempotency(store)
    return pgkv.WSGIIdempotencyMiddleware(app, idempotency=keys, **options)


Start = Callable[..., tuple[Site, httpx.Client]]


@pytest.fixture(params=["asgi", "wsgi"])
def start(request: pytest.FixtureRequest, dsn: str) -> Iterator[Start]:
    """`site, browser = start(required=True)`."""
    with contextlib.ExitStack() as stack:

        def begin(**options: Any) -> tuple[Site, httpx.Client]:
            site, options = Site(), {"scope": lambda r: r.headers.get("user", ""), **options}
            stack.callback(site.go_on.set)
            if request.param == "asgi":
                address = stack.enter_context(asgi(starlette_app(site, dsn, **options)))
            else:
                store = stack.enter_context(pgkv.Store.connect(dsn))
                address = stack.enter_context(wsgi(wsgi_app(site, store, **options)))
            return site, stack.enter_context(client(address))

        yield begin


def post(browser: httpx.Client, path: str = "/pay", key: str = "k", **options: Any) -> Any:
    """Send a request with a key."""
    headers = {"Idempotency-Key": key, **options.pop("headers", {})}
    return browser.post(path, headers=headers, **options)


def test_a_retry_gets_the_stored_response(start: Start) -> None:
    """Status, body, Content-Type and Location come again, marked as a replay; cookies never do."""
    site, browser = start()
    first = post(browser, content=b"1")
    again = post(browser, key='"k"', content=b"1")
    assert (first.status_code, first.content) == (201, b'{"run": 1}')
    assert (again.status_code, again.content) == (201, b'{"run": 1}')
    assert again.headers["content-type"] == "application/json"
    assert again.headers["location"] == "/payments/1"
    assert again.headers["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in first.headers
    assert "set-cookie" in first.headers
    assert "set-cookie" not in again.headers
    assert "x-other" not in again.headers
    assert site.runs == ["/pay"]


def test_a_stream_is_kept_as_well(start: Start) -> None:
    """A response in chunks arrives whole, first and as a replay; its last byte comes after the record."""
    site, browser = start()
    assert [post(browser, "/stream").content for _ in range(2)] == [b'{"run": 1}'] * 2
    assert site.runs == ["/stream"]


def test_other_requests_run(start: Start) -> None:
    """Without a key, or by another method, a request runs each time; two users and one key are two."""
    site, browser = start()
    browser.post("/pay")
    browser.post("/pay")
    browser.get("/pay", headers={"Idempotency-Key": "k"})
    browser.get("/pay", headers={"Idempotency-Key": "k"})
    for user in ("ann", "bob", "ann"):
        post(browser, headers={"user": user})
    assert len(site.runs) == 6


@pytest.mark.parametrize("change", ["body", "path", "query", "type"])
def test_another_request_with_the_key(start: Start, change: str) -> None:
    """A key that comes with another body, path, query or content type: 422, and nothing runs."""
    site, browser = start()
    post(browser, content=b"1", headers={"Content-Type": "text/plain"})
    path = {"path": "/other", "query": "/pay?a=1"}.get(change, "/pay")
    kind = "text/html" if change == "type" else "text/plain"
    content = b"2" if change == "body" else b"1"
    refused = post(browser, path, content=content, headers={"Content-Type": kind})
    assert refused.status_code == 422
    assert refused.headers["content-type"] == "application/problem+json"
    assert refused.json()["status"] == 422
    assert len(site.runs) == 1


def test_keys_that_are_none(start: Start) -> None:
    """A key that is missing where it is required, empty, too long or not ASCII: 400."""
    site, browser = start(required=True)
    assert browser.post("/pay").status_code == 400
    for key in ('""', "x" * 256, "a\tb", "é"):
        headers = {b"Idempotency-Key": key.encode("latin-1")}
        assert browser.post("/pay", headers=headers).status_code == 400
    assert browser.get("/pay").status_code == 201
    assert site.runs == ["/pay"]


def test_limits(start: Start) -> None:
    """A body beyond max_request: 413, nothing runs. A response beyond max_body is sent, and its retry gets
    409."""
    site, browser = start(max_request=10, max_body=1000)
    assert post(browser, content=b"x" * 11).status_code == 413
    assert site.runs == []
    assert post(browser, content=b"x" * 10).status_code == 201
    assert len(post(browser, "/big", "b").content) > 5000
    again = post(browser, "/big", "b")
    assert again.status_code == 409
    assert "not kept" in again.json()["title"]
    assert len(site.runs) == 2


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 503])
def test_failures_are_not_kept(start: Start, status: int) -> None:
    """After an answer that says "later" or "broken", the retry runs."""
    site, browser = start()
    site.status = status
    assert post(browser).status_code == status
    site.status = 200
    assert post(browser).status_code == 200
    site.status = 404
    assert post(browser, key="other").status_code == 404
    site.status = 200
    assert post(browser, key="other").status_code == 404


def test_a_route_that_raises_runs_again(start: Start) -> None:
    """An exception is not an outcome."""
    site, browser = start()
    assert [post(browser, "/raise").status_code for _ in range(2)] == [500, 500]
    assert site.runs == ["/raise", "/raise"]


@pytest.mark.parametrize("wait", [0, servers.PATIENCE])
def test_a_retry_in_flight(start: Start, wait: float) -> None:
    """While the first runs, a retry gets 409 with Retry-After; with `wait` the first one's response."""
    site, browser = start(wait=wait)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(post, browser, "/slow")
        assert site.entered.wait(servers.PATIENCE)
        retry = pool.submit(post, browser, "/slow")
        if not wait:
            assert retry.result().status_code == 409
            assert retry.result().headers["retry-after"] == "1"
        site.go_on.set()
        assert first.result().status_code == 201
        if wait:
            assert retry.result().headers["idempotent-replayed"] == "true"
    assert site.runs == ["/slow"]


def test_a_client_that_goes_away(start: Start) -> None:
    """The work goes on when its client hangs up; the retry gets its response."""
    site, browser = start()
    address = (browser.base_url.host, browser.base_url.port)
    with socket.create_connection(address) as other:
        other.sendall(
            b"POST /slow HTTP/1.1\r\nHost: x\r\nIdempotency-Key: k\r\nContent-Length: 0\r\n\r\n"
        )
        assert site.entered.wait(servers.PATIENCE)
    site.go_on.set()
    servers.wait_until(lambda: post(browser, "/slow").status_code != 409, "it is done")
    assert post(browser, "/slow").headers["idempotent-replayed"] == "true"
    assert site.runs == ["/slow"]


async def test_a_body_that_ends_early_runs_nothing(dsn: str) -> None:
    """A client that goes away while it sends leaves no key with half of its content: the retry runs."""
    ran, sent = [], []

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        ran.append(1)  # and reads no body
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    async def send(message: Any) -> None:
        sent.append(message.get("status"))

    half = {"type": "http.request", "body": b"ha", "more_body": True}
    whole = [half, {"type": "http.request", "body": b"lf"}]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"idempotency-key", b"k")]}
    async with pgkv.AsyncStore.connect(dsn) as store:
        keys = pgkv.AsyncIdempotency(store)
        served = pgkv.IdempotencyMiddleware(app, idempotency=keys, scope="")
        for messages in ([half, {"type": "http.disconnect"}], whole):

            async def receive(messages: list[Any] = messages) -> Any:
                return messages.pop(0)

            await served(dict(scope), receive, send)
    assert sent[::2] == [400, 201]
    assert ran == [1]


async def test_half_a_response_is_not_kept(dsn: str) -> None:
    """An application that returns before its response's end has failed: the retry runs."""
    sent: list[Any] = []

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": not sent})

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message.get("body", message.get("headers")))

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"idempotency-key", b"k")]}
    async with pgkv.AsyncStore.connect(dsn) as store:
        keys = pgkv.AsyncIdempotency(store)
        served = pgkv.IdempotencyMiddleware(app, idempotency=keys, scope="")
        for _ in range(3):
            await served(dict(scope), receive, send)
    assert sent[3] == b"half"
    assert (b"idempotent-replayed", b"true") in sent[4]


def test_an_input_that_ends_early_runs_nothing(dsn: str) -> None:
    """The same of WSGI, where the server finds less than the client has promised."""
    ran, statuses = [], []

    def app(_environ: Any, start_response: Any) -> list[bytes]:
        ran.append(1)
        start_response("201 Created", [])
        return [b"done"]

    with pgkv.Store.connect(dsn) as store:
        keys = pgkv.Idempotency(store)
        served = pgkv.WSGIIdempotencyMiddleware(app, idempotency=keys, scope="")
        for body in (b"ha", b"half"):
            environ = {
                "REQUEST_METHOD": "POST", "PATH_INFO": "/", "HTTP_IDEMPOTENCY_KEY": "k",
                "CONTENT_LENGTH": "4", "wsgi.version": (1, 0), "wsgi.input": io.BytesIO(body),
            }  # fmt: skip
            list(served(environ, lambda status, _headers: statuses.append(status[:3])))
    assert statuses == ["400", "201"]
    assert ran == [1]


def test_a_store_that_is_away(make_server: Callable[..., servers.Server]) -> None:
    """When the database does not answer, a request with a key gets 503, and nothing runs."""
    server, site = make_server(), Site()
    with pgkv.Store.connect(server.dsn, retry=None) as store:
        app = wsgi_app(site, store, scope="")
        with wsgi(app) as address, client(address) as browser:
            assert post(browser).status_code == 201
            server.stop()
            assert post(browser).status_code == 503
            assert post(browser).headers["retry-after"]
    assert site.runs == ["/pay"]


def test_settings_that_are_wrong(dsn: str) -> None:
    """The scope must be said; other options and the other kind of store are refused."""
    with pgkv.Store.connect(dsn) as store:
        keys = pgkv.Idempotency(store)
        for wrong in ({"scope": "user"}, {"scope": None}, {"scope": "", "variant": 1}):
            with pytest.raises(pgkv.ConfigError):
                pgkv.WSGIIdempotencyMiddleware(lambda *_: [], idempotency=keys, **wrong)
        with pytest.raises(pgkv.ConfigError, match="WSGIIdempotencyMiddleware"):
            pgkv.IdempotencyMiddleware(None, idempotency=keys, scope="")  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            pgkv.WSGIIdempotencyMiddleware(lambda *_: [], idempotency=keys)  # type: ignore[call-arg]


# -- frameworks: the route closes the window -------------------------------------------------


@pytest.fixture
def payments(dsn: str) -> Iterator[psycopg.Connection]:
    """A table of effects."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("CREATE TABLE payments (id int)")
        yield conn


SERVER = """
import asyncio, os, signal, socket, sys
from types import SimpleNamespace
from wsgiref.simple_server import make_server
import psycopg, uvicorn, pgkv
dsn, kind = sys.argv[1:]
paid = SimpleNamespace(status_code=201, headers={}, body=b"paid")
count = "SELECT count(*) FROM payments WHERE id = %s"

def app(environ, start_response):
    way = int(environ["PATH_INFO"][1:])
    with psycopg.connect(dsn) as conn:
        (before,) = conn.execute(count, [way]).fetchone()
        conn.execute("INSERT INTO payments VALUES (%s)", [way])
        if way == 2:
            pgkv.idempotent_attempt(environ).complete(paid, conn)
    if not before:
        os.kill(os.getpid(), signal.SIGKILL)
    start_response("201 Created", [])
    return [b"paid"]

async def async_app(scope, receive, send):
    way = int(scope["path"][1:])
    async with await psycopg.AsyncConnection.connect(dsn) as conn:
        (before,) = await (await conn.execute(count, [way])).fetchone()
        await conn.execute("INSERT INTO payments VALUES (%s)", [way])
        if way == 2:
            await pgkv.idempotent_attempt(scope).complete(paid, conn)
    if not before:
        os.kill(os.getpid(), signal.SIGKILL)
    await send({"type": "http.response.start", "status": 201, "headers": []})
    await send({"type": "http.response.body", "body": b"paid"})

async def main():
    async with pgkv.AsyncStore.connect(dsn) as store:
        keys = pgkv.AsyncIdempotency(store)
        served = pgkv.IdempotencyMiddleware(async_app, idempotency=keys, scope="")
        listener = socket.create_server(("127.0.0.1", 0))
        print(listener.getsockname()[1], flush=True)
        config = uvicorn.Config(served, log_level="critical", lifespan="off")
        await uvicorn.Server(config).serve([listener])

if kind == "asgi":
    asyncio.run(main())
else:
    keys = pgkv.Idempotency(pgkv.Store.connect(dsn))
    served = pgkv.WSGIIdempotencyMiddleware(app, idempotency=keys, scope="")
    server = make_server("127.0.0.1", 0, served)
    print(server.server_port, flush=True)
    server.serve_forever()
"""


@pytest.mark.parametrize("kind", ["asgi", "wsgi"])
def test_a_server_that_is_killed(
    dsn: str, clock: ServerClock, payments: psycopg.Connection, kind: str
) -> None:
    """Killed between the effect and the response: under the middleware alone the retry does the effect
    again, the control; a route that completed its attempt with the effect is not run again."""
    with contextlib.ExitStack() as stack:

        def serve() -> httpx.Client:
            command = [sys.executable, "-c", SERVER, dsn, kind]
            pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
            process: Any = stack.enter_context(subprocess.Popen(command, **pipes))
            stack.callback(process.kill)
            return stack.enter_context(client(f"127.0.0.1:{process.stdout.readline().strip()}"))

        browser, answers = serve(), []
        for path in ("/1", "/2"):
            with pytest.raises(httpx.TransportError):
                post(browser, path, path)
            browser = serve()
            clock.advance(60)  # the killed attempt's lease ends
            answers.append(post(browser, path, path))
        assert [each.status_code for each in answers] == [201, 201]
        assert [each.headers.get("idempotent-replayed") for each in answers] == [None, "true"]
    assert payments.execute(
        "SELECT id, count(*) FROM payments GROUP BY id ORDER BY id"
    ).fetchall() == [
        (1, 2),
        (2, 1),
    ]


def test_fastapi_hands_the_route_its_attempt(dsn: str, payments: psycopg.Connection) -> None:
    """The dependency's attempt commits the response with the effect; retries and refusals never reach
    the route."""
    store = pgkv.AsyncStore(pgkv.Config(dsn))
    once = Idempotent(pgkv.AsyncIdempotency(store), scope="")

    @contextlib.asynccontextmanager
    async def lifespan(_app: Any) -> Any:
        async with store:
            yield

    app = FastAPI(lifespan=lifespan)
    app.add_exception_handler(Answered, answered_response)

    @app.post("/pay")
    async def pay(order: dict[str, int], attempt: Any = Depends(once)) -> Any:  # noqa: B008  # FastAPI's way
        async with await psycopg.AsyncConnection.connect(dsn) as conn:
            await conn.execute("INSERT INTO payments VALUES (%s)", [order["id"]])
            response = JSONResponse({"paid": order["id"]}, 201)
            if attempt is not None:
                await attempt.complete(response, conn)
        return response

    @app.post("/forgets")
    async def forgets(attempt: Any = Depends(once)) -> dict[str, bool]:  # noqa: B008  # as above
        return {"key": attempt is not None}

    with asgi(app) as address, client(address) as browser:
        first = post(browser, json={"id": 7})
        again = post(browser, json={"id": 7})
        assert (
            (first.status_code, first.json())
            == (again.status_code, again.json())
            == (201, {"paid": 7})
        )
        assert again.headers["idempotent-replayed"] == "true"
        assert post(browser, json={"id": 8}).status_code == 422
        assert browser.post("/pay", json={"id": 9}).status_code == 201
        assert browser.post("/forgets").json() == {"key": False}
        assert post(browser, "/forgets", "f").json() == {"key": True}
        servers.wait_until(lambda: post(browser, "/forgets", "f").status_code == 409, "recorded")
        assert "not kept" in post(browser, "/forgets", "f").json()["title"]
    assert payments.execute("SELECT id FROM payments ORDER BY id").fetchall() == [(7,), (9,)]


def test_flask_decorates_a_view(dsn: str, payments: psycopg.Connection) -> None:
    """The decorator keeps the view's response, or what the view completes in its transaction."""
    app = flask.Flask("site")
    with pgkv.Store.connect(dsn) as store:
        keys = pgkv.Idempotency(store)

        @app.post("/pay")
        @flask_idempotent(keys, scope=lambda request: request.headers.get("user", ""))
        def pay() -> Any:
            with psycopg.connect(dsn) as conn:
                conn.execute("INSERT INTO payments VALUES (%s)", [flask.request.json["id"]])
                response = flask.jsonify(paid=flask.request.json["id"])
                if (attempt := pgkv.idempotent_attempt(flask.request)) is not None:
                    attempt.complete(response, conn)
            return response

        @app.post("/plain")
        @flask_idempotent(keys, scope="")
        def plain() -> str:
            payments.execute("INSERT INTO payments VALUES (0)")
            return "plain"

        with wsgi(app) as address, client(address) as browser:
            assert [post(browser, json={"id": 7}).json() for _ in range(2)] == [{"paid": 7}] * 2
            assert post(browser, json={"id": 8}).status_code == 422
            assert browser.post("/pay", json={"id": 9}).json() == {"paid": 9}
            assert [post(browser, "/plain", "p").text for _ in range(2)] == ["plain"] * 2
    assert payments.execute("SELECT id FROM payments ORDER BY id").fetchall() == [(0,), (7,), (9,)]


def test_django_decorates_a_view(dsn: str, payments: psycopg.Connection) -> None:
    """The same for Django, in a process of its own, which has no other settings."""
    program = f"""
import django, psycopg, pgkv
from django.conf import settings
settings.configure(ROOT_URLCONF="__main__", ALLOWED_HOSTS=["*"], SECRET_KEY="x")
django.setup()
from django.http import JsonResponse
from django.test import Client
from django.urls import path
from pgkv.integrations.django.idempotency import idempotent
store = pgkv.Store.connect({dsn!r})

@idempotent(pgkv.Idempotency(store), scope="")
def pay(request):
    with psycopg.connect({dsn!r}) as conn:
        conn.execute("INSERT INTO payments VALUES (7)")
        response = JsonResponse({{"paid": 7}}, status=201)
        attempt = pgkv.idempotent_attempt(request)
        if attempt is not None:
            attempt.complete(response, conn)
    return response

urlpatterns = [path("pay", pay)]
browser = Client()
ask = lambda body: browser.post("/pay", body, "text/plain", headers={{"Idempotency-Key": "k"}})
one, two = ask("1"), ask("1")
assert (one.status_code, one.content) == (two.status_code, two.content) == (201, b'{{"paid": 7}}')
assert two.headers["Idempotent-Replayed"] == "true" and two.headers["Content-Type"] == "application/json"
assert ask("2").status_code == 422
assert browser.post("/pay", "1", "text/plain").status_code == 201
store.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert payments.execute("SELECT count(*) FROM payments").fetchall() == [(2,)]


def test_django_decorates_an_async_view(dsn: str, payments: psycopg.Connection) -> None:
    """It runs in the event loop; a blocking idempotency before it is refused."""
    program = f"""
import asyncio, django, pgkv, psycopg
from django.conf import settings
settings.configure(ROOT_URLCONF="__main__", ALLOWED_HOSTS=["*"], SECRET_KEY="x")
django.setup()
from django.http import JsonResponse
from django.test import AsyncClient
from django.urls import path
from pgkv.integrations.django.idempotency import idempotent
store = pgkv.AsyncStore(pgkv.Config({dsn!r}))
loops = []

@idempotent(pgkv.AsyncIdempotency(store), scope="")
async def pay(request):
    loops.append(asyncio.get_running_loop())
    async with await psycopg.AsyncConnection.connect({dsn!r}) as conn:
        await conn.execute("INSERT INTO payments VALUES (7)")
        response = JsonResponse({{"paid": 7}}, status=201)
        await pgkv.idempotent_attempt(request).complete(response, conn)
    return response

blocking = pgkv.Idempotency(pgkv.Store(pgkv.Config({dsn!r})))

@idempotent(blocking, scope="")
def sync_pay(request):  # in a thread, as Django runs it under ASGI
    return JsonResponse({{"attempt": pgkv.idempotent_attempt(request) is not None}})

urlpatterns = [path("pay", pay), path("sync", sync_pay)]

async def main():
    browser = AsyncClient()
    for _ in range(2):
        answer = await browser.post("/sync", headers={{"Idempotency-Key": "s"}})
        assert answer.json() == {{"attempt": True}}, answer
    async def ask(body):
        return await browser.post("/pay", body, "text/plain", headers={{"Idempotency-Key": "k"}})
    one, two = await ask("1"), await ask("1")
    assert (one.status_code, one.content) == (two.status_code, two.content) == (201, b'{{"paid": 7}}')
    assert two.headers["Idempotent-Replayed"] == "true"
    assert (await ask("2")).status_code == 422
    assert loops == [asyncio.get_running_loop()]
    await store.close()

asyncio.run(main())
async def view(request): ...
try:
    idempotent(blocking, scope="")(view)
except pgkv.ConfigError as error:
    print(error)
else:
    raise SystemExit("a blocking idempotency was taken")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "AsyncIdempotency" in done.stdout
    assert payments.execute("SELECT count(*) FROM payments").fetchall() == [(1,)]
