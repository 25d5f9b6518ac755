"""Tests; a package, so that helpers are imported as `tests.something` and no other `tests` gets in between."""
