"""Every two writing operations of the store and of each pattern, overlapping: see `pairs`."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import pytest

import pgkv.patterns
from pgkv import TtlCleanupStrategy
from pgkv._ops.op import Statement
from tests.interleavings.declarations import DECLARATIONS
from tests.interleavings.declarations.store import StoreSubject
from tests.interleavings.pairs import CHANGES, Pairs, answer_of, left_out
from tests.unit.test_statements import ALL, statement

SUBJECTS = [subject for each in DECLARATIONS.values() for subject in each.SUBJECTS]
FIRST = [
    pytest.param(kind, a, id=f"{kind.__name__}, {a}")
    for kind in SUBJECTS
    for a in (*kind.operations, *kind.only_first, *kind.transactions)
]


@pytest.mark.parametrize(("kind", "a"), FIRST)
def test_pairs(dsn: str, kind: type[Any], a: str) -> None:
    """A open while B runs, for every B, from every state: as one after the other."""
    with (
        contextlib.closing(kind(dsn)) as subject,
        contextlib.closing(Pairs(subject, dsn)) as pairs,
    ):
        second = {**subject.operations, **subject.only_second}
        wrong = [each for b in second for each in pairs.wrong(a, b)]
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong)


@pytest.mark.parametrize("name", DECLARATIONS)
def test_every_statement_has_its_part(dsn: str, name: str) -> None:
    """Each statement that changes or locks a row is sent by an operation of the pattern's subjects."""
    assert left_out(DECLARATIONS[name], dsn) == set()


def test_every_shape_of_the_stores_statements_has_its_part(dsn: str) -> None:
    """The same for each text that a function of the store's can make."""
    with contextlib.closing(StoreSubject(dsn)) as subject:
        for name, operation in subject.all().items():
            subject.reset("absent" if name == "increment with ttl" else "live")
            answer_of(operation, subject.store, "a")
        kept = [vars(sql) | sql._made for sql in (subject.store._sql, subject.bounded)]
    # A bound is part of the text.
    sent = {
        each.sql.replace("'2'::float8", "'Infinity'::float8")
        for statements in kept
        for each in statements.values()
        if isinstance(each, Statement)
    }
    shapes = {name: statement(call, TtlCleanupStrategy.MANUAL).sql for name, call in ALL.items()}
    assert {
        name for name, sql in shapes.items() if CHANGES.search(sql) and sql not in sent
    } == set()


def test_every_pattern_is_declared() -> None:
    """A pattern with statements of its own has a declaration with subjects and scenarios."""
    folders = Path(pgkv.patterns.__path__[0]).glob("*/sql.py")
    declared = {name for name, each in DECLARATIONS.items() if each.SUBJECTS and each.SCENARIOS}
    patterns = {folder.parent.name for folder in folders} - {
        "_runtime"
    }  # shared texts, no statements
    assert patterns <= declared


def test_every_module_with_statements_is_declared() -> None:
    """A module that makes statements is part of a declaration, but for what opens transactions, makes and
    drops tables, only looks, and passes on the statements of others."""
    roots = {"pgkv": pgkv.__path__[0], "pgkv.patterns": pgkv.patterns.__path__[0]}
    modules = {
        ".".join((name, *path.relative_to(root).with_suffix("").parts))
        for name, root in roots.items()
        for path in Path(root).rglob("*.py")  # which follows no links to folders
        if re.search(
            r"(?<!class )\b[Ss]tatement\(|(?<![\w.])(query|command)\(", path.read_text("utf-8")
        )
    }
    declared = {module for each in DECLARATIONS.values() for module in each.STATEMENTS}
    assert modules - declared == {
        "pgkv._cli.demo.show", "pgkv._engine.results", "pgkv._engine.schema", "pgkv._sql.control",
        "pgkv._sql.table", "pgkv._shards.citus", "pgkv._shards.sql", "pgkv.patterns.overview",
    }  # fmt: skip
