"""What a forked child has to begin anew: locks that a thread of the parent may hold, and whatever
only the parent's threads would end."""

from __future__ import annotations

import os
import weakref
from typing import Any, Protocol, TypeVar


class Forkable(Protocol):
    """Something with locks or threads."""

    def after_fork(self) -> None:
        """Begin anew, in the child."""
        ...


F = TypeVar("F", bound=Forkable)
_all: weakref.WeakSet[Any] = weakref.WeakSet()


def survives_fork(thing: F) -> F:
    """Have its `after_fork` called in every forked child, for as long as it lives."""
    _all.add(thing)
    return thing


def _after_fork_in_child() -> None:
    for each in tuple(_all):
        each.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
