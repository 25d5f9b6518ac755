"""What pgkv tells about itself: structured events, a hook per operation for metrics, and how its
objects show themselves in a log or a debugger.

Where the application configured structlog, events go through its configuration; where it did
not, they go to the standard logger ``pgkv`` (unconfigured structlog would print every level to
standard output, which a library must not). Values, tokens and passwords are never logged.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import Context
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeAlias

from .errors import ConfigError, PgkvError

if TYPE_CHECKING:
    from ._ops.op import Op

OperationHook: TypeAlias = Callable[[str, float, str, int], object]

# Control characters, also those that change the direction of what follows: a terminal obeys them, and
# in a page names would show as something else. Compiled by who shows names.
CONTROLS = r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]"

_standard = logging.getLogger("pgkv")


def shown(facts: Callable[[Any], str]) -> Callable[[Any], str]:
    """Make a `__repr__` of what says the facts about an object: ``<Lock 'billing' ttl=30>``.

    The facts must hold no secret, ask no server and take no lock. Of an object half made, as the
    locals in a traceback may hold one, only the class is shown: a repr never fails.
    """

    @functools.wraps(facts)
    def show(self: Any) -> str:
        try:
            text = facts(self)
        except Exception:  # noqa: BLE001  # whatever is missing, or a user's own repr
            return f"<{type(self).__name__}>"
        return f"<{type(self).__name__} {text}>"

    return show


class OperationEvent:
    """An operation that has ended. It holds no key, value or SQL parameter: everything is worked out
    when it is read, so a listener pays for what it uses.

    Attributes:
        seconds: how long it took, its repeats included.
        error: the exception that it raised, or None.
    """

    __slots__ = ("_answer", "_channel", "_op", "error", "seconds")

    kind = "operation"

    def __init__(
        self,
        _op: Op[Any],
        seconds: float,
        _answer: Any,
        error: BaseException | None,
        _channel: Any = None,
    ) -> None:
        self._op = _op
        self._channel = _channel
        self._answer = _answer
        self.seconds: float = seconds
        self.error: BaseException | None = error

    @property
    def name(self) -> str:
        """Such as ``get``, ``set_many``, ``limit_hit``."""
        return self._op.statement.name

    @property
    def table(self) -> str | None:
        """The table's name; None for what concerns no table."""
        table = self._op.statement.table
        return None if table is None else table.name

    @property
    def outcome(self) -> str:
        """``ok``, or the name of the exception's class."""
        return "ok" if self.error is None else type(self.error).__name__

    @property
    def sqlstate(self) -> str | None:
        """The server's code for its refusal, if it refused."""
        return getattr(self.error, "_sqlstate", None) or None

    @property
    def retries(self) -> int:
        """How often it was repeated."""
        return getattr(self._op, "retries", 0)

    @property
    def batch_size(self) -> int | None:
        """How many keys the call named; None for what names none, such as a scan."""
        return self._op.keys

    @property
    def hits(self) -> int | None:
        """Of a read by key: how many keys it found. None otherwise."""
        keys = self._op.keys
        if keys is None or self._op.statement.writes or self.error is not None:
            return None
        if isinstance(self._answer, dict | set):
            return len(self._answer)
        return int(self._answer is not None and self._answer is not False)

    @property
    def misses(self) -> int | None:
        """Of a read by key: how many keys it did not find. None otherwise."""
        hits, keys = self.hits, self._op.keys
        return None if hits is None or keys is None else keys - hits

    @property
    def server(self) -> tuple[str | None, int | None, str | None]:
        """Host, port and database, as far as the DSN or the connection tells them."""
        with contextlib.suppress(PgkvError):  # an embedded server that does not start
            if self._channel is not None:
                return self._channel.server  # type: ignore[no-any-return]  # any channel's
        return None, None, None

    @property
    def contexts(self) -> Sequence[Context]:
        """The contexts of the calls that it answers, where `coalesce=True` merged several into one
        statement. Hooks run in that of the first."""
        return getattr(self._op, "contexts", ())

    @shown
    def __repr__(self) -> str:
        return f"{self.name} {self.outcome}"


class StateEvent:
    """A change of state, such as ``pgkv.lock.lost``. Most are also logged.

    Attributes:
        name: the event's name.
        kind: its second part: ``lock``, ``pool``, ``session``, ``limit``, ``cached``, ...
        fields: names written in code, counts and times.
    """

    __slots__ = ("fields", "kind", "name")

    def __init__(self, name: str, fields: Mapping[str, object]) -> None:
        self.name: str = name
        self.kind: str = name.split(".")[1]
        self.fields: Mapping[str, object] = fields

    @shown
    def __repr__(self) -> str:
        return self.name


Event: TypeAlias = "OperationEvent | StateEvent"
EventHook: TypeAlias = Callable[[Any], object]

KINDS = (  # of changes of state, as metrics count them
    "lock", "leader", "session", "limit", "cached", "queue", "idempotency", "listener", "sweep",
    "evict", "pool", "retry", "table", "background", "store",
)  # fmt: skip

