"""`command.py` is the frame of ``pgkv``'s commands: the options that all of them take, their
registration, and the messages and exit codes of failures.

A command is a function whose first parameter is an `Invocation` and which returns its exit code. `register`
adds the common options, which can stand before or after the command's name.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from .. import __version__, embedded
from ..config import (
    BYTES_MIN,
    EMBEDDED_SCHEME,
    ENTRIES_MIN,
    Config,
    Pooler,
    dsn_from_environment,
)
from ..errors import (
    ConfigError,
    DecodingError,
    InvalidKeyError,
    InvalidValueError,
    NotFoundError,
    PgkvError,
    TableNotFoundError,
)
from ..store import Store
from . import console

DONE, NOT_FOUND, USAGE, UNAVAILABLE, INTERRUPTED = 0, 1, 2, 3, 130
INTERNAL, INPUT_OUTPUT = 70, 74  # sysexits' EX_SOFTWARE and EX_IOERR

_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_DURATION = re.compile(r"(\d+(?:\.\d+)?|\.\d+)(ms|[smhdw])", re.IGNORECASE)

# The base of what typer raises for wrong usage. Its name depends on the version: click's, or a
# copy of it within typer.
UsageError: Any = typer.BadParameter.__bases__[0]


class _HelpIsAFlag:
    """`--help` is listed without a value, as other flags are."""

    def get_help_option(self, ctx: Any) -> TyperOption | None:
        option: TyperOption | None = super().get_help_option(ctx)  # type: ignore[misc]  # a mixin
        if option is not None:
            option.metavar = ""
        return option


class _Command(_HelpIsAFlag, TyperCommand): ...


class _Group(_HelpIsAFlag, TyperGroup): ...


app: typer.Typer = typer.Typer(
    name="pgkv",
    cls=_Group,
    help="A key-value store on PostgreSQL: read it, change it, check it, try it.",
    epilog="Help for one command: pgkv set --help. A demonstration: pgkv demo",
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def duration(text: str) -> float:
    """Return the seconds in ``90``, ``1.5h`` or ``1h30m``; BadParameter for anything else."""
    compact = text.strip().replace(" ", "")
    try:
        found = float(compact)
    except ValueError:
        parts = _DURATION.findall(compact)
        if not parts or "".join(number + unit for number, unit in parts) != compact:
            raise typer.BadParameter(
                f"{text!r} is not a duration: give seconds, or units as in 30s, 15m, 1h30m, 7d"
            ) from None
        found = sum(float(number) * _UNITS[unit.lower()] for number, unit in parts)
    if not math.isfinite(found) or found <= 0:
        raise typer.BadParameter(f"{text!r} must be more than 0 seconds")
    return found


def option(usage: str, help: str, default: Any = None, **more: Any) -> Any:  # as typer calls it
    """Return the default of a parameter that is an option. Its usage is the names and what stands for
    the value, such as ``--limit -l N``; a flag has no value."""
    names = [each for each in usage.split() if each.startswith("-")]
    more.setdefault("metavar", "".join(usage.split()[len(names) :]))
    return typer.Option(default, *names, help=help, **more)


def flag(usage: str, help: str, default: bool = False) -> Any:  # as above
    return option(usage, help, default)


def span(name: str, help: str, default: str | None = None) -> Any:  # as above
    """Return the default of an option that takes a time, such as 90 (seconds), 15m or 1h30m."""
    return option(f"{name} TIME", help, default, parser=duration)


def argument(metavar: str, help: str, default: Any = ...) -> Any:  # as above
    """Return the default of a parameter that is an argument: one without a default must be given."""
    return typer.Argument(default, metavar=metavar or None, help=help)


def confirm(given: bool, what: str, question: Callable[[], str]) -> None:
    """Ask before something that cannot be taken back, unless ``--yes`` was given; `what` it does."""
    if given:
        return
    if not console.can_ask():
        raise typer.BadParameter(f"{what}: confirm with --yes")
    if not typer.confirm(question(), err=True):
        raise typer.Exit(NOT_FOUND)


# Options that several commands have.
MAX_ENTRIES = option("--max-entries N", "Keep about N keys.", min=ENTRIES_MIN)
MAX_BYTES = option("--max-bytes N", "Keep about N bytes.", min=BYTES_MIN)
PREFIX = option("--prefix -p TEXT", "Keys that begin with this.", "")


def _common(usage: str, help: str, default: Any = None, **more: Any) -> Any:
    more["rich_help_panel"] = "Store and output"
    return field(default=default, metadata={"option": option(usage, help, default, **more)})


@dataclass(frozen=True, slots=True)
class Invocation:
    """The options of every command: the store, and the output format. One after the command's name
    overrides one before it."""

    dsn: str | None = _common(
        "--dsn DSN",
        "postgresql://user@host/db, or embedded:///path. Default: PGKV_DSN, else DATABASE_URL. "
        "Keep passwords out of it: use PGPASSWORD or ~/.pgpass.",
    )
    table: str | None = _common("--table -t NAME", "The store's table. Default: kv_store.")
    schema: str | None = _common(
        "--schema NAME", "The table's schema. Default: as search_path has it."
    )
    namespace: str | None = _common(
        "--namespace -n PREFIX", "Prefix of every key, left out where keys are shown."
    )
    pooler: Pooler | None = _common(
        "--pooler",
        "transaction: behind PgBouncer in transaction mode. Default: none.",
        metavar=None,
    )
    timeout: float | None = _common(
        "--timeout TIME", "The time limit of one operation. Default: 30s.", parser=duration
    )
    json: bool = _common("--json", "Print JSON, one document a line.", False)

    def config(self, **options: Any) -> Config:
        """Return the requested settings; the default DSN comes from the environment."""
        wanted = {
            "table_name": self.table,
            "schema": self.schema,
            "pooler": self.pooler,
            "operation_timeout": self.timeout,
            **options,
        }
        given = {name: value for name, value in wanted.items() if value is not None}
        dsn = self.dsn if self.dsn is not None else dsn_from_environment()
        return Config(dsn, pool_min_size=0, application_name="pgkv cli", **given)

    @contextlib.contextmanager
    def store(self, *, create: bool = False, **options: Any) -> Iterator[Store]:
        """Open the store. Only a command that writes creates a missing table or embedded database: a
        mistyped name leaves nothing behind."""
        config = self.config(auto_create_table=create, **options)
        if not create:
            require_database(config)
        with Store(config) as store:
            yield store if self.namespace is None else store.namespace(self.namespace)

    def answer(self, document: dict[str, Any], text: str) -> int:
        """Print the document with --json, else the text; return the exit code."""
        if self.json:
            console.say_json(document)
        elif text:
            console.say(text)
        return DONE

    def show(
        self, documents: list[dict[str, Any]], columns: Sequence[console.Column], nothing: str
    ) -> int:
        """Print one document a line with --json, else a table, or a note that there is nothing."""
        if self.json:
            for document in documents:
                console.say_json(document)
        elif documents:
            console.show_documents(documents, columns)
        else:
            console.note(nothing)
        return DONE


def load_object(text: str, form: str) -> Any:
    """Return what the user's program has under MODULE:NAME, found from the working directory."""
    module, colon, name = text.partition(":")
    if not (module and colon and name):
        raise typer.BadParameter(f"{text!r} is not {form}")
    sys.path.insert(0, "")
    try:
        return attrgetter(name)(import_module(module))  # whose name may have a hyphen
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise typer.BadParameter(f"cannot load {text}: {error}") from None


