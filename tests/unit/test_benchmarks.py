"""The benchmark's arithmetic, its table and its page, from made-up samples. Nothing is timed here."""

from __future__ import annotations

from pathlib import Path

import pytest

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
from tests.benchmarks.page import BEGIN, END, updated
from tests.benchmarks.record import Record, read, write
from tests.benchmarks.table import rendered, rows

DOCS = Path(__file__).resolve().parents[2] / "docs"
MICRO = 1e-6


@pytest.fixture
def record() -> Record:
    """Two cases and a fact; Redis was not there."""
    samples = {"pgkv": [12 * MICRO, 10 * MICRO, 30 * MICRO], "raw": [10 * MICRO] * 3}
    goals: dict[tuple[str, str], Goal | None] = {
        ("pgkv", "raw"): Goal(1.25),
        ("pgkv", "redis"): Goal(0.75),
    }
    many = {"pgkv": [1 / 9_000], "pgkv, coalescing": [1 / 60_000], "redis": [1 / 3_000]}
    timed = [
        result("get", LATENCY, samples, goals),
        result(
            "8 tasks",
            THROUGHPUT,
            many,
            {("pgkv", "redis"): Goal(4.0, at_least=True), ("pgkv, coalescing", "redis"): None},
        ),
    ]
    facts = [Fact("memory", 21.5, "MiB", Goal(20.0))]
    machine = {"system": "Linux", "architecture": "x86_64", "cores": "2"}
    return Record(machine, {"Python": "3.11"}, 3, True, timed, facts)


def test_summary() -> None:
    """Median and quartiles, also of a single sample."""
    assert summary([4.0, 1.0, 3.0, 2.0, 5.0]) == Summary(3.0, 2.0, 4.0)
    assert summary([7.0]) == Summary(7.0, 7.0, 7.0)


def test_a_ratio_is_made_within_each_round() -> None:
    """A round in which everything was ten times slower does not change the ratio."""
    samples = {"ours": [2.0, 20.0, 2.0, 30.0], "theirs": [1.0, 10.0, 1.0, 15.0]}
    made = result("case", LATENCY, samples, {("ours", "theirs"): None})
    assert made.comparisons == [Comparison("ours", "theirs", Summary(2.0, 2.0, 2.0), None)]


def test_throughput_is_a_ratio_of_rates() -> None:
    """Half the time per operation is twice the throughput."""
    made = result("case", THROUGHPUT, {"a": [0.5], "b": [1.0]}, {("a", "b"): Goal(2, True)})
    assert made.entrants["a"].median == 2.0
    assert made.comparisons[0].ratio == Summary(2.0, 2.0, 2.0)
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
        ("get", "12.0 µs", "raw", "10.0 µs", "1.20 (1.10-2.10)", "≤ 1.25", "met"),
        ("get", "12.0 µs", "redis", "not measured", "", "≤ 0.75", ""),
        ("8 tasks", "9,000 op/s", "redis", "3,000 op/s", "3.00 (3.00-3.00)", "≥ 4", "missed"),
        (
            "8 tasks (coalescing)",
            "60,000 op/s",
            "redis",
            "3,000 op/s",
            "20.00 (20.00-20.00)",
            "",
            "",
        ),
        ("memory", "21.5 MiB", "", "", "", "≤ 20 MiB", "missed"),
    ]


def test_table(record: Record) -> None:
    """The terminal's table has all the rows."""
    assert rendered(record.results, record.facts).row_count == 5


def test_record_travels(record: Record, tmp_path: Path) -> None:
    """What is written is what is read."""
    write(tmp_path / "benchmarks.json", record)
    assert read(tmp_path / "benchmarks.json") == record


def test_page_is_updated_between_its_markers(record: Record) -> None:
    """Figures are replaced, the rest of the page stays, and a second update changes nothing."""
    once = updated(f"before\n{BEGIN}\nold\n{END}\nafter\n", record)
    assert once.startswith(f"before\n{BEGIN}\n")
    assert once.endswith(f"{END}\nafter\n")
    assert "old" not in once
    assert "| get | 12.0 µs | raw |" in once
    assert updated(once, record) == once


def test_a_page_without_markers_is_refused(record: Record) -> None:
    """Rather than written over."""
    with pytest.raises(ValueError, match="two markers"):
        updated("no markers", record)


def test_docs_quote_the_last_run() -> None:
    """docs/performance.md says what docs/benchmarks.json says."""
    page = (DOCS / "performance.md").read_text(encoding="utf-8")
    assert updated(page, read(DOCS / "benchmarks.json")) == page


def test_docs_name_no_machine() -> None:
    """The record tells what kind of machine it was made on, and no path or host of it."""
    text = (DOCS / "benchmarks.json").read_text(encoding="utf-8")
    assert not [word for word in ("/tmp", "/home", "/root", "localhost", ".sock") if word in text]


def test_every_case_of_the_record_has_its_comparisons() -> None:
    """No result of the record is left without something to compare it with."""
    results: list[Result] = read(DOCS / "benchmarks.json").results
    assert all(each.comparisons for each in results)
