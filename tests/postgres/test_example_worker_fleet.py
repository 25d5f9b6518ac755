"""The example of the lock runs and says what its docstring promises."""

import runpy
from pathlib import Path

import pytest

from tests.faults.support import newest

pytestmark = newest
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "worker_fleet.py"


def test_worker_fleet(
    dsn: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every addition counts though one worker outlives its lease; its late write was refused."""
    monkeypatch.setenv("PGKV_DSN", dsn)
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    said = capsys.readouterr().out
    assert "total 20" in said
    assert "refused by the fence: 1" in said
