"""How a demo is shown: in colour on a terminal, as plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from .. import console
from .stage import Report, Scene

HELD, WRONG = "ok", "WRONG"


class Screen:
    """Shows scenes and reports; nothing if it is quiet."""

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
        self._indented("", scene.stake, "dim")

    def show(self, report: Report) -> None:
        """Show what has happened."""
        for line in report.said:
            self._indented("", line)
        for check in report.checks:
            if self._fancy:
                mark = console.symbol("✓", HELD) if check.held else console.symbol("✗", WRONG)
                self._indented(mark, check.text, "green" if check.held else "bold red")
            else:
                self._indented(f"{HELD if check.held else WRONG}:", check.text)
        self.say()

    def _indented(self, mark: str, text: str, style: str = "") -> None:
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
        rows = [["operation", "callers", "a second", "median", "99 %"]]
        for report in reports:
            for each in report.rates:
                times = map(console.duration, (each.median, each.p99))
                rows.append([each.operation, str(each.callers), f"{each.per_second:,.0f}", *times])
        if self._quiet:
            return
        if self._fancy:
            table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
            for number, column in enumerate(rows[0]):
                table.add_column(column, justify="right" if number else "left", overflow="fold")
            for row in rows[1:]:
                table.add_row(*map(Text, row))
            self._out.print(table)
            return
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            first, *rest = map(str.rjust, row, widths)
            self.say("  ".join([first.lstrip().ljust(widths[0]), *rest]).rstrip())
