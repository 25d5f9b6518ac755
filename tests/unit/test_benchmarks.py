"""The benchmark's arithmetic, its table and its page, from made-up samples. Nothing is timed here."""

from __future__ import annotations

import os
import re
import select
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import msgspec
import pytest

from tests import servers
from tests.benchmarks import __main__ as program
from tests.benchmarks import readme, services
from tests.benchmarks.case import CASES, MEMCACHED, Bench, Case
from tests.benchmarks.cases import TOPICS
from tests.benchmarks.cases.batch import LIBMC, libmc
from tests.benchmarks.figures import (
    LATENCY,
    THROUGHPUT,
    Comparison,
    Fact,
    Goal,
    Result,
    Summary,
    result,
    summary,
)
from tests.benchmarks.page import BEGIN, END, NBSP, figures, updated
from tests.benchmarks.placement import LINK, ONE_CORE, TWO_CORES, cpu_clock
from tests.benchmarks.record import LIBRARIES, Record, Section, completed, merged, read, write
from tests.benchmarks.relay import DELAY, relayed
from tests.benchmarks.table import absent, rendered, rows

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
MICRO = 1e-6


@pytest.fixture
def record() -> Record:
    """Two cases and a fact; Redis was not there."""
    samples = {"pgkv": [12 * MICRO, 10 * MICRO, 30 * MICRO], "raw": [10 * MICRO] * 3}
    goals: dict[tuple[str, str], Goal | None] = {
        ("pgkv", "raw"): Goal(1.25),
        ("pgkv", "redis"): Goal(0.75),
    }
    cpu = {"pgkv": [(3 * MICRO, 2 * MICRO)] * 3, "raw": [(1 * MICRO, 3 * MICRO)] * 3}
    many = {"pgkv": [1 / 9_000], "pgkv, coalescing": [1 / 60_000], "redis": [1 / 3_000]}
    timed = [
        result("get", LATENCY, samples, goals, TWO_CORES, cpu),
        result(
            "8 tasks",
            THROUGHPUT,
            many,
            {("pgkv", "redis"): Goal(4.0, at_least=True), ("pgkv, coalescing", "redis"): None},
        ),
    ]
    facts = [Fact("memory", 21.5, "MiB", Goal(20.0))]
    machine = {"system": "Linux", "architecture": "x86_64", "cores": "2"}
    sections = [Section("One key", timed[:1], []), Section("Size", timed[1:], facts)]
    return Record(machine, {"Python": "3.11"}, 3, sections)


def test_summary() -> None:
    """Median and quartiles, also of a single sample."""
    assert summary([4.0, 1.0, 3.0, 2.0, 5.0]) == Summary(3.0, 2.0, 4.0)
    assert summary([7.0]) == Summary(7.0, 7.0, 7.0)


def test_a_ratio_is_made_within_each_round() -> None:
    """A round in which everything was ten times slower does not change the ratio."""
    samples = {"ours": [2.0, 20.0, 2.0, 30.0], "theirs": [1.0, 10.0, 1.0, 15.0]}
    made = result("case", LATENCY, samples, {("ours", "theirs"): None})
    assert made.comparisons == [Comparison("ours", "theirs", Summary(2.0, 2.0, 2.0, 2.0), None)]


def test_a_latency_has_a_goal_for_each_placement() -> None:
    """Two numbers are of one core and of two; one number is of both."""
    made = Case("get", lambda _: iter(()), {("a", "b"): (1.2, 1.0), ("a", "c"): 2.0}, 1, LATENCY)
    assert made.goals_at(ONE_CORE) == {("a", "b"): Goal(1.2), ("a", "c"): Goal(2.0)}
    assert made.goals_at(TWO_CORES) == {("a", "b"): Goal(1.0), ("a", "c"): Goal(2.0)}
    assert made.goals_at(LINK) == {("a", "b"): None, ("a", "c"): None}


def test_what_processes_have_run_is_told() -> None:
    """That of this one grows with what it does, and a process that is gone changes nothing."""
    with cpu_clock([os.getpid(), 1 << 30]) as clock:
        if clock is None:
            pytest.skip("no schedstat here")
        before = clock()

        def has_run() -> bool:
            sum(range(10**5))
            return clock() > before

        servers.wait_until(has_run, "what it has run is told")


