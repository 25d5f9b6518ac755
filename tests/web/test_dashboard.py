"""The dashboard: who may see it, what it shows and never shows, outages, and how it looks."""

from __future__ import annotations

import asyncio
import html
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from starlette.applications import Starlette
from werkzeug.middleware.dispatcher import DispatcherMiddleware

import pgkv
from pgkv.integrations._page import page, point_of
from pgkv.integrations.dashboard import dashboard
from pgkv.patterns.overview import BlockedBackend, Overview, Overviews, QueueDepth
from tests.browser import chromium
from tests.faults.support import newest
from tests.servers import LATE, PATIENCE, wait_until
from tests.variants import Variant, in_thread
from tests.web.running import wsgi

pytestmark = newest

EVIL = "<img/src=x onerror=document.title='1'>"


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is no outage."""
    monkeypatch.setattr("pgkv.integrations.dashboard.TIMEOUT", PATIENCE)


def everyone(_: Any) -> bool:
    return True


@asynccontextmanager
async def visiting(
    variant: Variant, dsn: str, authorize: Any = everyone, **config: Any
) -> AsyncIterator[Any]:
    """`await ask("GET", "/")`, of the WSGI or the ASGI application; and that application."""
    if variant.name == "async":
        async with pgkv.AsyncStore.connect(dsn, **config) as store:
            app: Any = dashboard(store, authorize=authorize)
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                yield client.request, app
    else:
        with pgkv.Store.connect(dsn, **config) as blocking:
            app = dashboard(blocking, authorize=authorize)
            with httpx.Client(
                transport=httpx.WSGITransport(app), base_url="http://test"
            ) as visitor:

                async def ask(*args: Any) -> Any:
                    return await in_thread(visitor.request, *args)

                yield ask, app


def fill(dsn: str) -> None:
    """Something of everything, with names that are markup and values that nobody may see."""
    with pgkv.Store.connect(dsn) as store:
        store.set_many({f"{EVIL}:1": "secret-value", "user:1": "secret-value", "secret-key": "x"})
        limiter = pgkv.RateLimiter(store, pgkv.Rate(1, 3600), name=EVIL[:60], timeout=PATIENCE)
        limiter.hit("secret-visitor")
        queue: pgkv.Queue[Any] = pgkv.Queue(store, EVIL, max_attempts=1)
        queue.put("secret-payload")
        queue.put("secret-payload")
        job = queue.take()
        assert job is not None
        job.nack()
        pgkv.SessionStore(store).create({"name": "secret-data"}, user_id="secret-user")
        lock = pgkv.Lock(store, EVIL, ttl=3600, metadata={"why": "secret-metadata"})
        lock.acquire().__enter__()


def test_it_is_never_public_by_mistake(dsn: str) -> None:
    """Without a function that says who may look, there is no page; nor without a store."""
    make: Any = dashboard
    with pgkv.Store.connect(dsn) as store:
        for wrong in (None, True, "admin"):
            with pytest.raises(pgkv.ConfigError, match="authorize="):
                make(store, authorize=wrong)
        with pytest.raises(pgkv.ConfigError, match="authorize="):
            dashboard(store)
        with pytest.raises(pgkv.ConfigError, match="not str"):
            make(dsn, authorize=everyone)
        assert repr(dashboard(store, authorize=everyone)) == '<WSGIDashboard "kv_store">'


async def test_who_may_look(dsn: str, variant: Variant) -> None:
    """Only True lets a visitor in. What the function raises is raised; an outage of what it asks is a 503
    that shows nothing."""
    answer: Any = True

    def authorize(request: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer if request.headers["host"] == "test" and request.path == "/" else False

    async with visiting(variant, dsn, authorize) as (ask, _):
        assert (await ask("GET", "/")).status_code == 200
        for answer in (False, None, 1, "yes", object()):  # noqa: B007  # authorize() returns it
            response = await ask("GET", "/")
            assert response.status_code == 403
            assert "<" not in response.text
        answer = ValueError("a defect")
        with pytest.raises(ValueError, match="a defect"):
            await ask("GET", "/")
        answer = pgkv.StoreUnavailableError("the database of sessions is away")
        response = await ask("GET", "/")
        assert (response.status_code, "away" in response.text) == (503, False)


async def test_an_async_function_decides(dsn: str, variant: Variant) -> None:
    """ASGI awaits it. WSGI raises: a coroutine, which is true, must let nobody in."""

    async def authorize(_: Any) -> bool:
        return True

    async with visiting(variant, dsn, authorize) as (ask, _):
        if variant.name == "async":
            assert (await ask("GET", "/")).status_code == 200
        else:
            with pytest.raises(TypeError, match="awaitable"):
                await ask("GET", "/")


async def test_it_only_reads(dsn: str, variant: Variant) -> None:
    """GET and HEAD of one path; headers that keep the page out of caches, frames and logs of others."""
    async with visiting(variant, dsn) as (ask, _):
        page, head = await ask("GET", "/"), await ask("HEAD", "/")
        assert (page.status_code, head.status_code, head.text) == (200, 200, "")
        assert page.headers["content-length"] == str(len(page.content))
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
            response = await ask(method, "/")
            assert (response.status_code, response.headers["allow"]) == (405, "GET, HEAD")
        assert (await ask("GET", "/else")).status_code == 404
        policy = page.headers["content-security-policy"]
        nonce = re.search(r"<style nonce=([\w-]+)>", page.text)
        assert nonce is not None
        assert policy == (
            f"default-src 'none'; style-src 'nonce-{nonce[1]}'; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'"
        )
        assert page.headers["cache-control"] == "no-store"
        assert page.headers["referrer-policy"] == "no-referrer"
        assert nonce[1] not in (await ask("GET", "/")).text
        assert "http-equiv=refresh" in page.text
        assert "http-equiv=refresh" not in (await ask("GET", "/?pause")).text
        assert not re.search(r"<script|\son\w+=|\sstyle=|src=|https?://", page.text)


async def test_names_are_text_and_secrets_stay(dsn: str, variant: Variant) -> None:
    """Names of keys, queues, locks and limiters are never markup; values, keys, users, payloads, data and
    metadata are not there at all."""
    fill(dsn)
    async with visiting(variant, dsn) as (ask, _):
        with psycopg.connect(dsn, application_name=EVIL):
            text = (await ask("GET", "/")).text
    assert "<img" not in text
    where = re.findall(rf"<h2>([\w ]+)</h2>(?:(?!<h2>).)*{re.escape(html.escape(EVIL))}", text)
    assert where == ["Needs attention", "Keys", "Queues", "Locks", "Rate limiters", "Connections"]
    assert "secret" not in text
    assert "dead job" in text


def test_what_needs_attention(dsn: str) -> None:
    """Each limit as one sentence; a healthy server has none. Names in them are text."""
    with pgkv.Store.connect(dsn, max_entries=100) as store:
        store.set("a", "b")
        frame = store._run(Overviews(store).look(), 30.0)
        point = point_of(None, frame, 0.0)

        def hints(frame: Overview) -> list[str]:
            text = page(frame, [point], None, store, "nonce", paused=True)
            assert EVIL not in text
            found = re.search(r"Needs attention</h2><ul>(.*?)</ul>", text)
            return [] if found is None else re.sub(r"</?bdi>", "", found[1]).split("<li>")[1:]

        assert hints(frame) == []
        table = frame.tables[0]
        share = frame.kinds[0]
        evil = html.escape(EVIL)
        ill = replace(
            frame,
            server=replace(
                frame.server,
                standby=True,
                connections=99,
                max_connections=100,
                oldest_transaction=7200.0,
                notify_queue=0.75,
            ),
            blocked=[
                BlockedBackend(7, EVIL, "tuple", 90.0, [8, 9]),
                BlockedBackend(8, "", "", 0.1, []),
            ],
            tables=[replace(table, rows=50_000, dead=20_000, updated=20_000, hot_updated=2_000)],
            kinds=[replace(share, rows=200)],
            queues=[QueueDepth(EVIL, 1, 0, 0, 2, 600.0)],
            refused={"jobs_unlogged": f"permission denied for {EVIL}"},
        )
        assert hints(ill) == [
            "The server is a standby: it accepts no writes.",
            "99 of 100 connections are in use.",
            "A transaction has been open for 2 h: rows that died since cannot be reclaimed.",
            "The queue of notifications is 75% full: a listener does not read.",
            f"Process 7 ({evil}) has waited for 90 s for a lock of process 8, 9.",
            "&quot;kv_store&quot; has 20 k dead rows: VACUUM it.",
            "Only 10% of the updates of &quot;kv_store&quot; are heap-only: see pgkv doctor.",
            f"The queue {evil} has 2 dead jobs.",
            f"A job of the queue {evil} has waited for 10 min.",
            "The store holds 200; its bound is 100.",
            f"The server says nothing about jobs, unlogged: permission denied for {evil}.",
        ]


async def test_visitors_share_a_frame(
    dsn: str, variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a second the server is asked once, but for those who come before the first frame."""
    monkeypatch.setattr("pgkv.integrations.dashboard.FRESH", 3600.0)
    async with visiting(variant, dsn) as (ask, app):
        looks: list[int] = []
        look = app._overviews.look

        def counted() -> Any:
            looks.append(1)
            return look()

        app._overviews.look = counted
        first = await asyncio.gather(*(ask("GET", "/") for _ in range(5)))
        asked = len(looks)
        more = await asyncio.gather(*(ask("GET", "/") for _ in range(5)))
        assert {each.status_code for each in (*first, *more)} == {200}
        assert 1 <= asked == len(looks) <= 5


