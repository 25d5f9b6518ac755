"""Every statement of the store: may it be repeated blindly, and does its text keep the rules."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from pgkv import Config, ScanOptions, Store, TtlCleanupStrategy
from pgkv._ops.op import Op, Statement
from pgkv._sql import INCREMENTS, SETS, Statements
from pgkv._sql.point import PointStatements
from tests.each import for_each

LATER = datetime(2999, 1, 1, tzinfo=UTC)
KEYS = [f"k{n}" for n in range(20)]

# May be sent again when the answer to the first sending was lost.
Call = Callable[[Statements], Any]
SAFE: dict[str, Call] = {
    "get": lambda s: s.get("k"),
    "get_raw": lambda s: s.get_raw([b"k"]),
    "get_entry": lambda s: s.get_entry("k"),
    "exists": lambda s: s.exists("k"),
    "ttl": lambda s: s.ttl("k"),
    "get_many": lambda s: s.get_many(KEYS),
    "get_many of few": lambda s: s.get_many(KEYS[:3]),
    "exists_many": lambda s: s.exists_many(KEYS),
    "keys": lambda s: s.keys(ScanOptions()),
    "keys with a prefix": lambda s: s.keys(ScanOptions(prefix="a", after="ab", limit=1)),
    "keys with bounds": lambda s: s.keys(ScanOptions(start="a", end="b", include_expired=True)),
    "keys after": lambda s: s.keys(ScanOptions(after="a")),
    "dump": lambda s: s.dump(ScanOptions()),
    "scan": lambda s: s.scan(ScanOptions(prefix="a", end="b")),
    "count": lambda s: s.count("a", False),
    "count of all": lambda s: s.count("", True),
    "stats": lambda s: s.stats(),
    "ping": lambda s: s.ping(),
    "now": lambda s: s.now(),
    "reach": lambda s: s.reach(),
    "citus": lambda s: s.citus(),
    "may_maintain": lambda s: s.may_maintain("vacuum"),
    "pages": lambda s: s.pages(),
    "set": lambda s: s.set("k", b"v"),
    "set with ttl": lambda s: s.set("k", b"v", 60),
    "set at": lambda s: s.set("k", b"v", None, LATER),
    "set keep_ttl": lambda s: s.set("k", b"v", None, None, True),
    "set_many": lambda s: s.set_many({"k": b"v"}),
    "set_many with ttl": lambda s: s.set_many({"k": b"v"}, 60),
    "sets merged": lambda s: s.merged(SETS, [(b"a", b"v"), (b"b", b"v")]),
    "sets with ttl merged": lambda s: s.merged(SETS, [(b"a", b"v", b"t"), (b"b", b"v", b"t")]),
    "delete": lambda s: s.delete("k"),
    "delete_many": lambda s: s.delete_many(KEYS),
    "expire": lambda s: s.expire("k", 60),
    "expire_at": lambda s: s.expire_at("k", LATER),
    "expire_many": lambda s: s.expire_many(KEYS, 60),
    "persist": lambda s: s.persist("k"),
    "collect": lambda s: s.collect([b"k"]),
    "mark": lambda s: s.mark([b"k"]),
    "sweep": lambda s: s.sweep(0),
    "sweep_alone": lambda s: s.sweep_alone(0),
}
UNSAFE: dict[str, Call] = {
    "set if_version": lambda s: s.set("k", b"v", None, None, False, 7),
    "set if_version with ttl": lambda s: s.set("k", b"v", 60, None, False, 7),
    "set if_version keep_ttl": lambda s: s.set("k", b"v", None, None, True, 7),
    "set if absent": lambda s: s.set("k", b"v", None, None, False, 0),
    "set_nx": lambda s: s.set_nx("k", b"v"),
    "set_nx with ttl": lambda s: s.set_nx("k", b"v", 60),
    "set_xx": lambda s: s.set_xx("k", b"v"),
    "set_xx with ttl": lambda s: s.set_xx("k", b"v", 60),
    "delete if_version": lambda s: s.delete("k", 7),
    "expire if_version": lambda s: s.expire("k", 60, 7),
    "increment": lambda s: s.increment("k"),
    "increment with ttl": lambda s: s.increment("k", 1, 60),
    "increment if it exists": lambda s: s.increment("k", 1, None, True),
    "increment within": lambda s: s.increment("k", 1, None, False, 0, 9),
    "increment within with ttl": lambda s: s.increment("k", 1, 60, False, 0, 9),
    "append": lambda s: s.append("k", b"v"),
    "append with ttl": lambda s: s.append("k", b"v", 60),
    "increment_many": lambda s: s.increment_many({"k": 1}),
    "increment_many with ttl": lambda s: s.increment_many({"k": 1}, 60),
    "increments merged": lambda s: s.merged(INCREMENTS, [(b"a", b"1"), (b"b", b"1")]),
    "get_and_set": lambda s: s.get_and_set("k", b"v"),
    "get_and_set with ttl": lambda s: s.get_and_set("k", b"v", 60),
    "get_and_delete": lambda s: s.get_and_delete("k"),
    "get_and_touch": lambda s: s.get_and_touch("k", 60),
    "compare_and_swap": lambda s: s.compare_and_swap("k", b"a", b"b"),
    "compare_and_swap with ttl": lambda s: s.compare_and_swap("k", b"a", b"b", 60),
    "compare_and_swap of none": lambda s: s.compare_and_swap("k", None, b"b"),
    "compare_and_swap of none with ttl": lambda s: s.compare_and_swap("k", None, b"b", 60),
    "swap_version": lambda s: s.swap_version("k", 7, b"b"),
    "swap_version with ttl": lambda s: s.swap_version("k", 7, b"b", 60),
    "compare_and_delete": lambda s: s.compare_and_delete("k", b"a"),
    "delete_prefix": lambda s: s.delete_prefix("a"),
    "clear": lambda s: s.delete_prefix(""),
    "truncate": lambda s: s.truncate(),
    "vacuum": lambda s: s.vacuum(),
    "analyze": lambda s: s.analyze(),
    "evict": lambda s: s.evict(1000, 4, 100, 1.0, 1.0),
    "vacuum of what was evicted": lambda s: s.vacuum_idle(),
}
ALL = SAFE | UNSAFE


def ops_of(answer: Any) -> list[Op[Any]]:
    """The operations in what a factory returns."""
    if isinstance(answer, Op):
        return [answer]
    return [op for part in answer if isinstance(part, Op | list) for op in ops_of(part)]


def statement(
    call: Call, strategy: TtlCleanupStrategy = TtlCleanupStrategy.ON_READ
) -> Statement[Any]:
    sql = Statements(Config("postgresql://", ttl_cleanup_strategy=strategy))
    (op,) = ops_of(call(sql))
    return op.statement


TEXTS = sorted(
    {
        (name, text)
        for name, call in ALL.items()
        for strategy in TtlCleanupStrategy
        for text in (statement(call, strategy).sql, statement(call, strategy).sql_18)
        if text is not None
    }
)
every_text = for_each([text for _, text in TEXTS])


@for_each(SAFE)
def test_repeated_when_the_outcome_is_unknown(name: str) -> None:
    """Reads, unconditional writes and collecting may be sent twice."""
    assert statement(SAFE[name]).retry_safe


@for_each(UNSAFE)
def test_never_repeated_once_sent(name: str) -> None:
    """What tests, counts, hands out or destroys in bulk is never sent twice."""
    assert not statement(UNSAFE[name]).retry_safe


def test_no_statement_is_left_out() -> None:
    """Each factory of statements is in one of the two lists above."""
    called: set[str] = set()

    class Watched(Statements):
        def __getattribute__(self, name: str) -> Any:
            called.add(name)
            return super().__getattribute__(name)

    for call in ALL.values():
        call(Watched(Config("postgresql://")))
    helpers = {
        "upsert",
        "locked",
        "statement",
        "made",
        "key",
        "value",
        "read_key",
        "distinct",
        "mergeable",
    }
    helpers |= {"strict", "load_sql", "of", "transforms"}
    factories = (
        {
            name
            for kind in Statements.__mro__
            for name in vars(kind)
            if not name.startswith("_") and kind is not object
        }
        - helpers
        - {"config"}
    )
    assert factories <= called
    assert issubclass(Statements, PointStatements)


def test_statements_are_named_as_their_callers_know_them() -> None:
    """Messages and metrics name what was called, not how it is done; but for what pgkv does itself."""
    own = {"collect", "cleanup", "mark"}
    for name, call in ALL.items():
        found = statement(call).name
        assert found in own or hasattr(Store, found), name


def test_reads_do_not_count_as_writes() -> None:
    """Reads and collecting are no writes; all else is. `repeat_writes=False` goes by this."""
    reads = {
        "get", "get_entry", "exists", "ttl", "get_many", "exists_many", "keys", "scan", "count",
        "stats", "ping", "now", "connect", "collect", "cleanup",
        "mark", "evict",
    }  # fmt: skip
    commands = {"truncate", "vacuum", "analyze"}
    for name, call in ALL.items():
        found = statement(call)
        assert found.writes == (found.name not in reads | commands), name


def test_only_what_can_race_is_asked_again() -> None:
    """CAS, get_and_set and increment may answer "raced"; a plain increment is repeated once."""
    for name, call in ALL.items():
        found = statement(call)
        if name in ("increment", "increment with ttl") or found.name == "append":
            assert found.repeats == 1
        elif found.name in ("compare_and_swap", "get_and_set"):
            assert found.repeats >= 100, name
        else:
            assert found.repeats in (0, 100), name


def test_refusals_that_spare_the_callers_transaction() -> None:
    """Increments and CAS run under a savepoint in the caller's transaction."""
    under_savepoint = {name for name, call in ALL.items() if statement(call).savepoint}
    assert under_savepoint == {
        name
        for name in ALL
        if name.startswith(("increment", "append", "compare_and_swap", "swap_version"))
    }


