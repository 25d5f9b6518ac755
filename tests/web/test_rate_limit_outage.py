"""The database stops and starts again in the middle of HTTP traffic."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import flask
import httpx
import pytest

import pgkv
from tests import servers
from tests.faults.support import newest
from tests.servers import Server
from tests.web.conftest import Serve
from tests.web.test_rate_limit_asgi import application

pytestmark = newest
TIMEOUT = 0.25
SLACK = 5.0  # for the HTTP round trip and the scheduler; without a limit it is 10 s
DURING = {"raise": 500, "open": 200, "closed": 429}


def asgi_client(serve: Serve, dsn: str, mode: str, made: list[Any]) -> httpx.Client:
    """A Starlette application on uvicorn."""
    store = pgkv.AsyncStore(pgkv.Config(dsn))
    limiter = pgkv.AsyncRateLimiter(store, "1000/h", name="api", timeout=TIMEOUT)
    made.append(limiter)
    return serve(application(store, limiter=limiter, on_error=mode))


def wsgi_client(serve: Serve, dsn: str, mode: str, made: list[Any]) -> httpx.Client:
    """A Flask application on a threaded server."""
    store = pgkv.Store.connect(dsn)
    limiter = pgkv.RateLimiter(store, "1000/h", name="api", timeout=TIMEOUT)
    made.append(limiter)
    app = flask.Flask("test")
    app.add_url_rule("/", "hello", lambda: "hello")
    app.wsgi_app = pgkv.WSGIRateLimitMiddleware(  # type: ignore[method-assign]  # Flask's own way
        app.wsgi_app,
        limiter=limiter,
        on_error=mode,  # type: ignore[arg-type]  # a parameter of the test
    )
    return serve(app)


@pytest.mark.parametrize("mode", DURING)
@pytest.mark.parametrize("kind", ["asgi", "wsgi"])
def test_outage(
    make_server: Callable[..., Server],
    serve_asgi: Serve,
    serve_wsgi: Serve,
    kind: str,
    mode: str,
) -> None:
    """raise makes 500s, open admits, closed refuses; each within the limiter's timeout; and all is
    as before as soon as the server is back."""
    server = make_server()
    made: list[Any] = []
    if kind == "asgi":
        client = asgi_client(serve_asgi, server.dsn, mode, made)
    else:
        client = wsgi_client(serve_wsgi, server.dsn, mode, made)

    def get() -> tuple[httpx.Response, float]:
        started = time.monotonic()
        answer = client.get("/")
        return answer, time.monotonic() - started

    def is_limited() -> bool:
        answer, _ = get()
        return answer.status_code == 200 and "RateLimit" in answer.headers

    servers.wait_until(is_limited, "the limiter works")
    server.stop()
    outage = [get() for _ in range(5)]
    assert {answer.status_code for answer, _ in outage} == {DURING[mode]}
    assert not any("RateLimit" in answer.headers for answer, _ in outage)
    assert max(seconds for _, seconds in outage) < TIMEOUT + SLACK
    if mode == "closed":
        assert outage[0][0].headers["Retry-After"] == "1"
        assert outage[0][0].json()["type"].endswith("#temporary-reduced-capacity")
    server.start()
    servers.wait_until(is_limited, "the limiter works again")
    (limiter,) = made
    assert limiter.counts.degraded >= (0 if mode == "raise" else 5)
    assert limiter.counts.denied == (limiter.counts.degraded if mode == "closed" else 0)
    if kind == "wsgi":
        limiter._store.close()


@pytest.mark.parametrize(("kind", "cancelling"), [("asgi", 0.0), ("wsgi", 1.0)])
def test_silence(
    make_server: Callable[..., Server],
    serve_asgi: Serve,
    serve_wsgi: Serve,
    kind: str,
    cancelling: float,
) -> None:
    """A server that no longer answers costs a request the timeout too; the blocking store also
    tries to cancel, for a second, once for each connection that was under way."""
    server = make_server()
    made: list[Any] = []
    if kind == "asgi":
        client = asgi_client(serve_asgi, server.dsn, "open", made)
    else:
        client = wsgi_client(serve_wsgi, server.dsn, "open", made)
    servers.wait_until(lambda: "RateLimit" in client.get("/").headers, "the limiter works")
    server.freeze()
    try:
        for n in range(3):
            started = time.monotonic()
            assert client.get("/").status_code == 200
            seconds = time.monotonic() - started
            assert seconds < TIMEOUT + SLACK + (cancelling if n == 0 else 0.0)
    finally:
        server.thaw()
    assert made[0].counts.degraded >= 3
    if kind == "wsgi":
        made[0]._store.close()