async def test_a_stopped_server(
    make_server: Callable[..., Any], variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page says so with 503 and shows the last figures; a new process shows none. It comes back."""
    server = make_server()
    fill(server.dsn)
    async with (
        visiting(variant, server.dsn) as (ask, app),
        visiting(variant, server.dsn) as (ask_new, _),
    ):
        assert (await ask("GET", "/")).status_code == 200
        server.stop()
        app._asked -= 10
        monkeypatch.setattr("pgkv.integrations.dashboard.TIMEOUT", 1.0)
        started = time.monotonic()
        response = await ask("GET", "/")
        assert time.monotonic() - started < 1 + LATE
        assert (response.status_code, response.headers["retry-after"]) == (503, "5")
        assert "does not answer" in response.text
        assert "kv_store_jobs" in response.text
        response = await ask_new("GET", "/")
        assert response.status_code == 503
        assert "kv_store_jobs" not in response.text
        monkeypatch.setattr("pgkv.integrations.dashboard.TIMEOUT", PATIENCE)
        server.start()
        app._asked -= 10
        response = await ask("GET", "/")
        assert response.status_code == 200
        assert "does not answer" not in response.text


async def test_mounted(dsn: str, variant: Variant) -> None:
    """Below a path of an application, with and without a slash."""
    async with visiting(variant, dsn) as (_, app):
        if variant.name == "async":
            outer = Starlette()
            outer.mount("/admin/pgkv", app)
            transport = httpx.ASGITransport(outer)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                response = await client.get("/admin/pgkv", follow_redirects=True)
                assert (await client.get("/admin/pgkv/else")).status_code == 404
        else:
            below = DispatcherMiddleware(lambda *_: [], {"/admin/pgkv": app})
            with httpx.Client(
                transport=httpx.WSGITransport(below), base_url="http://test"
            ) as client:
                response = await in_thread(client.get, "/admin/pgkv")
        assert response.status_code == 200
        assert "<title>kv_store" in response.text


async def test_other_protocols_of_asgi(dsn: str) -> None:
    """A WebSocket is refused; what a server asks at its start is not answered, as by any mounted app."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    async with pgkv.AsyncStore.connect(dsn) as store:
        app = dashboard(store, authorize=everyone)
        await app({"type": "lifespan"}, receive, send)
        await app({"type": "websocket", "path": "/"}, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_how_it_looks(dsn: str, tmp_path: Path) -> None:
    """On a desktop and a phone, light and dark: nothing is wider than the screen, nothing is loaded, no
    script runs, and the style is applied."""
    fill(dsn)
    with (
        pgkv.Store.connect(dsn) as store,
        wsgi(dashboard(store, authorize=everyone)) as address,
        chromium(tmp_path / "profile") as browser,
    ):
        variants = set()
        for width, height, scheme in (
            (1280, 900, "light"),
            (390, 844, "light"),
            (1280, 900, "dark"),
        ):
            screen = {
                "width": width,
                "height": height,
                "deviceScaleFactor": 1,
                "mobile": width < 500,
            }
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
            feature = {"name": "prefers-color-scheme", "value": scheme}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
            browser.get(f"http://{address}/?pause")
            assert browser.title == "kv_store · pgkv"
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
            assert (
                browser.execute_script("return performance.getEntriesByType('resource').length")
                == 0
            )
            assert browser.save_screenshot(str(tmp_path / f"{width}-{scheme}.png"))
            style = "return getComputedStyle(document.body).backgroundColor"
            variants.add(browser.execute_script(style))
            wide = browser.find_elements("css selector", "th.w")
            assert [each.is_displayed() for each in wide] == [width > 500] * len(wide)
        assert len(variants) == 2
        console: Any = browser
        messages = [each["message"] for each in console.get_log("browser")]
        assert [each for each in messages if "favicon" not in each] == []


@pytest.fixture
def address(dsn: str) -> Any:
    """What `pgkv dashboard` prints."""
    with pgkv.Store.connect(dsn):
        pass
    process = subprocess.Popen(
        [sys.executable, "-m", "pgkv", "dashboard", "--dsn", dsn],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE)
        assert (process.returncode, errors) == (0, "")


def test_the_command(address: str) -> None:
    """A token that works once, then a cookie, on loopback, under its own name."""
    url, _, token = address.partition("?token=")
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", url)
    with httpx.Client(timeout=PATIENCE) as thief, httpx.Client(timeout=PATIENCE) as visitor:
        assert visitor.get(url).status_code == 403
        assert visitor.get(f"{url}?token=wrong").status_code == 403
        rebound = {"host": "evil.example"}
        assert visitor.get(address, headers=rebound).status_code == 403
        assert visitor.head(address).status_code == 403
        response = visitor.get(address)
        assert (response.status_code, response.headers["location"]) == (303, "/")
        cookie = response.headers["set-cookie"]
        assert cookie.endswith("; Path=/; HttpOnly; SameSite=Strict")
        assert token not in cookie
        pages: list[httpx.Response] = []

        def shown() -> bool:  # within a second, where the machine is not busy
            pages.append(visitor.get(url))
            return pages[-1].status_code == 200

        wait_until(shown, "the page is shown", PATIENCE)
        assert token not in pages[-1].text
        assert visitor.get(url, headers=rebound).status_code == 403
        assert thief.get(address).status_code == 403