# -- the rules of the texts ------------------------------------------------------------------


def conflict_clause(text: str) -> str:
    """What stands between ON CONFLICT and RETURNING (or the end of the CTE)."""
    _, found, rest = text.partition("ON CONFLICT")
    return re.split(r" RETURNING |\) SELECT ", rest)[0] if found else ""


@every_text
def test_no_clock_that_stands_still(text: str) -> None:
    """now(), CURRENT_TIMESTAMP and transaction_timestamp() stand still inside a transaction."""
    assert not re.search(
        r"\bnow\(|current_timestamp|transaction_timestamp|localtime", text, re.IGNORECASE
    )


@every_text
def test_clocks_are_unqualified(text: str) -> None:
    """A test's search_path can put a clock of its own before the server's."""
    assert not re.search(r"\.\s*\"?(clock|statement)_timestamp", text)


@every_text
def test_updates_and_deletes_use_the_stable_clock(text: str) -> None:
    """clock_timestamp() stands in INSERT lists only (Citus refuses it in UPDATE), and where a
    sum is looked at again.
    """
    text = re.sub(
        r" SELECT (key, |0, )?(value|octet_length\(value\)), "
        r"coalesce\(expires_at <= clock_timestamp\(\), false\) FROM up",
        "",
        text,
    )
    if "clock_timestamp()" not in text:
        return
    assert "INSERT INTO" in text
    before, _, rest = text.partition("INSERT INTO")
    inserted, _, after = rest.partition("ON CONFLICT")
    assert "clock_timestamp()" in inserted
    assert "clock_timestamp()" not in before
    assert "clock_timestamp()" not in after


