"""Django's own tests of session engines; runs beside them, in `tests/sessions_tests` of its source
distribution."""

import os

from django.test import TestCase, override_settings
from sessions_tests.tests import SessionTestsMixin

from pgkv.integrations.django.sessions import SessionStore


@override_settings(PGKV_SESSIONS={"LOCATION": os.environ["PGKV_SUITE_DSN"]})
class PgkvSessionTests(SessionTestsMixin, TestCase):
    backend = SessionStore
