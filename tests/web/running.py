"""Applications with sessions behind real servers, and browsers' manners on the client's side."""

from __future__ import annotations

import contextlib
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from werkzeug.serving import make_server

from tests import servers


@contextlib.contextmanager
def asgi(app: Any, certificate: Path | None = None) -> Iterator[str]:
    """uvicorn in a thread; yields the address as host and port."""
    config = uvicorn.Config(
        app,
        port=0,
        log_level="critical",
        ws="websockets-sansio",
        ssl_certfile=str(certificate) if certificate else None,
        h11_max_incomplete_event_size=4 << 20,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        servers.wait_until(lambda: server.started or not thread.is_alive(), "uvicorn starts")
        assert thread.is_alive(), "uvicorn did not start"
        yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(servers.PATIENCE)


@contextlib.contextmanager
def wsgi(app: Any, certificate: Path | None = None) -> Iterator[str]:
    """werkzeug's threaded server; yields the address as host and port."""
    context = None
    if certificate:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)
    server = make_server("127.0.0.1", 0, app, threaded=True, ssl_context=context)
    server.log = lambda *_: None  # type: ignore[method-assign]  # one line per request
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join(servers.PATIENCE)
        server.server_close()


def client(address: str, *, tls: bool = False) -> httpx.Client:
    """A client with a cookie jar, which opens a connection for each request: servers close one
    after an error, and the next request on it would race that."""
    return httpx.Client(
        base_url=f"http{'s' if tls else ''}://{address}",
        timeout=servers.PATIENCE,
        limits=httpx.Limits(max_keepalive_connections=0),
        verify=False,
    )
