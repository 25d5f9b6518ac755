"""dogpile.cache's own suites for backends and mutexes, from its wheel."""

import os

import pytest
from dogpile.cache import register_backend
from dogpile.testing.fixtures import (
    _GenericBackendFixture,
    _GenericBackendTestSuite,
    _GenericMutexTestSuite,
    _GenericSerializerTestSuite,
)

from pgkv import Store

register_backend("pgkv", "pgkv.integrations.dogpile", "DogpileBackend")
store = Store.connect(os.environ["PGKV_SUITE_DSN"])
ARGUMENTS = {"arguments": {"store": store, "distributed_lock": True}}


@pytest.fixture(scope="session", autouse=True)
def _close():
    yield
    store.close()


class TestBackend(_GenericBackendTestSuite):
    backend = "pgkv"
    config_args = ARGUMENTS
    # Of dogpile's regions; it fails where a second passes between two of its lines.
    test_region_expire = None


class TestSerializer(_GenericSerializerTestSuite, _GenericBackendFixture):
    backend = "pgkv"
    config_args = ARGUMENTS


class TestMutex(_GenericMutexTestSuite):
    backend = "pgkv"
    config_args = ARGUMENTS
