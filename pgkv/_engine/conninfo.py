"""What libpq is told: the user's DSN, with what pgkv needs where the user said nothing."""

from __future__ import annotations

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from ..config import Config, Pooler

# Single statements need no more than READ COMMITTED, and above it a hot key is refused with 40001
# on every third call. Compiling a plan never pays for statements this small.
SESSION_OPTIONS = r"-c default_transaction_isolation=read\ committed -c jit=off"

# A dead peer is noticed within a minute and a half, not after the kernel's two hours.
KEEPALIVES_IDLE = 30  # seconds
TCP_USER_TIMEOUT = 90_000  # milliseconds


def build(config: Config, dsn: str) -> str:
    """Return the conninfo for a store's connections. What the DSN says wins."""
    given = {name: value for name, value in conninfo_to_dict(dsn).items() if value is not None}
    ours: dict[str, str | int] = {
        "application_name": config.application_name,
        "connect_timeout": max(1, round(config.connect_timeout)),
        "client_encoding": "UTF8",
        "keepalives_idle": KEEPALIVES_IDLE,
        "tcp_user_timeout": TCP_USER_TIMEOUT,
    }
    if config.pooler is Pooler.NONE:
        # First ours, then the user's: of two settings the server takes the last.
        options = str(given.pop("options", ""))
        ours["options"] = f"{SESSION_OPTIONS} {options}".strip()
    given.pop("client_encoding", None)  # everything here is written for UTF-8
    return make_conninfo("", **(ours | given))
