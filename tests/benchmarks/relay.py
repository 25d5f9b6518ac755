"""A network where there is none: a process that holds back each message for a moment."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import socket
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from multiprocessing.synchronize import Event
from pathlib import Path
from time import perf_counter

DELAY = 100e-6  # seconds each way
LISTEN_TIMEOUT = 60.0


@contextlib.contextmanager
def relayed(paths: Mapping[Path, Path]) -> Iterator[None]:
    """Listen at each first path and pass on to the second, which are unix sockets."""
    context = multiprocessing.get_context("fork")
    listening = context.Event()
    process = context.Process(target=_relay, args=(paths, listening), daemon=True)
    process.start()
    try:
        if not listening.wait(LISTEN_TIMEOUT):
            raise TimeoutError("the relay does not listen")
        yield
    finally:
        process.terminate()
        process.join()


def _relay(paths: Mapping[Path, Path], listening: Event) -> None:
    """Busy all the time, on a core of its own: a sleep of a tenth of a millisecond lasts longer."""
    if sys.platform == "linux":
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    ready = select.epoll()
    targets: dict[int, tuple[socket.socket, Path]] = {}
    for near, far in paths.items():
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(near))
        near.chmod(0o777)
        listener.listen()
        targets[listener.fileno()] = (listener, far)
        ready.register(listener, select.EPOLLIN)
    listening.set()
    others: dict[int, tuple[socket.socket, socket.socket]] = {}
    waiting: deque[tuple[float, socket.socket, bytes]] = deque()
    while True:
        for file, _ in ready.poll(0):
            if file in targets:
                listener, far = targets[file]
                client, server = listener.accept()[0], socket.socket(socket.AF_UNIX)
                server.connect(str(far))
                others[client.fileno()], others[server.fileno()] = (
                    (client, server),
                    (server, client),
                )
                ready.register(client, select.EPOLLIN)
                ready.register(server, select.EPOLLIN)
                continue
            source, other = others[file]
            part = b""
            with contextlib.suppress(OSError):  # a reset is an end
                part = source.recv(1 << 20)
            waiting.append((perf_counter() + DELAY, other, part))
            if not part:
                ready.unregister(source)
        while waiting and waiting[0][0] <= perf_counter():
            _, other, part = waiting.popleft()
            with contextlib.suppress(OSError):  # it has hung up meanwhile
                if part:
                    other.sendall(part)
                else:
                    other.shutdown(socket.SHUT_WR)
