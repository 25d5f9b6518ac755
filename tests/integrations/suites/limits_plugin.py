"""Makes pgkv the only storage of limits' own tests: `pytest -p limits_plugin` in its checkout."""

import os
import sys
from pathlib import Path

import pytest
from psycopg.conninfo import conninfo_to_dict

import pgkv.integrations.limits  # noqa: F401  # registers the schemes
from pgkv import Store

sys.path.append(str(Path(os.environ["PGKV_UPSTREAM"], "limits")))  # the installed limits first

from tests import utils

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
