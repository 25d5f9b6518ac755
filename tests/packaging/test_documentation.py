"""The documentation can be built, its links lead somewhere, and it fits on a phone, a laptop and a wide screen."""

import re
import sys
import threading
from collections.abc import Iterable, Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

import pytest

from tests import FULL
from tests.browser import chromium
from tests.packaging.conftest import ROOT, run

# Half a minute of work, which a loaded machine may take twenty times as long for.
BUILD = 900
pytestmark = [pytest.mark.packaging, pytest.mark.timeout(BUILD + 300)]
WIDTHS = (390, 1366, 1920)
CUT = """
return [...document.querySelectorAll(".highlight pre")]
    .filter(block => block.scrollWidth > block.clientWidth + 1).map(block => block.innerText.slice(0, 60));
"""
BROKEN = "broken.html"
# On a phone the theme lets the whole content scroll sideways, where a table or a block of code should.
WIDER = """
return Math.max(...[...document.querySelectorAll("html, .content")]
    .map(part => part.scrollWidth - part.clientWidth));
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site, made without a warning."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going"]
    places = [
        "-d",
        str(folder / "doctrees"),
        "-b",
        "html",
        str(ROOT / "docs"),
        str(folder / "html"),
    ]
    done = run([*command, *places], cwd=ROOT, timeout=BUILD)
    assert done.returncode == 0, done.stderr
    return folder / "html"


def pages(site: Path) -> list[Path]:
    return [page for page in sorted(site.rglob("*.html")) if "_static" not in page.parts]


class Anchors(HTMLParser):
    """The links of a page and the places in it that a link can name."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places = {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.places.add(values.get("id") or "")
        self.links += [values[name] or "" for name in ("href", "src") if name in values]


def test_documentation_builds_without_a_warning(site: Path) -> None:
    """Sphinx finds every name, link and page that the documentation refers to."""
    assert (site / "index.html").exists()


def test_links_of_the_site_lead_somewhere(site: Path) -> None:
    """Each link inside the site names a file of it, and a place that is on that page."""
    read = {page.resolve(): Anchors(page.read_text("utf-8")) for page in pages(site)}
    broken = []
    for page, anchors in read.items():
        for link in anchors.links:
            address, place = urldefrag(link)
            if re.match(r"[a-z]+:", address):
                continue
            target = (
                (page.parent / unquote(address.partition("?")[0])).resolve() if address else page
            )
            found = target in read and unquote(place) in read[target].places
            if not (found or (target not in read and target.exists())):
                broken.append((page.name, link))
    assert broken == []


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    """Where the site is served."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One for all tests of this file."""
    with chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


def faults_of(browser: Any, address: str, names: Iterable[str]) -> list[object]:
    """What does not fit: pages wider than a screen, blocks of code cut on a laptop; and failures of scripts."""
    faults: list[object] = []
    for name in names:
        browser.get(f"{address}/{name}")
        for width in WIDTHS:
            screen = {
                "width": width,
                "height": 900,
                "deviceScaleFactor": 1,
                "mobile": width < 500,
            }
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
            if (wider := browser.execute_script(WIDER)) > 0:
                faults.append((name, width, wider))
            if width >= 1366 and (cut := browser.execute_script(CUT)):
                faults.append((name, width, cut))
        faults += [entry["message"] for entry in browser.get_log("browser")]
    return faults


def test_pages_fit_on_every_screen(site: Path, address: str, browser: Any) -> None:
    """No page is wider than the screen, no code block is cut on a laptop, no script fails. One page in three
    is looked at, with PGKV_TESTS=full each."""
    names = [page.relative_to(site).as_posix() for page in pages(site)]
    shown = [name for name in names if name not in {"genindex.html", "search.html", BROKEN}]
    assert faults_of(browser, address, shown[:: 1 if FULL else 3]) == []


def test_a_page_that_does_not_fit_is_found(site: Path, address: str, browser: Any) -> None:
    """The control of the test above: a page with each of its faults."""
    head = (site / "index.html").read_text("utf-8").partition("<body>")[0]
    code = f'<div class="highlight"><pre style="white-space: pre">{"x" * 400}</pre></div>'
    wide = '<div style="width: 1500px">wide</div><script>noSuchFunction()</script>'
    (site / BROKEN).write_text(f'{head}<body><div class="content">{code}{wide}</div></body></html>')
    found = faults_of(browser, address, [BROKEN])
    (site / BROKEN).unlink()
    places = [fault[:2] for fault in found if isinstance(fault, tuple)]
    # From 1366 on the page is too wide and the code is cut.
    assert places == [(BROKEN, width) for width in (390, 1366, 1366, 1920, 1920)]
    assert any("noSuchFunction" in str(fault) for fault in found)


def test_search_finds_session_timeouts_where_they_are_explained(address: str, browser: Any) -> None:
    """The search lists the page about sessions first, before the reference's many timeouts."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait

    browser.get(f"{address}/search.html?q=session+timeout")
    found = WebDriverWait(browser, 60).until(
        lambda page: page.find_elements(By.CSS_SELECTOR, "#search-results li a")
    )
    assert (found[0].get_attribute("href") or "").startswith(f"{address}/sessions.html")
