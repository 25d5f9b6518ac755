"""Real HTTP servers in threads, and a client that speaks to them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from werkzeug.serving import make_server

import pgkv
from tests import servers

Serve = Callable[[Any], httpx.Client]


def client_of(port: int) -> httpx.Client:
    """A client that opens a connection for each request: servers close one after an error, and
    the next request on it would race that."""
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.Client(
        base_url=f"http://127.0.0.1:{port}", timeout=servers.PATIENCE, limits=limits
    )


@pytest.fixture
def serve_asgi() -> Iterator[Serve]:
    """`serve_asgi(app)` runs an ASGI application on uvicorn; returns a client of it."""
    with contextlib.ExitStack() as stack:

        def serve(app: Any) -> httpx.Client:
            # proxy_headers=False: uvicorn would itself believe X-Forwarded-For of local peers.
            config = uvicorn.Config(
                app, port=0, log_level="critical", ws="none", proxy_headers=False
            )
            server = uvicorn.Server(config)
            thread = threading.Thread(target=server.run)
            thread.start()

            def stop() -> None:
                server.should_exit = True
                thread.join(servers.PATIENCE)

            stack.callback(stop)
            servers.wait_until(lambda: server.started, "uvicorn starts")
            port = server.servers[0].sockets[0].getsockname()[1]
            client = client_of(port)
            return stack.enter_context(client)

        yield serve


@pytest.fixture
def serve_wsgi() -> Iterator[Serve]:
    """`serve_wsgi(app)` runs a WSGI application on werkzeug's threaded server."""
    with contextlib.ExitStack() as stack:

        def serve(app: Any) -> httpx.Client:
            server = make_server("127.0.0.1", 0, app, threaded=True)
            server.log = lambda *_: None  # type: ignore[method-assign]  # one line per request
            thread = threading.Thread(target=server.serve_forever)
            thread.start()

            def stop() -> None:
                server.shutdown()
                thread.join(servers.PATIENCE)
                server.server_close()

            stack.callback(stop)
            client = client_of(server.server_port)
            return stack.enter_context(client)

        yield serve


def lifespan_of(store: pgkv.AsyncStore) -> Callable[[Any], Any]:
    """What opens the store's connections before the first request, and closes them."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        async with store:
            await store.create_table()
            yield

    return lifespan
