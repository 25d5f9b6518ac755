"""Run the benchmark: `python -m tests.benchmarks --help`."""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from tests.benchmarks import machine, page, readme, record, services, table
from tests.benchmarks.case import Bench, Case, FactCase
from tests.benchmarks.cases import SHARDED, TOPICS, Topic
from tests.benchmarks.placement import LINK, placements
from tests.benchmarks.record import Record, Section
from tests.benchmarks.rounds import ROUNDS_MIN, measure

DOCS = Path(__file__).resolve().parents[2] / "docs"
README, WHY = DOCS.parent / "README.md", DOCS / "why.md"
RECORD, PLOT, PAGE = "benchmarks.json", "benchmarks.svg", "performance.md"
ROUNDS = 31
WIDTH = 180  # of the table where it goes to a file

Chosen = list[tuple[Topic, list[Case | FactCase]]]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description="Measure pgkv beside libpq, other drivers, Redis and memcached.",
    )
    parser.add_argument("--quick", action="store_true", help="few rounds, small tables")
    parser.add_argument(
        "--big", action="store_true", help="also growth, and a table of 5 million keys"
    )
    parser.add_argument("--rounds", type=int, help=f"per case ({ROUNDS}; at least {ROUNDS_MIN})")
    parser.add_argument("--only", metavar="TEXT", help="cases whose name or topic contains it")
    parser.add_argument(
        "--output",
        type=Path,
        help=f"folder of {RECORD}, {PLOT} and {PAGE} (docs, for a whole run); with --only, what"
        " the record there has of other cases stays",
    )
    parser.add_argument(
        "--redraw", action="store_true", help=f"measure nothing: make {PLOT} and {PAGE} anew"
    )
    parser.add_argument(
        "--sharded", action="store_true", help="only stores over several servers, into the page"
    )
    given = parser.parse_args()
    if given.sharded:
        given.only, given.output = SHARDED, given.output or DOCS
    given.rounds = max(ROUNDS_MIN, given.rounds or (ROUNDS_MIN if given.quick else ROUNDS))
    if given.output is None and (given.redraw or not (given.quick or given.only)):
        given.output = DOCS
    return given


def chosen_by(given: argparse.Namespace) -> Chosen:
    """The cases that were asked for, by topic."""
    text = (given.only or "").lower()
    found = (
        (
            topic,
            [
                each
                for each in topic.cases()
                if text in f"{topic.title}\n{each.name}".lower()
                and (given.big or not each.only_big)
                and (len(placements()) > 1 or not topic.is_linked)
            ],
        )
        for topic in TOPICS
    )
    return [(topic, cases) for topic, cases in found if cases]


def measured(
    chosen: Chosen,
    given: argparse.Namespace,
    running: services.Services,
    console: Console,
    made: Record,
) -> None:
    """Topic by topic; the machine is heard before each."""
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=sum(len(cases) for _, cases in chosen))
        for topic, cases in chosen:
            made.costs[machine.PRESSURE] = max(
                machine.pressure(), made.costs.get(machine.PRESSURE, 0.0)
            )
            section = Section(topic.title, [], [])
            made.sections.append(section)
            with running.behind_a_link() if topic.is_linked else nullcontext(running) as reached:
                for each in cases:
                    progress.update(task, description=each.name)
                    where = (LINK,) if topic.is_linked else placements()
                    bench = Bench(reached, big=given.big, quick=given.quick, placements=where)
                    try:
                        if isinstance(each, Case):
                            section.results.extend(measure(each, bench, given.rounds))
                        else:
                            section.facts.extend(each.measure(bench))
                    finally:
                        bench.close()
                    progress.advance(task)


def show(console: Console, made: Record) -> None:
    """The table, and what is missing from it."""
    console.print(table.rendered(made.results, made.facts))
    console.print(page.costs(made.costs))
    if absent := table.absent(made.results):
        console.print(f"Not measured, as it is not installed here: {'; '.join(absent)}.")


def publish(folder: Path, made: Record) -> None:
    """Plot and pages."""
    from tests.benchmarks import plot  # loads matplotlib

    plot.draw(folder / PLOT, made)
    page.update(folder / PAGE, page.figures(made))
    if folder.resolve() == DOCS:
        page.update(README, readme.table(made))
        page.update(WHY, readme.ratios(made))


def main() -> None:
    given = arguments()
    if given.redraw:
        publish(given.output, record.read(given.output / RECORD))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    chosen = chosen_by(given)
    if not chosen:
        sys.exit(f"No case's name or topic contains {given.only!r}.")
    with services.running() as running:
        made = Record(
            record.machine(), record.versions(running.versions()), given.rounds, [],
            machine.costs(running),
        )  # fmt: skip
        earlier = None
        if given.output and (given.output / RECORD).exists():
            earlier = record.read(given.output / RECORD)
            if given.only:
                # What cannot be merged is better known now than at the end.
                record.merged(earlier, made)
        measured(chosen, given, running, console, made)
    show(console, made)
    if given.output is not None:
        if earlier is not None:
            made = (record.merged if given.only else record.completed)(earlier, made)
        record.write(given.output / RECORD, made)
        publish(given.output, made)
        console.print(f"Written: {RECORD}, {PLOT} and {PAGE}")


if __name__ == "__main__":
    main()
