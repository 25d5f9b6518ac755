"""The tests of other modules once more, over a store that is made in another way.

A module that imports this has fixtures of its own, `make_store` above all, and takes over what else there is.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterable
from types import ModuleType
from typing import Any
from zlib import crc32

import pytest
from _pytest.fixtures import FixtureFunctionDefinition

from tests import FULL

NEEDS_STORE = {
    *("store", "make_store", "queue", "idem", "race", "coalescing", "sessions", "make_sessions")
}


def adopt(
    into: dict[str, Any],
    modules: Iterable[ModuleType],
    *,
    own: set[str],
    left_out: dict[str, str],
    marks: dict[ModuleType, pytest.MarkDecorator] | None = None,
    one_in: int = 1,
) -> None:
    """Make the modules' fixtures, and their tests that ask for a store, those of another module.

    Args:
        into: its globals.
        modules: with the tests.
        own: fixtures that it has itself.
        left_out: tests (as ``test_module__name``) that are skipped there, and why.
        marks: for all tests of a module.
        one_in: take one test of that many; with ``PGKV_TESTS=full`` all.
    """
    for module in modules:
        short = module.__name__.rpartition(".")[2]
        for name, member in vars(module).items():
            if name.startswith("test_") and inspect.isfunction(member):
                if not NEEDS_STORE & set(inspect.signature(member).parameters):
                    continue
                full = f"{short}__{name.removeprefix('test_')}"
                if not FULL and crc32(full.encode()) % one_in:
                    continue
                more = [] if marks is None or module not in marks else [marks[module]]
                if full in left_out:
                    more.append(pytest.mark.skip(left_out[full]))
                into[full] = _marked(full, member, more)
            elif isinstance(member, FixtureFunctionDefinition) and name not in own:
                into[name] = member


def _marked(name: str, test: Any, marks: list[pytest.MarkDecorator]) -> Any:
    if not marks:
        return test
    # A mark on the function itself would hold in its own module as well.
    twin = types.FunctionType(
        test.__code__, test.__globals__, name, test.__defaults__, test.__closure__
    )
    twin.__kwdefaults__ = test.__kwdefaults__
    twin.__dict__.update(test.__dict__, pytestmark=[*getattr(test, "pytestmark", ())])
    for mark in marks:
        mark(twin)
    return twin
