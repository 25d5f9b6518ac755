"""The commands of ``pgkv``, their frame, and how they read and write."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of


def version() -> str:
    """Return the version of pgkv, for people."""
    try:
        return version_of("pgkv-toolkit")
    except PackageNotFoundError:
        return "(not installed: running from its source)"
