"""A process of the demo: it runs the `work` function of the scene that its first order names."""

from __future__ import annotations

import contextlib
import logging
import signal
from importlib import import_module

from ...store import Store
from .show import config_of
from .workers import Orders, answer

CONNECTIONS = 20  # of one process: a scene has at most this many threads


def main() -> None:
    """Work in a scene."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in ("pgkv", "psycopg"):  # the answers have what matters
        logging.getLogger(name).addHandler(logging.NullHandler())
    orders = Orders()
    first = orders.next()
    if first is None:
        return
    scene = import_module(f".{first['scene']}", __package__)
    with (
        contextlib.suppress(BrokenPipeError),  # the demo has ended
        Store(config_of(first["settings"], CONNECTIONS)) as store,
    ):
        store.ping()
        answer("ready")
        scene.work(store, orders, **first["terms"])


if __name__ == "__main__":
    main()
