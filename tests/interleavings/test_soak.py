"""One minute of `make soak`."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import FULL
from tests.faults.support import newest
from tests.interleavings import soak
from tests.servers import Server


def test_a_minute_of_everything_at_once() -> None:
    """Totals are exact, nothing grows, and nothing that was promised is broken under random faults."""
    # In no hurry: other tests run at the same time.
    report = soak.soak(54.0, random.randrange(1 << 30), pause=0.02 if FULL else 0.3)
    print(report.text())
    assert not report.problems, report.text()


@newest
def test_what_is_in_use_where_there_is_no_proc(
    make_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Connections and tables are counted all the same."""
    monkeypatch.setattr(soak, "PROC", tmp_path / "none")
    soaking = soak.Soak(make_server(), 0, 0.0)
    with soaking.connect() as conn, subprocess.Popen(["sleep", "0"]) as worker:
        conn.execute("CREATE TABLE filled AS SELECT generate_series(1, 10000)")
        soaking.workers = [worker]
        found = soaking.sample()
    soaking.clock.close()
    assert (found.memory, found.files, found.threads, found.connections) == (0, 0, 0, 0)
    assert found.tables > 0.1
