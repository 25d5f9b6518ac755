"""The programs in examples/ run, and do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.faults.support import newest

ROOT = Path(__file__).parents[2]


def run(name: str, dsn: str) -> str:
    """What an example prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples" / name)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PGKV_DSN": dsn},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@newest
def test_scrapers_share_a_budget(dsn: str) -> None:
    """48 requests of four processes fit the rate of one, give or take the network's jitter."""
    found = re.match(
        r"(\d+) requests of 4 processes in [\d.]+ s; (\d+) would fit", run("scraper.py", dsn)
    )
    assert found is not None
    assert int(found[1]) == 48
    assert int(found[2]) >= 48 - 5
