"""The parameters for libpq: the user's, with pgkv's own where the user gives none.

The user gives them in the DSN, in the service file that the DSN or PGSERVICE names, or in libpq's
environment variables, in this order of precedence, which is libpq's own.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from ..config import Config, Pooler

# Single statements need no more than READ COMMITTED, and above it a hot key is refused with 40001
# on every third call. Compiling a plan never pays for statements this small.
SESSION_OPTIONS = r"-c default_transaction_isolation=read\ committed -c jit=off"

# A dead peer is noticed within a minute and a half, not after the kernel's two hours.
KEEPALIVES_IDLE = 30  # seconds
TCP_USER_TIMEOUT = 90_000  # milliseconds
HOST_TIMEOUT_MIN = 2  # seconds; psycopg gives no host less


def build(config: Config, dsn: str) -> str:
    """Return the conninfo for a store's connections."""
    given = {name: value for name, value in conninfo_to_dict(dsn).items() if value is not None}
    elsewhere: dict[str, object] = {**_service(given), **given}
    ours: dict[str, str | int] = {
        "client_encoding": "UTF8",
        "connect_timeout": _host_timeout(config, len(_hosts(elsewhere))),
        "keepalives_idle": KEEPALIVES_IDLE,
        "tcp_user_timeout": TCP_USER_TIMEOUT,
    }
    if config.application_name == Config.application_name:
        ours["fallback_application_name"] = config.application_name  # PGAPPNAME comes before it
    else:
        ours["application_name"] = config.application_name
    if "PGCONNECT_TIMEOUT" in os.environ and config.connect_timeout == Config.connect_timeout:
        del ours["connect_timeout"]
    if config.pooler is Pooler.NONE:
        # First ours, then the user's: of two settings the server takes the last.
        theirs = elsewhere.get("options", os.environ.get("PGOPTIONS", ""))
        given.pop("options", None)
        ours["options"] = f"{SESSION_OPTIONS} {theirs}".strip()
    given.pop("client_encoding", None)  # everything here is written for UTF-8
    for name in elsewhere:
        if name not in ("client_encoding", "options"):
            ours.pop(name, None)
    return make_conninfo("", **(ours | given))


def connect_time(config: Config, conninfo: str) -> float:
    """Return the seconds in which one of the hosts answers, or none of them does."""
    params = _params(conninfo)
    seconds = params.get("connect_timeout", os.environ.get("PGCONNECT_TIMEOUT", ""))
    hosts = len(_hosts(params))
    if hosts == 1 or not seconds.isdigit():
        return config.connect_timeout
    return hosts * max(HOST_TIMEOUT_MIN, int(seconds))


def server_of(conninfo: str) -> tuple[str | None, int | None, str | None]:
    """Return host, port and database, as far as they are given; None for the host if there are several."""
    params = _params(conninfo)

    def value(name: str, variable: str) -> str:
        return params.get(name) or os.environ.get(variable, "")

    host = value("host", "PGHOST") or value("hostaddr", "PGHOSTADDR")
    port = value("port", "PGPORT")
    database = value("dbname", "PGDATABASE") or value("user", "PGUSER")
    alone = "," not in host
    return host if host and alone else None, int(port) if port.isdigit() else None, database or None


def _params(conninfo: str) -> dict[str, str]:
    given = {name: str(value) for name, value in conninfo_to_dict(conninfo).items()}
    return _service(given) | given


def _host_timeout(config: Config, hosts: int) -> int:
    """The time for each host: all of them have their turn within an operation's time."""
    seconds = config.connect_timeout
    if hosts > 1:
        seconds = max(HOST_TIMEOUT_MIN, min(seconds, config.operation_timeout / (hosts + 0.5)))
        return int(seconds)
    return max(1, round(seconds))


def _hosts(params: Mapping[str, object]) -> list[str]:
    for name, variable in (("hostaddr", "PGHOSTADDR"), ("host", "PGHOST")):
        if value := params.get(name) or os.environ.get(variable):
            return str(value).split(",")
    return [""]


def _service(params: Mapping[str, object]) -> dict[str, str]:
    """What the service file says; libpq reads it too, but does not tell."""
    name = str(params.get("service") or os.environ.get("PGSERVICE") or "")
    if not name:
        return {}
    import configparser

    system = os.environ.get("PGSYSCONFDIR")
    files = [
        params.get("servicefile") or os.environ.get("PGSERVICEFILE") or "~/.pg_service.conf",
        *([f"{system}/pg_service.conf"] if system else []),
    ]
    for file in map(str, files):
        parser = configparser.RawConfigParser(
            delimiters=("=",), comment_prefixes=("#",), strict=False, default_section="\n"
        )
        with contextlib.suppress(OSError, configparser.Error, UnicodeError):
            parser.read_string(Path(file).expanduser().read_text())
            if parser.has_section(name):
                return dict(parser.items(name))
    return {}
