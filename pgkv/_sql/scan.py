"""Statements that touch a range of keys or the whole table.

A prefix is a range: ``key >= 'user:' AND key < 'user;'``, which the primary key serves under
COLLATE "C" (LIKE would not, and would give '%' and '_' in a prefix a meaning).
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import TypeVar

from .._ops import codec as _codec
from .._ops.lazy import cached_property
from .._ops.op import BINARY, TEXT, Op, Result, Signal, Statement
from ..errors import InvalidKeyError
from ..types import KeyValue, ScanOptions, Stats
from .sweep import Sweep
from .table import LIVE, query, read_found, read_int, read_nothing

T = TypeVar("T")

# The seconds that a row has left; NULL for no expiry.
LEFT = (
    "nullif((extract(epoch from expires_at) - extract(epoch from statement_timestamp()))::float8, "
    "'Infinity')"
)


class ScanStatements(Sweep):
    # -- ranges

    def keys(self, options: ScanOptions) -> Op[list[str]]:
        return self._scan("keys", "key", self._read_keys, options)

    def scan(self, options: ScanOptions) -> Op[list[KeyValue]]:
        return self._scan("scan", "key, value", self._read_rows, options)

    def dump(self, options: ScanOptions) -> Op[list[tuple[str, bytes, float | None]]]:
        """The rows selected, each with the seconds it has left; None for no expiry."""
        return self._scan("scan", f"key, value, {LEFT}", self._read_dump, options)

    def _read_dump(self, result: Result) -> list[tuple[str, bytes, float | None]]:
        left = [result.get_value(row, 2) for row in range(result.ntuples)]
        return [
            (key, value, None if raw is None else _codec.decode_float8(raw))
            for (key, value), raw in zip(self._read_rows(result), left, strict=True)
        ]

    def _scan(
        self,
        name: str,
        columns: str,
        decode: Callable[[Result], T | Signal],
        options: ScanOptions,
    ) -> Op[T]:
        limit = None if options.limit is None else _codec.whole("limit", options.limit, 0)
        offset = _codec.whole("offset", options.offset, 0)
        where, params = self._range(options)
        statement: Statement[T] = self.made(
            (name, columns, where),
            lambda: self.reading(
                name,
                f"SELECT {columns} FROM {self.t} WHERE {where} "
                f'ORDER BY key COLLATE "C" LIMIT $1::bigint OFFSET $2::bigint',
                (BINARY, BINARY, *(TEXT,) * len(params)),
                decode,
            ),
        )
        encode = _codec.encode_int8
        return Op(statement, (None if limit is None else encode(limit), encode(offset), *params))

    def _range(self, options: ScanOptions, first: int = 3) -> tuple[str, list[bytes]]:
        """The WHERE of a selection, its parameters counted from `first`. Bounds are merged here,
        so that there is one text per shape, for any mix of bounds."""
        prefix = self.prefix_bytes + _codec.encode_bound(options.prefix, "prefix")
        lower, inclusive = prefix, True
        if options.start is not None:
            lower = max(lower, self.prefix_bytes + _codec.encode_bound(options.start, "start"))
        if options.after is not None:
            after = self.prefix_bytes + _codec.encode_bound(options.after, "after")
            if after >= lower:
                lower, inclusive = after, False
        uppers = [] if not prefix else [_codec.successor(prefix)]
        if options.end is not None:
            uppers.append(self.prefix_bytes + _codec.encode_bound(options.end, "end"))
        upper = min((u for u in uppers if u is not None), default=None)

        clauses: list[str] = []
        params: list[bytes] = []
        if lower or not inclusive:
            clauses.append(f'key COLLATE "C" {">=" if inclusive else ">"} ${first}')
            params.append(lower)
        if upper is not None:
            clauses.append(f'key COLLATE "C" < ${first + len(params)}')
            params.append(upper)
        if not options.include_expired:
            clauses.append(self.readable)
        return " AND ".join(clauses) or "TRUE", params

    def _read_keys(self, result: Result) -> list[str]:
        column, read_key = result.get_value, self.read_key
        return [read_key(column(row, 0) or b"") for row in range(result.ntuples)]

    def _read_rows(self, result: Result) -> list[KeyValue]:
        column, read_key = result.get_value, self.read_key
        return [
            KeyValue(read_key(column(row, 0) or b""), column(row, 1) or b"")
            for row in range(result.ntuples)
        ]

    def count(self, prefix: str, include_expired: bool) -> Op[int]:
        options = ScanOptions(prefix=prefix, include_expired=include_expired)
        where, params = self._range(options, first=1)
        statement = self.made(
            ("count", where),
            lambda: self.reading(
                "count",
                f"SELECT count(*) FROM {self.t} WHERE {where}",
                (TEXT,) * len(params),
                read_int,
                join=sum,
            ),
        )
        return Op(statement, params)

    def delete_prefix(self, prefix: str) -> Op[int]:
        options = ScanOptions(prefix=prefix, include_expired=True)
        where, params = self._range(options, first=1)
        statement = self.made(
            ("delete_prefix", where),
            lambda: self.statement(
                "delete_prefix",
                f"WITH {self.locked(where)}, gone AS (DELETE FROM {self.t} t USING l "
                f"WHERE t.key = l.key RETURNING t.expires_at) "
                f"SELECT count(*) FILTER (WHERE {LIVE}) FROM gone",
                (TEXT,) * len(params),
                read_int,
                join=sum,
            ),
        )
        return Op(statement, params)

    # -- upkeep

    @cached_property
    def _stats(self) -> Statement[Stats]:
        return self.reading(
            "stats",
            "SELECT count(*), count(*) FILTER (WHERE expires_at <= statement_timestamp()), "
            "coalesce(sum(octet_length(value)), 0)::bigint, "
            "coalesce(avg(octet_length(value)), 0)::float8, "
            "coalesce(max(octet_length(value)), 0)::bigint, "
            f"pg_table_size({self._regclass}), pg_indexes_size({self._regclass}), "
            f"coalesce(pg_stat_get_dead_tuples({self._regclass}), 0), "
            f"pg_stat_get_tuples_updated({self._regclass}), "
            f"pg_stat_get_tuples_hot_updated({self._regclass}) FROM {self.t}",
            (),
            _read_stats,
            join=_stats_of_all,
        )

    def stats(self) -> Op[Stats]:
        return Op(self._stats)

    def truncate(self) -> Op[None]:
        return Op(self._command("truncate", f"SET LOCAL lock_timeout = '2s'; TRUNCATE {self.t}"))

    def _make_may_maintain(self, action: str) -> Statement[bool]:
        return self.reading(
            action,
            "SELECT FROM pg_class c, pg_database d "
            f"WHERE c.oid = {self._regclass} AND d.datname = current_database() "
            "AND (pg_has_role(d.datdba, 'USAGE') "
            # An older server raises an error for the unknown word MAINTAIN.
            "OR CASE WHEN current_setting('server_version_num')::int >= 170000 "
            "THEN has_table_privilege(c.oid, 'MAINTAIN') "
            "ELSE pg_has_role(c.relowner, 'USAGE') END)",
            (),
            read_found,
        )

    def may_maintain(self, action: str) -> Op[bool]:
        """Whether the role may vacuum and analyze: without the right the server skips the table."""
        return Op(self.shaped(self._make_may_maintain, action))

    def vacuum(self) -> Op[None]:
        return Op(self._command("vacuum", f"VACUUM {self.t}"))

    def analyze(self) -> Op[None]:
        return Op(self._command("analyze", f"ANALYZE {self.t}"))

    def _command(self, name: str, sql: str) -> Statement[None]:
        return self.made(
            name, lambda: self.statement(name, sql, (), read_nothing, script=True, writes=False)
        )

    def ping(self) -> Op[None]:
        return Op(PING)

    def now(self) -> Op[datetime]:
        return Op(NOW)

    def reach(self) -> Op[list[str]]:
        """A round trip that errors call "connect": the first statement of a new store. Empty texts where
        the database is not one of Citus."""
        return Op(REACH)

    def citus(self) -> Op[list[str]]:
        """On Citus: which group of servers this is (0: the coordinator), and how the table is distributed."""
        return Op(CITUS, (self.t.encode(),))


def namespace_prefix(outer: str, prefix: object) -> str:
    """Return the prefix of a namespace inside another."""
    if not isinstance(prefix, str) or not prefix:
        raise InvalidKeyError("a namespace's prefix must be a non-empty str")
    _codec.encode_bound(prefix, "the namespace's prefix")
    return outer + prefix


def read_texts(count: int) -> Callable[[Result], list[str]]:
    """Return a decoder of a row's first columns, as text; empty where they are NULL."""
    return lambda result: [(result.get_value(0, n) or b"").decode() for n in range(count)]


