"""``manage.py pgkv doctor``: the ``pgkv`` command on the database and table of a cache, or of the sessions."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from typing import Any

from django.conf import settings
from django.core.cache import caches
from django.core.management.base import BaseCommand, CommandError, CommandParser

from .....config import Config, Pooler
from ...apps import SESSIONS, pgkv_caches
from ...cache import PgkvCache


class Command(BaseCommand):
    """Runs a command of pgkv on the database and table of a cache or of the sessions; ``migrate`` on all
    of them."""

    help = "Run a command of pgkv on the database of a cache: manage.py pgkv doctor"
    requires_system_checks: tuple[()] = ()

    def add_arguments(self, parser: CommandParser) -> None:
        """Add the arguments."""
        which = parser.add_mutually_exclusive_group()
        which.add_argument(
            "--cache",
            help="the alias of the cache; without it `default`, and for `migrate` all caches and sessions",
        )
        which.add_argument("--sessions", action="store_true", help="the table of the sessions")
        parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what follows `pgkv`")

    def handle(self, *_: Any, **options: Any) -> None:
        """Run it; its exit code becomes that of ``manage.py``.

        Raises:
            CommandError: the cache or the session engine is another one.
        """
        name, *rest = options["arguments"] or ["--help"]
        if options["sessions"] or options["cache"] is not None or name != "migrate":
            configs = [_sessions() if options["sessions"] else _of(options["cache"] or "default")]
        else:
            configs = [cache.config for _, cache in pgkv_caches()]
            if settings.SESSION_ENGINE == SESSIONS:
                configs.append(_sessions())
        if not configs:
            raise CommandError("neither a cache nor the session engine is of pgkv")
        codes = {}
        for config in configs:
            where = _options(config)
            if (config.dsn, *where) in codes:
                continue  # of several caches in one table
            if len(configs) > 1 and "--json" not in rest:
                self.stdout.write(f"-- {config.table.quoted}")
                self.stdout.flush()
            command = [sys.executable, "-m", "pgkv", name, *where, *rest]
            # The DSN is not an argument: those are shown to every user of the machine.
            codes[config.dsn, *where] = subprocess.call(  # noqa: S603  # what the user of manage.py asks for
                command, env={**os.environ, "PGKV_DSN": config.dsn}
            )
        if any(codes.values()):
            sys.exit(max(codes.values(), key=abs))


def _of(alias: str) -> Config:
    cache = caches[alias]
    if not isinstance(cache, PgkvCache):
        raise CommandError(
            f"the cache {alias!r} is not of pgkv; choose another with --cache, or --sessions"
        )
    return cache.config


def _sessions() -> Config:
    if settings.SESSION_ENGINE != SESSIONS:
        raise CommandError(f"--sessions needs SESSION_ENGINE = {SESSIONS!r}")
    from ...sessions import config

    return config()


def _options(config: Config) -> list[str]:
    """What tells the command which table, and how to reach it."""
    found = ["--table", config.table_name]
    if config.schema is not None:
        found += ["--schema", config.schema]
    if config.pooler is not Pooler.NONE:
        found += ["--pooler", config.pooler.value]
    return found
