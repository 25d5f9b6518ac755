"""A real browser for tests: Debian's Chromium without a window."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from selenium import webdriver

FLAGS = [
    "headless",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "ignore-certificate-errors",
    "disable-dev-shm-usage",
]


@contextmanager
def chromium(profile: Path) -> Iterator[webdriver.Chrome]:
    """A browser with an empty profile; the test is skipped where there is none."""
    pytest.importorskip("selenium", reason="selenium is not installed")
    from selenium import webdriver
    from selenium.common import WebDriverException

    programs = [shutil.which("chromium"), shutil.which("chromedriver")]
    if None in programs:
        pytest.skip("no chromium and chromedriver here (Debian: chromium, chromium-driver)")

    def start(profile: Path) -> webdriver.Chrome:
        options = webdriver.ChromeOptions()
        options.binary_location = programs[0] or ""
        for flag in (*FLAGS, f"user-data-dir={profile}"):
            options.add_argument(f"--{flag}")
        service = webdriver.ChromeService(executable_path=programs[1])
        return webdriver.Chrome(options=options, service=service)

    try:
        browser = start(profile)
    except WebDriverException:  # the driver's port, which selenium found free, was taken meanwhile
        browser = start(profile.with_name(f"{profile.name}-again"))
    try:
        yield browser
    finally:
        browser.quit()
