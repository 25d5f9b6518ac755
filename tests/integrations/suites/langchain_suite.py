"""LangChain's own suites for byte stores, from langchain-tests."""

import os

import pytest
from langchain_tests.integration_tests import BaseStoreAsyncTests, BaseStoreSyncTests

from pgkv import AsyncStore, Store
from pgkv.integrations.langchain import LangChainStore

DSN = os.environ["PGKV_SUITE_DSN"]


class TestSync(BaseStoreSyncTests[bytes]):
    @pytest.fixture
    def kv_store(self):
        with Store.connect(DSN) as store:
            store.clear()
            yield LangChainStore(store)

    @pytest.fixture
    def three_values(self):
        return b"foo", b"bar", b"buzz"


class TestAsync(BaseStoreAsyncTests[bytes]):
    @pytest.fixture
    async def kv_store(self):
        async with AsyncStore.connect(DSN) as store:
            await store.clear()
            yield LangChainStore(astore=store)

    @pytest.fixture
    def three_values(self):
        return b"foo", b"bar", b"buzz"
