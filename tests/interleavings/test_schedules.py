"""Every schedule of the patterns' flows, up to the bounds of each scenario."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

import pgkv
from pgkv.testing import ServerClock
from tests import FULL
from tests.interleavings.declarations import SCENARIOS
from tests.interleavings.schedule import explore

AT_MOST: int | None = 30  # schedules of a scenario that is not small; `make interleavings` runs all
# Clients of both kinds run the same flows: scenarios have threads and tasks by turns.
EACH = [
    (name, kind)
    for number, name in enumerate(SCENARIOS)
    for turn, kind in enumerate(("sync", "async"))
    if FULL or number % 2 == turn
]


@pytest.fixture
def sync(clock: ServerClock) -> Iterator[pgkv.Store]:
    with pgkv.Store.connect(clock.dsn, pool_max_size=4, retry=None) as store:
        yield store


@pytest.mark.parametrize(("name", "kind"), EACH)
def test_schedules(sync: pgkv.Store, clock: ServerClock, name: str, kind: str) -> None:
    """No schedule of the scenario breaks its invariant."""
    scenario, at_most = SCENARIOS[name], AT_MOST
    if scenario.small is not None:
        scenario, at_most = dataclasses.replace(scenario, preemptions=scenario.small), None
    outcome = explore(scenario, sync, clock, kind=kind, at_most=at_most)
    print(f"{name}: {outcome}")
    assert outcome.failure is None, str(outcome.failure)
