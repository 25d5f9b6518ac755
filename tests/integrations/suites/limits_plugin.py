"""Makes pgkv the only storage of limits' own tests: `pytest -p limits_plugin` in its checkout."""

import os
import sys
from pathlib import Path

import pytest
from psycopg.conninfo import conninfo_to_dict

from pgkv import Store
from pgkv.integrations.limits import AsyncPgkvStorage, PgkvStorage

sys.path.append(str(Path(os.environ["PGKV_UPSTREAM"], "limits")))  # the installed limits first

from tests import test_storage, utils
from tests.aio import test_storage as async_storage

told = conninfo_to_dict(os.environ["PGKV_SUITE_DSN"])
URI = f"pgkv:///{told['dbname']}?host={told['host']}&port={told['port']}&user={told['user']}"


@pytest.fixture(autouse=True)
def _empty():
    with Store.connect(os.environ["PGKV_SUITE_DSN"], table_name="limits") as store:
        store.clear()


for scheme, storages, lists in (
    ("", utils.ALL_STORAGES, [utils.moving_window_storage]),
    ("async+", utils.ALL_STORAGES_ASYNC, [utils.async_moving_window_storage]),
):
    param = pytest.param(scheme + URI, {}, None, id="pgkv")
    storages.clear()
    storages["pgkv"] = param
    for mark in lists:
        mark.args[1][:] = [param]

for scheme, kind, module in (
    ("", PgkvStorage, test_storage),
    ("async+", AsyncPgkvStorage, async_storage),
):
    [mark] = [each for each in module.TestConcreteStorages.pytestmark if each.name == "parametrize"]
    mark.args[1][:] = [pytest.param(scheme + URI, {}, kind, None, id="pgkv")]