def require_database(config: Config) -> None:
    """Refuse an embedded database that does not exist yet: opening it would create it."""
    if not config.dsn.startswith(EMBEDDED_SCHEME):
        return
    path = Path(embedded.parse(config.dsn) or embedded.default_path())
    with contextlib.suppress(PermissionError):  # starting it says which directory is closed
        if not (path / "pgdata").exists():
            raise NotFoundError(
                f"there is no embedded database in {str(path)!r}; `pgkv set` creates it"
            )


def register(fn: Callable[..., int]) -> None:
    """Register ``fn(call, ...) -> exit code`` under its name, with the common options added."""

    def run(ctx: typer.Context, **given: Any) -> None:
        after = _set({each.name: given.pop(each.name) for each in fields(Invocation)})
        raise typer.Exit(fn(Invocation(**ctx.obj | after), **given))

    _sign(run, fn)
    app.command(fn.__name__.rstrip("_"), cls=_Command, help=inspect.getdoc(fn))(run)


def _set(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value not in (None, False)}


def _sign(fn: Any, options: Callable[..., Any]) -> None:
    """Give `fn` a context, the options of a function and the common ones: typer reads the signature."""
    hints = get_type_hints(options) | get_type_hints(Invocation) | {"ctx": typer.Context}
    _, *own = inspect.signature(options).parameters.values()  # the first one is no option
    defaults = {"ctx": inspect.Parameter.empty}
    defaults |= {each.name: each.default for each in own if each.kind is not each.VAR_KEYWORD}
    defaults |= {each.name: each.metadata["option"] for each in fields(Invocation)}
    keyword = inspect.Parameter.KEYWORD_ONLY
    fn.__annotations__ = {name: hints[name] for name in defaults}
    fn.__signature__ = inspect.Signature(
        [
            inspect.Parameter(name, keyword, annotation=hints[name], default=default)
            for name, default in defaults.items()
        ]
    )


