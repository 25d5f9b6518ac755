"""`cli.py` is the ``pgkv`` command: the list of its commands, and what runs them.

Exit codes: 0 done, 1 not found or not done, 2 wrong usage, 3 the store is unavailable, 74 standard
input or output failed. An error is one line on standard error.
"""

from __future__ import annotations

from collections.abc import Callable

from ._cli.command import app, main, register
from ._cli.dashboard import dashboard
from ._cli.demo import demo
from ._cli.doctor import doctor
from ._cli.keys import delete, dump, get, load, scan, set_
from ._cli.lock import lock
from ._cli.patterns import cache, idempotency, limits, locks, queue, sessions, worker
from ._cli.shards import shards
from ._cli.table import evict, migrate, rewrite, schema, stats, sweep
from ._cli.top import top

_COMMANDS: tuple[Callable[..., int], ...] = (  # in the order of the help
    *(get, set_, delete, scan, load, dump, stats, sweep, evict, rewrite, doctor, top, dashboard),
    *(schema, migrate, locks, lock, cache, limits, sessions, idempotency, queue, worker, shards),
    demo,
)
for _command in _COMMANDS:
    register(_command)

__all__ = ["app", "main"]
