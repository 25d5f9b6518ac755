"""A process of the crew: what it is told on standard input it does, and answers on standard output."""

from __future__ import annotations

import contextlib
import logging
import signal
from importlib import import_module

from ...store import Store
from .crew import Orders, say
from .setting import config_of

CONNECTIONS = 20  # of one process: a scene has at most so many threads


def main() -> None:
    """Take part in the scene that the first line names."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in ("pgkv", "psycopg"):  # what matters is in the answers
        logging.getLogger(name).addHandler(logging.NullHandler())
    orders = Orders()
    first = orders.next()
    if first is None:
        return
    scene = import_module(f".{first['part']}", __package__)
    with (
        contextlib.suppress(BrokenPipeError),  # the demo is gone
        Store(config_of(first["settings"], CONNECTIONS)) as store,
    ):
        store.ping()
        say("ready")
        scene.take_part(store, orders, **first["terms"])


if __name__ == "__main__":
    main()
