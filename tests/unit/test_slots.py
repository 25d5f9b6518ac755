"""To which slot a key belongs."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pgkv
from pgkv._ops.op import TEXT, Statement
from pgkv._shards import cluster
from pgkv._shards.channel import InThreads
from pgkv._shards.cluster import CitusCluster
from pgkv._shards.placement import Router
from pgkv._shards.slots import ANY, ShardedConfig, Slots, hashed_part, schema_of
from pgkv._shards.sql import InSlot, ShardedStatements, located
from pgkv._shards.store import settings, sharded_config, split
from pgkv._sql import Statements
from pgkv.cli import main
from pgkv.patterns.rate_limit.sql import LimiterStatements
from tests.unit.test_statements import ALL, KEYS, ops_of

SLOTS = Slots(32)


@pytest.mark.parametrize(
    ("key", "slot"),
    [(b"a", 3), (b"user:1", 2), (b"{user:1}:cart", 2), (b"{}:x", 21), ("\u00e9".encode(), 30)],
)
def test_slots_never_change(key: bytes, slot: int) -> None:
    """Where a key is, was decided for ever: these are in the databases of users."""
    assert SLOTS.of(key) == slot


@pytest.mark.parametrize(
    ("key", "part"),
    [
        (b"a{b}c", b"b"),
        (b"{b}{c}", b"b"),
        (b"{{b}}", b"{b"),
        (b"a{}b{c}", b"a{}b{c}"),
        (b"a}b{c", b"a}b{c"),
        (b"a{b", b"a{b"),
    ],
)
def test_a_tag_decides(key: bytes, part: bytes) -> None:
    """The text in the first braces, if there is some and they close; else all of the key."""
    assert hashed_part(key) == part


@given(st.binary(max_size=20), st.binary(max_size=20), st.binary(min_size=1, max_size=9))
def test_keys_of_one_tag_are_together(before: bytes, after: bytes, tag: bytes) -> None:
    """Whatever else they contain."""
    if not set(b"{}") & set(before + tag):
        assert SLOTS.of(before + b"{" + tag + b"}" + after) == SLOTS.of(b"{" + tag + b"}")


def test_a_view_refuses_other_slots() -> None:
    """With the message that says what to do."""
    own = Slots(32, SLOTS.of(b"a"))
    assert own.check(b"a") == b"a"
    message = r"'user:1' is in slot 2, .*: give both keys one \{tag\}"
    with pytest.raises(pgkv.ConfigError, match=message):
        own.check(b"user:1")
    sql = LimiterStatements(ShardedConfig("postgresql://", schema="pgkv_03", shards=own))
    assert sql.key("a") == b"a"
    with pytest.raises(pgkv.ConfigError, match=message):
        sql.many_keys(["a", "user:1"])


def test_a_statement_in_a_slot() -> None:
    """Names the slot's tables, as text and as a name in a literal, and keeps what else it is."""
    sql = Statements(pgkv.Config("postgresql://", schema=ANY))
    for op in (sql.get("k"), sql.stats()):
        there = located(op.statement, 7)
        assert ANY not in there.sql
        assert '"pgkv_07"."kv_store"' in there.sql
        assert there.table
        assert there.table.schema == "pgkv_07"
        assert there.decode is op.statement.decode
        assert there.prepared_name != op.statement.prepared_name
    assert [schema_of(7), schema_of(100)] == ["pgkv_07", "pgkv_100"]


EVERYWHERE = ("keys", "dump", "scan", "count", "stats", "delete_prefix", "clear")
OF_NO_TABLE = ("ping", "now", "reach", "citus")
# Performed for each slot by itself, or never for a sharded store.
WITHIN = (
    "pages",
    "may_maintain",
    "collect",
    "mark",
    "sweep",
    "truncate",
    "vacuum",
    "analyze",
    "evict",
    "get_raw",
)


@pytest.mark.parametrize("name", sorted(ALL))
def test_where_an_operation_goes(name: str) -> None:
    """To the slots of its keys, to all, or to any server, and nothing by accident."""
    config = sharded_config(pgkv.Config("postgresql://", schema=ANY), SLOTS)
    router = Router(config, [], lambda _: [])
    router.slots, router.channels = SLOTS, [None] * SLOTS.count
    if name.startswith(WITHIN) or "merged" in name:
        pytest.skip("not routed")
    slots = {
        slot
        for op in ops_of(ALL[name](ShardedStatements(config)))
        for slot, _ in router.parts(op, 0)
    }
    if name.startswith(EVERYWHERE):
        assert slots == {*range(SLOTS.count)}
    elif name in OF_NO_TABLE:
        assert slots == {0}
    else:
        assert slots in [
            {SLOTS.of(key.encode()) for key in keys} for keys in (["k"], KEYS, KEYS[:3])
        ]


def test_a_sweep_in_a_slot() -> None:
    """Is kept from others by the slot's own table."""
    sql = InSlot(Statements(pgkv.Config("postgresql://", schema=ANY)), 7)
    op = sql.sweep_alone(0)
    assert op.params[-1] == b'"pgkv_07"."kv_store"'
    assert 'FROM "pgkv_07"."kv_store"' in op.statement.sql


