"""Where processes run. One client and one server that wait for each other cost 13 µs per turn when
the scheduler keeps them on one core and 50 µs across two; it decides per connection and sticks to
it. Latencies are therefore measured with the client and every server process on one core, so that
all entrants see the same; throughputs with all cores for everybody.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

if sys.platform == "linux":

    def _place(pids: Iterable[int], cores: set[int]) -> None:
        for pid in pids:
            with contextlib.suppress(OSError):  # it has ended, or is not ours to place
                for thread in Path(f"/proc/{pid}/task").iterdir():
                    os.sched_setaffinity(int(thread.name), cores)

    @contextlib.contextmanager
    def on_one_core(pids: Iterable[int]) -> Iterator[None]:
        """Keep this process and those on one core."""
        everybody = [os.getpid(), *pids]
        cores = os.sched_getaffinity(0)
        _place(everybody, {max(cores)})
        try:
            yield
        finally:
            _place(everybody, cores)

    CAN_PIN = True

else:

    @contextlib.contextmanager
    def on_one_core(pids: Iterable[int]) -> Iterator[None]:
        """Nothing can be done here."""
        yield

    CAN_PIN = False
