"""The one place that knows of ``fork()``: what a forked child renews, and in which order.

A child inherits the memory of its parent but none of its threads. A lock that another thread held
stays locked, a connection belongs to the parent, and background work stands still. So
the owner of such a thing registers it here, and the child renews all of it before its first line
of code runs, in three stages:

1. `LOCKS`: every lock becomes a new one. Nothing takes a lock before this is done.
2. `CONNECTIONS`: what belongs to the parent is set aside, without a word on its sockets.
3. `THREADS`: background work is forgotten; the next call that needs it starts it again.

Owners are referred to weakly. A lock is replaced, not released: the thread that forks may hold it
itself, and leaves it after the fork as it entered it.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

LOCKS, CONNECTIONS, THREADS = range(3)


class Forkable(Protocol):
    """An object whose state must be renewed in a forked child."""

    def after_fork(self) -> None:
        """Start again in the child. Must not wait for anything."""
        ...


class _Registration(NamedTuple):
    stage: int
    owner: weakref.ref[Any]
    renew: Callable[[Any], object]


F = TypeVar("F", bound=Forkable)
_entries: dict[int, _Registration] = {}  # in the order of registration
_numbers = itertools.count()
_held: list[tuple[weakref.ref[Any], str]] = []
_holding: list[threading.RLock] = []


def survives_fork(owner: F, stage: int = THREADS) -> F:
    """Have the owner's `after_fork` called in every forked child, for as long as it lives."""
    _register(stage, owner, lambda each: each.after_fork())
    return owner


def new_lock(owner: object, name: str = "_lock", *, hold: bool = False) -> threading.RLock:
    """Return a lock to be kept as that attribute of `owner`; a forked child puts a new one there.

    It is reentrant, because a signal handler may run while the interrupted thread holds it. What
    it guards must therefore be consistent at every call that the guarded code makes.

    Args:
        owner: an object, or a module for its global.
        name: the attribute.
        hold: no other thread may be inside while the process forks.
    """

    def renew(each: Any) -> None:
        setattr(each, name, threading.RLock())

    _register(LOCKS, owner, renew)
    if hold:
        _held.append((weakref.ref(owner), name))
    return threading.RLock()


def _register(stage: int, owner: object, renew: Callable[[Any], object]) -> None:
    number = next(_numbers)

    def forget(_: object) -> None:
        _entries.pop(number, None)

    _entries[number] = _Registration(stage, weakref.ref(owner, forget), renew)


def _before_fork() -> None:
    for ref, name in _held:
        owner = ref()
        if owner is not None:
            lock = getattr(owner, name)
            lock.acquire()
            _holding.append(lock)


def _after_fork_in_parent() -> None:
    while _holding:
        _holding.pop().release()


def _after_fork_in_child() -> None:
    _holding.clear()
    failures = []
    for entry in sorted(_entries.values(), key=lambda each: each.stage):
        owner = entry.owner()
        if owner is not None:
            try:
                entry.renew(owner)
            except Exception as error:  # noqa: BLE001  # the others are renewed all the same
                failures.append(error)
    if failures:
        raise ExceptionGroup("pgkv could not be renewed in a forked child", failures)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )

__all__ = ["CONNECTIONS", "LOCKS", "THREADS", "Forkable", "new_lock", "survives_fork"]
