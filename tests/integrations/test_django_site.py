"""The example site of Django, looked at in two browsers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.browser import chromium
from tests.faults.support import newest
from tests.servers import PATIENCE, wait_until

MANAGE = Path(__file__).parents[2] / "examples" / "django_site" / "manage.py"


@contextmanager
def serving(dsn: str) -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, MANAGE],
        env={**os.environ, "PGKV_DSN": dsn, "ADDRESS": "127.0.0.1:0", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    found, said = None, ""
    try:
        while found is None and (line := process.stdout.readline()):
            said += line
            found = re.search(r"server at http://(127\.0\.0\.1:\d+)/", line)
        assert found is not None, said
        yield found[1]
    finally:
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=PATIENCE)
        assert "Traceback" not in output, output


def log_in(browser: Any, address: str, password: str = "lovelace") -> None:
    browser.get(f"http://{address}/")
    browser.find_element("name", "name").send_keys("ada")
    browser.find_element("name", "password").send_keys(password)
    browser.find_element("css selector", "button").click()


def shows(browser: Any, text: str) -> None:
    """A click returns before the next page is there."""
    wait_until(lambda: text in browser.page_source, f"the page shows {text!r}", PATIENCE)


def refuses(browser: Any) -> bool:
    return any(text in browser.page_source for text in ("wrong name or password", "quota"))


def text_of(browser: Any, element: str) -> str:
    return str(browser.find_element("id", element).text)


@newest
def test_a_day_on_the_django_site(dsn: str, tmp_path: Path) -> None:
    """A cached fragment, a counter of all visits, a login, a logout of all devices, a refused guess."""
    with (
        serving(dsn) as address,
        chromium(tmp_path / "laptop") as laptop,
        chromium(tmp_path / "phone") as phone,
    ):
        begun = time.monotonic()
        log_in(laptop, address)
        shows(laptop, "Hello, ada")
        made = text_of(laptop, "made")
        log_in(phone, address)
        shows(phone, "Hello, ada")
        if time.monotonic() - begun < 9:  # else the fragment was rightly made again
            assert text_of(phone, "made") == made
        assert int(text_of(phone, "visits")) == 4  # each saw the form, and then its name
        cookie = laptop.get_cookie("sessionid")
        assert cookie is not None
        assert cookie["httpOnly"]
        laptop.find_element("css selector", "button").click()
        shows(laptop, "logged out of 2 sessions")
        phone.refresh()
        shows(phone, "<h1>Hello</h1>")
        refused = 0
        while "quota" not in phone.page_source:  # a fourth guess, or later on a slow machine
            assert refused < 20
            log_in(phone, address, "guess")
            wait_until(lambda: refuses(phone), "the page refuses the guess", PATIENCE)
            refused += 1
        assert refused > 3  # two of the five went to the logins
