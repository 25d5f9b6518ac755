"""The ASGI middleware and the FastAPI dependency, behind uvicorn and driven by an HTTP client."""

from __future__ import annotations

import json
from typing import Any

import fastapi
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

import pgkv
from pgkv.integrations.fastapi import RateLimited, problem_response, rate_limit
from tests.faults.support import newest
from tests.web.conftest import Serve, lifespan_of

pytestmark = newest
BUSY = 20  # seconds: a busy machine is no outage


@pytest.fixture
def store(dsn: str) -> pgkv.AsyncStore:
    """Made outside of any loop, as at import; it opens in the server's."""
    return pgkv.AsyncStore(pgkv.Config(dsn))


def application(store: pgkv.AsyncStore, rates: str = "3/h", **options: Any) -> Starlette:
    """A Starlette application with the middleware."""

    async def hello(request: Request) -> PlainTextResponse:
        return PlainTextResponse("hello")

    options.setdefault("limiter", pgkv.AsyncRateLimiter(store, rates, name="api", timeout=BUSY))
    return Starlette(
        routes=[Route("/", hello), Route("/health", hello)],
        middleware=[Middleware(pgkv.RateLimitMiddleware, **options)],
        lifespan=lifespan_of(store),
    )


def test_requests_beyond_the_rate_get_429(store: pgkv.AsyncStore, serve_asgi: Serve) -> None:
    """Headers on what passes; then 429 with Retry-After and problem+json, and the application is
    not called."""
    client = serve_asgi(application(store))
    for left in (2, 1, 0):
        answer = client.get("/")
        assert (answer.status_code, answer.text) == (200, "hello")
        assert answer.headers["RateLimit-Policy"] == '"api";q=3;w=3600'
        assert answer.headers["RateLimit"].startswith(f'"api";r={left};t=')
    refused = client.get("/")
    assert refused.status_code == 429
    assert 900 < int(refused.headers["Retry-After"]) <= 1200  # 1200 but for the time since
    assert refused.headers["RateLimit"] == f'"api";r=0;t={refused.headers["Retry-After"]}'
    assert refused.headers["Content-Type"] == "application/problem+json"
    assert refused.json()["violated-policies"] == ["api"]
    assert refused.json()["status"] == 429


def test_functions_decide(store: pgkv.AsyncStore, serve_asgi: Serve) -> None:
    """key, cost, limits, exempt and limiter may be functions, sync or async, of one request."""
    limiter = pgkv.AsyncRateLimiter(store, "3/h", name="api", timeout=BUSY)

    async def key(request: Any) -> str | None:
        name: str | None = request.headers.get("x-user")
        return name

    async def choose(request: Any) -> pgkv.AsyncRateLimiter | None:
        return None if request.method == "HEAD" else limiter

    client = serve_asgi(
        application(
            store,
            limiter=choose,
            key=key,
            cost=lambda request: int(request.headers.get("x-cost", 1)),
            limits=lambda request: "9/h" if request.headers.get("x-plan") == "gold" else None,
            exempt=lambda request: request["path"] == "/health",
            headers="x",
        )
    )

    def passes(count: int, path: str = "/", method: str = "GET", **headers: str) -> int:
        named = {f"x-{name}": value for name, value in headers.items()}
        codes = [client.request(method, path, headers=named).status_code for _ in range(count)]
        return codes.count(200)

    assert passes(5, user="a") == 3
    assert passes(2, user="b", cost="2") == 1
    assert passes(12, user="c", plan="gold") == 9
    assert passes(5, "/health", user="a") == 5
    assert passes(5) == 5  # no key
    assert passes(5, user="a", cost="0") == 5
    assert client.head("/", headers={"x-user": "a"}).status_code in (200, 405)
    answer = client.get("/", headers={"x-user": "d"})
    assert answer.headers["X-RateLimit-Limit"] == "3"
    assert answer.headers["X-RateLimit-Remaining"] == "2"
    assert "RateLimit" not in answer.headers


def test_exempt_paths_and_shadow_mode(store: pgkv.AsyncStore, serve_asgi: Serve) -> None:
    """A shadow decides and counts, never refuses and tells the client nothing."""
    limiter = pgkv.AsyncRateLimiter(store, "1/h", name="api", timeout=BUSY)
    client = serve_asgi(application(store, limiter=limiter, shadow=True, exempt=["/health"]))
    answers = [client.get(path) for path in ("/", "/", "/health", "/")]
    assert [answer.status_code for answer in answers] == [200] * 4
    assert client.get("/health/of/what").status_code == 404  # let pass as well
    assert not any("RateLimit" in answer.headers for answer in answers)
    assert limiter.counts == pgkv.LimiterCounts(allowed=1, denied=2)


