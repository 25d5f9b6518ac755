"""How a demo is shown: in colour on a terminal, as plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from .. import console
from .stage import Rate, Report, Scene

HELD, WRONG = "ok", "WRONG"
LEGEND = "Redis: calls a second by redis-py, in turns with pgkv; ratio: of ours to those."


class Screen:
    """Where a demo is shown.

    Args:
        quiet: nowhere.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._fancy = console.on_terminal()
        self._out = console.out()

    def say(self, text: str = "", style: str = "") -> None:
        """Show a sentence."""
        if self._quiet:
            return
        if self._fancy:
            self._out.print(Text(text, style))
        else:
            console.say(text)

    def begin(self, scene: Scene) -> None:
        """Show what is about to happen, and why it matters."""
        self.say(scene.title, "bold cyan")
        self._beside("", scene.stake, "dim")

    def show(self, report: Report) -> None:
        """Show what has happened."""
        for line in report.said:
            self._beside("", line)
        for check in report.checks:
            if self._fancy:
                mark = console.symbol("✓", HELD) if check.held else console.symbol("✗", WRONG)
                self._beside(mark, check.text, "green" if check.held else "bold red")
            else:
                self._beside(f"{HELD if check.held else WRONG}:", check.text)
        self.say()

    def _beside(self, mark: str, text: str, style: str = "") -> None:
        """Show a line, its continuation below its beginning."""
        if self._quiet:
            return
        if not self._fancy:
            console.say("  " + f"{mark} {text}".lstrip())
            return
        grid = Table.grid(padding=(0, 1, 0, 0))
        grid.add_row("", *([Text(mark, style)] if mark else []), Text(text, "" if mark else style))
        self._out.print(grid)

    def sum_up(self, reports: Sequence[Report]) -> None:
        """Show all rates as one table."""
        rates = [rate for report in reports for rate in report.rates]
        columns, rows = _table_of(rates)
        if not self._fancy:
            for line in _aligned([columns, *rows]):
                self.say(line)
        elif not self._quiet:
            self._out.print(self._table(columns, rows))
        if any(rate.redis_per_second for rate in rates):
            self.say(LEGEND, "dim")

    @staticmethod
    def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
        for number, column in enumerate(columns):
            table.add_column(column, justify="right" if number else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        return table


def _table_of(rates: Sequence[Rate]) -> tuple[list[str], list[list[str]]]:
    compared = any(rate.redis_per_second for rate in rates)
    columns = ["operation", "callers", "a second", "median", "99 %"]
    rows = [
        [
            rate.operation,
            str(rate.workers),
            f"{rate.per_second:,.0f}",
            console.duration(rate.median),
            console.duration(rate.p99),
        ]
        for rate in rates
    ]
    if compared:
        columns += ["Redis", "ratio"]
        for rate, row in zip(rates, rows, strict=True):
            theirs = rate.redis_per_second
            row += [f"{theirs:,.0f}", f"{rate.per_second / theirs:.2f}"] if theirs else ["", ""]
    return columns, rows


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
