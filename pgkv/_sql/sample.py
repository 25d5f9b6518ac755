"""A sample of a table's rows, read by place: what it costs does not grow with the table."""

from __future__ import annotations

PLACES = 32
SAMPLE_PAGES = 64
ROWS_ON_PAGE = 300  # at most, on pages of 8 kB


def sampled(table: str, columns: str, pages: int = SAMPLE_PAGES) -> str:
    """Return a subquery: these columns of a sample, with the factor ``scale`` of its counts.

    It reads that many pages, in 32 places spread over the table. A table that is not larger is read
    as a whole: then the scale is 1 and the counts are exact.

    Args:
        table: quoted.
        columns: expressions.
        pages: a multiple of 32.
    """
    literal = table.replace("'", "''")
    width = pages // PLACES
    # The constant LIMIT keeps the planner's estimate small, however large the table is: no JIT.
    return (
        f"(WITH size AS MATERIALIZED (SELECT pg_relation_size('{literal}'::regclass) "
        "/ current_setting('block_size')::int8 AS pages), "
        "place AS MATERIALIZED (SELECT ('(' || first || ',0)')::tid AS first, "
        f"('(' || CASE WHEN pages > {pages} THEN first + {width} "
        f"ELSE (n + 1) * pages / {PLACES} END || ',0)')::tid AS last, "
        f"greatest(1, pages / {pages}.0)::float8 AS scale FROM (SELECT n, pages, n * pages / {PLACES} "
        f"+ CASE WHEN pages > {pages} THEN floor(random() * (pages / {PLACES} - {width} + 1))::int8 "
        f"ELSE 0 END AS first FROM size, generate_series(0, {PLACES - 1}) n) p) "
        f"SELECT scale, s.* FROM place CROSS JOIN LATERAL (SELECT {columns} FROM {table} "
        f"WHERE ctid >= first AND ctid < last LIMIT {width * ROWS_ON_PAGE}) s)"
    )
