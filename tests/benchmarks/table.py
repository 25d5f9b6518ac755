"""The rows that are shown, on the terminal and in docs/performance.md alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from rich.table import Table

from tests.benchmarks.figures import Comparison, Fact, Goal, Result, Summary

HEADINGS = (
    "case",
    "placement",
    "ours",
    "against",
    "theirs",
    "ratio",
    "quietest",
    "CPU",
    "target",
    "",
)
NUMBERS = frozenset(("ours", "theirs", "ratio", "quietest", "CPU"))
COUNTED = ("rows", "times")  # units of whole numbers
ABSENT = "not measured"


class Row(NamedTuple):
    """One comparison, or one fact. `ratio` is of the rounds' medians, `quietest` of the quietest
    rounds, `cpu` of the processor time of client and servers."""

    case: str
    placement: str
    ours: str
    against: str
    theirs: str
    ratio: str
    quietest: str
    cpu: str
    target: str
    verdict: str


def rows(results: list[Result], facts: list[Fact]) -> Iterator[Row]:
    """Everything measured, comparison by comparison."""
    for result in results:
        for comparison in result.comparisons:
            yield _compared(result, comparison)
    for fact in facts:
        yield Row(
            fact.case, "", amount(fact.value, fact.unit), "", "", "", "", "",
            goal(fact.goal, fact.unit), verdict(fact.is_met),
        )  # fmt: skip


def absent(results: list[Result]) -> list[str]:
    """Whom something should have been compared with, and was not."""
    names = {
        name
        for result in results
        for pair in result.comparisons
        for name in (pair.ours, pair.against)
        if name not in result.entrants
    }
    return sorted(names)


def _compared(result: Result, comparison: Comparison) -> Row:
    def figure(name: str) -> str:
        found = result.entrants.get(name)
        return ABSENT if found is None else amount(found.median, result.unit)

    case = result.case
    if comparison.ours != "pgkv":
        case += f" ({comparison.ours.removeprefix('pgkv, ')})"
    ratio = comparison.ratio
    return Row(
        case,
        result.placement,
        figure(comparison.ours),
        comparison.against,
        figure(comparison.against),
        "" if ratio is None else spread(ratio),
        "" if ratio is None or ratio.quietest is None else f"{ratio.quietest:.2f}",
        "" if comparison.cpu is None else f"{comparison.cpu:.2f}",
        goal(comparison.goal),
        verdict(comparison.is_met),
    )


def spread(ratio: Summary) -> str:
    """A ratio with its quartiles."""
    return f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"


def amount(value: float, unit: str = "") -> str:
    """A number with as many digits as it deserves."""
    digits = 1 if abs(value) < 100 and unit not in COUNTED else 0
    return f"{value:,.{digits}f} {unit}".rstrip()


def goal(wanted: Goal | None, unit: str = "") -> str:
    """What a figure should be."""
    if wanted is None:
        return ""
    return f"{'≥' if wanted.at_least else '≤'} {wanted.limit:g} {unit}".rstrip()


def verdict(met: bool | None) -> str:
    """Whether it is."""
    return "" if met is None else "met" if met else "missed"


def rendered(results: list[Result], facts: list[Fact]) -> Table:
    """The table for a terminal; a case's name and placement stand in their first row."""
    table = Table(
        title="medians; ratio = ours / theirs, with quartiles; CPU = the same of client and servers"
    )
    for heading in HEADINGS:
        table.add_column(
            heading,
            justify="right" if heading in NUMBERS else "left",
            no_wrap=heading not in {"case", "against"},
        )
    before: tuple[str, str] | None = None
    for row in rows(results, facts):
        shown = row
        if row[:2] == before:
            shown = row._replace(case="", placement="")
        elif before:
            table.add_section()
        style = {"met": "green", "missed": "red"}.get(row.verdict, "")
        table.add_row(*shown[:-1], f"[{style}]{row.verdict}[/]" if style else "")
        before = row[:2]
    return table
