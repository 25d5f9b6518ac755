"""The limiter's how-to names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_named_tests_exist() -> None:
    """Each test that docs/rate-limiter.md calls a witness is there to be run."""
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "rate-limiter.md").read_text()))
    there = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert len(named) > 20
    assert named <= there
