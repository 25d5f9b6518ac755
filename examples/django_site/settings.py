"""The settings of the site. Those of pgkv are the cache, the session engine and an application."""

import os
from pathlib import Path

from psycopg.conninfo import conninfo_to_dict

found = conninfo_to_dict(os.environ["PGKV_DSN"])

SECRET_KEY = "an example"  # noqa: S105  # yours comes from the environment
DEBUG = True
ALLOWED_HOSTS = ["127.0.0.1", "localhost"]
ROOT_URLCONF = "urls"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": found.get("dbname"),
        "USER": found.get("user"),
        "PASSWORD": found.get("password"),
        "HOST": found.get("host"),
        "PORT": found.get("port"),
        "OPTIONS": {"options": found.get("options") or ""},
    }
}
CACHES = {"default": {"BACKEND": "pgkv.integrations.django.PgkvCache"}}
SESSION_ENGINE = "pgkv.integrations.django.sessions"

INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "pgkv.integrations.django",
]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [Path(__file__).parent / "templates"],
        "OPTIONS": {"context_processors": ["django.template.context_processors.request"]},
    }
]
