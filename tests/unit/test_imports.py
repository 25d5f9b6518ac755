"""What an import loads: by the names of the modules, for times depend on the machine."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pgkv

# What costs as much as psycopg (structlog, with rich and pygments), or is paid for by its users only.
HEAVY = [
    "structlog",
    "rich",
    "pygments",
    "attr",
    "typer",
    "pydantic",
    "django",
    "flask",
    "starlette",
]


def loaded_by(code: str) -> set[str]:
    """The modules that a program has loaded at its end."""
    program = f"{code}\nimport sys; print('\\n'.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, text=True
    )
    return set(done.stdout.split())


def test_importing_pgkv_loads_nothing_of_it() -> None:
    """`import pgkv` loads no module of pgkv's, nor psycopg: each name brings its own."""
    loaded = loaded_by("import pgkv")
    assert {name for name in loaded if name.startswith("pgkv.")} == set()
    assert not loaded & {"psycopg", "psycopg_pool", "msgspec", "tenacity", *HEAVY}


def test_a_store_loads_no_pattern() -> None:
    """Who uses a store pays for neither the patterns nor the other kind of store, and for what is
    used rarely when it is used. Beyond psycopg, its pool and pgkv there is little left."""
    drivers = loaded_by("import psycopg, psycopg_pool")
    loaded = loaded_by("import pgkv; pgkv.Store") - drivers
    own = {name for name in loaded if name.partition(".")[0] == "pgkv"}
    rare = ("patterns", "aio", "pipeline", "typed", "embedded", "_embedded", "_ops.serialize")
    assert {
        name for name in own if name.startswith(tuple(f"pgkv.{name}" for name in rare))
    } == set()
    assert len(own) <= 42, sorted(own)
    assert not loaded & {"tenacity", "msgspec", *HEAVY}
    assert len(loaded - own) <= 6, sorted(loaded - own)


def test_all_names_load_nothing_heavy() -> None:
    """Neither does all of pgkv: what a program has not imported itself stays away."""
    loaded = loaded_by("import pgkv\nfor name in pgkv.__all__: getattr(pgkv, name)")
    assert "pgkv.patterns.lock" in loaded
    assert not loaded & set(HEAVY)


def test_names_are_where_checkers_see_them() -> None:
    """At run time each name comes from the module that the imports for type checkers name."""
    tree = ast.parse(Path(pgkv.__file__).read_text(encoding="utf-8"))
    seen = {
        alias.name: f".{node.module}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }
    assert seen == pgkv._MODULE_OF


def test_unknown_names() -> None:
    """A name that pgkv does not have is an AttributeError, and an ImportError of `from`."""
    with pytest.raises(AttributeError, match="has no attribute 'Stroe'"):
        getattr(pgkv, "Stroe")  # noqa: B009  # checkers refuse the plain form
    with pytest.raises(ImportError):
        exec("from pgkv import Stroe")


def test_modules_are_attributes() -> None:
    """`import pgkv` is enough to name its public modules."""
    assert {"pgkv.errors", "pgkv.types"} <= loaded_by("import pgkv; pgkv.errors; pgkv.types")
