"""``manage.py pgkv doctor``: the ``pgkv`` command on the database of a cache."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from typing import Any

from django.core.cache import caches
from django.core.management.base import BaseCommand, CommandError, CommandParser

from ...cache import PgkvCache


class Command(BaseCommand):
    """Runs a command of pgkv on the database and table of a cache."""

    help = "Run a command of pgkv on the database of a cache: manage.py pgkv doctor"
    requires_system_checks: tuple[()] = ()

    def add_arguments(self, parser: CommandParser) -> None:
        """Add the arguments."""
        parser.add_argument("--cache", default="default", help="the alias of the cache")
        parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what follows `pgkv`")

    def handle(self, *_: Any, **options: Any) -> None:
        """Run it; its exit code becomes that of ``manage.py``.

        Raises:
            CommandError: the cache is of another backend.
        """
        cache = caches[options["cache"]]
        if not isinstance(cache, PgkvCache):
            raise CommandError(
                f"the cache {options['cache']!r} is not of pgkv; choose another with --cache"
            )
        name, *rest = options["arguments"] or ["--help"]
        command = [sys.executable, "-m", "pgkv", name, "--table", cache.config.table_name, *rest]
        # The DSN is not an argument: those are shown to every user of the machine.
        code = subprocess.call(  # noqa: S603  # what the user of manage.py asks for
            command, env={**os.environ, "PGKV_DSN": cache.config.dsn}
        )
        if code:
            sys.exit(code)
