"""The algorithm of `cached`, as flows: what a call does beyond a plain hit, for sync and async.

A miss takes a lease (a placeholder row), calls the function, and fills the row if it still is in
the state that the lease made: whatever invalidates it meanwhile makes another state, and the fill
is refused.

The old value stays readable while a new one is computed: the lease is then a row of its own, and
the fill is fenced by the old entry's state. Early refreshing is XFetch: A. Vattani, F. Chierichetti,
K. Lowenstein, "Optimal Probabilistic Cache Stampede Prevention", VLDB 2015.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from random import random
from time import monotonic
from typing import Any, NamedTuple, TypeAlias

import msgspec

from ... import _observe
from ..._ops import codec as _codec
from ..._ops.lazy import cached_property
from ..._ops.op import Flow, Op, do, pause
from ..._ops.op import call as call_step
from ...errors import (
    ConfigError,
    DecodingError,
    InvalidKeyError,
    InvalidValueError,
    PgkvError,
    QueryError,
    SerializationError,
    StoreUnavailableError,
    TransactionError,
)
from . import envelope as _envelope
from .call import MISSING, REPORT_EVERY, CachedCall, CacheOptions, Counts, StoreContext
from .envelope import PLACEHOLDER, Codec, Envelope, is_placeholder, mark_of, new_mark
from .key import Binder
from .l1 import L1
from .single_flight import Computation, Extended, Flights, TaskFlight, ThreadFlight, is_inside
from .sql import (
    DIGEST_LENGTH,
    ENTRY,
    FUNCTION,
    LOCK_TIMEOUT_MS,
    REFRESH,
    TAG,
    TAG_DAYS,
    CacheRead,
    ComputeLease,
)

# The program is wrong (a key or value that no store holds, another event loop's store, a right that
# its role lacks), and not the store away: raised, whatever `on_error` says.
PROGRAM_ERRORS = (ConfigError, InvalidKeyError, InvalidValueError, TransactionError)

State: TypeAlias = tuple[int, bytes]  # version and mark of a row: a fill replaces no other state

PAUSE_FIRST, PAUSE_MAX = 0.002, 0.1  # seconds between looks at another caller's placeholder
PATIENCE = LOCK_TIMEOUT_MS / 1000  # with a row that an open transaction holds
COMPUTE_MAX = 3600.0  # seconds; a tag's row outlives the entries of older fills by no more
TAGGED_MAX = TAG_DAYS * 86400.0


class Found(NamedTuple):
    """A valid entry; it is stale when `fresh`, the seconds that are left, is 0 or less."""

    value: Any
    age: float
    fresh: float
    envelope: Envelope


class Unreachable(Exception):  # noqa: N818  # never leaves this module
    """The store did not answer; before the function was called."""

    def __init__(self, error: PgkvError) -> None:
        self.error = error


class Busy(Exception):  # noqa: N818  # never leaves this module
    """An open transaction holds the row."""


class FunctionCache:
    """One cached function: its keys, codec and counts, and the flows of its calls."""

    def __init__(
        self,
        fn: Callable[..., Any],
        name: str,
        binder: Binder,
        make_codec: Callable[[], Codec],
        options: CacheOptions,
        *,
        is_async: bool,
    ) -> None:
        self.fn = fn
        self.name = name
        self.binder = binder
        self.options = options
        self.l1: L1 | None = options.l1
        self.is_async = is_async
        self.flights: Flights = Flights(TaskFlight if is_async else ThreadFlight)
        self.counts: Counts = Counts()
        self.last_context: Callable[[], StoreContext | None] = _nothing
        self._make_codec = make_codec

    @cached_property
    def codec(self) -> Codec:
        """Made at the first call: annotations may name what the module defines later."""
        return self._make_codec()

    # -- keys

    def bind(
        self,
        context: StoreContext,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        lenient: bool = False,
    ) -> CachedCall:
        binder = self.binder
        arguments = binder.bind(args, kwargs, lenient=lenient)
        digest = binder.digest(arguments)
        begin, clear = context.names.get(self.name) or self._names(context)
        keys: tuple[bytes, ...] = (begin + digest.encode(), clear)
        if binder.has_tags:
            keys += tuple(context.sql.cache_key(TAG, tag) for tag in binder.tags(arguments))
        epoch = 0 if self.l1 is None else self.l1.epoch
        return CachedCall(context, keys, digest, (args, kwargs), epoch, monotonic())

    def _names(self, context: StoreContext) -> tuple[bytes, bytes]:
        """What the function's entries' keys begin with, and its generation's key."""
        entry = context.sql.cache_key(ENTRY, f"{self.name}:{'0' * DIGEST_LENGTH}")
        clear = context.sql.cache_key(FUNCTION, self.name)
        context.counts[self.name] = self.counts
        names = context.names[self.name] = (entry[:-DIGEST_LENGTH], clear)
        return names

    # -- what a look means

    def interpret(self, call: CachedCall, read: CacheRead) -> Found | None:
        """Return the valid entry that a look found."""
        row = read.row
        if row is None:
            return None
        envelope = _envelope.read(row.value, self.codec.letter)
        if envelope is None or envelope.generations != read.generations or row.age >= envelope.hard:
            return None
        transforms = call.context.transforms
        if transforms is not None:
            try:
                payload = transforms.open(call.key, envelope.payload)
            except DecodingError:
                return None
            envelope = envelope._replace(payload=payload)
        value = self._decode(call, envelope.payload)
        if value is MISSING:
            return None
        return Found(value, row.age, envelope.soft - row.age, envelope)

    def _decode(self, call: CachedCall, payload: bytes) -> Any:
        try:
            return self.codec.decode(f"{self.name}:{call.digest}", payload)
        except SerializationError:
            return MISSING  # damaged, or of a type that the function no longer returns

    def from_l1(self, call: CachedCall) -> Any:
        assert self.l1 is not None
        payload = self.l1.get(call.context.scope, call.key)
        if payload is None:
            return MISSING
        value = self._decode(call, payload)
        if value is not MISSING:
            self.counts.add("hits")
        return value

    def fresh(self, call: CachedCall, read: CacheRead) -> Any:
        """Return the value if the look found one that calls for nothing else; else MISSING."""
        found = self.interpret(call, read)
        if found is None or found.fresh <= 0 or self._is_early(found):
            return MISSING
        if self.l1 is not None:
            self._remember(call, found.envelope.payload, found.fresh)
        self.counts.add("hits")
        return found.value

    def _is_early(self, found: Found) -> bool:
        """XFetch: each hit draws a random number. A caller is more likely to refresh before all of
        them miss the closer the entry is to its end and the more expensive the function is."""
        beta, compute = self.options.beta, found.envelope.compute
        if not beta or math.isinf(found.fresh):
            return False
        return -compute * beta * math.log(1.0 - random()) >= found.fresh  # noqa: S311  # dice

    def _remember(self, call: CachedCall, payload: bytes, fresh: float) -> None:
        if self.l1 is not None:
            ends = call.sent + min(self.l1.ttl, fresh)
            self.l1.put(call.context.scope, call.keys, payload, ends, call.epoch)

    # -- flows

    def answer(self, call: CachedCall, read: CacheRead | PgkvError) -> Flow[Any]:
        """From a first look that was no plain hit to the call's value."""
        return (yield from self._or_alone(call, self._answer(call, read)))

    def _answer(self, call: CachedCall, read: CacheRead | PgkvError) -> Flow[Any]:
        if isinstance(read, PgkvError):
            raise self._failure(call, read)
        found = self.interpret(call, read)
        if found is None:
            return (yield from self._miss(call, read))
        return (yield from self._serve(call, found))

    def _or_alone(self, call: CachedCall, flow: Flow[Any]) -> Flow[Any]:
        unreachable: PgkvError | None = None
        try:
            return (yield from flow)
        except Unreachable as down:
            unreachable = down.error
        except Busy:
            pass
        # Outside the handlers: the function's own exception would carry ours as its context.
        if unreachable is not None and self.options.on_error == "raise":
            raise unreachable
        return (yield from self._alone(call))

    def ask(self, call: CachedCall, op: Op[Any]) -> Flow[Any]:
        """Perform an operation of the cache; see `Unreachable` and `Busy`."""
        breaker = call.context.breaker
        if self.options.on_error == "call" and not breaker.allows():
            raise Unreachable(breaker_open())
        try:
            answer = yield from do(op)
        except PgkvError as error:
            raise self._failure(call, error) from None
        breaker.succeeded()
        return answer

    def _failure(self, call: CachedCall, error: PgkvError) -> Exception:
        if isinstance(error, PROGRAM_ERRORS):
            return error
        if isinstance(error, QueryError) and error.retryable:
            return Busy()
        self.counts.add("errors")
        if getattr(error, "breaker", False):
            return Unreachable(error)
        if call.context.breaker.failed():
            _observe.warning(
                "pgkv.cached.circuit_open", function=self.name, error=type(error).__name__
            )
        return Unreachable(error)

    def _alone(self, call: CachedCall) -> Flow[Any]:
        """Call the function and store nothing."""
        self.counts.add("misses")
        value = yield from call_step(self._work_of(call))
        if self.options.condition is not None and not self.options.condition(value):
            return self._unstored(call, value)
        return self._as_cached(call, value)[0]

    def _work_of(self, call: CachedCall) -> Callable[[], Any]:
        args, kwargs = call.positional

        def work() -> Any:
            return self.fn(*args, **kwargs)

        work.__qualname__ = self.fn.__qualname__  # what an error names
        return work

    def _unstored(self, call: CachedCall, value: Any) -> Any:
        """A value that `condition` refuses, as a hit would show it; the value itself where there can
        be no hit, because the codec cannot write it."""
        try:
            return self._as_cached(call, value)[0]
        except SerializationError:
            return value

    def _as_cached(self, call: CachedCall, value: Any) -> tuple[Any, bytes]:
        """The value as every later hit will show it, so that the first call shows the same."""
        name = f"{self.name}:{call.digest}"
        payload = self.codec.encode(name, value)
        return self.codec.decode(name, payload), payload

    def _miss(self, call: CachedCall, read: CacheRead) -> Flow[Any]:
        name = self.flights.name(call.context.store, call.key)
        if is_inside(name):
            return (yield from self._alone(call))  # re-entrant: it would wait for itself
        deadline = monotonic() + self.options.max_wait
        while True:
            flight, leads = self.flights.join(name)
            if leads:
                try:
                    return (yield from self._lead(call, read, deadline, flight))
                finally:
                    self.flights.end(name, flight)
            self._count_wait(call)
            ended = yield from call_step(flight.wait, max(0.0, deadline - monotonic()))
            if not ended or flight.alone:
                return (yield from self._alone(call))
            read = yield from self._read(call)
            value = self._finished(call, read)
            if value is not MISSING:
                return value

    def _lead(
        self, call: CachedCall, read: CacheRead, deadline: float, flight: ThreadFlight
    ) -> Flow[Any]:
        sql = call.context.sql
        wait = PAUSE_FIRST
        locked_since: float | None = None
        try:
            while True:
                mark = new_mark(PLACEHOLDER)
                # A row without a valid entry may be replaced, unless another caller computes
                # it already.
                row = read.row
                replace = 0 if row is None or is_placeholder(row.value) else row.version
                lease: ComputeLease = yield from self.ask(
                    call, sql.lease(call.key, mark, self.options.compute_timeout, replace)
                )
                if lease.version is not None:
                    break
                now = monotonic()
                remaining = math.inf if lease.remaining is None else lease.remaining
                if lease.held and remaining <= 0:
                    # Counted from the first such answer: a takeover by another caller takes
                    # no longer, an open transaction may take for ever.
                    locked_since = now if locked_since is None else locked_since
                    if now - locked_since > PATIENCE:
                        raise Busy
                    yield from pause(0.01)
                elif is_placeholder(lease.held):
                    if not self.options.lock or now >= deadline:
                        raise Busy
                    self._count_wait(call)
                    locked_since = None
                    left = min(remaining + 0.001, deadline - now)
                    yield from pause(min(wait * (0.5 + random() / 2), left))  # noqa: S311  # jitter
                    wait = min(wait * 1.5, PAUSE_MAX)
                elif now >= deadline:
                    raise Busy
                read = yield from self._read(call)
                value = self._finished(call, read)
                if value is not MISSING:
                    return value
        except (Busy, Unreachable):
            flight.alone = True
            raise
        state = lease.version, mark
        value, outcome = yield from self._compute_and_fill(call, state, read, leased=True)
        flight.alone = outcome in ("unwanted", "failed")
        return value

    def _compute_and_fill(
        self, call: CachedCall, state: State, read: CacheRead, *, leased: bool
    ) -> Flow[tuple[Any, str]]:
        """Compute for a caller, and store. Where the state is that of a lease, give it up if no fill has
        ended it."""
        sql, timeout = call.context.sql, self.options.compute_timeout
        beat = sql.extend(call.key, *state, timeout) if leased else None
        outcome = ""
        try:
            self.counts.add("misses")
            value, took = yield from self._compute(call, beat)
            value, outcome = yield from self._fill(call, state, read.generations, value, took)
            return value, outcome
        finally:
            if leased and outcome not in ("stored", "refused"):
                yield from quietly(sql.give_up(call.key, *state))

    def _read(self, call: CachedCall) -> Flow[CacheRead]:
        if self.l1 is not None:
            call.epoch = self.l1.epoch
        call.sent = monotonic()
        read: CacheRead = yield from self.ask(call, call.context.sql.read(call.keys))
        return read

    def _finished(self, call: CachedCall, read: CacheRead) -> Any:
        """The value that a look after waiting found."""
        found = self.interpret(call, read)
        if found is None:
            return MISSING
        if found.fresh > 0:
            self._remember(call, found.envelope.payload, found.fresh)
        self.counts.add("hits" if found.fresh > 0 else "stale_hits")
        return found.value

    def _count_wait(self, call: CachedCall) -> None:
        if not call.counted:
            call.counted = True
            self.counts.add("waits")

    def _compute(self, call: CachedCall, beat: Op[bool] | None) -> Flow[tuple[Any, float]]:
        """Call the function, its lease kept up; return what it returned and its seconds."""
        stop = _nothing if beat is None else self._keep_extending(call, beat)
        began = monotonic()
        try:
            with Computation(self.flights.name(call.context.store, call.key)):
                value = yield from call_step(self._work_of(call))
            return value, monotonic() - began
        finally:
            stop()

    def _fill(
        self, call: CachedCall, state: State, generations: tuple[int, ...], value: Any, took: float
    ) -> Flow[tuple[Any, str]]:
        """Store what the function returned in place of a state; return it as cached, and how that
        ended: stored, refused (another state stands there), unwanted, or failed."""
        options = self.options
        if options.condition is not None and not options.condition(value):
            return self._unstored(call, value), "unwanted"
        ttl = self._ttl(call, value)
        value, payload = self._as_cached(call, value)
        if ttl <= 0:
            return value, "unwanted"
        if took > COMPUTE_MAX:
            self.counts.add("discarded_fills")
            return value, "failed"
        soft = ttl * (1.0 - options.jitter * random())  # noqa: S311  # jitter
        hard = soft + options.stale
        if len(call.keys) > 2:
            hard = min(hard, TAGGED_MAX)
        transforms = call.context.transforms
        sealed = payload if transforms is None else transforms.seal(call.key, payload)
        envelope = Envelope(soft, hard, took, generations, sealed)
        packed, life = envelope.pack(self.codec.letter), None if math.isinf(hard) else hard
        op = call.context.sql.fill(call.key, *state, packed, life)
        call.sent = monotonic()
        try:
            version = yield from self.ask(call, op)
        except (Busy, Unreachable) as why:
            if isinstance(why, Busy):
                self.counts.add("discarded_fills")
            return value, "failed"
        if version is None:
            self.counts.add("discarded_fills")
            return value, "refused"
        self.counts.add("fills")
        self._remember(call, payload, soft)
        if call.sent >= call.context.report_at:
            self._report(call)
        return value, "stored"

    def _report(self, call: CachedCall) -> None:
        """Write for `pgkv cache` what this process has counted, in the background."""
        context = call.context
        context.report_at = call.sent + REPORT_EVERY
        counts = {
            name: (each.hits + each.stale_hits, each.misses)
            for name, each in tuple(context.counts.items())
        }
        process = f"{socket.gethostname()}:{os.getpid()}"
        op = context.sql.report(process, msgspec.json.encode(counts))
        self._run_later(call, lambda: quietly(op))

    def _ttl(self, call: CachedCall, value: Any) -> float:
        """Seconds for which this value is fresh: inf for ever, 0 for not at all."""
        ttl: Any = self.options.ttl
        if callable(ttl):
            args, kwargs = call.positional
            ttl = ttl(value, *args, **kwargs)
            ttl = ttl.total_seconds() if isinstance(ttl, timedelta) else ttl
            if ttl is not None and ttl <= 0:
                return 0.0
        return math.inf if ttl is None else _codec.seconds(ttl, endless="")

    # -- background work

    def _run_later(
        self,
        call: CachedCall,
        make: Callable[[], Flow[Any]],
        done: Callable[[], None] | None = None,
    ) -> bool:
        """Run a flow in a thread or task; False when there is no room. `done` is called when it has
        ended in any way."""
        run, timeout = call.context.store._run, self.options.store_timeout
        runtime = call.context.runtime
        return runtime is not None and runtime.run_later(lambda: run(make(), timeout), done)

    def _keep_extending(self, call: CachedCall, op: Op[bool]) -> Callable[[], None]:
        """Extend a lease in regular intervals until the function that is returned is called."""
        if call.context.runtime is None:
            return _nothing
        op, background = call.context.runtime.placed(op)
        renewer, options = background.renewer, self.options
        extended = Extended(op, self.name, options.compute_timeout, options.store_timeout)
        renewer.add(extended, extended)
        return lambda: renewer.discard(extended)

    # -- entries that are there: stale, about to end, or to be replaced

    def _serve(self, call: CachedCall, found: Found) -> Flow[Any]:
        """A valid entry that is stale, or whose refresh is due."""
        stale = found.fresh <= 0
        if not stale:
            self._remember(call, found.envelope.payload, found.fresh)
        if self.options.stale:
            self.counts.add("stale_hits" if stale else "hits")
            self._refresh_later(call)
            return found.value
        # Without `stale` nothing runs in the background: the chosen caller computes.
        refreshed = yield from self._try_refresh(call)
        self.counts.add("hits" if refreshed is MISSING else "misses")
        return found.value if refreshed is MISSING else refreshed

    def _refresh_later(self, call: CachedCall) -> None:
        name = self.flights.name(call.context.store, call.key)
        if name in self.flights.refreshing:
            return
        self.flights.refreshing.add(name)

        def done() -> None:
            self.flights.refreshing.discard(name)

        if not self._run_later(call, lambda: self._try_refresh(call), done):
            done()

    def _try_refresh(self, call: CachedCall) -> Flow[Any]:
        """Refresh an entry that is valid as it is: a failure concerns no caller."""
        try:
            return (yield from self._refresh(call))
        except (Busy, Unreachable):
            pass
        except Exception as error:  # noqa: BLE001  # of the function too
            self.counts.add("errors")
            _observe.warning(
                "pgkv.cached.refresh_failed", function=self.name, error=type(error).__name__
            )
        return MISSING

    def _refresh(self, call: CachedCall) -> Flow[Any]:
        """Compute again while the old value is served; MISSING when another caller does, or did."""
        sql = call.context.sql
        key = sql.cache_key(REFRESH, f"{self.name}:{call.digest}")
        mark = new_mark(PLACEHOLDER)
        lease: ComputeLease = yield from self.ask(
            call, sql.lease(key, mark, self.options.compute_timeout)
        )
        if lease.version is None:
            return MISSING
        try:
            # Again, under the lease: it may have been refreshed since.
            read = yield from self._read(call)
            found = self.interpret(call, read)
            if found is None or read.row is None or not self._is_due(found):
                return MISSING
            state = read.row.version, mark_of(read.row.value)
            beat = sql.extend(key, lease.version, mark, self.options.compute_timeout)
            value, took = yield from self._compute(call, beat)
            value, _ = yield from self._fill(call, state, read.generations, value, took)
            return value
        finally:
            yield from quietly(sql.give_up(key, lease.version, mark))

    def _is_due(self, found: Found) -> bool:
        # No second random draw: a refresh in the meantime left an entry that is younger than the
        # time the function takes.
        return found.fresh <= 0 or found.age > found.envelope.compute

    def renew(self, call: CachedCall) -> Flow[Any]:
        """Compute and store whatever stands there: `refresh()`. The latest one to begin wins."""
        return (yield from self._or_alone(call, self._renew(call)))

    def _renew(self, call: CachedCall) -> Flow[Any]:
        sql = call.context.sql
        for _ in range(3):
            read = yield from self._read(call)
            row = read.row
            leased = row is None or is_placeholder(row.value)
            if row is not None and not leased:
                mark = mark_of(row.value)
                version = yield from self.ask(call, sql.claim(call.key, row.version))
            else:
                mark = new_mark(PLACEHOLDER)
                replace = 0 if row is None else row.version
                granted: ComputeLease = yield from self.ask(
                    call, sql.lease(call.key, mark, self.options.compute_timeout, replace)
                )
                version = granted.version
            if version is not None:
                flow = self._compute_and_fill(call, (version, mark), read, leased=leased)
                return (yield from flow)[0]
        raise Busy


def _nothing() -> None:
    """No heartbeat was begun, no context is known."""


def quietly(op: Op[Any]) -> Flow[None]:
    """Perform what need not succeed: a lease that is not given up ends by itself."""
    with contextlib.suppress(PgkvError):
        yield from do(op)


def breaker_open() -> PgkvError:
    """What stands for an answer while the circuit is open."""
    error = StoreUnavailableError("cached: the store failed repeatedly and is left alone for now")
    error.breaker = True  # type: ignore[attr-defined]  # told from an answer of the store
    return error
