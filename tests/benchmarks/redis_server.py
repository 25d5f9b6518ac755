"""A Redis for comparisons, if this machine has one."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

START_TIMEOUT = 60.0  # seconds
# As pgkv's default table: nothing is written to disk.
SETTINGS = {"port": "0", "save": "", "appendonly": "no"}


@contextlib.contextmanager
def open_redis(**settings: str) -> Iterator[tuple[Any, str]]:
    """Start one on a Unix socket, perhaps with more settings; give a client of it, and what is to be said about it.

    The client is None where there can be none; then it is said why. Its own client library is
    what a user would take, so without that nothing is compared.
    """
    program = shutil.which("redis-server")
    if program is None:
        yield None, "No redis-server on PATH: there is nothing to compare with."
        return
    if importlib.util.find_spec("redis") is None:
        install = f"{sys.executable} -m pip install redis hiredis"
        yield None, f"There is a redis-server, but no client to compare with it: {install}"
        return
    import redis

    with contextlib.ExitStack() as cleanup:
        directory = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="pgkv-demo-")))
        socket = str(directory / "redis.sock")
        pairs = (SETTINGS | settings).items()
        options = [part for pair in pairs for part in (f"--{pair[0]}", pair[1])]
        process = subprocess.Popen(  # found on PATH, no user's word in it
            [program, *options, "--unixsocket", socket],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,  # a Ctrl-C is for the demo, which stops it
        )
        cleanup.callback(_stop, process)
        client = cleanup.enter_context(redis.Redis(unix_socket_path=socket))
        if not _answers(client, process):
            yield None, "redis-server did not start: there is nothing to compare with."
            return
        version = client.info("server")["redis_version"]
        parser = "hiredis" if importlib.util.find_spec("hiredis") else "without hiredis"
        yield client, f"Redis {version} next to it (redis-py {redis.__version__}, {parser})"


def _answers(client: Any, process: subprocess.Popen[bytes]) -> bool:
    import redis

    deadline = time.monotonic() + START_TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(redis.ConnectionError):
            return bool(client.ping())
        time.sleep(0.02)
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(START_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
