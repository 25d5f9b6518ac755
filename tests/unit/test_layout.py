"""The agreements about where things stand that no other tool checks."""

import ast
import enum
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import pgkv
from tests.each import for_each

ROOT = Path(__file__).resolve().parents[2]
CORE = sorted(
    path for path in (ROOT / "pgkv").rglob("*.py") if "patterns" not in path.relative_to(ROOT).parts
)
PATTERNS = sorted((ROOT / "patterns").rglob("*.py"))

MODULES_WITH_SQL = {
    "pgkv/_engine/schema.py",
    "pgkv/_engine/sweep.py",
    "pgkv/_shards/sql.py",
    "pgkv/testing.py",  # puts a clock of its own into a test's schema
}
PATTERN_MODULES_WITH_SQL = ("sql", "overview")  # each pattern's own; what asks about all
PACKAGES_WITH_SQL = ("pgkv/_sql/", "pgkv/_cli/doctor/")
# Verbs as statements have them; upper case for the two that are also plain English in a message.
SQL_VERB = re.compile(
    r"(?i:\binsert\s+into\b)|(?i:\bdelete\s+from\b)|(?i:\bupdate\s+\S+\s+set\b)|\bSELECT\s|(?i:^\s*select\s.+\sfrom\s)",
)


@cache
def parsed(path: Path) -> ast.Module:
    """The source of a module, read once."""
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def may_hold_sql(path: Path) -> bool:
    name = name_of(path)
    return (
        name in MODULES_WITH_SQL
        or name.startswith(PACKAGES_WITH_SQL)
        or (path in PATTERNS and path.stem in PATTERN_MODULES_WITH_SQL)
    )


