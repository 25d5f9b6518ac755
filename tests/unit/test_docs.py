"""What the pages list is what there is: public names, settings, events of the log."""

from __future__ import annotations

import ast
import dataclasses
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pgkv
from pgkv import errors

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
ENTRY = re.compile(
    r"^\.\. auto(?:class|exception|function|data|decorator):: pgkv\.(\w+)$", re.MULTILINE
)
LEVELS = ("debug", "info", "warning", "event")


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def test_reference_and_public_names_are_the_same() -> None:
    """Each public name has one entry in docs/reference/, and no name appears or goes unnoticed."""
    pages = (DOCS / "reference").glob("*.md")
    entries = [name for page in pages for name in ENTRY.findall(page.read_text(encoding="utf-8"))]
    assert sorted(name for name in pgkv._MODULE_OF if not name.startswith("__")) == sorted(entries)


def test_every_error_is_in_the_troubleshooting() -> None:
    """Each public error has a row that says its cause and what to do."""
    rows = "\n".join(re.findall(r"^\| .*\|$", page("troubleshooting.md"), re.MULTILINE))
    assert [name for name in errors.__all__ if f"`{name}" not in rows] == []


# -- settings


def rows(text: str) -> Iterator[list[str]]:
    """The rows of its tables whose first cell is code, as cells without their backquotes."""
    for line in re.findall(r"^\| `.* \|$", text, re.MULTILINE):
        yield [cell.strip() for cell in line.strip("|").split("|")]


def defaults(of: type[Any]) -> dict[str, Any]:
    return {
        field.name: field.default_factory()
        if field.default_factory is not dataclasses.MISSING
        else field.default
        for field in dataclasses.fields(of)
    }


@pytest.mark.parametrize("of", [pgkv.Config, pgkv.RetryPolicy], ids=lambda of: of.__name__)
def test_every_setting_is_explained_with_its_default(of: type[Any]) -> None:
    """docs/operations.md lists each field in order, with its default and when to change it."""
    text = page("operations.md").partition("## Every setting")[2]
    listed = {name.strip("`"): (default, advice) for name, default, advice in rows(text)}
    wanted = defaults(of)
    assert [name for name in listed if name in wanted] == list(wanted)
    assert set(listed) <= {*defaults(pgkv.Config), *defaults(pgkv.RetryPolicy)}
    for name, default in wanted.items():
        shown, advice = listed[name]
        if default is dataclasses.MISSING:
            assert shown == "none"
        else:
            assert (
                eval(shown.strip("`"), {each: getattr(pgkv, each) for each in pgkv._MODULE_OF})
                == default
            ), name
        assert advice, name


# -- events


def logging_calls() -> Iterator[tuple[str, str, list[ast.keyword]]]:
    """Each place in the code that logs an event: its name, its level, its fields."""
    for path in (*(ROOT / "pgkv").rglob("*.py"), *(ROOT / "patterns").rglob("*.py")):
        if path.is_relative_to(ROOT / "pgkv" / "_cli" / "demo"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = node.func
            level = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            first = node.args[0] if node.args else None
            if level in LEVELS and isinstance(first, ast.Constant):
                yield str(first.value), level, node.keywords


def events() -> Iterator[tuple[str, str, frozenset[str] | None]]:
    """Each event that the code logs: its name, its level, and its fields where they are written out
    beside it."""
    for event, level, keywords in logging_calls():
        names = [keyword.arg for keyword in keywords]
        yield event, level, None if None in names else frozenset(map(str, names))


def test_every_event_is_explained() -> None:
    """docs/monitoring.md lists each event that the code logs, with its level and its fields, and none
    that it does not."""
    text = page("monitoring.md").partition("## Events")[2].partition("## Metrics")[0]
    listed = {
        name.strip("`"): (level, frozenset(re.findall(r"`(\w+)`", fields)))
        for name, level, fields, *_ in rows(text)
    }
    logged = list(events())
    assert set(listed) == {name for name, *_ in logged}
    for name, level, fields in logged:
        assert listed[name][0] == level, name
        assert fields in (None, listed[name][1]), name


def test_errors_are_logged_in_one_form() -> None:
    """`error` is the exception's class, never its text: a user's exception may quote his data."""
    for event, _, keywords in logging_calls():
        for field in keywords:
            if field.arg == "error":
                assert ast.unparse(field.value) == "type(error).__name__", event


def test_no_field_is_one_of_the_standard_librarys() -> None:
    """structlog may hand fields on as `extra`, which refuses the names of a record's own."""
    taken = {*vars(logging.makeLogRecord({})), "message", "asctime"}
    for event, _, fields in events():
        assert taken.isdisjoint(fields or ()), event


def test_the_events_of_lost_leases_have_the_fields_listed() -> None:
    """The events whose fields are put together elsewhere."""
    found = re.search(
        r"context: .*? = \{(.*?)\}", (ROOT / "patterns" / "_runtime" / "lease.py").read_text()
    )
    assert found is not None
    assert re.findall(r'"(\w+)":', found[1]) == ["reason"]
    assert "| `pgkv.lock.lost` | warning | `lock`, `reason`, `owner`, `cause`, `detail` |" in page(
        "monitoring.md"
    )
