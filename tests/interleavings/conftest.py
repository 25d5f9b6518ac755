"""What of the interleavings `make test` runs, and what only `make interleavings`."""

from __future__ import annotations

import pytest

from tests import servers
from tests.interleavings.pairs import FULL


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Pairs and schedules run on the newest PostgreSQL; the full set runs on every version found."""
    majors = [major for major in servers.installed() if major >= 14]
    if FULL or not majors:
        return
    older = tuple(f"pg{major}" for major in majors if major != max(majors))
    left = [item for item in items if _is_for(item, older)]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]


def _is_for(item: pytest.Item, versions: tuple[str, ...]) -> bool:
    name = item.nodeid.partition("tests/interleavings/test_")[2]
    return name.startswith(PARTS) and any(f"[{each}" in name for each in versions)


PARTS = ("pairs", "schedules")
