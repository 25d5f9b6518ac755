"""Rate limits where frameworks, servers and proxies have rules of their own."""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Iterator
from typing import Any

import fastapi
import flask
import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

import pgkv
from pgkv.integrations import fastapi as fastapi_limits
from pgkv.integrations import flask as flask_limits
from pgkv.patterns.rate_limit import local
from tests.faults.support import newest

pytestmark = newest
BUSY = 20  # seconds: a busy machine is no outage


@pytest.fixture
def store(dsn: str) -> pgkv.AsyncStore:
    """Made outside of any loop, as at import; it opens in the application's."""
    return pgkv.AsyncStore(pgkv.Config(dsn))


@pytest.fixture
def blocking(dsn: str) -> Iterator[pgkv.Store]:
    """A blocking store."""
    with pgkv.Store.connect(dsn) as store:
        yield store


def limiter_of(store: pgkv.AsyncStore, rates: str, name: str = "api") -> pgkv.AsyncRateLimiter:
    """A limiter that waits for a busy machine."""
    return pgkv.AsyncRateLimiter(store, rates, name=name, timeout=BUSY)


def limited(limiter: Any, **options: Any) -> Middleware:
    """The middleware, one bucket for all."""
    return Middleware(pgkv.RateLimitMiddleware, limiter=limiter, **{"key": "all"} | options)


def client_of(app: Any, root_path: str = "") -> httpx.AsyncClient:
    """A client of an ASGI application, in this loop."""
    transport = httpx.ASGITransport(app, root_path=root_path)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


def hello(request: Any) -> PlainTextResponse:
    """A view."""
    return PlainTextResponse("hello")


# -- paths ------------------------------------------------------------------------------------


async def test_exempt_paths_are_the_applications(store: pgkv.AsyncStore) -> None:
    """Behind a prefix (root_path) and in a mounted application, exempt= has the paths that the
    application itself knows."""
    paths: list[str] = []

    def key(request: Any) -> str:
        paths.append(request.path)
        return "all"

    inner = Starlette(
        routes=[Route("/health", hello), Route("/", hello)],
        middleware=[limited(limiter_of(store, "1/d", "inner"), exempt=["/health"])],
    )
    app = Starlette(
        routes=[Route("/health", hello), Route("/healthy", hello), Mount("/sub", inner)],
        middleware=[limited(limiter_of(store, "1/d"), exempt=["/health", "/sub"], key=key)],
    )
    async with store, client_of(app, "/prefix") as client:
        for path in ("/prefix/health", "/health", "/prefix/sub/health"):
            assert [(await client.get(path)).status_code for _ in range(3)] == [200] * 3, path
        assert [(await client.get("/prefix/healthy")).status_code for _ in range(2)] == [200, 429]
        assert [(await client.get("/prefix/sub/")).status_code for _ in range(2)] == [200, 429]
        assert paths == ["/healthy", "/healthy"]


async def test_exempt_paths_of_a_fastapi_dependency(store: pgkv.AsyncStore) -> None:
    """The dependency goes by the same paths."""
    limit = fastapi_limits.rate_limit(limiter_of(store, "1/d"), key="all", exempt=["/health"])
    app = fastapi.FastAPI(dependencies=[fastapi.Depends(limit)])
    app.add_api_route("/health", lambda: "well")
    app.add_api_route("/", lambda: "hello")
    async with store, client_of(app, "/prefix") as client:
        assert [(await client.get("/health")).status_code for _ in range(3)] == [200] * 3
        assert [(await client.get("/prefix/health")).status_code for _ in range(3)] == [200] * 3
        assert [(await client.get("/")).status_code for _ in range(2)] == [200, 429]


# -- websockets -------------------------------------------------------------------------------


