"""Statements that collect the expired rows of any table, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterable

from .._ops import codec as _codec
from .._ops.lazy import cached_property
from .._ops.op import BINARY, TEXT, Op, Result, Statement
from .table import TableStatements, read_int

SWEEP_PAGES = 128


class Sweep(TableStatements):
    """Sweeps of any table with a column ``expires_at``."""

    def collect(self, keys: Iterable[bytes]) -> Op[int]:
        """Delete those rows that have expired."""
        raise NotImplementedError  # the name of the key column differs from table to table

    @cached_property
    def _regclass(self) -> str:
        return "'" + self.t.replace("'", "''") + "'::regclass"

    @cached_property
    def _pages(self) -> Statement[int]:
        size = f"SELECT pg_relation_size({self._regclass}) / current_setting('block_size')::bigint"
        return self.reading("cleanup", size, (), read_int)

    def pages(self) -> Op[int]:
        return Op(self._pages)

    @cached_property
    def _sweep(self) -> Statement[tuple[int, int, int]]:
        # TID ranges need no index on expires_at (any index on it would end HOT updates). The
        # second test of the expiry is for a row that was written between the two scans.
        chunk = "ctid >= $1::tid AND ctid < $2::tid"
        return self.statement(
            "cleanup",
            f"WITH gone AS (DELETE FROM {self.t} WHERE ctid = ANY (ARRAY("
            f"SELECT ctid FROM {self.t} WHERE {chunk} AND expires_at <= statement_timestamp() "
            "LIMIT $3::bigint FOR UPDATE SKIP LOCKED)) "
            "AND expires_at <= statement_timestamp() RETURNING 1) "
            "SELECT (SELECT count(*) FROM gone), "
            f"(SELECT count(*) FROM {self.t} WHERE {chunk}), "
            f"pg_relation_size({self._regclass}) / current_setting('block_size')::bigint",
            (TEXT, TEXT, BINARY),
            _read_sweep,
            retry_safe=True,
            writes=False,
        )

    def sweep(self, page: int, limit: int | None = None) -> Op[tuple[int, int, int]]:
        """Collect the chunk that starts at that page; rows deleted, rows seen, total pages."""
        return Op(self._sweep, _tids(page, limit))

    @cached_property
    def _sweep_alone(self) -> Statement[tuple[int, int, int]]:
        # Only one process at a time sweeps a table; for the others the chunk is empty.
        alone = "SELECT pg_try_advisory_xact_lock(hashtext('pgkv sweep'), hashtext($4)) AS it"
        sql = self._sweep.sql.replace("WITH", f"WITH alone AS MATERIALIZED ({alone}),", 1)
        sql = sql.replace("LIMIT $3", "AND (SELECT it FROM alone) LIMIT $3", 1)
        return self.statement(
            "cleanup",
            sql,
            (TEXT, TEXT, BINARY, TEXT),
            _read_sweep,
            retry_safe=True,
            writes=False,
        )

    def sweep_alone(self, page: int) -> Op[tuple[int, int, int]]:
        """Like `sweep`, but does nothing while another process sweeps the table."""
        return Op(self._sweep_alone, (*_tids(page, None), self.t.encode()))


def _tids(page: int, limit: int | None) -> tuple[bytes, bytes, bytes | None]:
    encoded = None if limit is None else _codec.encode_int8(limit)
    return b"(%d,0)" % page, b"(%d,0)" % (page + SWEEP_PAGES), encoded


def _read_sweep(result: Result) -> tuple[int, int, int]:
    column, read = result.get_value, _codec.decode_int
    return read(column(0, 0)), read(column(0, 1)), read(column(0, 2))
