"""Nothing documented goes unrun: the Python blocks of the README and of docs/, page by page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import servers
from tests.each import for_each

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(set(DOCS.rglob("*.md")) - set(DOCS.glob("_build/**/*.md")))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# However it is spelled or indented: what a reader takes for Python.
LOOKS_LIKE_PYTHON = re.compile(r"^[ \t>]*(?:```+|~~~+)[ \t]*\{?py.*", re.MULTILINE | re.IGNORECASE)
# What a page allows a healthy database is too little on a busy machine.
PATIENT = 'import pgkv; pgkv.RateLimiter.__init__.__kwdefaults__["timeout"] = 30'
PROBE, PATIENT_PROBE = "ping(timeout=1)", "ping(timeout=30)"


def blocks(page: Path) -> list[str]:
    return BLOCK.findall(page.read_text())


def name(page: Path) -> str:
    """`README`, `lock`, `coming-from/redis`."""
    return page.relative_to(DOCS if page.is_relative_to(DOCS) else ROOT).with_suffix("").as_posix()


@pytest.fixture
def redis_url() -> Iterator[str]:
    """An empty Redis of the test's own."""
    from tests.benchmarks.redis_server import open_redis

    with open_redis() as (client, said):
        if client is None:
            pytest.skip(f"the page compares with Redis: {said}")
        yield f"unix://{client.get_connection_kwargs()['path']}"


@pytest.mark.skipif(not servers.installed(), reason="no PostgreSQL server programs here")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name)
def test_code_of_a_page_runs_as_it_stands(page: Path, request: pytest.FixtureRequest) -> None:
    """A reader who types in a page's blocks, from the first to the last, meets no error or warning."""
    where = servers.new_directory("page")
    program = where / "page.py"
    program.write_text("\n".join(blocks(page)).replace(PROBE, PATIENT_PROBE))
    if "RateLimiter(" in program.read_text():
        (where / "sitecustomize.py").write_text(PATIENT)
    settings = {
        name: value for name, value in os.environ.items() if name not in ("PGKV_DSN", "REDIS_URL")
    }
    settings["PYTHONPATH"] = f"{where}{os.pathsep}{ROOT}"
    # Pages start their servers in ./data: what initdb makes there is the same each time.
    servers.lay_out(where / "data")
    if "REDIS_URL" in program.read_text():
        settings["REDIS_URL"] = request.getfixturevalue("redis_url")
    done = subprocess.run(
        # slowapi calls a function of asyncio that Python 3.14 deprecates.
        [
            sys.executable,
            "-W",
            "error",
            "-W",
            "ignore::DeprecationWarning:slowapi.extension",
            program,
        ],
        cwd=where,
        env=settings,
        capture_output=True,
        text=True,
        timeout=200,  # it takes seconds, but for a busy machine
        check=False,
    )
    assert done.returncode == 0, done.stderr


@for_each(PAGES, name)
def test_python_is_fenced_in_the_one_way_that_is_run(page: Path) -> None:
    """No block that a reader takes for Python escapes the test above by its fence."""
    fences = LOOKS_LIKE_PYTHON.findall(page.read_text())
    assert fences == ["```python"] * len(blocks(page))


def test_readme_opens_with_a_program_of_about_ten_lines() -> None:
    """The first thing that a reader sees of pgkv is a program, and a short one."""
    readme = PAGES[0].read_text()
    first = blocks(PAGES[0])[0]
    assert len(first.strip().splitlines()) <= 10
    assert readme.index("```python") < 600
