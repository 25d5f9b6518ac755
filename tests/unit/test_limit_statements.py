"""The limiter's statements keep the rules of `_sql`, whatever the number of rates."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

import pgkv
from pgkv._ops.op import Op
from pgkv.patterns.rate_limit.sql import Charge, LimiterStatements
from tests.each import for_each

Call = Callable[[LimiterStatements, Any], Op[Any]]
MIXED = ("", "month Europe/Berlin", "quarter UTC")


def charged(shape: Any) -> Charge:
    rates = shape if isinstance(shape, int) else len(shape)
    return Charge([1] * rates, [1] * rates, shape)


def ones(shape: Any) -> list[int]:
    return [1] * len(charged(shape).incs)


STATEMENTS: dict[str, Call] = {
    "charge": lambda s, k: s.charge(b"r", charged(k)),
    "refusal": lambda s, k: s.refusal(b"r", charged(k)),
    "hit": lambda s, k: s.hit(b"r", charged(k)),
    "hit_many": lambda s, k: s.hit_many([(b"r", charged(k))] * 2),
    "peek": lambda s, k: s.peek(b"r", k),
    "refund": lambda s, k: s.refund(b"r", ones(k), k),
    "cancel": lambda s, k: s.cancel(b"r", b"\0" * 8, ones(k), ones(k), k),
    "rebase": lambda s, k: s.rebase(b"r", b"\0" * 8, k),
    "reset": lambda s, _: s.reset(b"r"),
}
# Reads, and what does the same a second time. A charge, and what undoes one, does not.
SAFE = {"peek", "reset"}


@pytest.fixture(params=[1, 2, 5, ("day UTC",), MIXED], ids=str)
def rates(request: pytest.FixtureRequest) -> Any:
    """How many rates, or which windows are among them."""
    return request.param


def op_of(name: str, rates: Any) -> Op[Any]:
    return STATEMENTS[name](
        LimiterStatements(pgkv.Config("postgresql://", table_name='q"t')), rates
    )


@for_each(STATEMENTS)
def test_what_may_be_repeated(name: str, rates: Any) -> None:
    """A hit whose answer was lost is never sent again."""
    assert op_of(name, rates).statement.retry_safe == (name in SAFE)


@for_each(STATEMENTS)
def test_parameters_fit(name: str, rates: Any) -> None:
    """As many parameters as placeholders and formats; one text per shape; the table is quoted."""
    op = op_of(name, rates)
    numbers = {int(n) for n in re.findall(r"\$(\d+)", op.statement.sql)}
    assert numbers == set(range(1, len(numbers) + 1))
    assert len(op.params) == len(op.statement.formats) == len(numbers)
    assert 'q"t' not in op.statement.sql.replace('"q""t"', "")
    sql = LimiterStatements(pgkv.Config("postgresql://"))
    assert STATEMENTS[name](sql, rates).statement is STATEMENTS[name](sql, rates).statement


@for_each(STATEMENTS)
def test_rules_of_the_texts(name: str, rates: Any) -> None:
    """Clocks as the rules want them, nothing mutable on conflict, keys locked in order."""
    text = op_of(name, rates).statement.sql
    assert not re.search(r"\bnow\(|\.(clock|statement)_timestamp|ctid|advisory|xmax", text)
    clause = text.partition("ON CONFLICT")[2].partition(" RETURNING ")[0]
    functions = set(re.findall(r"\b([a-z_]+)\(", clause))
    immutable = {"greatest", "encode", "split_part", "nullif", "to_timestamp"}
    # These are stable of a moment with a time zone, and are given one without.
    assert functions <= immutable | (
        {"extract", "date_trunc"} if isinstance(rates, tuple) else set()
    )
    assert not re.search(r"ORDER BY key(?! COLLATE)", text)
    if "ANY(" in text:
        assert 'ORDER BY key COLLATE "C" FOR UPDATE' in text
    if name not in ("hit", "hit_many"):
        assert "clock_timestamp" not in text  # Citus refuses it in UPDATE
