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
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any, TypeAlias

from .errors import ConfigError

OperationHook: TypeAlias = Callable[[str, float, str, int], object]

_standard = logging.getLogger("pgkv")

# Read once per operation: empty, it costs one truth test.
hooks: list[OperationHook] = []


def on_operation(hook: OperationHook) -> Callable[[], None]:
    """Call `hook(name, seconds, outcome, retries)` after every operation of every store.

    Meant for metrics. It runs in the caller's thread (or event loop) before the caller has the
    answer, so it must be quick; an exception in it is logged and goes no further.

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
    hooks.append(hook)

    def remove() -> None:
        if hook in hooks:
            hooks.remove(hook)

    return remove


def notify(name: str, started: float, outcome: str, retries: int) -> None:
    """Tell the hooks of an operation that began at that monotonic time."""
    seconds = monotonic() - started
    for hook in tuple(hooks):
        try:
            hook(name, seconds, outcome, retries)
        except Exception as error:  # noqa: BLE001  # metrics must not fail what they measure
            warning("pgkv.hook.failed", error=type(error).__name__)


@contextlib.contextmanager
def operation(name: str) -> Iterator[None]:
    """Tell the hooks of the operation in the body."""
    started = monotonic()
    try:
        yield
    except BaseException as error:
        notify(name, started, type(error).__name__, 0)
        raise
    notify(name, started, "ok", 0)


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


def _log(level: int, event: str, context: dict[str, object]) -> None:
    # Not imported here: that costs as much as psycopg, and who configured it has imported it.
    structlog = sys.modules.get("structlog")
    if structlog is not None and structlog.is_configured():
        structlog.get_logger("pgkv").log(level, event, **context)
    elif _standard.isEnabledFor(level):
        pairs = " ".join(f"{name}={value}" for name, value in context.items())
        _standard.log(level, "%s %s", event, pairs, extra={"pgkv": context})


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
