"""Statements of a bounded table: `mark` notes that rows were read, `evict` deletes the oldest of a sample.

A row's age counts from its last write or its mark, and a marked row counts as `YOUNGER` times younger.
Rows that a pattern's logic needs, listed in `KEPT`, are never evicted.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import NamedTuple

from .._ops import codec as _codec
from .._ops.lazy import cached_property
from .._ops.op import BINARY, TEXT, Op, Result, Statement
from .sweep import Sweep
from .table import read_count, read_nothing

PLACES = 32  # of a sample, one in each 32nd of the table
PLACE_PAGES, PLACE_PAGES_MAX = 4, 32
# Bytes of a row: 80 of them besides its key and value.
ROW_SIZE = "pg_column_size(value) + octet_length(key) + 80"
YOUNGER = 8
SAMPLE_SHARE = 8  # at most an eighth of a sample goes: the oldest of it are old
# Known by what the key contains and by the form of the value: a user's own key may look alike.
KEPT = {
    "pgkv:rate:": "octet_length(value) < 1000 AND encode(value, 'escape') ~ '^[-0-9 ]+$'",
    "pgkv:cache:": "octet_length(value) = 0 OR octet_length(value) = 17 AND get_byte(value, 0) = 126",
}
_KEPT = " OR ".join(f"position('{mark}' in key) > 0 AND ({form})" for mark, form in KEPT.items())


class Sample(NamedTuple):
    """What one round of eviction saw, and did."""

    deleted: int
    rows: int
    bytes: int
    kept: int
    pages: int  # of the table


class EvictStatements(Sweep):
    """Marks and evicts rows of a table with a bound on its size."""

    def mark(self, keys: Iterable[bytes]) -> Op[int]:
        """Note that those rows were read, once in a row's life."""
        return Op(self._mark, (_codec.encode_array(sorted(set(keys))),))

    @cached_property
    def _mark(self) -> Statement[int]:
        return self.statement(
            "mark",
            f"UPDATE {self.t} t SET used_at = statement_timestamp() FROM (SELECT key FROM {self.t} "
            "WHERE key = ANY($1::text[]) AND used_at IS NULL "
            'ORDER BY key COLLATE "C" FOR NO KEY UPDATE SKIP LOCKED) k WHERE t.key = k.key',
            (BINARY,),
            read_count,
            retry_safe=True,
            writes=False,
            retried=False,
        )

    def evict(
        self, pages: int, width: int, quota: int, rows: float | None, size: float | None
    ) -> Op[Sample]:
        """Delete at most that many of a sample's oldest rows, and no more than exceed the bound.

        Args:
            pages: of the table; a small one is read as a whole.
            width: pages of one place.
            quota: rows.
            rows: rows on a page by earlier samples, which count three times this one's; or None.
            size: bytes on a page, likewise.
        """
        whole = pages <= PLACES * width
        places: list[bytes] = []
        for n in range(PLACES):
            first, end = n * pages // PLACES, (n + 1) * pages // PLACES
            if not whole:
                first = random.randint(first, end - width)  # noqa: S311  # a sample, no secret
                end = first + width
            if n == PLACES - 1 and whole:
                end += 1000  # what was added since
            places += (b"(%d,0)" % first, b"(%d,0)" % end)
        # A table that is read as a whole is counted, and may have grown since it had those pages.
        sampled, rows, size = (None,) * 3 if whole else (PLACES * width, rows, size)
        return Op(
            self._evict,
            (
                *places,
                None if sampled is None else _codec.encode_float8(sampled),
                _codec.encode_int8(quota),
                *(None if each is None else _codec.encode_float8(each) for each in (rows, size)),
                _codec.encode_float8(1 if whole else SAMPLE_SHARE),
            ),
        )

    @cached_property
    def _evict(self) -> Statement[Sample]:
        n = 2 * PLACES
        arms = " UNION ALL ".join(
            f"SELECT ctid AS at, * FROM {self.t} "
            f"WHERE ctid >= ${place}::tid AND ctid < ${place + 1}::tid"
            for place in range(1, n, 2)
        )
        pages = f"(pg_relation_size({self._regclass}) / current_setting('block_size')::float8)"
        rows, size = (
            f"(CASE WHEN ${n + 1}::float8 IS NULL THEN {seen} ELSE pages * CASE "
            f"WHEN ${n + of}::float8 IS NULL THEN {seen} / ${n + 1}::float8 "
            f"ELSE (3 * ${n + of}::float8 + {seen} / ${n + 1}::float8) / 4 END END)"
            for of, seen in ((3, "rows"), (4, "size"))
        )
        config = self.config
        most, most_bytes = config.max_entries or "Infinity", config.max_bytes or "Infinity"
        excess = (
            f"{rows} - '{most}'::float8",
            f"({size} - '{most_bytes}'::float8) * rows / greatest(size, 1)",
        )
        return self.statement(
            "evict",
            f"WITH s AS MATERIALIZED (SELECT at, key, version, {ROW_SIZE} AS size, "
            "coalesce(expires_at <= statement_timestamp(), false) AS dead, extract(epoch from "
            "statement_timestamp() - greatest(updated_at, used_at)) "
            f"/ CASE WHEN used_at IS NULL THEN 1 ELSE {YOUNGER} END AS age, ({_KEPT}) AS kept "
            f"FROM ({arms}) a), "
            "n AS (SELECT count(*)::float8 AS rows, coalesce(sum(size), 0)::float8 AS size, "
            f"count(*) FILTER (WHERE kept) AS kept, {pages} AS pages FROM s), "
            "v AS MATERIALIZED (SELECT at, key, version FROM s WHERE NOT kept "
            f"ORDER BY dead DESC, age DESC LIMIT (SELECT greatest(0, least(${n + 2}::bigint, "
            f"ceil(rows / ${n + 5}::float8), ceil(greatest({', '.join(excess)}))))::bigint FROM n)), "
            f"l AS MATERIALIZED (SELECT ctid FROM {self.t} WHERE ctid = ANY (ARRAY("
            "SELECT at FROM v)) FOR UPDATE SKIP LOCKED), "
            f"d AS (DELETE FROM {self.t} WHERE ctid = ANY (ARRAY(SELECT ctid FROM l)) "
            "AND (key, version) IN (SELECT key, version FROM v) RETURNING 1) "
            "SELECT (SELECT count(*) FROM d), rows::bigint, size::bigint, kept, pages::bigint "
            "FROM n",
            (*(TEXT,) * n, *(BINARY,) * 5),
            _read_sample,
            writes=False,
        )

    def vacuum_idle(self) -> Op[None]:
        """Reclaim the room of evicted rows, unless another process is at it."""
        return Op(self._vacuum_idle)

    @cached_property
    def _vacuum_idle(self) -> Statement[None]:
        text = f"VACUUM (SKIP_LOCKED) {self.t}"
        return self.statement("vacuum", text, (), read_nothing, script=True, writes=False)


def _read_sample(result: Result) -> Sample:
    return Sample(*(_codec.decode_int(result.get_value(0, column)) for column in range(5)))
