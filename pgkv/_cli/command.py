"""`_command.py` is the frame of ``pgkv``'s commands: the options that all of them take, what a
command is given, how one is registered, and what its failures become. The commands themselves are
in `cli.py`.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, TypeAlias, get_type_hints

import typer

from ..config import Config, Pooler, dsn_from_environment
from ..errors import (
    ConfigError,
    InvalidKeyError,
    InvalidValueError,
    NotFoundError,
    PgkvError,
    TableNotFoundError,
)
from ..store import Store
from . import console

DONE, NOT_FOUND, USAGE, UNAVAILABLE, INTERRUPTED, INTERNAL = 0, 1, 2, 3, 130, 70

# The base of what typer raises for wrong usage. Its name depends on the version: click's, or a
# copy of it within typer.
UsageError: Any = typer.BadParameter.__bases__[0]

app: typer.Typer = typer.Typer(
    name="pgkv",
    help="A key-value store on PostgreSQL: look into it, change it, check it, try it.",
    epilog="Each command explains itself: pgkv set --help. To see pgkv at work: pgkv demo",
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def duration(text: str) -> float:
    try:
        return console.parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


_PANEL = "Which store, and how it is shown"
Seconds: TypeAlias = "float | None"

# Options of every command. What stands after the command's name wins over what stands before.
COMMON: dict[str, Any] = {
    "dsn": Annotated[
        str | None,
        typer.Option(
            "--dsn",
            metavar="DSN",
            rich_help_panel=_PANEL,
            help="postgresql://user@host/db, or embedded:///path. Default: PGKV_DSN, else "
            "DATABASE_URL. Keep passwords out of it: PGPASSWORD or ~/.pgpass serve.",
        ),
    ],
    "table": Annotated[
        str | None,
        typer.Option("--table", "-t", metavar="NAME", rich_help_panel=_PANEL,
                     help="The store's table. Default: kv_store."),
    ],
    "schema": Annotated[
        str | None,
        typer.Option("--schema", metavar="NAME", rich_help_panel=_PANEL,
                     help="The table's schema. Default: as search_path has it."),
    ],
    "namespace": Annotated[
        str | None,
        typer.Option("--namespace", "-n", metavar="PREFIX", rich_help_panel=_PANEL,
                     help="Put this before every key, and take it off what is shown."),
    ],
    "pooler": Annotated[
        Pooler | None,
        typer.Option("--pooler", rich_help_panel=_PANEL,
                     help="transaction: behind PgBouncer in transaction mode. Default: none."),
    ],
    "timeout": Annotated[
        Seconds,
        typer.Option("--timeout", metavar="TIME", parser=duration, rich_help_panel=_PANEL,
                     help="The most that one operation may take. Default: 30s."),
    ],
    "json": Annotated[
        bool,
        typer.Option("--json", rich_help_panel=_PANEL, help="JSON, one document a line."),
    ],
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Call:
    """What every command is given: which store, and how to answer."""

    dsn: str | None = None
    table: str | None = None
    schema: str | None = None
    namespace: str | None = None
    pooler: Pooler | None = None
    timeout: float | None = None
    json: bool = False

    def config(self, **options: Any) -> Config:
        """Return the settings asked for; without a DSN the environment's."""
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
    def store(self, *, create: bool = False) -> Iterator[Store]:
        """Open the store. Only a command that writes creates a missing table: a mistyped --table
        should leave nothing behind."""
        with Store(self.config(auto_create_table=create)) as store:
            yield store if self.namespace is None else store.namespace(self.namespace)


def register(name: str, fn: Callable[..., int]) -> None:
    """Register ``fn(call, ...) -> exit code`` under that name, with the common options added."""
    hints = get_type_hints(fn, include_extras=True)
    own = [
        parameter.replace(annotation=hints[parameter.name], kind=parameter.KEYWORD_ONLY)
        for parameter in list(inspect.signature(fn).parameters.values())[1:]
    ]

    def run(ctx: typer.Context, **given: Any) -> None:
        after = {option: given.pop(option) for option in COMMON}
        common = (ctx.obj or {}) | {k: v for k, v in after.items() if v not in (None, False)}
        raise typer.Exit(fn(Call(**common), **given))

    _sign(run, own)
    app.command(name, help=inspect.getdoc(fn))(run)


def _sign(fn: Any, own: list[inspect.Parameter]) -> None:
    """Give `fn` a context, those parameters and the common options: typer reads the signature."""
    first = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    common = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=annotation,
            default=False if name == "json" else None,
        )
        for name, annotation in COMMON.items()
    ]
    parameters = [first, *own, *common]
    fn.__signature__ = inspect.Signature(parameters)
    fn.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


def _root(ctx: typer.Context, **given: Any) -> None:
    if given.pop("version"):
        console.say(f"pgkv {_version()}")
        raise typer.Exit(DONE)
    ctx.obj = {k: v for k, v in given.items() if v not in (None, False)}
    if ctx.invoked_subcommand is None:
        console.say(ctx.get_help())
        raise typer.Exit(USAGE)


_sign(
    _root,
    [
        inspect.Parameter(
            "version",
            inspect.Parameter.KEYWORD_ONLY,
            annotation=Annotated[bool, typer.Option("--version", help="Show the version.")],
            default=False,
        )
    ],
)
app.callback(invoke_without_command=True)(_root)


def _version() -> str:
    try:
        return version("pgkv-toolkit")
    except PackageNotFoundError:
        return "(not installed: running from its source)"


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; None for the process's own.

    Returns:
        The exit code.
    """
    # Retries and reconnects are no news here: what matters ends up in the one line of an error.
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
    except BrokenPipeError:
        # The reader (head, say) has seen enough. Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (KeyboardInterrupt, typer.Abort):
        console.note("")
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("PGKV_TRACEBACK"):
            raise
        text = f"{type(error).__name__}: {error} (PGKV_TRACEBACK=1 shows where)"
        console.fail("Unexpected", f"this should not happen: {text}", as_json)
        return INTERNAL


def _advice(error: PgkvError) -> str:
    if isinstance(error, TableNotFoundError):
        return f"{str(error).partition(';')[0]}; `pgkv set` makes it, `pgkv schema` prints its DDL"
    return str(error)


def _exit_code(error: PgkvError) -> int:
    if isinstance(error, NotFoundError | TableNotFoundError):
        return NOT_FOUND
    # A refusal that came from the server is no wrong usage, but a store that cannot be used.
    if isinstance(error, ConfigError | InvalidKeyError | InvalidValueError) and not error._sqlstate:
        return USAGE
    return UNAVAILABLE
