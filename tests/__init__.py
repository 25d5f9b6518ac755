"""Tests; a package, so that helpers are imported as `tests.something` and no other `tests` gets in between."""

import os

# `make test-all`: every parameter in sync and async, larger searches and storms.
FULL = os.environ.get("PGKV_TESTS") == "full"
