"""docs/performance.md: what stands between its markers is made from docs/benchmarks.json."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from tests.benchmarks.record import Record
from tests.benchmarks.table import HEADINGS, rows

BEGIN = "<!-- made by `make bench` from benchmarks.json -->"
END = "<!-- end of what `make bench` made -->"


def update(page: Path, record: Record) -> None:
    """Bring the figures of a page up to date."""
    page.write_text(updated(page.read_text(encoding="utf-8"), record), encoding="utf-8")


def updated(text: str, record: Record) -> str:
    """The page's text with the record's figures.

    Raises:
        ValueError: the markers are missing.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page needs the two markers {BEGIN} and {END}")
    return "".join((head, begin, "\n\n", figures(record), "\n", end, tail))


def figures(record: Record) -> str:
    """The record as Markdown."""
    return "\n".join(_lines(record)) + "\n"


def _lines(record: Record) -> Iterator[str]:
    machine = record.machine
    yield (
        f"Measured on {machine['cores']} cores"
        + (f" ({machine['processor']})" if "processor" in machine else "")
        + f", {machine['architecture']}, {machine['system']}"
        + (f", {machine['memory']} of memory" if "memory" in machine else "")
        + "; "
        + ", ".join(f"{name} {version}" for name, version in record.versions.items())
        + f". Medians of {record.rounds} rounds, quartiles of the ratios in brackets"
        + (", latencies with client and servers on one core." if record.pinned else ".")
    )
    yield ""
    yield _line(HEADINGS)
    yield _line(("---", "---:", "---", "---:", "---:", "---", "---"))
    for case, group in groupby(rows(record.results, record.facts), key=lambda row: row.case):
        for n, row in enumerate(group):
            yield _line(row._replace(case=case if n == 0 else ""))


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"
