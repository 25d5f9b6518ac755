"""The example of sessions runs, and does what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.faults.support import newest

ROOT = Path(__file__).parents[2]


@newest
def test_one_device_logs_the_other_out(dsn: str) -> None:
    """Two logins, a list of two, one of them ended from the other."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples" / "devices.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PGKV_DSN": dsn},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "welcome, ada",
        "welcome, ada",
        "2 devices",
        "logged out the other one: True",
        "the phone sees 401",
        "the laptop sees 200",
    ]