def test_what_is_started_later_is_told() -> None:
    """A server starts a process for a new connection."""
    busy = "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; echo done; read y"
    with subprocess.Popen(
        ["/bin/sh", "-c", f"read x; sh -c '{busy}'; true"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        with cpu_clock([parent.pid]) as clock:
            if clock is None or not Path(f"/proc/{parent.pid}/task/{parent.pid}/children").exists():
                pytest.skip("no schedstat, or no list of children, here")
            before = clock()
            print(file=parent.stdin, flush=True)
            assert parent.stdout.readline() == "done\n"
            assert clock() - before > 0.005
        parent.stdin.close()


@pytest.mark.skipif(not hasattr(select, "epoll"), reason="no epoll here")
def test_a_message_through_the_relay_is_held_back(tmp_path: Path) -> None:
    """By a tenth of a millisecond each way, whole and in order; an end is passed on."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "far"))
        server.listen()
        with (
            relayed({tmp_path / "near": tmp_path / "far"}),
            socket.socket(socket.AF_UNIX) as client,
        ):
            client.connect(str(tmp_path / "near"))
            theirs, _ = server.accept()
            started = time.perf_counter()
            client.sendall(b"ask")
            assert theirs.recv(10) == b"ask"
            theirs.sendall(b"answer")
            assert client.recv(10) == b"answer"
            assert time.perf_counter() - started >= 2 * DELAY
            client.shutdown(socket.SHUT_WR)
            assert theirs.recv(10) == b""
            theirs.close()


def test_throughput_is_a_ratio_of_rates() -> None:
    """Half the time per operation is twice the throughput."""
    made = result("case", THROUGHPUT, {"a": [0.5], "b": [1.0]}, {("a", "b"): Goal(2, True)})
    assert made.entrants["a"].median == 2.0
    assert made.comparisons[0].ratio == Summary(2.0, 2.0, 2.0, 2.0)
    assert made.comparisons[0].is_met


@pytest.mark.parametrize(
    ("goal", "value", "met"),
    [
        (Goal(1.25), 1.25, True),
        (Goal(1.25), 1.26, False),
        (Goal(3, at_least=True), 3.0, True),
        (Goal(3, at_least=True), 2.9, False),
    ],
)
def test_goals(goal: Goal, value: float, met: bool) -> None:
    """The limit itself is met."""
    assert goal.is_met(value) is met


def test_rows(record: Record) -> None:
    """One row per comparison and fact, with the verdict; what did not run says so."""
    assert [tuple(row) for row in rows(record.results, record.facts)] == [
        ("get", "two cores", "12.0 µs", "raw", "10.0 µs", "1.20 (1.10-2.10)", "1.00", "1.25",
         "≤ 1.25", "met"),
        ("get", "two cores", "12.0 µs", "redis", "not measured", "", "", "", "≤ 0.75", ""),
        ("8 tasks", "", "9,000 op/s", "redis", "3,000 op/s", "3.00 (3.00-3.00)", "3.00", "", "≥ 4",
         "missed"),
        ("8 tasks (coalescing)", "", "60,000 op/s", "redis", "3,000 op/s", "20.00 (20.00-20.00)",
         "20.00", "", "", ""),
        ("memory", "", "21.5 MiB", "", "", "", "", "", "≤ 20 MiB", "missed"),
    ]  # fmt: skip


def test_table(record: Record) -> None:
    """The terminal's table has all the rows."""
    assert rendered(record.results, record.facts).row_count == 5


def test_record_travels(record: Record, tmp_path: Path) -> None:
    """What is written is what is read."""
    write(tmp_path / "benchmarks.json", record)
    assert read(tmp_path / "benchmarks.json") == record


def test_page_is_updated_between_its_markers(record: Record) -> None:
    """Figures are replaced, the rest of the page stays, and a second update changes nothing."""
    once = updated(f"before\n{BEGIN}\nold\n{END}\nafter\n", figures(record))
    assert once.startswith(f"before\n{BEGIN}\n")
    assert once.endswith(f"{END}\nafter\n")
    assert "old" not in once
    assert "| **pgkv** | **12.0** |" in once
    assert updated(once, figures(record)) == once


def test_a_topic_is_a_table_of_its_cases(record: Record) -> None:
    """A column for each case, a row for each entrant, ours first; what did not run says so."""
    text = figures(record)
    for line in (
        "### One key",
        "| µs per call, two cores | get |",
        "| **pgkv** | **12.0** |",
        f"| raw | 10.0{NBSP}(1.20) |",
        "| redis | not measured |",
        "| µs of CPU per call: client + servers, two cores | get |",
        "| raw | 1.0\N{THIN SPACE}+\N{THIN SPACE}3.0 |",
        "### Size",
        "| calls per second | 8 tasks |",
        "| pgkv, coalescing | 60,000 |",
        "| memory | 21.5 MiB |",
    ):
        assert line in text.splitlines()


def test_a_cell_of_a_case_without_that_entrant_is_empty(record: Record) -> None:
    """Empty is not the same as not measured: nobody meant to."""
    samples = {"pgkv": [MICRO], "fourth": [2 * MICRO]}
    other = result("set", LATENCY, samples, {("pgkv", "fourth"): None}, TWO_CORES)
    record.sections[0].results.append(other)
    text = figures(record)
    assert f"| raw | 10.0{NBSP}(1.20) |  |" in text
    assert f"| fourth |  | 2.0{NBSP}(0.50) |" in text


def test_targets_stand_in_a_table_of_their_own(record: Record) -> None:
    """Comparison by comparison, with quartiles and verdict; without the figures that have none."""
    targets = figures(record).partition("### Targets")[2]
    assert (
        "| get | two cores | 12.0 µs | raw | 10.0 µs | 1.20 (1.10-2.10) | 1.00 | 1.25 | ≤ 1.25 | met |"
        in targets
    )
    assert "coalescing" not in targets


def test_missing_entrants_are_named(record: Record) -> None:
    """A server or a library that is not installed leaves no silent hole in the table."""
    assert absent(record.results) == ["redis"]


def test_every_case_has_its_topic() -> None:
    """A case is run and shown once, under one heading."""
    shown = [each.name for topic in TOPICS if not topic.is_linked for each in topic.cases()]
    assert sorted(shown) == sorted(each.name for each in CASES)


def test_a_partial_run_leaves_the_other_figures(record: Record) -> None:
    """What was measured anew replaces its like where it stood; the rest of the record stays."""
    samples = {"pgkv": [MICRO], "raw": [MICRO]}
    again = result("get", LATENCY, samples, {("pgkv", "raw"): None}, TWO_CORES)
    added = Fact("new", 1.0, "MiB")
    sections = [Section("One key", [again], []), Section("Size", [], [added])]
    found = merged(record, msgspec.structs.replace(record, sections=sections))
    assert found.results == [again, record.results[1]]
    assert found.facts == [*record.facts, added]


@pytest.mark.parametrize(
    ("differing", "change"),
    [
        ("rounds", {"rounds": 4}),
        ("machine", {"machine": {"system": "Linux", "architecture": "arm64", "cores": "2"}}),
        ("Python", {"versions": {"Python": "3.12"}}),
    ],
)
def test_runs_that_differ_are_not_merged(
    record: Record, differing: str, change: dict[str, object]
) -> None:
    """Figures of one page were made on one machine, with one set of versions."""
    with pytest.raises(ValueError, match=differing):
        merged(record, msgspec.structs.replace(record, **change))


def test_a_merged_record_knows_the_versions_of_both_runs(record: Record) -> None:
    """A peer that was installed in between is no difference."""
    old = msgspec.structs.replace(record, versions={"Python": "3.11", "Redis": "7"})
    new = msgspec.structs.replace(record, versions={"Python": "3.11", "memcached": "1.6"})
    assert merged(old, new).versions == {"Python": "3.11", "Redis": "7", "memcached": "1.6"}


def test_sizes_that_are_measured_alone_leave_the_costs_of_the_times(record: Record) -> None:
    """The machine may be busy then: it is the times that need to know."""
    sizes = msgspec.structs.replace(record, sections=[Section("Growth", [], [Fact("a", 1, "MiB")])])
    found = merged(record, msgspec.structs.replace(sizes, costs={"system call": 9.0}))
    assert found.costs == record.costs
    assert [each.topic for each in found.sections] == [
        *(each.topic for each in record.sections),
        "Growth",
    ]


def test_a_whole_run_keeps_the_topics_that_others_measure(record: Record) -> None:
    """`make bench` does not measure growth, and does not remove it; on another machine it does."""
    growth = Section("Growth", [], [Fact("a", 1, "MiB")])
    old = msgspec.structs.replace(record, sections=[*record.sections, growth])
    new = msgspec.structs.replace(record, sections=list(record.sections))
    assert completed(old, new).sections == old.sections
    other = msgspec.structs.replace(record, machine={"cores": "4"}, sections=list(record.sections))
    assert growth not in completed(old, other).sections


def test_page_and_plot_are_made_from_the_record_alone(
    record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--redraw starts no server."""
    write(tmp_path / "benchmarks.json", record)
    (tmp_path / "performance.md").write_text(f"{BEGIN}\n{END}\n")
    monkeypatch.setattr(services, "running", None)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--redraw", "--output", str(tmp_path)])
    program.main()
    assert f"| raw | 10.0{NBSP}(1.20) |" in (tmp_path / "performance.md").read_text(
        encoding="utf-8"
    )
    assert (tmp_path / "benchmarks.svg").exists()


def test_a_server_that_is_not_installed_is_left_out(tmp_path: Path) -> None:
    """There is none, rather than an error."""
    with services.peer("no-such-server", [], tmp_path / "socket") as found:
        assert found is None


def test_without_memcached_its_clients_are_left_out() -> None:
    """A case asks for them and goes on without."""
    bench = Bench(services.Services("", None, None), big=False, quick=True)
    assert bench.memcached() is None
    assert libmc(bench) is None


def test_memcached_is_compared_with() -> None:
    """Every case of one key has it; get_many and set_many have it by both clients."""
    pairs = {each.name: each.goals for each in CASES if isinstance(each, Case)}
    one_key = [each.name for each in TOPICS[0].cases()]
    many_keys = ["get_many(100)", "set_many(100) with ttl"]
    assert all(("pgkv", MEMCACHED) in pairs[name] for name in (*one_key, *many_keys))
    assert all(("pgkv", LIBMC) in pairs[name] for name in many_keys)


def test_what_is_compared_is_installed_by_make() -> None:
    """A library that the bench group lacks is missing from the page that is published."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    names = {
        re.split(r"[\[<>=;~ ]", line)[0].lower() for line in groups["dependency-groups"]["bench"]
    }
    assert {name.lower() for name in LIBRARIES} <= names


def test_a_page_without_markers_is_refused(record: Record) -> None:
    """Rather than written over."""
    with pytest.raises(ValueError, match="two markers"):
        updated("no markers", figures(record))


def test_docs_quote_the_last_run() -> None:
    """docs/performance.md says what docs/benchmarks.json says."""
    page = (DOCS / "performance.md").read_text(encoding="utf-8")
    assert updated(page, figures(read(DOCS / "benchmarks.json"))) == page


def test_readme_quotes_the_last_run() -> None:
    """README.md and docs/why.md compare by what docs/benchmarks.json says."""
    page = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    assert updated(page, readme.table(read(DOCS / "benchmarks.json"))) == page
    page = (DOCS / "why.md").read_text(encoding="utf-8")
    assert updated(page, readme.ratios(read(DOCS / "benchmarks.json"))) == page


def test_the_best_of_a_row_is_bold(record: Record) -> None:
    """Of times the least, of rates the greatest, whoever's it is; alone nobody is best."""
    lines = (
        readme.Line("get", "get", "redis", "raw", "libpq"),
        readme.Line("many", "8 tasks", "redis"),
        readme.Line("coalesced", "8 tasks", ours="pgkv, coalescing"),
    )
    assert readme.table(record, lines).splitlines()[2:] == [
        "| get | 12.0 µs |  | **10.0** µs (libpq) |",
        "| many | **9,000** /s | 3,000 /s |  |",
        "| coalesced | 60,000 /s |  |  |",
    ]


def test_docs_name_no_machine() -> None:
    """The record tells what kind of machine it was made on, and no path or host of it."""
    text = (DOCS / "benchmarks.json").read_text(encoding="utf-8")
    assert not [word for word in ("/tmp", "/home", "/root", "localhost", ".sock") if word in text]


def test_every_case_of_the_record_has_its_comparisons() -> None:
    """No result of the record is left without something to compare it with."""
    results: list[Result] = read(DOCS / "benchmarks.json").results
    assert all(each.comparisons for each in results)