def test_clients_behind_a_proxy(store: pgkv.AsyncStore, serve_asgi: Serve) -> None:
    """Spoofed headers make no new buckets; those of a trusted proxy do."""
    spoofed = serve_asgi(application(store, "1/h"))
    hops = [{"X-Forwarded-For": f"192.0.2.{n}"} for n in range(3)]
    assert [spoofed.get("/", headers=each).status_code for each in hops] == [200, 429, 429]
    trusting = serve_asgi(
        application(
            pgkv.AsyncStore(store._config),
            "1/h",
            key=pgkv.client_ip(["127.0.0.0/8"], ipv6_prefix=64),
        )
    )
    assert [trusting.get("/", headers=each).status_code for each in hops] == [200] * 3
    assert [trusting.get("/", headers=each).status_code for each in hops] == [429] * 3


def test_fastapi_routes_have_limits_of_their_own(store: pgkv.AsyncStore, serve_asgi: Serve) -> None:
    """Depends(rate_limit(...)) per route; with the handler registered the body is the problem."""
    app = fastapi.FastAPI(lifespan=lifespan_of(store))
    tight = pgkv.AsyncRateLimiter(store, "1/h", name="tight", timeout=BUSY)
    wide = pgkv.AsyncRateLimiter(store, "3/h", name="wide", timeout=BUSY)

    async def whose(request: fastapi.Request) -> str:
        return request.headers.get("x-user", "nobody")

    @app.get("/tight", dependencies=[fastapi.Depends(rate_limit(tight, key=whose))])
    async def tightly() -> dict[str, str]:
        return {"hello": "world"}

    @app.get("/wide", dependencies=[fastapi.Depends(rate_limit(wide, headers="x"))])
    def widely() -> dict[str, str]:
        return {"hello": "world"}

    client = serve_asgi(app)
    assert client.get("/tight").headers["RateLimit"].startswith('"tight";r=0;')
    refused = client.get("/tight")
    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) > 3000
    assert refused.json()["detail"]["violated-policies"] == ["tight"]
    assert client.get("/tight", headers={"x-user": "b"}).status_code == 200
    assert [client.get("/wide").status_code for _ in range(4)] == [200, 200, 200, 429]
    app.add_exception_handler(RateLimited, problem_response)
    app.middleware_stack = app.build_middleware_stack()
    refused = client.get("/tight")
    assert refused.headers["Content-Type"] == "application/problem+json"
    assert refused.json()["violated-policies"] == ["tight"]


def test_a_blocking_limiter_is_refused(store: pgkv.AsyncStore, dsn: str) -> None:
    """It would stop the event loop: said when the middleware is made, not in production."""
    blocking = pgkv.RateLimiter(pgkv.Store(pgkv.Config(dsn)), "1/s", name="api")

    async def app(scope: Any, receive: Any, send: Any) -> None: ...

    with pytest.raises(pgkv.ConfigError, match="AsyncRateLimiter"):
        pgkv.RateLimitMiddleware(app, limiter=blocking)  # type: ignore[arg-type]  # that is the point
    with pytest.raises(pgkv.ConfigError, match="AsyncRateLimiter"):
        rate_limit(blocking)  # type: ignore[arg-type]  # likewise
    with pytest.raises(pgkv.ConfigError, match="RateLimiter"):
        pgkv.WSGIRateLimitMiddleware(
            lambda environ, start: [],
            limiter=pgkv.AsyncRateLimiter(store, "1/s", name="api"),  # type: ignore[arg-type]  # likewise
        )
    for wrong in ({"headers": "y"}, {"on_error": "ignore"}, {"exempt": "/x"}):
        with pytest.raises(pgkv.ConfigError):
            application(store, **wrong).build_middleware_stack()


@pytest.mark.parametrize("extensions", [{}, {"websocket.http.response": {}}])
async def test_websocket_handshakes_are_limited(
    store: pgkv.AsyncStore, extensions: dict[str, Any]
) -> None:
    """A handshake beyond the rate is refused: 429 where the server can say so, else closed."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})

    limiter = pgkv.AsyncRateLimiter(store, "1/h", name="ws", timeout=BUSY)
    limited = pgkv.RateLimitMiddleware(app, limiter=limiter, key="all")
    scope = {"type": "websocket", "path": "/", "headers": [], "extensions": extensions}
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    async with store:
        await limited(scope, receive, send)
        await limited(scope, receive, send)
    assert sent[0]["type"] == "websocket.accept"
    assert b"ratelimit" in dict(sent[0]["headers"])
    if extensions:
        assert sent[1]["status"] == 429
        assert json.loads(sent[2]["body"])["violated-policies"] == ["ws"]
    else:
        assert sent[1:] == [{"type": "websocket.close", "code": 1008}]
