"""The statements of queues: which may be repeated blindly, and do their texts keep the rules."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pgkv._ops.op import Op
from pgkv.config import Table
from pgkv.patterns.queue.flows import Marks
from pgkv.patterns.queue.sql import (
    FIRST,
    JOBS,
    JOBS_UNLOGGED,
    JobStatements,
    Look,
    Taken,
    due_params,
)

TABLE = Table("kv_jobs", "s", shape=JOBS)
SQL = JobStatements(TABLE)
INSIDE = JobStatements(TABLE, inside=True, notify=True)
DUE = due_params(0.0, None, 0, 20)
MARKS = [FIRST] * 10

SAFE: dict[str, Op[Any]] = {
    "take": SQL.take(b"q", MARKS, 1, 60.0, 0),
    "ack": SQL.ack(1, 1, deduped=False),
    "ack of a key": SQL.ack(1, 1, deduped=True),
    "ack_many": SQL.ack_many([(1, 1)]),
    "put_back": SQL.put_back(1, 1, "error", delay=1.0),
    "renew": SQL.renew([(1, 1, 60.0)]),
    "stats": SQL.stats(b"q"),
    "jobs": SQL.jobs(b"q", None, 10),
    "purge": SQL.purge(b"q", 10),
}
UNSAFE: dict[str, Op[Any]] = {
    "put": SQL.put(b"q", b"p", DUE),
    "put with a key": SQL.put(b"q", b"p", DUE, b"k"),
    "put_many": SQL.put_many(b"q", [b"p"], DUE),
    "put inside": INSIDE.put(b"q", b"p", DUE),
    "put inside with a key": INSIDE.put(b"q", b"p", DUE, b"k"),
    "put_many inside": INSIDE.put_many(b"q", [b"p"], DUE),
    "notify": SQL.notify(b"q"),
    "cancel": SQL.cancel(b"q", 1),
    "retry": SQL.retry(b"q", 1),
}
ALL = SAFE | UNSAFE


def test_what_may_be_repeated() -> None:
    """What ends a run, by its token, and takes and reads; never a put, which may be done already."""
    assert all(op.statement.retry_safe for op in SAFE.values())
    assert not any(op.statement.retry_safe for op in UNSAFE.values())


def test_no_statement_is_left_out() -> None:
    """Every method that makes an operation is in one of the lists."""
    names = {name.split()[0] for name in ALL}
    made = {name for name in vars(JobStatements) if not name.startswith("_")}
    assert made - {"payload"} == names


@pytest.mark.parametrize("name", ALL)
def test_rules_of_the_texts(name: str) -> None:
    """No clock that stands still; as many parameters as formats; nothing relaxes a caller's commit."""
    op = ALL[name]
    sql = op.statement.sql
    assert not re.search(r"\bnow\(\)|current_timestamp", sql, re.IGNORECASE)
    assert len(op.params) == len(op.statement.formats)
    assert {f"${n}" for n in range(1, len(op.params) + 1)} == set(re.findall(r"\$\d+", sql))
    if "inside" in name:
        assert "synchronous_commit" not in sql


def test_what_does_not_wait_for_the_disk() -> None:
    """Takes and renewals of a logged table relax their own commit; puts and acks do not."""
    relaxed = {name for name, op in ALL.items() if "synchronous_commit" in op.statement.sql}
    assert relaxed == {"take", "renew"}
    unlogged = JobStatements(Table("kv_jobs_u", "s", shape=JOBS_UNLOGGED))
    assert "synchronous_commit" not in unlogged.take(b"q", MARKS, 1, 60.0, 0).statement.sql


def test_a_take_is_planned_anew_when_the_table_has_grown() -> None:
    """Each factor of eight in the table's size is another statement, and nothing else is."""
    texts = [
        SQL.take(b"q", MARKS, 1, 60.0, size).statement for size in (0, 65536, 1 << 20, 1 << 30)
    ]
    assert texts[0] is texts[1]
    assert len({statement.prepared_name for statement in texts}) == 3
    assert len({re.sub(r"/\*.*?\*/", "", statement.sql) for statement in texts}) == 1


# -- marks ---------------------------------------------------------------------------------


def taken(priority: int, due_at: int) -> Taken:
    return Taken(1, priority, 1, 1, due_at, None, b"")


def test_marks_move_with_what_was_taken() -> None:
    """From the last job taken on; where nothing was left, from a moment before now on."""
    marks = Marks()
    assert marks.ask() == (MARKS, True)
    assert marks.ask()[1] is False, "one full look at a time"
    marks.note(Look([taken(5, 7_000_000)], 9_000_000, 0, None), 1, True, 0.0)
    at = marks.ask()[0]
    assert at == [8_750_000] * 4 + [7_000_000] + [FIRST] * 5, "9 to 6 were looked through"
    marks.note(Look([], 20_000_000, 0, None), 1, False, 0.0)
    assert marks.ask()[0] == [19_750_000] * 10
    marks.note(Look([taken(9, 29_900_000)], 30_000_000, 0, None), 1, False, 0.0)
    assert marks.ask()[0][0] == 29_750_000, "a put that overtook another is seen first"
    marks.note(Look([], 1_000_000, 0, None), 1, False, 0.0)
    assert marks.ask()[0] == [29_750_000] + [19_750_000] * 9, "a clock set back moves none back"


def test_a_full_look_that_finds_an_old_job_goes_back_to_it() -> None:
    """There may be more where it was."""
    marks = Marks()
    marks.note(Look([], 20_000_000, 0, None), 1, False, 0.0)
    marks.note(Look([taken(9, 3_000_000)], 21_000_000, 0, None), 1, True, 0.0)
    assert marks.ask()[0][0] == 3_000_000


def test_full_looks_take_a_twentieth_of_the_time() -> None:
    """The longer one takes, the longer until the next."""
    marks = Marks()
    marks.note(Look([], 1, 0, None), 1, True, 100.0)
    assert marks._full_from > 1900
    assert not marks.ask()[1]
