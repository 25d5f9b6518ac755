"""Cached functions as views of web frameworks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import flask
import pytest

import pgkv
from tests.faults.support import newest

pytestmark = newest


@pytest.fixture
def store(dsn: str) -> Iterator[pgkv.Store]:
    """A blocking store."""
    with pgkv.Store.connect(dsn) as store:
        yield store


@pytest.mark.parametrize("codec", ["json", "msgpack"])
def test_a_cached_flask_view_keeps_its_status(store: pgkv.Store, codec: Any) -> None:
    """Flask takes a tuple for body, status and headers, a list for JSON: a hit gives what the view
    returned, annotated or not."""
    app = flask.Flask("test")
    calls = []

    def gone():  # type: ignore[no-untyped-def]  # as most views
        calls.append("gone")
        return "gone", 404, {"X-Reason": "moved"}

    def typed() -> tuple[str, int]:
        calls.append("typed")
        return "gone", 410

    def listed():  # type: ignore[no-untyped-def]  # as above
        calls.append("listed")
        return ["a", 1]

    for view in (gone, typed, listed):
        name = f"{view.__name__} as {codec}"
        cached = pgkv.cached(ttl=60, name=name, store=store, codec=codec, store_timeout=20)(view)
        app.add_url_rule(f"/{view.__name__}", view.__name__, cached)
    client = app.test_client()
    for _ in range(2):
        answer = client.get("/gone")
        assert (answer.status_code, answer.text) == (404, "gone")
        assert answer.headers["X-Reason"] == "moved"
        assert client.get("/typed").status_code == 410
        assert client.get("/listed").json == ["a", 1]
    assert calls == ["gone", "typed", "listed"]
