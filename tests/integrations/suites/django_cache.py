"""Django's own tests of caches; runs beside them, in `tests/cache` of its source distribution."""

import os

from cache.tests import BaseCacheTests, caches_setting_for_tests
from django.core.cache import caches
from django.test import TestCase, override_settings


@override_settings(
    CACHES=caches_setting_for_tests(
        BACKEND="pgkv.integrations.django.PgkvCache", LOCATION=os.environ["PGKV_SUITE_DSN"]
    )
)
class PgkvCacheTests(BaseCacheTests, TestCase):
    def test_cull(self):
        """Django's asks for 29 of 49. A bound is 100 entries at least here, and of a whole table."""
        self._perform_cull_test("cull", 50, 49)

    def test_zero_cull(self):
        """Django's asks for 19, as CULL_FREQUENCY says. No more goes than the bound asks for."""
        self._perform_cull_test("zero_cull", 50, 49)

    def test_the_caches_share_one_store(self):
        assert caches["default"]._store is caches["v2"]._store
