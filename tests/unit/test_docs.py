"""The reference is complete."""

import re
from pathlib import Path

import pytest

import pgkv

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "reference.md"


@pytest.mark.parametrize("name", [name for name in pgkv.__all__ if not name.startswith("__")])
def test_reference_names_every_public_name(name: str) -> None:
    """Each public name of pgkv has its entry, made from its docstring, in docs/reference.md."""
    entry = rf"^\.\. auto(?:class|exception|function|data|decorator):: pgkv\.{name}$"
    assert re.search(entry, REFERENCE.read_text(encoding="utf-8"), re.MULTILINE), (
        f"add an entry for pgkv.{name}"
    )
