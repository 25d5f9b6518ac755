"""How leases are renewed: all of one table by one statement, each at a third of its own ttl.

A failed renewal is repeated until the lease can no longer be trusted. Then its holder is notified,
whether or not an answer has arrived. `_runtime/renewal.py` watches the time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from typing import TYPE_CHECKING

from ... import _observe
from ...errors import OperationTimeoutError, PgkvError
from .._runtime.renewal import clock
from .lease import REASON_OF, LeaseState, retry_pause
from .sql import LOCKED, RENEWED, LockStatements

if TYPE_CHECKING:
    from .._runtime.background import Background
    from .._runtime.connection import DedicatedConnection


class LeaseRenewals:
    """The lock tables of one background. One `LeaseRenewal` each: locks made one by one have
    statements of their own, but mostly one table."""

    def __init__(self, background: Background) -> None:
        self._renewer = background.renewer
        self._of_tables: dict[str, LeaseRenewal] = {}

    def watch(self, lease: LeaseState) -> None:
        """Renew the lease, and tell its holder of its end."""
        sql = lease._options.sql
        renewal = self._of_tables.get(sql.t)
        if renewal is None:
            renewal = self._of_tables.setdefault(sql.t, LeaseRenewal(sql))
        self._renewer.add(lease, renewal)

    def forget(self, lease: LeaseState) -> None:
        """Renew it no more."""
        self._renewer.discard(lease)


class LeaseRenewal:
    """The renewal of one table's leases."""

    def __init__(self, sql: LockStatements) -> None:
        self._sql = sql
        self._failing = False

    @property
    def key(self) -> Hashable:
        """The table."""
        return self

    async def renew(
        self, connection: DedicatedConnection, batch: list[LeaseState], seconds: float
    ) -> None:
        """Send one statement for all of them, and note what the server says of each."""
        mine = _take_turns(batch)
        sent_at = clock()
        try:
            op = self._sql.renew([(lease._key, lease._token, lease._ttl) for lease in mine])
            codes = await connection.execute(op, seconds)
        except asyncio.CancelledError:
            self._failed(mine, OperationTimeoutError("no answer in the time the leases leave"))
            raise
        except PgkvError as error:
            self._failed(mine, error)
        else:
            self._failing = False
            _note(mine, codes, sent_at)
        finally:
            _end_turns(mine)

    def _failed(self, batch: list[LeaseState], error: PgkvError) -> None:
        for lease in batch:
            lease._cause = error.with_traceback(None)
        if not self._failing:
            self._failing = True
            _observe.warning(
                "pgkv.lock.renewal_failed",
                leases=len(batch),
                error=type(error).__name__,
                detail=str(error),
            )

    def abandoned(self, name: str) -> None:
        """A lease was dropped without release()."""
        _observe.warning("pgkv.lock.abandoned", lock=name)

    def closed(self, lease: LeaseState) -> None:
        """Its store was closed."""
        lease._lose("closed")


# A failed statement's traceback keeps the frames it passed through until the collector comes. So
# that dropped leases are noticed, the frames that await hold none: lists are emptied, and loops
# over them are functions of their own.


def _take_turns(due: list[LeaseState]) -> list[LeaseState]:
    """Take those leases that no other call sends a statement about."""
    for lease in due:
        # Whatever becomes of this try: it is not due again before a while.
        lease._due = clock() + retry_pause(lease._ttl) / 2
    mine = [lease for lease in due if lease._turn.acquire(blocking=False)]
    due.clear()
    return mine


def _end_turns(mine: list[LeaseState]) -> None:
    for lease in mine:
        lease._turn.release()
    mine.clear()


def _note(batch: list[LeaseState], codes: dict[bytes, int], sent_at: float) -> None:
    """Note what the server said of each."""
    for lease in batch:
        code = codes.get(lease._key, LOCKED)
        if code == RENEWED:
            # A reply that comes after the trust has ended does not bring it back.
            if not lease.is_lost:
                lease._trust(sent_at, lease._ttl)
        elif code != LOCKED:
            lease._lose(REASON_OF[code])