# Read once per operation, or change of state: empty, it costs one truth test.
hooks: list[EventHook] = []
listeners: list[tuple[EventHook, frozenset[str]]] = []  # of changes of state
# What a scrape reads: channels with a pool, and the counters of limiters by their names.
pools: weakref.WeakSet[Any] = weakref.WeakSet()
limiters: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def on_event(hook: EventHook, *, kinds: Iterable[str] = ("operation",)) -> Callable[[], None]:
    """Call ``hook(event)`` after every event of the given kinds, in every store of the process.

    Meant for metrics and traces. It runs in the caller's thread (or event loop) before the caller
    has the answer, so keep it fast; an exception in it is logged and goes no further. Without a hook
    this costs nothing.

    Args:
        hook: receives an `OperationEvent`, or for other kinds a `StateEvent`.
        kinds: ``"operation"``, and kinds of changes of state: the second part of an event's name
            (``"lock"`` for ``pgkv.lock.lost``). Events that are logged at level debug are
            not told: they may hold keys.

    Returns:
        A function that takes the hook away again.

    Raises:
        ConfigError: `hook` is no function, or `kinds` is a str.
    """
    return _listen(hook, kinds, "on_event()")


def _listen(hook: EventHook, kinds: Iterable[str], caller: str) -> Callable[[], None]:
    if not callable(hook):
        raise ConfigError(f"{caller} takes a function, not {type(hook).__name__}")
    if isinstance(kinds, str):
        raise ConfigError(f"kinds of {caller} is a list of names: [{kinds!r}]")
    wanted = frozenset(kinds)
    entry = hook, wanted - {"operation"}
    if "operation" in wanted:
        hooks.append(hook)
    if entry[1]:
        listeners.append(entry)

    def remove() -> None:
        if hook in hooks:
            hooks.remove(hook)
        if entry in listeners:
            listeners.remove(entry)

    return remove


def on_operation(hook: OperationHook) -> Callable[[], None]:
    """Call `hook(name, seconds, outcome, retries)` after every operation of every store: `on_event`
    in its simplest form.

    Args:
        hook: receives the operation's name (``"get"``), the seconds it took, its outcome
            (``"ok"`` or the name of the exception's class) and how often it was repeated.

    Returns:
        A function that takes the hook away again.

    Raises:
        ConfigError: `hook` is no function.
    """
    if not callable(hook):
        raise ConfigError(f"on_operation() takes a function, not {type(hook).__name__}")

    def tell(event: OperationEvent) -> None:
        hook(event.name, event.seconds, event.outcome, event.retries)

    return _listen(tell, ("operation",), "on_operation()")


def notify(
    op: Op[Any],
    started: float,
    answer: Any = None,
    error: BaseException | None = None,
    channel: Any = None,
) -> None:
    """Tell the hooks, in the caller's context, of an operation that began at that monotonic time."""
    event = OperationEvent(op, monotonic() - started, answer, error, channel)
    context = getattr(op, "context", None)
    if context is None:
        _tell(tuple(hooks), event)
    else:
        context.run(_tell, tuple(hooks), event)


def _tell(told: Iterable[EventHook], event: Event) -> None:
    for hook in told:
        try:
            hook(event)
        except Exception as error:  # noqa: BLE001  # metrics must not fail what they measure
            warning("pgkv.hook.failed", error=type(error).__name__)


def event(name: str, **context: object) -> None:
    """Tell the listeners of a change of state that happens too often for the log."""
    if listeners:
        happened = StateEvent(name, context)
        _tell([hook for hook, kinds in listeners if happened.kind in kinds], happened)


def debug(event: str, **context: object) -> None:
    """Log for those who look into pgkv itself."""
    _log(logging.DEBUG, event, context)


def info(event: str, **context: object) -> None:
    """Log a change of state that an operator may want to know."""
    _log(logging.INFO, event, context)


# Warnings that an outage causes at every call. Only the first BURST in each WINDOW seconds are
# logged. The rest is counted; the first warning of a later window has their number.
REPEATED = frozenset(
    (
        "pgkv.retry",
        "pgkv.session.unavailable",
        "pgkv.session.dropped",
        "pgkv.session.ambiguous_cookie",
    )
)
BURST = 10
WINDOW = 60.0


class _Window:
    """How often one warning came since a moment. Counting takes no lock: next() is atomic."""

    __slots__ = ("omitted", "seen", "until")

    def __init__(self, until: float) -> None:
        self.until = until
        self.seen = itertools.count(1)
        self.omitted = itertools.count()


_windows: dict[str, _Window] = {}


def warning(event: str, **context: object) -> None:
    """Log something that went wrong and was dealt with."""
    if event in REPEATED:
        now = monotonic()
        window = _windows.get(event)
        if window is None or now >= window.until:
            omitted = 0 if window is None else next(window.omitted)
            if omitted:
                context["omitted"] = omitted
            window = _windows[event] = _Window(now + WINDOW)
        if next(window.seen) > BURST:
            next(window.omitted)
            return
    _log(logging.WARNING, event, context)


def _log(level: int, name: str, context: dict[str, object]) -> None:
    # That a hook failed is told to no hook: it would fail again.
    if level > logging.DEBUG and name != "pgkv.hook.failed":
        event(name, **context)
    # Not imported here: that costs as much as psycopg, and who configured it has imported it.
    structlog = sys.modules.get("structlog")
    if structlog is not None and structlog.is_configured():
        structlog.get_logger("pgkv").log(level, name, **context)
    elif _standard.isEnabledFor(level):
        pairs = " ".join(f"{field}={value}" for field, value in context.items())
        _standard.log(level, "%s %s", name, pairs, extra={"pgkv": context})
