"""cachelib's own tests, from the checkout that PGKV_UPSTREAM names."""

import os
import sys
from pathlib import Path

import pytest

from pgkv import Store
from pgkv.integrations.cachelib import CachelibCache

sys.path.insert(0, str(Path(os.environ["PGKV_UPSTREAM"], "cachelib", "tests")))

from clear import ClearTests
from common import CommonTests
from has import HasTests


class TestCache(CommonTests, ClearTests, HasTests):
    @pytest.fixture(autouse=True)
    def _factory(self):
        with Store.connect(os.environ["PGKV_SUITE_DSN"]) as store:
            store.clear()
            self.cache_factory = lambda *args, **kwargs: CachelibCache(store, *args, **kwargs)
            yield
