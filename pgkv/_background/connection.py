"""The background's own connection, outside every pool: an application that uses up its pool must
not lose its leases."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Any, TypeVar

import psycopg

from .._engine._async.connection import AsyncPgConnection, Watchdog, whole_or_none
from .._ops.op import Op
from ..errors import OperationTimeoutError, PgkvError, translate

T = TypeVar("T")


async def opened(conninfo: str) -> psycopg.AsyncConnection[Any]:
    """Open a connection outside of pools."""
    connecting = psycopg.AsyncConnection.connect(conninfo, autocommit=True, prepare_threshold=None)
    return await whole_or_none(connecting)


class DedicatedConnection:
    """A connection that opens at first use and again when it breaks, for one operation at a time."""

    def __init__(self, conninfo: str, *, prepares: bool) -> None:
        self._conninfo = conninfo
        self._prepares = prepares
        self._connection: AsyncPgConnection | None = None

    async def execute(self, op: Op[T], seconds: float) -> T:
        """Perform one operation within that time, connecting included. After a failure the next call
        reconnects if necessary."""
        name = op.statement.name
        until = monotonic() + seconds
        try:
            async with asyncio.timeout(seconds):
                connection = await self._open()
            result = await connection.execute(op, max(0.001, until - monotonic()))
        except TimeoutError as error:
            self.close()
            if isinstance(error, PgkvError):
                raise
            raise OperationTimeoutError(f"{name}: no connection within {seconds:.3g} s") from None
        except psycopg.Error as error:
            self.close()
            failure = translate(error, action=name)
        except PgkvError:
            if self._connection is None or not self._connection.is_usable():
                self.close()
            raise
        except BaseException:
            self.close()
            raise
        else:
            return op.decode(result)  # type: ignore[return-value]  # no statement here can race
        try:
            raise failure from failure.__cause__
        finally:
            del failure  # its traceback holds this frame

    async def open(self, seconds: float) -> None:
        """Open it before it is needed. The operation that needs it reports a failure."""
        try:
            async with asyncio.timeout(seconds):
                await self._open()
        except (psycopg.Error, OSError, PgkvError):
            self.close()

    @property
    def is_ready(self) -> bool:
        """Whether it is open, as far as the client can know without a query."""
        return self._connection is not None and not self._connection.is_stale()

    async def _open(self) -> AsyncPgConnection:
        if self._connection is not None and self._connection.is_stale():
            self.close()
        if self._connection is None:
            conn = await opened(self._conninfo)
            watchdog = Watchdog(asyncio.get_running_loop())
            self._connection = AsyncPgConnection(conn, watchdog, prepares=self._prepares)
        return self._connection

    def close(self) -> None:
        """Close it at once, without a cancel request, which could take a second of a lease's time:
        a renewal that goes on without us does no harm."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
