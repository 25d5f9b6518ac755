"""The front door: the README is short where it promises to be, and leads where it says."""

import re
from pathlib import Path

import pytest

import pgkv

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://)([^)#\s]+)")
PAGES = sorted(ROOT.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    """Each relative link of a page at the top is a file of the repository. (Sphinx sees to docs/.)"""
    links = LINK.findall(page.read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_page_of_the_documentation_is_linked() -> None:
    """The README links every page; the reference's own page links those of the reference."""
    linked = {
        (ROOT / link).resolve() for link in LINK.findall((ROOT / "README.md").read_text("utf-8"))
    }
    pages = set((ROOT / "docs").rglob("*.md"))
    pages = {page for page in pages if not {"_build", "reference"} & set(page.parts)}
    assert sorted(page.name for page in pages - linked) == ["changelog.md", "index.md"]


def test_programs_have_at_most_ten_lines() -> None:
    """Each program of the README fits into a glance; docs/ has the longer ones."""
    blocks = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    lengths = [sum(bool(line.strip()) for line in block.splitlines()) for block in blocks]
    assert len(blocks) >= 8
    assert max(lengths) <= 10


def test_the_version_is_the_released_one() -> None:
    """Where a page says which version is current, it is this one."""
    current = ".".join(pgkv.__version__.split(".")[:2])
    pages = [ROOT / "README.md", ROOT / "docs" / "install.md"]
    said = [
        re.findall(r"\b[Vv]ersion (\d+\.\d+),? (?:is a )?beta", page.read_text("utf-8"))
        for page in pages
    ]
    assert said == [[current], [current]]