@every_text
def test_nothing_mutable_on_conflict(text: str) -> None:
    """ON CONFLICT SET and WHERE hold no function that Citus refuses there, and no
    timestamptz + interval.
    """
    clause = conflict_clause(text)
    functions = set(re.findall(r"\b([a-z_]+)\(", clause))
    assert functions <= {"greatest", "substring", "encode", "octet_length"}, functions
    assert "::interval" not in clause
    assert "statement_timestamp" not in clause


@every_text
def test_returning_reads_no_clock(text: str) -> None:
    """RETURNING calls no function at all."""
    for returned in re.findall(r" RETURNING (.*?)(?:\)|$)", text):
        assert "timestamp" not in returned
        assert not re.search(r"\b[a-z_]+\(", returned)


@every_text
def test_ranges_and_order_say_their_collation(text: str) -> None:
    """Whatever orders or ranges over keys says COLLATE "C"."""
    bare = text.replace('key COLLATE "C"', "KEY")
    assert not re.search(r"ORDER BY (\w+\.)?key\b", bare)
    assert not re.search(r"\bkey (<|>|LIKE|BETWEEN)", bare)
    assert "LIKE" not in bare


@every_text
def test_rows_are_locked_in_key_order(text: str) -> None:
    """An UPDATE or DELETE of several keys first locks them in key order, or skips locked ones."""
    many = "ANY($1" in text and re.search(r"\b(UPDATE|DELETE FROM) ", text)
    if many or text.startswith("WITH l AS"):
        ordered = 'ORDER BY key COLLATE "C" FOR UPDATE)' in text and "l AS MATERIALIZED" in text
        assert ordered or "SKIP LOCKED" in text


@every_text
def test_no_physical_addresses(text: str) -> None:
    """ctid and advisory locks are for sweeps only; xmax for nobody."""
    assert "xmax" not in text
    if "pg_relation_size" not in text:
        assert "ctid" not in text
        assert "advisory" not in text


@every_text
def test_placeholders_are_complete(text: str) -> None:
    """Placeholders are numbered from $1 without a gap."""
    numbers = {int(n) for n in re.findall(r"\$(\d+)", text)}
    assert numbers == set(range(1, len(numbers) + 1))


@for_each(ALL)
def test_parameters_fit_their_formats(name: str) -> None:
    """Each operation has as many parameters as its statement has placeholders and formats."""
    for strategy in TtlCleanupStrategy:
        sql = Statements(Config("postgresql://", ttl_cleanup_strategy=strategy))
        for op in ops_of(ALL[name](sql)):
            numbers = {int(n) for n in re.findall(r"\$(\d+)", op.statement.sql)}
            assert len(op.params) == len(op.statement.formats) == len(numbers)


def test_one_text_per_shape() -> None:
    """The same call makes the same statement, so that it is prepared once."""
    sql = Statements(Config("postgresql://"))
    for name, call in ALL.items():
        assert ops_of(call(sql))[0].statement is ops_of(call(sql))[0].statement, name


def test_prepared_names_follow_the_text() -> None:
    """Statements with the same text share a prepared name; others have one of their own."""
    names: dict[bytes, str] = {}
    for text_name, call in ALL.items():
        found = statement(call)
        assert names.setdefault(found.prepared_name, found.sql) == found.sql, text_name
        assert len(found.prepared_name) < 64


def test_table_names_are_quoted_everywhere() -> None:
    """No text names the table but in quotes."""
    config = Config("postgresql://", table_name='we"ird; --', schema="s'ch")
    for name, call in ALL.items():
        for op in ops_of(call(Statements(config))):
            text = op.statement.sql.replace("''", "'")
            assert 'we"ird' not in text.replace('"we""ird; --"', "").replace("'s'ch'", ""), name
