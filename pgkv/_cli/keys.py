"""The commands about keys: ``get``, ``set``, ``delete``, ``scan``, and ``load`` and ``dump`` of many."""

from __future__ import annotations

import base64
import binascii
import contextlib
import csv
import json
import os
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

import typer

from ..errors import InvalidValueError, NotFoundError
from ..store import Store
from ..types import ScanOptions
from . import console
from .command import DONE, NOT_FOUND, PREFIX, Invocation, argument, confirm, flag, option, span

TERMINAL_LIMIT = 100  # rows of a scan on a terminal, unless --limit says otherwise
PAGE_KEYS, PAGE_ITEMS = 5000, 500  # rows fetched at a time: values may be large
SEVERAL = "this removes more than one key"

KEY = argument("KEY", "The key.")


def get(call: Invocation, key: str = KEY) -> int:
    """Write the value of a key to standard output, byte for byte.

    --json adds version and times. A value that is not UTF-8 is then in base64. Exit code
    1: the key does not exist.

    **Example:** `pgkv get user:1 > user.bin`
    """
    with call.store() as store:
        if call.json:
            entry = store.get_entry(key)
            if entry is None:
                raise NotFoundError(f"no such key: {key!r}")
            ends = entry.expires_at
            console.say_json(
                {
                    "key": key,
                    **console.json_value(entry.value),
                    "version": entry.version,
                    "ttl": None if ends is None else round(entry.ttl(), 3),
                    "expires_at": None if ends is None else ends.isoformat(),
                    "created_at": entry.created_at.isoformat(),
                    "updated_at": entry.updated_at.isoformat(),
                }
            )
            return DONE
        value = store.get_or_raise(key)
    console.write(value)
    if console.on_terminal() and not value.endswith(b"\n"):
        console.say("")  # for the prompt; a pipe gets the value alone
    return DONE


def set_(
    call: Invocation,
    key: str = KEY,
    value: str = argument("VALUE", "The value. - reads standard input, as bytes."),
    ttl: float | None = span("--ttl", "Expire after this time: 90 (seconds), 15m, 1h30m, 7d."),
    keep_ttl: bool = flag("--keep-ttl", "Keep the expiry that the key has."),
    nx: bool = flag("--nx", "Only if the key does not exist."),
    xx: bool = flag("--xx", "Only if the key exists."),
    if_version: int | None = option(
        "--if-version N",
        "Only if the key has this version (see get --json). 0: only if it does not exist.",
        min=0,
    ),
) -> int:
    """Write a value. Without --ttl the key no longer expires.

    Exit code 1: the condition did not hold, and nothing was written. Put -- before a value that
    begins with a dash.

    **Example:** `pgkv set greeting hello --ttl 15m`

    **Example:** `tar c src | pgkv set backup -`

    **Example:** `pgkv set balance -- -5`
    """
    if nx + xx + (if_version is not None) > 1:
        raise typer.BadParameter("give at most one of --nx, --xx and --if-version")
    if keep_ttl and (nx or xx or ttl is not None):
        raise typer.BadParameter("--keep-ttl cannot be combined with --ttl, --nx and --xx")
    data = console.read() if value == "-" else os.fsencode(value)
    with call.store(create=True, notify=True) as store:
        if xx:
            new = _set_existing(store, key, data, ttl)
        else:
            wanted = 0 if nx else if_version  # version 0: the key is absent
            new = store.set(key, data, ttl=ttl, keep_ttl=keep_ttl, if_version=wanted)
    call.answer({"key": key, "written": new is not None, "version": new}, "")
    if new is None and not call.json:
        why = "exists" if nx else "does not exist" if xx else "has another version"
        console.fail("", f"not written: the key {key!r} {why}", as_json=False)
    return NOT_FOUND if new is None else DONE


def _set_existing(store: Store, key: str, data: bytes, ttl: float | None) -> int | None:
    """Write if the key exists; return the new version. The row stays locked in between."""
    with store.transaction() as transaction:
        if not transaction.set_xx(key, data, ttl=ttl):
            return None
        entry = transaction.get_entry(key)
        return None if entry is None else entry.version


