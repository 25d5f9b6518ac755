"""Turns patterns off in a program's own tests; see `pgkv.testing.disabled`."""

from __future__ import annotations

import sys

from ..._fork import new_lock

off = 0  # the number of `disabled()` blocks that are open
_lock = new_lock(sys.modules[__name__])


def add(n: int) -> None:
    global off  # noqa: PLW0603  # read at every call: a plain name is the cheapest
    with _lock:
        off += n
