"""Makes pgkv the sessions of Flask's own tests: `pytest -p flask_plugin` in its checkout."""

import os

import _pytest.monkeypatch
import flask
import pytest

from pgkv import SessionStore, Store
from pgkv.integrations.flask import PgkvSessionInterface

# Flask's fixtures use a name that newer versions of pytest have under another one.
_pytest.monkeypatch.notset = _pytest.monkeypatch.NOTSET


@pytest.fixture(autouse=True)
def _sessions(monkeypatch):
    with Store.connect(os.environ["PGKV_SUITE_DSN"]) as store:
        sessions = PgkvSessionInterface(SessionStore(store), cookie="session", secure=False)
        monkeypatch.setattr(flask.Flask, "session_interface", sessions)
        yield
