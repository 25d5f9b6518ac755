"""Who may use a transaction while a part of it is nested.

Savepoints nest by time, not by who opens them: ROLLBACK TO undoes whatever was done since. So
while one thread (or task) is inside a nested transaction, others that use the transaction around
it wait until that ends.
"""

from __future__ import annotations

from typing import Any

from ..errors import TransactionError

NESTED_NAP = 0.002  # seconds between two looks whether another's nested part has ended


class Nesting:
    """The nested transaction of a thread (or task) that is open on a channel, if one is."""

    __slots__ = ("_depth", "owner")

    def __init__(self) -> None:
        self.owner: Any = None
        self._depth = 0

    def is_free(self, who: Any) -> bool:
        """Whether that thread (or task) may go on."""
        return self.owner is None or self.owner == who

    def enter(self, who: Any) -> None:
        """Begin one; `is_free` was true."""
        self.owner = who
        self._depth += 1

    def leave(self) -> None:
        self._depth -= 1
        if not self._depth:
            self.owner = None


def never_free(action: str, seconds: float) -> TransactionError:
    """What a caller gets that waited for another's nested transaction."""
    return TransactionError(
        f"{action}: another thread or task has a nested transaction open on this one, and did not "
        f"end it within {seconds:.3g} s; inside a nested transaction use the store it returned"
    )
