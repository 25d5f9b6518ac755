"""Scene: keys expire for every reader at once, and their rows are collected."""

from __future__ import annotations

import time

from .. import console
from .stage import Check, Report, Scene, Stage

KEYS = 20_000
TTL = 1.0  # seconds
PREFIX = "demo:short:"


def play(stage: Stage) -> Report:
    """Write keys that end soon, wait for it, and collect them."""
    store = stage.store
    keys = [f"{PREFIX}{number:06}" for number in range(min(KEYS, stage.size.keys))]
    # The first batch's time runs while the last is written: all count from one statement's clock.
    before = time.monotonic()
    store.set_many(dict.fromkeys(keys, "soon gone"), ttl=TTL)
    there = store.count(PREFIX)
    early = time.monotonic() - before < TTL
    stage.wait("waiting for expiry", TTL, lambda: not store.exists(keys[-1]))
    visible = store.count(PREFIX) + len(store.get_many(keys[:1000]))
    rows = store.count(PREFIX, include_expired=True)
    started = time.monotonic()
    removed = store.cleanup_expired()
    seconds = time.monotonic() - started
    left = store.count(PREFIX, include_expired=True)
    checks = [
        Check(f"{visible or 'none'} readable after expiry", visible == 0),
        Check(f"collecting removed {removed:,} of {rows:,} rows, {left or 'none'} left",
              removed == rows == len(keys) and left == 0),
    ]  # fmt: skip
    if early:
        text = f"all {there:,} keys were readable before expiry"
        checks.insert(0, Check(text, there == len(keys)))
    return Report(
        [
            f"{len(keys):,} keys with a ttl of {TTL:g} s; their rows collected in "
            f"{console.duration(seconds)}: {removed / seconds:,.0f} a second"
        ],
        checks,
    )


SCENE = Scene(
    "Expiry",
    "An expired key must be gone for every reader at once, and then from the disk.",
    play,
)
