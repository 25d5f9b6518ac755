"""The commands ``load`` and ``dump``: many keys from a file, and all of them to one."""

from __future__ import annotations

import base64
import binascii
import contextlib
import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ..errors import InvalidValueError
from ..types import ScanOptions
from . import console
from .command import DONE, PREFIX, Invocation, argument, flag

PAGE = 500  # rows fetched at a time: values may be large


def load(
    call: Invocation,
    file: str = argument("FILE", "The file. - reads standard input."),
    as_csv: bool = flag("--csv", "Lines of key,value or key,value,ttl."),
) -> int:
    """Write many keys from a file, in transactions of 20,000.

    One JSON object a line, as `dump` and `scan --json` print them: key, value, and optionally
    encoding (utf-8 or base64) and ttl (seconds). Or CSV, without a heading. A key that exists is
    overwritten.

    **Example:** `pgkv load users.jsonl`

    **Example:** `pgkv dump --table old | pgkv load - --table new`
    """
    with contextlib.ExitStack() as stack:
        try:
            lines = (
                sys.stdin if file == "-" else stack.enter_context(Path(file).open(encoding="utf-8"))
            )
        except OSError as error:
            raise console.InputOutputError(
                f"cannot read {file!r}: {error.strerror or error}"
            ) from error
        store = stack.enter_context(call.store(create=True, notify=True))
        bar = stack.enter_context(console.progress(quiet=call.json))
        task = bar.add_task("keys", total=None)
        items = _csv(lines) if as_csv else _json(lines)
        written = store.load(items, progress=lambda done: bar.update(task, completed=done))
    call.answer({"written": written}, f"wrote {console.count(written, 'key')}")
    return DONE


def _json(lines: IO[str]) -> Iterator[tuple[str, str | bytes, float | None]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row: dict[str, Any] = json.loads(line)
            value = row["value"]
            if row.get("encoding") == "base64":
                value = base64.b64decode(value, validate=True)
            yield row["key"], value, row.get("ttl")
        except (ValueError, KeyError, TypeError, AttributeError, binascii.Error):
            # Raised outside: the parser's message quotes the line.
            raise InvalidValueError(
                f"line {number} is not a JSON object with a key and a value (in base64 where "
                "encoding says so)"
            ) from None


def _csv(lines: IO[str]) -> Iterator[tuple[str, str, float | None]]:
    for number, row in enumerate(csv.reader(lines), 1):
        try:
            key, value, *ttl = row
            yield key, value, float(ttl[0]) if ttl and ttl[0] else None
        except ValueError:
            raise InvalidValueError(f"row {number} is not key,value or key,value,ttl") from None


def dump(
    call: Invocation,
    prefix: str = PREFIX,
) -> int:
    """Print keys and values for `load`, one JSON object a line, with the seconds each has left.

    Each page of 500 rows is a snapshot of its own. Memory use stays constant.

    **Example:** `pgkv dump > backup.jsonl`
    """
    with call.store() as store:
        after: str | None = None
        while True:
            options = ScanOptions(prefix=prefix, after=after, limit=PAGE)
            page = store._execute(store._sql.dump(options))
            for key, value, left in page:
                life = {} if left is None else {"ttl": round(left, 6)}
                console.say_json({"key": key, **console.json_value(value), **life})
            if len(page) < PAGE:
                return DONE
            after = page[-1][0]
