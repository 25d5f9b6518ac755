"""What mypy and pyright tell users of pgkv: precise types, and an error for each wrong call."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run(*command: str) -> str:
    """What the checker complains of."""
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
def test_mypy() -> None:
    """mypy --strict infers what consumer.py asserts, and refuses its wrong calls."""
    complaints = run("mypy", "--strict", "--no-error-summary", "tests/typing/consumer.py")
    assert complaints == ""


@pytest.mark.skipif(
    importlib.util.find_spec("basedpyright") is None, reason="basedpyright is not installed"
)
def test_pyright() -> None:
    """So does pyright."""
    config = HERE / "pyrightconfig.json"
    complaints = run("basedpyright", "-p", str(config), "--pythonpath", sys.executable)
    assert complaints == ""
