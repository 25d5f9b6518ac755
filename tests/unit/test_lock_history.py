"""The checker of lock histories is not blind."""

from __future__ import annotations

import pytest

from tests.faults.lock_history import Event, violations


def event(
    kind: str, start: float, end: float, token: int, ok: bool | None = True, ttl: float = 1.0
) -> Event:
    return Event(1, "a", kind, start, end, ok, token, ttl)


@pytest.mark.parametrize(
    ("history", "wrong"),
    [
        ([event("acquire", 0, 0.1, 1), event("acquire", 1.2, 1.3, 2)], False),
        ([event("acquire", 0, 0.1, 1), event("acquire", 0.5, 0.6, 2)], True),
        ([event("acquire", 0, 0.1, 1), event("release", 0.2, 0.3, 1), event("acquire", 0.2, 0.6, 2)], False),
        ([event("acquire", 0, 0.1, 2), event("acquire", 3, 3.1, 1)], True),
        ([event("acquire", 0, 0.1, 1), event("acquire", 3, 3.1, 1)], True),
        ([event("acquire", 0, 0.1, 1), event("extend", 0.9, 0.9, 1), event("acquire", 1.2, 1.3, 2)], True),
        ([event("acquire", 0, 0.1, 1), event("extend", 0.9, 0.9, 1, None), event("acquire", 1.2, 1.3, 2)], False),
        ([event("acquire", 0, 0.1, 1), event("extend", 0.9, 0.9, 1), event("extend", 1, 1, 1, False), event("acquire", 1.8, 1.85, 2)], True),
        ([event("acquire", 0, 0.1, 1), event("extend", 0.9, 0.9, 1), event("extend", 0.95, 1, 1, False, 0.1), event("acquire", 1.2, 1.3, 2)], False),
        ([event("acquire", 0, 0.1, 1), event("acquire", 1.2, 1.3, 2), event("release", 1.4, 1.5, 1)], True),
    ],
)  # fmt: skip
def test_the_checker_tells_right_from_wrong(history: list[Event], wrong: bool) -> None:
    """The control: histories that no fenced mutex makes are found, others pass."""
    assert bool(violations(history)) is wrong
