"""Turns patterns off in a program's own tests; see `pgkv.testing.disabled`."""

from __future__ import annotations

import threading

off = 0  # how many `disabled()` blocks are open
_lock = threading.Lock()


def add(n: int) -> None:
    """Open or close a block."""
    global off  # noqa: PLW0603  # read at every call: a plain name is the cheapest
    with _lock:
        off += n
