"""How the two colours of `cached` wait, work in the background and keep leases up. The algorithm
itself is in `_cached_core`, once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ..._ops.op import Flow, Op
from .._runtime.background import heartbeats, start_task_heartbeat, tasks, threads
from .context import Site

T = TypeVar("T")


class Blocking:
    """Threads."""

    def run(self, site: Site, flow: Flow[T], timeout: float | None) -> T:
        """Run a flow, each of its operations within `timeout` seconds."""
        return site.store._run(flow, timeout)  # type: ignore[no-any-return]  # either colour's

    def later(self, site: Site, make: Callable[[], Flow[Any]], timeout: float) -> bool:
        """Run a flow in a thread; False when there is no room."""
        return threads.submit(lambda: self.run(site, make(), timeout))

    def beat(
        self, site: Site, op: Op[bool], every: float, timeout: float, function: str
    ) -> Callable[[], None]:
        """Prolong a lease in the thread that serves all of them."""
        return heartbeats.start(every, lambda: site.store._execute(op, timeout), function)


class Awaiting:
    """Tasks."""

    async def run(self, site: Site, flow: Flow[T], timeout: float | None) -> T:
        """Run a flow, each of its operations within `timeout` seconds."""
        return await site.store._run(flow, timeout)  # type: ignore[no-any-return]  # either colour's

    def later(self, site: Site, make: Callable[[], Flow[Any]], timeout: float) -> bool:
        """Run a flow in a task of this loop; False when there is no room."""
        return tasks.submit(lambda: self.run(site, make(), timeout))

    def beat(
        self, site: Site, op: Op[bool], every: float, timeout: float, function: str
    ) -> Callable[[], None]:
        """Prolong a lease by a timer of this loop."""
        return start_task_heartbeat(every, lambda: site.store._execute(op, timeout), function)


BLOCKING, AWAITING = Blocking(), Awaiting()
