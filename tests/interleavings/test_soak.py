"""One minute of `make soak`."""

from __future__ import annotations

import random

from tests import FULL
from tests.interleavings.soak import soak


def test_a_minute_of_everything_at_once() -> None:
    """Totals are exact, nothing grows, and nothing that was promised is broken under random faults."""
    # In no hurry: other tests run at the same time.
    report = soak(54.0, random.randrange(1 << 30), pause=0.02 if FULL else 0.3)
    print(report.text())
    assert not report.problems, report.text()
