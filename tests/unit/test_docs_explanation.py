"""What the documentation says of the code, the tests and the figures is so."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from docs.diagram import PICTURE, drawing
from tests.each import for_each

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
MODULES = [
    *(path for path in sorted((ROOT / "pgkv").rglob("*.py")) if "patterns" not in path.parts),
    *sorted((ROOT / "patterns").rglob("*.py")),
]
WALL_CLOCKS = {
    *("time.time", "time.time_ns", "time.localtime", "time.gmtime", "time.ctime"),
    *("datetime.now", "datetime.utcnow", "datetime.today", "date.today"),
}
# Compares the client's clock with the server's, and says by how much they differ.
# One compares it with the server's, the other shows when a lease was lost.
MAY_READ_IT = {
    "pgkv/_cli/doctor/server.py",
    "pgkv/_cli/lock.py",
    "pgkv/integrations/limits.py",  # whose contract is in the client's time
    "pgkv/integrations/otel.py",  # a span has two moments
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def tests() -> set[str]:
    """The name of every test."""
    return {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)", path.read_text("utf-8"), re.MULTILINE)
    }


@for_each(PAGES, name_of)
def test_tests_that_a_page_names_exist(page: Path, tests: set[str]) -> None:
    """Each test that a page calls a witness is there to be run."""
    assert not set(re.findall(r"`(test_\w+)`", page.read_text("utf-8"))) - tests


@pytest.mark.parametrize(
    "name", ["guarantees", "security", "lock", "known-problems", "idempotency", "queue"]
)
def test_pages_of_promises_name_tests(name: str) -> None:
    """The pages that promise say where that is tested; so the search above finds something."""
    assert len(re.findall(r"`test_\w+`", (ROOT / "docs" / f"{name}.md").read_text("utf-8"))) > 10


@for_each(PAGES, name_of)
def test_files_that_a_page_names_exist(page: Path) -> None:
    """A file or folder of the source tree that a page names is where it says."""
    text = page.read_text("utf-8")
    named = re.findall(r"`((?:pgkv|patterns|tests|examples|docs)/[\w./-]*)`", text)
    assert not [name for name in named if not (ROOT / name).exists()]


@for_each(MODULES, name_of)
def test_no_module_reads_the_wall_clock(path: Path) -> None:
    """A client's clock decides nothing: nobody looks at it."""
    tree = ast.parse(path.read_text("utf-8"))
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert bool(called & WALL_CLOCKS) is (name_of(path) in MAY_READ_IT)


def test_the_glossary_has_no_word_that_nobody_uses() -> None:
    """Each term of docs/glossary.md is used on another page or in the code."""
    glossary = (ROOT / "docs" / "glossary.md").read_text("utf-8")
    terms = {
        term.strip("`").lower()
        for bold in re.findall(r"\*\*(.+?)\*\*", glossary)
        for term in bold.split(", ")
    }
    elsewhere = [page for page in PAGES if page.name != "glossary.md"] + MODULES
    # Words may be joined by a hyphen, an underscore, or the end of a line.
    text = " ".join(re.split(r"[\s_#-]+", " ".join(p.read_text("utf-8") for p in elsewhere)))
    assert len(terms) > 60
    assert not {
        term for term in terms if term.replace("-", " ").replace("_", " ") not in text.lower()
    }


def test_the_diagram_shows_the_modules_of_today() -> None:
    """docs/architecture.svg is what docs/diagram.py draws from the layers in pyproject.toml; if not:
    `python docs/diagram.py`."""
    assert PICTURE.read_text("utf-8") == drawing()


ARCHAIC = re.compile(
    r"\b(whoever|somebody|nobody|whom|beside|anew|so\s+many|so\s+long|in\s+vain|dearer|dearest|shall|of\s+which\s+one"
    r"|seen\s+to|is\s+lent|as\s+it\s+is)\b",
    re.IGNORECASE,
)
CODE = re.compile(r"^```.*?^```|`[^`]+`", re.MULTILINE | re.DOTALL)


@for_each([page for page in PAGES if page.name != "CHANGELOG.md"], name_of)
def test_pages_use_plain_words(page: Path) -> None:
    """The prose of a page is in plain, present-day English."""
    prose = CODE.sub("", page.read_text("utf-8"))
    assert [found.group() for found in ARCHAIC.finditer(prose)] == []


def fragments(text: str) -> list[str]:
    """The rows of its tables whose cells join fragments by semicolons; code does not count."""
    rows = re.findall(r"^\|.*\|$", CODE.sub("", text), re.MULTILINE)
    return [row for row in rows if ";" in row]


@for_each([page for page in PAGES if page.name != "CHANGELOG.md"], name_of)
def test_a_cell_of_a_table_has_sentences(page: Path) -> None:
    """A cell says each thing in a sentence, and strings no fragments together by semicolons."""
    assert fragments(page.read_text("utf-8")) == []


def test_fragments_of_a_cell_are_found() -> None:
    """The test above would see them, and takes code for code."""
    rows = "| a | kept; lost after a crash |\n| b | `--; x` |\n\nProse; of two parts.\n"
    assert fragments(rows) == ["| a | kept; lost after a crash |"]
