"""The program of the section about outages, with its server killed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.support import newest
from tests.servers import Server

PAGE = Path(__file__).parents[2] / "docs" / "deployment.md"
pytestmark = newest


def test_flask_program(make_server: Callable[..., Server]) -> None:
    """What needs the store says 503 and Retry-After; what does not goes on, then all does again."""
    server = make_server()
    program = (
        PAGE.read_text()
        .split("## When the server is away")[1]
        .split("```python\n")[1]
        .split("```")[0]
    )
    told = f"Store.connect({server.dsn!r}, retry=None, connect_timeout=1)"
    names: dict[str, Any] = {}
    exec(program.replace('Store.embedded("./data")', told), names)  # the page's own
    browser = names["app"].test_client()

    def statuses() -> dict[str, int]:
        paths = ("/orders", "/ready", "/price/cup", "/price/plate", "/alive")
        return {path: browser.get(path).status_code for path in paths}

    try:
        assert set(statuses().values()) == {200}
        server.kill()
        away = statuses()
        assert away.pop("/orders") == away.pop("/ready") == 503
        assert set(away.values()) == {200}
        assert browser.get("/orders").headers["Retry-After"] == "5"
        server.start()
        assert browser.get("/orders").status_code == browser.get("/ready").status_code == 200
    finally:
        names["store"].close()
