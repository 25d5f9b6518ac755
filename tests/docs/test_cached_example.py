"""examples/report_cache.py runs, and shows what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.faults.support import newest

ROOT = Path(__file__).parents[2]


@newest
def test_a_report_is_computed_once_and_changes_with_its_data(dsn: str) -> None:
    """Cached it is several times faster; a rollback leaves it, a commit replaces it, and four
    processes on a cold key compute once."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples" / "report_cache.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PGKV_DSN": dsn},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = re.match(r"computed: ([\d.]+) ms; cached: ([\d.]+) ms", done.stdout)
    assert found is not None
    assert float(found[1]) > 2 * float(found[2])
    assert "after a rollback: still cached" in done.stdout
    assert "after a commit: +1 cents, at once" in done.stdout
    assert "4 processes, one answer: True; computed 1 time" in done.stdout
