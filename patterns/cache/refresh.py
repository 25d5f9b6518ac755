"""The algorithm of `cached` where a value is there already: stale, near its end, or to be replaced.

The old value stays readable while a new one is computed: the lease stands in a row of its own, and
the fill is fenced by the old entry's state. Early refreshing is XFetch: A. Vattani, F. Chierichetti,
K. Lowenstein, "Optimal Probabilistic Cache Stampede Prevention", VLDB 2015.
"""

from __future__ import annotations

from typing import Any

from ... import _observe
from ..._ops.op import Flow, Op
from ...errors import PgkvError
from .call import MISSING, Busy, Found, State, Unreachable, Visit, quietly
from .envelope import PLACEHOLDER, is_placeholder, mark_of, new_mark
from .flows import Caller
from .sql import REFRESH, Lease, Look


class Core(Caller):
    """A cached function, complete."""

    def _serve(self, visit: Visit, found: Found) -> Flow[Any]:
        """A valid entry that is stale, or whose refresh is due."""
        stale = found.fresh <= 0
        if not stale:
            self._keep(visit, found.envelope.payload, found.fresh)
        if self.options.stale:
            self.counts.add("stale_hits" if stale else "hits")
            self._refresh_later(visit)
            return found.value
        # Without `stale` nothing runs behind the caller's back: whom the dice chose pays.
        refreshed = MISSING
        try:
            refreshed = yield from self._refresh(visit)
        except (Busy, Unreachable):
            pass
        except Exception as error:  # noqa: BLE001  # the caller has a valid value without it
            self._refresh_failed(error)
        self.counts.add("hits" if refreshed is MISSING else "misses")
        return found.value if refreshed is MISSING else refreshed

    def _refresh_later(self, visit: Visit) -> None:
        name = self.flights.name(visit.site.store, visit.key)
        if name in self.flights.refreshing:
            return
        self.flights.refreshing.add(name)

        def flow() -> Flow[None]:
            try:
                yield from self._refresh(visit)
            except (Busy, Unreachable):
                pass
            except Exception as error:  # noqa: BLE001  # nobody waits for it
                self._refresh_failed(error)
            finally:
                self.flights.refreshing.discard(name)

        if not self.colour.later(visit.site, flow, self.options.store_timeout):
            self.flights.refreshing.discard(name)

    def _refresh_failed(self, error: Exception) -> None:
        self.counts.add("errors")
        _observe.warning(
            "pgkv.cached.refresh_failed", function=self.name, error=type(error).__name__
        )

    def _refresh(self, visit: Visit) -> Flow[Any]:
        """Compute anew while the old value is served; MISSING when somebody else does, or did."""
        sql = visit.site.sql
        name = self.flights.name(visit.site.store, visit.key)
        key = sql.cache_key(REFRESH, f"{self.name}:{visit.digest}")
        mark = new_mark(PLACEHOLDER)
        lease: Lease = yield from self.ask(visit, sql.lease(key, mark, self.options.lease))
        if lease.version is None:
            return MISSING
        try:
            # Again, under the lease: it may have been refreshed since.
            look = yield from self._look(visit)
            found = self.interpret(visit, look)
            if found is None or look.row is None or not self._is_due(found):
                return MISSING
            state = State(visit.key, look.row.version, mark_of(look.row.value))
            beat = sql.extend(key, lease.version, mark, self.options.lease)
            value, took = yield from self._compute(visit, name, beat)
            value, _ = yield from self._fill(visit, state, look.generations, value, took)
            return value
        finally:
            yield from quietly(sql.give_up(key, lease.version, mark))

    def _is_due(self, found: Found) -> bool:
        # Not a throw of the dice again: whoever refreshed meanwhile left an entry of less age than
        # the function takes.
        return found.fresh <= 0 or found.age > found.envelope.compute

    def renew(self, visit: Visit) -> Flow[Any]:
        """Compute and store whatever stands there: `refresh()`. The latest one to begin wins."""
        sql = visit.site.sql
        name = self.flights.name(visit.site.store, visit.key)
        state: State | None = None
        look = Look(None, ())
        beat: Op[bool] | None = None
        unreachable: PgkvError | None = None
        try:
            for _ in range(3):
                look = yield from self._look(visit)
                row = look.row
                if row is not None and not is_placeholder(row.value):
                    version = yield from self.ask(visit, sql.claim(visit.key, row.version))
                    if version is not None:
                        state = State(visit.key, version, mark_of(row.value))
                        break
                else:
                    mark = new_mark(PLACEHOLDER)
                    replace = 0 if row is None else row.version
                    lease = yield from self.ask(
                        visit, sql.lease(visit.key, mark, self.options.lease, replace)
                    )
                    if lease.version is not None:
                        state = State(visit.key, lease.version, mark)
                        beat = sql.extend(visit.key, lease.version, mark, self.options.lease)
                        break
        except Unreachable as down:
            unreachable = down.error
        except Busy:
            pass
        if unreachable is not None and self.options.on_error == "raise":
            raise unreachable
        if state is None:
            return (yield from self._alone(visit))
        settled = beat is None
        try:
            self.counts.add("misses")
            value, took = yield from self._compute(visit, name, beat)
            value, outcome = yield from self._fill(visit, state, look.generations, value, took)
            settled = settled or outcome in ("stored", "refused")
            return value
        finally:
            if not settled:
                yield from quietly(sql.give_up(visit.key, state.version, state.mark))
