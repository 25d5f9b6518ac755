"""How the command shows things: tables for people, plain lines for pipes, JSON for machines.

A value may hold anything, so what reaches a terminal or a line of text is escaped first; only
``pgkv get`` writes bytes as they are.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

PREVIEW = 100  # characters of a value in a table

_ESCAPES = {ord("\\"): "\\\\", ord("\n"): "\\n", ord("\t"): "\\t", ord("\r"): "\\r"}
# Control characters, also those that change the direction of what follows: a terminal obeys them.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_DURATION = re.compile(r"(\d+(?:\.\d+)?|\.\d+)(ms|[smhdw])", re.IGNORECASE)
# What a password may stand in, should one appear where it does not belong.
_SECRETS = (
    (re.compile(r"(://[^:/@\s]*):[^\s]*@"), r"\1:***@"),
    (re.compile(r"((?:ssl)?password\s*=\s*)('(?:[^'\\]|\\.)*'|[^\s&]+)", re.IGNORECASE), r"\1***"),
)


def on_terminal() -> bool:
    """Whether a person reads standard output."""
    return sys.stdout.isatty()


def out() -> Console:
    """Standard output, without interpretation of what is written."""
    return Console(markup=False, highlight=False, emoji=False)


def err() -> Console:
    """Standard error, likewise."""
    return Console(stderr=True, markup=False, highlight=False, emoji=False)


def say(text: str) -> None:
    """Write one plain line to standard output."""
    sys.stdout.write(text + "\n")


def note(text: str) -> None:
    """Write one line to standard error."""
    sys.stderr.write(text + "\n")


def say_json(value: Any) -> None:
    """Write one JSON document on one line."""
    say(json.dumps(value, ensure_ascii=False, allow_nan=False))


def fail(error: str, message: str, as_json: bool) -> None:
    """Write an error as one line to standard error, any password taken out."""
    text = without_secrets(" ".join(message.split()))
    if as_json:
        note(json.dumps({"error": error, "message": text}, ensure_ascii=False))
    else:
        note(f"pgkv: {printable(text)}")


def without_secrets(text: str) -> str:
    """Return the text with what looks like a password in a DSN replaced."""
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
    """Return the text with control characters replaced, so that a terminal just shows it."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)


def one_line(value: str | bytes) -> str:
    r"""Return a key or value as one line without control characters: ``\n``, ``\t``, ``\\``, and
    ``\xHH`` for bytes that are no text."""
    text = value if isinstance(value, str) else value.decode(errors="backslashreplace")
    if isinstance(value, str) or _is_text(value):
        text = text.translate(_ESCAPES)
    return _CONTROLS.sub(lambda found: _escape(found[0]), text)


def _escape(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"


def _is_text(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def json_value(value: bytes) -> dict[str, str]:
    """Return a value for JSON: as text where it is UTF-8, else in base64."""
    if _is_text(value):
        return {"value": value.decode(), "encoding": "utf-8"}
    return {"value": base64.b64encode(value).decode(), "encoding": "base64"}


def preview(value: bytes) -> str:
    """Return the beginning of a value, and how much is missing."""
    text = one_line(value[: 4 * PREVIEW])
    if len(text) <= PREVIEW and len(value) <= 4 * PREVIEW:
        return text
    return f"{text[:PREVIEW]}\N{HORIZONTAL ELLIPSIS} ({size(len(value))})"


def size(count: float) -> str:
    """Return a number of bytes as people read it."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """Return a span of time as people read it."""
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} {symbol('µs', 'us')}"
    if seconds < 1:
        return f"{seconds * 1000:.2f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    if seconds < 172_800:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"


def parse_duration(text: str) -> float:
    """Return the seconds in ``90``, ``1.5h`` or ``1h30m``.

    Raises:
        ValueError: it is none of these, or not more than zero.
    """
    compact = text.strip().replace(" ", "")
    try:
        found = float(compact)
    except ValueError:
        parts = _DURATION.findall(compact)
        if not parts or "".join(number + unit for number, unit in parts) != compact:
            raise ValueError(
                f"{text!r} is no duration: seconds, or such as 30s, 15m, 1h30m, 7d"
            ) from None
        found = sum(float(number) * _UNITS[unit.lower()] for number, unit in parts)
    if not math.isfinite(found) or found <= 0:
        raise ValueError(f"{text!r} must be more than 0 seconds")
    return found


def table(
    columns: Sequence[str], rows: Iterable[Iterable[str | Text]], *, title: str | None = None
) -> Table:
    """Return a table; its cells are shown as they are, without markup."""
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


def show_pairs(pairs: Mapping[str, str], *, title: str) -> None:
    """Show names and values: a table for people, ``name<TAB>value`` lines in a pipe."""
    if on_terminal():
        out().print(table(("", ""), pairs.items(), title=title))
        return
    for name, value in pairs.items():
        say(f"{name}\t{value}")


def progress(*, quiet: bool = False) -> Progress:
    """Return a progress bar on standard error; it shows itself on a terminal only."""
    console = err()
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )


@contextlib.contextmanager
def live(*, quiet: bool = False) -> Iterator[Callable[[RenderableType], None]]:
    """Give a function that shows a picture in place of the last one, on standard error; gone at the
    end. It shows itself on a terminal only."""
    console = err()
    if quiet or not console.is_terminal:
        yield lambda _: None
        return
    with Live(console=console, transient=True) as picture:
        yield picture.update