async def handshake(app: Any, user: str, *, denials: bool) -> list[Any]:
    """What the application answers to a WebSocket handshake."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "websocket",
        "path": "/ws",
        "raw_path": b"/ws",
        "query_string": b"",
        "headers": [(b"x-user", user.encode())],
        "subprotocols": [],
        "extensions": {"websocket.http.response": {}} if denials else {},
    }
    await app(scope, receive, send)
    return sent


@pytest.mark.parametrize("denials", [True, False])
async def test_a_dependency_of_the_whole_application(store: pgkv.AsyncStore, denials: bool) -> None:
    """It limits WebSocket routes as well: a handshake beyond the rate gets 429 where the server can
    say so, else it is closed before it opens."""
    limit = fastapi_limits.rate_limit(
        limiter_of(store, "2/d"), key=lambda request: request.headers.get("x-user")
    )
    app = fastapi.FastAPI(dependencies=[fastapi.Depends(limit)])
    app.add_api_route("/", lambda: "hello")

    @app.websocket("/ws")
    async def talk(socket: fastapi.WebSocket) -> None:
        await socket.accept()

    user = {"x-user": "a"}
    async with store, client_of(app) as client:
        for name in ("a", "b"):
            assert [each["type"] for each in await handshake(app, name, denials=denials)] == [
                "websocket.accept"
            ]
        assert (await client.get("/", headers=user)).status_code == 200
        first, *_ = await handshake(app, "a", denials=denials)
        assert (await client.get("/", headers=user)).status_code == 429
    if denials:
        assert (first["type"], first["status"]) == ("websocket.http.response.start", 429)
        assert int(dict(first["headers"])[b"retry-after"]) > 300
    else:
        assert (first["type"], first["code"]) == ("websocket.close", 1008)


# -- several limits -----------------------------------------------------------------------------


@pytest.mark.parametrize("outer", ["wide", "tight"])
async def test_the_strictest_of_two_middlewares_is_shown(
    store: pgkv.AsyncStore, outer: str
) -> None:
    """Each limit judges; the response has one RateLimit header, of the one with the least share
    left, and all policies."""
    names = [outer, "tight" if outer == "wide" else "wide"]
    rates = {"wide": "100/d", "tight": "3/d"}
    app = Starlette(
        routes=[Route("/", hello)],
        middleware=[limited(limiter_of(store, rates[name], name)) for name in names],
    )
    async with store, client_of(app) as client:
        for left in (2, 1, 0):
            answer = await client.get("/")
            (shown,) = answer.headers.get_list("RateLimit")
            assert shown.startswith(f'"tight";r={left};')
            (policies,) = answer.headers.get_list("RateLimit-Policy")
            assert '"tight";q=3;' in policies
            assert '"wide";q=100;' in policies
        refused = await client.get("/")
        assert refused.status_code == 429
        (shown,) = refused.headers.get_list("RateLimit")
        assert shown.startswith('"tight";r=0;')
        assert len(refused.headers.get_list("Retry-After")) == 1


async def test_the_strictest_of_two_dependencies_is_shown(store: pgkv.AsyncStore) -> None:
    """Also of a route's and the application's, in either order, and under a middleware."""
    tight = fastapi_limits.rate_limit(limiter_of(store, "3/d", "tight"), key="all", headers="x")
    wide = fastapi_limits.rate_limit(limiter_of(store, "100/d", "wide"), key="all", headers="x")
    app = fastapi.FastAPI()
    for path, limits in (("/a", (tight, wide)), ("/b", (wide, tight))):
        depends = [fastapi.Depends(each) for each in limits]
        app.add_api_route(path, lambda: "hello", dependencies=depends)
    app.add_middleware(
        pgkv.RateLimitMiddleware,
        limiter=limiter_of(store, "1000/d", "all"),
        key="all",
        headers="x",
    )
    async with store, client_of(app) as client:
        for left, path in enumerate(("/a", "/b")):
            answer = await client.get(path)
            assert answer.headers.get_list("X-RateLimit-Limit") == ["3"]
            assert answer.headers.get_list("X-RateLimit-Remaining") == [str(2 - left)]


def test_the_strictest_of_two_flask_limits_is_shown(blocking: pgkv.Store) -> None:
    """Of two decorators, in either order, and under the WSGI middleware."""

    def limit(rates: str, name: str) -> Any:
        limiter = pgkv.RateLimiter(blocking, rates, name=name, timeout=BUSY)
        return flask_limits.rate_limit(limiter, key="all")

    app = flask.Flask("test")
    tight, wide = limit("3/d", "tight"), limit("100/d", "wide")
    app.add_url_rule("/a", "a", tight(wide(lambda: "hello")))
    app.add_url_rule("/b", "b", wide(tight(lambda: "hello")))
    app.wsgi_app = pgkv.WSGIRateLimitMiddleware(  # type: ignore[method-assign]  # Flask's own way
        app.wsgi_app,
        limiter=pgkv.RateLimiter(blocking, "1000/d", name="all", timeout=BUSY),
        key="all",
    )
    client = app.test_client()
    for left, path in ((2, "/a"), (1, "/b"), (0, "/a")):
        headers = client.get(path).headers
        (shown,) = headers.get_all("RateLimit")
        assert shown.startswith(f'"tight";r={left};')
        (policies,) = headers.get_all("RateLimit-Policy")
        assert policies.count(";q=") == 3
    refused = client.get("/b")
    assert refused.status_code == 429
    assert [each[:11] for each in refused.headers.get_all("RateLimit")] == ['"tight";r=0']


# -- context ----------------------------------------------------------------------------------


async def test_functions_see_the_context_of_their_request(store: pgkv.AsyncStore) -> None:
    """key, cost and limits run in the request's own context, sync and async, and what they set is
    seen by the application."""
    tenant = contextvars.ContextVar("tenant", default="none")
    seen: list[str] = []

    async def key(request: Any) -> str:
        seen.append(tenant.get())
        return tenant.get()

    def cost(request: Any) -> int:
        seen.append(tenant.get())
        tenant.set("charged")
        return 1

    async def view(request: Any) -> PlainTextResponse:
        return PlainTextResponse(tenant.get())

    inner = Starlette(
        routes=[Route("/", view)],
        middleware=[limited(limiter_of(store, "1/d"), key=key, cost=cost)],
    )

    async def outer(scope: Any, receive: Any, send: Any) -> None:
        tenant.set(dict(scope["headers"])[b"x-tenant"].decode())
        await inner(scope, receive, send)

    async with store, client_of(outer) as client:
        for name in ("a", "b"):
            assert (await client.get("/", headers={"x-tenant": name})).text == "charged"
        assert (await client.get("/", headers={"x-tenant": "a"})).status_code == 429
    assert seen == ["a", "a", "b", "b", "a", "a"]


# -- CORS -------------------------------------------------------------------------------------


async def test_preflights_are_answered_before_the_limit(store: pgkv.AsyncStore) -> None:
    """With the CORS middleware outside, preflights cost nothing, and a page may read a refusal."""
    app = Starlette(
        routes=[Route("/", hello)],
        middleware=[
            Middleware(CORSMiddleware, allow_origins=["https://site.example"]),
            limited(limiter_of(store, "1/d")),
        ],
    )
    origin = {"Origin": "https://site.example"}
    async with store, client_of(app) as client:
        for _ in range(3):
            preflight = await client.options(
                "/", headers=origin | {"Access-Control-Request-Method": "GET"}
            )
            assert preflight.status_code == 200
        assert (await client.get("/", headers=origin)).status_code == 200
        refused = await client.get("/", headers=origin)
    assert refused.status_code == 429
    assert refused.headers["Access-Control-Allow-Origin"] == "https://site.example"


# -- logs ---------------------------------------------------------------------------------------


async def test_shadow_refusals_are_counted_not_repeated(
    store: pgkv.AsyncStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attack on a limit that is only tried writes a line now and then, with the number."""
    app = Starlette(
        routes=[Route("/", hello)],
        middleware=[limited(limiter_of(store, "1/d"), shadow=True)],
    )
    caplog.set_level(logging.INFO, logger="pgkv")
    monkeypatch.setattr(local, "WARN_SECONDS", 3600.0)
    async with store, client_of(app) as client:
        for _ in range(20):
            assert (await client.get("/")).status_code == 200
        monkeypatch.setattr(local, "WARN_SECONDS", 0.0)
        await client.get("/")
    events: list[Any] = [each for each in caplog.records if "limit.shadow" in each.getMessage()]
    assert [each.pgkv["refused"] for each in events] == [1, 19]


def test_options_are_named(store: pgkv.AsyncStore) -> None:
    """An option that does not exist is refused, with those that do."""
    limiter: Any = limiter_of(store, "1/d")
    for make in (
        lambda: pgkv.RateLimitMiddleware(hello, limiter=limiter, keys="x"),  # type: ignore[arg-type,call-arg]  # the mistake
        lambda: fastapi_limits.rate_limit(limiter, keys="x"),  # type: ignore[call-arg]  # the mistake
    ):
        with pytest.raises(pgkv.ConfigError, match=r"'keys'.* key, cost"):
            make()