PING = query("ping", "SELECT 1", read_nothing)
NOW: Statement[datetime] = query(
    "now",
    "SELECT statement_timestamp()",
    lambda result: _codec.decode_moment(result.get_value(0, 0)),
)
REACH = query(
    "connect", "SELECT to_regclass('pg_catalog.pg_dist_local_group')::text", read_texts(1)
)
CITUS = query(
    "connect",
    "SELECT (SELECT groupid::text FROM pg_catalog.pg_dist_local_group), (SELECT partmethod::text "
    "FROM pg_catalog.pg_dist_partition WHERE logicalrelid = to_regclass($1))",
    read_texts(2),
    TEXT,
)


def _stats_of_all(parts: list[Stats]) -> Stats:
    """The statistics of a table in several slots."""
    keys = sum(each.total_keys for each in parts)
    size = sum(each.total_value_bytes for each in parts)
    ratios = [each.hot_update_ratio for each in parts if each.hot_update_ratio is not None]
    return Stats(
        total_keys=keys,
        expired_keys=sum(each.expired_keys for each in parts),
        total_value_bytes=size,
        avg_value_bytes=size / keys if keys else 0.0,
        max_value_bytes=max(each.max_value_bytes for each in parts),
        table_size_bytes=sum(each.table_size_bytes for each in parts),
        index_size_bytes=sum(each.index_size_bytes for each in parts),
        dead_tuples=sum(each.dead_tuples for each in parts),
        hot_update_ratio=sum(ratios) / len(ratios) if ratios else None,
    )


def _read_stats(result: Result) -> Stats:
    column, read = result.get_value, _codec.decode_int
    updated, hot = read(column(0, 8)), read(column(0, 9))
    return Stats(
        total_keys=read(column(0, 0)),
        expired_keys=read(column(0, 1)),
        total_value_bytes=read(column(0, 2)),
        avg_value_bytes=_codec.decode_float8(column(0, 3)),
        max_value_bytes=read(column(0, 4)),
        table_size_bytes=read(column(0, 5)),
        index_size_bytes=read(column(0, 6)),
        dead_tuples=read(column(0, 7)),
        hot_update_ratio=hot / updated if updated else None,
    )