def test_a_statement_of_no_table_is_the_same_everywhere() -> None:
    """There is nothing to replace."""
    ping = Statement("ping", "SELECT $1", (TEXT,), lambda _: None)
    assert located(ping, 3).sql == ping.sql


@pytest.mark.parametrize(
    ("text", "dsns"),
    [
        ("postgresql://a postgresql://b", ["postgresql://a", "postgresql://b"]),
        ("postgresql://a,b/db", ["postgresql://a,b/db"]),
        ("host=a dbname=b", ["host=a dbname=b"]),
        ("embedded:///x\nembedded:///y", ["embedded:///x", "embedded:///y"]),
    ],
)
def test_several_dsns_in_one_setting(text: str, dsns: list[str]) -> None:
    """URIs with spaces between; a conninfo string has spaces of its own."""
    assert split(text) == dsns


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((["postgresql://"], None, "citys"), {}, "placement"),
        ((["postgresql://"], "32", "auto"), {}, "slots must be an integer"),
        (("postgresql://", None, "auto"), {}, "list of DSNs"),
        (([], None, "auto"), {}, "at least one"),
        ((["postgresql://"], None, "auto"), {"schema": "s"}, "no schema="),
        ((["postgresql://"], None, "auto"), {"coalesce": True}, "no coalesce="),
        ((["postgresql://"], None, "auto"), {"notify": True}, "no notify="),
        ((["postgresql://"], None, "auto"), {"variant": 1}, "no option 'variant'"),
        ((["mysql://"], None, "auto"), {}, "scheme"),
    ],
)
def test_wrong_settings(
    args: tuple[object, object, object], options: dict[str, object], message: str
) -> None:
    """Are refused before anything is connected."""
    with pytest.raises(pgkv.ConfigError, match=message):
        settings(*args, options)


@pytest.mark.parametrize(
    ("args", "servers"),
    [
        (("--rate", "104000"), 1),
        (("--rate", "105000"), 2),
        (("--rate", "250000"), 3),
        (("--rate", "250000", "--slots", "3", "--cores", "3.5"), 3),
        (("--rate", "250000", "--slots", "4", "--cores", "3.5"), 4),  # with 3 one has 2 of the 4
        (("--rate", "5000000", "--slots", "8"), None),
        (("--rate", "28000", "--mix", "hit=1"), 1),
    ],
)
def test_the_plan(
    args: tuple[str, ...], servers: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many servers as keep the one with the most slots at 70 % of its processor."""
    assert main(["shards", "plan", *args, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["servers"] == servers


def test_the_table_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    """Is what the command says."""
    page = (Path(__file__).parents[2] / "docs/scaling.md").read_text("utf-8")
    found = re.findall(r"^\| `(\S+=\S+)`( on Citus)? \| ([\d,]+)/s \| (.*) \|$", page, re.MULTILINE)
    assert len(found) == 4
    for mix, citus, each, servers in found:
        for rate, count in zip((50_000, 250_000, 1_000_000), servers.split(" | "), strict=True):
            args = ["--mix", mix, "--rate", str(rate), *(["--citus"] if citus else [])]
            assert main(["shards", "plan", *args, "--json"]) == 0
            said = json.loads(capsys.readouterr().out)
            assert f"{said['a_server']:,}" == each
            assert str(said["servers"] or "more than 32") == count


@pytest.mark.parametrize(
    "args", [("plan",), ("plan", "--rate", "5", "--mix", "x=1"), ("check", "--rate", "5")]
)
def test_a_plan_that_cannot_be(args: tuple[str, ...]) -> None:
    """Is wrong usage."""
    assert main(["shards", *args]) == 2


def test_without_threads_each_call_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no thread can be started, calls that were queued are made here, and never later."""
    together = InThreads()
    made: list[int] = []
    submit = together._threads.submit
    queued: list[Any] = []

    def refuse(work: Any, *args: Any) -> None:
        queued.append(lambda: work(*args))
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(together._threads, "submit", refuse)

    def make(number: int) -> int:
        made.append(number)
        return number

    assert together([partial(make, number) for number in range(3)]) == [0, 1, 2]
    monkeypatch.setattr(together._threads, "submit", submit)
    for late in queued:
        late()
    assert sorted(made) == [0, 1, 2]
    together.close()


@pytest.mark.parametrize("how", [["--online"], ["--drop"], ["--drop", "--yes"]], ids=" ".join)
def test_on_citus_moves_are_of_one_kind(
    how: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What a mover of pgkv's own could do is refused there, before anything is asked or moved."""
    found = CitusCluster.__new__(CitusCluster)
    found.slots, found._given = 4, []
    monkeypatch.setattr(cluster, "administered", lambda *_: found)
    assert main(["shards", "move", "0", "--to", "n2", *how, "--dsn", "postgresql:///"]) == 2
    assert "Citus moves slots in its own way: leave out --online and --drop" in " ".join(
        capfd.readouterr().err.split()
    )
