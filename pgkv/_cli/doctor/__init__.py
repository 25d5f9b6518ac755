"""`_doctor` examines a server, a table and the way to them, for ``pgkv doctor``.

Each check is a small function that looks at one thing and returns what it found, with what to do.
None of them changes anything; each runs in a transaction of its own with a limit on its time, so
they work behind a pooler and on a standby, and one that fails hides no other. The connection is
made as the store makes its own, because how it is made is part of what is examined.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import psycopg
from psycopg.rows import dict_row
from rich.text import Text

from ..._engine import conninfo as _conninfo
from ..._settings import Target
from ...config import Config, Pooler
from ...errors import translate
from .. import console
from . import server, table
from .patient import Check, Finding, Patient, Status

CHECK_TIMEOUT = "5s"  # for one check


def examine(config: Config) -> list[Finding]:
    """Connect and make every check that applies.

    Raises:
        StoreUnavailableError: there is no connection.
    """
    with contextlib.closing(Target(config)) as target:
        where = target.conninfo()
        try:
            conn, refused = _connect(config, where)
        except psycopg.Error as error:
            failure = translate(error, action="doctor")
            raise failure from failure.__cause__
        with contextlib.closing(conn):
            patient = Patient(conn, config, where, refused)
            return list(_findings(patient))


def _connect(config: Config, conninfo: str) -> tuple[psycopg.Connection[dict[str, Any]], bool]:
    """Connect as the store does; where a pooler refuses its settings, without them."""
    options: dict[str, Any] = {
        "autocommit": True,
        "prepare_threshold": None,
        "row_factory": dict_row,
    }
    try:
        return psycopg.connect(conninfo, **options), False
    except psycopg.OperationalError as error:
        if "startup parameter" not in str(error):
            raise
    plain = replace(config, pooler=Pooler.TRANSACTION)
    return psycopg.connect(_conninfo.build(plain, config.dsn), **options), True


def _findings(patient: Patient) -> Iterator[Finding]:
    for check in server.CHECKS:
        yield from _made(check, patient)
    patient.table = table.describe(patient)
    if patient.table is None or patient.table["relkind"] not in ("r", "p"):
        yield from _made(table.missing, patient)
        return
    for check in table.CHECKS:
        yield from _made(check, patient)


def _made(check: Check, patient: Patient) -> Iterator[Finding]:
    found: Finding | None
    try:
        if check is server.pooler:
            found = check(patient)  # looks at what happens between transactions
        else:
            with patient.conn.transaction():
                patient.conn.execute(f"SET LOCAL statement_timeout = '{CHECK_TIMEOUT}'")
                found = check(patient)
    except psycopg.OperationalError as error:
        if patient.conn.closed:
            failure = translate(error, action="doctor")
            raise failure from failure.__cause__
        yield _unknown(check, error)
    except psycopg.Error as error:
        yield _unknown(check, error)
    else:
        if found is not None:
            yield found


def _unknown(check: Check, error: psycopg.Error) -> Finding:
    why = error.diag.message_primary or type(error).__name__
    return Finding(check.__name__.replace("_", " "), "warn", f"could not be looked at: {why}")


# -- showing -------------------------------------------------------------------------------

_STYLES: dict[Status, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def show(findings: list[Finding]) -> None:
    """Show the findings: a table for people, lines in a pipe."""
    if not console.on_terminal():
        for each in findings:
            cells = [each.status, each.check, each.detail, *([each.advice] if each.advice else [])]
            console.say("\t".join(map(console.printable, cells)))
        return
    rows = []
    for each in findings:
        text = Text(console.printable(each.detail))
        if each.advice:
            text.append(f"\n\N{RIGHTWARDS ARROW} {console.printable(each.advice)}", style="cyan")
        rows.append((Text(each.status, style=_STYLES[each.status]), Text(each.check), text))
    screen = console.out()
    screen.print(console.table(("", "check", "found"), rows))
    failed = sum(each.status == "fail" for each in findings)
    warned = sum(each.status == "warn" for each in findings)
    screen.print(
        f"{failed} to be mended, {warned} to be seen to, {len(findings) - failed - warned} in order"
    )


__all__ = ["Finding", "examine", "show"]