def text_constants(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of each str or bytes constant, f-strings' parts too, docstrings left out."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
            yield node.lineno, "".join(str(part) for part in parts)
        elif isinstance(node, ast.Constant) and id(node) not in docstrings:
            if isinstance(node.value, str):
                yield node.lineno, node.value
            elif isinstance(node.value, bytes):
                yield node.lineno, node.value.decode(errors="replace")


@for_each([path for path in CORE + PATTERNS if not may_hold_sql(path)], name_of)
def test_sql_stands_in_few_modules(path: Path) -> None:
    """SQL verbs occur in _sql/, in each pattern's sql.py and in the few modules listed here, and nowhere else."""
    found = [
        f"line {line}: {text.strip()[:60]!r}"
        for line, text in text_constants(parsed(path))
        if SQL_VERB.search(text)
    ]
    assert not found, "statements belong into pgkv/_sql/ or the sql.py of a pattern: " + "; ".join(
        found
    )


@pytest.mark.parametrize(
    ("text", "is_sql"),
    [
        ("INSERT INTO t VALUES ($1)", True),
        ("  select 1 from t", True),
        ("WITH x AS (SELECT 1)", True),
        ("update {} set value = $1", True),
        ("delete from t", True),
        ("select one of: poll, notify", False),
        ("update() gave up after 100 attempts; set attempts higher", False),
    ],
)
def test_sql_is_told_from_english(text: str, is_sql: bool) -> None:
    """The search for SQL verbs finds statements and leaves messages alone."""
    assert is_sql == bool(SQL_VERB.search(text))


@for_each(CORE + PATTERNS, name_of)
def test_a_module_says_what_it_is_for(path: Path) -> None:
    """Each module opens with a docstring."""
    assert ast.get_docstring(parsed(path))


def test_no_two_classes_share_a_name() -> None:
    """A class is found by its name, a private or nested one too."""
    places: dict[str, list[str]] = {}
    for path in CORE + PATTERNS:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(f"{name_of(path)}:{node.lineno}")
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


ARCHAIC = re.compile(
    r"\b(whoever|somebody|nobody|whom|beside|anew|so\s+many|so\s+long|in\s+vain|dearer|shall"
    r"|of\s+which\s+one)\b",
    re.IGNORECASE,
)
ACCOUNT = "`nobody`"  # of the operating system


@for_each(CORE + PATTERNS, name_of)
def test_plain_words(path: Path) -> None:
    """Docstrings, comments and messages are in plain, present-day English."""
    text = path.read_text(encoding="utf-8").replace(ACCOUNT, "").replace('"nobody"', "")
    assert [each.group() for each in ARCHAIC.finditer(text)] == []


def test_patterns_is_one_package() -> None:
    """pgkv.patterns is the folder patterns/, by the link in a checkout."""
    assert (ROOT / "pgkv" / "patterns").resolve() == ROOT / "patterns"


def test_public_names_are_all_there_is() -> None:
    """A name without underscore in pgkv is public on purpose: it is listed there, and the reverse."""
    names = {
        name
        for name in dir(pgkv)
        if not name.startswith("_") and not isinstance(getattr(pgkv, name), ModuleType)
    }
    assert set(pgkv._MODULE_OF) == names


def own_doc(thing: object) -> str | None:
    """The docstring written for the thing itself: not inherited, not the one that dataclass or Enum makes up."""
    if not isinstance(thing, type):
        return inspect.getdoc(thing)
    doc = thing.__dict__.get("__doc__")
    made_up = (
        doc is None
        or doc.startswith(f"{thing.__name__}(")
        or (issubclass(thing, enum.Enum) and doc == enum.Enum.__doc__)
    )
    return None if made_up else doc


def is_documentable(name: str) -> bool:
    """Classes and functions; a constant or a type alias carries no docstring."""
    return isinstance(getattr(pgkv, name), type) or callable(getattr(pgkv, name))


@for_each([name for name in pgkv._MODULE_OF if is_documentable(name)])
def test_public_names_are_documented(name: str) -> None:
    """Each public name has a docstring of its own."""
    assert own_doc(getattr(pgkv, name)), f"pgkv.{name} has no docstring"


# -- docstrings ----------------------------------------------------------------------------

ADAPTERS = ("pgkv.integrations.fastapi", "pgkv.integrations.flask", "pgkv.testing")
# What these methods are given is documented at their namesakes.
NAMESAKES = {
    pgkv.Pipeline: pgkv.Store,
    pgkv.TypedStore: pgkv.Store,
    pgkv.ShardedStore: pgkv.Store,
}
SECTION = re.compile(r"^(Args|Attributes):\n((?:    .*\n|\n)+)", re.MULTILINE)
ITEM = re.compile(r"^    \*{0,2}(\w+):", re.MULTILINE)
TICKED = re.compile(r"``?\*{0,2}(\w+)[`= (,]")


def items_of(doc: str | None, section: str) -> set[str]:
    """The names that a section of a docstring explains."""
    found = dict(SECTION.findall(inspect.cleandoc(doc or "") + "\n"))
    return set(ITEM.findall(found.get(section, "")))


def parameters_of(function: Callable[..., Any]) -> list[str]:
    """The names of what a call is given; of a wrapper's ``*args`` its function tells."""
    given = inspect.signature(function).parameters.values()
    return [
        each.name
        for each in given
        if each.name not in ("self", "cls", "args", "kwargs") and not each.name.startswith("_")
    ]


def methods_of(kind: type) -> dict[str, Callable[..., Any]]:
    """The methods that pgkv gives a class, by name."""
    found: dict[str, Callable[..., Any]] = {}
    for base in reversed(kind.__mro__):
        if not base.__module__.startswith("pgkv"):
            continue
        for name, member in vars(base).items():
            function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
            if not name.startswith("_") and inspect.isfunction(function):
                found[name] = function
    return found


def public_things() -> dict[str, Any]:
    """What pgkv and its adapters export, but for exceptions; of a sync and an async one the sync one."""
    found = {name: getattr(pgkv, name) for name in pgkv._MODULE_OF}
    for module in ADAPTERS:
        adapter = importlib.import_module(module)
        found |= {f"{module}.{name}": getattr(adapter, name) for name in adapter.__all__}
    return {
        name: thing
        for name, thing in found.items()
        if not name.startswith("Async")
        and not (isinstance(thing, type) and issubclass(thing, BaseException))
    }


def functions() -> dict[str, tuple[Callable[..., Any], type | None]]:
    """Public functions and methods, with the class of the latter."""
    found: dict[str, tuple[Callable[..., Any], type | None]] = {}
    for name, thing in public_things().items():
        if not isinstance(thing, type):
            found[name] = (thing, None)
            continue
        for method, function in methods_of(thing).items():
            found[f"{name}.{method}"] = (function, thing)
    return found


FUNCTIONS = functions()
CLASSES = {name: thing for name, thing in public_things().items() if isinstance(thing, type)}


@for_each(FUNCTIONS)
def test_parameters_are_documented(name: str) -> None:
    """A docstring explains each parameter in its Args, all of them or none; where it has no Args it
    names each in its text, or its class does, or the method of the same name on a Store."""
    function, kind = FUNCTIONS[name]
    doc, given = inspect.getdoc(function), set(parameters_of(function))
    explained = items_of(doc, "Args")
    if explained:
        assert explained == given
        return
    named = set(TICKED.findall(doc or ""))
    if kind is not None:
        named |= set(TICKED.findall(kind.__doc__ or "")) | items_of(kind.__doc__, "Args")
        twin = getattr(NAMESAKES.get(kind), function.__name__, None)
        named |= set(parameters_of(twin)) if twin is not None else set()
    assert given - named == set()


@for_each(CLASSES)
def test_what_a_class_is_made_with(name: str) -> None:
    """A class explains what it is made with, or says what makes it."""
    kind = CLASSES[name]
    doc = kind.__doc__ or ""
    if issubclass(kind, enum.Enum) or kind is pgkv.KeyValue or "made by" in doc:
        return
    own = (base for base in kind.__mro__ if base.__module__.startswith("pgkv"))
    given = set(parameters_of(kind)) if any("__init__" in vars(base) for base in own) else set()
    explained = items_of(doc, "Args") | items_of(doc, "Attributes")
    assert given - explained == set()
    assert items_of(doc, "Args") - given <= set(parameters_of(kind))


SAYS_WHAT = re.compile(r"\b([Rr]eturns?|True|None|[Tt]ells?|[Ii]terate)\b")
# Views, decorators and what is entered: the first sentence says what they are.
SELF_EVIDENT = ("Self", "Handle", "Callable", "Iterator[None]", "Entering", "Invalidator")


@for_each(FUNCTIONS)
def test_results_are_documented(name: str) -> None:
    """What returns a value says which."""
    function, _ = FUNCTIONS[name]
    result = str(inspect.signature(function).return_annotation)
    if result != "None" and not result.startswith(SELF_EVIDENT):
        assert SAYS_WHAT.search(inspect.getdoc(function) or "")
