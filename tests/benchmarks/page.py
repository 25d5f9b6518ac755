"""docs/performance.md: what stands between its markers is made from docs/benchmarks.json.

README.md has such markers too; what belongs between those is made by `readme`. A table per topic for the reader: a column for each case, a row for each entrant. Behind them one of
the targets, comparison by comparison.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from pathlib import Path

from tests.benchmarks.case import PGKV
from tests.benchmarks.cases import TOPICS
from tests.benchmarks.figures import LATENCY, THROUGHPUT, Result
from tests.benchmarks.record import LIBRARIES, Record, Section
from tests.benchmarks.table import ABSENT, HEADINGS, NUMBERS, amount, rows

BEGIN = "<!-- made by `make bench` from benchmarks.json -->"
END = "<!-- end of what `make bench` made -->"
NOTES = {topic.title: topic.note for topic in TOPICS}
NBSP = "\N{NO-BREAK SPACE}"
UNITS = {LATENCY: "µs per call", THROUGHPUT: "calls per second"}


def update(page: Path, made: str) -> None:
    """Bring the figures of a page up to date."""
    page.write_text(updated(page.read_text(encoding="utf-8"), made), encoding="utf-8")


def updated(text: str, made: str) -> str:
    """The page's text with new figures.

    Raises:
        ValueError: the markers are missing.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page needs the two markers {BEGIN} and {END}")
    return f"{head}{begin}\n\n{made}\n{end}{tail}"


def figures(record: Record) -> str:
    """The record as Markdown."""
    blocks = [_setting(record)]
    for section in record.sections:
        blocks += [f"### {section.topic}", NOTES[section.topic], *_tables(section)]
    blocks += ["### Targets", _targets(record)]
    return "\n\n".join(blocks) + "\n"


def _setting(record: Record) -> str:
    machine = record.machine
    versions = [f"{name} {version}" for name, version in record.versions.items()]
    peers = [each for each in versions if each.rpartition(" ")[0] in LIBRARIES]
    return (
        f"Measured on {machine['cores']} cores"
        + (f" ({machine['processor']})" if "processor" in machine else "")
        + f", {machine['architecture']}, {machine['system']}"
        + (f", {machine['memory']} of memory" if "memory" in machine else "")
        + ". Versions: "
        + ", ".join(each for each in versions if each not in peers)
        + (f". Compared with {', '.join(peers)}" if peers else "")
        + f". Medians of {record.rounds} rounds"
        + (", latencies with client and servers on one core." if record.pinned else ".")
    )


def _tables(section: Section) -> Iterator[str]:
    for unit, heading in UNITS.items():
        results = [result for result in section.results if result.unit == unit]
        if results:
            yield _table((heading, *(result.case for result in results)), _entrants(results))
    if section.facts:
        facts = [(fact.case, amount(fact.value, fact.unit)) for fact in section.facts]
        yield _table(("", "measured"), facts)


def _entrants(results: list[Result]) -> Iterator[tuple[str, ...]]:
    """A row for each, ours first."""
    names = list(
        dict.fromkeys(
            name
            for result in results
            for pair in result.comparisons
            for name in (*result.entrants, pair.ours, pair.against)
        )
    )
    for name in sorted(names, key=lambda name: (name != PGKV, not name.startswith(PGKV))):
        cells = (name, *(_cell(result, name) for result in results))
        yield tuple(f"**{cell}**" if cell else "" for cell in cells) if name == PGKV else cells


def _cell(result: Result, name: str) -> str:
    """An entrant's figure, and in brackets what pgkv's is of it."""
    compared = {pair.against: pair for pair in result.comparisons if pair.ours == PGKV}
    figure = result.entrants.get(name)
    if figure is None:
        everybody = {each for pair in result.comparisons for each in (pair.ours, pair.against)}
        return ABSENT if name in everybody else ""
    ratio = compared[name].ratio if name in compared else None
    return amount(figure.median) + (f"{NBSP}({ratio.median:.2f})" if ratio else "")


def _targets(record: Record) -> str:
    held = [row for row in rows(record.results, record.facts) if row.target]
    return _table(HEADINGS, held, NUMBERS)


def _table(
    headings: tuple[str, ...],
    lines: Iterable[tuple[str, ...]],
    numbers: Container[str] | None = None,
) -> str:
    """A table; unless said which, all columns but the first hold numbers."""
    right = headings[1:] if numbers is None else numbers
    rules = tuple("---:" if heading in right else ":---" for heading in headings)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, rules, *lines))