def delete(
    call: Invocation,
    keys: list[str] | None = argument("KEY", "The keys.", None),
    prefix: str | None = option("--prefix -p TEXT", "Every key that begins with this."),
    yes: bool = flag("--yes -y", "Do not ask."),
) -> int:
    """Remove one key, several, or all with a prefix.

    Asks before it removes more than one key, unless --yes is given. Exit code 1: nothing was
    removed.

    **Example:** `pgkv delete user:1`

    **Example:** `pgkv delete --prefix session: --yes`
    """
    if bool(keys) == (prefix is not None):
        raise typer.BadParameter("give either keys or --prefix")
    many = list(dict.fromkeys(keys or ()))
    with call.store(notify=True) as store:
        if prefix is not None:
            what = f"that begin with {prefix!r}" if prefix else "there are"
            confirm(
                yes,
                SEVERAL,
                lambda: f"Remove all {console.count(store.count(prefix), 'key')} {what}?",
            )
            removed = store.delete_prefix(prefix)
        else:
            confirm(yes or len(many) == 1, SEVERAL, lambda: f"Remove {len(many)} keys?")
            removed = store.delete_many(many)
    several = prefix is not None or len(many) > 1
    call.answer({"deleted": removed}, f"deleted {removed:,}" if several else "")
    if not (removed or several or call.json):
        console.fail("", f"no such key: {many[0]!r}", as_json=False)
    return DONE if removed else NOT_FOUND


def scan(
    call: Invocation,
    start: str | None = argument("[PREFIX]", "Keys that begin with this.", None),
    prefix: str | None = option("--prefix -p TEXT", "The same, as an option."),
    limit: int | None = option(
        "--limit -l N",
        f"At most N rows. 0 means all. Default: all, on a terminal {TERMINAL_LIMIT}.",
        min=0,
    ),
    values: bool = flag("--values/--keys", "Keys and values, or keys alone.", True),
) -> int:
    r"""List keys and values in the order of the keys' bytes.

    A terminal shows a table. A pipe gets lines of key, tab, value, with `\n`, `\t`, `\\` and `\xHH`
    for characters that would break a line. --json prints one object a line. Memory use stays constant.

    **Example:** `pgkv scan user: --limit 20`

    **Example:** `pgkv scan --keys | wc -l`
    """
    if start is not None and prefix is not None:
        raise typer.BadParameter("give the prefix as an argument or as --prefix, not both")
    wanted = start or prefix or ""
    people = console.on_terminal() and not call.json
    most = TERMINAL_LIMIT if limit is None and people else limit or None
    with call.store() as store:
        found: Iterator[Any]
        if values:
            size = min(most + 1 if most else PAGE_ITEMS, PAGE_ITEMS)
            found = store.iter_items(wanted, page_size=size)
        else:
            found = ((key, None) for key in store.iter_keys(wanted, page_size=PAGE_KEYS))
        rows = islice(found, most)
        if people:
            columns = ("key", "value") if values else ("key",)
            cells = [
                (console.one_line(k), *([console.preview(v)] if values else [])) for k, v in rows
            ]
            console.show_table(columns, cells)
        else:
            for key, value in rows:
                if call.json:
                    console.say_json({"key": key, **(console.json_value(value) if values else {})})
                else:
                    rest = f"\t{console.one_line(value)}" if values else ""
                    console.say(console.one_line(key) + rest)
        if limit is None and most is not None and next(found, None) is not None:
            console.note(f"These are the first {most}; --limit 0 shows all.")
    return DONE


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
    return call.answer({"written": written}, f"wrote {console.count(written, 'key')}")


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
            options = ScanOptions(prefix=prefix, after=after, limit=PAGE_ITEMS)
            page = store._execute(store._sql.dump(options))
            for key, value, left in page:
                life = {} if left is None else {"ttl": round(left, 6)}
                console.say_json({"key": key, **console.json_value(value), **life})
            if len(page) < PAGE_ITEMS:
                return DONE
            after = page[-1][0]
