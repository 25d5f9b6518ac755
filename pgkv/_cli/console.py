"""How the command reads and writes: tables for people, plain lines for pipes, JSON for machines.

Keys and values may hold any character, so they are escaped before they reach a terminal or a line of
text; only ``pgkv get`` writes bytes unchanged. rich is imported only where something is
drawn: most commands in a script draw nothing.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from .._observe import CONTROLS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table
    from rich.text import Text

# A title, the field if that has another name, and what makes a text of the value if `cell` does not.
Column: TypeAlias = "str | tuple[str, str] | tuple[str, str, Callable[[Any], str]]"

PREVIEW = 100  # characters of a value in a table

_ESCAPES = {ord("\\"): "\\\\", ord("\n"): "\\n", ord("\t"): "\\t", ord("\r"): "\\r"}
_CONTROLS = re.compile(CONTROLS)
# Where a password can appear in a DSN that was given in the wrong place.
_SECRETS = (
    (re.compile(r"(://[^:/@\s]*):[^\s]*@"), r"\1:***@"),
    (re.compile(r"((?:ssl)?password\s*=\s*)('(?:[^'\\]|\\.)*'|[^\s&]+)", re.IGNORECASE), r"\1***"),
)


class InputOutputError(Exception):
    """Standard input cannot be read."""


class _Closed(io.TextIOBase):
    """Replaces a standard output that was closed before the program started: a write fails."""

    encoding = "utf-8"

    @property
    def buffer(self) -> _Closed:
        return self

    def write(self, _: Any) -> int:
        raise OSError(errno.EBADF, "it is closed")


def prepare() -> None:
    """Give closed standard streams a substitute. Python has None in their place."""
    if sys.stdout is None:
        sys.stdout = _Closed()
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  # until the exit


def discard_output() -> None:
    """Discard further standard output: at exit Python reports output that it cannot flush."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def on_terminal() -> bool:
    """Whether a person reads standard output."""
    return sys.stdout.isatty()


def can_ask() -> bool:
    """Whether a person can answer on standard input."""
    return sys.stdin is not None and sys.stdin.isatty()


def read() -> bytes:
    if sys.stdin is None:
        raise InputOutputError("cannot read standard input: it is closed")
    try:
        return sys.stdin.buffer.read()
    except OSError as error:
        raise InputOutputError(f"cannot read standard input: {error.strerror or error}") from error


def write(data: bytes) -> None:
    """Write bytes to standard output, unchanged."""
    sys.stdout.flush()
    sys.stdout.buffer.write(data)


def out(*, stderr: bool = False) -> Console:
    """Return standard output, or standard error. rich interprets nothing on it."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, highlight=False, emoji=False)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")


def note(text: str) -> None:
    """Write one line to standard error, as far as that is possible."""
    with contextlib.suppress(OSError):
        sys.stderr.write(text + "\n")


def say_json(value: Any) -> None:
    say(json.dumps(value, ensure_ascii=False, allow_nan=False))


def fail(error: str, message: str, as_json: bool) -> None:
    """Write an error as one line to standard error, without passwords."""
    text = without_secrets(" ".join(message.split()))
    if as_json:
        note(json.dumps({"error": error, "message": text}, ensure_ascii=False))
    else:
        note(f"pgkv: {printable(text)}")


def without_secrets(text: str) -> str:
    """Return the text with possible passwords in a DSN replaced."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def symbol(fancy: str, plain: str) -> str:
    """Return the first if standard output can write it, else the second."""
    try:
        fancy.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return plain
    return fancy


def printable(text: str) -> str:
    """Return the text with control characters replaced, so that a terminal does not obey them."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)


def one_line(value: str | bytes) -> str:
    r"""Return a key or value as one line without control characters: ``\n``, ``\t``, ``\\``, and
    ``\xHH`` for bytes that are not text."""

    def escape(found: re.Match[str]) -> str:
        number = ord(found[0])
        return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"

    data = value.encode() if isinstance(value, str) else value
    try:
        text = data.decode().translate(_ESCAPES)
    except UnicodeDecodeError:
        text = data.decode(errors="backslashreplace")
    return _CONTROLS.sub(escape, text)


def json_value(value: bytes) -> dict[str, str]:
    """Return a value for JSON: as text if it is UTF-8, else in base64."""
    try:
        return {"value": value.decode(), "encoding": "utf-8"}
    except UnicodeDecodeError:
        return {"value": base64.b64encode(value).decode(), "encoding": "base64"}


def preview(value: bytes) -> str:
    """Return the beginning of a value, and how much is missing."""
    text = one_line(value[: 4 * PREVIEW])
    if len(text) <= PREVIEW and len(value) <= 4 * PREVIEW:
        return text
    return f"{text[:PREVIEW]}\N{HORIZONTAL ELLIPSIS} ({size(len(value))})"


def count(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: ``1 row``, ``2 rows``."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def size(octets: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if abs(octets) < 1024:
            return f"{octets:.0f} {unit}" if unit == "B" else f"{octets:.1f} {unit}"
        octets /= 1024
    return f"{octets:.1f} TB"


def duration(seconds: float) -> str:
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} {symbol('µs', 'us')}"
    if seconds < 1:
        return f"{seconds * 1000:.{0 if seconds >= 0.01 else 1}f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def table(
    columns: Sequence[str], rows: Iterable[Iterable[str | Text]], *, title: str | None = None
) -> Table:
    """Return a table; its cells are shown unchanged, without markup."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(
        title=None if title is None else Text(title),
        title_justify="left",
        header_style="bold",
        show_header=any(columns),
    )
    for column in columns:
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
    return shown


def show_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None
) -> None:
    """Show rows: a table for people, lines of cells between tabs in a pipe."""
    if on_terminal():
        out().print(table(columns, rows, title=title))
        return
    for row in rows:
        say("\t".join(row))


def show_documents(
    documents: Iterable[dict[str, Any]], columns: Sequence[Column], *, title: str | None = None
) -> None:
    """Show documents as rows. The text of a cell follows from its type, unless its column says more."""
    parts = [(each, each, cell) if isinstance(each, str) else (*each, cell)[:3] for each in columns]
    rows = ([text(each[field]) for _, field, text in parts] for each in documents)
    show_table([name for name, *_ in parts], rows, title=title)


def cell(value: Any) -> str:
    """Return the text of a value. A float is a span of time."""
    if value is None:
        return ""
    if isinstance(value, str):
        return one_line(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return duration(value)
    return as_json(value)


def as_json(value: Any) -> str:
    """Return the text of a cell for JSON of the user's."""
    return "" if value is None else printable(json.dumps(value, ensure_ascii=False))


def progress(*, quiet: bool = False) -> Progress:
    """Return a progress bar on standard error; it is drawn on a terminal only."""
    from rich import progress as rich

    console = out(stderr=True)
    return rich.Progress(
        rich.TextColumn("{task.description}", markup=False),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )
