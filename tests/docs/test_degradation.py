"""The programs of the page about outages, each with its server killed."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

import pgkv
from tests import servers
from tests.faults.support import newest
from tests.peers import until
from tests.servers import PATIENCE, Server

PAGE = Path(__file__).parents[2] / "docs" / "degradation.md"
pytestmark = newest
MakeServer = Callable[..., Server]


def program(section: str, server: Server) -> dict[str, Any]:
    """The names that the program of a section defines, for that server."""
    text = PAGE.read_text().split(f"\n## {section}\n")[1].split("```python\n")[1].split("```")[0]
    assert "postgresql://app@db-host/app" in text
    names: dict[str, Any] = {}
    exec(text.replace('"postgresql://app@db-host/app"', repr(server.dsn)), names)  # the page's own
    return names


def check(server: Server, status: Callable[[str], Any], away: set[str], on: set[str]) -> None:
    """Kill the server: `away` are 503 with Retry-After then, and `on` go on. Then all do again."""
    for path in away | on:
        answer_to(status, path)
    server.kill()
    for path in away:
        answer = status(path)
        assert (path, answer.status_code) == (path, 503)
        assert answer.headers["Retry-After"] == "5"
    assert {path: status(path).status_code for path in on} == dict.fromkeys(on, 200)
    server.start()
    for path in away | on:
        answer_to(status, path)


def answer_to(ask: Callable[[str], Any], path: str) -> Any:
    """The first good one: the programs have the timeouts of production, which a busy machine may exceed."""
    answers: list[Any] = []

    def is_good() -> bool:
        answers.append(ask(path))
        return bool(answers[-1].status_code == 200)

    servers.wait_until(is_good, path, PATIENCE)
    return answers[-1]


def test_fastapi_program(make_server: MakeServer) -> None:
    """The limit admits, the cached function is called, and a request with a session gets 503."""
    server = make_server()
    names = program("FastAPI", server)
    with TestClient(names["api"], base_url="https://shop") as browser:
        login = answer_to(browser.post, "/login")
        [cookie] = (f"{key}={value}" for key, value in login.cookies.items())
        browser.cookies.clear()

        def status(path: str) -> Any:
            return browser.get(path, headers={"Cookie": cookie} if path == "/me" else {})

        assert answer_to(status, "/me").json() == "ada"
        check(
            server, status, {"/orders", "/ready", "/me"}, {"/price/cup", "/price/plate", "/alive"}
        )


def test_flask_program(make_server: MakeServer) -> None:
    """What needs the store says 503; what does not goes on, then all does again."""
    server = make_server()
    names = program("Flask", server)
    try:
        status = names["app"].test_client().get
        check(server, status, {"/orders", "/ready"}, {"/price/cup", "/price/plate", "/alive"})
    finally:
        names["store"].close()


DJANGO = """
import sys, types, django
from django.conf import settings
backend = "pgkv.integrations.django.PgkvCache"
settings.configure(
    SECRET_KEY="x", ROOT_URLCONF="__main__", ALLOWED_HOSTS=["*"],
    MIDDLEWARE=["shop.Unavailable", "django.contrib.sessions.middleware.SessionMiddleware"],
    SESSION_ENGINE="pgkv.integrations.django.sessions", PGKV_SESSIONS={"LOCATION": DSN},
    CACHES={
        "default": {"BACKEND": backend, "LOCATION": DSN},
        "tolerant": {"BACKEND": backend, "LOCATION": DSN, "OPTIONS": {"on_error": "miss"}},
    },
)
shop = types.ModuleType("shop")
exec(MIDDLEWARE, vars(shop))
sys.modules["shop"] = shop
django.setup()
from django.core.cache import caches
from django.http import HttpResponse
from django.test import Client
from django.urls import path

def cached(request):
    return HttpResponse(str(caches["default"].get("k")))

def tolerant(request):
    return HttpResponse(str(caches["tolerant"].get("k")))

urlpatterns = [path("cached", cached), path("tolerant", tolerant)]
browser = Client(raise_request_exception=False)
for line in sys.stdin:
    answers = [browser.get(each) for each in ("/cached", "/tolerant")]
    print(*(f"{each.status_code}:{each.headers.get('Retry-After')}" for each in answers), flush=True)
"""


def test_django_program(make_server: MakeServer) -> None:
    """The middleware answers 503; a cache that may be away finds nothing."""
    server = make_server()
    middleware = PAGE.read_text().split("\n## Django\n")[1].split("```text\n")[1].split("```")[0]
    text = f"DSN = {server.dsn!r}\nMIDDLEWARE = {middleware!r}\n{DJANGO}"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", text], text=True, **pipes) as site:  # type: ignore[call-overload]  # pipes

        def ask() -> str:
            assert site.stdin is not None
            assert site.stdout is not None
            site.stdin.write("\n")
            site.stdin.flush()
            return str(site.stdout.readline().strip())

        assert ask() == "200:None 200:None"
        server.kill()
        assert ask() == "503:5 200:None"
        server.start()
        assert ask() == "200:None 200:None"
        site.stdin.close()


async def test_worker(make_server: MakeServer) -> None:
    """It waits for the server, and does what was put afterwards."""
    server = make_server()
    names = program("A worker", server)
    done: list[bytes] = []
    jobs: pgkv.Queue[bytes] = names["jobs"]
    names["worker"]._fn = lambda job: done.append(job.payload)
    stop = threading.Event()
    running = threading.Thread(target=names["worker"].run, args=(stop,))
    running.start()
    try:
        jobs.put(b"1")
        await until(lambda: done == [b"1"], "the first job is done", PATIENCE)
        server.kill()
        server.start()
        jobs.put(b"2")
        # The first one comes again where the server died before its acknowledgement.
        await until(lambda: b"2" in done, "the second job is done", PATIENCE)
    finally:
        stop.set()
        running.join()
        names["fleet_store"].close()
