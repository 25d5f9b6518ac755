"""Single flight within a process: of the callers who miss one key, one computes, the rest wait.

A follower never takes the leader's value: it looks into the store again, because an invalidation
may have returned between the leader's read and the follower's call. So a flight carries no value,
only its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from contextvars import ContextVar
from typing import Any, ClassVar

from ... import _observe
from ..._background.connection import DedicatedConnection
from ..._background.renewal import clock
from ..._fork import new_lock, survives_fork
from ..._ops.drivers import is_set_within
from ..._ops.op import Op
from ...errors import PgkvError


class Computation:
    """A running call of a function, by which a call made inside its ``with`` block knows that it would
    wait for itself. Tasks and threads that the function starts inherit it; it ends with the call."""

    __slots__ = ("_token", "name", "running")

    def __init__(self, name: object) -> None:
        self.name: object = name
        self.running: bool = True

    def __enter__(self) -> None:
        around = [each for each in _computations.get() if each.running]
        self._token = _computations.set((*around, self))

    def __exit__(self, *_: object) -> None:
        self.running = False
        with contextlib.suppress(ValueError):  # the end may come in another context, when collected
            _computations.reset(self._token)


_computations: ContextVar[tuple[Computation, ...]] = ContextVar("pgkv_computations", default=())


def is_inside(name: object) -> bool:
    """Whether this call is part of the computation of that name."""
    computations = _computations.get()
    return bool(computations) and any(each.running and each.name == name for each in computations)


class ThreadFlight:
    """A running computation of one key, for which threads wait.

    Attributes:
        alone: it ended without anything for the others: they compute, each for itself.
    """

    __slots__ = ("_done", "alone")
    _event: ClassVar[type[Any]] = threading.Event
    _wait: ClassVar[Any] = staticmethod(threading.Event.wait)

    def __init__(self) -> None:
        self.alone: bool = False
        self._done: Any = self._event()

    def wait(self, seconds: float) -> Any:
        """Wait for its end; False when that took longer."""
        return self._wait(self._done, seconds)

    def end(self) -> None:
        self._done.set()


class TaskFlight(ThreadFlight):
    """A computation for which the tasks of one event loop wait."""

    __slots__ = ()
    _event = asyncio.Event
    _wait = staticmethod(is_set_within)


class Extended:
    """The lease on a computation, extended by the background while the function runs. Unlike a
    lock's it need not be told of its loss: the fill is fenced.

    Args:
        op: extends it; its answer is False where another call has taken the lease over.
        name: the function's.
        ttl: seconds that it is extended by.
        timeout: seconds for one extension.
    """

    def __init__(self, op: Op[bool], name: str, ttl: float, timeout: float) -> None:
        self.name: str = name
        self.is_lost: bool = False
        self._op = op
        self._ttl = ttl
        self._timeout = timeout
        self._until = clock() + ttl
        self._due = clock() + ttl / 3

    async def renew(
        self, connection: DedicatedConnection, batch: list[Any], seconds: float
    ) -> None:
        """Extend it."""
        batch.clear()
        # Whatever becomes of this try, the lease may yet be saved by the next one.
        self._due = clock() + self._ttl / 3
        self._until = clock() + self._ttl
        try:
            self.is_lost = not await connection.execute(self._op, min(seconds, self._timeout))
        except PgkvError as error:
            _observe.debug(
                "pgkv.cached.renewal_failed", function=self.name, error=type(error).__name__
            )

    def abandoned(self, name: str) -> None:
        """The computation ended without a word: the lease ends by its ttl."""

    def closed(self, each: Any) -> None:
        """The store was closed: the lease ends by its ttl."""


class Flights:
    def __init__(self, kind: type[ThreadFlight]) -> None:
        self._kind = kind
        self._flying: dict[object, ThreadFlight] = {}
        self._lock = new_lock(self)
        self.refreshing: set[object] = set()  # the keys whose refresh runs behind the callers
        survives_fork(self)

    def name(self, store: object, key: bytes) -> object:
        """What names the computation of a key: tasks of different loops do not wait together."""
        loop = asyncio.get_running_loop() if self._kind is TaskFlight else None
        return (id(store), id(loop), key)

    def join(self, name: object) -> tuple[ThreadFlight, bool]:
        """Return the flight of that name, and whether the caller leads it (and has to `end` it)."""
        with self._lock:
            flight = self._flying.get(name)
            if flight is not None:
                return flight, False
            flight = self._flying[name] = self._kind()
            return flight, True

    def end(self, name: object, flight: ThreadFlight) -> None:
        with self._lock:
            if self._flying.get(name) is flight:
                del self._flying[name]
        flight.end()

    def after_fork(self) -> None:
        """Forget the parent's flights: nothing in this process will end them."""
        self._flying = {}
        self.refreshing = set()
