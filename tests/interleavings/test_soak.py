"""The beginning of `make soak`."""

from __future__ import annotations

import random

import pytest

from tests import FULL
from tests.interleavings.soak import soak


@pytest.mark.timeout(300)
def test_everything_at_once() -> None:
    """Totals are exact, nothing grows, and nothing that was promised is broken under random faults."""
    report = soak(60.0 if FULL else 20.0, random.randrange(1 << 30))
    print(report.text())
    assert not report.problems, report.text()
