"""The algorithm of `cached`, as flows: what a call does beyond a plain hit, for both colours.

A miss takes a lease (a placeholder row), calls the function, and fills the row if it still is in
the state that the lease made: whatever invalidates it meanwhile makes another state, and the fill
is refused. What computes an entry that still is valid is in `_cached_refresh`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from datetime import timedelta
from random import random
from time import monotonic
from typing import Any

from ... import _observe
from ..._ops import codec as _codec
from ..._ops.op import Flow, Op, call, do, pause
from ...errors import InvalidKeyError, InvalidValueError, PgkvError, QueryError
from . import envelope as _envelope
from .call import (
    MISSING,
    Busy,
    Colour,
    Counts,
    Found,
    Options,
    State,
    Unreachable,
    Visit,
    breaker_open,
    quietly,
)
from .context import Site
from .envelope import PLACEHOLDER, Codec, Envelope, is_placeholder, new_mark
from .key import Binder
from .l1 import L1
from .single_flight import Flight, Flights, inside
from .sql import DIGEST_LENGTH, ENTRY, FUNCTION, LOCK_TIMEOUT_MS, TAG, TAG_DAYS, Lease, Look

PAUSE_FIRST, PAUSE_MAX = 0.002, 0.1  # seconds between looks at somebody's placeholder
PATIENCE = LOCK_TIMEOUT_MS / 1000  # with a row that an open transaction holds
COMPUTE_MAX = 3600.0  # seconds; a tag's row outlives the entries of older fills by no more
TAGGED_MAX = TAG_DAYS * 86400.0


class Caller:
    """One cached function: its keys, codec and counts, and the flows of its calls."""

    def __init__(
        self,
        fn: Callable[..., Any],
        name: str,
        binder: Binder,
        make_codec: Callable[[], Codec],
        options: Options,
        l1: L1 | None,
        colour: Colour,
        flights: Flights,
    ) -> None:
        self.fn = fn
        self.name = name
        self.binder = binder
        self.options = options
        self.l1 = l1
        self.colour = colour
        self.flights = flights
        self.counts: Counts = Counts()
        self._make_codec = make_codec

    @functools.cached_property
    def codec(self) -> Codec:
        """Made at the first call: annotations may name what the module defines later."""
        return self._make_codec()

    # -- keys

    def visit(
        self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any], *, lenient: bool = False
    ) -> Visit:
        """Bind one call's arguments."""
        binder = self.binder
        arguments = binder.bind(args, kwargs, lenient=lenient)
        digest = binder.digest(arguments)
        begin, clear = site.names.get(self.name) or self._names(site)
        keys: tuple[bytes, ...] = (begin + digest.encode(), clear)
        if binder.has_tags:
            keys += tuple(site.sql.cache_key(TAG, tag) for tag in binder.tags(arguments))
        work = functools.partial(self.fn, *args, **kwargs)
        return Visit(
            site, keys, digest, work, (args, kwargs), 0 if self.l1 is None else self.l1.epoch
        )

    def _names(self, site: Site) -> tuple[bytes, bytes]:
        """What the function's entries' keys begin with, and its generation's key."""
        entry = site.sql.cache_key(ENTRY, f"{self.name}:{'0' * DIGEST_LENGTH}")
        clear = site.sql.cache_key(FUNCTION, self.name)
        names = site.names[self.name] = (entry[:-DIGEST_LENGTH], clear)
        return names

    # -- what a look means

    def interpret(self, visit: Visit, look: Look) -> Found | None:
        """Return the valid entry that a look found."""
        row = look.row
        if row is None:
            return None
        envelope = _envelope.read(row.value, self.codec.letter)
        if envelope is None or envelope.generations != look.generations or row.age >= envelope.hard:
            return None
        value = self._decode(visit, envelope.payload)
        if value is MISSING:
            return None
        return Found(value, row.age, envelope.soft - row.age, envelope)

    def _decode(self, visit: Visit, payload: bytes) -> Any:
        try:
            return self.codec.decode(f"{self.name}:{visit.digest}", payload)
        except PgkvError:
            return MISSING  # damaged, or of a type that the function no longer returns

    def near(self, visit: Visit) -> Any:
        """Return the value that the first level has, or MISSING."""
        assert self.l1 is not None
        payload = self.l1.get(visit.site.scope, visit.key)
        if payload is None:
            return MISSING
        value = self._decode(visit, payload)
        if value is not MISSING:
            self.counts.add("hits")
        return value

    def fresh(self, visit: Visit, look: Look) -> Any:
        """Return the value if the look found one that calls for nothing else; else MISSING."""
        found = self.interpret(visit, look)
        if found is None or found.fresh <= 0 or self._is_early(found):
            return MISSING
        self._keep(visit, found.envelope.payload, found.fresh)
        self.counts.add("hits")
        return found.value

    def _is_early(self, found: Found) -> bool:
        """XFetch: each hit throws the dice; the nearer the end and the dearer the function, the
        likelier it is that one caller refreshes before all of them miss."""
        beta, compute = self.options.beta, found.envelope.compute
        if not beta or math.isinf(found.fresh):
            return False
        return -compute * beta * math.log(1.0 - random()) >= found.fresh  # noqa: S311  # dice

    def _keep(self, visit: Visit, payload: bytes, fresh: float) -> None:
        if self.l1 is not None:
            ends = visit.sent + min(self.l1.ttl, fresh)
            self.l1.put(visit.site.scope, visit.keys, payload, ends, visit.epoch)

    # -- flows

    def answer(self, visit: Visit, look: Look | PgkvError) -> Flow[Any]:
        """From a first look that was no plain hit to the call's value."""
        unreachable: PgkvError | None = None
        try:
            if isinstance(look, PgkvError):
                raise self._failure(visit, look)
            found = self.interpret(visit, look)
            if found is None:
                return (yield from self._miss(visit, look))
            return (yield from self._serve(visit, found))
        except Unreachable as down:
            unreachable = down.error
        except Busy:
            pass
        # Outside the handlers: the function's own exception would carry ours as its context.
        if unreachable is not None and self.options.on_error == "raise":
            raise unreachable
        return (yield from self._alone(visit))

    def ask(self, visit: Visit, op: Op[Any]) -> Flow[Any]:
        """Perform an operation of the cache; see `Unreachable` and `Busy`."""
        breaker = visit.site.breaker
        if self.options.on_error == "call" and not breaker.allows():
            raise Unreachable(breaker_open())
        try:
            answer = yield from do(op)
        except PgkvError as error:
            raise self._failure(visit, error) from None
        breaker.succeeded()
        return answer

    def _failure(self, visit: Visit, error: PgkvError) -> Exception:
        if isinstance(error, InvalidKeyError | InvalidValueError):
            return error  # refused before it was sent: the program is wrong, not the store
        if isinstance(error, QueryError) and error.retryable:
            return Busy()
        self.counts.add("errors")
        if getattr(error, "breaker", False):
            return Unreachable(error)
        if visit.site.breaker.failed():
            _observe.warning(
                "pgkv.cached.circuit_open", function=self.name, error=type(error).__name__
            )
        return Unreachable(error)

    def _serve(self, visit: Visit, found: Found) -> Flow[Any]:
        """A valid entry that is stale, or whose refresh is due."""
        raise NotImplementedError  # `_cached_refresh.Core` has it

    def _alone(self, visit: Visit) -> Flow[Any]:
        """Call the function and store nothing."""
        self.counts.add("misses")
        value = yield from call(visit.work)
        if self.options.condition is not None and not self.options.condition(value):
            return value
        return self._as_cached(visit, value)[0]

    def _as_cached(self, visit: Visit, value: Any) -> tuple[Any, bytes]:
        """The value as every later hit will show it, so that the first call shows the same."""
        name = f"{self.name}:{visit.digest}"
        payload = self.codec.encode(name, value)
        return self.codec.decode(name, payload), payload

    def _miss(self, visit: Visit, look: Look) -> Flow[Any]:
        name = self.flights.name(visit.site.store, visit.key)
        if name in inside.get():
            return (yield from self._alone(visit))  # re-entrant: it would wait for itself
        deadline = monotonic() + self.options.max_wait
        while True:
            flight, leads = self.flights.join(name)
            if leads:
                try:
                    return (yield from self._lead(visit, look, deadline, name, flight))
                finally:
                    self.flights.end(name, flight)
            self._count_wait(visit)
            ended = yield from call(flight.wait, max(0.0, deadline - monotonic()))
            if not ended or flight.alone:
                return (yield from self._alone(visit))
            look = yield from self._look(visit)
            value = self._landed(visit, look)
            if value is not MISSING:
                return value

    def _lead(
        self, visit: Visit, look: Look, deadline: float, name: object, flight: Flight
    ) -> Flow[Any]:
        sql = visit.site.sql
        wait = PAUSE_FIRST
        locked_since: float | None = None
        try:
            while True:
                mark = new_mark(PLACEHOLDER)
                # What the look found to be no valid entry may be replaced, unless somebody
                # computes it already.
                row = look.row
                replace = 0 if row is None or is_placeholder(row.value) else row.version
                lease: Lease = yield from self.ask(
                    visit, sql.lease(visit.key, mark, self.options.lease, replace)
                )
                if lease.version is not None:
                    break
                now = monotonic()
                remaining = math.inf if lease.remaining is None else lease.remaining
                if lease.held and remaining <= 0:
                    # Counted from the first such answer: a takeover by somebody else takes
                    # no longer, an open transaction may take for ever.
                    locked_since = now if locked_since is None else locked_since
                    if now - locked_since > PATIENCE:
                        raise Busy
                    yield from pause(0.01)
                elif is_placeholder(lease.held):
                    if not self.options.lock or now >= deadline:
                        raise Busy
                    self._count_wait(visit)
                    locked_since = None
                    left = min(remaining + 0.001, deadline - now)
                    yield from pause(min(wait * (0.5 + random() / 2), left))  # noqa: S311  # jitter
                    wait = min(wait * 1.5, PAUSE_MAX)
                elif now >= deadline:
                    raise Busy
                look = yield from self._look(visit)
                value = self._landed(visit, look)
                if value is not MISSING:
                    return value
        except (Busy, Unreachable):
            flight.alone = True
            raise
        state = State(visit.key, lease.version, mark)
        beat = sql.extend(visit.key, lease.version, mark, self.options.lease)
        settled = False
        try:
            self.counts.add("misses")
            value, took = yield from self._compute(visit, name, beat)
            value, outcome = yield from self._fill(visit, state, look.generations, value, took)
            settled = outcome in ("stored", "refused")
            flight.alone = outcome in ("unwanted", "failed")
            return value
        finally:
            if not settled:
                yield from quietly(sql.give_up(visit.key, lease.version, mark))

    def _look(self, visit: Visit) -> Flow[Look]:
        if self.l1 is not None:
            visit.epoch = self.l1.epoch
        visit.sent = monotonic()
        look: Look = yield from self.ask(visit, visit.site.sql.look(visit.keys))
        return look

    def _landed(self, visit: Visit, look: Look) -> Any:
        """The value that a look after waiting found."""
        found = self.interpret(visit, look)
        if found is None:
            return MISSING
        if found.fresh > 0:
            self._keep(visit, found.envelope.payload, found.fresh)
        self.counts.add("hits" if found.fresh > 0 else "stale_hits")
        return found.value

    def _count_wait(self, visit: Visit) -> None:
        if not visit.counted:
            visit.counted = True
            self.counts.add("waits")

    def _compute(
        self, visit: Visit, name: object, beat: Op[bool] | None
    ) -> Flow[tuple[Any, float]]:
        """Call the function, its lease kept up; return what it returned and its seconds."""
        options = self.options
        stop = (
            self.colour.beat(visit.site, beat, options.lease / 3, options.store_timeout, self.name)
            if beat is not None
            else _nothing
        )
        token = inside.set((*inside.get(), name))
        began = monotonic()
        try:
            value = yield from call(visit.work)
            return value, monotonic() - began
        finally:
            inside.reset(token)
            stop()

    def _fill(
        self, visit: Visit, state: State, generations: tuple[int, ...], value: Any, took: float
    ) -> Flow[tuple[Any, str]]:
        """Store what the function returned in place of a state; return it as cached, and how that
        ended: stored, refused (another state stands there), unwanted, or failed."""
        options = self.options
        if options.condition is not None and not options.condition(value):
            return value, "unwanted"
        ttl = self._ttl(visit, value)
        value, payload = self._as_cached(visit, value)
        if ttl <= 0:
            return value, "unwanted"
        if took > COMPUTE_MAX:
            self.counts.add("discarded_fills")
            return value, "failed"
        soft = ttl * (1.0 - options.jitter * random())  # noqa: S311  # jitter
        hard = soft + options.stale
        if len(visit.keys) > 2:
            hard = min(hard, TAGGED_MAX)
        envelope = Envelope(soft, hard, took, generations, payload)
        op = visit.site.sql.fill(
            visit.key,
            state.version,
            state.mark,
            envelope.pack(self.codec.letter),
            None if math.isinf(hard) else hard,
        )
        visit.sent = monotonic()
        try:
            version = yield from self.ask(visit, op)
        except (Busy, Unreachable) as why:
            if isinstance(why, Busy):
                self.counts.add("discarded_fills")
            return value, "failed"
        if version is None:
            self.counts.add("discarded_fills")
            return value, "refused"
        self.counts.add("fills")
        self._keep(visit, payload, soft)
        return value, "stored"

    def _ttl(self, visit: Visit, value: Any) -> float:
        """Seconds for which this value is fresh: inf for ever, 0 for not at all."""
        ttl: Any = self.options.ttl
        if callable(ttl):
            args, kwargs = visit.positional
            ttl = ttl(value, *args, **kwargs)
            ttl = ttl.total_seconds() if isinstance(ttl, timedelta) else ttl
            if ttl is not None and ttl <= 0:
                return 0.0
        return math.inf if ttl is None else _codec.seconds(ttl, endless="")


def _nothing() -> None:
    """No heartbeat was begun."""
