"""py-key-value's own tests, from the checkout that PGKV_UPSTREAM names."""

import os
import sys
from pathlib import Path

import pytest

from pgkv import AsyncStore
from pgkv.integrations.keyvalue import KeyValueStore

for name in [each for each in sys.modules if each == "tests" or each.startswith("tests.")]:
    del sys.modules[name]  # theirs is called so, too
sys.path.insert(0, str(Path(os.environ["PGKV_UPSTREAM"], "py-key-value")))

from tests.stores.base import BaseStoreTests, ContextManagerStoreTestMixin  # noqa: E402


class TestStore(ContextManagerStoreTestMixin, BaseStoreTests):
    @pytest.fixture
    async def store(self):
        async with AsyncStore.connect(os.environ["PGKV_SUITE_DSN"], max_key_length=2600) as store:
            await store.clear()
            yield KeyValueStore(store)

    @pytest.mark.skip("a cache across processes has no bound; their PostgreSQL store skips it, too")
    async def test_not_unbounded(self, store): ...
