"""``pgkv doctor``: checks of the server, the table and the connection between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import console
from ..command import DONE, MAX_BYTES, MAX_ENTRIES, NOT_FOUND, Invocation, require_database

if TYPE_CHECKING:
    from .examine import Finding, Status

_STYLES: dict[Status, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor(
    call: Invocation, max_entries: int | None = MAX_ENTRIES, max_bytes: int | None = MAX_BYTES
) -> int:
    """Check the server, the table and the connection, and suggest fixes.

    Changes nothing. Checks the store's own table, and whether those of locks and sessions have leftovers
    of an early version. Checks a bound on size if it is given. Exit code 1: a check failed. A table or
    schema that is named and does not exist is a failure.

    **Example:** `pgkv doctor --table cache --json`
    """
    from .examine import examine

    config = call.config(max_entries=max_entries, max_bytes=max_bytes)
    require_database(config)
    findings = examine(config, named=call.table is not None or call.schema is not None)
    healthy = all(finding.status != "fail" for finding in findings)
    if call.json:
        console.say_json({"healthy": healthy, "findings": [each._asdict() for each in findings]})
    else:
        show(findings)
    return DONE if healthy else NOT_FOUND


def show(findings: list[Finding]) -> None:
    """Show the findings: a table for people, lines in a pipe."""
    if not console.on_terminal():
        for each in findings:
            cells = [each.status, each.check, each.detail, *([each.advice] if each.advice else [])]
            console.say("\t".join(map(console.printable, cells)))
        return
    from rich.text import Text

    rows = []
    for each in findings:
        text = Text(console.printable(each.detail))
        if each.advice:
            text.append(f"\n\N{RIGHTWARDS ARROW} {console.printable(each.advice)}", style="cyan")
        rows.append((Text(each.status, style=_STYLES[each.status]), Text(each.check), text))
    screen = console.out()
    screen.print(console.table(("", "check", "found"), rows))
    failed = sum(each.status == "fail" for each in findings)
    warnings = console.count(sum(each.status == "warn" for each in findings), "warning")
    ok = sum(each.status == "ok" for each in findings)
    screen.print(f"{failed} failed, {warnings}, {ok} ok")


__all__ = ["doctor", "show"]
