"""The WSGI middleware and the Flask decorator, on a threaded server."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flask
import pytest

import pgkv
from pgkv.integrations.flask import rate_limit
from tests.faults.support import newest
from tests.web.conftest import Serve

pytestmark = newest


@pytest.fixture
def store(dsn: str) -> Iterator[pgkv.Store]:
    """A blocking store."""
    with pgkv.Store.connect(dsn) as store:
        yield store


def limiter_of(store: pgkv.Store, rates: str, name: str = "api") -> pgkv.RateLimiter:
    """A limiter that waits for a busy machine."""
    return pgkv.RateLimiter(store, rates, name=name, timeout=20)


def test_middleware(store: pgkv.Store, serve_wsgi: Serve) -> None:
    """Headers on what passes, 429 beyond; of requests in parallel exactly the burst passes."""
    app = flask.Flask("test")
    app.add_url_rule("/", "hello", lambda: "hello")
    app.add_url_rule("/health", "health", lambda: "well")
    app.wsgi_app = pgkv.WSGIRateLimitMiddleware(  # type: ignore[method-assign]  # Flask's own way
        app.wsgi_app,
        limiter=limiter_of(store, "10/h"),
        key=lambda request: request.headers.get("x-user") or request.client,
        exempt=lambda request: request.path == "/health",
    )
    client = serve_wsgi(app)
    with ThreadPoolExecutor(8) as pool:
        codes = [answer.status_code for answer in pool.map(client.get, ["/"] * 24)]
    assert codes.count(200) == 10
    assert codes.count(429) == 14
    refused = client.get("/")
    assert refused.headers["Content-Type"] == "application/problem+json"
    assert refused.json()["violated-policies"] == ["api"]
    assert int(refused.headers["Retry-After"]) > 300
    passed = client.get("/", headers={"X-User": "b"})
    assert passed.headers["RateLimit"].startswith('"api";r=9;')
    assert client.get("/health").status_code == 200
    assert "RateLimit" not in client.get("/health").headers


def test_decorator(store: pgkv.Store, serve_wsgi: Serve) -> None:
    """Views with limits of their own; functions get Flask's request."""
    app = flask.Flask("test")

    @app.get("/tight")
    @rate_limit(limiter_of(store, "1/h", "tight"), key=lambda request: request.args.get("user"))
    def tight() -> str:
        return "hello"

    @app.get("/wide")
    @rate_limit(limiter_of(store, "2/h", "wide"), headers="x", key=pgkv.client_ip(["127.0.0.1"]))
    def wide() -> str:
        return "hello"

    client = serve_wsgi(app)
    assert client.get("/tight?user=a").headers["RateLimit"].startswith('"tight";r=0;')
    refused = client.get("/tight?user=a")
    assert refused.status_code == 429
    assert refused.json()["violated-policies"] == ["tight"]
    assert client.get("/tight?user=b").status_code == 200
    assert client.get("/wide").headers["X-RateLimit-Remaining"] == "1"
    codes = [
        client.get("/wide", headers={"X-Forwarded-For": "1.2.3.4, 2001:db8::1"}).status_code
        for _ in range(3)
    ]
    assert codes == [200, 200, 429]


def test_async_functions_are_refused(store: pgkv.Store) -> None:
    """A coroutine that is not awaited would be a key like any other: it is an error."""

    async def key(request: Any) -> str:
        return "u"

    app = pgkv.WSGIRateLimitMiddleware(
        lambda environ, start: [], limiter=limiter_of(store, "1/h"), key=key
    )
    environ = {"wsgi.version": (1, 0), "REQUEST_METHOD": "GET", "PATH_INFO": "/"}
    with pytest.raises(TypeError, match="async"):
        app(environ, lambda *_: None)
