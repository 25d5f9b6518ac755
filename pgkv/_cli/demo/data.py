"""Real data of every Python installation: the source of its library, and the names of Unicode."""

from __future__ import annotations

import sys
import sysconfig
import unicodedata
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

UNICODE, SOURCE, WORDS = "unicode/", "py/", "word/"
WORD_LISTS = ("/usr/share/dict/words", "/usr/dict/words")
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}


def collect(most: int) -> dict[str, str]:
    """Return at most so many entries, a share of each kind.

    ``py/asyncio/tasks.py:000042`` is that line of the standard library, ``unicode/1F600`` the name
    of that character, ``word/...`` a word of the machine's dictionary with its line number.
    """
    share = most // 3
    first, rest = islice(characters(), share), islice(characters(), share, None)
    return dict(islice(chain(first, source_lines(), words(), rest), most))


def characters() -> Iterator[tuple[str, str]]:
    """Every named character's code and name."""
    for code in range(sys.maxunicode + 1):
        name = unicodedata.name(chr(code), "")
        if name:
            yield f"{UNICODE}{code:06X}", name


def source_files(folder: str = "") -> Iterator[tuple[str, str]]:
    """Every module of the standard library, or of one folder of it: its path within, and its text."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted((root / folder).rglob("*.py")):
        inner = path.relative_to(root)
        if NOT_LIBRARY.isdisjoint(inner.parts):
            yield inner.as_posix(), path.read_text("utf-8", "replace").replace("\0", "")


def lines_of(name: str, text: str) -> Iterator[tuple[str, str]]:
    """A module's lines that are not blank, under keys that sort in their order."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield f"{SOURCE}{name}:{number:06}", line


def source_lines() -> Iterator[tuple[str, str]]:
    """Every line of the standard library that is not blank."""
    for name, text in source_files():
        yield from lines_of(name, text)


def words() -> Iterator[tuple[str, str]]:
    """The machine's dictionary, if it has one."""
    for path in map(Path, WORD_LISTS):
        if path.is_file():
            for number, word in enumerate(path.read_text("utf-8", "replace").split(), 1):
                yield f"{WORDS}{word[:200]}", str(number)
            return