def _root(
    ctx: typer.Context, version: bool = flag("--version", "Show the version."), **given: Any
) -> None:
    if version:
        console.say(f"pgkv {__version__}")
        raise typer.Exit(DONE)
    ctx.obj = _set(given)
    if ctx.invoked_subcommand is None:
        console.say(ctx.get_help())
        raise typer.Exit(USAGE)


_sign(_root, _root)
app.callback(invoke_without_command=True)(_root)


def main(argv: list[str] | None = None) -> int:
    """Run the command line, with this process's arguments by default; return the exit code."""
    console.prepare()
    # Retries and reconnects are not reported here: the line of an error has what matters.
    for name in ("pgkv", "psycopg"):
        logging.getLogger(name).addHandler(logging.NullHandler())
    args = sys.argv[1:] if argv is None else argv
    as_json = "--json" in args
    try:
        code = app(args=args, prog_name="pgkv", standalone_mode=False)
        sys.stdout.flush()
        return int(code or DONE)
    except PgkvError as error:
        console.fail(type(error).__name__, _advice(error), as_json)
        return _exit_code(error)
    except UsageError as error:
        ctx = error.ctx
        where = ctx.command_path if ctx is not None else "pgkv"
        console.fail("UsageError", f"{error.format_message()} (see {where} --help)", as_json)
        return USAGE
    except console.InputOutputError as error:
        console.fail(type(error).__name__, str(error), as_json)
        return INPUT_OUTPUT
    except SystemExit as error:  # how typer and rich end on a closed pipe
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        return _output_failed(error.__context__, as_json)
    except (KeyboardInterrupt, typer.Abort):
        console.note("")
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, OSError) and error.filename is None:
            return _output_failed(error, as_json)
        if os.environ.get("PGKV_TRACEBACK"):
            raise
        text = f"{type(error).__name__}: {error} (PGKV_TRACEBACK=1 shows where)"
        console.fail("Unexpected", f"this should not happen: {text}", as_json)
        return INTERNAL


def _output_failed(error: OSError, as_json: bool) -> int:
    console.discard_output()
    if isinstance(error, BrokenPipeError):
        return DONE  # the reader (such as head) has read enough
    console.fail("OSError", f"cannot write to standard output: {error.strerror}", as_json)
    return INPUT_OUTPUT


def _advice(error: PgkvError) -> str:
    text = str(error)
    if _exit_code(error) != USAGE and not isinstance(error, NotFoundError):
        text = re.sub(r"^[a-z_]+: ", "", text)  # the operation's name within pgkv
    if isinstance(error, TableNotFoundError):
        missing = text.partition(";")[0]
        return f"{missing}; the first write creates it, `pgkv schema` prints its DDL"
    return text


def _exit_code(error: PgkvError) -> int:
    if isinstance(error, NotFoundError | TableNotFoundError | DecodingError):
        return NOT_FOUND
    # A refusal by the server is not wrong usage: the store cannot be used.
    if isinstance(error, ConfigError | InvalidKeyError | InvalidValueError) and not error._sqlstate:
        return USAGE
    return UNAVAILABLE
