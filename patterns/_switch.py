"""Turns patterns off for a program's own tests; see `pgkv.testing.disabled`."""

from __future__ import annotations

off = 0  # how many `disabled()` blocks are open
