"""What mypy and pyright tell users of pgkv: precise types, and an error for each wrong call."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
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


@pytest.mark.skipif(
    importlib.util.find_spec("basedpyright") is None, reason="basedpyright is not installed"
)
def test_every_public_name_has_a_type(tmp_path: Path) -> None:
    """Whatever users can reach is annotated, with what it refers to: no type is left to guess."""
    # Only what lies in a search path of the interpreter is looked at.
    shutil.copytree(ROOT / "pgkv", tmp_path / "pgkv", ignore=shutil.ignore_patterns("__pycache__"))
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = ["basedpyright", "--verifytypes", "pgkv", "--ignoreexternal", "--outputjson"]
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=tmp_path,
        env=os.environ | {"PATH": paths, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    report = json.loads(done.stdout)["typeCompleteness"]
    assert report["exportedSymbolCounts"]["withKnownType"] > 2000
    unclear = {each["name"] for each in report["symbols"] if not each["isTypeKnown"]}
    unclear |= {each["name"] for each in report["symbols"] if each["isTypeAmbiguous"]}
    assert unclear == set()
    assert report["completenessScore"] == 1
