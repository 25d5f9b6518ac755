"""Checks a recorded history of one lock against a fenced mutex with leases.

Tokens say in which order the grants took effect, so no search is needed: a history is linearizable
if that order fits what was seen in real time, and no grant falls into the time that an earlier
holder was promised. Outcomes that are unknown promise nothing and forbid nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path


@dataclass(frozen=True)
class Event:
    """One call: what, on which lock, from when to when (a clock that all processes share), and how
    it ended (None: unknown). `token` is the grant's; `ttl` what it or the extension promised."""

    process: int
    lock: str
    kind: str  # "acquire", "extend", "release"
    start: float
    end: float
    ok: bool | None
    token: int = 0
    ttl: float = 0.0


def read(paths: Iterable[Path]) -> list[Event]:
    return [
        Event(**json.loads(line))
        for path in paths
        for line in path.read_text("utf-8").splitlines()
        if line.endswith("}")
    ]


def line(event: Event) -> str:
    return json.dumps(asdict(event)) + "\n"


def violations(history: Iterable[Event]) -> list[str]:
    """What a fenced mutex would not have done; per lock, for locks do not concern each other."""
    found: list[str] = []
    events = list(history)
    for lock in sorted({event.lock for event in events}):
        found += _of_one([event for event in events if event.lock == lock])
    return found


def _of_one(events: list[Event]) -> list[str]:
    found = []
    grants = sorted(
        (event for event in events if event.kind == "acquire" and event.ok),
        key=lambda event: event.token,
    )
    for earlier, later in pairwise(grants):
        if earlier.token == later.token:
            found.append(f"granted twice: {earlier} {later}")
        if later.end < earlier.start:
            found.append(f"token went back in time: {earlier} then {later}")
        promised = _held_until(earlier, events)
        if later.end < promised:
            found.append(f"{later} ended {promised - later.end:.3f} s before {earlier} might end")
    for event in events:
        if event.kind in ("extend", "release") and event.ok:
            found += [
                f"{event} succeeded after {grant}"
                for grant in grants
                if grant.token > event.token and event.start > grant.end
            ]
    return found


def _held_until(grant: Event, events: list[Event]) -> float:
    """The earliest moment at which somebody else may have been granted the lock."""
    own = [event for event in events if event.token == grant.token and event is not grant]
    until = grant.start + grant.ttl
    for event in sorted(own, key=lambda event: event.start):
        if event.kind == "extend" and event.ok:
            until = event.start + event.ttl
        elif event.kind == "extend":
            # It may have been made shorter, and the answer have come too late to be trusted.
            until = min(until, event.start + event.ttl)
    # From its beginning on a release may have taken effect, whatever came of it.
    return min([until, *(event.start for event in own if event.kind == "release")])
