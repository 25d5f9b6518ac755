"""docs/performance.md: what stands between its markers is made from docs/benchmarks.json.

README.md has such markers too; what belongs between those is made by `readme`. A table per topic for the reader: a column for each case, a row for each entrant. Behind them one of
the targets, comparison by comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path

from tests.benchmarks.case import PGKV
from tests.benchmarks.cases import TOPICS
from tests.benchmarks.figures import LATENCY, THROUGHPUT, Result
from tests.benchmarks.machine import COLD_FACTOR, DISTURBED, PRESSURE, SYSTEM_CALL
from tests.benchmarks.record import LIBRARIES, Record, Section
from tests.benchmarks.table import ABSENT, HEADINGS, NUMBERS, amount, rows

BEGIN = "<!-- made by `make bench` from benchmarks.json -->"
END = "<!-- end of what `make bench` made -->"
NOTES = {topic.title: topic.note for topic in TOPICS}
NBSP = "\N{NO-BREAK SPACE}"
UNITS = {LATENCY: "µs per call", THROUGHPUT: "calls per second"}
PLUS = "\N{THIN SPACE}+\N{THIN SPACE}"


def update(page: Path, made: str) -> None:
    """Bring the figures of a page up to date, or make one that has nothing else."""
    if not page.exists():
        page.write_text(f"{BEGIN}\n{END}\n", encoding="utf-8")
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
        + f". Medians of {record.rounds} rounds."
        + (f"\n\n{costs(record.costs)}" if record.costs else "")
    )


def costs(found: dict[str, float]) -> str:
    """What the machine itself takes, and whether it had other work."""
    turns = [f"{amount(each)} µs on {name.partition(', ')[2]}"
             for name, each in found.items() if name.startswith("ping-pong")]  # fmt: skip
    busy = found.get(PRESSURE, 0.0)
    return (
        f"This machine takes {found[SYSTEM_CALL]:.2f} µs for a system call"
        + (
            f", and for a message to another process and back {' and '.join(turns)}"
            if turns
            else ""
        )
        + f". Code that runs after an answer takes {found[COLD_FACTOR]:.1f} times as long as in a loop"
        f" (the cold factor). While the bench slept, another process waited for a processor for"
        f" {busy:.1f} % of the time" + (": **disturbed**." if busy > DISTURBED else ".")
    )


def _tables(section: Section) -> Iterator[str]:
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in section.results:
        groups.setdefault((result.placement, result.unit), []).append(result)
    for (placement, unit), results in sorted(groups.items(), key=lambda each: each[0][0] == ""):
        heading = UNITS[unit] + (f", {placement}" if placement else "")
        yield _table((heading, *(result.case for result in results)), _entrants(results, _cell))
    placed = next(iter(groups.values()), [])
    if placed and any(result.cpu for result in placed) and placed[0].placement:
        heading = f"µs of CPU per call: client + servers, {placed[0].placement}"
        yield _table((heading, *(result.case for result in placed)), _entrants(placed, _used))
    if section.facts:
        facts = [(fact.case, amount(fact.value, fact.unit)) for fact in section.facts]
        yield _table(("", "measured"), facts)


def _entrants(
    results: list[Result], cell: Callable[[Result, str], str]
) -> Iterator[tuple[str, ...]]:
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
        cells = (name, *(cell(result, name) for result in results))
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


def _used(result: Result, name: str) -> str:
    """What an entrant's call takes of the processors."""
    cpu = result.cpu.get(name)
    return "" if cpu is None else f"{amount(cpu.client)}{PLUS}{amount(cpu.servers)}"


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
