"""The documentation can be built."""

import sys
from pathlib import Path

import pytest

from tests.packaging.conftest import ROOT, run

pytestmark = pytest.mark.packaging


def test_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    """Sphinx finds every name, link and page that the documentation refers to."""
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-d",
        str(tmp_path / "doctrees"),
    ]
    done = run(
        [*command, "-b", "html", str(ROOT / "docs"), str(tmp_path / "html")], cwd=ROOT, timeout=110
    )
    assert done.returncode == 0, done.stderr
