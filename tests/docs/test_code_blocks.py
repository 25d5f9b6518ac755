"""Nothing documented goes unrun: the Python blocks of the README and of docs/, page by page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import servers

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[str]:
    return BLOCK.findall(page.read_text())


@pytest.mark.skipif(not servers.installed(), reason="no PostgreSQL server programs here")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem
)
def test_code_of_a_page_runs_as_it_stands(page: Path) -> None:
    """A reader who types in a page's blocks, from the first to the last, meets no error or warning."""
    where = servers.new_directory("page")
    program = where / "page.py"
    program.write_text("\n".join(blocks(page)))
    settings = {name: value for name, value in os.environ.items() if name != "PGKV_DSN"}
    settings["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(program)],
        cwd=where,
        env=settings,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_readme_opens_with_a_program_of_about_ten_lines() -> None:
    """The first thing that a reader sees of pgkv is a program, and a short one."""
    readme = PAGES[0].read_text()
    first = blocks(PAGES[0])[0]
    assert len(first.strip().splitlines()) <= 10
    assert readme.index("```python") < 600
