"""The application: ``INSTALLED_APPS = [..., "pgkv.integrations.django"]``.

``manage.py migrate`` makes the tables of the caches and of the session engine, ``manage.py check``
checks their settings, and ``manage.py pgkv doctor`` is the ``pgkv`` command on their database.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from django.apps import AppConfig
from django.conf import settings
from django.core.cache import InvalidCacheBackendError, caches
from django.core.checks import Error, Tags, register
from django.db import DEFAULT_DB_ALIAS, connections
from django.db.models.signals import post_migrate

from ..._observe import on_event
from ...errors import PgkvError
from ...store import Store
from .cache import PgkvCache

SESSIONS = "pgkv.integrations.django.sessions"


class PgkvAppConfig(AppConfig):
    """The application's configuration; Django finds it by itself. With ``DEBUG`` its statements are in
    ``connection.queries`` of the default database, without their parameters."""

    name = "pgkv.integrations.django"
    label = "pgkv"
    verbose_name: str = "pgkv"

    def ready(self) -> None:
        """Have tables made after each ``migrate``, settings checked, and statements seen."""
        post_migrate.connect(make_tables, sender=self)
        register(check_caches, Tags.caches)
        if settings.DEBUG:
            on_event(log_query)


def log_query(event: Any) -> None:
    """Show a statement to Django's debug tools, if they look.

    Args:
        event: an operation that has ended.
    """
    connection = connections[DEFAULT_DB_ALIAS]
    if connection.queries_logged:
        sql = f"/* pgkv {event.name} */ {event._op.statement.sql}"
        connection.queries_log.append({"sql": sql, "time": f"{event.seconds:.3f}"})


def pgkv_caches() -> Iterator[tuple[str, PgkvCache]]:
    """Iterate over the caches of this backend, with their aliases."""
    for alias in settings.CACHES:
        try:
            cache = caches[alias]
        except InvalidCacheBackendError:
            continue  # Django's own check reports it
        if isinstance(cache, PgkvCache):
            yield alias, cache


def make_tables(using: str = DEFAULT_DB_ALIAS, verbosity: int = 1, **_: Any) -> None:
    """Make the tables that are missing in a database; those at a DSN belong to the default one.

    Args:
        using: the alias of the database that was migrated.
        verbosity: Django's.
    """
    for alias, cache in pgkv_caches():
        if cache.database == using:
            with Store(cache.config) as store:
                store.create_table()
            if verbosity > 1:
                print(f"pgkv: the table of the cache {alias!r} is there")  # noqa: T201  # as Django's own
    if settings.SESSION_ENGINE == SESSIONS and using == DEFAULT_DB_ALIAS:
        from .sessions import make_table

        make_table()


def check_caches(**_: Any) -> list[Error]:
    """Return an error for each cache whose settings are wrong, and for the session engine."""
    errors = []
    try:
        for _alias, cache in pgkv_caches():
            cache.config  # noqa: B018  # raises where a setting is wrong
    except PgkvError as error:
        errors.append(Error(f"CACHES: {error}", id="pgkv.E001"))
    return errors
