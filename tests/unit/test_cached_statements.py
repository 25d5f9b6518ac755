"""The cache's statements keep the rules of all statements."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pgkv import Config
from pgkv._ops.op import Op
from pgkv.patterns.cache.sql import KEYS_NAMED_MAX, CacheStatements

SQL = CacheStatements(Config("postgresql://", table_name='we"ird'), "ns:")
MARK = b"~" * 17
# What is safe to repeat when the answer was lost, and what is not.
SAFE: dict[str, Op[Any]] = {
    "read": SQL.read([b"k", b"g"]),
    "read many": SQL.read([b"k"] * (KEYS_NAMED_MAX + 1)),
    "extend": SQL.extend(b"k", 1, MARK, 30),
    "give_up": SQL.give_up(b"k", 1, MARK),
    "invalidate": SQL.invalidate(b"k"),
    "bump_tag": SQL.bump_tag(b"k"),
    "bump_function": SQL.bump_function(b"k"),
    "usage": SQL.usage(),
}
UNSAFE: dict[str, Op[Any]] = {
    "lease": SQL.lease(b"k", MARK, 30),
    "claim": SQL.claim(b"k", 1),
    "fill": SQL.fill(b"k", 1, MARK, b"v", 60),
    "fill for ever": SQL.fill(b"k", 1, MARK, b"v", None),
}
ALL = SAFE | UNSAFE
every_op = pytest.mark.parametrize("op", ALL.values(), ids=ALL)


def test_what_may_be_repeated() -> None:
    """Reads, invalidations and what only matches by version and mark; never a fill or a lease."""
    assert all(op.statement.retry_safe for op in SAFE.values())
    assert not any(op.statement.retry_safe for op in UNSAFE.values())


@every_op
def test_the_rules_of_the_texts(op: Op[Any]) -> None:
    """Clocks that move and are unqualified, nothing mutable on conflict or in RETURNING, no physical
    addresses, the table quoted, ranges with their collation."""
    text = op.statement.sql
    assert not re.search(r"\bnow\(|current_timestamp|xmax|ctid|advisory", text, re.IGNORECASE)
    assert not re.search(r"\.\s*\"?(clock|statement)_timestamp", text)
    _, _, conflict = text.partition("ON CONFLICT")
    conflict = re.split(r" RETURNING |\) SELECT ", conflict)[0]
    assert set(re.findall(r"\b([a-z_]+)\(", conflict)) <= {"greatest"}
    assert "interval" not in conflict
    for returned in re.findall(r" RETURNING (.*?)(?:\)|$)", text):
        assert "(" not in returned
    if text.startswith(("UPDATE", "DELETE", "SELECT")):
        assert "clock_timestamp()" not in text
    assert not re.search(r"\bkey (<|>|LIKE|BETWEEN)", text.replace('key COLLATE "C"', "KEY"))
    assert 'we"ird' not in text.replace('"we""ird"', "")


@every_op
def test_parameters_fit(op: Op[Any]) -> None:
    """As many parameters as placeholders and formats."""
    numbers = {int(n) for n in re.findall(r"\$(\d+)", op.statement.sql)}
    assert numbers == set(range(1, len(op.params) + 1))
    assert len(op.params) == len(op.statement.formats)


def test_whatever_may_wait_for_a_row_says_for_how_long() -> None:
    """Leases, fills and their like carry a lock timeout; invalidations wait, and so do not."""
    bounded = {name for name, op in ALL.items() if "lock_timeout" in op.statement.sql}
    assert bounded == {"lease", "claim", "fill", "fill for ever", "extend", "give_up"}
