"""What a demo runs on: a server and a table, removed at the end, also after a signal."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

import psycopg

from ... import embedded
from ..._engine import conninfo as _conninfo
from ..._ops.op import Op, Statement
from ..._sql.table import read_nothing
from ...config import EMBEDDED_SCHEME, Config, Pooler, TtlCleanupStrategy
from ...errors import StoreUnavailableError
from ...patterns.schema import tables
from ...store import Store
from .stage import WORKERS, Size, Stage


@contextlib.contextmanager
def open_stage(
    dsn: str | None, options: dict[str, Any], size: Size, *, quiet: bool
) -> Iterator[Stage]:
    """Create a table for the demo, on a temporary server if no DSN is given.

    Both are removed afterwards, except after a SIGKILL.
    """
    with contextlib.ExitStack() as cleanup:
        signals = cleanup.enter_context(_Interrupts())
        is_own = dsn is None
        if dsn is None:
            dsn = cleanup.enter_context(_temporary_server()).dsn
        elif dsn.startswith(EMBEDDED_SCHEME):
            dsn = cleanup.enter_context(embedded.start(embedded.parse(dsn))).dsn
        table = f"pgkv_demo_{secrets.token_hex(4)}"
        pooler: Pooler = options["pooler"]
        settings = {**options, "dsn": dsn, "table_name": table, "pooler": pooler.value}
        config = config_of(settings, WORKERS + 2)
        store = cleanup.enter_context(Store(config))
        store.create_table()
        cleanup.callback(_drop, store)
        cleanup.callback(signals.ignore)
        yield Stage(store, settings, size, _server_version(config), is_own, quiet)


def config_of(settings: dict[str, Any], connections: int) -> Config:
    """Return the `Config` of `Stage.settings`, for a process with that many connections."""
    return Config(
        **{**settings, "pooler": Pooler(settings["pooler"])},
        application_name="pgkv demo",
        pool_max_size=connections,
        # Scenes collect expired rows themselves, and count them.
        ttl_cleanup_strategy=TtlCleanupStrategy.MANUAL,
    )


@contextlib.contextmanager
def _temporary_server() -> Iterator[embedded.EmbeddedServer]:
    path = tempfile.mkdtemp(prefix="pgkv-demo-")
    try:
        with embedded.start(path) as server:
            yield server
    finally:
        shutil.rmtree(path, ignore_errors=True)


class _Interrupts:
    """SIGTERM and SIGHUP end the demo as Ctrl-C does, so that it cleans up."""

    def __init__(self) -> None:
        main = threading.current_thread() is threading.main_thread()
        names = ("SIGINT", "SIGTERM", "SIGHUP") if main else ()
        self._numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        self._before: list[tuple[int, Any]] = []

    def __enter__(self) -> Self:
        self._before = [(number, signal.signal(number, _interrupt)) for number in self._numbers]
        return self

    def ignore(self) -> None:
        """The demo is cleaning up: a second Ctrl-C must not interrupt that."""
        for number in self._numbers:
            signal.signal(number, signal.SIG_IGN)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before:
            signal.signal(number, handler)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _drop(store: Store) -> None:
    """Drop the store's table, and those of locks and sessions that scenes created."""
    names = ", ".join(table.quoted for table in tables(store._config))
    drop = Statement(
        "drop", f"DROP TABLE IF EXISTS {names}", (), read_nothing, script=True, writes=False
    )
    store._execute(Op(drop))


def _server_version(config: Config) -> str:
    try:
        with psycopg.connect(_conninfo.build(config, config.dsn)) as conn:
            number = conn.info.server_version
    except psycopg.Error as error:
        raise StoreUnavailableError(f"demo: {error}") from error
    return f"{number // 10_000}.{number % 10_000}"
