"""For Django: `PgkvCache`, a cache backend; `.sessions`, a session engine; an application with the
tables' migration, system checks and ``manage.py pgkv``; `ratelimit`, a decorator of views.

::

    CACHES = {"default": {"BACKEND": "pgkv.integrations.django.PgkvCache"}}
    SESSION_ENGINE = "pgkv.integrations.django.sessions"
    INSTALLED_APPS = [..., "pgkv.integrations.django"]
"""

from __future__ import annotations

from .cache import PgkvCache

__all__ = ["PgkvCache"]
