"""The statements of locks: which may be repeated blindly, and do their texts keep the rules."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pgkv._ops.op import Op
from pgkv.config import Table
from pgkv.patterns.lock.sql import (
    LOCKS,
    TICKETS,
    Asking,
    LockStatements,
    SemaphoreStatements,
    slot_keys,
)

SQL = SemaphoreStatements(
    Table("kv_locks", "s", shape=LOCKS), Table("kv_tickets", "s", shape=TICKETS)
)
SLOTS = slot_keys(b"n", 2)
ASKING = Asking("host:1", b"{}", b"\x1f12")

SAFE: dict[str, Op[Any]] = {
    "take": SQL.take(b"n", ASKING, 30.0),
    "look": SQL.look(b"n", ASKING, 30.0),
    "grant": SQL.grant(b"n", ASKING, 30.0, 1.0),
    "grant_fair": SQL.grant_fair(b"n", ASKING, 30.0, 1.0, 2.0),
    "grant_slot": SQL.grant_slot(SLOTS, ASKING, 30.0, 1.0),
    "define": SQL.define(SLOTS, resize=False),
    "turn": SQL.turn(b"n", ASKING, 30.0),
    "leave": SQL.leave(b"n", ASKING),
    "leave in doubt": SQL.leave_in_doubt(b"n", ASKING)[0],
    "renew": SQL.renew([(b"n", 1, 30.0)]),
    "release": SQL.release(b"n", 1, notify=False),
    "release and notify": SQL.release(b"n", 1, notify=True),
    "take back": LockStatements.take_back(SQL, [b"n"], ASKING)[0],
    "take back a slot, first": SQL.take_back(SLOTS, ASKING)[0],
    "take back a slot, then": SQL.take_back(SLOTS, ASKING)[1],
    "ended": SQL.ended(b"n", 1),
    "place": SQL.place(),
    "isolation": SQL.isolation(),
    "holder": SQL.holder(b"n"),
    "holders": SQL.holders(),
    "queue": SQL.queue(),
    "guards": SQL.guards(),
    "clean": SQL.clean(0),
    "clean_tickets": SQL.clean_tickets(0),
}
UNSAFE: dict[str, Op[Any]] = {
    "revoke": SQL.revoke(b"n", 1),
    "guard": SQL.guard('"s"."kv_locks"', b"n", 1, None),
    "guard with max_hold": SQL.guard('"s"."kv_locks"', b"n", 1, 5.0),
    "notify": SQL.notify(b"x"),
}
ALL = SAFE | UNSAFE


def test_what_may_be_repeated() -> None:
    """Grants by their nonce, renewals and releases by their token; nothing else that writes."""
    assert all(op.statement.retry_safe for op in SAFE.values())
    assert not any(op.statement.retry_safe for op in UNSAFE.values())


@pytest.mark.parametrize("name", ALL)
def test_parameters_fit_the_text(name: str) -> None:
    """As many parameters as placeholders and formats."""
    op = ALL[name]
    numbers = {int(n) for n in re.findall(r"\$(\d+)", op.statement.sql)}
    assert len(op.params) == len(op.statement.formats) == len(numbers)


@pytest.mark.parametrize("name", ALL)
def test_clocks_stand_where_they_may(name: str) -> None:
    """Unqualified, never now(), and none in ON CONFLICT: of its functions only immutable ones."""
    text = ALL[name].statement.sql
    assert "now()" not in text
    assert not re.search(r"\.\s*\"?(clock|statement)_timestamp", text)
    for clause in re.findall(r"ON CONFLICT .*? RETURNING", text):
        assert "_timestamp" not in clause
        assert "interval" not in clause


def test_grants_and_renewals_are_durable_whatever_the_role_says() -> None:
    """synchronous_commit travels in the statement; releases do not wait for the disk."""
    for name in ("take", "turn", "grant", "grant_fair", "grant_slot", "renew"):
        assert "'synchronous_commit', CASE" in ALL[name].statement.sql
    assert "'synchronous_commit', CASE" in UNSAFE["revoke"].statement.sql
    for name in ("release", "release and notify", *(name for name in ALL if "take back" in name)):
        assert "'synchronous_commit', 'off'" in ALL[name].statement.sql
