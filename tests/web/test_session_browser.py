"""Sessions in a real browser: Debian's Chromium without a window, over https."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import chromium
from tests.faults.proxy import certificate
from tests.faults.support import newest
from tests.servers import PATIENCE
from tests.web.running import asgi, client
from tests.web.site import Site

pytest.importorskip("selenium", reason="selenium is not installed")
pytest.importorskip("cryptography", reason="cryptography is not installed: no certificate")

from selenium import webdriver
from selenium.webdriver.common.by import By


@pytest.fixture
def laptop(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    """A browser with an empty profile."""
    with chromium(tmp_path / "profile") as browser:
        yield browser


def data_of(browser: webdriver.Chrome, address: str) -> Any:
    browser.get(f"https://{address}/read")
    return json.loads(browser.find_element(By.TAG_NAME, "body").text)


def cookie_of(browser: webdriver.Chrome) -> dict[str, Any]:
    cookie: Any = browser.get_cookie("__Host-session")
    assert cookie is not None
    return dict(cookie)


@newest
def test_a_day_in_a_browser(dsn: str, tmp_path: Path, laptop: webdriver.Chrome) -> None:
    """Log in, look at the cookie, work in two tabs at once, log out everywhere."""
    site = Site(dsn, secure=True)
    with (
        asgi(site.app, certificate(tmp_path)) as address,
        client(address, tls=True) as phone,
    ):
        laptop.get(f"https://{address}/put?visited=yes")
        before = cookie_of(laptop)["value"]
        laptop.get(f"https://{address}/login?user=ada")
        cookie = cookie_of(laptop)
        assert cookie["value"] != before
        assert (cookie["secure"], cookie["httpOnly"]) == (True, True)
        assert (cookie["sameSite"], cookie["path"]) == ("Lax", "/")
        assert "expiry" not in cookie
        assert laptop.execute_script("return document.cookie") == ""
        assert data_of(laptop, address) == {"visited": "yes", "role": "member"}
        # Two tabs with requests under way at the same time.
        for tab in ("one", "two"):
            site.gates[tab], site.arrived[tab] = threading.Event(), threading.Event()
            if tab == "two":
                laptop.switch_to.new_window("tab")
                laptop.get(f"https://{address}/plain")
            laptop.execute_script(f"window.answer = fetch('/held?me={tab}'); return 1")
            assert site.arrived[tab].wait(PATIENCE)
        for gate in site.gates.values():
            gate.set()
        for handle in laptop.window_handles:
            laptop.switch_to.window(handle)
            assert (
                laptop.execute_script("return window.answer.then(answer => answer.status)") == 200
            )
        expected = {"visited": "yes", "role": "member", "one": "held", "two": "held"}
        assert data_of(laptop, address) == expected
        # Log out everywhere, also on another device.
        phone.get("/login?user=ada")
        assert phone.get("/read").json() == {"role": "member"}
        laptop.get(f"https://{address}/everywhere")
        assert laptop.find_element(By.TAG_NAME, "body").text == "2"
        assert data_of(laptop, address) == phone.get("/read").json() == {}
