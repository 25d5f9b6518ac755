"""The reference is complete, and pins the public names."""

import re
from pathlib import Path

import pgkv

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "reference.md"
ENTRY = re.compile(
    r"^\.\. auto(?:class|exception|function|data|decorator):: pgkv\.(\w+)$", re.MULTILINE
)


def test_reference_and_public_names_are_the_same() -> None:
    """Each public name has one entry in docs/reference.md, and no name appears or goes unnoticed."""
    entries = ENTRY.findall(REFERENCE.read_text(encoding="utf-8"))
    assert sorted(name for name in pgkv.__all__ if not name.startswith("__")) == sorted(entries)
