"""``python -m pgkv`` and the ``pgkv`` script: the command, or how to install its packages."""

from __future__ import annotations

import contextlib
import sys
from importlib.util import find_spec

NEEDED = ("typer", "rich")


def main() -> int:
    """Run the command line and return the exit code."""
    if sys.argv[1:] == ["--version"] and sys.stdout is not None:
        with contextlib.suppress(OSError):  # reported below
            from . import __version__

            print(f"pgkv {__version__}", flush=True)
            return 0
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(
            f"pgkv: the command line needs {' and '.join(missing)}: "
            "pip install 'pgkv-toolkit[cli]'",
            file=sys.stderr,
        )
        return 2
    from .cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
