"""Run the benchmark: `python -m tests.benchmarks --help`."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from tests.benchmarks import cases, page, plot, record, services, table
from tests.benchmarks.case import CASES, Bench, Case
from tests.benchmarks.figures import Fact, Result
from tests.benchmarks.placement import CAN_PIN
from tests.benchmarks.rounds import ROUNDS_MIN, measure

DOCS = Path(__file__).resolve().parents[2] / "docs"
ROUNDS = 61
QUIET = 0.5  # a load below which the figures can be trusted
WIDTH = 130  # of the table where it goes to a file


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=cases.__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds, small tables")
    parser.add_argument("--big", action="store_true", help="also a table of 5 million keys")
    parser.add_argument("--rounds", type=int, help=f"per case ({ROUNDS}; at least {ROUNDS_MIN})")
    parser.add_argument("--only", metavar="TEXT", help="cases whose name contains it")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder of benchmarks.json, benchmarks.svg and performance.md (docs, for a whole run)",
    )
    given = parser.parse_args()
    given.rounds = max(ROUNDS_MIN, given.rounds or (ROUNDS_MIN if given.quick else ROUNDS))
    if given.output is None and not (given.quick or given.only):
        given.output = DOCS
    return given


def main() -> None:
    given = arguments()
    chosen = [
        each
        for each in CASES
        if (given.only or "") in each.name and (given.big or not each.only_big)
    ]
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    if (load := record.load()) > QUIET:
        console.print(f"This machine is busy (load {load:.1f}): expect noise.")
    results: list[Result] = []
    facts: list[Fact] = []
    with services.running() as running, Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(chosen))
        for each in chosen:
            progress.update(task, description=each.name)
            bench = Bench(running.dsn, running.redis_socket, big=given.big, quick=given.quick)
            try:
                if isinstance(each, Case):
                    results.append(measure(each, bench, given.rounds, running.client_facing))
                else:
                    facts.extend(each.measure(bench))
            finally:
                bench.close()
            progress.advance(task)
        made = record.Record(
            record.machine(),
            record.versions(running.versions()),
            given.rounds,
            CAN_PIN,
            results,
            facts,
        )
    console.print(table.rendered(results, facts))
    if running.redis_socket is None:
        console.print("Redis was not measured: there is no redis-server here.")
    if given.output is not None:
        record.write(given.output / "benchmarks.json", made)
        plot.draw(given.output / "benchmarks.svg", made)
        page.update(given.output / "performance.md", made)
        console.print("Written: benchmarks.json, benchmarks.svg and performance.md")


if __name__ == "__main__":
    main()
