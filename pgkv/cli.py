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

# The help shows them in this order.
COMMANDS: dict[str, Callable[..., int]] = {
    "get": get,
    "set": set_,
    "delete": delete,
    "scan": scan,
    "load": load,
    "dump": dump,
    "stats": stats,
    "sweep": sweep,
    "evict": evict,
    "rewrite": rewrite,
    "doctor": doctor,
    "top": top,
    "dashboard": dashboard,
    "schema": schema,
    "migrate": migrate,
    "locks": locks,
    "lock": lock,
    "cache": cache,
    "limits": limits,
    "sessions": sessions,
    "idempotency": idempotency,
    "queue": queue,
    "worker": worker,
    "shards": shards,
    "demo": demo,
}
for _name, _function in COMMANDS.items():
    register(_name, _function)

__all__ = ["app", "main"]
